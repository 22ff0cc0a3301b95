"""Numbers that a network can't represent: refused where they come in, an error where they arise.

Finite but absurd observations, noise, samples, weights and normalisers; what the network makes of
large ones that it can represent, against PyTorch in float64; and what is left of a call whose
network overflowed: nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from engine import make
from policies import make_policy, noises, observations, state
from test_nodes import FEED_FORWARD, LINEAR, RELU
from test_nodes import make_policy as make_nodes

import tsad
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, _core
from tsad.checkpoint import CheckpointError, read_folder, write_folder
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.planners import random as random_plan
from tsad.samplers import make_sampler
from tsad.section import MAX_MAGNITUDE

F = np.float32
BACKENDS = _core.backends()
PRECISIONS = ("float32", "int16")
OPEN = {"prediction_type": "sample", "clip_sample": False}
ABSURD = (3.4e38, 1e25, -1e25, 2.1e12)  # raw: scales are 0.5 or more


def with_value(x: Any, index: tuple[int, ...], value: float) -> Any:
    x = x.copy()
    x[index] = value
    return x


def amplifying(name: str, *, pruner: bool | str = False) -> tuple[Any, Any, Any]:
    """A configuration and weights that observations near 1 pass, and those of 1e11 overflow."""
    case = cases.config(name, pruner=pruner, **OPEN)
    tensors = cases.random_tensors(case["network"], 0)
    tensors["cond_obs_emb.weight"] = tensors["cond_obs_emb.weight"] * F(1e9)
    own = case.get("pruner")
    return case, tensors, cases.random_pruner(own, case["network"], 0) if own else None


# ---- large, but not absurd


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_numbers_are_what_pytorch_makes_of_them(backend: str, precision: str) -> None:
    """As near to float64 as with numbers near 1: 16 bits round to about 2e-4 of the output."""
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")
    from torch_oracle import TorchPolicy

    case = cases.config("blockpush")
    tensors = cases.random_tensors(case["network"], 0)
    engine = make("blockpush", tensors=tensors, backend=backend, precision=precision)
    oracle = TorchPolicy(case, tensors)
    obs, noise = cases.random_inputs(case, 0, lanes=2, steps=1)

    def compare(sample: Any, obs: Any) -> None:
        wanted = oracle.predict_noise(sample, 50, obs)
        error = cases.relative_error(engine.predict_noise(sample, 50, obs), wanted)
        assert error < {"float32": 1e-5, "int16": 2e-3}[precision]

    for magnitude in (1e5, 1e7, 1e9, 4e11):  # raw; scales are at most 2
        large = obs * F(magnitude / np.abs(obs).max())
        compare(noise[0], large)
        compare(noise[0], with_value(obs, (1, 2, 3), -magnitude))
    for magnitude in (1e3, 1e7, 2e11):
        compare(noise[0] * F(magnitude), obs)


# ---- absurd: refused, and nothing has changed


@pytest.mark.parametrize("value", ABSURD)
def test_absurd_numbers_are_refused_and_change_nothing(value: float) -> None:
    policy, twin = make_policy(lanes=2, pruner=True), make_policy(lanes=2, pruner=True)
    obs, noise = observations(policy, 0), noises(policy, 1)
    for p in (policy, twin):
        p.plan = random_plan(p, 0.5, 0)
        p.reset(seed=3)
        p(obs)
    sample, out = noise[0], np.full((2, 3, 2), 7, F)
    before = state(policy)
    calls: dict[str, Any] = {
        r"obs: .* \(raw .*\) at row 1, observation step 2, element 5": lambda: policy(
            with_value(obs, (1, 2, 5), value), out=out
        ),
        "noise: .* at denoising step 7, row 1, action 4, element 0": lambda: policy(
            obs, noise=with_value(noise, (7, 1, 4, 0), value), out=out
        ),
        "noise: .* at denoising step 0, row 0, action 1, element 1": lambda: policy(
            obs, noise=with_value(sample, (0, 1, 1), value), out=out
        ),
        "sample: .* at denoising step 3, row 1, action 0, element 1": lambda: policy.predict_noise(
            with_value(sample, (1, 0, 1), value), 3, obs
        ),
        "obs: .* at row 0, observation step 0, element 0": lambda: policy.predict_noise(
            sample, 3, with_value(obs, (0, 0, 0), value)
        ),
        "obs: .* at row 0, observation step 1, element 0": lambda: policy._pruner_scores(
            with_value(obs[0], (1, 0), value)
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "expected magnitudes up to 1e+12" in str(caught.value)
    assert state(policy) == before
    assert (out == 7).all()
    np.testing.assert_array_equal(policy(obs), twin(obs))  # the streams, too


@pytest.mark.parametrize("preset", ["lossless", "fast", None])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundled_policy_goes_on_after_an_absurd_observation(
    preset: str | None, precision: str
) -> None:
    options = {"preset": preset} if preset else {"precision": precision, "sampler": "ddim"}
    options |= {} if preset else {"num_inference_steps": 4}
    policy, twin = tsad.load("pusht", **options), tsad.load("pusht", **options)
    obs = np.full((2, 20), 256, F)
    for p in (policy, twin):
        p.reset(seed=0)
        p(obs)
    for value in (3.4e38, 1e25, 1e22, 1e20):
        with pytest.raises(ValueError, match=r"obs: expected magnitudes up to 1e\+12"):
            policy(with_value(obs, (1, 3), value))
        np.testing.assert_array_equal(policy(obs), twin(obs))


# ---- what overflows all the same


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_a_call_that_overflows_leaves_nothing(
    name: str, backend: str, precision: str, threads: int
) -> None:
    steps, lanes = 4, 4
    _, tensors, _ = amplifying(name)

    def new() -> Any:
        return make(name, lanes=lanes, threads=threads, backend=backend, steps=steps,
                    precision=precision, tensors=tensors, **OPEN)  # fmt: skip

    policy, twin = new(), new()
    rng = np.random.default_rng(0)
    blocks = policy.n_blocks
    dense = np.zeros((steps, blocks), np.uint8)
    first = cases.random_plan(rng, steps, blocks, filled=False)
    closed = np.full((steps, blocks), REUSE_STEP, np.uint8)  # rows in closed form
    closed[0] = COMPUTE
    later = cases.random_plan(rng, steps, blocks, filled=first == COMPUTE)
    kept = np.full((steps, blocks), REUSE_ROLLOUT, np.uint8)  # sums that are kept
    kept[0] = COMPUTE
    plans = [(dense, dense), (later, first), (closed, closed), (kept, dense)]
    case = cases.config(name, **OPEN)
    inputs = [cases.random_inputs(case, seed, lanes=lanes, steps=steps) for seed in range(4)]
    for p in (policy, twin):
        for lane, plan in enumerate(plans):
            p._set_plan(lane, *plan)
        for obs, noise in inputs:
            p(obs, noise=noise)
    listed = [1, 3, 0, 2]
    for failing in range(lanes):
        out = np.full((lanes, policy.n_action_steps, policy.action_dim), 7, F)
        obs, noise = inputs[0]
        row = listed.index(failing)
        bad = with_value(obs, (row, 1, 2), 1e11)
        with pytest.raises(RuntimeError, match=f"lane {failing}: the actions are not finite"):
            policy(bad, noise=noise, lanes=listed, out=out)
        assert (out == 7).all()
        for lane in range(lanes):
            assert policy._stats(lane)["chunks"] == 0 and not policy._ages(lane).any()
        twin.reset()
        for obs, noise in inputs:
            np.testing.assert_array_equal(policy(obs, noise=noise), twin(obs, noise=noise))
    # the lanes that were not asked for go on
    with pytest.raises(RuntimeError, match="start anew"):
        policy(bad[row : row + 1], noise=np.ascontiguousarray(noise[:, :1]), lanes=[2])
    twin.reset(2)
    np.testing.assert_array_equal(policy(obs, noise=noise), twin(obs, noise=noise))


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_of_noise_go_on_after_an_overflow(backend: str) -> None:
    _, tensors, _ = amplifying("tiny")
    policy, twin = (
        make("tiny", lanes=2, backend=backend, steps=4, tensors=tensors, **OPEN) for _ in range(2)
    )
    obs, _ = cases.random_inputs(cases.config("tiny"), 0, lanes=2, steps=4)
    for p in (policy, twin):
        p.reset(seed=1)
    with pytest.raises(RuntimeError, match="lane 1: the actions"):
        policy(with_value(obs, (1, 0, 0), 1e11))
    twin(obs)
    twin.reset()
    np.testing.assert_array_equal(policy(obs), twin(obs))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_overflows_in_silence(backend: str, precision: str) -> None:
    """Any two tensors as large as can be: what comes out is not far off, or an error."""
    pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")
    from torch_oracle import TorchPolicy

    case = cases.config("tiny", num_inference_steps=4)
    plain = cases.random_tensors(case["network"], 0)
    obs, noise = cases.random_inputs(case, 0, steps=1)
    failed = 0
    rng = np.random.default_rng(0)
    names = sorted(plain)
    for name in names:
        other = names[rng.integers(len(names))]
        tensors = dict(plain)
        for key in {name, other}:
            tensors[key] = tensors[key] * F(9e11 / np.abs(tensors[key]).max())
        engine = make("tiny", tensors=tensors, backend=backend, precision=precision, steps=4)
        wanted = TorchPolicy(case, tensors).predict_noise(noise[0], 2, obs)
        try:
            got = engine.predict_noise(noise[0], 2, obs)
        except RuntimeError as error:
            assert "overflowed" in str(error)
            failed += 1
        else:
            assert cases.relative_error(got, wanted) < 2e-3, (name, other)
    assert failed > 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_samplers_range_hides_no_infinity(backend: str) -> None:
    """Three matrices of 1e12 in a row: the output is infinite, and the sampler clips to 1."""
    nodes = np.array(
        [
            [LINEAR, 0, -1, 1, -1, 0, 0, 0, 1, 1],
            [FEED_FORWARD, 1, -1, 1, -1, 0, 0, RELU, 1, 1],
            [LINEAR, 1, -1, 2, -1, 0, 0, 0, 1, 1],
        ],
        np.int32,
    )
    huge = {
        f"nodes.{i}.{j}.{part}": np.full(shape[: 2 if part == "weight" else 1], 9e11, F)
        for i, j, shape in ((0, 0, (64, 2)), (1, 0, (32, 64)), (1, 1, (64, 32)), (2, 0, (2, 64)))
        for part in ("weight", "bias")
    }
    sampler = np.tile(np.array([1.1, -0.5, 1, 0.4, 0.6, 0, 0, 0, 0], F), (7, 1))
    policy = make_nodes(
        huge, nodes=nodes, registers=np.array([[8, 2], [8, 64], [8, 2]], np.int32),
        block_cost=np.ones(1, np.int64), backend=backend, sampler=sampler,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="lane 0: the actions are not finite"):
        policy(np.zeros((1, 2), F))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_that_overflows_is_no_softmax(backend: str) -> None:
    """Queries and keys of 1e24, values of 1: their products are no numbers, all else is small."""
    tensors = cases.random_tensors(cases.NETWORKS["tiny"], 0)
    layer = "decoder.layers.0"
    tensors[f"{layer}.norm1.weight"] *= F(1e11)
    tensors[f"{layer}.norm1.bias"] *= F(1e11)
    tensors[f"{layer}.self_attn.in_proj_weight"][:32] *= F(1e11)
    tensors[f"{layer}.self_attn.in_proj_weight"][32:] *= F(1e-11)
    engine = make("tiny", tensors=tensors, backend=backend)
    obs, noise = cases.random_inputs(cases.config("tiny"), 0, steps=1)
    with pytest.raises(RuntimeError, match="row 0: the network overflowed"):
        engine.predict_noise(noise[0], 50, obs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_layer_without_numbers_is_no_row_of_zeros(backend: str) -> None:
    case = cases.config("tiny", pruner="mlp")
    tensors = cases.random_tensors(case["network"], 0)
    for name in ("cond_obs_emb.weight", "encoder.2.weight"):
        tensors[name] *= F(1e11)
    pruner = cases.random_pruner(case["pruner"], case["network"], 0)
    pruner["0.weight"] *= F(1e11)
    table = make_sampler(case["scheduler"], num_inference_steps=4)
    model = make_model(PolicyConfig.from_dict(case), tensors, pruner, table, backend=backend)
    obs, _ = cases.random_inputs(case, 0)
    with pytest.raises(RuntimeError, match="the pruner overflowed"):
        _core.Policy(model)._pruner_scores(obs[0] * F(1e11))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pruner", [True, "mlp"])
def test_scores_that_are_not_finite_are_no_plan(pruner: bool | str, backend: str) -> None:
    case, tensors, weights = amplifying("tiny", pruner=pruner)
    large = {k: w * F(9e11 / np.abs(w).max()) if w.ndim > 1 else w for k, w in weights.items()}
    table = make_sampler(case["scheduler"], num_inference_steps=4)
    config = PolicyConfig.from_dict(case)
    policy = _core.Policy(make_model(config, tensors, large, table, backend=backend))
    policy._set_pruner(0.5)
    obs, noise = cases.random_inputs(case, 0, steps=4)
    obs *= F(1e6)
    with pytest.raises(RuntimeError, match="the pruner overflowed"):
        policy._pruner_scores(obs[0])
    policy(obs, noise=noise)  # an episode's first chunk asks no pruner
    with pytest.raises(RuntimeError, match="lane 0: the pruner's scores are not finite"):
        policy(obs, noise=noise)
    assert policy._stats(0)["chunks"] == 0
    policy(obs, noise=noise)


def test_a_warm_start_that_overflows_starts_cold(tmp_path: Path) -> None:
    case, tensors, _ = amplifying("tiny_long")
    write_folder(tmp_path / "p", PolicyConfig.from_dict(case), tensors, dtype="float32")

    def new() -> Any:
        return tsad.load(tmp_path / "p", sampler="ddim", num_inference_steps=6, warm_start=2,
                         lanes=2)  # fmt: skip

    policy, twin = new(), new()
    obs, noise = observations(policy, 0), np.zeros((6, 2, 10, 2), F)
    for p in (policy, twin):
        p.reset(seed=0)
        p(obs)
    for chunk in range(2):  # a warm chunk fails, then a cold one
        with pytest.raises(RuntimeError, match="lane 1: the actions are not finite.*start anew"):
            policy(with_value(obs, (1, 0, 0), 1e11), noise=noise)
        twin.reset()
        if chunk == 0:
            continue
        for _ in range(3):
            np.testing.assert_array_equal(policy(obs), twin(obs))
    with pytest.raises(RuntimeError):
        policy(with_value(obs, (1, 0, 0), 1e11)[1:], lanes=[1])
    twin(obs[1:], lanes=[1])
    twin.reset(lanes=[1])
    np.testing.assert_array_equal(policy(obs), twin(obs))


# ---- weights and normalisers


@pytest.mark.parametrize("value", [np.nan, -np.inf, *ABSURD])
def test_weights_that_cannot_be_are_refused_by_name(tmp_path: Path, value: float) -> None:
    case = cases.config("tiny", pruner=True)
    config = PolicyConfig.from_dict(case)
    tensors = cases.random_tensors(case["network"], 0)
    pruner = cases.random_pruner(case["pruner"], case["network"], 0)
    for part, name, at in ((tensors, "ln_f.weight", (3,)), (pruner, "head.weight", (1, 2))):
        broken = {name: with_value(part[name], at, value)}
        parts = [{**tensors, **broken}, pruner] if part is tensors else [tensors, pruner | broken]
        with pytest.raises(ValueError, match=f"{name}: expected .* magnitude up to 1e.12, got"):
            make_model(config, *parts, make_sampler(case["scheduler"]))
        if not np.isfinite(value):
            continue
        folder = tmp_path / name
        write_folder(folder, config, *parts, dtype="float32")
        where = rf"{name}: expected finite .*up to 1e\+12, got .* at \[{str(list(at))[1:-1]}\]"
        with pytest.raises(CheckpointError, match=where):
            read_folder(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("obs.scale", 1e13, r"normalizer.obs.scale\[1\].*up to 1e\+12, got 1"),
        ("obs.offset", -3e38, r"normalizer.obs.offset\[1\].*up to 1e\+12"),
        ("action.offset", 1e300, r"normalizer.action.offset\[1\].*up to 1e\+12"),
        ("action.scale", 10**400, r"normalizer.action.scale\[1\].*up to 1e\+12"),
        ("action.scale", 1e-30, r"normalizer.action.scale\[1\].*at least 1e-12, got 1e-30"),
        ("action.scale", 0, r"normalizer.action.scale\[1\].*at least 1e-12, got 0"),
    ],
)
def test_normalisers_that_cannot_be_are_refused_by_name(
    tmp_path: Path, key: str, value: float, says: str
) -> None:
    case = cases.config("tiny")
    folder = tmp_path / "p"
    tensors = cases.random_tensors(case["network"], 0)
    write_folder(folder, PolicyConfig.from_dict(case), tensors)
    part, which = key.split(".")
    text = json.loads((folder / "config.json").read_text())
    text["normalizer"][part][which][1] = value
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=says):
        tsad.load(folder)
    if abs(value) < 1e38:  # the core by itself
        arguments = {f"{part}_{which}": np.array([1, value], F)}
        with pytest.raises(ValueError, match=f"{part}_{which}"):
            make_nodes({}, **arguments)


def test_the_limit_is_the_cores() -> None:
    policy = make_policy()
    case = cases.config("tiny", **OPEN)["normalizer"]["obs"]
    obs = np.zeros((3, 6), F)
    just = (MAX_MAGNITUDE - case["offset"][0]) / case["scale"][0]
    policy(with_value(obs, (0, 0), just * (1 - 1e-6)))
    with pytest.raises(ValueError, match=r"expected magnitudes up to 1e\+12"):
        policy(with_value(obs, (0, 0), just * (1 + 1e-6)))
