"""`tsad show`: a plan in the terminal."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from typing import Any

from tsad.commands.common import Formatter, UsageError, add_overwrite, argument, load_plan
from tsad.plot.text import render

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
