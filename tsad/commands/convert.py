"""`tsad convert`: a checkpoint of another library to a tsad folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tsad.commands.common import Formatter, UsageError, add_overwrite, argument, positive_int
from tsad.files import output_folder

DESCRIPTION = """\
Convert a Diffusion Policy checkpoint (.ckpt) or a LeRobot folder to a tsad folder: config.json and
model.safetensors.
With --pruner, add a pruner checkpoint (.pt) of the published layout to an existing tsad folder.

The pickle in a checkpoint is read without running any code in it."""

EPILOG = """\
examples:
  tsad convert epoch=1500-test_mean_score=0.9.ckpt policy/
  tsad convert pretrained_model/ policy/                  LeRobot's, as lerobot-train leaves it
  tsad convert latest.ckpt policy/ --dtype float16 --overwrite
  tsad convert pruner.pt policy/ --pruner                 pruner.safetensors beside it
  tsad info policy/                                       then look at it"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "convert",
        help="a checkpoint to a tsad folder",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("source", metavar="CHECKPOINT", help="what to read")
    parser.add_argument("out", metavar="FOLDER", help="the tsad folder to write")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="averaged or raw weights (default: auto, the averaged ones if the run has them)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the stored weights (default: float32)",
    )
    parser.add_argument(
        "--pruner", action="store_true", help="CHECKPOINT is a pruner, FOLDER an existing policy"
    )
    parser.add_argument(
        "--heads",
        type=positive_int,
        metavar="N",
        help="with --pruner: its attention heads, where the file does not say (default: 8)",
    )
    add_overwrite(parser, "what is in FOLDER")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def _convert(args: argparse.Namespace) -> dict[str, Any]:
    from tsad import convert

    if args.pruner:
        return convert.convert_pruner(
            args.source, args.out, n_head=args.heads, dtype=args.dtype, overwrite=args.overwrite
        )
    return convert.convert(
        args.source, args.out, weights=args.weights, dtype=args.dtype, overwrite=args.overwrite
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if not Path(args.source).exists():
        raise UsageError(
            f"argument CHECKPOINT: got {args.source!r}, where nothing is; expected a file of "
            "Diffusion Policy (.ckpt) or a LeRobot folder; check the path (the policies that come "
            "along are loaded by their names, not converted)"
        )
    if args.pruner and args.weights != "auto":
        raise UsageError("argument --weights: a pruner has one set of weights; leave it out")
    if args.heads is not None and not args.pruner:
        raise UsageError("argument --heads: belongs to --pruner; a policy's file says its heads")
    with argument("FOLDER"):
        output_folder(args.out)
    try:
        summary = _convert(args)
    except FileExistsError as error:
        raise UsageError(f"argument FOLDER: {error} (--overwrite)") from error
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # of FOLDER, and says so
        raise UsageError(f"argument CHECKPOINT: {error}") from error
    if args.json:
        print(json.dumps(summary, indent=1))
        return 0
    for name, value in summary.items():
        for number, line in enumerate(value if isinstance(value, list) else [value]):
            print(f"{'' if number else name:<20}{line}")
    print(f"\nlook at it with: tsad info {args.out}")
    return 0
