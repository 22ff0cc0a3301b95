"""Real checkpoint files for tests, written by torch.save with dill and OmegaConf."""

from __future__ import annotations

import copy
import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

from tsad.config import network_shapes
from tsad.convert import read_checkpoint

LOWDIM = (
    "diffusion_policy.policy.diffusion_transformer_lowdim_policy.DiffusionTransformerLowdimPolicy"
)
HYBRID = (
    "diffusion_policy.policy.diffusion_transformer_hybrid_image_policy."
    "DiffusionTransformerHybridImagePolicy"
)
DDPM = {
    "_target_": "diffusers.schedulers.scheduling_ddpm.DDPMScheduler",
    "num_train_timesteps": 100,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "variance_type": "fixed_small",
    "clip_sample": True,
    "prediction_type": "epsilon",
}
NETWORK = cases.NETWORKS["tiny"]


def lowdim_config(**network: Any) -> dict[str, Any]:
    """Settings of a low-dimensional run with the interpolations that Diffusion Policy uses."""
    net = NETWORK | network
    return {
        "name": "train_diffusion_transformer_lowdim",
        "horizon": net["horizon"],
        "n_obs_steps": net["n_obs_steps"],
        "n_action_steps": net["n_action_steps"],
        "n_latency_steps": 0,
        "obs_as_cond": True,
        "task": {"name": "toy_lowdim", "obs_dim": net["obs_dim"], "action_dim": net["action_dim"]},
        "obs_dim": "${task.obs_dim}",
        "policy": {
            "_target_": LOWDIM,
            "model": {
                "_target_": "diffusion_policy.model.diffusion.transformer_for_diffusion."
                "TransformerForDiffusion",
                "input_dim": "${eval:'${task.action_dim} if ${obs_as_cond} else 0'}",
                "output_dim": "${policy.model.input_dim}",
                "horizon": "${horizon}",
                "n_obs_steps": "${n_obs_steps}",
                "cond_dim": net["obs_dim"],
                "n_layer": net["n_layer"],
                "n_head": net["n_head"],
                "n_emb": net["n_emb"],
                "p_drop_emb": 0.0,
                "p_drop_attn": 0.01,
                "causal_attn": net["causal_attn"],
                "time_as_cond": True,
                "obs_as_cond": "${obs_as_cond}",
                "n_cond_layers": net["n_cond_layers"],
            },
            "noise_scheduler": copy.deepcopy(DDPM),
            "horizon": "${horizon}",
            "obs_dim": "${obs_dim}",
            "action_dim": "${task.action_dim}",
            "n_action_steps": "${eval:'${n_action_steps}+${n_latency_steps}'}",
            "n_obs_steps": "${n_obs_steps}",
            "num_inference_steps": 100,
            "obs_as_cond": "${obs_as_cond}",
            "pred_action_steps_only": False,
        },
        "training": {"use_ema": True, "device": "cuda:0", "max_train_steps": None},
        "optimizer": {"betas": [0.9, 0.95]},
        "logging": {"name": "${now:%H.%M}_${name}"},
    }


def hybrid_config() -> dict[str, Any]:
    """Settings of an image run: the policy makes its own network and encoder."""
    config = lowdim_config()
    policy = config["policy"]
    for key in ("obs_dim", "action_dim"):
        del policy[key]
    model = policy.pop("model")
    keep = ("n_layer", "n_head", "n_emb", "causal_attn", "n_cond_layers", "time_as_cond")
    policy |= {key: model[key] for key in keep}
    policy |= {
        "_target_": HYBRID,
        "crop_shape": [76, 76],
        "obs_encoder_group_norm": True,
        "eval_fixed_crop": True,
        "p_drop_attn": 0.3,
        "shape_meta": {
            "obs": {"agentview_image": {"shape": [3, 84, 84], "type": "rgb"}},
            "action": {"shape": [NETWORK["action_dim"]]},
        },
        "noise_scheduler": {
            "_target_": "diffusers.DDIMScheduler",
            "num_train_timesteps": 100,
            "beta_schedule": "squaredcos_cap_v2",
            "set_alpha_to_one": True,
            "steps_offset": 0,
        },
        "num_inference_steps": 8,
    }
    return config


def masks(network: dict[str, Any]) -> dict[str, np.ndarray]:
    """The buffers of the causal network, as it registers them."""
    steps = np.arange(network["horizon"])[:, None]
    memory = np.arange(1 + network["n_obs_steps"])
    blocked = np.float32(-np.inf)
    return {
        "mask": np.where(steps >= steps.T, np.float32(0), blocked),
        "memory_mask": np.where(steps >= memory - 1, np.float32(0), blocked),
    }


def state_dict(seed: int, *, hybrid: bool = False, **network: Any) -> tuple[Any, dict[str, Any]]:
    """A policy's state dict of torch tensors, and the same numbers as arrays by full name."""
    torch = pytest.importorskip("torch")
    net = NETWORK | network
    arrays: dict[str, np.ndarray] = {"_dummy_variable": np.zeros(0, np.float32)}
    rng = np.random.default_rng(seed)
    if hybrid:
        arrays["obs_encoder.obs_nets.agentview_image.nets.0.weight"] = rng.random(
            (7, 3), np.float32
        )
    for name, value in cases.random_tensors(net, seed).items():
        arrays[f"model.{name}"] = value
    if net["causal_attn"]:
        arrays |= {f"model.{name}": value for name, value in masks(net).items()}
    arrays["model._dummy_variable"] = np.zeros(0, np.float32)
    keys = {"action": net["action_dim"]}
    keys |= {"agentview_image": 1} if hybrid else {"obs": net["obs_dim"]}
    for key, dim in keys.items():
        prefix = f"normalizer.params_dict.{key}"
        arrays[f"{prefix}.scale"] = rng.uniform(0.5, 2, dim).astype(np.float32)
        arrays[f"{prefix}.offset"] = rng.uniform(-1, 1, dim).astype(np.float32)
        arrays[f"{prefix}.input_stats.min"] = np.zeros(dim, np.float32)
    state = OrderedDict((name, torch.from_numpy(value.copy())) for name, value in arrays.items())
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    return state, arrays


def payload(config: Any = None, *, hybrid: bool = False, **network: Any) -> dict[str, Any]:
    """What a Diffusion Policy workspace saves: EMA weights of seed 1, raw ones of seed 2."""
    dill = pytest.importorskip("dill")
    omegaconf = pytest.importorskip("omegaconf")
    if config is None:
        config = hybrid_config() if hybrid else lowdim_config(**network)
    return {
        "cfg": omegaconf.OmegaConf.create(config) if isinstance(config, dict) else config,
        "state_dicts": {
            "model": state_dict(2, hybrid=hybrid, **network)[0],
            "ema_model": state_dict(1, hybrid=hybrid, **network)[0],
            "optimizer": {
                "state": {0: {"step": 3, "exp_avg": None}},
                "param_groups": [{"lr": 1e-4}],
            },
        },
        "pickles": {"global_step": dill.dumps(10), "epoch": dill.dumps(print)},
    }


def save(path: Path, value: Any, **options: Any) -> Path:
    """``torch.save`` with dill, as Diffusion Policy calls it."""
    torch = pytest.importorskip("torch")
    torch.save(value, path, pickle_module=pytest.importorskip("dill"), **options)
    return path


def check_weights(path: Path, seed: int = 1) -> None:
    """The network's numbers in a file are those of ``state_dict(seed)``."""
    tensors = read_checkpoint(path).tensors
    _, arrays = state_dict(seed)
    assert set(tensors) == set(network_shapes(NETWORK))
    for name, value in tensors.items():
        np.testing.assert_array_equal(value, arrays[f"model.{name}"], err_msg=name)


def rewrite(path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """Edits the entries of a zip file in place; they stay uncompressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    change(entries)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    path.write_bytes(buffer.getvalue())
    return path


def with_pickle(path: Path, content: bytes) -> Path:
    """A torch file around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path
