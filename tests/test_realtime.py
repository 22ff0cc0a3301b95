"""tsad eval --realtime: which action acts at which tick, and a latency that is a setting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import FakePolicy, FakeWorld

from tsad import sim
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
