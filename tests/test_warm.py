"""Warm start: the tail of a sampler, the policy against its specification, and what it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from command_line import run
from fakes import FakeWorld
from policies import make_policy, noises, observations

import tsad
from tsad import Plan, SparsePolicy, _core, planners, sim
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.reference import WarmReference
from tsad.samplers import COLUMNS, NOISE, make_sampler, tail
from tsad.sim import offline

SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
SOFT = {"prediction_type": "sample", "clip_sample": False}  # see policies.py


def make(
    name: str = "tiny", warm: int = 3, *, lanes: int = 1, threads: int = 1, **options: Any
) -> SparsePolicy:
    return make_policy(name, lanes=lanes, threads=threads, warm_start=warm, **options)


@pytest.mark.parametrize("precision", ["float32", "int16"])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder", "odd"])
def test_warm_chunks_are_the_model_of_their_steps(name: str, kind: str, precision: str) -> None:
    """Bit for bit: a model of the last three steps alone, from the sample that NumPy mixes."""
    policy = make(name, sampler=kind, precision=precision, threads=2)
    case = cases.config(name, **SOFT)
    config, tensors = PolicyConfig.from_dict(case), cases.random_tensors(case["network"], 0)
    last = tail(make_sampler(case["scheduler"], sampler=kind, num_inference_steps=8), 3)
    own = _core.Policy(make_model(config, tensors, None, last, precision=precision), threads=2)
    obs, noise, moved = observations(policy, 1), noises(policy, 1), 2
    chunk = policy(obs, noise=noise, return_horizon=True)[0]
    shifted = config.normalizer.action.normalise(chunk)
    shifted = shifted[np.minimum(np.arange(len(chunk)) + moved, len(chunk) - 1)]
    z = noise[-3:].copy()
    signal = last.alphas_cumprod[0]
    z[0, 0] = np.float32(np.sqrt(signal)) * shifted + np.float32(np.sqrt(1 - signal)) * z[0, 0]
    got = policy(obs, noise=noise, executed=moved, return_horizon=True)
    np.testing.assert_array_equal(got, own(obs, noise=z, return_horizon=True))
    sample = noise[0]
    np.testing.assert_array_equal(
        policy.predict_noise(sample, 1, obs), own.predict_noise(sample, 1, obs)
    )


def test_a_warm_start_that_does_not_fit_is_refused() -> None:
    model = make().model
    table = np.zeros((9, len(COLUMNS)), np.float32)
    adds = np.zeros((2, len(COLUMNS)), np.float32)
    adds[-1, NOISE] = 1
    for given, message in (
        ((table, 1.0, 0.0), "warm_start: expected 1 to 8 steps, got 9"),
        ((table[:0], 1.0, 0.0), "warm_start: expected 1 to 8 steps, got 0"),
        (
            (table[:, :7], 1.0, 0.0),
            "warm_start: expected a C-contiguous|warm_start: expected shape",
        ),
        ((table[:2] * np.nan, 1.0, 0.0), "sampler: expected"),
        ((adds, 1.0, 0.0), "sampler: its last row adds noise"),
        ((table[:2], float("nan"), 0.0), "warm_start: expected finite shares"),
        (3, "warm_start: expected .sampler, signal, noise."),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            _core.Policy(model, warm_start=given)  # type: ignore[arg-type]


# ---- the tail of a sampler


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_tail_is_what_diffusers_does_with_the_last_timesteps(
    kind: str, prediction: str, spacing: str
) -> None:
    torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")
    import torch_oracle
    from test_samplers import float32_rounding, run_ours

    for K, n in ((1, 1), (2, 1), (7, 3), (16, 1), (16, 5), (16, 16), (50, 20)):
        config = cases.SCHEDULER | {
            "type": kind,
            "num_inference_steps": K,
            "prediction_type": prediction,
            "timestep_spacing": spacing,
        }
        last = tail(make_sampler(config), n)
        solver = torch_oracle.diffusers_scheduler(config)
        timesteps = solver.timesteps[-n:]
        np.testing.assert_array_equal(last.timesteps, timesteps.numpy())
        e, z = np.random.default_rng(K).standard_normal((2, n, 4, 6))
        before = np.random.default_rng(1).uniform(-1, 1, (4, 6))
        noised = solver.add_noise(torch.tensor(before), torch.tensor(z[0]), timesteps[:1]).numpy()
        signal = last.alphas_cumprod[0]
        z[0] = np.sqrt(signal) * before + np.sqrt(1 - signal) * z[0]
        np.testing.assert_allclose(z[0], noised, rtol=1e-6, atol=1e-6)
        outputs = torch.tensor(e, dtype=torch.float32)
        theirs = torch_oracle.run_diffusers(
            solver, z, lambda k, x, outputs=outputs: outputs[k], torch.float32, last=n
        )
        ours, largest = run_ours(last, e, z)
        assert np.abs(theirs - ours).max() <= float32_rounding(last, config) * largest


def test_all_of_a_sampler_is_its_own_tail() -> None:
    for kind in SAMPLERS:
        whole = make_sampler(cases.SCHEDULER, sampler=kind, num_inference_steps=9)
        np.testing.assert_array_equal(tail(whole, 9).table, whole.table)
        assert tail(whole, 1).adds_noise is False
        for wrong in (0, 10, 2.0, True, "3"):
            with pytest.raises(ValueError, match="warm_start: expected an integer from 1 to 9"):
                tail(whole, wrong)  # type: ignore[arg-type]


# ---- the policy


def same(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", SAMPLERS)
def test_engine_and_specification_agree_over_an_episode(kind: str) -> None:
    name = "tiny_long"
    policy = make(name, lanes=2, sampler=kind, threads=2)
    case = cases.config(name, **SOFT)
    tensors = cases.random_tensors(case["network"], 0)
    twin = WarmReference(case, tensors, lanes=2, sampler=kind, num_inference_steps=8, warm_start=3)
    start = policy.n_obs_steps - 1
    for executed in (1, 4, 8):
        policy.reset()
        twin.reset()
        for chunk in range(4):
            obs, noise = observations(policy, chunk), noises(policy, 10 + chunk)
            moved = [executed, 1]
            wanted = twin(obs, noise, moved)
            same(policy(obs, noise=noise, executed=moved, return_horizon=True), wanted)
    policy.reset()
    twin.reset()
    policy(obs, noise=noise)
    twin(obs, noise, [0, 0])
    wanted = twin(obs, noise, [8, 8])[:, start : start + 8]
    same(policy(obs, noise=noise), wanted)  # what a chunk returns, all executed


@pytest.mark.parametrize("rollout", [False, True])
def test_plans_are_the_warm_chunks(rollout: bool) -> None:
    policy = make(warm=4)
    case = cases.config("tiny", **SOFT)
    twin = WarmReference(
        case, cases.random_tensors(case["network"], 0), num_inference_steps=8, warm_start=4
    )
    sources = cases.random_plan(np.random.default_rng(4), 4, policy.n_blocks, filled=rollout)
    assert (sources == tsad.REUSE_ROLLOUT).any() == rollout
    policy.plan = Plan(sources)
    assert policy.sparsity > 0 and policy.cold_plan is None
    first = None if rollout else sources
    for chunk in range(4):
        obs, noise = observations(policy, chunk), noises(policy, chunk)
        wanted = twin(obs, noise, [2], sources, first=first)
        same(policy(obs, noise=noise, executed=2, return_horizon=True), wanted)
    np.testing.assert_array_equal(policy.plan.sources, sources)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="expected 4 steps x 6 blocks"):
        policy.plan = Plan(np.zeros((8, 6), np.uint8))
    with pytest.raises(ValueError, match="and no warm_start"):
        policy.planner = "pruner"


def test_a_plan_of_the_cold_chunk() -> None:
    policy, plain = make(lanes=2), make_policy(lanes=2)
    sources = np.zeros((8, 6), np.uint8)
    sources[1:, ::2] = tsad.REUSE_STEP
    chosen = [Plan(sources), Plan(np.zeros((8, 6), np.uint8))]
    policy.cold_plan = chosen
    plain.plan = [Plan(p.sources, first=p.sources) for p in chosen]
    assert policy.sparsity == 0 and [p.sparsity for p in policy.cold_plan] == [  # type: ignore
        p.sparsity
        for p in plain.plan  # type: ignore[union-attr]
    ]
    for chunk in range(2):
        obs, noise = observations(policy, 0), noises(policy, chunk)
        policy.reset()
        plain.reset()
        np.testing.assert_array_equal(policy(obs, noise=noise), plain(obs, noise=noise))
        policy(obs, noise=noise)
        policy.sparsity = 0.5  # of warm chunks
    policy.cold_plan = None
    policy.reset()
    plain.plan = None
    plain.reset()
    np.testing.assert_array_equal(policy(obs, noise=noise), plain(obs, noise=noise))
    with pytest.raises(ValueError, match="cold_plan: expected None, as this policy has no warm"):
        plain.cold_plan = chosen
    rollout = sources.copy()
    rollout[1, 1] = tsad.REUSE_ROLLOUT
    for wrong, message in (
        (Plan(np.zeros((3, 6), np.uint8)), "cold_plan: expected 8 steps x 6 blocks"),
        (Plan(sources, first=sources), "cold_plan: expected a plan without `first`"),
        (Plan(rollout), r"cold_plan: step 1, block 1 .*reuse_rollout.*\(lane 0\)"),
        (sources, "cold_plan: expected a tsad.Plan"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            policy.cold_plan = wrong  # type: ignore[assignment]
        assert policy.cold_plan is None


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_first_chunk_is_that_of_the_policy_without_warm_start(kind: str) -> None:
    policy, plain = make(lanes=2, sampler=kind), make_policy(lanes=2, sampler=kind)
    obs = observations(policy, 0)
    for seed in (5, [8, 2**70]):
        policy.reset(seed=seed)
        plain.reset(seed=seed)
        np.testing.assert_array_equal(policy(obs), plain(obs))
        assert (policy(obs) != plain(obs)).any()
    for given in (noises(policy, 1), noises(policy, 1)[0]):
        policy.reset(seed=5)
        plain.reset(seed=5)
        np.testing.assert_array_equal(policy(obs, noise=given), plain(obs, noise=given))


@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("threads", [1, 2])
def test_lanes_and_threads_change_nothing(kind: str, threads: int) -> None:
    seeds = [11, 12, 13]
    alone = make(sampler=kind)
    wanted: list[list[Any]] = []
    for seed in seeds:
        alone.reset(seed=[seed])
        wanted.append([alone(observations(alone, seed + j), executed=j)[0] for j in range(4)])
    policy = make(lanes=3, threads=threads, sampler=kind)
    age = [0, 0, 0]
    # lanes join late, in any order; one starts anew while others go on
    for listed in ([2], [0, 2], [1, 0, 2], [2, 1], [0, 1, 2]):
        for lane in listed:
            if age[lane] == 0 or age[lane] == 4:
                policy.reset(lanes=[lane], seed=[seeds[lane]])
                age[lane] = 0
        obs = np.concatenate([observations(alone, seeds[lane] + age[lane]) for lane in listed])
        got = policy(obs, lanes=listed, executed=[age[lane] for lane in listed])
        for row, lane in enumerate(listed):
            np.testing.assert_array_equal(got[row], wanted[lane][age[lane]])
            age[lane] += 1
    assert age == [3, 3, 1]
    assert set(policy.timings) == {"encode", "prune", "plan", "denoise", "total"}


@pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_every_backend_starts_warm(backend: str, name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TSAD_CPU", backend)
    policy = make(name, lanes=2, threads=2)
    assert policy.backend == backend
    case = cases.config(name, **SOFT)
    weights = cases.random_tensors(case["network"], 0)
    twin = WarmReference(case, weights, lanes=2, num_inference_steps=8, warm_start=3)
    sources = cases.random_plan(np.random.default_rng(4), 3, policy.n_blocks, filled=True)
    policy.plan = Plan(sources)
    for chunk, lanes in enumerate(([0], [1, 0], [0, 1])):  # cold, both kinds, warm
        obs, noise = observations(policy, chunk, len(lanes)), noises(policy, chunk, len(lanes))
        wanted = twin(obs, noise, [2] * len(lanes), sources, lanes=lanes)
        same(policy(obs, noise=noise, lanes=lanes, executed=2, return_horizon=True), wanted)


def test_seeds_repeat_an_episode_and_none_goes_on() -> None:
    policy = make()
    obs = observations(policy, 0)
    runs = []
    for seed in (3, 3, None):
        policy.reset(seed=seed)
        runs.append([policy(obs) for _ in range(3)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.array(runs[0]) != runs[2]).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_arrays_in_and_out(kind: str) -> None:
    torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    policy = make()
    obs, noise = observations(policy, 0), noises(policy, 0)
    policy.reset()
    wanted = [policy(obs, noise=noise) for _ in range(2)]
    policy.reset()
    plain = np.empty((policy.n_action_steps, policy.action_dim), np.float32)
    out = torch.from_numpy(plain) if kind == "torch" else plain
    for chunk in wanted:
        assert policy(torch.from_numpy(obs[0]), noise=torch.from_numpy(noise), out=out) is out
        np.testing.assert_array_equal(plain, chunk[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"obs": np.zeros((2, 3, 5), np.float32)},
            "obs: expected shape (2, 3, 6), got (2, 3, 5)",
        ),
        ({"obs": np.zeros((2, 3, 6))}, "obs: expected float32, got float64"),
        ({"obs": "x"}, "obs: expected a float32 array (NumPy, or anything with __dlpack__), got"),
        ({"obs": np.full((2, 3, 6), np.nan, np.float32)}, "obs: expected finite numbers"),
        ({"lanes": []}, "obs: expected shape (0, 3, 6), got (2, 3, 6)"),
        ({"executed": 6}, "executed: expected an int from 0 to 5 (horizon), or 2"),
        ({"executed": [1, 1, 1]}, "executed: expected an int"),
        ({"executed": 1.5}, "executed: expected an int"),
        (
            {"noise": np.zeros((3, 2, 5, 2), np.float32)},
            "noise: expected shape (8, 2, 5, 2), got (3,",
        ),
        ({"out": np.zeros((2, 3, 2))}, "out: expected float32, got float64"),
    ],
)
def test_a_refused_call_changes_nothing(change: dict[str, Any], message: str) -> None:
    policy, other = make(lanes=2), make(lanes=2)
    obs = observations(policy, 0)
    for one in (policy, other):
        one.reset(seed=1)
        one(obs[:1], lanes=[1])
    with pytest.raises((TypeError, ValueError)) as error:
        policy(**{"obs": obs, **change})
    assert message in str(error.value), error.value
    np.testing.assert_array_equal(policy(obs), other(obs))


def test_facts() -> None:
    policy = make(lanes=2, sampler="ddim", warm=2)
    plain = make_policy(lanes=2, sampler="ddim")
    assert (policy.num_inference_steps, policy.model.n_steps, policy.warm_start) == (2, 8, 2)
    assert plain.warm_start is None
    assert policy.timesteps.tolist() == plain.timesteps[-2:].tolist()
    assert policy.config == plain.config
    assert policy.stats["weight_bytes"] == plain.stats["weight_bytes"]
    assert not policy.has_pruner and not make(warm=1).adds_noise and make().adds_noise
    assert "warm start: the last 2 of 8 steps" in repr(policy)
    with pytest.raises(TypeError, match="executed: expected None.*load it with warm_start=N"):
        plain(observations(plain, 0), executed=1)


def test_weights_and_memory_are_there_once() -> None:
    """Beside the policy of all steps: a chunk and the plans of three steps, and no engine more."""
    policy, plain = (make_policy("tiny_long", lanes=4, warm_start=n) for n in (3, None))
    assert policy.stats["bytes"] < 1.2 * plain.stats["bytes"]


# ---- closed loop


class World(FakeWorld):
    obs_dim = 6

    def reset(self, seed: int) -> Any:
        return np.tile(super().reset(seed), 2)

    def step(self, action: Any) -> sim.Step:
        obs, *rest = super().step(action)
        return sim.Step(np.tile(obs, 2), *rest)

    def rest_action(self) -> Any:
        return np.zeros(2, np.float32)


@pytest.mark.parametrize(("executed", "delay"), [(1, 0), (2, 0), (3, 0), (2, 4), (1, 7)])
def test_rollouts_say_what_was_executed(executed: int, delay: int, monkeypatch: Any) -> None:
    told: list[Any] = []
    call = SparsePolicy.__call__

    def watched(self: Any, obs: Any, **options: Any) -> Any:
        told.append(options["executed"])
        return call(self, obs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SparsePolicy, "__call__", watched)
        options = {"n_action_steps": executed, "delay": delay}
        alone = list(sim.rollouts(make(), [World()], range(4), **options))
        assert [int(n[0]) for n in told[:2]] == [0, min(max(executed, delay), 5)]
    worlds = [World(), World(), World()]
    together = sim.rollouts(make(lanes=3, threads=2), worlds, range(4), **options)
    scores = {episode.seed: (episode.score, episode.steps) for episode in together}
    assert scores == {episode.seed: (episode.score, episode.steps) for episode in alone}


def test_offline_errors_run_the_past() -> None:
    policy, plain = make(lanes=4, sampler="ddim"), make_policy(lanes=4, sampler="ddim")
    obs = observations(policy, 3, 6).reshape(3, 2, 3, 6)
    obs[:, 1] = obs[:, 0]
    warm = offline.actions(policy, obs, draws=2)
    assert warm.shape == (3, 2, policy.n_action_steps * 2)
    assert 0 < offline.rms(warm, offline.actions(plain, obs, draws=2))
    policy.plan = planners.uniform(policy, 1)
    assert 0 < offline.rms(warm, offline.actions(policy, obs, draws=2))


def test_eval(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gym_pusht", reason="pip install 'tsad-policy[sim]'")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 18)
    config = cases.config("tiny_long", **SOFT)
    config["network"]["obs_dim"] = 20
    config["normalizer"]["obs"] = {"scale": [0.004] * 20, "offset": [-1.0] * 20}
    config["normalizer"]["action"] = {"scale": [0.004] * 2, "offset": [-1.0] * 2}
    tensors = cases.random_tensors(config["network"], 0)
    policy = str(tmp_path / "policy")
    write_folder(Path(policy), PolicyConfig.from_dict(config), tensors, None, dtype="float32")
    short = {"sampler": "ddim", "steps": 4}
    rows = [{"name": "dense", **short}, {"name": "warm", **short, "warm_start": 2}]
    rows += [{"name": "half", **short, "warm_start": 2, "sparsity": 0.5}]
    settings, out = tmp_path / "sweep.json", tmp_path / "sweep"
    settings.write_text(json.dumps(rows))
    recorded = str(tmp_path / "recorded")
    own = ["--policy", policy, "--seeds", "2", "--first-seed", "5"]
    collect = [
        "collect",
        "pusht",
        "--policy",
        policy,
        "--out",
        recorded,
        "--episodes",
        "2",
        "--sampler",
        "ddim",
    ]
    assert run(capsys, *collect, "--steps", "4")[0] == 0
    command = ["eval", "pusht", *own, "--settings", str(settings), "--out", str(out)]
    code, text, err = run(capsys, *command, "--observations", recorded, "--json")
    assert code == 0, err
    found = json.loads(text)["rows"]
    assert [found[row["name"]]["passes"] for row in rows] == [4, 2, 1]
    assert found["warm"]["settings"]["num_inference_steps"] == 4
    assert found["warm"]["settings"]["warm_start"] == 2
    assert "warm_start" not in found["dense"]["settings"]
    assert found["warm"]["action_rms"] == 0 < found["half"]["action_rms"]
    one = ["eval", "pusht", *own, "--sampler", "ddim", "--steps", "4", "--warm-start"]
    code, text, _ = run(capsys, *one, "2", "--lanes", "2")
    assert code == 0 and "(ddim, the last 2 of 4 steps)" in text
    assert f"score    {found['warm']['score']['mean']:.3f}" in text
    code, _, err = run(capsys, *one, "5")
    assert code == 2 and "argument --warm-start: expected an integer from 1 to 4" in err


def test_load() -> None:
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=8, warm_start=3)
    assert policy.warm_start == policy.num_inference_steps == 3
    obs = np.full((2, 20), 256, np.float32)
    policy.reset(seed=0)
    first, second = policy(obs), policy(obs, executed=4)
    # the same scene again: the second chunk goes on where the first one was
    assert np.abs(second[:4] - first[4:]).max() < 30 and (first != second).all()
    with pytest.raises(ValueError, match="warm_start: expected an integer from 1 to 8"):
        tsad.load("pusht", sampler="ddim", num_inference_steps=8, warm_start=9)
