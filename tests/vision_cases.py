"""Policies that see images, with random weights: LeRobot's folders and Diffusion Policy's files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import checkpoints
import lerobot_cases as lerobot
import numpy as np
import torch
import torch_resnet
from torch_conditional_unet import ConditionalUnet1D

STATE = "observation.state"
STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"
BASE = "ddpm_three_levels"  # what a folder is but for its cameras
ENV = "observation.environment_state"

Encoders = list[torch_resnet.LerobotEncoder]


def lerobot_folder(
    folder: Path,
    cameras: list[str],
    size: tuple[int, int],
    *,
    keypoints: int = 4,
    group: bool = False,
    separate: bool = False,
    mode: str = "MEAN_STD",
    **config: Any,
) -> Encoders:
    """A diffusion policy with these cameras and its encoders, one or one for each.

    ``config``: ``resize_shape``, ``crop_shape``, ``crop_ratio``. `BASE` has state and environment.
    """
    lerobot.copy(BASE, folder)
    shape = {"type": "VISUAL", "shape": [3, *size]}
    data = json.loads((folder / "config.json").read_text())
    inputs = dict.fromkeys(cameras, shape) | data["input_features"]
    settings = {
        "input_features": inputs,
        "spatial_softmax_num_keypoints": keypoints,
        "use_group_norm": group,
        "use_separate_rgb_encoder_per_camera": separate,
        "vision_backbone": "resnet18",
        "resize_shape": None,
        "crop_shape": None,
        "crop_ratio": 1.0,
    } | config
    lerobot.edit_json(folder / "config.json", **settings)
    encoders = [
        torch_resnet.randomise(
            torch_resnet.LerobotEncoder(seen(size, settings), keypoints, 18, group), 10 + i
        )
        for i in range(len(cameras) if separate else 1)
    ]
    values = lerobot.tensors(folder)
    rng = np.random.default_rng(2)
    for name, value in values.items():
        if name.endswith("cond_encoder.1.weight"):
            steps, extra = data["n_obs_steps"], 2 * keypoints * len(cameras)
            more = rng.normal(0, 0.3, (len(value), steps * extra)).astype(np.float32)
            values[name] = np.concatenate([value, more], 1)
    for i, encoder in enumerate(encoders):
        start = f"diffusion.rgb_encoder.{i}." if separate else "diffusion.rgb_encoder."
        values |= {f"{start}{k}": v.numpy() for k, v in encoder.state_dict().items()}
    lerobot.save(folder, values)
    processor = folder / "policy_preprocessor.json"
    data = json.loads(processor.read_text())
    step = next(s for s in data["steps"] if s["registry_name"] == "normalizer_processor")
    step["config"]["features"] |= dict.fromkeys(cameras, shape)
    step["config"]["norm_map"]["VISUAL"] = mode
    processor.write_text(json.dumps(data))
    statistics = lerobot.tensors(folder, STATISTICS)
    for name in cameras:
        low, high = rng.uniform(0, 0.1, (3, 1, 1)), rng.uniform(0.8, 1, (3, 1, 1))
        mean, std = rng.uniform(0.3, 0.6, (3, 1, 1)), rng.uniform(0.1, 0.3, (3, 1, 1))
        for key, value in {"min": low, "max": high, "mean": mean, "std": std}.items():
            statistics[f"{name}.{key}"] = value.astype(np.float32)
    lerobot.save(folder, statistics, STATISTICS)
    return encoders


IMAGE = "observation.image"


def pusht_folder(folder: Path) -> None:
    """A policy for gym-pusht's ``pixels_agent_pos``, whose actions are places on its table."""
    lerobot_folder(folder, [IMAGE], (96, 96), group=True)
    data = json.loads((folder / "config.json").read_text())
    inputs = {IMAGE: data["input_features"][IMAGE], STATE: {"type": "STATE", "shape": [2]}}
    lerobot.edit_json(folder / "config.json", input_features=inputs)
    columns = data["diffusion_step_embed_dim"] + data["n_obs_steps"] * (2 + 2 * 4)
    values = lerobot.tensors(folder)
    for name, value in values.items():
        if name.endswith("cond_encoder.1.weight"):
            values[name] = np.ascontiguousarray(value[:, :columns])
    lerobot.save(folder, values)
    for path in folder.glob("policy_*.json"):
        processor = json.loads(path.read_text())
        for step in processor["steps"]:
            features = step["config"].get("features", {})
            features.pop(ENV, None)
            if STATE in features:
                features[STATE]["shape"] = [2]
        path.write_text(json.dumps(processor))
    for path in folder.glob("policy_*.safetensors"):
        kept = lerobot.tensors(folder, path.name)
        for name in (STATE, "action"):
            kept |= {
                f"{name}.min": np.zeros(2, np.float32),
                f"{name}.max": np.full(2, 512, np.float32),
            }
        known = {k: v for k, v in kept.items() if not k.startswith((ENV, f"{STATE}."))}
        known |= {k: v[:2] for k, v in kept.items() if k.startswith(f"{STATE}.")}
        lerobot.save(folder, known, path.name)


def seen(size: tuple[int, int], settings: dict[str, Any]) -> tuple[int, int]:
    """Height and width of what the ResNet sees, by LeRobot's configuration."""
    resize, crop, ratio = (settings[k] for k in ("resize_shape", "crop_shape", "crop_ratio"))
    if resize is None:
        return tuple(crop or size)
    return (int(resize[0] * ratio), int(resize[1] * ratio)) if ratio < 1 else tuple(resize)


def lerobot_features(folder: Path, encoders: Encoders, images: dict[str, Any]) -> dict[str, Any]:
    """What LeRobot makes of uint8 images (..., H, W, 3) by camera, in float64."""
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "policy_preprocessor.json").read_text())
    step = next(s for s in processor["steps"] if s["registry_name"] == "normalizer_processor")
    mode = step["config"]["norm_map"]["VISUAL"]
    statistics = lerobot.tensors(folder, STATISTICS)
    found = {}
    for i, (name, image) in enumerate(images.items()):
        x = torch.from_numpy(image).double().movedim(-1, -3) / 255
        s = {
            k: torch.from_numpy(statistics[f"{name}.{k}"]).double()
            for k in ("min", "max", "mean", "std")
        }
        if mode == "MEAN_STD":
            x = (x - s["mean"]) / (s["std"] + 1e-8)
        elif mode == "MIN_MAX":
            x = 2 * (x - s["min"]) / (s["max"] - s["min"]) - 1
        resize = config["resize_shape"]
        crop = seen(image.shape[-3:-1], config)
        flat = torch_resnet.seen(x.flatten(0, -4), resize and tuple(resize), crop)
        encoder = copy.deepcopy(encoders[i if len(encoders) > 1 else 0]).double()
        with torch.no_grad():
            found[name] = encoder(flat).numpy().reshape(*image.shape[:-3], -1)
    return found


def images(cameras: list[str], *shape: int, seed: int = 0) -> dict[str, Any]:
    """Random uint8 (*shape, 3) of each."""
    rng = np.random.default_rng(seed)
    return {name: torch_resnet.images(rng, *shape) for name in cameras}


# Diffusion Policy

SHAPE_META = {
    "agentview_image": {"shape": [3, 44, 52], "type": "rgb"},
    "robot0_eef_pos": {"shape": [3]},
    "robot0_eye_in_hand_image": {"shape": [3, 44, 52], "type": "rgb"},
    "robot0_gripper_qpos": {"shape": [2], "type": "low_dim"},
}
CROP, DIM = (40, 47), 6


def add_encoder(state: dict[str, Any], *, group: bool = True, temperature: float = 1.0) -> Any:
    """Puts robomimic's encoder of `SHAPE_META` and its normaliser into a state dict."""
    cores = {}
    rng = np.random.default_rng(6)
    for i, (key, meta) in enumerate(SHAPE_META.items()):
        if meta.get("type") == "rgb":
            core = torch_resnet.VisualCore(CROP, 4, DIM, group, temperature)
            cores[key] = torch_resnet.randomise(core, 20 + i)
            start = f"obs_encoder.obs_nets.{key}."
            state |= {f"{start}{name}": value for name, value in core.state_dict().items()}
        dim = 1 if key in cores else meta["shape"][0]
        scale = np.full(1, 2.0) if key in cores else rng.uniform(0.5, 2, dim)
        offset = np.full(1, -1.0) if key in cores else rng.uniform(-1, 1, dim)
        start = f"normalizer.params_dict.{key}."
        state[f"{start}scale"] = torch.from_numpy(scale.astype(np.float32))
        state[f"{start}offset"] = torch.from_numpy(offset.astype(np.float32))
    return cores


def hybrid_settings(policy: dict[str, Any], **changes: Any) -> None:
    """Makes the settings of a hybrid image policy those of the encoder."""
    policy |= {"crop_shape": list(CROP), "obs_encoder_group_norm": True, "eval_fixed_crop": True}
    policy["shape_meta"] = {"obs": copy.deepcopy(SHAPE_META)} | {
        k: v for k, v in policy["shape_meta"].items() if k != "obs"
    }
    policy |= changes


OBS_DIM = 2 * DIM + 5


def transformer_checkpoint(
    path: Path, own: dict[str, Any] | None = None, **changes: Any
) -> tuple[Path, Any, dict[str, Any]]:
    """A hybrid transformer's ``.ckpt``; its encoders by camera, and its state dict.

    ``own``: the encoder's weights, by robomimic's names, in the place of the cores'.
    """
    config = checkpoints.hybrid_config()
    hybrid_settings(config["policy"], **changes)
    payload = checkpoints.payload(config, hybrid=True, obs_dim=OBS_DIM)
    state = payload["state_dicts"]["ema_model"]
    for name in [
        n for n in state if n.startswith(("obs_encoder.", "normalizer.params_dict.agent"))
    ]:
        del state[name]
    group = bool(config["policy"]["obs_encoder_group_norm"])
    cores = add_encoder(state, group=group, temperature=1.5 if own is None else 1.0)
    shared = {id(value): torch.from_numpy(value) for value in (own or {}).values()}
    state |= {f"obs_encoder.{name}": shared[id(value)] for name, value in (own or {}).items()}
    del payload["state_dicts"]["model"]
    return checkpoints.save(path, payload), cores, state


def unet_checkpoint(path: Path) -> tuple[Path, Any, dict[str, Any]]:
    """A hybrid UNet's."""
    shape = {"diffusion_step_embed_dim": 16, "down_dims": [16, 24], "cond_predict_scale": True}
    config = checkpoints.hybrid_config() | {"horizon": 8}
    policy = config["policy"]
    for key in ("n_layer", "n_head", "n_emb", "causal_attn", "n_cond_layers", "time_as_cond",
                "obs_as_cond", "p_drop_emb", "p_drop_attn"):  # fmt: skip
        policy.pop(key, None)
    policy["_target_"] = (
        policy["_target_"].replace("transformer", "unet").replace("Transformer", "Unet")
    )
    hybrid_settings(policy, obs_encoder_group_norm=False, **shape)
    steps, actions = config["n_obs_steps"], policy["shape_meta"]["action"]["shape"][0]
    torch.manual_seed(4)
    network = ConditionalUnet1D(actions, steps * OBS_DIM, kernel_size=5, n_groups=8, **shape)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    for part in ("scale", "offset"):
        state[f"normalizer.params_dict.action.{part}"] = torch.ones(actions)
    cores = add_encoder(state, group=False)
    payload = checkpoints.payload(config, hybrid=True)
    payload["state_dicts"] = {"ema_model": state}
    return checkpoints.save(path, payload), cores, state


def robomimic_features(cores: Any, state: dict[str, Any], obs: dict[str, Any]) -> Any:
    """What the policy makes of raw observations (..., n_obs_steps, ...), side by side, float64."""
    parts = []
    for key in SHAPE_META:
        scale, offset = (
            state[f"normalizer.params_dict.{key}.{part}"].double() for part in ("scale", "offset")
        )
        x = torch.from_numpy(obs[key]).double()
        if key in cores:
            x = x.movedim(-1, -3) / 255 * scale + offset
            with torch.no_grad():
                core = copy.deepcopy(cores[key]).double()
                y = core(torch_resnet.seen(x.flatten(0, -4), None, CROP))
            parts.append(y.numpy().reshape(*obs[key].shape[:-3], -1))
        else:
            parts.append((x * scale + offset).numpy())
    return np.concatenate(parts, -1)
