"""`tsad demo`: a trained policy pushes the T, as it was trained and faster, on the same seeds."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    Formatter,
    UsageError,
    add_overwrite,
    add_policy_options,
    add_preset,
    argument,
    check_result,
    configure,
    load_policy,
    natural,
    planner_name,
    positive_int,
    sampler_name,
    seed_range,
    sparsity,
    table,
)
from tsad.evaluation.progress import Progress
from tsad.evaluation.timing import cpu_name, percentiles
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import Plan, SparsePolicy
    from tsad.presets import Preset
    from tsad.sim import Chunk, Environment, Episode
    from tsad.sim.film import Reel

SIMULATOR = "pusht"
PRESETS = ("lossless", "fast")  # the default is the first of these that the policy has
SPARSITY = 0.75
SECONDS = 60
FIRST_SEED = 100_001  # of Diffusion Policy's test seeds, from 100000; on this one the film succeeds
FORMAT = "tsad-demo"
FILES = ("results.json", "demo.gif", "plan.png", "plan.npz")  # the first says whose they are

DESCRIPTION = f"""\
Play a policy in the simulator as it was trained and faster, on the same seeds, and show what that
saves and costs on this machine: a table, a picture of what is computed, and a film of both.

Faster is the policy's preset "lossless", or the one you name; or with --sparsity the dial: a plan
that leaves out that share of the cost, with the sampler and steps that you ask for. For {SECONDS} s
whoever has played for less time plays the next seed, so the faster one plays more; with --seeds
both play as many. Scores of so few episodes are an impression; tsad eval measures them."""

EPILOG = """\
examples:
  tsad demo
  tsad demo --preset fast
  tsad demo --sparsity 0.9 --seeds 10 --out /tmp/demo
  tsad demo --sampler ddim --steps 16 --sparsity 0.5"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "demo",
        help="watch a policy push the T, as trained and faster",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--policy", default=SIMULATOR, metavar="SRC", help="a Push-T policy (default: bundled)"
    )
    add_preset(parser)
    parser.add_argument(
        "--sparsity",
        type=sparsity,
        metavar="S",
        help=f"the dial instead: share of the cost not computed (without a preset: {SPARSITY:g})",
    )
    parser.add_argument("--planner", metavar="NAME", help="who decides: uniform or pruner")
    parser.add_argument(
        "--seeds",
        type=positive_int,
        metavar="N",
        help=f"episodes of each (default: as many as fit into {SECONDS} s)",
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        metavar="S",
        help=f"of the film, and the first of the table (default: {FIRST_SEED}, where both of the "
        "bundled policy succeed)",
    )
    add_policy_options(parser)
    parser.add_argument(
        "--out", default="tsad-demo", metavar="DIR", help="where files go (default: tsad-demo)"
    )
    add_overwrite(parser, "what is in DIR and of no earlier demo")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


# ---- the two


@dataclass
class Arm:
    """One of the two ways to run the policy, and what it did."""

    name: str
    policy: SparsePolicy
    preset: Preset | None = None
    episodes: list[Episode] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0
    reel: Reel | None = None

    @property
    def plan(self) -> Plan:
        """What the last chunk did."""
        plan = self.policy.plan
        return plan[0] if isinstance(plan, list) else plan


def _preset(args: argparse.Namespace) -> Preset | None:
    """The preset that is asked for, or the best one there is where nothing else is."""
    from tsad.load import policy_folder
    from tsad.presets import find_preset, known_presets, model_sha256

    folder = policy_folder(args.policy)
    if args.preset is not None:
        for name in ("sparsity", "planner"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"argument --preset: {args.preset!r} decides what is computed; leave out one "
                    f"of --preset and --{name}"
                )
        with argument("--preset"):
            return find_preset(folder, args.preset, args.policy)
    own = {"sparsity", "planner", "sampler", "steps", "spacing"}
    if folder is None or any(getattr(args, name) is not None for name in own):
        return None
    if args.precision != "auto":
        return None
    presets, found = known_presets(folder)[0], model_sha256(folder)
    there = (presets[name] for name in PRESETS if name in presets)
    return next((preset for preset in there if preset.model_sha256 == found), None)


def _faster(args: argparse.Namespace, dense: SparsePolicy) -> Arm:
    """What is held against the dense policy."""

    preset = _preset(args)
    if preset is not None:
        policy = load_policy(args.policy, args, name="--preset", lanes=1, preset=preset.name)
        return Arm(preset.name, policy, preset)
    policy = load_policy(args.policy, args, name="--policy", lanes=1)
    share = args.sparsity
    if share is None and args.planner != "pruner":
        share = min(SPARSITY, dense.max_sparsity)
        if share == 0:
            raise UsageError(
                f"argument --steps: {dense.num_inference_steps} step leaves nothing to leave out; "
                "use 2 or more, or --preset"
            )
    configure(policy, Setting(planner=args.planner, sparsity=share))
    return Arm("pruner" if share is None else f"sparsity {share:g}", policy)


# ---- playing


def _play(arm: Arm, environment: Environment, seed: int) -> None:
    """One episode; of the arm's first a film is made."""
    from tsad import sim
    from tsad.sim import film
    from tsad.sim.pusht import STEP_SECONDS

    reel = None
    if arm.reel is None:
        actions = f"{arm.policy.n_action_steps} actions a chunk"
        remark = f"{sampler_name(arm.policy)}, {actions}"
        reel = arm.reel = film.Reel(arm.name, remark, STEP_SECONDS)

    def on_chunk(chunk: Chunk) -> None:
        arm.chunk_ms.append(chunk.milliseconds)
        if reel is not None:
            reel.wait(chunk.milliseconds / 1e3)

    def on_step(environment: Environment, steps: int, score: float) -> None:
        if reel is not None:
            reel.step(steps, environment.render(film.SIZE), f"score {score:.2f}")

    begin = time.monotonic()
    (episode,) = sim.rollouts(arm.policy, [environment], [seed], on_step=on_step, on_chunk=on_chunk)
    if reel is not None:
        end = "success" if episode.success else "out of time"
        reel.end(f"score {episode.score:.2f}, {end}")
    arm.seconds += time.monotonic() - begin
    arm.episodes.append(episode)


def _play_all(arms: list[Arm], environment: Environment, first: int, seeds: int | None) -> None:
    """The arms in turn, each seed from `first` on: `seeds` of them, or until the time is up.

    Whoever has played for less time plays next: so a machine that slows down slows both, and the
    faster one plays more.
    """
    begin = time.monotonic()
    total, unit = (SECONDS, "seconds") if seeds is None else (seeds * len(arms), "episodes")
    with Progress(total, "demo", unit=unit) as progress:
        while True:
            waiting = [arm for arm in arms if seeds is None or len(arm.episodes) < seeds]
            if not waiting:
                return
            arm, spent = min(waiting, key=lambda arm: arm.seconds), time.monotonic() - begin
            if seeds is None and arm.episodes:
                if spent + arm.seconds / len(arm.episodes) > SECONDS:
                    return
            _play(arm, environment, first + len(arm.episodes))
            done = int(min(time.monotonic() - begin, SECONDS)) - progress.done
            progress.update(f"{arm.name} {arm.episodes[-1].score:.2f}", 1 if seeds else done)


# ---- saying


def _row(arm: Arm) -> dict[str, Any]:
    """The numbers of one arm."""
    from tsad.sim.results import summarise

    times = percentiles(arm.chunk_ms)
    assert times["p50"] is not None
    actions = arm.policy.n_action_steps
    return {
        "preset": None if arm.preset is None else arm.preset.words(),
        "sampler": sampler_name(arm.policy),
        "planner": planner_name(arm.policy),
        "precision": arm.policy.precision,
        "sparsity": float(arm.plan.sparsity),
        "cell_sparsity": float(arm.plan.cell_sparsity),
        "n_action_steps": actions,
        "chunk_ms": times,
        "action_ms": times["p50"] / actions,
        **{key: value for key, value in summarise(arm.episodes).items() if key != "chunk_ms"},
        "per_seed": [asdict(episode) for episode in arm.episodes],
    }


def _document(args: argparse.Namespace, arms: list[Arm]) -> dict[str, Any]:
    import tsad
    from tsad.sim.results import compare

    dense, faster = arms
    rows = {arm.name: _row(arm) for arm in arms}
    return {
        "format": FORMAT,
        "tsad": tsad.__version__,
        "policy": args.policy,
        "backend": dense.policy.backend,
        "threads": dense.policy.threads,
        "cpu": cpu_name(),
        "speed_up": rows[dense.name]["action_ms"] / rows[faster.name]["action_ms"],
        "paired": compare(faster.episodes, dense.episodes),
        "arms": rows,
    }


def _table(document: dict[str, Any]) -> str:
    head = ["", "ms per chunk: p50", "p90", "p99", "actions", "ms per action", "score", "success"]
    lines = [head]
    for name, arm in document["arms"].items():
        n = arm["episodes"]
        times = [f"{ms:.2f}" if (ms := arm["chunk_ms"][p]) else "" for p in ("p50", "p90", "p99")]
        cells = [name, *times, str(arm["n_action_steps"]), f"{arm['action_ms']:.2f}"]
        success = f"{round(arm['success']['mean'] * n)} of {n}"
        lines.append([*cells, f"{arm['score']['mean']:.3f}", success])
    return table(lines)


def _remarks(document: dict[str, Any], faster: Arm) -> str:
    """What the numbers mean, and what they do not."""
    paired, n = document["paired"], len(faster.episodes)
    pairs, difference = paired["pairs"], paired["score"]
    interval = difference["interval95"]
    lines = [
        f"For an action the robot waits {document['speed_up']:.1f} times less with {faster.name} "
        "(p50 in this run).",
        f"On the {pairs} seed{'s' if pairs > 1 else ''} that both played, its score differs by "
        f"{difference['mean_difference']:+.3f}"
        + ("." if interval is None else f", 95 % {interval[0]:+.3f} to {interval[1]:+.3f}."),
    ]
    option = f"--sparsity {faster.plan.sparsity:g}"
    if faster.preset is not None:
        option = f"--preset {faster.name}"
        lines += _measured(faster.preset)
    elif document["arms"][faster.name]["planner"] == "uniform":
        lines.append("The uniform planner computes every n-th step, whatever the robot sees.")
    lines.append(
        f"{n} episode{'s' if n > 1 else ''} say{'' if n > 1 else 's'} little of a score; "
        f"this does: tsad eval {SIMULATOR} --seeds 500 {option}"
    )
    return "\n".join(lines)


def _measured(preset: Preset) -> list[str]:
    """What was measured when the preset was made, in one line or none."""
    found = preset.measured
    try:
        first, last = found["seeds"]
        low, high = found["simultaneous"]
        return [
            f"Measured over {last - first + 1} others, when the preset was made: "
            f"{found['mean_difference']:+.3f}, 95 % {low:+.3f} to {high:+.3f}."
        ]
    except (KeyError, TypeError, ValueError):  # it is free what a preset says of itself
        return []


def _report(document: dict[str, Any], arms: list[Arm], out: Path, seconds: float) -> str:
    dense, faster = arms
    plan = out / "plan.npz"
    files = {
        "demo.gif": f"both on seed {dense.episodes[0].seed}, on the robot's clock",
        "plan.png": f"what {faster.name} computes; as text: tsad show {plan}",
        "results.json": "every number",
    }
    width = max(len(str(out / name)) for name in files)
    written = [f"{str(out / name):<{width}}  {meaning}" for name, meaning in files.items()]
    said = [f"{arm.name}: {_setting(arm)}" for arm in arms]
    seeds = max((arm.episodes for arm in arms), key=len)
    return "\n".join(
        [
            f"policy {document['policy']}, {seed_range([seeds[0].seed, seeds[-1].seed])}; "
            f"{document['cpu']}, {document['backend']}, {document['threads']} threads",
            *said,
            "",
            _table(document),
            "",
            _remarks(document, faster),
            "",
            *written,
            f"{seconds:.0f} s in all",
        ]
    )


def _setting(arm: Arm) -> str:
    if arm.preset is not None:
        return arm.preset.words()
    words = [sampler_name(arm.policy)]
    if arm.plan.sparsity:
        words.append(f"{arm.plan.sparsity:.1%} of the cost left out by {planner_name(arm.policy)}")
    return ", ".join([*words, arm.policy.precision])


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tsad import plot, sim
    from tsad.files import make_folder, output_folder, sha256, write_json
    from tsad.sim import film

    begin = time.monotonic()
    with argument("--out"):
        out = output_folder(args.out)
        check_result(out, FILES, {"format": FORMAT}, overwrite=args.overwrite)
    first = FIRST_SEED if args.first_seed is None else args.first_seed
    environment = sim.make(SIMULATOR)
    dense = load_policy(args.policy, args, name="--policy", lanes=1)
    with argument("--policy"):
        sim.check(dense, environment)
    arms = [Arm("dense", dense), _faster(args, dense)]
    _play_all(arms, environment, first, args.seeds)
    environment.close()
    document = _document(args, arms)
    plan = arms[1].plan
    make_folder(out)
    plan.save(out / "plan.npz")
    plot.save_plan(plan, out / "plan.png")
    film.save_gif([arm.reel for arm in arms if arm.reel is not None], out / "demo.gif")
    # so that the next demo knows these, and spares what you have put in their place
    document["written"] = {name: sha256(out / name) for name in FILES[1:]}
    write_json(out / FILES[0], document)
    if args.json:
        print(json.dumps({**document, "files": str(out)}, indent=1))
    else:
        print(_report(document, arms, out, time.monotonic() - begin))
    return 0
