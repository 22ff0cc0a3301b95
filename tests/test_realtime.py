"""tsad eval --realtime: which action acts at which tick, and a latency that is a setting."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from fakes import FakePolicy, FakePushT, FakeWorld

import tsad
from tsad import sim
from tsad.evaluation import realtime, timing
from tsad.sim.realtime import delay_ticks

REST = -1.0


class Counting:
    """Chunks of 4 actions: 100 x the number of the chunk in its episode + the action's own."""

    lanes, n_obs_steps, n_action_steps, obs_dim, action_dim = 1, 2, 4, 1, 1

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self._answer = np.empty((1, 4, 1), np.float32)

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        self.asked = 0

    def __call__(self, obs: Any, *, lanes: Any = None) -> Any:
        self.seen.append([float(value) for value in obs.ravel()])
        self._answer[0, :, 0] = 100 * self.asked + np.arange(4)  # the same memory each time
        self.asked += 1
        return self._answer


class Ticks:
    """Observes its own tick, and keeps what it is told to do."""

    name, obs_dim, action_dim, max_steps, obs_meaning = "ticks", 1, 1, 12, "the tick"

    def reset(self, seed: int) -> Any:
        self.acted: list[float] = []
        return np.zeros(1, np.float32)

    def step(self, action: Any) -> sim.Step:
        self.acted.append(float(action[0]))
        return sim.Step(np.full(1, len(self.acted), np.float32), 0.0, False, False)

    def rest_action(self) -> Any:
        return np.full(1, REST)


def play(executed: int | None, delay: int, seeds: int = 1) -> tuple[list[int], list[int]]:
    """The actions of the last episode, and the ticks at which its chunks were asked for."""
    policy, world = Counting(), Ticks()
    for seed in range(seeds):
        policy.seen.clear()
        (episode,) = sim.rollouts(policy, [world], [seed], n_action_steps=executed, delay=delay)
    ticks = [int(obs[-1]) for obs in policy.seen]
    # two observations, one tick apart, but at the start
    assert [obs[0] for obs in policy.seen] == [max(tick - 1, 0) for tick in ticks]
    assert episode.chunks == len(ticks) and episode.steps == 12
    return [int(action) for action in world.acted], ticks


@pytest.mark.parametrize(
    ("executed", "delay", "actions", "asked"),
    [
        # the world waits
        (None, 0, [0, 1, 2, 3, 100, 101, 102, 103, 200, 201, 202, 203], [0, 4, 8]),
        (2, 0, [0, 1, 100, 101, 200, 201, 300, 301, 400, 401, 500, 501], [0, 2, 4, 6, 8, 10]),
        # nothing is left of a chunk that is executed whole: its last action once more
        (None, 1, [-1, 1, 2, 3, 3, 101, 102, 103, 103, 201, 202, 203], [0, 4, 8]),
        # what the one before has left bridges the wait: no action is out of date
        (2, 1, [-1, 1, 2, 101, 102, 201, 202, 301, 302, 401, 402, 501], [0, 2, 4, 6, 8, 10]),
        (3, 2, [-1, -1, 2, 3, 3, 102, 103, 103, 202, 203, 203, 302], [0, 3, 6, 9]),  # executed - 1
        (2, 2, [-1, -1, 2, 3, 102, 103, 202, 203, 302, 303, 402, 403], [0, 2, 4, 6, 8, 10]),
        # later than n_action_steps: the next is asked for when the one before is ready
        (1, 3, [-1, -1, -1, 3, 3, 3, 103, 103, 103, 203, 203, 203], [0, 3, 6, 9]),
        # later than all its own actions: its last alone
        (2, 5, [-1] * 5 + [3] * 5 + [103] * 2, [0, 5, 10]),
        (None, 10**9, [-1] * 12, [0]),  # never ready
    ],
)
def test_which_action_acts_at_which_tick(
    executed: int | None, delay: int, actions: list[int], asked: list[int]
) -> None:
    assert play(executed, delay) == (actions, asked)
    assert play(executed, delay, seeds=2) == (actions, asked)  # nothing is left of an episode


def episodes(lanes: int, seeds: list[int], **options: Any) -> dict[int, sim.Episode]:
    worlds = [FakeWorld() for _ in range(min(lanes, len(seeds)))]
    return {
        episode.seed: replace(episode, chunk_ms_mean=0.0, chunk_ms_max=0.0)  # times are no results
        for episode in sim.rollouts(FakePolicy(lanes), worlds, seeds, **options)
    }


@pytest.mark.parametrize("delay", [1, 2, 6])
def test_lanes_and_order_do_not_change_results(delay: int) -> None:
    seeds = list(range(100, 120))
    options = {"n_action_steps": 3, "delay": delay}
    alone = episodes(1, seeds, **options)
    assert len({episode.steps for episode in alone.values()}) > 3  # lanes end at different times
    for lanes in (2, 3, 7, 20):
        assert episodes(lanes, seeds, **options) == alone
    assert episodes(3, seeds[::-1], **options) == alone
    assert episodes(1, seeds, n_action_steps=3) != alone
    assert episodes(3, seeds, n_action_steps=3, delay=0) == episodes(1, seeds, n_action_steps=3)


def test_a_delay_that_cannot_be() -> None:
    for wrong in (-1, 1.0, True):
        with pytest.raises(ValueError, match=f"delay: got {wrong}, expected ticks"):
            next(sim.rollouts(Counting(), [Ticks()], [0], delay=wrong))

    class Restless(Ticks):
        rest_action = None

    with pytest.raises(ValueError, match="simulator 'ticks' has no rest_action"):
        next(sim.rollouts(Counting(), [Restless()], [0], delay=1))
    assert len(list(sim.rollouts(Counting(), [Restless()], [0]))) == 1  # which needs none


def test_ticks_of_a_latency() -> None:
    assert [delay_ticks(10, ms) for ms in (0, 66.2, 99.9, 100, 199.9, 200)] == [0, 0, 0, 1, 1, 2]
    # every whole number of ticks that tenths of a millisecond can give, exactly
    for hz in (1, 5, 8, 10, 20, 25, 40, 50, 100, 125, 1000):
        for ticks in range(1, 200):
            assert delay_ticks(hz, ticks * 1000 / hz) == ticks
            assert delay_ticks(hz, ticks * 1000 / hz - 0.1) == ticks - 1
    for hz in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="hz: got"):
            delay_ticks(hz, 10)
    for ms in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="latency_ms: got"):
            delay_ticks(10, ms)


def test_push_t_rests_where_it_is() -> None:
    pytest.importorskip("gym_pusht")
    table = sim.make("pusht")
    obs = table.reset(3)
    np.testing.assert_array_equal(table.rest_action(), obs[18:])
    for _ in range(5):
        np.testing.assert_allclose(table.step(table.rest_action()).obs, obs, atol=1e-3)
    table.close()


# ---- the command


@pytest.fixture
def fake(monkeypatch: Any) -> list[int]:
    """`tsad.load` gives a small fake that plays a short Push-T; the lanes that it was asked for.

    A score is any number in [0, 1), and another one wherever the agent went elsewhere.
    """
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    lanes: list[int] = []

    def load(source: str, **options: Any) -> Any:
        lanes.append(options["lanes"])
        return FakePushT(options["lanes"])

    monkeypatch.setattr(tsad, "load", load)
    step = PushT.step

    def scored(table: Any, action: Any) -> sim.Step:
        found = step(table, action)
        return found._replace(score=float(found.obs[18:].sum() % 1))

    monkeypatch.setattr(PushT, "step", scored)
    monkeypatch.setattr(PushT, "max_steps", 20)
    return lanes


def evaluate(capsys: Any, *options: str) -> Any:
    command = ["eval", "pusht", "--json", "--seeds", "3", "--first-seed", "10"]
    code, out, err = run(capsys, *command, "--n-action-steps", "4", *options)
    assert code == 0, err
    return json.loads(out)


def scores(document: Any) -> list[tuple[float, int, int]]:
    return [(e["score"], e["steps"], e["chunks"]) for e in document["episodes"]]


def test_a_latency_is_a_setting(capsys: Any, fake: list[int]) -> None:
    waits = evaluate(capsys)
    assert "realtime" not in waits["settings"]
    in_time = evaluate(capsys, "--realtime", "10", "--latency", "99.94")
    assert in_time["settings"]["realtime"] == {"hz": 10, "latency_ms": 99.9, "ticks": 0}
    assert scores(in_time) == scores(waits)
    late = evaluate(capsys, "--realtime", "10", "--latency", "99.96")
    assert late["settings"]["realtime"] == {"hz": 10, "latency_ms": 100, "ticks": 1}
    assert scores(late) != scores(waits)
    lanes = evaluate(capsys, "--realtime", "10", "--latency", "100", "--lanes", "3")
    assert scores(lanes) == scores(late) and lanes["settings"] == late["settings"]
    # ten times as fast a robot, the same ticks
    fast = evaluate(capsys, "--realtime", "100", "--latency", "10")
    assert scores(fast) == scores(late)
    assert fake == [1, 1, 1, 3, 1]  # nothing was measured
    options = ["--realtime", "2.5", "--latency", "800", "--seeds", "1", "--first-seed", "10"]
    code, out, _ = run(capsys, "eval", "pusht", *options)
    assert code == 0 and "late     2 ticks (800.0 ms at 2.5 Hz)" in out


def test_the_latency_is_that_of_the_quietest_round(
    capsys: Any, tmp_path: Path, monkeypatch: Any, fake: list[int]
) -> None:
    """Measured on one lane, once: a run that goes on has the latency of its file."""
    measured = [9.0, 3.14, 5.0, 8.0, 7.0]
    calls = 0

    def call(policy: Any, obs: Any) -> float:
        nonlocal calls
        assert policy.lanes == 1 and policy.sparsity == 0.5
        number, first = divmod(calls, realtime.CHUNKS + 2)
        calls += 1
        return 50.0 if first < 2 else measured[number]

    monkeypatch.setattr(timing, "milliseconds", call)
    out = str(tmp_path / "r.json")
    options = ["--sparsity", "0.5", "--realtime", "1000", "--out", out]
    one = evaluate(capsys, *options, "--lanes", "2")
    assert one["settings"]["realtime"] == {"hz": 1000, "latency_ms": 3.1, "ticks": 3}
    assert fake == [2, 1] and calls == 5 * (realtime.CHUNKS + 2)
    measured[:] = [4.0] * 5
    more = evaluate(capsys, *options, "--resume", "--seeds", "4")
    assert more["settings"] == one["settings"] and scores(more)[:3] == scores(one)
    assert fake == [2, 1, 1]  # not measured again

    for other, message in (
        (["--latency", "4"], "realtime, latency_ms: the file has 3.1, this run 4.0"),
        (["--realtime", "500"], "realtime, hz: the file has 1000.0, this run 500.0"),
    ):
        code, _, err = run(capsys, "eval", "pusht", *options, *other, "--resume")
        assert code == 2 and message in err, err
    code, _, err = run(capsys, "eval", "pusht", *options)  # refused before it is measured
    assert code == 2 and "--resume goes on with it" in err
    code, _, err = run(capsys, "eval", "pusht", *options[:2], *options[4:], "--resume")
    assert code == 2 and "realtime: the file has {'hz': 1000.0" in err
    evaluate(capsys, "--overwrite", *options[:2], *options[4:])
    code, _, err = run(capsys, "eval", "pusht", *options, "--resume")
    assert code == 2 and "was made without --realtime; fix: leave it out" in err
    assert calls == 5 * (realtime.CHUNKS + 2)
    calls = 0
    assert evaluate(capsys, *options, "--overwrite")["settings"]["realtime"]["latency_ms"] == 4


def test_an_interrupted_run_keeps_its_latency(
    capsys: Any, tmp_path: Path, monkeypatch: Any, fake: list[int]
) -> None:
    latency = 2.0
    monkeypatch.setattr(realtime, "_measured", lambda *_: latency)
    options = ["--realtime", "1000", "--out", str(tmp_path / "r.json")]
    whole = evaluate(capsys, *options[:2])
    rollouts = sim.rollouts

    def interrupted(*args: Any, **keywords: Any) -> Any:
        yield next(rollouts(*args, **keywords))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sim, "rollouts", interrupted)
        command = ["eval", "pusht", "--seeds", "3", "--first-seed", "10", "--n-action-steps", "4"]
        assert run(capsys, *command, *options)[0] == 130
    latency = 5.0
    resumed = evaluate(capsys, *options, "--resume")
    assert resumed["settings"]["realtime"]["latency_ms"] == 2 and scores(resumed) == scores(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--realtime", "0"], "--realtime: got '0', expected ticks a second, above 0"),
        (["--realtime", "nan"], "--realtime: got 'nan'"),
        (["--realtime", "inf"], "--realtime: got 'inf'"),
        (["--realtime", "fast"], "--realtime: got 'fast'"),
        (["--realtime", "10", "--latency", "-1"], "--latency: got '-1', expected milliseconds"),
        (["--realtime", "10", "--latency", "nan"], "--latency: got 'nan'"),
        (["--latency", "5"], "--latency: needs --realtime HZ"),
    ],
)
def test_wrong_options(capsys: Any, options: list[str], message: str) -> None:
    code, _, err = run(capsys, "eval", "pusht", *options)
    assert code == 2 and message in err, err


def sweep(capsys: Any, tmp_path: Path, rows: Any, *options: str) -> tuple[int, str, str]:
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["eval", "pusht", "--seeds", "3", "--first-seed", "10", "--n-action-steps", "4"]
    files = ["--settings", str(tmp_path / "rows.json"), "--out", str(tmp_path / "sweep")]
    return run(capsys, *command, *files, "--json", *options)


def test_rows_of_a_sweep(capsys: Any, tmp_path: Path, monkeypatch: Any, fake: list[int]) -> None:
    measured: list[float] = []

    def measure(policy: Any) -> float:
        measured.append(20.0 * (1 - policy.sparsity))
        return measured[-1]

    monkeypatch.setattr(realtime, "_measured", measure)
    rows = [
        {"name": "waits"},
        {"name": "in-time", "realtime": 10, "latency": 5},
        {"name": "late", "realtime": 100, "latency": 20.04},
        {"name": "measured", "realtime": 100},
        {"name": "sparse", "realtime": 100, "sparsity": 0.5},
    ]
    code, out, err = sweep(capsys, tmp_path, rows)
    assert code == 0, err
    found = json.loads(out)["rows"]
    assert "realtime" not in found["waits"]["settings"]
    assert found["in-time"]["score"] == found["waits"]["score"] != found["late"]["score"]
    late = {"hz": 100, "latency_ms": 20, "ticks": 2}
    assert found["late"]["settings"]["realtime"] == late
    assert found["measured"]["settings"] == found["late"]["settings"]
    assert found["sparse"]["settings"]["realtime"]["ticks"] == 1 and measured == [20, 10]
    assert sweep(capsys, tmp_path, rows)[1] == out and len(measured) == 2  # nothing is left to do
    code, out, err = sweep(capsys, tmp_path, rows[1:4], "--realtime", "100", "--overwrite")
    assert code == 0 and json.loads(out)["rows"]["measured"]["settings"]["realtime"] == late


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"realtime": 0}, "setting 0: realtime: got 0, expected ticks a second, above 0"),
        ({"realtime": float("nan")}, "setting 0: realtime: got nan"),
        ({"realtime": "10"}, "setting 0: realtime: expected float, got '10'"),
        ({"realtime": 10, "latency": -1}, "setting 0: latency: got -1, expected milliseconds"),
        ({"realtime": 10, "latency": 10**400}, "setting 0: latency: got 1000"),
        ({"latency": 5}, "--settings: a: latency: needs --realtime HZ"),
    ],
)
def test_wrong_rows(
    capsys: Any, tmp_path: Path, fake: list[int], row: dict[str, Any], message: str
) -> None:
    code, _, err = sweep(capsys, tmp_path, [{"name": "a", **row}])
    assert code == 2 and message in err, err
