"""Episodes that a policy went through, on disk, for everything that is fitted or searched offline.

A collection is a folder: `collection.json` says of which policy, `episode-<number>.npz` holds one
episode each. `tsad collect` fills one in a simulator, `tsad.Recorder` around a loop of your own. An
episode is what was seen at each chunk (``obs``) and what was said (``actions``); nothing of the
denoising is kept. Its noise is drawn anew from the episode's number (`Recorded.noise`), for
whichever sampler asks, and `denoising_inputs` runs it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.arrays import read_any_json, read_npz
from tsad.files import make_folder, output_folder, write_atomically, write_json
from tsad.samplers import NOISE, advance, make_sampler
from tsad.sim.results import ResultsError, differences
from tsad.sim.rollout import noise_seed

Floats = NDArray[np.float32]

FORMAT = "tsad-collection"
FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 kept the denoising as well
FACTS_FILE = "collection.json"
# The house's split: these seeds to collect and to search, 10,000 to 19,999 to choose, 100,000 and
# up for reports.
SEEDS = range(10_000)


@dataclass(frozen=True)
class Recorded:
    """One episode of C successive chunks: float32 ``obs`` (C, n_obs_steps, obs_dim), raw units.

    ``number`` fixes the noise that its chunks are run with; ``simulated`` says that it is the seed
    of a simulator's episode.
    """

    number: int
    obs: Floats
    simulated: bool = False

    @property
    def name(self) -> int | str:
        """What tells it from other episodes: its seed, or a hash of what was seen."""
        if self.simulated:
            return self.number
        return hashlib.sha256(np.ascontiguousarray(self.obs).tobytes()).hexdigest()[:16]

    def noise(self, policy: Any, part: slice = slice(None)) -> Floats:
        """(C, K, horizon, action_dim), float32: of the chunks of a part, as a lane draws it.

        `tsad.sim.rollouts` gives a lane the same in the episode of this seed. Zeros after the
        initial sample if the policy's sampler adds none.
        """
        sampler = make_sampler(policy.config["scheduler"])
        begin, end, _ = part.indices(len(self.obs))
        shape = (len(sampler.timesteps), policy.horizon, policy.action_dim)
        noise = np.zeros((end - begin, *shape), np.float32)
        generator = np.random.Generator(np.random.PCG64(noise_seed(self.number)))
        for chunk in range(end):
            drawn = shape if sampler.adds_noise else (1, *shape[1:])
            z = generator.standard_normal(drawn, np.float32)
            if chunk >= begin:
                noise[chunk - begin, : len(z)] = z
        return noise


def names_of(episodes: Sequence[Recorded]) -> list[int | str]:
    """The names of the episodes, each once: what else was made of them can be looked up."""
    return sorted({episode.name for episode in episodes}, key=lambda name: (str(type(name)), name))


def denoising_inputs(policy: Any, obs: Floats, noise: Floats) -> Floats:
    """(C, K, horizon, action_dim): the normalised sample that enters each step of dense chunks.

    ``obs`` (C, n_obs_steps, obs_dim), ``noise`` (C, K, horizon, action_dim). It asks
    ``policy.predict_noise`` step by step and runs the sampler's table in float32; the policy's
    lanes, plan and streams stay as they are.
    """
    table = make_sampler(policy.config["scheduler"]).table.astype(np.float32)
    inputs, x = np.empty_like(noise), noise[:, 0]
    before = (np.zeros_like(x), np.zeros_like(x))
    for k, row in enumerate(table):
        inputs[:, k] = x
        e = policy.predict_noise(np.ascontiguousarray(x), k, obs)
        x, before = advance(row, x, e, before)
        if k + 1 < len(table):
            x = x + row[NOISE] * noise[:, k + 1]
    return inputs


def pick(
    episodes: Sequence[Recorded], chunks: int, length: int, seed: int
) -> list[tuple[Recorded, slice]]:
    """Windows of up to ``length`` consecutive chunks, spread over the episodes, none twice.

    As many as it takes for ``chunks``, or all there are.
    """
    rng = np.random.default_rng(seed)
    found = []
    for episode in episodes:
        begins = np.arange(0, max(len(episode.obs) - length, 0) + 1, length)
        order = rng.permutation(begins).tolist()
        found += [(turn, rng.random(), episode, begin) for turn, begin in enumerate(order)]
    found.sort(key=lambda item: item[:2])
    windows, total = [], 0
    for _, _, episode, begin in found:
        if total >= chunks:
            break
        windows.append((episode, slice(begin, begin + length)))
        total += len(episode.obs[begin : begin + length])
    return windows


# ---- the folder


def episode_path(folder: Path, number: int) -> Path:
    """The file of a finished episode."""
    return folder / f"episode-{number:05d}.npz"


def part_path(folder: Path, number: int) -> Path:
    """The file of an episode that is being recorded, or was when its program died."""
    return folder / f"episode-{number:05d}.part"


def open_collection(folder: Path, settings: Mapping[str, Any]) -> list[int]:
    """Make the folder, or go on with it if it was made with these settings; the numbers it has.

    Raises:
        ResultsError: it holds something else, or other settings; the message names each.
    """
    facts = output_folder(folder) / FACTS_FILE
    if facts.exists():
        changed = differences(_read_facts(folder)["settings"], settings)
        if changed:
            raise ResultsError(
                f"{folder} was made with other settings; {'; '.join(changed)}; fix: use its "
                "settings, or another folder"
            )
        return sorted(numbers(folder, "npz"))
    if folder.exists() and any(folder.iterdir()):
        raise ResultsError(f"{folder} is not empty and holds no collection; name another folder")
    make_folder(folder)
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": dict(settings)}
    write_json(facts, header)
    return []


def save_episode(folder: Path, number: int, obs: Floats, actions: Floats, **facts: Any) -> None:
    """Write one episode, whole or not at all; `facts` are kept beside the arrays."""
    arrays = {"obs": obs, "actions": actions, **facts}
    write_atomically(episode_path(folder, number), lambda stream: np.savez(stream, **arrays))


def numbers(folder: Path, kind: str) -> set[int]:
    """The episodes that have a file of the kind: "npz" finished, "part" not."""
    found = (re.fullmatch(rf"episode-(\d{{5,9}})\.{kind}", path.name) for path in folder.iterdir())
    return {int(name[1]) for name in found if name}


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS_FILE
    try:
        content: dict[str, Any] = read_any_json(path)
        if content["format"] != FORMAT or content["format_version"] not in READABLE:
            raise ValueError(f"format {content['format']!r} {content['format_version']!r}")
        if not isinstance(content["settings"], dict):
            raise ValueError("its settings are no JSON object")
    except FileNotFoundError:
        raise ResultsError(
            f"{folder}: no {FACTS_FILE} in it; expected a folder made by 'tsad collect' or "
            "tsad.Recorder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path}: not a collection of this version ({error})") from error
    return content


def read_collection(folder: Path) -> tuple[dict[str, Any], list[Recorded]]:
    """Settings, and the episodes in the order of their numbers.

    Raises:
        ResultsError: it is not a collection, or is empty or broken.
    """
    settings = _read_facts(folder)["settings"]
    finished = numbers(folder, "npz")
    seen = {
        number: _checked(read_episode(folder, number, "obs"), episode_path(folder, number))
        for number in finished
    }
    for number in numbers(folder, "part") - finished:
        path = part_path(folder, number)
        rows = read_part(path)
        if rows is not None:
            seen[number] = _checked(np.ascontiguousarray(rows["obs"]), path)
    if not seen:
        raise ResultsError(f"{folder}: no episodes in it; record some")
    return settings, [Recorded(n, seen[n], "simulator" in settings) for n in sorted(seen)]


def _checked(obs: NDArray[Any], path: Path) -> NDArray[Any]:
    if obs.ndim != 3 or not obs.size or obs.dtype.kind != "f" or not np.isfinite(obs).all():
        raise ResultsError(
            f"{path}: obs: expected finite numbers (C, n_obs_steps, obs_dim), got {obs.dtype} of "
            f"shape {obs.shape}; delete it, collect again"
        )
    return obs


def has_actions(folder: Path, number: int) -> bool:
    """Whether a finished episode is there, which has what was executed; not of plain arrays."""
    return episode_path(folder, number).is_file() and (folder / FACTS_FILE).is_file()


def read_episode(folder: Path, number: int, name: str) -> NDArray[Any]:
    """One array of a finished episode; ResultsError if there is none."""
    path = episode_path(folder, number)
    try:
        array = read_npz(path, (name,))[name]
    except (KeyError, ValueError) as error:
        raise ResultsError(f"{path}: broken ({error}); delete it, collect again") from error
    return array


# ---- an episode that is being recorded: a .npy header that says what a chunk is, then the chunks


def part_header(chunk: np.dtype[Any]) -> bytes:
    """The beginning of a part; ``chunk`` has the fields ``obs`` and ``actions``."""
    stream = BytesIO()
    np.save(stream, np.empty(0, chunk))
    return stream.getvalue()


def read_part(path: Path) -> NDArray[Any] | None:
    """The chunks (C,) that are there as a whole, fields ``obs`` and ``actions``; None of none."""
    try:
        with path.open("rb") as stream:
            chunk = np.lib.format.read_array(stream, allow_pickle=False).dtype
            content = stream.read()
        if not {"obs", "actions"} <= set(chunk.names or ()) or not chunk.itemsize:
            raise ValueError("no chunks")
    except FileNotFoundError:  # just finished
        return None
    except Exception:  # not even begun; NumPy raises errors of many kinds
        return None
    whole = len(content) // chunk.itemsize
    return np.frombuffer(content, chunk, whole) if whole else None
