"""Checkpoints of other libraries to the tsad folder.

``convert`` makes a folder of a Diffusion Policy ``.ckpt``, ``convert_pruner`` adds a pruner to a
folder. Neither needs torch, and nothing in a file is run: see ``tsad.convert.pickle_machine``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tsad.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    PRUNER_FILE,
    CheckpointError,
    folder_kind,
    of_training,
    read_folder,
    read_json,
    write_folder,
    write_pruner,
)
from tsad.config import FORMAT, FORMAT_VERSION, PolicyConfig
from tsad.convert.diffusion_policy import Converted, read_checkpoint, read_pruner
from tsad.convert.lerobot import read_lerobot
from tsad.families import as_transformer
from tsad.families import describe as describe_network
from tsad.files import is_temporary, sha256
from tsad.presets import read_presets, stale_note

__all__ = ["Converted", "convert", "convert_pruner", "read_checkpoint", "read_pruner"]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = "auto",
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Converts a Diffusion Policy checkpoint, or LeRobot's folder of one, to a tsad folder.

    ``source`` is a ``.ckpt`` of a low-dimensional or image policy with a transformer or a UNet, or
    the folder of a LeRobot diffusion policy or of a multi_task_dit; ``out`` the folder to write.
    ``weights`` is ``"ema"``, the averaged ones, ``"raw"``, or ``"auto"``, those that the run's own
    evaluation takes; ``dtype`` of the stored numbers is ``"float32"`` or
    ``"float16"``. Returns a summary of JSON values. Raises ``FileExistsError`` if ``out`` is there
    and ``overwrite`` is false or it is no tsad folder, ``FileNotFoundError``, or ``ValueError``
    naming what does not fit; nothing is written then.
    """
    folder = Path(out)
    _check_out(folder, overwrite)
    path = of_training(Path(source))
    if path.is_dir():
        if folder_kind(path) != "lerobot":
            raise _wrong_folder(path)
        converted, read_from = read_lerobot_folder(path), path / MODEL_FILE
    else:
        converted, read_from = read_checkpoint(path, weights=weights), path
    provenance = converted.config.provenance | {"source_sha256": sha256(read_from)}
    config = replace(converted.config, provenance=provenance)
    read_presets(folder)  # a broken file is said before anything is written
    config = write_folder(folder, config, converted.tensors, dtype=dtype)
    converted.notes.extend(stale_note(folder))
    network = config.network
    return {
        "source": str(path),
        "out": str(folder),
        "policy": converted.policy,
        "weights": config.provenance["weights"],
        "network": describe_network(network),
        "horizon": network.horizon,
        "n_obs_steps": network.n_obs_steps,
        "n_action_steps": network.n_action_steps,
        "obs_dim": network.obs_dim,
        "action_dim": network.action_dim,
        "scheduler": config.scheduler.type,
        "num_inference_steps": config.scheduler.num_inference_steps,
        "parameters": int(sum(tensor.size for tensor in converted.tensors.values())),
        "dtype": dtype,
        "bytes": (folder / MODEL_FILE).stat().st_size,
        "sha256": config.provenance["sha256"][MODEL_FILE],
        "notes": converted.notes,
    }


def convert_pruner(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    n_head: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Adds a pruner checkpoint (``.pt`` in the published layout) to an existing tsad folder.

    ``n_head`` is for bare state dicts, which don't say it (default 8). Returns a summary of JSON
    values. Raises ``FileExistsError`` if the folder has a pruner and ``overwrite`` is false,
    ``FileNotFoundError``, or ``ValueError`` naming what does not fit; nothing is written then.
    """
    target = Path(folder)
    config, _, existing = read_folder(target)
    if existing is not None and not overwrite:
        raise FileExistsError(
            f"{target / PRUNER_FILE}: expected no pruner yet, found one; pass overwrite=True"
        )
    pruner, tensors = read_pruner(source, as_transformer(config.network, "pruner"), n_head=n_head)
    provenance = config.provenance | {
        "pruner": {"source": os.path.basename(source), "source_sha256": sha256(source)}
    }
    config = replace(config, pruner=pruner, provenance=provenance)
    config = write_pruner(target, config, tensors, dtype)
    return {
        "source": str(source),
        "out": str(target),
        **pruner.to_dict(),
        "parameters": int(sum(np.size(tensor) for tensor in tensors.values())),
        "dtype": dtype,
        "sha256": config.provenance["sha256"][PRUNER_FILE],
    }


def _check_out(folder: Path, overwrite: bool) -> None:
    if folder.is_dir() and all(is_temporary(file) for file in folder.iterdir()):
        return  # or what a run that was killed left
    if not folder.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{folder}: expected a folder that is new or empty, found something there; choose "
            "another or pass overwrite=True"
        )
    try:
        ours = isinstance(data := read_json(folder / CONFIG_FILE), Mapping)
        ours = ours and data.get("format") == "tsad"
    except (CheckpointError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"{folder}: expected a tsad folder to overwrite, found something else; choose another"
        )


def _wrong_folder(path: Path) -> ValueError:
    kind = folder_kind(path)
    if kind == "tsad":
        return ValueError(f"{path}: expected a checkpoint to convert, got a tsad folder; load it")
    return ValueError(
        f"{path}: expected a Diffusion Policy .ckpt file, got a folder; give the file in it"
    )


def read_lerobot_folder(path: Path) -> Converted:
    """A LeRobot diffusion policy with its image encoders, or the DiT of a multi_task_dit.

    Raises what `read_lerobot` raises. Weights are mapped from the file, not copied, where they are
    float32.
    """
    described = read_lerobot(path)
    data = {"format": FORMAT, "format_version": FORMAT_VERSION} | described.policy
    data |= {
        "features": [feature.to_dict() for feature in described.features],
        "provenance": {"source": path.name, "weights": "lerobot"},
    }
    if described.vision is not None:
        data["vision"] = described.vision.to_dict()
    config = PolicyConfig.from_dict(data, file=str(path / CONFIG_FILE))
    tensors = {k: np.ascontiguousarray(v, np.float32) for k, v in described.tensors.items()}
    return Converted(
        config, tensors, policy=f"LeRobot {described.config['type']}", notes=described.notes
    )
