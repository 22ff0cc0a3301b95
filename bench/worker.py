"""One contender in a process of its own, so that nobody's threads and settings are another's.

`Worker` is the parent's end: it starts the process and calls it; `Server` runs there. A worker has
one library (our engine, or one peer) and one number of threads, and builds task after task.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
from typing import Any

import numpy as np

ENGINE = "tsad"
ENGINES = {ENGINE: "float32", "tsad-int16": "int16"}  # our engine, and in which precision
ONE_BY_ONE = "/one-by-one"  # a plan's suffix: lanes are called one after another
EPISODE = 38  # chunks of 8 actions in the 300 steps of a Push-T episode
WARM_ROLLOUTS = 3
SLOW_MS = 500.0  # chunks so slow warm the caches themselves
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerError(RuntimeError):
    """The other process failed; `kind` is the exception's name there."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class Server:
    """What a worker does; every method is called through `Worker.call`."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer, self.threads = peer, threads
        self.ours = peer in ENGINES
        self._policy: Any = None
        self._one_by_one = False
        self._stages: list[dict[str, float]] = []
        self._last_ms = 0.0

    def build(self, **task: Any) -> dict[str, Any]:
        """Make the policy of `tasks.make_task(**task)`; what is known of it."""
        import tasks

        self._policy = None
        gc.collect()
        begin = time.perf_counter()
        self._task = tasks.make_task(threads=self.threads, **task)
        self._obs = tasks.observations(self._task, EPISODE)
        facts: dict[str, Any] = {"note": ""}
        if self.ours:
            self._policy = tasks.engine(self._task, ENGINES[self.peer])
            facts |= {
                "note": f"{self._policy.backend}, {self._policy.precision}",
                "backend": self._policy.backend,
                "weight_bytes": self._policy.stats["weight_bytes"],
            }
        else:
            import peers

            self._policy = peers.build(self.peer, self._task)
            facts["note"] = self._policy.network.note
        return facts | {"build_s": time.perf_counter() - begin}

    def actions(self) -> np.ndarray:
        """Normalised actions of one dense chunk, the whole horizon, noise of seed 0."""
        import tasks

        if self.ours:
            self._policy.plan = None
            self._policy.sparsity = 0.0
        self._policy.reset(seed=0)
        begin = time.perf_counter()
        actions = self._policy(self._rows(0), return_horizon=True)
        self._last_ms = (time.perf_counter() - begin) * 1e3
        return tasks.normalise(np.asarray(actions), self._task).reshape(
            self._task.lanes, -1, self._task.config.network.action_dim
        )

    def plan(self, name: str) -> dict[str, Any]:
        """Set our engine's plan by name; its facts. Peers know only "dense"."""
        import plans

        import tsad

        policy = self._policy
        self._one_by_one = name.endswith(ONE_BY_ONE)
        name = name.removesuffix(ONE_BY_ONE)
        if name == "dense":
            chosen = [tsad.planners.dense(policy)] * policy.lanes
        elif name.startswith("uniform-"):
            saved = float(name.removeprefix("uniform-")) / 100
            chosen = [tsad.planners.uniform_sparse(policy, saved)] * policy.lanes
        elif name == "sparse95":
            chosen = [plans.sparse95(lane, policy=policy) for lane in range(policy.lanes)]
            if policy.lanes == 1 and plans.is_standard(policy):
                chosen = [tsad.Plan.load(plans.SPARSE95)]
        else:
            raise ValueError(f"plan: expected dense, uniform-PERCENT or sparse95, got {name!r}")
        policy.reset()  # in mid-episode, a plan is refused that reuses what is not there
        policy.plan = chosen
        policy.reset(seed=0)
        return {
            "sparsity": float(np.mean([plan.sparsity for plan in chosen])),
            "cell_sparsity": float(np.mean([plan.cell_sparsity for plan in chosen])),
            "sources": [plan.sources for plan in chosen],
            "memory_bytes": int(policy.stats["bytes"]),
        }

    def round(self, plan: str, seconds: float, least: int) -> dict[str, Any]:
        """Chunks back to back for `seconds`, at least `least`, at most an episode.

        A round is the start of an episode. `first_ms` is its first chunk; `times_ms` those after
        the warm rollouts.
        """
        import measure

        self._start(plan)
        load = measure.Load()
        warm = WARM_ROLLOUTS if self.ours else int(self._last_ms < SLOW_MS)
        before = [self._call(i) for i in range(warm)]
        self._stages.clear()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < EPISODE - warm:
            if len(times) >= least and time.perf_counter() - begin > seconds:
                break
            times.append(self._call(warm + len(times)))
        load.stop()
        return {
            "times_ms": times,
            "first_ms": before[0] if self.ours else None,
            "warm_ms": before,
            "stages_ms": self._medians(),
            "foreign": load.foreign,
            "steal": load.steal,
        }

    def sustained(self, plan: str, seconds: float) -> dict[str, Any]:
        """Chunks back to back for `seconds`, however many, after the warm rollouts."""
        import measure

        self._start(plan)
        for i in range(WARM_ROLLOUTS):
            self._call(i)
        load, times = measure.Load(), []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            times.append(self._call(WARM_ROLLOUTS + len(times)))
        load.stop()
        return {"times_ms": times, "foreign": load.foreign, "steal": load.steal}

    def paced(self, plan: str, hertz: float, seconds: float) -> dict[str, Any]:
        """Chunks at a robot's rate: a call at every tick, the process idle in between.

        A call that is not done by the next tick makes that one late; `late` is their share, and
        ticks that have passed altogether are left out. `idle_cores`: CPU time spent between calls.
        """
        import measure

        self._start(plan)
        self._call(0)
        load = measure.Load()
        period, times, late, idle_wall, idle_cpu = 1 / hertz, [], 0, 0.0, 0.0
        tick = begin = time.perf_counter()
        while len(times) < 2 or time.perf_counter() - begin < seconds:
            tick += period
            wall, cpu = time.perf_counter(), time.process_time()
            if tick > wall:
                time.sleep(tick - wall)
                idle_wall += time.perf_counter() - wall
                idle_cpu += time.process_time() - cpu
            else:
                late += 1
                tick += (wall - tick) // period * period
            times.append(self._call(1 + len(times)))
        load.stop()
        return {
            "times_ms": times,
            "late": late / len(times),
            "idle_cores": idle_cpu / idle_wall if idle_wall else None,
            "foreign": load.foreign,
            "steal": load.steal,
        }

    def _start(self, plan: str) -> None:
        if self.ours:
            self.plan(plan)
        self._policy.reset(seed=0)

    def _rows(self, chunk: int) -> np.ndarray:
        rows: np.ndarray = self._obs[chunk % EPISODE]
        return rows

    def _call(self, chunk: int) -> float:
        obs = self._rows(chunk)
        begin = time.perf_counter()
        if self._one_by_one:
            for lane in range(len(obs)):
                self._policy(obs[lane : lane + 1], lanes=[lane])
        else:
            self._policy(obs)
        self._last_ms = (time.perf_counter() - begin) * 1e3
        if self.ours:
            stages = self._policy.timings
            self._stages.append(stages | {"outside": self._last_ms - stages["denoise"]})
        return self._last_ms

    def _medians(self) -> dict[str, float] | None:
        """Medians of the stages; `outside`: of all that is not denoising, the noise included."""
        if not self._stages or self._one_by_one:
            return None
        return {
            name: float(np.median([stages[name] for stages in self._stages]))
            for name in self._stages[0]
        }


def serve(connection: Any, peer: str, threads: int) -> None:
    """The process: answers calls until told to end."""
    server = Server(peer, threads)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        if method is None:
            return
        try:
            connection.send(("ok", getattr(server, method)(**arguments)))
        except Exception as error:
            kind = type(error).__name__
            connection.send((kind, str(error) or traceback.format_exc(limit=3)))


class Worker:
    """A contender's process."""

    def __init__(self, peer: str, threads: int) -> None:
        self.peer = peer
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        saved = {name: os.environ.get(name) for name in THREAD_VARIABLES}
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
        try:
            self._process = context.Process(
                target=serve, args=(other, peer, threads), daemon=True, name=f"bench {peer}"
            )
            self._process.start()
        finally:
            for name, value in saved.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        other.close()

    def call(self, method: str, **arguments: Any) -> Any:
        """Run a method of `Server` there; WorkerError carries its exception."""
        try:
            self._connection.send((method, arguments))
            status, value = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)
            code = self._process.exitcode
            raise WorkerError("Died", f"the process ended with status {code}") from error
        if status != "ok":
            raise WorkerError(status, value)
        return value

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._connection.send((None, {}))
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
