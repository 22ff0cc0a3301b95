"""Every loader of tsad as a function of the bytes of a file.

A loader takes a file, or raises one of the documented errors, which names it; anything else is a
finding: another exception, a hang, a gigabyte of memory. `check` runs one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tsad import Plan
from tsad.checkpoint import read_json, read_safetensors
from tsad.commands.common import UsageError
from tsad.config import NetworkConfig, PolicyConfig
from tsad.convert import read_checkpoint, read_lerobot_folder, read_pruner
from tsad.convert.settings import Settings
from tsad.evaluation import sweep
from tsad.planners.effects import Effects
from tsad.planners.files import import_plan
from tsad.presets import read_presets
from tsad.sim import demonstrations, recording, results
from tsad.training import data as training

ERRORS = (ValueError, FileNotFoundError, UsageError)

STEPS, BLOCKS = 4, 3
POLICY: Any = SimpleNamespace(
    num_inference_steps=STEPS,
    blocks=["layers.0.self_attn", "layers.0.cross_attn", "layers.0.feed_forward"],
    block_types=["self_attn", "cross_attn", "feed_forward"],
    block_costs=np.array([3, 1, 2]),
)
NETWORK = {
    "horizon": 2,
    "n_obs_steps": 1,
    "n_action_steps": 2,
    "obs_dim": 1,
    "action_dim": 1,
    "n_layer": 1,
    "n_head": 1,
    "n_emb": 4,
}
RUN = {"first_seed": 0}


def checkpoint(path: Path) -> None:
    converted = read_checkpoint(path)
    assert all(np.isfinite(value).all() for value in converted.tensors.values())
    PolicyConfig.from_dict(converted.config.to_dict())


def pruner(path: Path) -> None:
    read_pruner(path, NetworkConfig.from_dict(NETWORK))


def settings(path: Path) -> None:
    """Not a file of its own: a tree of settings, every value of which is asked for."""
    tree = read_json(path)
    found = Settings(tree, str(path))
    pending = [""]
    for _ in range(200):
        if not pending:
            break
        prefix = pending.pop()
        for key in (found.keys(prefix) if prefix else list(tree))[:50]:
            name = f"{prefix}.{key}" if prefix else key
            try:
                if isinstance(found.get(name), dict):
                    pending.append(name)
            except ValueError as error:
                assert str(path) in str(error)


def config(path: Path) -> None:
    found = PolicyConfig.from_dict(read_json(path), file=str(path))
    assert PolicyConfig.from_dict(found.to_dict()) == found


def safetensors(path: Path) -> None:
    for value in read_safetensors(path).values():
        assert value.dtype == np.float32 and np.isfinite(value).all()


def plan(path: Path) -> None:
    found = Plan.load(path)
    str(found)
    repr(found)
    assert 0 <= found.sparsity <= 1


def schedule(path: Path) -> None:
    import_plan(POLICY, path)


def presets(path: Path) -> None:
    for preset in read_presets(path.parent).values():
        preset.words()
        preset.to_dict()
        if preset.plan is not None:
            try:
                preset.load_plan()
            except ERRORS as error:
                assert preset.plan.name in str(error)


def sweep_settings(path: Path) -> None:
    sweep.read_settings(str(path))


def effects(path: Path) -> None:
    found = Effects.load(path)
    found.losses()
    found.late()


def eval_results(path: Path) -> None:
    header, episodes = results.read_results(path)
    results.differences(header, {})
    if episodes:
        results.summarise(episodes)


def eval_partial(path: Path) -> None:
    results.recorded_settings(path.with_suffix(""))


def collection(path: Path) -> None:
    recording.save_episode(path.parent, 0, np.zeros((1, 1, 1)), np.zeros((1, 1, 1)))
    found, _ = recording.read_collection(path.parent)
    results.differences(found, {})


def episode(path: Path) -> None:
    recording.read_collection(path.parent)


def generated(path: Path) -> None:
    demonstrations.Record(path, RUN, resume=True)


def demonstrated(path: Path) -> None:
    training.load_demonstrations(path)


def keypoints(path: Path) -> None:
    training.local_keypoints(path)


def lerobot(path: Path) -> None:
    converted = read_lerobot_folder(path.parent)
    PolicyConfig.from_dict(converted.config.to_dict())


@dataclass(frozen=True)
class Target:
    """A loader, the name that its file needs, and what else its folder needs."""

    load: Callable[[Path], None]
    file: str
    beside: Mapping[str, bytes] = field(default_factory=dict)


def lerobot_files() -> dict[str, bytes]:
    """A small policy of LeRobot, from the fixtures of the tests."""
    folder = Path(__file__).parents[1] / "fixtures" / "lerobot" / "ddim_sample_bias_k3_half"
    names = ("config.json", "model.safetensors", *(p.name for p in folder.glob("policy_*")))
    return {name: (folder / name).read_bytes() for name in names}


LEROBOT = lerobot_files()
STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"
COLLECTION = b'{"format": "tsad-collection", "format_version": 2, "settings": {}}'
TARGETS: dict[str, Target] = {
    "checkpoint": Target(checkpoint, "x.ckpt"),
    "pruner": Target(pruner, "x.pt"),
    "settings": Target(settings, "x.cfg"),
    "config": Target(config, "config.json"),
    "safetensors": Target(safetensors, "model.safetensors"),
    "plan": Target(plan, "plan.npz"),
    "schedule-json": Target(schedule, "schedule.json"),
    "schedule-text": Target(schedule, "schedule.txt"),
    "schedule-npy": Target(schedule, "schedule.npy"),
    "presets": Target(presets, "presets.json"),
    "sweep": Target(sweep_settings, "sweep.json"),
    "effects": Target(effects, "effects.npz"),
    "results": Target(eval_results, "results.json"),
    "partial": Target(eval_partial, "results.json.partial"),
    "collection": Target(collection, "collection.json"),
    "episode": Target(episode, "episode-00000.npz", {"collection.json": COLLECTION}),
    "part": Target(episode, "episode-00000.part", {"collection.json": COLLECTION}),
    "generated": Target(generated, "demonstrations.npz"),
    "demonstrations": Target(demonstrated, "demonstrations.npz"),
    "keypoints": Target(keypoints, "keypoints.json"),
    "lerobot": Target(lerobot, "config.json", LEROBOT),
    "lerobot-processor": Target(lerobot, "policy_preprocessor.json", LEROBOT),
    "lerobot-statistics": Target(lerobot, STATISTICS, LEROBOT),
}


def check(name: str, content: bytes, folder: Path) -> str:
    """Loads a file of these bytes; "" or the documented error. AssertionError is a finding too."""
    target = TARGETS[name]
    path = folder / target.file
    for other, file in target.beside.items():
        if not (folder / other).exists():
            (folder / other).write_bytes(file)
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.load(path)
        except ERRORS as error:
            text = str(error)
            assert path.name in text or str(folder) in text, f"no file in {error!r}"
            return text
    return ""
