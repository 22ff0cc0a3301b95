"""Sensitivity: gradients against finite differences, tables against loops, predictions against
what the engine really does."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config as case_config
from cases import random_tensors
from policies import make_policy, noises, observations

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan, planners
from tsad.config import PolicyConfig
from tsad.planners.effects import EffectPlanner, Effects
from tsad.reference import sinusoid
from tsad.samplers import make_sampler

torch = pytest.importorskip("torch")
import torch.nn.functional as F  # noqa: E402, N812
import torch_dit  # noqa: E402
import torch_unet  # noqa: E402

from tsad.training import sensitivity  # noqa: E402
from tsad.training.network import from_config  # noqa: E402

STEPS, CHUNKS = 5, 3
UNET = torch_unet.Shape(down_dims=(8, 16), horizon=8, n_groups=4)
DIT = torch_dit.Shape(hidden_dim=12, num_heads=3, horizon=6)
NETWORKS = {
    "dpt": case_config("tiny")["network"],
    "unet1d": UNET.network(4),
    "dit": DIT.network(4),
}
WEIGHTS = {
    "dpt": random_tensors(NETWORKS["dpt"], 0),
    "unet1d": UNET.weights(0),
    "dit": DIT.weights(0),
}


def make_twin(
    steps: int = STEPS, sampler: str | None = None, dtype: Any = torch.float64, family: str = "dpt"
) -> Any:
    """A small network in double precision; the transformer is that of `make_policy()`."""
    case = case_config("tiny", prediction_type="sample", clip_sample=False)
    case["network"] = NETWORKS[family]
    case["normalizer"] = {
        key: {part: numbers[:1] * NETWORKS[family][f"{key}_dim"] for part, numbers in map_.items()}
        if family != "dpt"
        else map_
        for key, map_ in case["normalizer"].items()
    }
    del case["cost"]
    table = make_sampler(case["scheduler"], sampler=sampler, num_inference_steps=steps)
    return sensitivity.Twin(PolicyConfig.from_dict(case), WEIGHTS[family], table, dtype)


def play(twin: Any, obs: Any, noise: Any, change: Any = None) -> tuple[Any, Any, Any]:
    """Final sample (C, horizon, action_dim), inputs (C, K, ...), values {(k, b): (C, ...)}.

    ``change(k, b, value)`` is what a branch gives instead of its value.
    """
    x, before = noise[:, 0], (torch.zeros_like(noise[:, 0]),) * 2
    values: dict[tuple[int, int], Any] = {}
    inputs = []
    for k in range(len(twin.sampler.timesteps)):

        def value(b: int, compute: Any, k: int = k) -> Any:
            given = compute()
            given.tensor = given.tensor if change is None else change(k, b, given.tensor)
            values[k, b] = given.tensor
            return given

        inputs.append(x)
        x, before, _, _ = twin.step(k, x, before, twin.condition(obs, k), value)
        if k + 1 < noise.shape[1]:
            x = x + float(twin.sampler.table[k, 7]) * noise[:, k + 1]
    return x, torch.stack(inputs, 1), values


def scene(twin: Any, chunks: int = CHUNKS, seed: int = 0) -> tuple[Any, Any]:
    net = twin.config.network
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((chunks, net.n_obs_steps, net.obs_dim))
    steps = len(twin.sampler.timesteps)
    noise = torch.from_numpy(rng.standard_normal((chunks, steps, net.horizon, net.action_dim)))
    return obs, noise


def outputs(family: str, x: Any, t: int, condition: Any) -> Any:
    """What the network gives, by PyTorch's own modules."""
    if family == "dpt":
        network = from_config(NETWORKS[family]).double().eval()
        network.load_state_dict({k: torch.from_numpy(v) for k, v in WEIGHTS[family].items()})
        with torch.no_grad():
            return network(x, t, torch.from_numpy(condition))
    shape, module = (UNET, torch_unet) if family == "unet1d" else (DIT, torch_dit)
    time = sinusoid(np.full(len(x), t), shape.n_emb, np.float64, angles=np.float32)
    return module.predict(shape, WEIGHTS[family], x, time, condition)


@pytest.mark.parametrize("family", NETWORKS)
def test_the_twin_is_the_network(family: str) -> None:
    twin = make_twin(family=family)
    obs, noise = scene(twin)
    normalised = twin.config.normalizer.obs.normalise(obs, np.float64)
    for k in (0, STEPS - 1):
        *_, e = twin.step(k, noise[:, k], 0 * noise[:, k], twin.condition(obs, k))
        wanted = outputs(family, noise[:, k], int(twin.sampler.timesteps[k]), normalised)
        np.testing.assert_allclose(e, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "sampler"),
    [("dpt", "ddpm"), ("dpt", "ddim"), ("dpt", "dpmsolver++"), ("unet1d", "ddpm"), ("dit", "ddim")],
)
def test_first_order_equals_finite_differences(family: str, sampler: str) -> None:
    twin = make_twin(sampler=sampler, family=family)
    obs, noise = scene(twin)
    right, inputs, values = play(twin, obs, noise)
    one = torch.zeros_like(right)
    one[:, 2, 1] = 1  # the sample whose derivative is looked at
    window = sensitivity.Window(obs, inputs.numpy())
    found = sensitivity.gradients(twin, window, [one])
    for (k, b), value in values.items():
        np.testing.assert_allclose(found.values[b][k], value.reshape(CHUNKS, -1), atol=1e-12)
    small = 1e-6
    last = len(twin.types) - 1
    for k, b, i in [(4, last, 3), (0, 0, 2), (2, 3, 0), (3, 1, 1), (1, last - 1, 0)]:
        away = values[i, b] - values[k, b]

        def change(step: int, block: int, value: Any, k: int = k, b: int = b, d: Any = away) -> Any:
            return value + small * d if (step, block) == (k, b) else value

        changed = play(twin, obs, noise, change)[0]
        wanted = (changed - right)[:, 2, 1] / small
        first_order = (found.slopes[b][0, k] * away.reshape(CHUNKS, -1)).sum(-1)
        assert float(wanted.abs().min()) > 1e-6  # there is something to see
        np.testing.assert_allclose(first_order, wanted, rtol=1e-4, atol=1e-9)


def measured(twin: Any, **options: Any) -> tuple[Effects, Any, Any]:
    """Effects of one window, and the values and slopes they came from."""
    obs, noise = scene(twin)
    _, inputs, _ = play(twin, obs, noise)
    window = sensitivity.Window(obs, inputs.numpy())
    kept: list[Any] = []
    plain = sensitivity.gradients

    def gradients(*args: Any) -> Any:
        kept.append(plain(*args))
        return kept[-1]

    sensitivity.gradients = gradients
    try:
        effects = sensitivity.measure(twin, [window], **options)
    finally:
        sensitivity.gradients = plain
    found = kept[0]
    return effects, [v.numpy() for v in found.values], [g.numpy() for g in found.slopes]


@pytest.mark.parametrize("family", NETWORKS)
def test_tables_equal_loops(family: str) -> None:
    twin = make_twin(family=family)
    effects, v, g = measured(twin, projections=2, seed=3)
    B, K = len(v), len(v[0])
    numbers = float(twin.executed(1).sum())
    assert numbers == twin.config.network.n_action_steps * twin.config.network.action_dim

    def squared(k: int, b: int, value: Any) -> Any:
        """(P, C) projected changes, of cell (k, b) taking value (C, D)."""
        return (g[b][:, k] * (value - v[b][k])).sum(-1)

    def mean(changes: Any) -> float:
        return float((changes**2).mean() / numbers)

    for b, i, k in itertools.product(range(B), range(K), range(K)):
        if k > i:
            assert effects.pair[b, i, k] == pytest.approx(mean(squared(k, b, v[b][i])), rel=1e-4)
            together = sum(squared(step, b, v[b][i]) for step in range(i + 1, k + 1))
            assert effects.segment[b, i, k + 1] == pytest.approx(mean(together), rel=1e-4)
        else:
            assert effects.pair[b, i, k] == 0
    for k, b in itertools.product(range(K), range(B)):
        assert effects.skip[k, b] == pytest.approx(mean(squared(k, b, 0 * v[b][k])), rel=1e-4)
        for c in range(B):
            step = k if c < b else k - 1
            if c == b or twin.types[c] != twin.types[b] or step < 0:
                assert np.isnan(effects.kind[k, b, c])
            else:
                wanted = mean(squared(k, b, v[c][step]))
                assert effects.kind[k, b, c] == pytest.approx(wanted, rel=1e-4)
        for age in (1, 2):
            changes = (g[b][:, k, age:] * (v[b][k, :-age] - v[b][k, age:])).sum(-1)
            assert effects.rollout[age - 1, k, b] == pytest.approx(mean(changes), rel=1e-4)
    assert np.isnan(effects.rollout[CHUNKS - 1 :]).all()
    assert effects.metadata["chunks"] == CHUNKS and effects.metadata["projections"] == 2


def test_random_projections_average_to_the_squared_norm() -> None:
    twin = make_twin()
    effects, v, _ = measured(twin, projections=400, seed=0)
    obs, noise = scene(twin)
    _, inputs, _ = play(twin, obs, noise)
    executed = twin.executed(CHUNKS)
    every = []
    for index in torch.nonzero(executed[0]):
        direction = torch.zeros_like(executed)
        direction[:, index[0], index[1]] = 1
        every.append(direction)
    window = sensitivity.Window(obs, inputs.numpy())
    slopes = sensitivity.gradients(twin, window, every).slopes
    for b, i, k in [(0, 0, 1), (4, 1, 4), (5, 2, 3)]:
        change = (slopes[b][:, k].numpy() * (v[b][i] - v[b][k])).sum(-1)
        assert effects.pair[b, i, k] == pytest.approx((change**2).mean(), rel=0.25)


def from_policy(policy: Any, chunks: int = 6) -> Effects:
    """Effects of `make_policy()` on the observations and noise of `errors`."""
    twin = make_twin(policy.num_inference_steps)
    noise = torch.from_numpy(noises(policy, 1, chunks).swapaxes(0, 1).astype(np.float64))
    obs = observations(policy, 2, chunks)
    _, inputs, _ = play(twin, obs, noise)
    window = sensitivity.Window(obs, inputs.numpy())
    return sensitivity.measure(twin, [window], projections=16)


def error(policy: Any, plan: Plan) -> float:
    """Mean squared change of normalised executed actions, all lanes."""
    action = policy.config["normalizer"]["action"]
    obs, noise = observations(policy, 2, policy.lanes), noises(policy, 1, policy.lanes)
    results = []
    for each in (Plan(np.zeros_like(plan.sources)), plan):
        policy.plan = each
        policy.reset(seed=0)
        results.append(policy(obs, noise=noise) * np.array(action["scale"]))
    return float(((results[1] - results[0]) ** 2).mean())


def spearman(a: Any, b: Any) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_predictions_rank_what_the_engine_does() -> None:
    """Every single cell that reuses an own value, its type's, or nothing."""
    policy = make_policy(lanes=6)
    effects = from_policy(policy)
    K, B = policy.num_inference_steps, len(policy.blocks)
    for source in (REUSE_STEP, REUSE_TYPE, SKIP):
        predicted, true = [], []
        for k, b in itertools.product(range(1, K), range(B)):
            sources = np.zeros((K, B), np.uint8)
            sources[k, b] = source
            plan = Plan(sources, sources, types=policy.block_types)
            predicted.append(effects.predict(plan))
            true.append(error(policy, plan))
        assert spearman(predicted, true) > 0.9, source
        # not the order alone
        assert 0.5 < np.median(np.array(predicted) / np.array(true)) < 2


def test_predictions_rank_whole_plans() -> None:
    policy = make_policy(lanes=6)
    effects = from_policy(policy)
    rng = np.random.default_rng(0)
    K, B = policy.num_inference_steps, len(policy.blocks)
    predicted, true = [], []
    for _ in range(60):
        sources = np.where(rng.random((K, B)) < rng.uniform(0.01, 0.2), REUSE_STEP, COMPUTE)
        sources[0] = COMPUTE
        plan = Plan(sources, sources, types=policy.block_types)
        predicted.append(effects.predict(plan))
        true.append(error(policy, plan))
    assert spearman(predicted, true) > 0.9


def test_predict_by_hand() -> None:
    effects = from_policy(make_policy())
    types = make_policy().block_types
    K, B = 8, 6
    sources = np.zeros((K, B), np.uint8)
    sources[3:5, 2] = REUSE_STEP
    sources[6, 1] = SKIP
    sources[6, 2] = REUSE_ROLLOUT
    sources[7, 2] = REUSE_STEP  # of step 5, its segment cut off by the rollout
    sources[4, 5] = REUSE_TYPE  # block 2 rests, the last of the type is its own step 3
    sources[1, 4] = REUSE_TYPE  # block 1, same step
    wanted = effects.segment[2, 2, 5] + effects.skip[6, 1] + effects.rollout[0, 6, 2]
    wanted += effects.pair[2, 5, 7] + effects.pair[5, 3, 4] + effects.kind[1, 4, 1]
    plan = Plan(sources, types=types)
    assert effects.predict(plan) == pytest.approx(float(wanted), rel=1e-5)
    apart = effects.pair[2, 2, 3] + effects.pair[2, 2, 4] - effects.segment[2, 2, 5]
    assert effects.predict(plan, coherent=False) == pytest.approx(float(wanted + apart), rel=1e-5)


def random_own_values(policy: Any, plan: Plan, seed: int) -> Plan:
    """Own values in random cells, at most as sparse as `plan`."""
    B = len(policy.blocks)
    sources = np.full(plan.sources.shape, COMPUTE, np.uint8)
    for cell in np.random.default_rng(seed).permutation(np.arange(B, sources.size)).tolist():
        trial = sources.copy()
        trial[divmod(cell, B)] = REUSE_STEP
        if Plan(trial, trial, cost=policy.block_costs).sparsity <= plan.sparsity + 1e-9:
            sources = trial
    return Plan(sources, sources, cost=policy.block_costs)


@pytest.mark.parametrize("coherent", [True, False])
def test_the_plan_beats_random_ones_of_its_cost(coherent: bool) -> None:
    """In its own eyes all of them, and most of them in truth while first order holds.

    (Random weights have no redundancy: from half the cost on, everything is far off.)
    """
    policy = make_policy(lanes=6)
    effects = from_policy(policy)
    planner = EffectPlanner(effects, coherent=coherent)
    finest = policy.block_costs.max() / policy.block_costs.sum() / 8
    for sparsity in (0.0, 0.1, 0.2, 0.5, 0.8):
        plan = planner(policy, sparsity)
        assert sparsity - 1e-9 <= plan.sparsity <= sparsity + finest
        others = [random_own_values(policy, plan, seed) for seed in range(15)]
        foreseen = effects.predict(plan, coherent)
        assert all(effects.predict(other, coherent) >= foreseen - 1e-9 for other in others)
        if 0 < sparsity < 0.5:
            true = error(policy, plan)
            assert np.mean([error(policy, other) > true for other in others]) > 0.8
    with pytest.raises(ValueError, match="policy: expected 8 steps"):
        planner(make_policy(steps=4), 0.5)


def test_blocks_above_the_first_layer_may_begin_late() -> None:
    policy = make_policy(lanes=6)
    effects = from_policy(policy)
    late, costs = EffectPlanner(effects, late=True), policy.block_costs
    for sparsity in (0.0, 0.3, 0.6, 0.85, 0.92):
        plan = late(policy, sparsity)
        assert sparsity - 1e-9 <= plan.sparsity <= sparsity + costs.max() / costs.sum() / 8
        assert (plan.sources[0, :3] == COMPUTE).all()
        assert np.isfinite(error(policy, plan))  # it runs, right after a reset
        for b in range(3, 6):  # until it is computed a block waits as cheaply as the tables know
            for k in range(8):
                if plan.sources[k, b] == COMPUTE:
                    break
                options = {REUSE_TYPE: effects.kind[k, b, b - 3], SKIP: effects.skip[k, b]}
                assert plan.sources[k, b] == min(options, key=options.__getitem__)
    assert (late(policy, 0.85).sources[0] != COMPUTE).any()
    assert late(policy, 0.92).sparsity > policy.max_sparsity
    with pytest.raises(ValueError, match="sparsity: expected 0 to 0.9375"):
        late(policy, 0.95)


def first_input(family: str, x: Any, t: int, condition: Any) -> Any:
    """What enters the first block with the time in it, by PyTorch's own functions."""
    w = {name: torch.from_numpy(value).double() for name, value in WEIGHTS[family].items()}
    if family == "dpt":
        code = torch.from_numpy(sinusoid(t, NETWORKS[family]["n_emb"], np.float64))
        return F.linear(x, w["input_emb.weight"], w["input_emb.bias"]) + w["pos_emb"] + code
    if family == "unet1d":
        block = "down_modules.0.0"
        film = torch_unet.linear(w, f"{block}.cond_encoder.1", F.mish(condition))[..., None]
        scale, shift = film.chunk(2, 1)
        y = torch_unet.conv_norm(w, f"{block}.conv1.block", x.transpose(1, 2), UNET.n_groups)
        return scale * y + shift
    terms = torch_unet.linear(
        w, "transformer_blocks.0.adaLN_modulation.1", F.silu(condition)[:, None]
    )
    x = torch_unet.linear(w, "input_proj", x)
    shift, scale = terms.chunk(6, -1)[:2]
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


@pytest.mark.parametrize("family", NETWORKS)
def test_what_the_published_rules_look_at(family: str) -> None:
    twin = make_twin(family=family)
    effects, v, _ = measured(twin)
    chunk = [value[:, 0] for value in v]  # (K, D) of each block
    alike = [planners.similarity(value[:, None])[0] for value in chunk]
    np.testing.assert_allclose(effects.alike, alike, rtol=1e-5, atol=1e-7)
    pairs = list(itertools.permutations(range(STEPS), 2))
    apart = [np.mean([np.abs(value[i] - value[k]).mean() for i, k in pairs]) for value in chunk]
    np.testing.assert_allclose(effects.changes, apart, rtol=1e-5)

    def relative(x: Any, k: int, i: int) -> Any:
        """Relative L1 of step k to step i."""
        return pytest.approx(float(abs(x[k] - x[i]).sum() / abs(x[i]).sum()), rel=1e-5)

    first = sum(chunk[b] for b in range(3 if family == "dpt" else 2))
    assert effects.first_layer[1, 3] == relative(first, 3, 1)
    obs, noise = scene(twin)
    samples = play(twin, obs, noise)[1][:1]
    normalised = twin.config.normalizer.obs.normalise(obs, np.float64)[:1]
    steps = [int(t) for t in twin.sampler.timesteps]
    entering, leaving = [], []
    for k, t in enumerate(steps):
        condition = torch.from_numpy(twin.condition(obs[:1], k))
        entering.append(first_input(family, samples[:, k], t, condition))
        leaving.append(outputs(family, samples[:, k], t, normalised))
    assert effects.inputs[3] == relative(entering, 3, 2)
    assert effects.outputs[3] == relative(leaving, 3, 2)
    assert effects.outputs[0] == effects.inputs[0] == 0


def test_files(tmp_path: Path) -> None:
    effects = from_policy(make_policy(), 2)
    path = tmp_path / "effects.npz"
    effects.save(path)
    again = Effects.load(path)
    for name in ("pair", "segment", "kind", "skip", "rollout", "alike", "changes", "inputs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(effects, name))
    assert again.metadata == effects.metadata
    np.savez(path, header="{}")
    with pytest.raises(ValueError, match="effects.npz: not a file of effects"):
        Effects.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="effects.npz: not a file of effects"):
        Effects.load(path)
    with pytest.raises(FileNotFoundError):
        Effects.load(tmp_path / "nothing.npz")
    with pytest.raises(ValueError, match="windows: expected at least one"):
        sensitivity.measure(make_twin(), [])
