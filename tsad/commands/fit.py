"""`tsad fit`: a setting's sampler, and the bias of its warm start, from recorded observations."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    OBSERVATIONS,
    OBSERVATIONS_HELP,
    Formatter,
    InterruptedRunError,
    UsageError,
    add_policy_options,
    add_preset,
    add_warm_start,
    argument,
    configure,
    load_policy,
    natural,
    positive_int,
    real,
    setting_of,
    sparsity,
)
from tsad.commands.plan import policy_facts, recorded
from tsad.commands.training import BUDGET_OPTIONS, fit, named, number
from tsad.config import FLOWS
from tsad.evaluation.progress import Progress
from tsad.files import make_folder, output_folder, write_atomically, write_json
from tsad.guard import QUANTILE
from tsad.planners.files import is_mask
from tsad.setting import WORDS, Setting, steady_sha256

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.config import PolicyConfig
    from tsad.fitted import Fitted
    from tsad.sim.recording import Recorded
    from tsad.training.fit import FitSettings
    from tsad.training.targets import SettingTraining, Windows

PLAN_FILE, SETTINGS_FILE, GUARD_FILE = "plan.npz", "settings.json", "guard.npz"
MANY = 100
MOST_HELD_OUT = 256  # chunks: they run at every report
REPORT_EVERY, WEIGHTS_REPORT_EVERY = 25, 100  # a step of weights takes longer
minutes = BUDGET_OPTIONS[0][1]

DESCRIPTION = f"""\
Lower what a setting of few steps, a plan or a warm start loses, on recorded observations, without a
simulator. What is found is a few hundred numbers in DIR/fitted.json, and costs nothing to run.

First the coefficients of the sampler's rows are fitted, and a shift of its result, by gradient
through the chunk along its plan, so that it ends where --against dense steps of DDIM end from the
same sample (of a sampler that draws noise: all of its own steps). Then a warm start's bias is taken
back: for each action of the horizon a gain of its move from the start, and a shift, such that the
mean over draws is that of whole chunks of many steps for the same observation.

It is no lead: it changes what is predicted, and the next chunk goes on from that. Errors before and
after are of held-out episodes; what they are worth is a matter of tsad eval: DIR/settings.json has
the setting as it is and fitted, for --settings. It takes minutes on one core; after Ctrl-C the same
command goes on.

{OBSERVATIONS}

Where actions are recorded, too, a warm start begins where they led: best record the setting itself,
with tsad.Recorder, or any with as many actions executed.

--weights fits the policy's own weights instead, so that the setting ends where many steps do:
another policy, in DIR, for this setting alone, of the same size and speed. It takes half an hour or
so of a core, and more of what is recorded than the rest: a hundred episodes, say. A preset's lead,
smoothing and fitted numbers are no part of it: DIR/settings.json is without, and may be given them.

--guard makes a bound instead, for tsad.Guard and tsad eval --guard: how far an observation may be
from what the one before and the actions in between lead to expect. --audit adds how far what a
chunk computes may be from the values that this replaces, of the setting as it runs."""

EPILOG = """\
examples:
  tsad collect pusht --out recorded --episodes 16 --sampler ddim --steps 16
  tsad fit pusht --data recorded --sampler dpmsolver++ --steps 8 --plan 10000010 --out fitted
  tsad fit pusht --data recorded --sampler ddim --steps 16 --spacing trailing --warm-start 8 \\
      --plan 10000000 --out warm
  tsad fit pusht --data recorded --preset fast --updates 500 --out fast
  tsad fit pusht --data recorded --sampler ddim --steps 8 --warm-start 4 --updates 0 --out bias
  tsad fit pusht --data recorded --sampler ddim --steps 16 --spacing trailing --warm-start 8 \\
      --plan 10000000 --weights --against 16 --minutes 60 --out jump
  tsad eval pusht --policy jump --settings jump/settings.json --out played --seeds 200
  tsad fit pusht --data recorded --out guard --guard
  tsad fit pusht --data recorded --out guard --guard --audit --preset one_pass
  tsad eval pusht --settings warm/settings.json --out played --seeds 200         then see"""

OPTIONS: tuple[tuple[str, Any, str], ...] = (
    ("updates", natural, "steps of the gradient; 0: the sampler stays (default: 300; 1000)"),
    ("minutes", minutes, "stop the gradient after so many; of weights, alone, that long"),
    ("chunks", positive_int, "how many of the recorded chunks to fit on (default: 256; 4096)"),
    ("draws", positive_int, "of noise for each, to average, or to learn (default: 8; 2)"),
    ("batch", positive_int, "chunks per step (default: 32; 64)"),
    ("lr", number, "learning rate, of coefficients relative to them (default: 1e-2; 1e-4)"),
    ("val-episodes", natural, "held out: the last ones (default: a fifth)"),
    ("seed", natural, "of what is random (default: 0)"),
)
NAMES = (*(name for name, _, _ in OPTIONS), "terms")
FREE = ("steps", "minutes")  # may be others when it is gone on with


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "fit",
        help="lower what a setting loses, from recorded observations",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("source", metavar="POLICY", help="bundled name, tsad folder or checkpoint")
    parser.add_argument("--data", required=True, metavar="DATA", help=OBSERVATIONS_HELP)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    choice = parser.add_argument_group("the setting (default: dense, as the policy is)")
    add_preset(choice)
    choice.add_argument("--plan", metavar="FILE", help="npz, or a step mask such as 10000010")
    choice.add_argument("--planner", metavar="NAME", help="who decides: uniform")
    choice.add_argument("--sparsity", type=sparsity, metavar="S", help="share not computed")
    add_warm_start(choice)
    add_policy_options(parser)
    group = parser.add_argument_group(
        "the fit (defaults: of coefficients; of weights)", argument_default=argparse.SUPPRESS
    )
    group.add_argument(
        "--weights",
        action="store_true",
        default=False,
        help="fit the policy's weights instead; DIR is then a policy, for this setting",
    )
    group.add_argument(
        "--against",
        type=positive_int,
        metavar="K",
        help=f"dense steps of DDIM that are right (default: {MANY}, or all there are)",
    )
    group.add_argument(
        "--terms",
        metavar="NAME",
        help="of a warm start's bias: affine, gain or none (default: affine)",
    )
    for name, kind, text in OPTIONS:
        whole = kind in (positive_int, natural)
        group.add_argument(f"--{name}", type=kind, metavar="N" if whole else "X", help=text)
    guard = parser.add_argument_group("instead: a guard, see tsad.Guard")
    guard.add_argument(
        "--guard",
        dest="only_guard",
        action="store_true",
        help="only make DIR/guard.npz: what an observation may be, after the one before",
    )
    guard.add_argument(
        "--audit",
        action="store_true",
        help="and bound what computed cells differ by from the values that they replace, of the "
        "setting above as it runs along the recorded observations",
    )
    guard.add_argument(
        "--quantile",
        type=real(lambda share: 0 < share < 1, "a number between 0 and 1, e.g. 0.99"),
        default=QUANTILE,
        metavar="Q",
        help=f"of recorded chunks that are let pass (default: {QUANTILE})",
    )
    parser.set_defaults(run=run, report_every=REPORT_EVERY)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tsad._extras import require

    with argument("--out"):
        out = output_folder(args.out)
    if args.only_guard and args.weights:
        raise UsageError("argument --weights: got it beside --guard, expected one of the two")
    if args.audit and not args.only_guard:
        raise UsageError("argument --audit: expected --guard beside it, whose bound it is")
    if args.only_guard:
        return _guard(args, out)
    torch = require("torch", extra="train", purpose="tsad fit")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.weights:
        args.report_every = WEIGHTS_REPORT_EVERY
    setting = setting_of(vars(args), args.source)
    trainer, fitted = fit_setting(args, setting, _settings(args), out)
    bare = replace(setting, lead=None, smoothing=None, fitted=None)
    rows = _rows(bare, out, trainer, weights=args.weights)
    write_json(out / SETTINGS_FILE, rows)
    measured = fitted.provenance["fitted"] if args.weights else fitted.measured
    if args.json:
        print(json.dumps({"out": str(out), **measured}))
        return 0
    before, after = measured["mean_rms"]
    probe = "held-out chunks" if measured["held_out"] else "the chunks that were fitted on"
    print(f"{out}: error of {probe} {before:.4f} before, {after:.4f} after")
    if args.weights and not measured["step"]:
        print(
            "nothing was learned: no report was better, and the weights are those of POLICY; "
            "give more --updates, or another --lr, in another folder"
        )
    if "move_before" in measured:
        print(
            f"of the move that many steps make on average it makes {measured['move_before']:.3f}, "
            f"with gain and shift {measured['move_after']:.3f}; their means are apart by "
            f"{measured['mean_off_before']:.4f} and {measured['mean_off_after']:.4f}"
        )
    policy, what = (f" --policy {out}", "it") if args.weights else ("", "both")
    print(f"play {what}: tsad eval SIMULATOR{policy} --settings {out / SETTINGS_FILE} --out DIR")
    return 0


def fit_setting(
    args: argparse.Namespace, setting: Setting, settings: FitSettings, out: Path
) -> tuple[SettingTraining, Any]:
    """Fit one setting of ``args.source`` on ``args.data`` into a folder, or go on with it there."""
    bare = replace(setting, lead=None, smoothing=None, fitted=None)
    trainer = _trainer(args, bare, settings, out)
    _prepare(trainer)
    if trainer.state_there:
        trainer.resume()
    fitted: Fitted | PolicyConfig = fit(trainer, args, ["the", "same", "command"])
    return trainer, fitted


def _trainer(
    args: argparse.Namespace, setting: Setting, settings: FitSettings, out: Path
) -> SettingTraining:
    from tsad.load import read_policy, weights_sha256
    from tsad.training.fit import FitTrainer
    from tsad.training.weights import WeightSettings, WeightTrainer

    policy = load_policy(args.source, args, name="POLICY", lanes=1, setting=setting)
    configure(policy, setting)
    many = _many(args, policy)
    with argument("POLICY"):
        config, tensors, _ = read_policy(args.source)
    config = replace(config, network=replace(config.network, n_action_steps=policy.n_action_steps))
    episodes = recorded(args, policy)
    asked = settings.val_episodes
    split = len(episodes) - (len(episodes) // 5 if asked is None else asked)
    if split < 1:
        raise UsageError(
            f"argument --val-episodes: got {asked}, expected 0 to {len(episodes) - 1}: --data has "
            f"{len(episodes)} episodes, and one is to fit on"
        )
    probe = min(max(settings.chunks // 4, 8), MOST_HELD_OUT)
    parts = (episodes[:split], settings.chunks), (episodes[split:], probe)
    windows, held_out = (_windows(args, policy, *part, settings.seed) for part in parts)
    facts = policy_facts(policy, args.source) | {
        "model_sha256": weights_sha256(args.source),
        "timestep_spacing": policy.config["scheduler"]["timestep_spacing"],
        "warm_start": policy.warm_start,
        "precision": policy.precision,
        "plan_sha256": steady_sha256(policy),
        "against": many.model.n_steps,
        "data": [episode.name for episode in episodes],
    }
    if isinstance(settings, WeightSettings) and _same_steps(policy, many):
        raise UsageError(
            f"argument --weights: got a setting that computes all of its {many.model.n_steps} "
            "steps, which are what it would learn from, expected less: --steps, --plan"
        )
    kind: type[SettingTraining] = FitTrainer
    if isinstance(settings, WeightSettings):
        kind, facts["fitted"] = WeightTrainer, "weights"
    with named(NAMES, "POLICY", steps="--updates", plan="--plan", data="--data"):
        return kind((config, tensors), policy, many, windows, held_out, out, settings, facts=facts)


def _guard(args: argparse.Namespace, out: Path) -> int:
    """Write the bound of what observations may be."""
    from tsad.guard import known, measure

    setting = setting_of(vars(args), args.source)
    policy = load_policy(args.source, args, name="POLICY", lanes=1, setting=setting)
    configure(policy, setting)
    rows = []
    for episode in recorded(args, policy):
        ((_, _, executed),) = _windows(args, policy, [episode], 1, 0, whole=True)
        rows.append((episode.obs, executed))
    facts = {"files_sha256": policy_facts(policy, args.source)["files_sha256"]}
    with named(("quantile", "audit", "plan"), "--data", data="--data", guard="--audit"):
        bound = measure(policy, rows, quantile=args.quantile, metadata=facts, audit=args.audit)
    make_folder(out)
    write_atomically(out / GUARD_FILE, bound.to_bytes())
    found = {**bound.metadata, "bound": float(bound.bound), "out": str(out / GUARD_FILE)}
    if bound.audit is not None:
        found["audit_bounds"] = dict(zip(("steps", "chunks"), known(bound.audit), strict=True))
    if args.json:
        print(json.dumps(found))
        return 0
    unsaid = "" if found["knows_actions"] else "; what was executed is not known of them"
    print(
        f"{out / GUARD_FILE}: of {found['pairs']} pairs of successive chunks, {args.quantile:.4g} "
        f"lie below {found['bound']:.3g}{unsaid}"
    )
    for name, (low, high) in found.get("audit_bounds", {}).items():
        if low is not None:
            print(f"computed values differ from those of earlier {name} by {low:.3g} to {high:.3g}")
    return 0


def _settings(args: argparse.Namespace) -> FitSettings:
    from tsad.training.fit import FitSettings
    from tsad.training.weights import WeightSettings

    keys = {name: name.replace("-", "_") for name in NAMES}
    found = {key: getattr(args, key) for key in keys.values() if hasattr(args, key)}
    if "updates" in found:
        found["steps"] = found.pop("updates")
    elif args.weights and "minutes" in found:
        found["steps"] = None  # by the clock alone
    with named(NAMES, "POLICY", steps="--updates"):
        return (WeightSettings if args.weights else FitSettings)(**found)


def _many(args: argparse.Namespace, policy: SparsePolicy) -> SparsePolicy:
    """What counts as right."""
    scheduler = policy.config["scheduler"]
    kind, asked = scheduler["type"], getattr(args, "against", None)
    steps = asked or min(MANY, scheduler.get("num_train_timesteps", MANY))
    if policy.adds_noise or kind == "ddpm":
        if asked is not None:
            raise UsageError(
                "argument --against: ddpm draws noise at every step, so other steps make other "
                "actions; leave it out, or --sampler ddim"
            )
        steps = scheduler["num_inference_steps"]
    elif kind not in FLOWS:
        kind = "ddim"
    if steps < scheduler["num_inference_steps"]:
        raise UsageError(
            f"argument --against: got {steps}, expected at least the setting's own "
            f"{scheduler['num_inference_steps']} steps, of which less is computed"
        )
    setting = Setting(
        sampler=kind,
        num_inference_steps=steps,
        timestep_spacing=None if kind in FLOWS else scheduler["timestep_spacing"],
    )
    return load_policy(args.source, args, name="--against", lanes=8, setting=setting)


def _same_steps(policy: SparsePolicy, many: SparsePolicy) -> bool:
    """Whether a setting is dense, in the steps of another."""
    words = ("type", "num_inference_steps", "timestep_spacing")
    alike = all(policy.config["scheduler"][w] == many.config["scheduler"][w] for w in words)
    return alike and policy.sparsity == 0


def _windows(
    args: argparse.Namespace,
    policy: SparsePolicy,
    episodes: list[Recorded],
    chunks: int,
    seed: int,
    *,
    whole: bool = False,
) -> Windows:
    from tsad.sim import recording
    from tsad.training.targets import WINDOW

    folder, found = Path(args.data), []
    length = max(len(episode.obs) for episode in episodes) if whole else WINDOW
    for episode, part in recording.pick(episodes, chunks, length, seed):
        executed = None
        if recording.has_actions(folder, episode.number):
            executed = recording.read_episode(folder, episode.number, "actions")[part]
            shape = (len(episode.obs[part]), policy.n_action_steps, policy.action_dim)
            executed = executed if executed.shape == shape else None
        found.append((episode, part, executed))
    return found


def _prepare(trainer: SettingTraining) -> None:
    from tsad.training.running import InterruptedTrainingError

    with Progress(trainer.measured_chunks, "many steps", unit="chunks") as progress:
        try:
            with named(NAMES, "--out", data="--data"):
                trainer.check()
                trainer.prepare(lambda done: progress.update(n=done))
        except InterruptedTrainingError:
            raise InterruptedRunError(
                f"ran {progress.done} of {progress.total} chunks; the same command goes on"
            ) from None


def _rows(
    setting: Setting, out: Path, trainer: SettingTraining, *, weights: bool
) -> list[dict[str, Any]]:
    """The setting as it is, and fitted, for --settings; by fitted weights as it is."""
    values = setting.alone(trainer.policy).to_dict()
    row = {WORDS.get(name, name): value for name, value in values.items()}
    if setting.plan is not None:
        row["plan"] = PLAN_FILE
        write_atomically(out / PLAN_FILE, trainer.policy._plans[0].write)
        if not isinstance(setting.plan, Path) and is_mask(str(setting.plan)):
            row["plan"] = str(setting.plan)
    if weights:
        return [{"name": "fitted-weights", **row}]
    return [{"name": "plain", **row}, {"name": "fitted", **row, "fitted": "fitted.json"}]
