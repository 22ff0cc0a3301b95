"""`tsad.Recorder`: what a policy sees and says in a loop of your own, kept for `tsad plan` and
`tsad tune`.

The loop hands each chunk to a thread and goes on. The thread appends it to a file of the episode
(`tsad.sim.recording.part_path`), which becomes the episode's npz when the episode ends: whoever is
interrupted keeps every chunk but the last, which the thread may just have been given.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tsad import _core
from tsad.busy import one_caller
from tsad.files import Lock, path_text
from tsad.load import files_sha256
from tsad.policy import SparsePolicy
from tsad.sim import recording
from tsad.sim.results import lock

# Lanes, and their chunks; or lanes whose episodes end; or None, the end of all.
Item = tuple[list[int], NDArray[Any] | None] | None


class Recorder:
    """A policy that records its episodes, around a loop of your own: a robot, a simulator.

    >>> with tsad.Recorder(tsad.load("policy"), "recorded") as policy:
    ...     policy.reset(seed=0)  # an episode begins, and the one before is over
    ...     actions = policy(obs)

    It is called like the policy, and has its attributes, also to set. What is kept of every chunk
    is the observation and the actions returned, float32, raw units; not the noise nor the plan: any
    plan, preset or sampler may run, and what is made of the folder is for any other. Give it to
    `tsad plan measure --data`, `tsad plan search --data` and `tsad tune --observations`. A folder
    is gone on with by a later Recorder of the same policy.

    A thread writes: a chunk takes the loop some microseconds more, whatever the disk does. Ctrl-C,
    errors and the program's end leave all chunks on disk; if the program is killed, all but the
    last. What cannot be written is an ``OSError`` of the next `reset`, or of the end, and never of
    a chunk. Threads may call it as they may call the policy: one at a time.

    Args:
        policy: a `tsad.SparsePolicy` that `tsad.load` made.
        folder: made if need be.

    Raises:
        TypeError: `policy` is not one.
        ValueError: the folder is not a recording of this policy, by the hash of its files, or
            another program is recording into it.
        OSError: the folder cannot be made.
    """

    __slots__ = ("__weakref__", "_alone", "_chunk", "_finish", "_policy", "_writer")
    _alone: threading.Lock
    _chunk: np.dtype[Any]
    _finish: weakref.finalize[..., Recorder]
    _policy: SparsePolicy
    _writer: _Writer

    def __init__(self, policy: SparsePolicy, folder: str | os.PathLike[str]) -> None:
        source = policy._source if isinstance(policy, SparsePolicy) else None
        if source is None:
            made = " made otherwise" if isinstance(policy, SparsePolicy) else ""
            raise TypeError(
                f"policy: expected one of tsad.load, got {type(policy).__name__}{made}; save the "
                "observations of others as arrays: np.savez(file, obs=..., episode_ends=...)"
            )
        path_text(folder, "folder")
        path = Path(folder)
        recording.open_collection(path, {"by": "Recorder", "files_sha256": files_sha256(source)})
        held = lock(path / recording.FACTS_FILE)
        chunk = np.dtype(
            [
                ("obs", np.float32, (policy.n_obs_steps, policy.obs_dim)),
                ("actions", np.float32, (policy.n_action_steps, policy.action_dim)),
            ]
        )
        try:
            writer = _Writer(path, recording.part_header(chunk))
        except BaseException:
            held.release()
            raise
        values = {
            "_policy": policy,
            "_chunk": chunk,
            "_alone": threading.Lock(),
            "_writer": writer,
            # when the program ends or forgets about it, too
            "_finish": weakref.finalize(self, _finish, writer, held),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        writer.start()

    def __call__(
        self, obs: Any, *, lanes: Any = None, return_horizon: bool = False, **options: Any
    ) -> Any:
        """As the policy's."""
        policy = self._policy
        with self._one_caller():
            rows = policy._lanes(lanes)
            named = isinstance(obs, dict)
            # images are features once the policy has seen them; they are not encoded twice
            late = named and policy.config.get("vision") is not None
            if not late:  # what is on a GPU is refused before it runs
                seen = _core._copy(policy._side_by_side(obs, len(rows)) if named else obs, "obs")
            if options.get("out") is not None:
                _core._copy(options["out"], "out")
            actions = policy(obs, lanes=rows, return_horizon=return_horizon, **options)
            chunks = np.empty(len(rows), self._chunk)
            if late:
                seen = _core._copy(policy._side_by_side(obs, len(rows)), "obs")
            chunks["obs"] = seen
            said = _core._copy(actions, "actions")
            if return_horizon:
                begin = policy.n_obs_steps - 1
                said = said[..., begin : begin + policy.n_action_steps, :]
            chunks["actions"] = said
            self._writer.items.put((rows, chunks))
        return actions

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        """As the policy's; the lanes' episodes are over."""
        with self._one_caller():
            self._writer.complain()
            rows = self._policy._lanes(lanes)
            self._policy.reset(rows, seed)
            self._writer.items.put((rows, None))

    def close(self) -> None:
        """All episodes are over and on disk; the policy goes on without it. Again does nothing."""
        self._finish()
        self._writer.complain()

    @property
    def policy(self) -> SparsePolicy:
        """The policy itself."""
        return self._policy

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        if name in self.__slots__ or name.startswith("__"):  # of one not made yet; of protocols
            raise AttributeError(name)
        return getattr(self._policy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._policy, name, value)

    def __reduce__(self) -> Any:
        raise TypeError("a Recorder writes a folder and can't be copied or pickled; its policy can")

    def __repr__(self) -> str:
        return f"Recorder({self._policy!r}, {str(self._writer.folder)!r})"

    @contextlib.contextmanager
    def _one_caller(self) -> Iterator[None]:
        with one_caller(self._alone):
            if not self._finish.alive:
                raise RuntimeError(
                    f"recorder of {self._writer.folder}: closed; make another, or call the policy "
                    "itself"
                )
            yield


def _finish(writer: _Writer, held: Lock) -> None:
    writer.items.put(None)
    writer.join()
    held.release()


class _Writer(threading.Thread):
    """Writes what it is given, in its order; the first error ends that, see `complain`.

    What a program that died left is completed first. ``header`` begins a part.
    """

    def __init__(self, folder: Path, header: bytes) -> None:
        super().__init__(name=f"tsad recorder of {folder}", daemon=True)
        self.folder, self.items = folder, SimpleQueue[Item]()
        self._header, self._error = header, ""
        self._parts: dict[int, tuple[int, IO[bytes]]] = {}  # by lane: number and file
        for number in recording.numbers(folder, "part"):
            self._complete(number)
        self._next = 1 + max(recording.numbers(folder, "npz"), default=-1)

    def complain(self) -> None:
        """OSError if something could not be written."""
        if self._error:
            raise OSError(
                f"{self.folder}: recording has ended, {self._error}; mend that and make another "
                "Recorder, or go on with the policy itself (recorder.policy)"
            )

    def run(self) -> None:
        while (item := self.items.get()) is not None:
            self._try(self._take, *item)
        self._try(self._take, list(self._parts), None)

    def _try(self, action: Any, *args: Any) -> None:
        if self._error:
            return
        try:
            action(*args)
        except Exception as error:
            self._error = str(error) or repr(error)

    def _take(self, lanes: list[int], chunks: NDArray[Any] | None) -> None:
        for row, lane in enumerate(lanes):
            if chunks is not None:
                self._append(lane, chunks[row].tobytes())
            elif lane in self._parts:
                number, file = self._parts.pop(lane)
                file.close()
                self._complete(number)

    def _append(self, lane: int, content: bytes) -> None:
        if lane not in self._parts:
            file = recording.part_path(self.folder, self._next).open("xb", buffering=0)
            self._parts[lane] = (self._next, file)
            self._next += 1
            content = self._header + content
        if self._parts[lane][1].write(content) < len(content):
            raise OSError("no space left on the device")

    def _complete(self, number: int) -> None:
        """A part becomes an episode."""
        part = recording.part_path(self.folder, number)
        chunks = recording.read_part(part)
        if chunks is not None and not recording.episode_path(self.folder, number).exists():
            recording.save_episode(self.folder, number, chunks["obs"], chunks["actions"])
        part.unlink()
