"""The LeRobot policies that ``fixtures/lerobot/make.py`` recorded, and folders made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tsad.convert.lerobot import Description, read_lerobot

FOLDER = Path(__file__).parent / "fixtures" / "lerobot"
CASES = sorted(path.name for path in FOLDER.iterdir() if (path / "case.json").exists())
DIT_CASES = sorted(  # of make_dit.py; names are relative to FOLDER
    f"../lerobot_dit/{path.parent.name}" for path in FOLDER.glob("../lerobot_dit/*/case.json")
)
EPISODES = [name for name in CASES if "episode/action" in np.load(FOLDER / name / "expected.npz")]
# of LeRobot's own float32 distance from the same policy in float64
TOLERANCE = 4.0


def expected(name: str) -> dict[str, NDArray[Any]]:
    """The recorded arrays of a case."""
    with np.load(FOLDER / name / "expected.npz") as arrays:
        return dict(arrays)


def float32_error(name: str, what: str) -> float:
    """How far LeRobot's float32 result was from the float64 one."""
    return float(json.loads((FOLDER / name / "case.json").read_text())["float32_error"][what])


def copy(name: str, folder: Path) -> Path:
    """A LeRobot folder of one's own to change."""
    files = [
        "config.json",
        "model.safetensors",
        *(f.name for f in (FOLDER / name).glob("policy_*")),
    ]
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(FOLDER / name / file, folder / file)
    return folder


def edit_json(path: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; None as ``...`` takes one out."""
    data = json.loads(path.read_text())
    for key, value in keys.items():
        data.pop(key) if value is ... else data.update({key: value})
    path.write_text(json.dumps(data))


def tensors(folder: Path, file: str = "model.safetensors") -> dict[str, NDArray[Any]]:
    """The tensors of a file, by safetensors' own reader."""
    return safetensors.numpy.load_file(folder / file)


def save(folder: Path, values: Mapping[str, NDArray[Any]], file: str = "model.safetensors") -> None:
    """Writes a file by safetensors' own writer."""
    safetensors.numpy.save_file(dict(values), folder / file)


def side_by_side(description: Description, raw: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Observations (..., obs_dim) of LeRobot's features (..., dim)."""
    return np.concatenate([raw[feature.name] for feature in description.features], -1)


def all_noise(arrays: Mapping[str, NDArray[Any]], prefix: str, steps: int) -> NDArray[np.float32]:
    """Noise (K, B, T, A): the first sample, then what DDPM adds (not after the last step)."""
    first = arrays[f"{prefix}/noise"]
    noise = np.zeros((steps, *first.shape), np.float32)
    noise[0] = first
    if f"{prefix}/step_noise" in arrays:
        added = arrays[f"{prefix}/step_noise"]
        noise[1 : 1 + len(added)] = added
    return noise


def load(name: str) -> tuple[Description, dict[str, Any], dict[str, Any]]:
    """A recorded policy, its weights in float64, and what LeRobot computed."""
    described = read_lerobot(FOLDER / name)
    w = {key: value.astype(np.float64) for key, value in described.tensors.items()}
    return described, w, expected(name)


def condition(family: Any, described: Description, w: Any, t: Any, cond: Any) -> Any:
    network = described.policy["network"]
    obs = cond.astype(np.float64).reshape(*cond.shape[:-1], network["n_obs_steps"], -1)
    return family.encode(w, network, t, obs)


def within(name: str, what: str, got: Any, expected: Any) -> None:
    bound = TOLERANCE * float32_error(name, what)
    assert np.abs(got - expected).max() <= bound
