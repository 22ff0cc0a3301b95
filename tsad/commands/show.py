"""`tsad show`: a plan in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from typing import TYPE_CHECKING, Any

from tsad.commands.common import Formatter, UsageError, add_overwrite, argument, load_plan

if TYPE_CHECKING:
    from tsad import Plan

# By source code, as in tsad.plan.SOURCE_NAMES: sign, and colour for a terminal (256 colours).
SIGNS = "#^.<-"
TERMINAL_COLORS = (15, 166, 38, 220, 240)

DESCRIPTION = """\
Show a plan as text: a row per block, a column per denoising step, a sign per source, and counts."""

EPILOG = """\
examples:
  tsad show tsad-demo/plan.npz               (tsad demo writes this one)
  tsad show plan.npz --png plan.png
  tsad show plan.npz --json | jq .counts

a plan file comes from `tsad demo`, or from Python: policy.plan.save("plan.npz")"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "show",
        help="a plan in the terminal, or as a picture",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("plan", metavar="PLAN", help="a plan file (npz)")
    parser.add_argument("--first", action="store_true", help="the plan of the first rollout")
    parser.add_argument("--png", metavar="FILE", help="also draw it into this file (png, pdf, svg)")
    add_overwrite(parser, "an existing --png")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="colours (default: auto, on a terminal without NO_COLOR)",
    )
    parser.add_argument("--json", action="store_true", help="print counts and sources as JSON")
    parser.set_defaults(run=run)


def _paint(row: Any, color: bool) -> str:
    """One row of signs; a run of one source is coloured at once."""
    if not color:
        return "".join(SIGNS[source] for source in row)
    text, begin = "", 0
    for end in range(1, len(row) + 1):
        if end == len(row) or row[end] != row[begin]:
            code = TERMINAL_COLORS[row[begin]]
            text += f"\x1b[38;5;{code}m{SIGNS[row[begin]] * (end - begin)}"
            begin = end
    return text + "\x1b[0m"


def _ruler(begin: int, end: int) -> str:
    """Step numbers, a mark at every tenth step."""
    text = ""
    for step in range(begin, end):
        if step % 10 == 0:
            text = text.ljust(step - begin) + str(step)
    return text[: end - begin + 3]


def render(plan: Plan, *, width: int, color: bool) -> str:
    """The plan as text, folded into panels of steps that fit `width` columns."""
    from tsad.plot import SOURCE_MEANINGS, block_labels, title

    n_steps, n_blocks = plan.sources.shape
    labels = [" ".join(part for part in label if part) for label in block_labels(plan.blocks)]
    margin = max(map(len, labels))
    room = max(20, (width - margin - 4) // 10 * 10)
    lines = [title(plan), ""]
    for begin in range(0, n_steps, room):
        end = min(begin + room, n_steps)
        lines.append(f"{'step':>{margin}}  {_ruler(begin, end)}")
        for b in range(n_blocks):
            cells = plan.sources[begin:end, b]
            lines.append(f"{labels[b]:>{margin}}  {_paint(cells, color)}")
        lines.append("")
    for source, (name, number) in enumerate(plan.counts.items()):
        if number:
            share = number / plan.sources.size
            sign = _paint([source], color)
            lines.append(
                f"  {sign}  {name:<14}{number:>7,}  {share:>6.1%}  {SOURCE_MEANINGS[source]}"
            )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    plan = load_plan(args.plan, "PLAN")
    if args.first:
        if plan.first is None:
            raise UsageError("argument --first: this plan has none; its first rollout is dense")
        plan = plan.first
    if args.png is not None:
        from tsad.plot import save_plan

        with argument("--png"):
            save_plan(plan, args.png, overwrite=args.overwrite)
    if args.json:
        facts = {
            "steps": plan.sources.shape[0],
            "blocks": list(plan.blocks),
            "sparsity": plan.sparsity,
            "cell_sparsity": plan.cell_sparsity,
            "counts": plan.counts,
            "sources": plan.sources.tolist(),
        }
        print(json.dumps(facts))
        return 0
    terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    color = args.color == "always" or (args.color == "auto" and terminal)
    print(render(plan, width=shutil.get_terminal_size((120, 24)).columns, color=color))
    if args.png is not None:
        print(f"written to {args.png}")
    return 0
