"""Checkpoints of Diffusion Policy (github.com/real-stanford/diffusion_policy).

A ``.ckpt`` file holds the settings of the run, and for the raw and the averaged (EMA) policy a
state dict with the network, the normaliser and, for image policies, the observation encoder. Read
are ``DiffusionTransformerLowdimPolicy`` and ``DiffusionUnetLowdimPolicy``;
``DiffusionTransformerHybridImagePolicy`` and ``DiffusionUnetHybridImagePolicy`` with robomimic's
encoder (`tsad.convert.robomimic`); and, so that their observations are its output, those with
another encoder and ``DiffusionUnetImagePolicy`` (UNets: `tsad.convert.unet`).
Also here: pruner checkpoints in the layout that the code of "Test-time Sparsity for Extreme Fast
Action Diffusion" (arXiv 2605.13316) publishes.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tsad.checkpoint import CheckpointError, Tensors, check_tensors
from tsad.config import (
    VISUAL,
    NetworkConfig,
    PolicyConfig,
    PrunerConfig,
    network_shapes,
    pruner_shapes,
)
from tsad.convert import unet
from tsad.convert.pickle_machine import Placeholder
from tsad.convert.robomimic import Encoder, OutsideError
from tsad.convert.settings import Settings, plain
from tsad.convert.torch_file import TensorRef, TorchFile, describe
from tsad.families import Network
from tsad.families.unet1d import Unet1dConfig
from tsad.scope import scope

WEIGHTS = ("auto", "ema", "raw")

_TRANSFORMERS = ("DiffusionTransformerLowdimPolicy", "DiffusionTransformerHybridImagePolicy")
_UNETS = (
    "DiffusionUnetLowdimPolicy",
    "DiffusionUnetHybridImagePolicy",
    "DiffusionUnetImagePolicy",
)
_HYBRID = (_TRANSFORMERS[1], _UNETS[1])
_LOWDIM = (_TRANSFORMERS[0], _UNETS[0])  # their observations are numbers; they are given a network
_TRANSFORMER = "TransformerForDiffusion"
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
_MAX_MEMBERS = 10_000
_MAX_NAME = 500
# what DistributedDataParallel and DataParallel, and torch.compile, put into names
_WRAPPERS = ("module", "_orig_mod")
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


def read_checkpoint(path: str | os.PathLike[str], *, weights: str = "auto") -> Converted:
    """A Diffusion Policy ``.ckpt`` as configuration and float32 tensors; nothing in it is run.

    A checkpoint of a run (``save_checkpoint``), or a snapshot of it (``save_snapshot``).
    ``weights`` is ``"ema"``, the averaged ones, ``"raw"``, or ``"auto"``: those that Diffusion
    Policy evaluates, the averaged ones unless the run was trained with ``use_ema: False``. Raises
    ``FileNotFoundError``, or ``ValueError`` naming file, key or tensor: truncated or foreign files,
    policies and schedulers that are not supported, tensors that do not fit.
    """
    if weights not in WEIGHTS:
        raise ValueError(
            f"weights: expected one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}; choose "
            "one of these"
        )
    with TorchFile(path) as checkpoint:
        file = checkpoint.file
        payload = _of_workspace(checkpoint.value, file)
        if not isinstance(payload, dict) or not {"cfg", "state_dicts"} <= set(payload):
            raise CheckpointError(
                f"{file}: expected a Diffusion Policy checkpoint with 'cfg' and 'state_dicts', got "
                f"{describe(payload)}; it is another kind of file"
            )
        settings = Settings(payload["cfg"], file)
        policy = _policy_class(settings)
        chosen, notes = _choose_weights(payload["state_dicts"], weights, settings)
        state = _state_dict(payload["state_dicts"], chosen, file)
        network = _read_network(settings, policy, state)
        # shapes first: nothing is read for a network that does not fit
        refs = _network_refs(state, network, file)
        tensors = {
            name: checkpoint.read(ref, f"model.{theirs}") for name, (theirs, ref) in refs.items()
        }
        if isinstance(network, NetworkConfig):
            _check_masks(checkpoint, state, network)
        normalizer = _read_normalizer(checkpoint, state, network, policy)
        sight: dict[str, Any] = {}
        if policy in _HYBRID:
            try:
                encoder = Encoder(settings, state, network.obs_dim)
            except (OutsideError, CheckpointError) as reason:  # or settings that can't be told
                notes.append(_outside(network, f" ({reason})"))
            else:
                tensors |= encoder.tensors(checkpoint)
                sight, normalizer["obs"] = _read_sight(checkpoint, state, encoder)
        elif policy not in _LOWDIM:
            notes.append(_outside(network, ""))
    scheduler = _read_scheduler(settings)
    notes += checkpoint.notes
    config = PolicyConfig.from_dict(
        {
            **sight,
            "format": "tsad",
            "format_version": 1,
            "network": network.to_dict(),
            "scheduler": scheduler,
            "normalizer": normalizer,
            "provenance": {
                "source": os.path.basename(file),
                "kind": "Diffusion Policy checkpoint",
                "policy": policy,
                "weights": chosen,
                "task": _task(settings),
            },
        },
        file=f"{file}: cfg",
    )
    return Converted(config, tensors, policy, notes)


def _outside(network: Network, why: str) -> str:
    return (
        "the observation encoder stays outside: observations are its output, "
        f"{network.obs_dim} numbers per step{why}"
    )


def _read_sight(
    checkpoint: TorchFile, state: dict[str, Any], encoder: Encoder
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``features`` and ``vision`` of a config.json, and ``obs`` of its normaliser."""
    images: dict[str, tuple[float, float]] = {}
    obs: dict[str, list[float]] = {"scale": [], "offset": []}
    for feature in encoder.features:
        is_image = feature.kind == VISUAL  # whose features are made in the network's own units
        numbers = _affine(checkpoint, state, feature.name, 1 if is_image else feature.dim)
        if is_image:
            images[feature.name] = numbers["scale"][0], numbers["offset"][0]
            numbers = {"scale": [1.0] * feature.dim, "offset": [0.0] * feature.dim}
        for part, values in numbers.items():
            obs[part] += values
    features = [feature.to_dict() for feature in encoder.features]
    return {"features": features, "vision": encoder.vision(images)}, obs


def _of_workspace(value: Any, file: str) -> Any:
    """A snapshot is the pickled workspace itself: what its checkpoint would hold."""
    state = value.state if isinstance(value, Placeholder) else None
    if not isinstance(state, dict) or "cfg" not in state:
        return value
    models = {name: state[name] for name in ("model", "ema_model") if state.get(name) is not None}
    dicts = {name: _of_module(module, file) for name, module in models.items()}
    return {"cfg": state["cfg"], "state_dicts": dicts}


def _of_module(module: Any, file: str) -> dict[str, Any]:
    """The state dict of a pickled ``nn.Module``."""
    result: dict[str, Any] = {}
    pending, seen = [("", module)], 0
    while pending:
        prefix, part = pending.pop()
        state = part.state if isinstance(part, Placeholder) else None
        for kind in ("_parameters", "_buffers", "_modules"):
            members = state.get(kind) if isinstance(state, dict) else None
            if not isinstance(members, dict):
                continue
            seen += len(members)
            if seen > _MAX_MEMBERS or len(prefix) > _MAX_NAME:  # one may hold another many times
                raise CheckpointError(
                    f"{file}: expected a model of at most {_MAX_MEMBERS} parts, got more; the file "
                    "is damaged"
                )
            named = {f"{prefix}{name!s:.100}": member for name, member in members.items()}
            if kind == "_modules":
                pending += [(f"{name}.", member) for name, member in named.items()]
            else:
                result |= {name: value for name, value in named.items() if value is not None}
    return result


def _policy_class(settings: Settings) -> str:
    target = str(settings.get("policy._target_", ""))[:200]
    name = target.rpartition(".")[2]
    if name in (*_TRANSFORMERS, *_UNETS):
        return name
    raise CheckpointError(
        f"{settings.file}: cfg.policy._target_: expected one of the policies "
        f"{', '.join((*_TRANSFORMERS, *_UNETS))}, got {target!r}; train one of these "
        f"({scope('checkpoints')})"
    )


def _choose_weights(state_dicts: Any, weights: str, settings: Settings) -> tuple[str, list[str]]:
    """``"ema"`` or ``"raw"``, and what should be said about the choice."""
    if weights != "auto":
        return weights, []
    averaged = isinstance(state_dicts, dict) and "ema_model" in state_dicts
    use_ema = settings.get("training.use_ema", averaged)
    if use_ema:
        return "ema", []
    return "raw", ["the run was trained without averaged weights (use_ema): the raw ones are taken"]


def _state_dict(state_dicts: Any, weights: str, file: str) -> dict[str, Any]:
    """What the chosen policy holds by name, without the names of what it was wrapped in."""
    names = {"ema": "ema_model", "raw": "model"}
    key = names.pop(weights)
    given = state_dicts if isinstance(state_dicts, dict) else {}
    state = given.get(key)
    if not isinstance(state, dict) or not state:
        got = describe(state if key in given else state_dicts)
        others = [
            f'; try weights="{other}" (tsad convert --weights {other})'
            for other, name in names.items()
            if name in given
        ]
        raise CheckpointError(
            f"{file}: state_dicts: expected {key!r} for weights={weights!r}, got {got}"
            f"{''.join(others) or '; the file has no weights of a policy'}"
        )
    return _unwrapped(state, file)


def _unwrapped(state: dict[Any, Any], file: str) -> dict[str, Any]:
    """A state dict without what DistributedDataParallel, DataParallel and torch.compile add to
    names, wherever in them it stands."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            continue
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in result:
            raise CheckpointError(
                f"{file}: {name[:200]}: expected one tensor of the name {bare[:200]}, got two; "
                "save the state dict of one model"
            )
        result[bare] = value
    return result


def _task(settings: Settings) -> str:
    """The task's name, for people; a name that cannot be told is no reason to refuse a file."""
    for key in ("task.name", "task_name"):
        with contextlib.suppress(CheckpointError):
            if isinstance(name := settings.get(key), str):
                return name.encode("utf-8", "replace").decode()
    return ""


def _read_network(settings: Settings, policy: str, state: dict[str, Any]) -> Network:
    lowdim, is_unet = policy in _LOWDIM, policy in _UNETS
    wanted = unet.NETWORK if is_unet else _TRANSFORMER
    if lowdim:  # it is given its network, an image policy makes it
        target = str(settings.get("policy.model._target_", ""))[:200]
        if target.rpartition(".")[2] != wanted:
            raise CheckpointError(
                f"{settings.file}: cfg.policy.model._target_: expected {wanted}, got {target!r}; "
                f"train a policy with it ({scope('networks')})"
            )
    _check_policy_keys(settings, _POLICY_KEYS | (unet.POLICY_KEYS if is_unet else frozenset()))
    if is_unet:
        return unet.read_network(settings, state, lowdim=lowdim)
    return _read_transformer(settings, state, lowdim)


def _read_transformer(settings: Settings, state: dict[str, Any], lowdim: bool) -> NetworkConfig:
    get = settings.get
    at = "policy.model" if lowdim else "policy"
    defaults: dict[str, Any] = {"n_layer": 8, "n_head": 4, "n_emb": 256, "causal_attn": True}
    if lowdim:
        defaults = {"n_layer": 12, "n_head": 12, "n_emb": 768, "causal_attn": False}
    values = {key: get(f"{at}.{key}", default) for key, default in defaults.items()}
    for key in ("horizon", "n_obs_steps", "n_action_steps"):
        values[key] = get(f"policy.{key}")
        if values[key] is None:
            values[key] = get(key)
    values["n_cond_layers"] = get(f"{at}.n_cond_layers", 0)
    values["time_as_cond"] = get(f"{at}.time_as_cond", True)
    values["obs_as_cond"] = get("policy.obs_as_cond", not lowdim)
    # the width of encoded observations stands nowhere but in the weights
    for key, name in (("obs_dim", "cond_obs_emb"), ("action_dim", "input_emb")):
        ref = state.get(f"model.{name}.weight")
        given = get(f"policy.{key}")
        if given is not None:
            values[key] = given
        elif isinstance(ref, TensorRef) and len(ref.shape) == 2:
            values[key] = ref.shape[1]
        elif values["obs_as_cond"] and values["time_as_cond"]:
            raise CheckpointError(
                f"{settings.file}: model.{name}.weight: expected this tensor, found none; the "
                "file is damaged or holds another network"
            )
        else:
            values[key] = 1  # an unsupported variant, which the next line refuses by its own key
    return NetworkConfig.from_dict(values, file=f"{settings.file}: cfg")


def _check_policy_keys(settings: Settings, known: frozenset[str]) -> None:
    if settings.get("policy.pred_action_steps_only", False):
        raise CheckpointError(
            f"{settings.file}: cfg.policy.pred_action_steps_only: expected false, got true; "
            f"train a policy that predicts all of the horizon ({scope('networks')})"
        )
    for key in settings.keys("policy"):
        if key in known:
            continue
        # whatever else the policy is given goes to scheduler.step
        value = settings.get(f"policy.{key}")
        if key != "eta" or value != 0:
            raise CheckpointError(
                f"{settings.file}: cfg.policy.{key[:100]}: expected no such setting, got "
                f"{str(value)[:100]!r}; tsad does not know what it changes"
            )


def _network_refs(
    state: dict[str, Any], network: Network, file: str
) -> dict[str, tuple[str, TensorRef]]:
    """Of each tensor of the network by its name here: its name in the file, and where it is."""
    refs = {}
    shapes = network_shapes(network)
    names = {name: name for name in shapes}
    if isinstance(network, Unet1dConfig):
        names = unet.names(network)
        shapes = {theirs: shapes[ours] for theirs, ours in names.items()}
    for name, ref in state.items():
        prefix, _, rest = name.partition(".")
        if prefix != "model" or rest in (*_BUFFERS, "_dummy_variable"):
            continue
        if isinstance(ref, TensorRef):
            refs[rest] = ref
        elif rest in shapes:
            raise CheckpointError(
                f"{file}: {name}: expected a tensor of floating-point numbers, got "
                f"{describe(ref)}; save the weights as plain dense tensors"
            )
    check_tensors(refs, shapes, f"{file}: state dict, model")
    return {names[theirs]: (theirs, ref) for theirs, ref in refs.items()}


def _check_masks(checkpoint: TorchFile, state: dict[str, Any], network: NetworkConfig) -> None:
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
        right = isinstance(ref, TensorRef) and network.causal_attn and ref.shape == expected.shape
        if right:
            right = np.array_equal(checkpoint.read_mask(ref, name), expected)
        if not right:
            raise CheckpointError(
                f"{checkpoint.file}: model.{name}: expected the mask of causal_attn="
                f"{network.causal_attn}, got {'none' if ref is None else 'another'}; train "
                f"a policy with that mask ({scope('networks')})"
            )


def _read_normalizer(
    checkpoint: TorchFile, state: dict[str, Any], network: Network, policy: str
) -> dict[str, Any]:
    dims = {"obs": network.obs_dim, "action": network.action_dim}
    result: dict[str, Any] = {}
    for key, dim in dims.items():
        if key == "obs" and policy not in _LOWDIM:  # normalised before the encoder
            result[key] = {"scale": [1.0] * dim, "offset": [0.0] * dim}
            continue
        result[key] = _affine(checkpoint, state, key, dim)
    return result


def _affine(
    checkpoint: TorchFile, state: dict[str, Any], key: str, dim: int
) -> dict[str, list[float]]:
    """Scale and offset of what the normaliser calls ``key``."""
    result = {}
    for part in ("scale", "offset"):
        name = f"normalizer.params_dict.{key}.{part}"
        ref = state.get(name)
        if not isinstance(ref, TensorRef) or ref.shape not in ((dim,), (1,)):
            raise CheckpointError(
                f"{checkpoint.file}: {name}: expected a tensor of {dim} numbers, got "
                f"{'nothing' if ref is None else describe(ref)}; the normaliser was not "
                "fitted, or the file is damaged"
            )
        numbers = np.broadcast_to(checkpoint.read(ref, name), (dim,))
        result[part] = [float(number) for number in numbers]
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
            f"train or save it with one of these ({scope('samplers')})"
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
                f"the denoising loop ({scope('samplers')})"
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
        state = _unwrapped(payload, file) if isinstance(payload, dict) else {}
        refs = {name: value for name, value in state.items() if isinstance(value, TensorRef)}
        projection = refs.get("memory_proj.weight")
        linear = refs.get("transformer_decoder.layers.0.linear1.weight")
        if projection is None or linear is None or not projection.shape or not linear.shape:
            raise CheckpointError(
                f"{file}: expected the state dict of a pruner (memory_proj, transformer_decoder, "
                f"head), got {describe(payload)}; it is another kind of file"
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
