"""A lead and smoothing on the command line, and the differences that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tsad.commands.common import span
from tsad.evaluation.usage import lead


def add_lead(parser: Any) -> None:
    """The options of what is made of executed actions; `load_policy` hands them to `tsad.load`."""
    parser.add_argument(
        "--lead",
        type=lead,
        metavar="G",
        help="move executed actions further from what the chunk before foresaw, by G of the way",
    )
    parser.add_argument(
        "--smoothing",
        action="store_const",
        const=True,
        help="weigh each executed action with its neighbours, 1/4, 1/2, 1/4",
    )


def difference(facts: Mapping[str, Any]) -> list[str]:
    """Two cells: a row's difference to another, and its interval."""
    return [f"{facts['mean_difference']:+.3f}", span(facts["simultaneous"])]
