"""`tsad train-policy`: a diffusion policy from demonstrations."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import Formatter, argument, natural, positive_int
from tsad.commands.training import (
    BUDGET_OPTIONS,
    Options,
    add_settings,
    begin,
    budget_text,
    check_new,
    fit,
    given,
    load_resumed,
    named,
    number,
    resumed_settings,
    steps,
)
from tsad.load import policy_folder
from tsad.presets import stale_note

if TYPE_CHECKING:
    from tsad.training.train import Settings, Trainer

DESCRIPTION = """\
Train a diffusion transformer on low-dimensional demonstrations; DIR becomes a tsad folder.

DATA is an npz file or a zarr v2 folder with the arrays 'obs' (N, obs_dim), 'action' (N, action_dim)
and 'episode_ends' (E,); or with Push-T's 'state' (N, 5) in place of 'obs'. The normaliser and the
held-out episodes are those of the first file.

Training ends with --minutes or --steps, its learning rate then being 0: by the clock, so a busy
machine gets its decay too (time in which the process is stopped doesn't count). Ctrl-C saves;
--resume goes on, on a CPU and by --steps to the bit as if there had been no stop. It runs on the
GPU that torch sees (bfloat16, compiled), else on the CPU.

--warm-start fine-tunes --init for few passes: a share of the windows begins with the policy's own
chunk before, as chunks of tsad.load(DIR, warm_start=N, sampler="ddim", num_inference_steps=16,
timestep_spacing="trailing") do, and learns what was demonstrated from there, in one pass."""

EPILOG = """\
examples:
  tsad train-policy demos.npz --out policy --minutes 120
  tsad train-policy demos.npz --out policy --resume                go on after Ctrl-C
  tsad train-policy demos.npz --out policy --resume --minutes 240  longer than first said
  tsad train-policy demos.npz --out policy --steps 100000 --batch 1024 --lr 1e-3    on a GPU
  tsad train-policy demos.npz more.npz --shares 0.6 0.4 --out policy --init old --horizon 10 \\
      --minutes 60                                                 old weights, two sets of data
  tsad train-policy demos.npz --init policy --warm-start 8 --lr 1e-4 --minutes 20 \\
      --out policy-warm                                            for fewer passes: a fine-tune
  tsad eval pusht --policy policy                                  then see what it is good for"""


# option, type, help; the defaults are those of tsad.training.train.Settings
SETTINGS: Options = (
    *BUDGET_OPTIONS,
    ("horizon", positive_int, "actions predicted at once (default: 16)"),
    ("n-obs-steps", positive_int, "observations seen (default: 2)"),
    ("n-action-steps", positive_int, "actions executed of those predicted (default: 8)"),
    ("n-layer", positive_int, "decoder layers (default: 8)"),
    ("n-head", positive_int, "attention heads (default: 4)"),
    ("n-emb", positive_int, "width (default: 256)"),
    ("num-train-timesteps", positive_int, "noise levels (default: 100)"),
    ("batch", positive_int, "windows per step (default: 64)"),
    ("lr", number, "learning rate (default: 5e-4)"),
    ("weight-decay", number, "of matrices (default: 0.01)"),
    ("warmup", natural, "steps in which the rate rises (default: 500)"),
    ("decay", number, "share of the training in which the rate falls to 0 (default: 0.5)"),
    ("ema", number, "largest decay of the averaged weights (default: 0.9995)"),
    ("dropout", number, "rate (default: 0)"),
    ("snr-power", number, "p of the loss weight SNR^-p: 0 noise, 1 actions (default: 0.5)"),
    ("val-episodes", natural, "held out: the last ones of the first file (default: 6)"),
    ("seed", natural, "of weights, order and noise (default: 0)"),
    ("init", str, "start from the weights and normaliser of this tsad folder"),
    ("warm-start", positive_int, "with --init: fine-tune for chunks N of 16 steps from the end"),
    ("warm-share", number, "of the windows that begin so (default: 0.5)"),
)
CHOICES = ("prediction-type", "shares", "coverage", "precision", "count-padding")
NAMES = (*(name for name, _, _ in SETTINGS), *CHOICES)


def _band(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected A:B; e.g. 0.5:1") from None


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "train-policy",
        help="a policy from demonstrations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("data", metavar="DATA", nargs="+", help="demonstrations")
    parser.add_argument("--keypoints", metavar="FILE", help="JSON, for 'state' (default: Push-T's)")
    parser.add_argument("--licence", default="", metavar="TEXT", help="of the data, for the card")
    parser.add_argument(
        "--keep-every",
        type=steps,
        metavar="N",
        help="keep the policy of every N steps in DIR/step-..., to score them",
    )
    group = add_settings(parser, SETTINGS, report_every=250)
    group.add_argument(
        "--prediction-type", choices=("epsilon", "sample"), help="predict noise or actions"
    )
    group.add_argument(
        "--shares",
        type=number,
        nargs="+",
        metavar="X",
        help="share of each DATA in training (default: by size)",
    )
    group.add_argument(
        "--coverage",
        type=_band,
        nargs="+",
        metavar="A:B",
        help="Push-T: of each DATA only the windows that begin with so much of the goal covered",
    )
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of the network in training (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--count-padding",
        action="store_true",
        help="learn to repeat the last action after an episode's end, as Diffusion Policy does",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    trainer = begin(args, "tsad train-policy", _fresh, _resumed, _plan)
    config = _fit(trainer, args)
    notes = stale_note(trainer.out)
    summary = {
        "out": str(trainer.out),
        "sha256": config.provenance["sha256"]["model.safetensors"],
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 2),
        "val_loss": trainer.curve[-1].val_loss if trainer.curve else None,
        "x0_error": trainer.curve[-1].x0_error if trainer.curve else None,
        "warm_error": trainer.curve[-1].warm_error if trainer.curve else None,
    }
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"written to {trainer.out}: {trainer.step} steps, {trainer.seconds / 60:.1f} minutes")
        print("\n".join([f"sha256 of model.safetensors: {summary['sha256']}", *notes]))
    return 0


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings on the command line."""
    values = given(args, NAMES)
    for name in ("shares", "coverage"):
        if name in values:
            values[name] = tuple(values[name])
    if "init" in values:  # a bundled name will do
        values["init"] = str(policy_folder(values["init"]) or values["init"])
    return values


def _named() -> AbstractContextManager[None]:
    return named(NAMES, "DATA", **{"validation episodes": "--val-episodes"})


def _make(args: argparse.Namespace, settings: Settings) -> Trainer:
    from tsad.checkpoint import read_folder
    from tsad.training.data import local_keypoints
    from tsad.training.train import Trainer

    with argument("DATA"):
        for path in args.data:
            if not Path(path).exists():
                raise FileNotFoundError(
                    f"{path!r} does not exist; expected demonstrations: an npz file or a zarr "
                    "v2 folder, as tsad train-policy --help says"
                )
    if args.keypoints is not None:
        with argument("--keypoints"):
            local_keypoints(args.keypoints)
    if settings.init:
        with argument("--init"):
            read_folder(settings.init)
    with _named():
        return Trainer(
            args.data,
            args.out,
            settings,
            keypoints=args.keypoints,
            device=args.device,
            licence=args.licence,
        )


def _fresh(args: argparse.Namespace) -> Trainer:
    from tsad.training.train import Settings

    check_new(args.out)
    with _named():
        settings = Settings(**_given(args))
    return _make(args, settings)


def _resumed(args: argparse.Namespace) -> Trainer:
    from dataclasses import replace

    from tsad.training.train import Settings

    state = load_resumed(args.out)
    with argument("--resume"):
        settings = Settings.from_dict(state["settings"])
    budget = resumed_settings(args.out, settings, _given(args))
    with _named():
        settings = replace(settings, **budget)
        trainer = _make(args, settings)
        trainer.restore(state)
    return trainer


def _plan(trainer: Trainer, begun: str) -> str:
    episodes = sum(len(source.ends) for source in trainer.sources)
    numbers = sum(p.numel() for p in trainer.net.parameters())
    return (
        f"{episodes} episodes, {len(trainer.data.edges)} windows, {numbers:,} parameters, "
        f"{trainer.device}; {budget_text(trainer.settings)}, {begun}\n"
        "x0 error: of the clean actions, in their own units, from little noise to much"
    )


def _fit(trainer: Trainer, args: argparse.Namespace) -> Any:
    command = ["tsad", "train-policy", *args.data, "--out", args.out, "--resume"]
    command += ["--keypoints", args.keypoints] if args.keypoints else []
    command += ["--licence", args.licence] if args.licence else []
    return fit(trainer, args, command, keep_every=args.keep_every)
