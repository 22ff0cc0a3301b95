"""Warm start: the tail of a sampler, the policy against its specification, and what it keeps."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from command_line import run
from fakes import FakeWorld
from policies import make_policy, noises, observations

import tsad
from tsad import Plan, _core, planners, sim
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.reference import WarmReference
from tsad.samplers import make_sampler, tail
from tsad.sim import offline
from tsad.warm import WarmPolicy

SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
SOFT = {"prediction_type": "sample", "clip_sample": False}  # see policies.py


def make(
    name: str = "tiny", warm: int = 3, *, lanes: int = 1, threads: int = 1, **options: Any
) -> WarmPolicy:
    cold = make_policy(name, lanes=lanes, threads=threads, **options)
    last = tail(cold._sampler, warm)
    return WarmPolicy(cold, cold.model.tail(last.table.astype(np.float32)), last)


@pytest.mark.parametrize("precision", ["float32", "int16"])
@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder", "odd"])
def test_a_tail_is_the_model_of_its_steps_bit_for_bit(name: str, kind: str, precision: str) -> None:
    case = cases.config(name, **SOFT)
    config, tensors = PolicyConfig.from_dict(case), cases.random_tensors(case["network"], 0)
    table = make_sampler(case["scheduler"], sampler=kind, num_inference_steps=8)
    last = tail(table, 3)
    whole = make_model(config, tensors, None, table, precision=precision)
    shared = whole.tail(last.table.astype(np.float32))
    assert shared.weight_bytes == whole.weight_bytes and shared.n_steps == 3
    del whole  # its weights live as long as the tail
    own = make_model(config, tensors, None, last, precision=precision)
    obs, noise = cases.random_inputs(case, 1, steps=3)
    got, expected = (_core.Policy(m, lanes=1, threads=2)(obs, noise=noise) for m in (shared, own))
    np.testing.assert_array_equal(got, expected)


def test_a_tail_longer_than_the_model_is_refused() -> None:
    model = make().cold.model
    with pytest.raises(ValueError, match="sampler: expected 1 to 8 rows, got 9"):
        model.tail(np.zeros((9, 8), np.float32))
    with pytest.raises(ValueError, match="sampler: expected .* got"):
        model.tail(np.zeros((3, 7), np.float32))


def full_noise(policy: WarmPolicy, seed: int, rows: int | None = None) -> Any:
    return noises(policy.cold, seed, rows)


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
            obs, noise = observations(policy, chunk), full_noise(policy, 10 + chunk)
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
    assert policy.sparsity > 0 and policy.cold.sparsity == 0
    first = None if rollout else sources
    for chunk in range(4):
        obs, noise = observations(policy, chunk), full_noise(policy, chunk)
        wanted = twin(obs, noise, [2], sources, first=first)
        same(policy(obs, noise=noise, executed=2, return_horizon=True), wanted)
    np.testing.assert_array_equal(policy.plan.sources, sources)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="expected 4 steps x 6 blocks"):
        policy.plan = planners.dense(policy.cold)
    with pytest.raises(ValueError, match="and no warm_start"):
        policy.planner = "pruner"


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_first_chunk_is_that_of_the_policy_without_warm_start(kind: str) -> None:
    policy, plain = make(lanes=2, sampler=kind), make_policy(lanes=2, sampler=kind)
    obs = observations(policy, 0)
    for seed in (5, [8, 2**70]):
        policy.reset(seed=seed)
        plain.reset(seed=seed)
        np.testing.assert_array_equal(policy(obs), plain(obs))
        assert (policy(obs) != plain(obs)).any()
    for given in (full_noise(policy, 1), full_noise(policy, 1)[0]):
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


def test_seeds_repeat_an_episode_and_none_goes_on() -> None:
    policy = make()
    obs = observations(policy, 0)
    runs = []
    for seed in (3, 3, None):
        policy.reset(seed=seed)
        runs.append([policy(obs) for _ in range(3)])
    np.testing.assert_array_equal(runs[0], runs[1])
    assert (np.array(runs[0]) != runs[2]).any(axis=(1, 2, 3)).all()


def test_arrays_in_and_out() -> None:
    policy = make()
    obs, noise = observations(policy, 0), full_noise(policy, 0)
    policy.reset()
    wanted = [policy(obs, noise=noise) for _ in range(2)]
    policy.reset()
    torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
    out = np.empty((policy.n_action_steps, policy.action_dim), np.float32)
    for chunk in wanted:
        assert policy(torch.from_numpy(obs[0]), noise=torch.from_numpy(noise), out=out) is out
        np.testing.assert_array_equal(out, chunk[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"obs": np.zeros((2, 3, 5), np.float32)},
            "obs: expected float32 (2, 3, 6), got (2, 3, 5)",
        ),
        ({"obs": np.zeros((2, 3, 6))}, "obs: expected float32, got float64"),
        ({"obs": "x"}, "obs: expected a float32 array (NumPy, or anything with __dlpack__), got"),
        ({"obs": np.full((2, 3, 6), np.nan, np.float32)}, "obs: expected finite numbers"),
        ({"lanes": []}, "obs: expected float32 (0, 3, 6), got (2, 3, 6)"),
        ({"executed": 6}, "executed: expected an int from 0 to 5 (horizon), or 2"),
        ({"executed": [1, 1, 1]}, "executed: expected an int"),
        ({"executed": 1.5}, "executed: expected an int"),
        ({"noise": np.zeros((3, 2, 5, 2), np.float32)}, "noise: expected float32 (8, 2, 5, 2) or"),
        ({"out": np.zeros((2, 3, 2))}, "out: expected a writable NumPy array, float32 (2, 3, 2)"),
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


def test_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, inside, go_on = make(), threading.Event(), threading.Event()
    draw = WarmPolicy._draw

    def slow(*args: Any) -> Any:
        inside.set()
        assert go_on.wait(10)
        return draw(*args)

    monkeypatch.setattr(WarmPolicy, "_draw", slow)
    obs = observations(policy, 0)
    thread = threading.Thread(target=policy, args=(obs,))
    thread.start()
    try:
        assert inside.wait(10)
        for refused in (
            lambda: policy(obs),
            policy.reset,
            lambda: setattr(policy, "sparsity", 0.5),
        ):
            with pytest.raises(RuntimeError, match="busy"):
                refused()
    finally:
        go_on.set()
        thread.join()
    assert policy.sparsity == 0
    policy(obs)


def test_facts() -> None:
    policy = make(lanes=2, sampler="ddim", warm=2)
    assert (policy.num_inference_steps, policy.cold.num_inference_steps) == (2, 8)
    assert policy.timesteps.tolist() == policy.cold.timesteps[-2:].tolist()
    assert policy.config == policy.cold.config
    assert policy.stats["weight_bytes"] == policy.cold.stats["weight_bytes"]
    assert "the last 2 of 8 steps" in repr(policy) and repr(policy).startswith("WarmPolicy(ddim")


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
    call = WarmPolicy.__call__

    def watched(self: Any, obs: Any, **options: Any) -> Any:
        told.append(options["executed"])
        return call(self, obs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(WarmPolicy, "__call__", watched)
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
    assert isinstance(policy, WarmPolicy) and policy.num_inference_steps == 3
    obs = np.full((2, 20), 256, np.float32)
    policy.reset(seed=0)
    first, second = policy(obs), policy(obs, executed=4)
    # the same scene again: the second chunk goes on where the first one was
    assert np.abs(second[:4] - first[4:]).max() < 30 and (first != second).all()
    with pytest.raises(ValueError, match="warm_start: expected an integer from 1 to 8"):
        tsad.load("pusht", sampler="ddim", num_inference_steps=8, warm_start=9)
