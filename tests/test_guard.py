"""A guard: what it was recorded with passes, and what breaks it is told and answered."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from policies import make_policy, noises, observations, save_policy

import tsad
from tsad import Guard, Plan, sim
from tsad.guard import Bound, measure
from tsad.setting import Setting


def drifting(policy: Any, episodes: int, chunks: int, seed: int = 0) -> list[Any]:
    """Observations that move as the last action says, and their actions."""
    random = np.random.default_rng(seed)
    n, dim = policy.n_obs_steps, policy.obs_dim
    found = []
    for _ in range(episodes):
        actions = random.normal(size=(chunks, policy.n_action_steps, policy.action_dim))
        obs = np.zeros((chunks, n, dim))
        obs[0] = random.normal(size=(1, dim))
        for i in range(1, chunks):
            push = np.resize(actions[i - 1, -1], dim) * 0.1
            obs[i] = obs[i - 1, -1] + push + np.outer(np.arange(1, n + 1), push) * 0.1
        obs += 0.01 * random.normal(size=obs.shape)
        found.append((obs.astype(np.float32), actions.astype(np.float32)))
    return found


def make(**options: Any) -> Any:
    return make_policy("tiny", steps=4, sampler="ddim", **options)


@pytest.fixture(scope="module")
def bound() -> Bound:
    policy = make()
    return measure(policy, drifting(policy, 8, 40), quantile=0.99)


def test_the_statistic_is_least_squares_and_whitening(bound: Bound) -> None:
    """By NumPy, on what it was fitted on: its mean is 1, and few lie above the bound."""
    policy = make()
    affine = policy.config["normalizer"]
    rows = []
    for obs, actions in drifting(policy, 8, 40):
        seen = obs.astype(np.float64) * affine["obs"]["scale"] + affine["obs"]["offset"]
        last = actions[:, [-1, -2]] * affine["action"]["scale"] + affine["action"]["offset"]
        parts = [seen.reshape(40, -1), last.reshape(40, -1), np.ones((40, 1))]
        rows.append((np.concatenate(parts, 1)[:-1], seen.reshape(40, -1)[1:]))
    x, y = (np.concatenate(part) for part in zip(*rows, strict=True))
    exact = np.linalg.lstsq(x, y, rcond=None)[0]
    assert np.abs(x @ bound.predict - x @ exact).max() < 0.02
    apart = y - x @ bound.predict
    wanted = np.einsum("ni,ij,nj->n", apart, np.linalg.inv(apart.T @ apart / len(x)), apart)
    got = bound.statistic(x, y)
    np.testing.assert_allclose(got, wanted / y.shape[1], rtol=0.01)
    assert got.mean() == pytest.approx(1, abs=0.01)
    other = [bound.statistic(*pair) for pair in rows]
    assert 0.95 < np.mean(np.concatenate(other) <= bound.bound) <= 1


@pytest.mark.parametrize("warm", [None, 2])
def test_past_the_bound_a_lane_starts_anew_densely(bound: Bound, warm: int | None) -> None:
    policy, plain, dense = (make(lanes=2, warm_start=warm) for _ in range(3))
    steps = policy.num_inference_steps
    plan = Plan(np.repeat(np.uint8([[0], [2]]), [1, steps - 1], 0).repeat(6, 1))
    policy.plan = plain.plan = plan if warm else Plan(plan.sources, first=plan)
    loose = Bound(bound.predict, bound.whiten, np.array(1e9), bound.metadata)
    guarded = Guard(policy, loose)
    assert guarded.lanes == 2 and guarded.warm_start == warm and "Guard(" in repr(guarded)
    before, seen = guarded.plan, observations(policy, 9)
    for chunk in range(5):
        if chunk == 3:
            seen = seen + np.float32([[[0.0]], [[1e4]]])
            plain.reset(lanes=[1])
        noise = noises(policy, chunk)
        got, wanted = guarded(seen, noise=noise), plain(seen, noise=noise)
        if chunk == 3:
            row = np.ascontiguousarray(noise[:, 1:])
            wanted[1] = dense(seen[1:], noise=row, lanes=[1])[0]
        assert guarded.alarms == [False, chunk == 3]
        np.testing.assert_array_equal(got, wanted)
    assert guarded.plan == before
    stats = guarded.stats["guard"]
    assert stats["chunks"] == 8 and stats["alarms"] == 1 and stats["bound"] == 1e9


def test_an_episode_begins_without_a_comparison(bound: Bound) -> None:
    guarded = Guard(make(), bound)
    for _ in range(2):
        guarded.reset(seed=0)
        guarded(observations(guarded, 0))
        assert guarded.stats["guard"]["statistic"] == [None] and guarded.alarms == [False]
        guarded(observations(guarded, 1) * 9)
        assert guarded.alarms == [True]
    assert guarded.stats["guard"] | {"bound": 0} == {
        "chunks": 2, "alarms": 2, "statistic": guarded.stats["guard"]["statistic"], "bound": 0,
    }  # fmt: skip
    guarded.sparsity = 0.5  # the policy's own
    assert guarded.policy.sparsity == 0.5


def test_what_is_no_guard_of_this_policy_is_refused(bound: Bound, tmp_path: Path) -> None:
    path = tmp_path / "guard.npz"
    path.write_bytes(bound.to_bytes())
    same = Bound.read(path)
    assert same.sha256 == bound.sha256 and same.metadata == bound.metadata
    with pytest.raises(ValueError, match="guard: expected one of .* observed numbers"):
        Guard(make_policy("odd"), path)
    with pytest.raises(FileNotFoundError, match="guard: got .*tsad fit --guard"):
        Guard(make(), tmp_path / "none")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="guard: .*not a guard of this version"):
        Guard(make(), tmp_path / "other.npz")
    few = drifting(make(), 1, 80)
    with pytest.raises(ValueError, match="data: expected 50 pairs.*of two episodes or more"):
        measure(make(), few)
    with pytest.raises(ValueError, match="quantile: expected a number between 0 and 1"):
        measure(make(), few, quantile=1.0)


def test_eval_counts_what_a_guard_does(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    folder = save_policy(tmp_path / "p")
    policy = tsad.load(folder)
    random = np.random.default_rng(0)
    obs = random.normal(size=(120, policy.n_obs_steps, policy.obs_dim))
    np.savez(tmp_path / "data.npz", obs=obs, episode_ends=np.arange(12, 121, 12))
    words = ["fit", folder, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out")]
    code, text, err = run(capsys, *words, "--guard", "--quantile", "0.9", "--json")
    assert code == 0, err
    found = json.loads(text)
    assert found["pairs"] == 110 and found["knows_actions"] is False
    file = tmp_path / "out" / "guard.npz"
    play = ["eval", "table", "--policy", folder, "--sampler", "ddim", "--steps", "4", "--seeds",
            "4", "--lanes", "2", "--json"]  # fmt: skip
    results = []
    for more in ([], ["--guard", str(file)], ["--guard", str(file), "--jobs", "2"]):
        code, text, err = run(capsys, *play, *more)
        assert code == 0, err
        results.append(json.loads(text))
    plain, guarded, apart = results
    assert "guarded" not in plain["summary"] and "guarded" not in plain["episodes"][0]
    assert guarded["summary"]["guarded"] == sum(e["guarded"] for e in guarded["episodes"])
    assert guarded["settings"]["guard_sha256"] == Bound.read(file).sha256
    timeless = [[{k: v for k, v in e.items() if "ms" not in k} for e in r["episodes"]]
                for r in (guarded, apart)]  # fmt: skip
    assert timeless[0] == timeless[1]
    assert Setting(guard=file).alone(policy).load_guard() is not None


def test_a_guard_around_a_rule_is_refused(bound: Bound) -> None:
    """A rule that decides within a chunk has no plan that could be set aside for a dense one."""
    policy = make()
    policy.planner = rule = tsad.planners.RowRule("fbcache", 0.1)
    guarded = Guard(policy, bound)
    with pytest.raises(ValueError, match="planner: expected plans or the pruner under a guard"):
        guarded(observations(policy, 0))
    assert policy.planner == rule and guarded.stats["chunks"] == 0
    policy.planner = "uniform"
    guarded(observations(policy, 0))
    assert guarded.stats["chunks"] == 1
    plan = tsad.planners.uniform(policy, 2)
    turns: Any = tsad.planners.Turns(policy, plan, plan, every=2)
    with pytest.raises(TypeError, match=r"policy: expected one of tsad\.load, got Turns"):
        Guard(turns, bound)


# ---- the audit


def one_row(**options: Any) -> Any:
    """A policy whose chunks compute one row: the same cells in every chunk."""
    policy = make(**options)
    policy.plan = tsad.planners.from_steps(policy, "1000")
    return policy


@pytest.fixture(scope="module")
def audited_bound() -> Bound:
    policy = one_row()
    return measure(policy, drifting(policy, 8, 40), quantile=0.9, audit=True)


def test_bounds_of_an_audit_are_quantiles(audited_bound: Bound, tmp_path: Path) -> None:
    policy, found = one_row(), []
    policy._set_audit(True)
    for number, (obs, _) in enumerate(drifting(policy, 8, 40)):
        policy.reset(seed=number)
        for i, seen in enumerate(obs):
            policy(seen[None])
            _, nothing, apart, size = policy._audit(0)
            assert nothing == 0 and (size > 0) == (i > 0)
            found += [np.sqrt(apart / size)] if i else []
    bounds = audited_bound.audit
    assert bounds is not None and np.isnan(bounds[0]).all()
    np.testing.assert_allclose(bounds[1], np.quantile(found, [0.05, 0.95]))
    path = tmp_path / "guard.npz"
    path.write_bytes(audited_bound.to_bytes())
    same = Bound.read(path)
    np.testing.assert_array_equal(same.audit, bounds)
    assert same.sha256 == audited_bound.sha256
    bare = Bound(same.predict, same.whiten, same.bound, same.metadata)
    assert bare.sha256 != same.sha256 and same.metadata["audit"]["warm_start"] is None


def test_an_audit_lets_the_next_chunk_start_anew(audited_bound: Bound) -> None:
    nothing = np.array([[np.nan, np.nan], [0.0, 1e-9]])  # whatever is compared is out of bounds
    tight = replace(audited_bound, bound=np.array(1e9), audit=nothing)
    plain, dense, watched = one_row(), make(), Guard(one_row(), tight, restart=False)
    guarded = Guard(one_row(), tight)
    seen = []
    for chunk in range(6):
        obs, noise = observations(guarded, chunk), noises(guarded, chunk)
        got, wanted = guarded(obs, noise=noise), plain(obs, noise=noise)
        np.testing.assert_array_equal(watched(obs, noise=noise), wanted)
        if chunk in (2, 5):  # after an alarm; then there is nothing before, then a dense chunk
            wanted = dense(obs, noise=noise)
        np.testing.assert_array_equal(got, wanted)
        seen.append(guarded.alarms[0])
        assert watched.alarms == [chunk > 0]
    assert seen == [False, True, False, False, True, False]
    stats = guarded.stats["guard"]
    assert stats["audit_alarms"] == 2 and stats["alarms"] == 0
    assert stats["audit"][0][0] > 0 and stats["audit"][0][1] is None  # of a dense chunk, anew
    assert stats["audit_bound"] == [[None, None], [0, 1e-9]]
    assert watched.stats["guard"]["audit_alarms"] == 5
    guarded.reset()
    guarded(observations(guarded, 0))
    assert guarded.alarms == [False]


def test_copies_of_a_guard_audit_too(audited_bound: Bound) -> None:
    guarded = Guard(one_row(), replace(audited_bound, bound=np.array(1e9)))
    for twin in (copy.copy(guarded), copy.deepcopy(guarded)):
        assert isinstance(twin, Guard)  # deepcopy used to give the policy without its guard
        for chunk in range(2):
            twin(observations(twin, chunk))
        assert twin.stats["guard"]["audit"][0][1] > 0


def test_where_an_audit_says_nothing_it_is_refused(audited_bound: Bound) -> None:
    with pytest.raises(ValueError, match="guard: its audit was recorded with plan_sha256"):
        Guard(make(), audited_bound)
    with pytest.raises(ValueError, match="guard: its audit was recorded with warm_start None"):
        Guard(make(warm_start=4), audited_bound)
    policy = one_row()
    guarded = Guard(policy, audited_bound)
    sources = policy.plan.sources.copy()
    sources[2] = tsad.REUSE_ROLLOUT
    policy.plan = Plan(sources)
    with pytest.raises(ValueError, match="its audit expects plans that read no rollouts"):
        guarded(observations(policy, 0))
    data = drifting(policy, 8, 40)
    with pytest.raises(ValueError, match="its audit expects plans that read no rollouts"):
        measure(policy, data, audit=True)
    policy.reset()
    policy.plan = Plan(np.full_like(sources, tsad.SKIP))
    with pytest.raises(ValueError, match="plan: expected one that computes cells again"):
        measure(policy, data, audit=True)


def test_fit_and_eval_with_an_audit(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    folder = save_policy(tmp_path / "p")
    policy = tsad.load(folder)
    obs = np.random.default_rng(0).normal(size=(120, policy.n_obs_steps, policy.obs_dim))
    np.savez(tmp_path / "data.npz", obs=obs, episode_ends=np.arange(12, 121, 12))
    setting = ["--sampler", "ddim", "--steps", "4", "--plan", "1000"]
    words = ["fit", folder, "--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out")]
    code, text, err = run(capsys, *words, *setting, "--guard", "--audit")
    assert code == 0 and "computed values differ from those of earlier chunks by" in text, err
    file = str(tmp_path / "out" / "guard.npz")
    play = ["eval", "table", "--policy", folder, "--seeds", "4", "--guard", file, "--json"]
    results = []
    for more in (["--lanes", "2"], ["--jobs", "2"]):
        code, text, err = run(capsys, *play, *setting, *more)
        assert code == 0, err
        results.append([e["guarded"] for e in json.loads(text)["episodes"]])
    assert results[0] == results[1]
    code, _, err = run(capsys, *play, "--sampler", "ddim", "--steps", "4")
    assert code == 2 and "argument --guard: its audit was recorded with plan_sha256" in err
