"""Who plays the episodes of a run: this process, several of this machine, or a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tsad.evaluation.usage import UsageError
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.evaluation.play import Experiment


class Workers(NamedTuple):
    """Processes beside this one, and the threads of each."""

    jobs: int
    threads: int
    ray: bool


def workers_of(experiment: Experiment, policy: SparsePolicy) -> Workers | None:
    """Who plays; None for this process alone. UsageError if the cluster is too small."""
    from tsad.load import usable_cpus
    from tsad.sim.parallel import ray_cpus

    jobs = experiment.jobs
    if not experiment.ray:
        if jobs is None or jobs == 1:
            return None
        share = max(1, usable_cpus() // jobs)
        return Workers(
            min(jobs, experiment.seeds), experiment.threads or min(policy.threads, share), False
        )
    cpus, threads = ray_cpus(), experiment.threads or 1
    jobs = max(1, cpus // threads) if jobs is None else jobs
    if jobs * threads > cpus:
        raise UsageError(
            f"argument --ray: got {jobs} processes (--jobs) of {threads} threads (--threads), but "
            f"the cluster has {cpus} CPUs; ask for less"
        )
    return Workers(min(jobs, experiment.seeds), threads, True)


def play(
    workers: Workers,
    policy: SparsePolicy,
    experiment: Experiment,
    setting: Setting,
    todo: list[int],
    options: Mapping[str, Any],
    on_chunks: Callable[[int], None],
    *,
    record: bool = False,
) -> Generator[Any, None, None]:
    """The episodes of `todo`, by workers that do as `policy` would; `options` of `rollouts`.

    `on_chunks` is told how many chunks more were played. `record`: each as a `parallel.Recording`.
    """
    from tsad import sim
    from tsad.load import bundled
    from tsad.sim import parallel

    source = experiment.source
    lanes = min(policy.lanes, -(-len(todo) // workers.jobs))
    work = parallel.Work(
        simulator=experiment.simulator,
        source=source if source in bundled() else os.path.abspath(source),
        setting=setting.alone(policy),
        lanes=lanes,
        threads=workers.threads,
        device=experiment.device,
        options=options,
        identity=parallel.identity(policy, sim.facts(experiment.simulator).packages),
        record=record,
    )
    return parallel.play(work, todo, workers.jobs, ray=workers.ray, on_chunks=on_chunks)
