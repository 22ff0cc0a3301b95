"""`tsad eval --realtime`: its options, and the latency that a run is played with."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.bench import Clock, observations
from tsad.commands.common import UsageError, argument, real
from tsad.commands.progress import Progress
from tsad.sim.realtime import MOST_HZ, MOST_MS, delay_ticks

if TYPE_CHECKING:
    from tsad import SparsePolicy

# argparse types, and the check of the same keys in a settings file
hertz = real(lambda value: 0 < value <= MOST_HZ, f"ticks a second, above 0 and up to {MOST_HZ:g}")
milliseconds = real(lambda value: 0 <= value <= MOST_MS, f"milliseconds, 0 to {MOST_MS:g}")

ROUNDS, CHUNKS = 5, 10  # chunks of a round; the median of the quietest round counts

HELP = f"""\
--realtime HZ: the simulator doesn't wait for the policy. A step of the simulator is a tick of 1/HZ
seconds, whatever its own pace (Push-T: 10 Hz): a larger HZ is a faster robot. A chunk asked for at
a tick is ready d = HZ x latency / 1000 ticks later, rounded down: within its tick is in time.
Chunks are asked for every N ticks (--n-action-steps), or every d if that is more. Action i of a
chunk belongs to tick i after what it saw. At each tick the newest chunk that is ready acts, with
its last action where it has no more; before the first one the robot holds its place. So actions
that come too late are dropped, and an N below what the policy returns leaves some for the wait.
The latency is a setting like others: --latency MS, or that of the results to go on with, or it is
measured first (the quietest of {ROUNDS} rounds, one lane, --threads). On a busy machine give
the one of a quiet hour (tsad bench). A d of 0 is a simulator that waits."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to `parser`; `HELP` says more than fits there."""
    group = parser.add_argument_group("real time (default: the simulator waits for the policy)")
    group.add_argument(
        "--realtime", type=hertz, metavar="HZ", help="ticks a second, one step of the simulator"
    )
    group.add_argument(
        "--latency",
        type=milliseconds,
        metavar="MS",
        help="of a chunk, to 0.1 ms (default: measured here, now)",
    )


def check(hz: float | None, latency: float | None, name: str) -> None:
    """UsageError, naming the argument `name`, where a latency has nothing to delay."""
    if latency is not None and hz is None:
        raise UsageError(f"argument {name}: needs --realtime HZ, the ticks that it is counted in")


def settings(
    hz: float | None, latency: float | None, out: Path | None, measure: Callable[[], SparsePolicy]
) -> dict[str, Any]:
    """What a run's settings say of real time: {} without it, else {"realtime": {...}}.

    The latency is the one given, else that of the results at `out`, else that of the policy, one
    lane, which `measure` makes.
    """
    if hz is None:
        return {}
    if latency is None and out is not None:
        with argument("--out"):
            latency = _recorded(out)
    if latency is None:
        latency = _measured(measure())
    hz, latency = float(hz), round(float(latency), 1)
    return {
        "realtime": {"hz": hz, "latency_ms": latency, "ticks": delay_ticks(hz, latency)},
    }


def _recorded(out: Path) -> float | None:
    """The latency of the results at `out`; None if there are none."""
    from tsad.sim.results import ResultsError, recorded_settings

    recorded = recorded_settings(out)
    if recorded is None:
        return None
    if "realtime" not in recorded:
        raise ResultsError(
            f"{out} was made without --realtime; fix: leave it out, another --out, or --overwrite"
        )
    return float(recorded["realtime"]["latency_ms"])


def _measured(policy: SparsePolicy) -> float:
    """Milliseconds per chunk of the policy, here and now.

    The first chunk of an episode, which may be dense, is taken to be as fast as the others.
    """
    clock, obs = Clock("latency", lambda: policy, lambda _: None), observations(policy, CHUNKS)
    with Progress(ROUNDS, "latency", unit="rounds") as progress:
        for _ in range(ROUNDS):
            clock.round(obs)
            progress.update(f"{min(clock.medians):.1f} ms")
    return min(clock.medians)


def report(played: dict[str, Any]) -> list[str]:
    """The line of a report; none where the simulator waits."""
    if "realtime" not in played:
        return []
    known = played["realtime"]
    count = "1 tick" if known["ticks"] == 1 else f"{known['ticks']} ticks"
    return [f"late     {count} ({known['latency_ms']:.1f} ms at {known['hz']:g} Hz)"]
