"""Policies that LeRobot saved: the folder of ``save_pretrained``, of versions 0.3 to 0.6.

Of type ``diffusion``, a UNet and its image encoders (`tsad.convert.lerobot_vision`), and of type
``multi_task_dit``, a DiT. What a ``multi_task_dit``
conditions its network on comes from CLIP, which stays LeRobot's: an observation is that condition.

``read_lerobot`` describes such a folder in plain terms, without LeRobot or PyTorch: the network's
settings and its tensors, mapped from the file, the sampler, the maps between raw units and the
network's, and the features that an observation is made of. Keys of ``config.json`` that are not
known are kept and not looked at.

LeRobot itself loads what fits and leaves the rest of the network random, with a line in its log.
Here every tensor of the file must have its place and every tensor of the network be there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tsad.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    CheckpointError,
    check_finite,
    check_tensors,
    map_safetensors,
    of_training,
    read_json,
)
from tsad.config import (
    BETA_SCHEDULES,
    FLOWS,
    MAX_TIMESTEPS,
    STAGES,
    VELOCITY,
    VISUAL,
    Feature,
    VisionConfig,
)
from tsad.convert import lerobot_vision
from tsad.convert.lerobot_processors import (
    POSTPROCESSOR_FILE,
    Map,
    Statistics,
    buffers,
    read_postprocessor,
    read_processors,
)
from tsad.families import dit, network_shapes, unet1d
from tsad.scope import scope
from tsad.section import MAX_DIM, Section, Shapes

STATE, ENV_STATE, ACTION = "observation.state", "observation.environment_state", "action"

_COMPILED = "_orig_mod."  # torch.compile puts it into the names of what it wraps
_UNET = "diffusion.unet."
_DIT, _CLIP = "noise_predictor.", "observation_encoder."
_CLIP_PARTS = tuple(f"{_CLIP}{n}." for n in ("text_encoder", "vision_encoder", "vision_encoders"))
TASK, LANGUAGE = "task", "LANGUAGE"
_OLD_BUFFERS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
_NOISE_SCHEDULERS = {"DDPM": "ddpm", "DDIM": "ddim"}
_NETWORK_KEYS = (
    "horizon",
    "n_obs_steps",
    "n_action_steps",
    "down_dims",
    "kernel_size",
    "n_groups",
    "diffusion_step_embed_dim",
    "use_film_scale_modulation",
)
_DIT_KEYS = (
    "horizon",
    "n_obs_steps",
    "n_action_steps",
    "hidden_dim",
    "num_layers",
    "num_heads",
    "timestep_embed_dim",
    "use_rope",
    "rope_base",
    "use_positional_encoding",
)


@dataclass(frozen=True)
class Description:
    """A policy out of a LeRobot folder."""

    family: str
    """The network's family: ``"unet1d"`` or ``"dit"``."""
    policy: dict[str, Any]
    """``network``, ``scheduler`` and ``normalizer``, as ``tsad.reference.ReferencePolicy`` takes.

    ``n_action_steps`` is the number that LeRobot really executes.
    """
    tensors: dict[str, NDArray[Any]]
    """The network's tensors by the family's names, read-only, in the file's types; and the image
    encoders', as in a tsad folder."""
    features: tuple[Feature, ...]
    """What an observation's numbers are, side by side in this order, the order of LeRobot."""
    config: dict[str, Any]
    """``config.json`` as it is."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Observations that the preprocessor gives other names: old name to new."""
    notes: list[str] = field(default_factory=list)
    """What should be said about it."""
    vision: VisionConfig | None = None
    """The cameras and their encoders; None without, or where LeRobot's own encodes."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images."""
        return tuple(feature.name for feature in self.features if feature.kind == VISUAL)


def read_lerobot(path: str | os.PathLike[str]) -> Description:
    """The policy in a folder, or in the ``pretrained_model`` of a training's checkpoint.

    Raises ``FileNotFoundError`` if there is no such folder, ``CheckpointError``, a ``ValueError``,
    naming file and key or tensor, for what is missing, foreign, damaged or not supported.
    """
    folder = of_training(Path(path))
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a LeRobot folder, found no folder there")
    file = folder / CONFIG_FILE
    config = read_json(file)
    section = _checked(config, str(file))
    if config["type"] == "multi_task_dit":
        return _read_dit(folder, config, section)
    features, action_dim, extra = _features(config, section)
    n = {key: section.take(key) for key in _NETWORK_KEYS}
    n |= {"obs_dim": sum(f.dim for f in features), "action_dim": action_dim, "type": unet1d.TYPE}
    network = unet1d.Unet1dConfig.from_dict(n, name="", file=str(file)).to_dict()
    notes = [f"{name}: not read, as LeRobot's diffusion policy does not" for name in extra]
    _clamp_actions(network, notes)
    scheduler = _scheduler(section)

    model = folder / MODEL_FILE
    tensors = _plain_names(map_safetensors(model), str(model), notes)
    vision, separate = _read_vision(section, features)
    unet = {f"{_UNET}{name}": shape for name, shape in network_shapes(network).items()}
    encoders: Shapes = {}
    if vision is not None:
        encoders = lerobot_vision.wanted(vision, separate)
        tensors = {k: v for k, v in tensors.items() if not lerobot_vision.is_counter(k)}
    found = _network_tensors(tensors, unet | encoders, str(model), _OLD_BUFFERS)
    ours = {name.removeprefix(_UNET): found[name] for name in unet}
    statistics, renamed = _read_statistics(folder, config, tensors, features, notes)
    normalizer = _normalizer(statistics, features, action_dim, notes)
    if vision is not None:
        ours |= lerobot_vision.encoder_tensors(vision, separate, found, str(model))
        vision = lerobot_vision.with_statistics(vision, statistics[0], notes)
    return Description(
        family=unet1d.TYPE,
        policy={"network": network, "scheduler": scheduler, "normalizer": normalizer},
        tensors=ours,
        features=tuple(features),
        config=dict(config),
        renamed=renamed,
        notes=notes,
        vision=vision,
    )


def _read_vision(section: Section, features: list[Feature]) -> tuple[VisionConfig | None, bool]:
    """Cameras and encoders, and whether each camera has its own."""
    made = {f.name: f.dim for f in features if f.kind == VISUAL}
    if not made:
        return None, False
    inputs = _read_features(section, "input_features")
    images = {name: inputs[name][1] for name in made}
    return lerobot_vision.read_vision(section, images, next(iter(made.values())) // 2)


def _clamp_actions(network: dict[str, Any], notes: list[str]) -> None:
    most = network["horizon"] - network["n_obs_steps"] + 1
    if network["n_action_steps"] > most:
        notes.append(
            f"n_action_steps: {network['n_action_steps']} reach beyond the horizon; {most} are "
            "executed, as LeRobot does without a word"
        )
        network["n_action_steps"] = most


def _read_dit(folder: Path, config: Mapping[str, Any], section: Section) -> Description:
    """A ``multi_task_dit``: its noise predictor, and of the rest what the condition is made of."""
    notes: list[str] = []
    model = folder / MODEL_FILE
    tensors = _plain_names(map_safetensors(model), str(model), notes)
    n = {key: section.take(key) for key in _DIT_KEYS}
    outputs = _read_features(section, "output_features")
    if outputs.get(ACTION, ("", ()))[0] != "ACTION":
        raise section.error("output_features", f"{ACTION} of type ACTION", list(outputs))
    action_dim = _length(section, ACTION, outputs[ACTION][1])
    # settings first: the condition's width is read off the network with some of them
    n |= {"obs_dim": 1, "action_dim": action_dim, "type": dit.TYPE}
    network = dit.DitConfig.from_dict(n, name="", file=section.file).to_dict()
    features = _dit_features(section, network, tensors, str(model))
    network["obs_dim"] = sum(f.dim for f in features)
    _clamp_actions(network, notes)
    wanted = {f"{_DIT}{name}": shape for name, shape in network_shapes(network).items()}
    found = _network_tensors(tensors, wanted, str(model), _CLIP_PARTS)
    found = {name.removeprefix(_DIT): value for name, value in found.items()}
    parts = sorted({name.split(".")[1] for name in tensors if name.startswith(_CLIP_PARTS)})
    left = sum(name.startswith(_CLIP_PARTS) for name in tensors)
    notes.append(
        f"{_CLIP}*: {left} tensors ({', '.join(parts)}) not read, CLIP stays LeRobot's: an "
        "observation is what its observation_encoder.encode(batch) returns, n_obs_steps rows of "
        f"{network['obs_dim']}"
    )
    after = read_postprocessor(folder)
    modes = config.get("normalization_mapping")
    mode = modes.get("ACTION", "IDENTITY") if isinstance(modes, Mapping) else "IDENTITY"
    if after is None and mode != "IDENTITY":
        raise CheckpointError(
            f"{folder}: expected {POSTPROCESSOR_FILE}, which says the actions' units, found none; "
            "save the processors beside the policy"
        )
    obs = Map.identity(network["obs_dim"])
    action = Map.identity(action_dim)
    if after is not None:
        action = after.map_of(ACTION, "ACTION", action_dim, notes)
    return Description(
        family=dit.TYPE,
        policy={
            "network": network,
            "scheduler": _dit_scheduler(section),
            "normalizer": {"obs": obs.to_dict(), "action": action.to_dict()},
        },
        tensors=found,
        features=tuple(features),
        config=dict(config),
        notes=notes,
    )


def _dit_features(
    section: Section, network: dict[str, Any], tensors: Mapping[str, NDArray[Any]], file: str
) -> list[Feature]:
    """What LeRobot's encoder puts side by side; how wide CLIP's part is, the network knows."""
    inputs = _read_features(section, "input_features")
    if inputs.get(STATE, ("", ()))[0] != "STATE":
        fix = "LeRobot's multi_task_dit needs the robot's state"
        raise section.error("input_features", f"{STATE} of type STATE", list(inputs), fix)
    state = Feature(STATE, "STATE", _length(section, STATE, inputs[STATE][1]))
    task = Feature(TASK, LANGUAGE, network["hidden_dim"])
    cameras = [name for name, (kind, _) in inputs.items() if kind == "VISUAL"]
    key = f"{_DIT}transformer_blocks.0.adaLN_modulation.1.weight"
    weight = tensors.get(key)
    columns = weight.shape[1] if weight is not None and weight.ndim == 2 else 0
    obs_dim, rest = divmod(columns - network["timestep_embed_dim"], network["n_obs_steps"])
    images = obs_dim - state.dim - task.dim
    fits = images == 0 if not cameras else images > 0 and images % len(cameras) == 0
    if rest or not fits:
        per = f"{network['timestep_embed_dim']} of the time and {network['n_obs_steps']} times "
        per += f"{state.dim} of the state, {task.dim} of the task"
        per += f" and the same of {len(cameras)} images" if cameras else ""
        got = "no such matrix" if not columns else f"{columns}"
        raise CheckpointError(
            f"{file}: {key}: expected as many columns as the condition has numbers, {per}, got "
            f"{got}; the model and config.json are not of one policy"
        )
    each = images // len(cameras) if cameras else 0
    return [state, *(Feature(name, "VISUAL", each) for name in cameras), task]


def _dit_scheduler(section: Section) -> dict[str, Any]:
    if section.choice("objective", ("diffusion", "flow_matching")) == "diffusion":
        return _scheduler(section)
    fix = f"set it to one of these ({scope('samplers')})"
    method = section.choice("integration_method", FLOWS, fix=fix)
    stages = STAGES.get(method, 1)
    steps = section.integer("num_integration_steps", 1, MAX_TIMESTEPS // stages)
    return {"type": method, "prediction_type": VELOCITY, "num_inference_steps": steps * stages}


class _Section(Section):
    """A ``config.json`` of LeRobot, which has every key that its version knows."""

    def take(self, key: str, default: Any = None) -> Any:
        if key not in self.data:
            raise ValueError(
                f"{self.file}: {key}: expected this key, as LeRobot 0.3 to 0.6 write it, got "
                "nothing; load the policy with the LeRobot that made it, and save it again"
            )
        return super().take(key, default)


def _checked(config: Any, file: str) -> Section:
    """``config.json`` of a policy that can be read; the rest of its keys may be anything."""
    section = _Section(config, "", file)
    kind = section.take("type")
    if kind not in ("diffusion", "multi_task_dit"):
        raise section.error(
            "type",
            'a LeRobot policy of type "diffusion" or "multi_task_dit"',
            kind,
            f"convert such a one ({scope('checkpoints')})",
        )
    if config.get("use_peft"):
        fix = "merge the adapter into the model (merge_and_unload) and save it again"
        raise section.error("use_peft", "a policy without adapters", True, fix)
    return section


def _features(config: Mapping[str, Any], section: Section) -> tuple[list[Feature], int, list[str]]:
    """The features of an observation in LeRobot's order, the action's size, names not used."""
    inputs = _read_features(section, "input_features")
    outputs = _read_features(section, "output_features")
    if inputs.get(STATE, ("", ()))[0] != "STATE":
        fix = "LeRobot's diffusion policy needs the robot's state"
        raise section.error("input_features", f"{STATE} of type STATE", list(inputs), fix)
    if outputs.get(ACTION, ("", ()))[0] != "ACTION":
        raise section.error("output_features", f"{ACTION} of type ACTION", list(outputs))
    names = [STATE]
    names += [name for name, (kind, _) in inputs.items() if kind == "VISUAL"]
    names += [name for name, (kind, _) in inputs.items() if kind == "ENV"][:1]
    if len(names) == 1:
        fix = "LeRobot's diffusion policy needs one of them beside the state"
        raise section.error("input_features", "images or an ENV feature", list(inputs), fix)
    features, keypoints = [], 0
    for name in names:
        kind, shape = inputs[name]
        if kind == "VISUAL":
            keypoints = keypoints or section.integer("spatial_softmax_num_keypoints", 1, MAX_DIM)
            features.append(Feature(name, kind, 2 * keypoints))  # x and y of each
        else:
            features.append(Feature(name, kind, _length(section, name, shape)))
    action_dim = _length(section, ACTION, outputs[ACTION][1])
    return features, action_dim, [name for name in inputs if name not in names]


def _read_features(section: Section, key: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    fix = "LeRobot before 0.2 wrote other keys: load and save the policy with a newer one"
    data = section.data.get(key)
    if not isinstance(data, Mapping):
        raise section.error(key, "an object of features", data, fix)
    found = {}
    for name, feature in data.items():
        kind = feature.get("type") if isinstance(feature, Mapping) else None
        shape = feature.get("shape") if isinstance(feature, Mapping) else None
        sizes = isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)
        if not isinstance(kind, str) or not sizes:
            raise section.error(f"{key}.{name}", "a type and a shape", feature)
        found[str(name)] = (kind, tuple(shape or ()))
    return found


def _length(section: Section, name: str, shape: tuple[int, ...]) -> int:
    if len(shape) != 1:
        raise section.error(f"{name}.shape", "one size, a row of numbers", list(shape))
    return shape[0]


def _scheduler(section: Section) -> dict[str, Any]:
    """The ``scheduler`` of ``tsad.samplers``; what LeRobot does not set is diffusers' default."""
    train = section.integer("num_train_timesteps", 1, MAX_TIMESTEPS)
    given = section.data.get("num_inference_steps") is not None
    steps = section.integer("num_inference_steps", 1, train) if given else train
    return {
        "type": _NOISE_SCHEDULERS[section.choice("noise_scheduler_type", tuple(_NOISE_SCHEDULERS))],
        "num_train_timesteps": train,
        "beta_schedule": section.choice("beta_schedule", BETA_SCHEDULES),
        "beta_start": section.number("beta_start", 0.0, 1.0),
        "beta_end": section.number("beta_end", 0.0, 1.0),
        "prediction_type": section.choice("prediction_type", ("epsilon", "sample")),  # LeRobot's
        "clip_sample": section.flag("clip_sample", True),
        "clip_sample_range": section.number("clip_sample_range", 0.0, 1e6),
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "set_alpha_to_one": True,
        "num_inference_steps": steps,
    }


def _plain_names(
    tensors: Mapping[str, NDArray[Any]], file: str, notes: list[str]
) -> dict[str, NDArray[Any]]:
    """Tensors without what ``torch.compile`` puts into their names."""
    plain = {name.replace(_COMPILED, ""): value for name, value in tensors.items()}
    if len(plain) < len(tensors):
        names = [
            name for name in tensors if _COMPILED in name and name.replace(_COMPILED, "") in tensors
        ]
        raise CheckpointError(
            f"{file}: {names[0]}: expected each tensor once, got it with and without "
            f"{_COMPILED!r}; the file was put together from two"
        )
    if any(_COMPILED in name for name in tensors):
        notes.append(
            f"the model was saved compiled: its tensors' names have {_COMPILED!r}, with which "
            "LeRobot finds none of them unless it compiles too, and runs a random network"
        )
    return plain


def _network_tensors(
    tensors: Mapping[str, NDArray[Any]],
    wanted: Shapes,
    file: str,
    beside: tuple[str, ...],
) -> dict[str, NDArray[Any]]:
    """The wanted tensors, after checking that they are what the file has.

    ``beside``: how names of the rest begin.
    """
    try:
        check_tensors({k: v for k, v in tensors.items() if not k.startswith(beside)}, wanted, file)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n(LeRobot would load this file without an error and leave what is missing "
            "at random values: a policy that it seemed to run was not the one that was trained)"
        ) from None
    for name in wanted:
        if tensors[name].dtype.kind != "f":
            raise CheckpointError(
                f"{file}: {name}: expected numbers of type F16, BF16, F32 or F64, got "
                f"{tensors[name].dtype}; save the model in one of these"
            )
    found = {name: tensors[name] for name in wanted}
    check_finite(found, file)
    return found


def _read_statistics(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, NDArray[Any]],
    features: list[Feature],
    notes: list[str],
) -> tuple[tuple[Statistics, Statistics], dict[str, str]]:
    """Statistics of the way in and out, from processors or buffers; new names of observations."""
    old = any(name.startswith(_OLD_BUFFERS) for name in tensors)
    processors = read_processors(folder)
    if processors is not None:
        before, after, renamed = processors
        if old:
            notes.append("the model has statistics of its own; those of the processors are used")
        return (before, after), renamed
    modes = config.get("normalization_mapping")
    modes = dict(modes) if isinstance(modes, Mapping) else {}
    used = {modes.get(kind, "IDENTITY") for kind in [f.kind for f in features] + ["ACTION"]}
    if not old and used != {"IDENTITY"}:
        raise CheckpointError(
            f"{folder}: expected the processors' files, policy_preprocessor.json and "
            "policy_postprocessor.json, or in a model of LeRobot before 0.4 the statistics in "
            f"{MODEL_FILE}, found neither; save the processors beside the policy"
        )
    names = [feature.name for feature in features] + [ACTION]
    return buffers(str(folder / MODEL_FILE), modes, tensors, names), {}


def _normalizer(
    statistics: tuple[Statistics, Statistics],
    features: list[Feature],
    action_dim: int,
    notes: list[str],
) -> dict[str, Any]:
    before, after = statistics
    maps = [
        Map.identity(f.dim)  # made by the encoder, in the network's own units
        if f.kind == VISUAL
        else before.map_of(f.name, f.kind, f.dim, notes)
        for f in features
    ]
    action = after.map_of(ACTION, "ACTION", action_dim, notes)
    return {"obs": Map.side_by_side(maps).to_dict(), "action": action.to_dict()}
