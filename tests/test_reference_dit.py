"""The DiT's specification: against LeRobot's recorded policies and against PyTorch's modules."""

from __future__ import annotations

import lerobot_cases as lerobot
import numpy as np
import pytest
from lerobot_cases import condition, load, within

from tsad.convert.lerobot import read_lerobot
from tsad.families import block_costs, network_shapes
from tsad.reference import REUSE_STEP, REUSE_TYPE, SKIP, ReferencePolicy, denoise, sinusoid
from tsad.reference import dit as family

torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")

from torch_dit import Shape, predict  # noqa: E402

# LeRobot


def test_there_are_cases_of_every_kind():
    configs = [read_lerobot(lerobot.FOLDER / name) for name in lerobot.DIT_CASES]
    assert {c.policy["scheduler"]["type"] for c in configs} == {"ddpm", "ddim", "euler", "rk4"}
    assert {c.policy["network"]["use_rope"] for c in configs} == {True, False}


@pytest.mark.parametrize("name", lerobot.DIT_CASES)
def test_network_equals_lerobot(name):
    described, w, e = load(name)
    c = condition(family, described, w, e["net/t"], e["net/cond"])
    got = family.predict(w, described.policy["network"], e["net/x"].astype(np.float64), c)
    within(name, "net/out", got, e["net/out_f64"])


@pytest.mark.parametrize("name", lerobot.DIT_CASES)
def test_each_module_equals_lerobot(name):
    """Each by itself, from what LeRobot's modules before it put out."""
    described, w, e = load(name)
    network = described.policy["network"]
    c = condition(family, described, w, e["net/t"][:1], e["net/cond"][:1])
    seen = {key[6:-4]: value for key, value in e.items() if key.startswith("trace/")}
    time = seen.pop("time_mlp")
    assert np.abs(c[:, : time.shape[1]] - time).max() < 5e-8
    x = e["net/x"][:1] @ w["input_proj.weight"].T + w["input_proj.bias"]
    x = x + (w["pos_embedding"] if network["use_positional_encoding"] else 0)
    for b, block in enumerate(family.block_names(network)):
        y = family.branch(w, network, b, x, c)
        within(name, "net/out", y, seen.pop(block))
        x = x + family.modulation(w, b, c)[2] * y
        if b % 2:
            whole = seen.pop(block.removesuffix(".mlp"))
            within(name, "net/out", x, whole)
            x = whole
    assert not seen


@pytest.mark.parametrize("name", lerobot.DIT_CASES)
def test_sampler_steps_equal_lerobot(name):
    described, w, e = load(name)
    policy = ReferencePolicy(described.policy, described.tensors)
    if "sample/times" in e:
        assert policy.timesteps.tolist() == e["sample/times"].tolist()
    K, network = len(policy.timesteps), described.policy["network"]
    assert K == len(e["sample/after_step_f64"])
    noise = lerobot.all_noise(e, "sample", K).astype(np.float64)
    for lane, cond in enumerate(e["sample/cond"]):
        c = condition(family, described, w, policy.timesteps, np.repeat(cond[None], K, 0))
        for k in (1, 2, K // 2, K):  # a chunk of the first k steps adds no noise at its end
            dense = np.zeros((k, len(policy.blocks)), np.uint8)
            x = denoise(w, network, policy.sampler, c, noise[:, lane], dense, {})
            added = policy.sampler.table[k - 1, 7] * noise[k, lane] if k < K else 0
            within(name, "sample/after_step", x + added, e["sample/after_step_f64"][k - 1, lane])


@pytest.mark.parametrize("name", lerobot.DIT_CASES)
def test_chunks_equal_lerobot(name):
    """What LeRobot's encoder makes of an observation to actions in raw units."""
    described, _, e = load(name)
    policy = ReferencePolicy(described.policy, described.tensors, lanes=2)
    obs = e["chunk/cond"].reshape(2, policy.network["n_obs_steps"], -1)
    state = described.features[0].dim  # which comes first, normalised
    np.testing.assert_array_equal(obs[..., :state], e["chunk/observation.state"])
    got = policy(obs, lerobot.all_noise(e, "chunk", policy.num_inference_steps))
    assert got.shape == e["chunk/action_f64"].shape
    within(name, "chunk/action", got, e["chunk/action_f64"])


# PyTorch


SHAPES = {
    "lerobot": Shape(),
    "mha": Shape(use_rope=False, positions=True),
    "no_positions": Shape(use_rope=False, num_heads=1, hidden_dim=7, n_obs_steps=1),
    "both": Shape(positions=True, rope_base=100.0, horizon=5, num_heads=3, hidden_dim=30),
    "narrow": Shape(hidden_dim=6, num_heads=3, n_emb=4, horizon=1, n_obs_steps=1, num_layers=1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_network_equals_pytorch(name):
    shape = SHAPES[name]
    network, weights = family.check(shape.network()), shape.weights(seed=1)
    assert {k: v.shape for k, v in weights.items()} == network_shapes(network)
    rng = np.random.default_rng(2)
    sample = rng.standard_normal((3, shape.horizon, shape.action_dim))
    obs = rng.standard_normal((3, shape.n_obs_steps, shape.obs_dim))
    t = np.array([0, 7.25, 99])
    code = sinusoid(t, shape.n_emb, np.float64, angles=np.float32)
    expected = predict(shape, weights, sample, code, obs).numpy()
    w = {k: v.astype(np.float64) for k, v in weights.items()}
    got = family.predict(w, network, sample, family.encode(w, network, t, obs))
    # PyTorch's power of two float32 numbers may be the one beside the right one
    assert np.abs(got - expected).max() <= (1e-6 if shape.use_rope else 1e-12)


def test_costs_are_those_of_the_products():
    net = SHAPES["lerobot"].network()
    T, D = net["horizon"], net["hidden_dim"]
    attention = T * D * 3 * D + T * D * D + 2 * T * T * D
    assert block_costs(net) == (attention, T * D * 4 * D + T * 4 * D * D) * 2


# Plans and settings


def policy_of(shape: Shape, K: int, seed: int) -> ReferencePolicy:
    identity = {"scale": 1.0, "offset": 0.0}
    scheduler = {"type": "euler", "num_inference_steps": K}
    normalizer = {"obs": identity, "action": identity}
    config = {"network": shape.network(), "scheduler": scheduler, "normalizer": normalizer}
    return ReferencePolicy(config, shape.weights(seed))


def test_a_reused_branch_is_gated_by_the_step_that_reuses_it():
    """Two Euler steps by hand, with the gates that each step has."""
    shape, K = SHAPES["lerobot"], 2
    policy = policy_of(shape, K, 1)
    rng = np.random.default_rng(2)
    obs = rng.standard_normal((1, shape.n_obs_steps, shape.obs_dim))
    noise = rng.standard_normal((K, 1, shape.horizon, shape.action_dim))
    plan = np.array([[0, 0, REUSE_TYPE, SKIP], [REUSE_STEP, 0, REUSE_TYPE, REUSE_STEP]], np.uint8)
    plan[1, 3] = REUSE_TYPE
    got = policy(obs, noise, first=plan, return_horizon=True)[0]
    w, network, c = policy._w, policy.network, policy.encode(obs[0])
    x = noise[0, 0]
    for k in range(K):
        h = x @ w["input_proj.weight"].T + w["input_proj.bias"]
        gates = [family.modulation(w, b, c[k])[2] for b in range(4)]
        if k == 0:
            attention = family.branch(w, network, 0, h, c[k])
        h = h + gates[0] * attention
        mlp = family.branch(w, network, 1, h, c[k])
        h = h + gates[1] * mlp + gates[2] * attention + (gates[3] * mlp if k else 0)
        x = x + (h @ w["output_proj.weight"].T + w["output_proj.bias"]) / K
    np.testing.assert_allclose(got, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, r"network.hidden_dim: expected a number divisible by num_heads \(5\)"),
        ({"hidden_dim": 12}, r"hidden_dim: expected an even multiple of num_heads \(4\)"),
        ({"timestep_embed_dim": 9}, "timestep_embed_dim: expected an even number"),
        ({"rope_base": 0.0}, "rope_base: expected a number above"),
        ({"use_rope": 1}, "use_rope: expected true or false, got 1"),
        ({"num_layers": 0}, "num_layers: expected an integer from 1"),
        ({"n_layer": 8}, "unknown key 'n_layer' in network"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        family.check(Shape().network() | change)
