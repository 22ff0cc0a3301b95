"""Checkpoints of Diffusion Policy (github.com/real-stanford/diffusion_policy).

A ``.ckpt`` file holds the settings of the run, and for the raw and the averaged (EMA) policy a
state dict with the network, the normaliser and, for image policies, the observation encoder. Two
policies are read: ``DiffusionTransformerLowdimPolicy``, and
``DiffusionTransformerHybridImagePolicy`` without its encoder, so that its observations are the
encoder's output. Also here: pruner checkpoints in the layout that the code of "Test-time Sparsity
for Extreme Fast Action Diffusion" (arXiv 2605.13316) publishes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsad.checkpoint import CheckpointError, Tensors, check_tensors
from tsad.config import (
    NetworkConfig,
    PolicyConfig,
    PrunerConfig,
    network_shapes,
    pruner_shapes,
)
from tsad.convert.settings import Settings, plain
from tsad.convert.torch_file import TensorRef, TorchFile

WEIGHTS = ("ema", "raw")

_LOWDIM = "DiffusionTransformerLowdimPolicy"
_HYBRID = "DiffusionTransformerHybridImagePolicy"
_NETWORK = "TransformerForDiffusion"
_SCHEDULERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpmsolver++",
}
# defaults of the diffusers classes, which differ from those of config.json
_SCHEDULER_DEFAULTS = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
_SCHEDULER_KEYS = {
    "ddpm": ("clip_sample", "clip_sample_range", "variance_type"),
    "ddim": ("clip_sample", "clip_sample_range", "set_alpha_to_one"),
    "dpmsolver++": (),
}
_COMMON_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
# settings with one supported value; anything else in a scheduler is refused by name
_FIXED = {
    "trained_betas": None,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
}
_BUFFERS = ("mask", "memory_mask")
# settings of the policies that training or the encoder needs, or that are read elsewhere
_POLICY_KEYS = frozenset(
    "_target_ _recursive_ _convert_ _partial_ model noise_scheduler horizon obs_dim action_dim "
    "n_action_steps n_obs_steps num_inference_steps obs_as_cond pred_action_steps_only shape_meta "
    "crop_shape obs_encoder_group_norm eval_fixed_crop n_layer n_cond_layers n_head n_emb "
    "p_drop_emb p_drop_attn causal_attn time_as_cond".split()
)


@dataclass
class Converted:
    """A policy out of a foreign checkpoint, and what should be said about it."""

    config: PolicyConfig
    tensors: Tensors
    policy: str
    notes: list[str] = field(default_factory=list)


def read_checkpoint(path: str | os.PathLike[str], *, weights: str = "ema") -> Converted:
    """A Diffusion Policy ``.ckpt`` as configuration and float32 tensors; nothing in it is run.

    ``weights`` is ``"ema"``, the averaged weights that Diffusion Policy evaluates, or ``"raw"``.
    Raises ``FileNotFoundError``, or ``ValueError`` naming file, key or tensor: truncated or foreign
    files, hostile pickles, policies and schedulers that are not supported, tensors that do not fit.
    """
    if weights not in WEIGHTS:
        raise ValueError(f'weights: expected "ema" or "raw", got {weights!r}; choose one of these')
    with TorchFile(path) as checkpoint:
        file = checkpoint.file
        payload = checkpoint.value
        if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= set(payload):
            raise CheckpointError(
                f"{file}: expected a Diffusion Policy checkpoint with 'cfg' and 'state_dicts', got "
                f"{_describe(payload)}; it is another kind of file"
            )
        settings = Settings(plain(payload["cfg"], file), file)
        policy = _policy_class(settings)
        state = _state_dict(payload["state_dicts"], weights, file)
        network = _read_network(settings, policy, state)
        # shapes first: nothing is read for a network that does not fit
        refs = _network_refs(state, network, file)
        tensors = {name: checkpoint.read(ref, f"model.{name}") for name, ref in refs.items()}
        _check_masks(checkpoint, state, network)
        normalizer = _read_normalizer(checkpoint, state, network, policy)
    scheduler = _read_scheduler(settings)
    notes = []
    if policy == _HYBRID:
        notes.append(
            f"the observation encoder stays outside: observations are its output, "
            f"{network.obs_dim} numbers per step"
        )
    config = PolicyConfig.from_dict(
        {
            "format": "tsad",
            "format_version": 1,
            "network": network.to_dict(),
            "scheduler": scheduler,
            "normalizer": normalizer,
            "provenance": {
                "source": os.path.basename(file),
                "kind": "Diffusion Policy checkpoint",
                "policy": policy,
                "weights": weights,
                "task": settings.get("task.name") or settings.get("task_name") or "",
            },
        },
        file=f"{file}: cfg",
    )
    return Converted(config, tensors, policy, notes)


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        names = ", ".join(repr(str(key)[:40]) for key in list(value)[:8])
        return f"a dict of {names or 'nothing'}"
    return f"a {type(value).__name__}"


def _policy_class(settings: Settings) -> str:
    target = str(settings.get("policy._target_", ""))[:200]
    name = target.rpartition(".")[2]
    if name in (_LOWDIM, _HYBRID):
        return name
    reason = "expected one of the transformer policies"
    if "unet" in target.lower():
        reason = "UNet policies are not supported yet; expected one of the transformer policies"
    raise CheckpointError(
        f"{settings.file}: cfg.policy._target_: {reason} {_LOWDIM}, {_HYBRID}, got {target!r}; "
        "train one of these"
    )


def _state_dict(state_dicts: Any, weights: str, file: str) -> dict[str, TensorRef]:
    """Tensors of the chosen policy, ``torch.compile``'s prefix taken off."""
    key = {"ema": "ema_model", "raw": "model"}[weights]
    state = state_dicts.get(key) if isinstance(state_dicts, dict) else None
    if not isinstance(state, dict) or not state:
        other = "raw" if weights == "ema" else "ema"
        raise CheckpointError(
            f"{file}: state_dicts: expected {key!r} for weights={weights!r}, got "
            f'{_describe(state_dicts)}; try weights="{other}"'
        )
    return {
        str(name).replace("_orig_mod.", ""): value
        for name, value in state.items()
        if isinstance(value, TensorRef)
    }


def _read_network(settings: Settings, policy: str, state: dict[str, TensorRef]) -> NetworkConfig:
    get = settings.get
    # the low-dimensional policy is given its network, the image policy makes it
    at = "policy.model" if policy == _LOWDIM else "policy"
    defaults: dict[str, Any] = {"n_layer": 8, "n_head": 4, "n_emb": 256, "causal_attn": True}
    if policy == _LOWDIM:
        defaults = {"n_layer": 12, "n_head": 12, "n_emb": 768, "causal_attn": False}
        target = str(get("policy.model._target_", ""))[:200]
        if target.rpartition(".")[2] != _NETWORK:
            raise CheckpointError(
                f"{settings.file}: cfg.policy.model._target_: expected {_NETWORK}, got {target!r}; "
                "other networks are not supported"
            )
    _check_policy_keys(settings)
    values = {key: get(f"{at}.{key}", default) for key, default in defaults.items()}
    for key in ("horizon", "n_obs_steps", "n_action_steps"):
        values[key] = get(f"policy.{key}")
        if values[key] is None:
            values[key] = get(key)
    values["n_cond_layers"] = get(f"{at}.n_cond_layers", 0)
    values["time_as_cond"] = get(f"{at}.time_as_cond", True)
    values["obs_as_cond"] = get("policy.obs_as_cond", policy == _HYBRID)
    # the width of encoded observations stands nowhere but in the weights
    for key, name in (("obs_dim", "cond_obs_emb"), ("action_dim", "input_emb")):
        ref = state.get(f"model.{name}.weight")
        given = get(f"policy.{key}")
        if given is not None:
            values[key] = given
        elif ref is not None and len(ref.shape) == 2:
            values[key] = ref.shape[1]
        elif values["obs_as_cond"] and values["time_as_cond"]:
            raise CheckpointError(
                f"{settings.file}: model.{name}.weight: expected this tensor, found none; the "
                "file is damaged or holds another network"
            )
        else:
            values[key] = 1  # an unsupported variant, which the next line refuses by its own key
    return NetworkConfig.from_dict(values, file=f"{settings.file}: cfg")


def _check_policy_keys(settings: Settings) -> None:
    if settings.get("policy.pred_action_steps_only", False):
        raise CheckpointError(
            f"{settings.file}: cfg.policy.pred_action_steps_only: expected false, got true; "
            "policies that predict only the executed actions are not supported"
        )
    for key, value in settings.section("policy").items():
        # whatever else the policy is given goes to scheduler.step
        harmless = key == "eta" and value == 0
        if key not in _POLICY_KEYS and not harmless:
            raise CheckpointError(
                f"{settings.file}: cfg.policy.{key[:100]}: expected no such setting, got "
                f"{str(value)[:100]!r}; tsad does not know what it changes"
            )


def _network_refs(
    state: dict[str, TensorRef], network: NetworkConfig, file: str
) -> dict[str, TensorRef]:
    refs = {}
    for name, ref in state.items():
        prefix, _, rest = name.partition(".")
        if prefix == "model" and rest not in (*_BUFFERS, "_dummy_variable"):
            refs[rest] = ref
    check_tensors(refs, network_shapes(network), f"{file}: state dict, model")
    return refs


def _check_masks(
    checkpoint: TorchFile, state: dict[str, TensorRef], network: NetworkConfig
) -> None:
    """The stored masks must be the ones that ``causal_attn`` stands for."""
    steps = np.arange(network.horizon)[:, None]
    visible = {
        "mask": steps >= np.arange(network.horizon),
        "memory_mask": steps >= np.arange(network.n_memory) - 1,
    }
    for name in _BUFFERS:
        ref = state.get(f"model.{name}")
        if ref is None and not network.causal_attn:
            continue
        expected = np.where(visible[name], 0.0, -np.inf)
        right = ref is not None and network.causal_attn and ref.shape == expected.shape
        if ref is not None and right:
            right = np.array_equal(checkpoint.read_mask(ref, name), expected)
        if not right:
            raise CheckpointError(
                f"{checkpoint.file}: model.{name}: expected the mask of causal_attn="
                f"{network.causal_attn}, got {'none' if ref is None else 'another'}; attention "
                "with other masks is not supported"
            )


def _read_normalizer(
    checkpoint: TorchFile, state: dict[str, TensorRef], network: NetworkConfig, policy: str
) -> dict[str, Any]:
    dims = {"obs": network.obs_dim, "action": network.action_dim}
    result: dict[str, Any] = {}
    for key, dim in dims.items():
        if key == "obs" and policy == _HYBRID:  # normalised before the encoder
            result[key] = {"scale": [1.0] * dim, "offset": [0.0] * dim}
            continue
        result[key] = {}
        for part in ("scale", "offset"):
            name = f"normalizer.params_dict.{key}.{part}"
            ref = state.get(name)
            if ref is None or ref.shape not in ((dim,), (1,)):
                raise CheckpointError(
                    f"{checkpoint.file}: {name}: expected a tensor of {dim} numbers, got "
                    f"{'nothing' if ref is None else f'shape {list(ref.shape)}'}; the normaliser "
                    "was not fitted, or the file is damaged"
                )
            numbers = np.broadcast_to(checkpoint.read(ref, name), (dim,))
            result[key][part] = [float(number) for number in numbers]
    return result


def _read_scheduler(settings: Settings) -> dict[str, Any]:
    """The ``scheduler`` object of ``config.json`` from a diffusers class and its arguments."""
    given = settings.section("policy.noise_scheduler")
    target = str(given.pop("_target_", ""))[:200]
    kind = _SCHEDULERS.get(target.rpartition(".")[2])
    where = f"{settings.file}: cfg.policy.noise_scheduler"
    if kind is None:
        raise CheckpointError(
            f"{where}._target_: expected one of {', '.join(_SCHEDULERS)}, got {target!r}; "
            "other schedulers are not supported"
        )
    scheduler: dict[str, Any] = {"type": kind, **_SCHEDULER_DEFAULTS}
    if kind == "dpmsolver++":
        scheduler["timestep_spacing"] = "linspace"
    for key, value in given.items():
        if key in (*_COMMON_KEYS, *_SCHEDULER_KEYS[kind]):
            scheduler[key] = value
        elif key not in ("_recursive_", "_convert_", "_partial_") and (
            key not in _FIXED or value != _FIXED[key]
        ):
            expected = f"{_FIXED[key]!r}" if key in _FIXED else "no such setting"
            raise CheckpointError(
                f"{where}.{key[:100]}: expected {expected}, got {str(value)[:100]!r}; it changes "
                "the denoising loop in a way that is not supported"
            )
    steps = settings.get("policy.num_inference_steps")
    if steps is not None:
        scheduler["num_inference_steps"] = steps
    return scheduler


def read_pruner(
    path: str | os.PathLike[str], network: NetworkConfig, *, n_head: int | None = None
) -> tuple[PrunerConfig, Tensors]:
    """A pruner checkpoint (``.pt``) for a network, as configuration and float32 tensors.

    The file holds ``model_state_dict`` and the sizes, or a bare state dict; a bare one does not say
    its number of heads, which is then ``n_head`` (default 8). Nothing in it is run. Raises
    ``FileNotFoundError``, or ``ValueError`` naming file, key or tensor.
    """
    with TorchFile(path) as checkpoint:
        file = checkpoint.file
        payload = checkpoint.value
        settings: dict[str, Any] = {}
        if isinstance(payload, dict) and isinstance(payload.get("model_state_dict"), dict):
            settings, payload = payload, payload["model_state_dict"]
        refs = {}
        if isinstance(payload, dict):
            names = {str(k).removeprefix("module.").removeprefix("_orig_mod."): k for k in payload}
            refs = {n: payload[k] for n, k in names.items() if isinstance(payload[k], TensorRef)}
        projection = refs.get("memory_proj.weight")
        linear = refs.get("transformer_decoder.layers.0.linear1.weight")
        if projection is None or linear is None or not projection.shape or not linear.shape:
            raise CheckpointError(
                f"{file}: expected the state dict of a pruner (memory_proj, transformer_decoder, "
                f"head), got {_describe(payload)}; it is another kind of file"
            )
        heads = settings.get("attn_heads", 8 if n_head is None else n_head)
        if n_head is not None and heads != n_head:
            raise ValueError(
                f"n_head: expected {heads}, as {file} says, got {n_head}; leave it out"
            )
        sizes = {
            "hidden_dim": settings.get("hidden_dim", projection.shape[0]),
            "n_head": heads,
            "dim_feedforward": settings.get("dim_feedforward", linear.shape[0]),
        }
        pruner = PrunerConfig.from_dict(plain(sizes, file), file=file)
        check_tensors(refs, pruner_shapes(pruner, network), file)
        return pruner, {name: checkpoint.read(ref, name) for name, ref in refs.items()}
