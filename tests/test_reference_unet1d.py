"""The UNet's specification: against LeRobot's recorded policies and against PyTorch's modules."""

from __future__ import annotations

import math
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest
from lerobot_cases import condition, load, within

from tsad.families import block_costs, network_shapes
from tsad.reference import (
    REUSE_ROLLOUT,
    REUSE_STEP,
    REUSE_TYPE,
    SKIP,
    ReferencePolicy,
    denoise,
    sinusoid,
)
from tsad.reference import unet1d as family
from tsad.reference.layers import dense

torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")

from torch_unet import Shape, predict  # noqa: E402

# LeRobot


@pytest.mark.parametrize("name", lerobot.CASES)
def test_network_equals_lerobot(name):
    described, w, e = load(name)
    c = condition(family, described, w, e["unet/t"], e["unet/cond"])
    got = family.predict(w, described.policy["network"], e["unet/x"].astype(np.float64), c)
    within(name, "unet/out", got, e["unet/out_f64"])


@pytest.mark.parametrize("name", lerobot.CASES)
def test_each_module_equals_lerobot(name):
    """Each by itself, from what LeRobot's modules before it put out."""
    described, w, e = load(name)
    network, levels = described.policy["network"], len(described.policy["network"]["down_dims"])
    c = condition(family, described, w, e["unet/t"][:1], e["unet/cond"][:1])
    seen = {key[6:-4]: value for key, value in e.items() if key.startswith("trace/")}
    # nearer than a time embedding whose angles are not rounded as PyTorch rounds them
    time = seen.pop("diffusion_step_encoder")
    assert np.abs(c[:, : time.shape[1]] - time).max() < 5e-8
    x = np.swapaxes(e["unet/x"][:1].astype(np.float64), 1, 2)
    checked = []

    def check(module: str, got: Any) -> Any:
        assert got.shape == seen[module].shape
        within(name, "unet/out", got, seen[module])
        checked.append(module)
        return seen[module]

    def pair(module: str, x: Any) -> Any:
        for block in (f"{module}.0", f"{module}.1"):
            branch = family.branch(w, network, block, x, c)
            x = check(block, branch + family.residual(w, block, x))
        return x

    skips = []
    for i in range(levels):
        x = pair(f"down_modules.{i}", x)
        skips.append(x)
        if i < levels - 1:
            x = check(f"down_modules.{i}.2", family.downsample(w, f"down_modules.{i}.2", x))
        else:
            assert np.array_equal(seen[f"down_modules.{i}.2"], x)
            checked.append(f"down_modules.{i}.2")
    x = pair("mid_modules", x)
    for i in range(levels - 1):
        x = pair(f"up_modules.{i}", np.concatenate([x, skips.pop()], 1))
        x = check(f"up_modules.{i}.2", family.upsample(w, f"up_modules.{i}.2", x))
    check("final_conv.0", family.conv_block(x, w, "final_conv.0", 8))
    assert set(checked) == set(seen)
    # resampling, and the last convolution
    assert len(seen) == len(family.block_names(network)) + 2 * levels


@pytest.mark.parametrize("name", lerobot.CASES)
def test_sampler_steps_equal_lerobot(name):
    described, w, e = load(name)
    policy = ReferencePolicy(described.policy, described.tensors)
    assert policy.timesteps.tolist() == e["sample/times"].tolist()
    K, network = len(policy.timesteps), described.policy["network"]
    noise = lerobot.all_noise(e, "sample", K).astype(np.float64)
    for lane, cond in enumerate(e["sample/cond"]):
        c = condition(family, described, w, policy.timesteps, np.repeat(cond[None], K, 0))
        for k in (1, 2, K // 2, K):  # a chunk of the first k steps adds no noise at its end
            dense = np.zeros((k, len(policy.blocks)), np.uint8)
            x = denoise(w, network, policy.sampler, c, noise[:, lane], dense, {})
            added = policy.sampler.table[k - 1, 7] * noise[k, lane] if k < K else 0
            within(name, "sample/after_step", x + added, e["sample/after_step_f64"][k - 1, lane])


@pytest.mark.parametrize("name", lerobot.CASES)
def test_chunks_equal_lerobot(name):
    """Raw observations with their history to actions in raw units: all that a folder says."""
    described, _, e = load(name)
    policy = ReferencePolicy(described.policy, described.tensors, lanes=2)
    raw = {f.name: e[f"offline/raw/{f.name}"] for f in described.features}
    obs = lerobot.side_by_side(described, raw)
    got = policy(obs, lerobot.all_noise(e, "offline", policy.num_inference_steps))
    assert got.shape == e["offline/action_f64"].shape
    within(name, "offline/action", got, e["offline/action_f64"])


@pytest.mark.parametrize("name", lerobot.EPISODES)
def test_episodes_equal_select_action(name):
    """A control loop: history that begins with copies, a chunk when the last is used up, resets."""
    described, _, e = load(name)
    policy = ReferencePolicy(described.policy, described.tensors)
    raw = {f.name: e[f"episode/raw/{f.name}"] for f in described.features}
    n_obs, history, queue, inferences = policy.network["n_obs_steps"], [], [], 0
    for i, now in enumerate(lerobot.side_by_side(described, raw)):
        if i in e["episode/reset_before"]:
            history, queue = [], []
        history = [*(history or n_obs * [now]), now][-n_obs:]
        assert e["episode/infers"][i] == (not queue)
        if not queue:
            drawn = {k: e[k][inferences] for k in ("episode/noise", "episode/step_noise") if k in e}
            noise = lerobot.all_noise(drawn, "episode", policy.num_inference_steps)
            policy.reset()  # which makes a chunk dense
            queue = list(policy(np.stack(history, 1), noise)[0])
            inferences += 1
        # LeRobot's actions here are float32: as far again from what is right
        within(name, "offline/action", queue.pop(0), e["episode/action"][i, 0])
    assert inferences == len(e["episode/noise"]) > 1


# PyTorch


SHAPES = {
    "lerobot": Shape(),
    "horizon64": Shape(horizon=64),
    "bias_only": Shape(kernel_size=3, n_groups=4, scales=False, n_emb=4),
    "kernel7": Shape(kernel_size=7, horizon=24, n_obs_steps=1),
    "kernel1": Shape(down_dims=(24, 48), n_groups=6, action_dim=7, kernel_size=1),
    "one_level": Shape(down_dims=(16,), horizon=7),
    "four_levels": Shape(down_dims=(8, 16, 32, 64)),
    "narrowing": Shape(down_dims=(32, 16, 8)),  # the way up has blocks as wide as their input
    "square": Shape(down_dims=(8, 16), action_dim=8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_network_equals_pytorch(name):
    shape = SHAPES[name]
    network, weights = family.check(shape.network(4)), shape.weights(seed=1)
    assert {k: v.shape for k, v in weights.items()} == network_shapes(network)
    names = [name for name, *_ in shape.blocks()]
    assert family.block_names(network) == names
    rng = np.random.default_rng(2)
    sample = rng.standard_normal((3, shape.horizon, shape.action_dim))
    obs = rng.standard_normal((3, shape.n_obs_steps, shape.obs_dim))
    t = np.array([0, 7, 99])
    code = sinusoid(t, shape.n_emb, np.float64, angles=np.float32)
    expected = predict(shape, weights, sample, code, obs).numpy()
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    got = family.predict(w, network, sample, family.encode(w, network, t, obs))
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def test_angles_of_the_time_are_those_of_pytorch_in_float32():
    t = torch.arange(100)
    frequency = torch.exp(torch.arange(64) * -(math.log(10000) / 63))
    angle = (t[:, None] * frequency).double()
    expected = torch.cat([angle.sin(), angle.cos()], 1).numpy()
    got = sinusoid(t.numpy(), 128, np.float64, angles=np.float32)
    # a frequency of PyTorch may be the float32 beside the right one
    assert np.abs(got - expected).max() <= 99 * 2.0**-24 + 2.0**-24
    exact = sinusoid(t.numpy(), 128, np.float64)
    assert np.abs(exact - expected).mean() > 5 * np.abs(got - expected).mean()


@pytest.mark.parametrize("name", SHAPES)
def test_costs_are_the_products_of_both_convolutions(name):
    network = SHAPES[name].network(4)
    blocks = SHAPES[name].blocks()
    for (_, c_in, c_out, length), cost in zip(blocks, block_costs(network), strict=True):
        counted = 0.0
        for channels in (c_in, c_out):
            ones = torch.ones(1, channels, length, dtype=torch.float64)
            taps = torch.ones(c_out, channels, network["kernel_size"]).double()
            padding = network["kernel_size"] // 2
            counted += float(torch.conv1d(ones, taps, padding=padding).sum())
        assert cost == counted


# Plans


def policy_of(shape: Shape, K: int, seed: int) -> ReferencePolicy:
    identity = {"scale": 1.0, "offset": 0.0}
    scheduler = {"type": "ddpm", "num_inference_steps": K}
    normalizer = {"obs": identity, "action": identity}
    config = {"network": shape.network(4), "scheduler": scheduler, "normalizer": normalizer}
    return ReferencePolicy(config, shape.weights(seed))


def inputs(shape: Shape, K: int, seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((1, shape.n_obs_steps, shape.obs_dim))
    return obs, rng.standard_normal((K, 1, shape.horizon, shape.action_dim))


def test_a_skipped_block_passes_its_residual_on():
    shape = SHAPES["lerobot"]
    policy = policy_of(shape, 1, 1)
    silent = dict(policy._w)
    name = policy.blocks[5]
    for part in ("weight", "bias"):  # its last norm gives 0, and so does Mish
        key = f"{name}.conv2.block.1.{part}"
        silent[key] = np.zeros_like(silent[key])
    (obs, noise), plan = inputs(shape, 1, 2), np.zeros((1, len(policy.blocks)), np.uint8)
    plan[0, 5] = SKIP
    skipped = policy(obs, noise, first=plan)
    policy._w = silent
    policy.reset()
    np.testing.assert_allclose(policy(obs, noise), skipped, rtol=0, atol=1e-12)


def test_blocks_of_one_shape_stand_in_for_each_other_and_no_others():
    shape = SHAPES["lerobot"]  # widths 16, 32, 64 at 16, 8, 4 steps
    policy = policy_of(shape, 2, 1)
    types = policy.family.block_types(policy.network)
    assert types[4] == types[5] == types[6] == types[7] == "conv_residual[64x4]"
    assert types[8] == "conv_residual[32x4]" and types.count(types[8]) == 2
    assert len(set(types)) == 5
    plan = np.zeros((2, len(types)), np.uint8)
    plan[0, 8] = REUSE_TYPE  # the first of its type
    with pytest.raises(
        ValueError, match=r"block 8 \(up_modules.0.0\): got reuse_type, but no conv_"
    ):
        policy(*inputs(shape, 2, 2), first=plan)
    plan[0, 8], plan[0, 7] = 0, REUSE_TYPE
    given = []

    def value(b, compute):
        given.append(compute() if b != 7 else given[6])
        return given[-1]

    obs, noise = inputs(shape, 2, 2)
    got = policy(obs, noise, first=plan, return_horizon=True)
    sampler, memory = policy.sampler, policy.encode(obs[0])
    x = noise[0, 0]
    for k in range(2):
        given = []
        e = policy.family.predict(
            policy._w, policy.network, x, memory[k], value if k == 0 else dense
        )
        a, b, r, c, d, f, g, h, _ = sampler.table[k]
        x = c * np.clip(a * x + b * e, -r, r) + d * x + (h * noise[1, 0] if k == 0 else 0)
    np.testing.assert_allclose(got[0], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("source", [REUSE_STEP, REUSE_ROLLOUT])
def test_reuse_of_a_block_is_what_it_computed(source):
    """All blocks reuse what the same chunk computed: the same chunk again."""
    shape = SHAPES["kernel7"]
    policy = policy_of(shape, 3, 1)
    obs, noise = inputs(shape, 3, 2)
    noise[0] *= 0.1  # no clipping
    plan = np.zeros((3, len(policy.blocks)), np.uint8)
    if source == REUSE_ROLLOUT:
        dense_chunk = policy(obs, noise)
        plan[:] = source
        np.testing.assert_array_equal(policy(obs, noise, plan), dense_chunk)
    else:
        plan[1:] = source
        rollout = {}
        memory = policy.encode(obs[0])
        arguments = (policy._w, policy.network, policy.sampler, memory, noise[:, 0])
        denoise(*arguments, plan, rollout)
        assert sorted(rollout) == [(0, b) for b in range(len(policy.blocks))]
        with_rollout = {(k, b): rollout[0, b] for k in range(3) for b in range(len(policy.blocks))}
        plan[1:] = REUSE_ROLLOUT
        by_rollout = denoise(*arguments, plan, with_rollout)
        plan[1:] = REUSE_STEP
        np.testing.assert_array_equal(denoise(*arguments, plan, {}), by_rollout)


# Settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"horizon": 18}, "network.horizon: expected a multiple of 4, as .*, got 18"),
        ({"kernel_size": 4}, "network.kernel_size: expected an odd number, got 4"),
        ({"n_groups": 5}, r"network.down_dims: expected numbers divisible by n_groups \(5\)"),
        ({"down_dims": [4, 8], "n_groups": 4}, "down_dims: .*divisible by 8, the last norm"),
        ({"down_dims": []}, "down_dims: expected a list of 1 to 12 integers"),
        ({"down_dims": [8, 16.0]}, "down_dims: expected a list of 1 to 12 integers"),
        ({"down_dims": 8}, "down_dims: expected a list of 1 to 12 integers.*got 8"),
        ({"diffusion_step_embed_dim": 7}, "diffusion_step_embed_dim: expected an even number"),
        ({"use_film_scale_modulation": "yes"}, "expected true or false, got 'yes'"),
        ({"type": "unet2d"}, 'network.type: expected one of "unet1d", got'),
        ({"n_layer": 8}, "unknown key 'n_layer' in network"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        family.check(Shape().network(4) | change)
