"""Episodes spread over worker processes, of this machine or of a Ray cluster.

An episode is decided by its seed and the policy's settings (`tsad.sim.rollout`), not by who plays
it. Each worker loads the policy once and is handed a few seeds whenever it is idle. Workers end at
once when the caller does, or stops: by an error, by Ctrl-C, killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsad._extras import package_versions, require, version
from tsad.load import load
from tsad.setting import Setting
from tsad.sim.rollout import Chunk, Episode, rollouts
from tsad.sim.simulators import describe

# Of a batch of seeds: its episodes, or recordings of them, or what went wrong.
Outcome = list[Any] | str
Outcomes = Generator[Outcome, None, None]

TELL_SECONDS = 0.5


class Recording(NamedTuple):
    """An episode with what was seen, (C, n_obs_steps, obs_dim), and said at each chunk."""

    episode: Episode
    obs: NDArray[np.float32]
    actions: NDArray[np.float32]


class WorkerError(RuntimeError):
    """A worker failed or was killed; the message says which and why."""


@dataclass(frozen=True)
class Work:
    """All that a worker needs to play any seed; pickled.

    Args:
        simulator: a name that `tsad.sim.make` knows here.
        source, lanes, threads, device: of `tsad.load`.
        setting: how the policy runs.
        options: keyword arguments of `tsad.sim.rollouts`.
        identity: `identity` of the caller's policy: workers with another would give other results.
        record: give each episode as a `Recording`.
    """

    simulator: str
    source: str
    setting: Setting
    lanes: int
    threads: int
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    record: bool = False


def identity(policy: Any, packages: Sequence[str]) -> dict[str, str]:
    """What must be equal wherever the same results are wanted: versions, and the kernels' path."""
    return {"tsad": version(), "backend": policy.backend, **package_versions(packages)}


class Chunks:
    """An `on_chunk` that keeps what was seen and said, of the episodes under way."""

    def __init__(self, policy: Any, then: Callable[[Chunk], None] | None = None) -> None:
        self._policy, self._then = policy, then
        self._kept: dict[int, list[tuple[Any, Any]]] = {}

    def __call__(self, chunk: Chunk) -> None:
        seen = chunk.obs
        if isinstance(seen, dict):
            seen = self._policy._side_by_side(seen, len(chunk.seeds))
        for seed, obs, actions in zip(chunk.seeds, seen, chunk.actions, strict=True):
            self._kept.setdefault(seed, []).append((obs, actions))
        if self._then is not None:
            self._then(chunk)

    def recording(self, episode: Episode) -> Recording:
        """That of an episode that has just ended."""
        obs, actions = map(np.stack, zip(*self._kept.pop(episode.seed), strict=True))
        return Recording(episode, obs, actions)


class Player:
    """Plays seeds; the policy and the simulator are loaded by the first call."""

    def __init__(self, work: Work, facts: Any) -> None:
        self._work, self._facts = work, facts
        self._policy: Any = None
        self._environments: list[Any] = []
        self.on_chunk: Callable[[Chunk], None] | None = None

    def play(self, seeds: list[int]) -> Outcome:
        """The episodes of `seeds`; an exception as text, for not every one can be pickled."""
        try:
            if self._policy is None:
                self._load()
            environments = self._environments[: len(seeds)]
            kept = Chunks(self._policy, self.on_chunk) if self._work.record else None
            options = {**self._work.options, "on_chunk": self.on_chunk if kept is None else kept}
            played = rollouts(self._policy, environments, seeds, **options)
            return list(played) if kept is None else [kept.recording(e) for e in played]
        except Exception as error:
            return f"in the episodes {seeds}: {describe(error)}"

    def _load(self) -> None:
        from tsad import sim

        work = self._work
        sim.register(work.simulator, **self._facts._asdict())  # the caller's may not be ours
        self._environments = [sim.make(work.simulator) for _ in range(work.lanes)]
        policy = load(
            work.source,
            lanes=work.lanes,
            threads=work.threads,
            device=work.device,
            **work.setting.options(),
        )
        ours = identity(policy, self._facts.packages)
        for name, wanted in work.identity.items():
            if ours.get(name) != wanted:
                raise RuntimeError(
                    f"{name}: this worker has {ours.get(name)}, the caller {wanted}; results would "
                    "differ; install the same, or use machines of one kind"
                )
        work.setting.apply(policy)
        self._policy = work.setting.wrapped(policy)


def play(
    work: Work,
    seeds: Sequence[int],
    jobs: int,
    *,
    ray: bool = False,
    on_chunks: Callable[[int], None] | None = None,
) -> Generator[Any, None, None]:
    """As `tsad.sim.rollouts`, in `jobs` processes; `close` it to end them before its end.

    It yields episodes, or a `Recording` of each (`Work.record`).

    Episodes come in an order that depends on the workers; those of a batch, as many as a worker
    has lanes, together. With `ray` the processes are actors of the Ray cluster that `ray_cpus`
    connected to, `threads` CPUs each; it needs tsad and the policy's files on its machines.

    `on_chunks` is told now and then how many chunks more were played, by processes of this machine;
    those of an episode before it comes.

    Raises:
        WorkerError: a worker raised an exception, or was killed.
        MissingExtraError: Ray is not installed.
    """
    size = int(work.lanes)
    batches = [list(seeds[i : i + size]) for i in range(0, len(seeds), size)]
    if not batches:
        return
    jobs = min(jobs, len(batches))
    played = _on_ray(work, jobs, batches) if ray else _on_processes(work, jobs, batches, on_chunks)
    with contextlib.closing(played) as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, str):
                raise WorkerError(f"a worker failed {outcome}")
            yield from outcome


# ---- processes of this machine

_player: Player | None = None


def _on_processes(
    work: Work, jobs: int, batches: list[list[int]], on_chunks: Callable[[int], None] | None
) -> Outcomes:
    from tsad import sim

    # Not fork: the engine, and whoever calls this, may have threads.
    context = multiprocessing.get_context("spawn")
    # Workers end when the other end of this pipe is closed, as it is by the death of its owner.
    line, owner = context.Pipe(duplex=False)
    player = Player(work, sim.facts(work.simulator))
    chunks = context.Value("q", 0)
    executor = ProcessPoolExecutor(jobs, context, _enter, (player, line, chunks))
    left, told = iter(batches), 0

    def hand_out(count: int) -> set[Future[Outcome]]:
        return {executor.submit(_play, batch) for batch in islice(left, count)}

    try:
        with _interrupts_held():
            futures = hand_out(2 * jobs)  # one to play and one that waits, so that nobody does
        while futures:
            done, futures = wait(futures, TELL_SECONDS, FIRST_COMPLETED)
            if on_chunks is not None:
                now = chunks.value
                on_chunks(now - told)
                told = now
            futures |= hand_out(len(done))
            for future in done:
                yield future.result()
        executor.shutdown()
    except BrokenProcessPool:
        raise WorkerError(
            "a worker process ended in the middle of its work: it was killed, or memory ran out "
            "(fewer processes or lanes need less)"
        ) from None
    finally:
        owner.close()
        executor.shutdown(cancel_futures=True)
        line.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits, and processes started inside never hear it: the terminal sends it to all."""
    if not hasattr(signal, "pthread_sigmask"):  # not a POSIX system
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter(player: Player, line: Connection, chunks: Any) -> None:
    """Start of a worker process; it adds to `chunks` those that it plays."""
    global _player

    def count(chunk: Chunk) -> None:
        with chunks.get_lock():
            chunks.value += len(chunk.seeds)

    player.on_chunk = count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, args=(line,), daemon=True).start()
    _player = player


def _end_with_owner(line: Connection) -> None:
    with contextlib.suppress(OSError):
        line.poll(None)
    os._exit(0)


def _play(seeds: list[int]) -> Outcome:
    assert _player is not None  # `_enter` came first
    return _player.play(seeds)


# ---- a Ray cluster


def ray_cpus() -> int:
    """CPUs of the Ray cluster: RAY_ADDRESS's, else one that runs here, else one started here.

    Raises:
        MissingExtraError: Ray is not installed.
        RuntimeError: the cluster cannot be reached.
    """
    ray = require("ray", extra="ray", purpose="a Ray cluster")
    if not ray.is_initialized():
        try:
            ray.init(logging_level="WARNING", log_to_driver=False)
        except (OSError, ValueError) as error:
            raise RuntimeError(f"no Ray cluster: {error}") from error
    return int(ray.cluster_resources().get("CPU", 0))


def _on_ray(work: Work, jobs: int, batches: list[list[int]]) -> Outcomes:
    from tsad import sim

    ray = require("ray", extra="ray", purpose="a Ray cluster")
    # Not ray.util.multiprocessing.Pool: it hands out batches in turn, to busy workers too.
    pool_of = require("ray.util", extra="ray", purpose="a Ray cluster").ActorPool
    player = ray.remote(num_cpus=work.threads)(Player)
    actors = [player.remote(work, sim.facts(work.simulator)) for _ in range(jobs)]
    try:
        yield from pool_of(actors).map_unordered(lambda a, seeds: a.play.remote(seeds), batches)
    except ray.exceptions.RayError as error:
        raise WorkerError(f"a worker of the Ray cluster ended: {error}") from error
    finally:
        for actor in actors:
            ray.kill(actor)
