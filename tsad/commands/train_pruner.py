"""`tsad train-pruner`: what decides per observation which blocks are computed."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    OBSERVATIONS,
    OBSERVATIONS_HELP,
    Formatter,
    InterruptedRunError,
    UsageError,
    argument,
    natural,
    noted,
    positive_int,
)
from tsad.commands.plan import policy_facts, read_effects, recorded
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
)
from tsad.evaluation.progress import Progress

if TYPE_CHECKING:
    from tsad.training.pruner import PrunerSettings, PrunerTrainer

DESCRIPTION = f"""\
Train a pruner for a policy, on recorded observations: it looks at each observation and decides
which blocks of which denoising steps are computed. DIR becomes a tsad folder, the policy with it.

It begins as a static table, around the plan of least effect or around --plans that were searched,
and learns what the observation says beyond it: --method effects, what each cell gains in each chunk
(a few seconds a chunk to measure); levels, how much a chunk needs, from its true error at several
sparsities (a second); gates, straight through the sparse chunk (some seconds a step). One pruner
serves the whole dial (policy.sparsity); policy.sparsity = None is its own choice, which spends more
where more is lost, and on average leaves out the share --sparsity. Kept is what has the least true
error on held-out episodes, maybe the table itself. It is known for diffusion transformers.

Ctrl-C saves, while measuring too; --resume goes on, on a CPU and by --steps to the bit as if there
had been no stop. --static trains the control that does not look at the observation: what a pruner
gains beyond it is what adapting gains.

{OBSERVATIONS}"""

EPILOG = """\
examples:
  tsad collect pusht --out recorded --episodes 40
  tsad train-pruner pusht --data recorded --out adaptive --steps 2000
  tsad train-pruner pusht --data recorded --out adaptive --resume             after Ctrl-C
  tsad train-pruner pusht --data recorded --out adaptive --resume --steps 4000
  tsad train-pruner pusht --data recorded --plans plan.npz --method levels --out levels --steps 999
  tsad train-pruner pusht --data recorded --method gates --batch 4 --out gates --minutes 30
  tsad train-pruner pusht --data recorded --effects effects.npz --static --out fixed --steps 500
  tsad eval pusht --policy adaptive --planner pruner --sparsity 0.95          then see"""

SETTINGS: Options = (
    *BUDGET_OPTIONS,
    ("hidden", positive_int, "width of the pruner (default: 256, or what 0.2 %% of the policy is)"),
    (
        "sparsity",
        number,
        "of its own choice, on average (default: 0.95, of few steps less)",
    ),
    (
        "chunks",
        positive_int,
        "recorded chunks that are measured, in windows of 8, beside those held out (default: 512)",
    ),
    ("projections", positive_int, "random directions per chunk (default: 2)"),
    ("power", number, "of the gains that are foreseen: 1 is their mean (default: 0.5)"),
    ("batch", positive_int, "chunks per step (default: 32)"),
    ("lr", number, "learning rate (default: 1e-3, of gates 1e-4)"),
    ("weight-decay", number, "of the weights that see the observation (default: 0.1)"),
    ("warmup", natural, "steps in which the rate rises (default: 50)"),
    ("decay", number, "share of the training in which the rate falls to 0 (default: 0.5)"),
    ("ema", number, "largest decay of the averaged weights; 0: no average (default: 0.99)"),
    ("val-episodes", natural, "held out: the last ones (default: a fifth)"),
    ("seed", natural, "of weights, order and what is picked (default: 0)"),
)
NAMES = (*(name for name, _, _ in SETTINGS), "method", "keep-last", "static")


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "train-pruner",
        help="a pruner from recorded observations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("source", metavar="POLICY", help="bundled name, tsad folder or checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help=OBSERVATIONS_HELP)
    parser.add_argument(
        "--effects", metavar="FILE", help="of 'tsad plan measure' (default: measures 64 chunks)"
    )
    parser.add_argument(
        "--plans", nargs="+", default=[], metavar="FILE", help="searched plans, to begin with"
    )
    group = add_settings(parser, SETTINGS, report_every=100)
    group.add_argument(
        "--method",
        metavar="NAME",
        help="effects, levels or gates: what is learned from (default: effects)",
    )
    group.add_argument(
        "--keep-last",
        action="store_true",
        help="keep the last weights, not those that did best on held-out episodes",
    )
    group.add_argument("--static", action="store_true", help="the observation is not looked at")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    trainer = begin(args, "tsad train-pruner", _fresh, _resumed, _plan)
    config = fit(trainer, args, _command(args))
    summary = {
        "out": str(trainer.out),
        "sha256": config.provenance["sha256"]["pruner.safetensors"],
        "steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 2),
        "kept_step": trainer.best_step,
        "val_error": trainer.best_error,
        "table_error": trainer.table_error,
        "share_of_dense_macs": config.provenance["pruner"]["training"]["share_of_dense_macs"],
    }
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"written to {trainer.out}: {trainer.step} steps, {trainer.seconds / 60:.1f} minutes")
        found = f"kept is step {trainer.best_step}, with an error of {trainer.best_error:.4f}"
        if not trainer.best_step:
            found = (
                "kept is the static table: on held-out episodes nothing that was learned did "
                f"better (record more chunks), with an error of {trainer.best_error:.4f}"
            )
        print(f"{found}, the static table's {trainer.table_error:.4f}")
    return 0


def _command(args: argparse.Namespace) -> list[str]:
    command = ["tsad", "train-pruner", args.source, "--data", args.data, "--out", args.out]
    command += ["--effects", args.effects] if args.effects else []
    command += ["--plans", *args.plans] if args.plans else []
    return [*command, "--resume"]


def _plan(trainer: PrunerTrainer, begun: str) -> str:
    return (
        f"{len(trainer.parts[0])} chunks, {len(trainer.probe[0])} to test on, "
        f"{trainer.hidden} hidden units, {trainer.device}; {budget_text(trainer.settings)}, {begun}"
    )


def _make(args: argparse.Namespace, settings: PrunerSettings) -> PrunerTrainer:
    import tsad
    from tsad.families import as_transformer
    from tsad.load import read_policy
    from tsad.plan import plan_sha256
    from tsad.planners.files import read_plan
    from tsad.sim.recording import names_of, pick
    from tsad.training.pruner import PrunerTrainer

    with argument("POLICY"), noted():
        policy = tsad.load(args.source, threads=args.threads, precision="float32")
    with argument("POLICY"):
        config, tensors, _ = read_policy(args.source)
        as_transformer(config.network, "policy")
    episodes = recorded(args, policy)
    effects = read_effects(args, policy) if args.effects else None
    few = 1 - 2 / policy.num_inference_steps
    if "sparsity" not in args and not args.resume and few > 0:
        settings = replace(settings, sparsity=min(settings.sparsity, few))
    asked = settings.val_episodes
    split = len(episodes) - (len(episodes) // 5 if asked is None else asked)
    if split < 1:
        raise UsageError(
            f"argument --val-episodes: got {asked}, expected 0 to {len(episodes) - 1}: --data has "
            f"{len(episodes)} episodes, and one is to learn from"
        )
    windows = pick(episodes[:split], settings.chunks, 8, settings.seed)
    held_out = pick(episodes[split:], max(settings.chunks // 4, 1), 8, settings.seed)
    seen = {"seeds": names_of([e for e, _ in windows]), "held_out": names_of(episodes[split:])}
    with argument("--plans"):
        plans = [read_plan(path) for path in args.plans]
    if plans:
        seen["plans"] = [plan_sha256(plan) for plan in plans]
    with named(NAMES, "POLICY", plans="--plans"):
        return PrunerTrainer(
            (config, tensors),
            policy,
            windows,
            held_out,
            args.out,
            settings,
            facts=policy_facts(policy, args.source) | seen,
            effects=effects,
            plans=plans,
            device=args.device,
        )


def _prepare(args: argparse.Namespace, trainer: PrunerTrainer) -> None:
    from tsad.training.running import InterruptedTrainingError

    with Progress(trainer.measured_chunks, "measure", unit="chunks") as progress:
        try:
            with named(NAMES, "--out", plans="--plans"):
                trainer.prepare(lambda done: progress.update(n=done))
        except InterruptedTrainingError:
            raise InterruptedRunError(
                f"measured {progress.done} of {progress.total} chunks; go on with: "
                f"{shlex.join(_command(args))}"
            ) from None


def _fresh(args: argparse.Namespace) -> PrunerTrainer:
    from tsad.training.pruner import PrunerSettings

    check_new(args.out)
    with named(NAMES, "--out"):
        settings = PrunerSettings(**given(args, NAMES))
    trainer = _make(args, settings)
    _prepare(args, trainer)
    return trainer


def _resumed(args: argparse.Namespace) -> PrunerTrainer:
    from dataclasses import replace

    from tsad.sim.results import differences
    from tsad.training.pruner import PrunerSettings

    state = load_resumed(args.out)
    if "facts" not in state:
        raise UsageError(
            f"argument --resume: {args.out} holds the training of a policy; tsad train-policy "
            "goes on with it"
        )
    with argument("--resume"):
        settings = PrunerSettings.from_dict(state["settings"])
    budget = resumed_settings(args.out, settings, given(args, NAMES))
    with named(NAMES, "--out"):
        settings = replace(settings, **budget)
    trainer = _make(args, settings)
    changed = differences(state["facts"], trainer.facts)
    if changed:
        raise UsageError(
            f"argument --resume: the training in {args.out} is of another policy or other data; "
            f"{'; '.join(changed)}; give the same, or begin anew in another folder"
        )
    _prepare(args, trainer)
    trainer.restore(state)
    return trainer
