"""Who plays the episodes of a run: this process, several of this machine, or a Ray cluster."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tsad.commands.common import UsageError, positive_int
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim.rollout import Episode


class Workers(NamedTuple):
    """Processes beside this one, and the threads of each."""

    jobs: int
    threads: int
    ray: bool


def add_options(parser: argparse.ArgumentParser) -> None:
    """--jobs and --ray."""
    group = parser.add_argument_group("who plays; never changes the results, but for times")
    group.add_argument(
        "--jobs",
        type=positive_int,
        metavar="N",
        help="N processes, which share the CPUs (default: 1; with --ray: one per CPU)",
    )
    group.add_argument(
        "--ray",
        action="store_true",
        help="processes of a Ray cluster: $RAY_ADDRESS, or the one on this machine, or a new one; "
        "tsad and the policy's files must be where they run; --threads each, default 1",
    )


def workers_of(args: argparse.Namespace, policy: SparsePolicy) -> Workers | None:
    """Who plays; None for this process alone. UsageError if the cluster is too small."""
    from tsad.load import usable_cpus
    from tsad.sim.parallel import ray_cpus

    jobs = args.jobs
    if not args.ray:
        if jobs is None or jobs == 1:
            return None
        share = max(1, usable_cpus() // jobs)
        return Workers(min(jobs, args.seeds), args.threads or min(policy.threads, share), False)
    cpus, threads = ray_cpus(), args.threads or 1
    jobs = max(1, cpus // threads) if jobs is None else jobs
    if jobs * threads > cpus:
        raise UsageError(
            f"argument --ray: got {jobs} processes (--jobs) of {threads} threads (--threads), but "
            f"the cluster has {cpus} CPUs; ask for less"
        )
    return Workers(min(jobs, args.seeds), threads, True)


def play(
    workers: Workers,
    policy: SparsePolicy,
    source: str,
    args: argparse.Namespace,
    setting: Setting,
    todo: list[int],
    options: Mapping[str, Any],
    on_chunks: Callable[[int], None],
) -> Generator[Episode, None, None]:
    """The episodes of `todo`, by workers that do as `policy` would; `options` of `rollouts`.

    `on_chunks` is told how many chunks more were played.
    """
    from tsad import sim
    from tsad.load import bundled
    from tsad.sim import parallel

    lanes = min(policy.lanes, -(-len(todo) // workers.jobs))
    work = parallel.Work(
        simulator=args.simulator,
        source=source if source in bundled() else os.path.abspath(source),
        setting=setting.alone(policy),
        lanes=lanes,
        threads=workers.threads,
        device=args.device,
        options=options,
        identity=parallel.identity(policy, sim.facts(args.simulator).packages),
    )
    return parallel.play(work, todo, workers.jobs, ray=workers.ray, on_chunks=on_chunks)
