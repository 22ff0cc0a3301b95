"""The actions of a policy that takes time while the world goes on.

Time passes in ticks, one step of the simulator each; chunks are asked for every `period` ticks, at
first at tick 0, and each is ready `delay` ticks later:

    period = max(n_action_steps executed, delay)

Action i of a chunk belongs to tick i after the observation that it was asked with. At every tick
the newest chunk that is ready acts, with the action that belongs to the tick; past its own end it
repeats its last. So actions whose ticks went by while the chunk was made are never executed, what
the chunk before it still has is executed meanwhile, and a chunk later than all its actions gives
its last alone. Before the first chunk is ready the environment's `rest_action` holds. A delay of 0
is a world that waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from tsad.sim.simulators import Environment, rest

MOST_HZ, MOST_MS = 1e6, 1e6


def delay_ticks(hz: float, latency_ms: float) -> int:
    """The whole ticks of 1/hz seconds that a latency takes, rounded down: less than one is in time.

    The latency counts in tenths of a millisecond: with a whole `hz` nothing is lost to rounding.

    Raises:
        ValueError: not a number above 0 and up to 1e6 (hz), from 0 to 1e6 (latency_ms).
    """
    if not 0 < hz <= MOST_HZ:
        raise ValueError(f"hz: got {hz}, expected ticks a second, above 0 and up to {MOST_HZ:g}")
    if not 0 <= latency_ms <= MOST_MS:
        raise ValueError(f"latency_ms: got {latency_ms}, expected milliseconds, 0 to {MOST_MS:g}")
    return math.floor(round(latency_ms * 10) * hz / 10_000)


class Delay:
    """What one lane executes when each chunk is `delay` ticks late; see the module.

    Args:
        executed: n_action_steps of each chunk, at least 1.
        delay: in ticks.

    Raises:
        ValueError: `delay` is not an integer of at least 0.
    """

    def __init__(self, executed: int, delay: int) -> None:
        if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
            raise ValueError(f"delay: got {delay!r}, expected ticks, an integer of at least 0")
        self.delay, self.period = delay, max(executed, delay)
        self._acting: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def start(self, environment: Environment) -> None:
        """An episode begins: nothing is ready. SimulatorError if the environment cannot rest."""
        if self.delay == 0:
            return
        self._acting = rest(environment)[None]

    def ask(self, chunk: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """The `period` actions from the tick on that `chunk` (n, action_dim) is asked for."""
        before, now = self._acting, chunk.copy()  # the policy may write its next over it
        self._acting = now
        return (
            _at(before, self.period + tick) if tick < self.delay else _at(now, tick)
            for tick in range(self.period)
        )


def _at(actions: NDArray[np.float32], tick: int) -> NDArray[np.float32]:
    """The action of a tick (action_dim,), the last one past the end."""
    row: NDArray[np.float32] = actions[min(tick, len(actions) - 1)]
    return row
