"""`tsad collect`: rollouts of the dense policy, recorded."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    Formatter,
    UsageError,
    add_policy_options,
    add_simulator,
    add_workers,
    argument,
    check_simulator,
    experiment_of,
    files_sha256,
    load_policy,
    natural,
    policy_source,
    positive_int,
    seed_range,
)
from tsad.evaluation import jobs
from tsad.evaluation.play import Experiment, check_policy, playing, simulator_settings
from tsad.evaluation.progress import EpisodeProgress
from tsad.files import output_folder
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim.parallel import Recording

DESCRIPTION = """\
Play seeded episodes with the dense policy and record the observation and the actions of every
chunk. Planners are calibrated and plans searched on such a folder (tsad plan), without a simulator
and for any sampler: the denoising is not stored, the noise of an episode follows from its seed.

The folder grows: episodes that it has are not played again, so the same command goes on after
Ctrl-C, and more --episodes add to it. Seeds 0 to 9999 are for this; those from 10000 choose, those
from 100000 report (tsad eval)."""

EPILOG = """\
examples:
  tsad collect pusht --out recorded                          8 episodes, about 300 chunks, 0.1 MB
  tsad collect pusht --out recorded --episodes 40 --lanes 8  32 more
  tsad collect pusht --out recorded --episodes 200 --jobs 8  in eight processes
  tsad collect pusht --out mine --policy runs/mine --sampler ddim --steps 16
  tsad collect --simulator robot:make --policy runs/mine --out mine    robot.py, of your own"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "collect",
        help="record rollouts of the dense policy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    add_simulator(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to fill")
    parser.add_argument(
        "--episodes",
        type=positive_int,
        default=8,
        metavar="N",
        help="episodes, seeds S to S+N-1, those in DIR included (default: 8)",
    )
    parser.add_argument(
        "--first-seed", type=natural, default=0, metavar="S", help="the first seed (default: 0)"
    )
    parser.add_argument(
        "--lanes",
        type=positive_int,
        default=4,
        metavar="L",
        help="environments stepped together (default: 4)",
    )
    add_workers(parser)
    add_policy_options(parser)
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.set_defaults(run=run)


def _record(
    policy: SparsePolicy, experiment: Experiment, setting: Setting, todo: list[int], out: Path
) -> None:
    """Play the seeds that are left, here or by workers, and keep each episode as it ends."""
    from tsad.sim.recording import save_episode

    kept = experiment.seeds - len(todo)
    max_steps = check_policy(experiment.simulator, policy, own=experiment.own)
    longest = -(-max_steps // policy.n_action_steps)
    label = f"{experiment.simulator}, recording"
    progress = EpisodeProgress(experiment.seeds, label, longest=longest, done=kept)
    workers = jobs.workers_of(replace(experiment, seeds=len(todo)), policy)
    if workers is None:
        played = _here(policy, experiment, todo, progress.chunks)
    else:
        played = jobs.play(
            workers, policy, experiment, setting, todo, {}, progress.chunks, record=True
        )

    def said() -> str:
        return f"{kept} episodes are kept; the same command goes on"

    with playing(said), contextlib.closing(played), progress:
        for episode, obs, actions in played:
            facts = {"score": episode.score, "success": episode.success}
            save_episode(out, episode.seed, obs, actions, **facts)
            kept += 1
            progress.episode(episode.chunks, f"{episode.chunks} chunks, score {episode.score:.2f}")


def _here(
    policy: SparsePolicy,
    experiment: Experiment,
    todo: list[int],
    on_chunks: Callable[[int], None],
) -> Generator[Recording, None, None]:
    """The episodes of `todo`, played by this process."""
    from tsad import sim
    from tsad.sim.parallel import Chunks

    lanes = min(experiment.lanes, len(todo))
    environments = [sim.make(experiment.simulator) for _ in range(lanes)]
    keep = Chunks(policy, lambda chunk: on_chunks(len(chunk.seeds)))
    try:
        for episode in sim.rollouts(policy, environments, todo, on_chunk=keep):
            yield keep.recording(episode)
    finally:
        for environment in environments:
            environment.close()


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from tsad.sim import recording

    check_simulator(args)
    seeds = list(range(args.first_seed, args.first_seed + args.episodes))
    if seeds[-1] not in recording.SEEDS:
        raise UsageError(
            f"argument --first-seed: got {seed_range([seeds[0], seeds[-1]])}, expected seeds up to "
            f"{recording.SEEDS[-1]}: higher ones are kept for choosing and for reports"
        )
    with argument("--out"):
        output_folder(args.out)
    source = policy_source(args)
    policy = load_policy(source, args, name="--policy", lanes=min(args.lanes, args.episodes))
    check_policy(args.simulator, policy, own=args.own_simulator is not None)
    settings = {
        **simulator_settings(args.simulator),
        "files_sha256": files_sha256(source),
        "sampler": policy.config["scheduler"]["type"],
        "num_inference_steps": policy.num_inference_steps,
    }
    out = Path(args.out)
    with argument("--out"):
        have = recording.open_collection(out, settings)
    todo = [seed for seed in seeds if seed not in set(have)]
    if todo:
        args.seeds, args.overwrite = args.episodes, False
        experiment = experiment_of(args, resume=True)
        _record(policy, experiment, Setting.of(vars(args)), todo, out)
    _, episodes = recording.read_collection(out)
    scores = [float(recording.read_episode(out, e.number, "score")) for e in episodes]
    summary: dict[str, Any] = {
        "out": str(out),
        "episodes": len(episodes),
        "recorded_now": len(todo),
        "chunks": sum(len(episode.obs) for episode in episodes),
        "score": sum(scores) / len(scores),
        "bytes": sum(path.stat().st_size for path in out.iterdir()),
    }
    if args.json:
        print(json.dumps(summary))
    else:
        print(
            f"{out}: {summary['episodes']} episodes, {len(todo)} of them new; "
            f"{summary['chunks']} chunks, {summary['bytes'] / 1e6:.1f} MB, mean score "
            f"{summary['score']:.3f}"
        )
    return 0
