"""`tsad plan`: measure what reuse does, make plans, search for better ones, import others'."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    OBSERVATIONS,
    OBSERVATIONS_HELP,
    OPTIONS,
    Formatter,
    InterruptedRunError,
    UsageError,
    add_overwrite,
    add_policy_options,
    argument,
    files_sha256,
    load_plan,
    load_policy,
    natural,
    positive_int,
    real,
    sparsity,
)
from tsad.config import FLOWS
from tsad.evaluation.progress import Progress
from tsad.files import output_file, write_result

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tsad import Plan, SparsePolicy
    from tsad.planners import Effects
    from tsad.planners.search import Found
    from tsad.sim.recording import Recorded

METHODS = ("effects", "bac", "teacache", "fbcache", "deepcache", "uniform", "random")
UNMEASURED = ("deepcache", "uniform", "random")

DESCRIPTION = """\
Static plans: which blocks to compute at which denoising step, the same for every observation.

measure   what every reuse does to the executed actions, from recorded chunks (needs PyTorch)
make      a plan of a given sparsity by a method: effects (the least effect on actions; the one to
          use), and for comparison bac, teacache, fbcache, deepcache (of UNets), uniform, random
search    a better plan than that, by trying changes on recorded chunks with the engine
import    a schedule of another program: EVO's pairs, a step mask, an npy array"""

EPILOG = """\
examples:
  tsad collect pusht --out recorded --episodes 16
  tsad plan measure pusht --data recorded --out effects.npz
  tsad plan make effects pusht --effects effects.npz --sparsity 0.95 --out plan.npz
  tsad plan search pusht --data recorded --start plan.npz --minutes 5 --out better.npz
  tsad plan import pairs.json pusht --out evo.npz
  tsad eval pusht --plan better.npz"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "plan",
        help="measure, make, search and import static plans",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")

    measure = _action(actions, "measure", "effects of every reuse, from recorded chunks", _measure)
    _add_data(measure, 64)
    measure.add_argument(
        "--projections",
        type=positive_int,
        default=2,
        metavar="P",
        help="random directions per chunk (default: 2)",
    )

    make = _action(actions, "make", "a plan of a given sparsity", _make, method=True)
    make.add_argument("--effects", metavar="FILE", help="of 'tsad plan measure'")
    make.add_argument("--sparsity", type=sparsity, required=True, metavar="S", help="of the cost")
    make.add_argument(
        "--late",
        action="store_true",
        help="effects: blocks may be computed later than at step 0; for few steps",
    )

    search = _action(actions, "search", "a better plan, by trial on recorded chunks", _search)
    _add_data(search, 48)
    search.add_argument(
        "--start",
        required=True,
        nargs="+",
        metavar="FILE",
        help="plans; it begins with the one of least error that is sparse enough",
    )
    search.add_argument(
        "--sparsity", type=sparsity, metavar="S", help="at least (default: the least of --start)"
    )
    search.add_argument(
        "--minutes",
        type=real(lambda minutes: 0 <= minutes < 1e6, "minutes, 0 or more"),
        default=5.0,
        metavar="X",
        help="how long (default: 5)",
    )
    search.add_argument(
        "--against",
        type=positive_int,
        metavar="K",
        help="count as right what K dense steps of DDIM make, not its own: for few steps of ddim "
        "or dpmsolver++, which solve the same equation",
    )
    search.add_argument(
        "--draws",
        type=positive_int,
        metavar="M",
        help="lower the distance of M draws of each chunk's actions to as many of the policy's own "
        "sampler, dense (or of --against K), not the error at the same noise",
    )
    search.add_argument(
        "--lanes",
        type=positive_int,
        default=12,
        metavar="L",
        help="chunks run at once (default: 12)",
    )

    other = _action(actions, "import", "a schedule of another program", _import, file=True)
    other.add_argument(
        "--opcodes",
        action=argparse.BooleanOptionalAction,
        help="an npy file holds sources 0 to 4, or a mask (default: looks at the numbers)",
    )


def _action(
    actions: Any, name: str, text: str, run: Any, *, method: bool = False, file: bool = False
) -> Any:
    shown = [line for line in EPILOG.splitlines() if f"plan {name}" in line]
    parser = actions.add_parser(
        name,
        help=text,
        description=text,
        epilog="\n".join(["examples:", *shown]),
        formatter_class=Formatter,
    )
    if method:
        parser.add_argument(
            "method", metavar="METHOD", choices=METHODS, help=f"one of {', '.join(METHODS)}"
        )
    if file:
        parser.add_argument("file", metavar="FILE", help="json, text, npy or npz")
    parser.add_argument("source", metavar="POLICY", help="bundled name, tsad folder or checkpoint")
    parser.add_argument("--out", required=True, metavar="FILE", help="npz file to write")
    add_overwrite(parser)
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of what is random")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    add_policy_options(parser)
    parser.set_defaults(run=run)
    return parser


def _add_data(parser: Any, chunks: int) -> None:
    parser.description += f"\n\n{OBSERVATIONS}"
    parser.add_argument("--data", required=True, metavar="DATA", help=OBSERVATIONS_HELP)
    parser.add_argument(
        "--chunks",
        type=positive_int,
        default=chunks,
        metavar="N",
        help=f"how many of its chunks (default: {chunks})",
    )


# ---- what the actions share


def _check_out(args: argparse.Namespace) -> None:
    with argument("--out"):
        output_file(args.out, overwrite=args.overwrite)


def policy_facts(policy: SparsePolicy, source: str) -> dict[str, Any]:
    """What effects and plans must share with a policy."""
    return {
        "files_sha256": files_sha256(source),
        "sampler": policy.config["scheduler"]["type"],
        "num_inference_steps": policy.num_inference_steps,
    }


def check_facts(name: str, path: str, found: Any, wanted: dict[str, Any]) -> None:
    """UsageError if a file is of another policy or sampler."""
    from tsad.sim.results import differences

    changed = differences({key: found.get(key) for key in wanted}, wanted)
    if changed:
        raise UsageError(
            f"argument {name}: {path} is of another policy or sampler; {'; '.join(changed)}; "
            "make it anew for this one"
        )


def recorded(args: argparse.Namespace, policy: SparsePolicy) -> list[Recorded]:
    """The episodes of --data."""
    from tsad.sim.observations import read_observations

    with argument("--data"):
        settings, episodes = read_observations(args.data, policy)
    if settings:  # of arrays nobody knows who saw them
        check_facts("--data", args.data, settings, {"files_sha256": files_sha256(args.source)})
    return episodes


def read_effects(args: argparse.Namespace, policy: SparsePolicy) -> Effects:
    """What --effects names."""
    from tsad.planners import Effects

    with argument("--effects"):
        effects = Effects.load(args.effects)
    check_facts("--effects", args.effects, effects.metadata, policy_facts(policy, args.source))
    return effects


def _save_plan(args: argparse.Namespace, plan: Plan, extra: dict[str, Any]) -> int:
    write_result(args.out, plan.write, overwrite=args.overwrite)
    summary = {
        "out": args.out,
        "sparsity": plan.sparsity,
        "cell_sparsity": plan.cell_sparsity,
        "passes": plan.cost * len(plan.sources),
        **extra,
    }
    if args.json:
        print(json.dumps(summary))
        return 0
    notes = "".join(f", {name} {value:.4g}" for name, value in extra.items())
    print(
        f"{args.out}: sparsity {plan.sparsity:.2%} of the cost, {plan.cell_sparsity:.2%} of the "
        f"cells, {summary['passes']:.2f} dense passes a chunk{notes}"
    )
    return 0


# ---- actions


def _measure(args: argparse.Namespace) -> int:
    from tsad._extras import require

    _check_out(args)
    require("torch", extra="train", purpose="tsad plan measure")
    import torch

    from tsad.load import read_policy
    from tsad.samplers import make_sampler
    from tsad.sim.recording import denoising_inputs, names_of, pick
    from tsad.training import sensitivity

    policy = load_policy(args.source, args, name="POLICY", lanes=1)
    episodes = recorded(args, policy)
    if args.threads:
        torch.set_num_threads(args.threads)
    length = 8
    chosen = pick(episodes, args.chunks, length, args.seed)
    windows = (
        sensitivity.Window(obs, denoising_inputs(policy, obs, noise))
        for obs, noise in ((e.obs[part], e.noise(policy, part)) for e, part in chosen)
    )
    config, tensors, _ = read_policy(args.source)
    twin = sensitivity.Twin(config, tensors, make_sampler(policy.config["scheduler"]))
    total = sum(len(episode.obs[part]) for episode, part in chosen)
    facts = {**policy_facts(policy, args.source), "seeds": names_of([e for e, _ in chosen])}
    with Progress(total, "effects", unit="chunks") as progress:
        effects = sensitivity.measure(
            twin,
            windows,
            projections=args.projections,
            seed=args.seed,
            metadata=facts,
            progress=lambda done: progress.update(n=done),
        )
    write_result(args.out, effects.write, overwrite=args.overwrite)
    summary = {
        "out": args.out,
        "chunks": total,
        "episodes": len(facts["seeds"]),
        "knows_rollouts": effects.knows_rollouts,
    }
    alone = (
        "; no chunk has one before it, so what reusing an earlier chunk does is not known: for "
        "that, give successive ones (episode_ends)"
    )
    alone = "" if effects.knows_rollouts else alone
    print(json.dumps(summary) if args.json else f"{args.out}: {total} chunks{alone}")
    return 0


def _make(args: argparse.Namespace) -> int:
    import numpy as np

    from tsad import planners

    _check_out(args)
    policy = load_policy(args.source, args, name="POLICY", lanes=1)
    extra: dict[str, float] = {}
    planner: Any
    if args.method == "uniform":
        planner = planners.uniform_sparse
    elif args.method == "deepcache":
        planner = planners.deepcache_sparse
    elif args.method == "random":
        shape = (policy.num_inference_steps, len(policy.blocks))
        scores = np.random.default_rng(args.seed).random(shape)
        planner = planners.Scores(scores, name=f"random cells, seed {args.seed}")
    else:
        if args.effects is None:
            raise UsageError(
                f"argument --effects: the method {args.method!r} needs a file of 'tsad plan "
                "measure'"
            )
        effects = read_effects(args, policy)
        planner = _calibrated(args.method, effects, args.late)
    with argument("--sparsity", {**OPTIONS, "policy": f"METHOD: {args.method}"}):
        plan = planner(policy, args.sparsity)
    if args.method not in UNMEASURED:
        extra["foreseen_rms"] = effects.predict(plan) ** 0.5
    return _save_plan(args, plan, extra)


def _calibrated(method: str, effects: Effects, late: bool) -> Any:
    from tsad import planners

    if method == "effects":
        return planners.EffectPlanner(effects, late=late)
    if method == "bac":
        return planners.Bac(effects.alike, errors=effects.changes)
    if method == "fbcache":
        return planners.Threshold(planners.fbcache, _floats(effects.first_layer))
    degree = min(4, len(effects.inputs) - 2)  # few steps, few points
    polynomial, _ = planners.fit_teacache(effects.inputs[1:], effects.outputs[1:], degree)
    distances = _floats(effects.inputs)
    distances[1:] = polynomial(distances[1:]).clip(min=0)
    return planners.Threshold(planners.teacache, distances)


def _floats(array: NDArray[Any]) -> NDArray[np.float64]:
    import numpy as np

    return array.astype(np.float64)


def _search(args: argparse.Namespace) -> int:
    from tsad.planners.search import Search
    from tsad.sim.recording import names_of, pick

    _check_out(args)
    starts = [load_plan(path, "--start") for path in args.start]
    probe = load_policy(args.source, args, name="POLICY", lanes=1)
    asked = min(plan.sparsity for plan in starts) if args.sparsity is None else args.sparsity
    with argument("--start"):
        for plan in starts:
            probe.plan = plan
        starts = [plan for plan in starts if plan.sparsity >= asked - 1e-9] or starts[:1]
    if args.against is not None and args.draws is None and _noisy(probe):
        raise UsageError(
            "argument --against: ddpm draws noise at every step, so other steps make other "
            "actions; use --sampler ddim or dpmsolver++, or --draws"
        )
    if args.draws is not None and args.draws < 2:
        raise UsageError("argument --draws: got 1, expected 2 or more: scatter is compared")
    episodes = recorded(args, probe)
    chosen = pick(episodes, args.chunks, 1, args.seed)
    error, shown = _objective(args, chosen)
    with argument("--start"):
        start = starts[0] if len(starts) == 1 else min(starts, key=error)
        note = {**policy_facts(probe, args.source), "seeds": names_of([e for e, _ in chosen])}
        note |= {} if args.against is None else {"against": args.against}
        note |= {} if args.draws is None else {"draws": args.draws}
        search = Search(error.policy, start, error, sparsity=asked, seed=args.seed, note=note)
    seconds = args.minutes * 60
    state: list[Found] = []
    with Progress(max(round(seconds), 1), "search", unit="s") as progress:

        def on_try(found: Found) -> None:
            state[:] = [found]
            passed = min(int(found.seconds), progress.total) - progress.done
            if passed > 0:
                now = shown(found.error)
                progress.update(f"error {now:.4f}, {found.taken} of {found.tried} taken", passed)

        try:
            found = search.run(seconds, on_try=on_try)
        except KeyboardInterrupt:
            if not state:
                raise InterruptedRunError("nothing was tried yet") from None
            write_result(args.out, state[0].plan.write, overwrite=args.overwrite)
            raise InterruptedRunError(
                f"the best so far is in {args.out}; --start {args.out} --overwrite goes on from it"
            ) from None
    # against other steps it is the mean of the chunks' root mean squares, not that of all
    name = "distance" if args.draws else "rms" if args.against is None else "mean_rms"
    extra = {f"{name}_begun": shown(found.begun), name: shown(found.error)}
    return _save_plan(args, found.plan, {**extra, "tried": found.tried, "taken": found.taken})


def _noisy(policy: SparsePolicy) -> bool:
    return bool(policy.config["scheduler"]["type"] == "ddpm")


def _objective(
    args: argparse.Namespace, chosen: list[tuple[Recorded, slice]]
) -> tuple[Any, Callable[[float], float]]:
    """What the search lowers, and how a value of it is shown."""
    import numpy as np

    from tsad.planners.search import ChunkError
    from tsad.sim.offline import Distance

    lanes = min(args.lanes, len(chosen) * (args.draws or 1))
    policy = load_policy(args.source, args, name="POLICY", lanes=lanes)
    reference: Any = None
    if args.draws is not None or args.against is not None:
        own = {"sampler": None, "steps": None, "spacing": None}
        flow = policy.config["scheduler"]["type"] in FLOWS  # which has no other sampler
        more_steps = {"sampler": None if flow else "ddim", "steps": args.against}
        other = own if args.against is None else more_steps
        more = argparse.Namespace(**{**vars(args), **other, "precision": "float32"})
        with argument("--against"):
            reference = load_policy(args.source, more, name="--against", lanes=lanes)
    if args.draws is None:
        power = 1.0 if args.against is None else 0.5
        windows = [(episode.obs[part], episode.noise(policy, part)) for episode, part in chosen]
        whole = windows[: len(windows) // lanes * lanes]
        error = ChunkError(policy, whole, reference=reference, power=power)
        return error, lambda value: value ** (0.5 / power)
    group = min(8, len(chosen))
    obs = np.concatenate([episode.obs[part] for episode, part in chosen])
    obs = obs[: len(obs) // group * group]
    with argument("--draws"), Progress(len(obs) * args.draws, "reference", unit="chunks") as bar:
        reference.sparsity = 0.0
        distance = Distance(
            policy,
            reference,
            obs,
            draws=args.draws,
            group=group,
            progress=lambda n: bar.update(n=n),
        )
    return distance, lambda value: value


def _import(args: argparse.Namespace) -> int:
    from tsad import planners

    _check_out(args)
    policy = load_policy(args.source, args, name="POLICY", lanes=1)
    with argument("FILE"):
        if not Path(args.file).is_file():
            raise FileNotFoundError(f"got {args.file!r}, which is not a file")
        plan = planners.import_plan(policy, args.file, opcodes=args.opcodes)
        policy.plan = plan
    return _save_plan(args, plan, {})
