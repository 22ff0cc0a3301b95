"""The latency that a run in real time is played with, `tsad.sim.realtime`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.evaluation.progress import Progress
from tsad.evaluation.timing import Clock, observations
from tsad.evaluation.usage import UsageError, argument, real
from tsad.sim.realtime import MOST_HZ, MOST_MS, delay_ticks

if TYPE_CHECKING:
    from tsad import SparsePolicy


# argparse types, and the check of the same keys in a settings file
hertz = real(lambda value: 0 < value <= MOST_HZ, f"ticks a second, above 0 and up to {MOST_HZ:g}")


milliseconds = real(lambda value: 0 <= value <= MOST_MS, f"milliseconds, 0 to {MOST_MS:g}")


ROUNDS, CHUNKS = 5, 10  # chunks of a round; the median of the quietest round counts


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
