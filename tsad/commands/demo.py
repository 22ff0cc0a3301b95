"""`tsad demo`: a trained policy pushes the T, dense and sparse, on the same seeds."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad.commands.common import (
    Formatter,
    Progress,
    add_overwrite,
    add_policy_options,
    argument,
    check_result,
    cpu_name,
    load_policy,
    natural,
    planner_name,
    positive_int,
    sampler_name,
    seed_range,
    set_sparsity,
    sparsity,
    table,
)

if TYPE_CHECKING:
    from tsad import Plan, SparsePolicy
    from tsad.sim import Chunk, Environment, Episode
    from tsad.sim.film import Reel

SIMULATOR = "pusht"
SEEDS = 5
SECONDS = 60
FORMAT = "tsad-demo"
FILES = ("results.json", "demo.gif", "plan.png", "plan.npz")  # the first says whose they are

DESCRIPTION = """\
Run a policy in the simulator twice on the same seeds and noise, dense and sparse, and show what
sparsity buys and costs on this machine: a table, a picture of the plan, and a film of both.

Scores of so few episodes are an impression; `tsad eval` measures them."""

EPILOG = """\
examples:
  tsad demo
  tsad demo --sparsity 0.9 --seeds 10 --out /tmp/demo
  tsad demo --sampler ddim --steps 16 --sparsity 0.5"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "demo",
        help="watch a policy push the T, dense and sparse",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--policy", default=SIMULATOR, metavar="SRC", help="a Push-T policy (default: bundled)"
    )
    parser.add_argument(
        "--sparsity",
        type=sparsity,
        default=0.75,
        metavar="S",
        help="share of the cost that the sparse policy does not compute (default: 0.75)",
    )
    parser.add_argument("--planner", metavar="NAME", help="who decides: uniform or pruner")
    parser.add_argument(
        "--seeds",
        type=positive_int,
        metavar="N",
        help=f"episodes (default: {SEEDS}, fewer where they would take over {SECONDS} s)",
    )
    parser.add_argument(
        "--first-seed",
        type=natural,
        metavar="S",
        help="the seed of the film and the first of the table (default: 100000)",
    )
    add_policy_options(parser)
    parser.add_argument(
        "--out", default="tsad-demo", metavar="DIR", help="where files go (default: tsad-demo)"
    )
    add_overwrite(parser, "what is in DIR and of no earlier demo")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.set_defaults(run=run)


@dataclass
class Arm:
    """One of the two ways to run the policy, and what it did."""

    name: str
    sparsity: float
    plan: Plan | None = None
    episodes: list[Episode] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)

    def percentiles(self) -> NDArray[np.float64]:
        """p50, p90 and p99 of the milliseconds of a chunk."""
        return np.percentile(self.chunk_ms, [50, 90, 99])


def _play(
    policy: SparsePolicy, environment: Environment, arm: Arm, seed: int, reel: Reel | None
) -> list[Chunk]:
    """Play one episode; returns its chunks."""
    from tsad import sim
    from tsad.sim import film

    chunks: list[Chunk] = []

    def on_chunk(chunk: Chunk) -> None:
        chunks.append(chunk)
        arm.chunk_ms.append(chunk.milliseconds)

    def on_step(environment: Environment, steps: int, score: float) -> None:
        if reel is not None and steps % film.EVERY == 0:
            reel.add(environment.render(film.SIZE), _caption(arm, score))

    policy.sparsity = arm.sparsity
    episode = next(sim.rollouts(policy, [environment], [seed], on_step=on_step, on_chunk=on_chunk))
    arm.episodes.append(episode)
    arm.plan = _one(policy.plan)
    if reel is not None:
        end = "   success" if episode.success else "   time is up"
        reel.add(environment.render(film.SIZE), _caption(arm, episode.score) + end)
    return chunks


def _caption(arm: Arm, score: float) -> str:
    time_ = f"   {np.median(arm.chunk_ms):.1f} ms/chunk" if arm.chunk_ms else ""
    return f"score {score:.2f}{time_}"


def _one(plan: Any) -> Any:
    return plan[0] if isinstance(plan, list) else plan


def _difference(policy: SparsePolicy, seed: int, dense: list[Chunk]) -> list[float]:
    """Largest action difference of each chunk, sparse against dense, in raw units.

    The sparse policy sees what the dense one saw, with the same noise, so that only the plan
    differs; in its own episode it would soon stand elsewhere.
    """
    from tsad import sim

    policy.reset(lanes=[0], seed=[sim.noise_seed(seed)])
    return [
        float(np.abs(np.asarray(policy(chunk.obs, lanes=[0])) - chunk.actions).max())
        for chunk in dense
    ]


def _compare(
    policy: SparsePolicy,
    environment: Environment,
    seeds: list[int],
    arms: list[Arm],
    seconds: float,
) -> tuple[list[Reel], list[float]]:
    """Both arms on every seed, in turn, so that a machine that slows down slows both.

    Stops before a seed that would end after `seconds`.
    """
    from tsad.sim.film import Reel

    reels = [Reel(f"{arm.name}, {sampler_name(policy)}") for arm in arms]
    differences: list[float] = []
    dense, sparse = arms
    begin = time.monotonic()
    with Progress(len(seeds) * 2, "demo", unit="episodes") as progress:
        for number, seed in enumerate(seeds):
            spent = time.monotonic() - begin
            if number and spent * (number + 1) / number > seconds:
                break
            filmed = reels if number == 0 else [None, None]
            chunks = _play(policy, environment, dense, seed, filmed[0])
            progress.update(f"dense {dense.episodes[-1].score:.2f}")
            _play(policy, environment, sparse, seed, filmed[1])
            differences += _difference(policy, seed, chunks)
            progress.update(f"sparse {sparse.episodes[-1].score:.2f}")
    return reels, differences


def _row(arm: Arm, policy: SparsePolicy) -> dict[str, Any]:
    """The numbers of one arm."""
    from tsad.sim.results import summarise

    p50, p90, p99 = (float(value) for value in arm.percentiles())
    per_second = 1e3 * len(arm.chunk_ms) / sum(arm.chunk_ms)
    assert arm.plan is not None
    return {
        "sparsity": float(arm.plan.sparsity),
        "cell_sparsity": float(arm.plan.cell_sparsity),
        "chunk_ms": {"p50": p50, "p90": p90, "p99": p99, "max": max(arm.chunk_ms)},
        "chunks": len(arm.chunk_ms),
        "chunks_per_second": per_second,
        "actions_per_second": per_second * policy.n_action_steps,
        **{key: value for key, value in summarise(arm.episodes).items() if key != "chunk_ms"},
        "per_seed": [asdict(episode) for episode in arm.episodes],
    }


def _table(document: dict[str, Any]) -> str:
    arms = document["arms"]
    n = arms["dense"]["episodes"]
    rows = [["", *arms]]

    def add(label: str, cell: Any) -> None:
        rows.append([label, *(cell(arm) for arm in arms.values())])

    for name in ("p50", "p90", "p99"):
        add(f"ms per chunk, {name}", lambda arm, name=name: f"{arm['chunk_ms'][name]:.2f}")
    add("chunks/s", lambda arm: f"{arm['chunks_per_second']:.1f}")
    add("actions/s", lambda arm: f"{arm['actions_per_second']:.0f}")
    add("sparsity (of cost)", lambda arm: f"{arm['sparsity']:.1%}")
    add("sparsity (of cells)", lambda arm: f"{arm['cell_sparsity']:.1%}")
    add(f"score, {n} episode{'s' if n > 1 else ''}", lambda arm: f"{arm['score']['mean']:.3f}")
    add("success", lambda arm: f"{round(arm['success']['mean'] * n)} of {n}")
    difference = document["action_difference_px"]
    label = "largest action difference, px"
    rows.insert(8, [label, "0", f"{difference['max']:.2f} (median {difference['median']:.2f})"])
    return table(rows)


def _document(
    policy: SparsePolicy, args: argparse.Namespace, arms: list[Arm], differences: list[float]
) -> dict[str, Any]:
    import tsad

    rows = {arm.name: _row(arm, policy) for arm in arms}
    speed = [row["chunk_ms"]["p50"] for row in rows.values()]
    return {
        "format": FORMAT,
        "tsad": tsad.__version__,
        "policy": args.policy,
        "sampler": sampler_name(policy),
        "planner": planner_name(policy),
        "backend": policy.backend,
        "threads": policy.threads,
        "cpu": cpu_name(),
        "seeds": [episode.seed for episode in arms[0].episodes],
        "first_chunk_is_dense": arms[1].plan is not None and arms[1].plan.first is None,
        "speed_up_p50": speed[0] / speed[1],
        "action_difference_px": {"max": max(differences), "median": float(np.median(differences))},
        "arms": rows,
    }


def _remarks(document: dict[str, Any]) -> str:
    """What the numbers mean, and what they do not."""
    n = len(document["seeds"])
    lines = [f"A sparse chunk is {document['speed_up_p50']:.1f} times faster (p50 in this run)."]
    if document["first_chunk_is_dense"]:
        lines.append("The first chunk of an episode is dense in both.")
    if document["planner"] == "uniform":
        lines.append("The uniform planner computes every n-th step, whatever the robot sees.")
    lines += [
        "The action difference is on the dense run's observations, with the same noise,",
        "on a table of 512 px.",
        f"{n} episode{'s' if n > 1 else ''} say{'' if n > 1 else 's'} little of the score; "
        f"this does: tsad eval {SIMULATOR} --seeds 500 --sparsity S",
    ]
    return "\n".join(lines)


def _report(document: dict[str, Any], out: Path, seconds: float) -> str:
    seeds = document["seeds"]
    plan = out / "plan.npz"
    files = {
        "demo.gif": f"both rollouts of seed {seeds[0]}",
        "plan.png": f"the sparse plan; as text: tsad show {plan}",
        "results.json": "every number",
    }
    width = max(len(str(out / name)) for name in files)
    written = [f"{str(out / name):<{width}}  {meaning}" for name, meaning in files.items()]
    return "\n".join(
        [
            f"policy {document['policy']} ({document['sampler']}), planner {document['planner']}, "
            + seed_range(seeds),
            f"{document['cpu']}, {document['backend']}, {document['threads']} threads",
            "",
            _table(document),
            "",
            _remarks(document),
            "",
            *written,
            f"{seconds:.0f} s in all",
        ]
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tsad import plot, sim
    from tsad.files import make_folder, output_folder, write_json
    from tsad.sim import film

    begin = time.monotonic()
    with argument("--out"):
        out = output_folder(args.out)
        check_result(out, FILES, {"format": FORMAT}, overwrite=args.overwrite)
    first = sim.facts(SIMULATOR).first_seed if args.first_seed is None else args.first_seed
    seeds = list(range(first, first + (args.seeds or SEEDS)))
    environment = sim.make(SIMULATOR)
    policy = load_policy(args.policy, args, name="--policy", lanes=1)
    with argument("--policy"):
        sim.check(policy, environment)
    if args.planner is not None:
        with argument("--planner"):
            policy.planner = args.planner
    set_sparsity(policy, args.sparsity)
    arms = [Arm("dense", 0.0), Arm(f"sparsity {args.sparsity:g}", args.sparsity)]
    seconds = SECONDS if args.seeds is None else float("inf")
    reels, differences = _compare(policy, environment, seeds, arms, seconds)
    environment.close()
    document = _document(policy, args, arms, differences)
    plan = arms[1].plan
    assert plan is not None
    make_folder(out)
    plan.save(out / "plan.npz")
    plot.save_plan(plan, out / "plan.png")
    film.save_gif(reels, out / "demo.gif")
    write_json(out / "results.json", document)
    if args.json:
        print(json.dumps({**document, "files": str(out)}, indent=1))
    else:
        print(_report(document, out, time.monotonic() - begin))
    return 0
