"""`tsad eval --realtime`: its options, and its line of a report."""

from __future__ import annotations

import argparse
from typing import Any

from tsad.evaluation.realtime import ROUNDS, hertz, milliseconds

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


def report(played: dict[str, Any]) -> list[str]:
    """The line of a report; none where the simulator waits."""
    if "realtime" not in played:
        return []
    known = played["realtime"]
    count = "1 tick" if known["ticks"] == 1 else f"{known['ticks']} ticks"
    return [f"late     {count} ({known['latency_ms']:.1f} ms at {known['hz']:g} Hz)"]
