"""``config.json`` of a tsad folder: everything that the network and the sampler need.

A tsad folder holds ``config.json``, ``model.safetensors`` and, if there is one,
``pruner.safetensors``. This is every key of ``config.json``; a key that is not listed is refused by
name, and keys without a default must be there.

``format``                   always ``"tsad"``
``format_version``           always 1

``network``                  the denoising network; ``type`` names its family, whose module has the
                             other keys: ``"diffusion_policy_transformer"`` (default:
                             ``tsad/families/dpt.py``), ``"unet1d"`` or ``"dit"``

``scheduler``                the denoising loop, with the meaning of the diffusers classes:
  ``type``                   ``"ddpm"``, ``"ddim"`` (eta 0), ``"dpmsolver++"`` (2M: order 2,
                             midpoint); or of flow matching ``"euler"``, or ``"rk4"``, Runge and
                             Kutta's steps, four network evaluations each. Those have no other keys
                             than ``prediction_type``, ``num_inference_steps`` and
                             ``timestep_spacing``, always ``"leading"``
  ``num_train_timesteps``    timesteps of training (default 100)
  ``beta_schedule``          ``"linear"``, ``"scaled_linear"``, ``"squaredcos_cap_v2"`` (default)
  ``beta_start``             first and last beta (default 0.0001 and 0.02);
  ``beta_end``               ``squaredcos_cap_v2`` ignores them
  ``prediction_type``        what the network predicts: ``"epsilon"`` (default), ``"sample"`` or
                             ``"v_prediction"`` (sqrt(A) epsilon - sqrt(1 - A) sample, A the share
                             of signal); flow matching has ``"velocity"`` alone
  ``clip_sample``            whether the predicted sample is clipped (default true, but false for
                             ``"dpmsolver++"``, as in diffusers) ...
  ``clip_sample_range``      ... to plus and minus this, in normalised units (default 1.0)
  ``variance_type``          noise that DDPM adds: ``"fixed_small"`` (default),
                             ``"fixed_small_log"`` or ``"fixed_large"``
  ``timestep_spacing``       ``"leading"`` (default), ``"trailing"`` or ``"linspace"``
  ``steps_offset``           added to each timestep of the leading spacing (default 0)
  ``set_alpha_to_one``       DDIM: whether alpha past the last step is 1 (default) or that of
                             timestep 0
  ``num_inference_steps``    K, network evaluations per chunk (default ``num_train_timesteps``,
                             with flow matching 100), of ``"rk4"`` a multiple of 4

``normalizer``               ``x_normalised = (x - shift) * scale + offset``, number by number:
  ``obs``, ``action``        each ``{"scale": [...], "offset": [...], "shift": [...]}``, ``obs_dim``
                             and ``action_dim`` long; without ``shift`` it is 0

``cost``                     cost of a cell of each block; sparsity is counted in it
  ``version``, ``unit``      always 1 and ``"MAC"``: multiply-accumulates, after exact rewrites
  ``blocks``                 one integer per block, in order of execution. Without ``cost`` it is
                             ``block_costs(network)``

``pruner``                   only with ``pruner.safetensors``
  ``type``                   ``"transformer"`` (default), the paper's one layer (arXiv 2605.13316),
                             or ``"mlp"``: the memory tokens of a step in a row, one hidden ReLU
                             layer, four numbers per block; it has a width alone
  ``hidden_dim``             width (default 512, of an MLP 128), divisible by ``n_head``
  ``n_head``                 attention heads (default 8)
  ``dim_feedforward``        feed-forward width (default 1024)
  ``default``                (default true) false: ``policy.planner = "pruner"`` has to choose it

``features``                 what the numbers of an observation are, side by side in this order
                             (default: they have no names); a list, of each:
  ``name``                   its name, LeRobot's of a policy of LeRobot
  ``type``                   ``"STATE"``, ``"ENV"``; or ``"VISUAL"``, ``"LANGUAGE"``, of numbers
                             that an encoder makes of it, ``vision``'s or one outside
  ``dim``                    how many numbers; together they are ``obs_dim``

``vision``                   only with images: the encoders that make the ``"VISUAL"`` features of
                             them, and the cameras; `tsad.families.resnet` has its keys

``provenance``               a free JSON object (default empty): source, licence, sha256, training,
                             scores
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tsad import _core
from tsad.families import (
    NETWORK_TYPES,
    Network,
    arguments,
    as_network,
    as_transformer,
    block_costs,
    block_names,
    block_types,
    network_shapes,
    read_network,
)
from tsad.families.dpt import NetworkConfig
from tsad.families.resnet import VisionConfig
from tsad.scope import scope
from tsad.section import (
    MAX_COST,
    MAX_DIM,
    MAX_HEADS,
    MAX_HORIZON,
    MAX_MAGNITUDE,
    MAX_TIMESTEPS,
    MAX_WIDTH,
    Section,
    Shapes,
    Text,
)

__all__ = [
    "BETA_SCHEDULES",
    "FORMAT",
    "FORMAT_VERSION",
    "MAX_DIM",
    "MAX_HORIZON",
    "MAX_TIMESTEPS",
    "NETWORK_TYPES",
    "PREDICTION_TYPES",
    "SAMPLERS",
    "TIMESTEP_SPACINGS",
    "VARIANCE_TYPES",
    "Affine",
    "Feature",
    "NetworkConfig",
    "NormalizerConfig",
    "PolicyConfig",
    "PrunerConfig",
    "SchedulerConfig",
    "Section",
    "Shapes",
    "VisionConfig",
    "block_costs",
    "block_names",
    "block_types",
    "network_shapes",
    "pruner_shapes",
    "tensor_shapes",
]

FORMAT = "tsad"
FORMAT_VERSION = 1
COST_VERSION = 1

EULER = "euler"
RK4 = "rk4"
FLOWS = (EULER, RK4)  # samplers of flow matching
STAGES = {RK4: 4}  # network evaluations of one step, where it takes several
SAMPLERS = ("ddpm", "ddim", "dpmsolver++", *FLOWS)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VELOCITY = "velocity"  # what flow matching needs
RAW_KINDS = ("STATE", "ENV")
VISUAL = "VISUAL"
FEATURE_KINDS = (*RAW_KINDS, VISUAL, "LANGUAGE")
MAX_NAME = 200
PRUNER_TYPES = ("transformer", "mlp")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


def whole_steps(sampler: str, evaluations: int) -> tuple[str, str]:
    """What was expected of a number of network evaluations that ends within a step, and the fix."""
    stages = STAGES[sampler]
    near = max(evaluations // stages, 1) * stages
    expected = f"a multiple of {stages} with sampler {sampler}, {stages} network evaluations a step"
    return expected, f"choose {near} or {near + stages}"


@dataclass(frozen=True)
class SchedulerConfig:
    """The denoising loop; the fields are the ``scheduler`` keys of the module docstring."""

    type: str
    num_train_timesteps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    variance_type: str = "fixed_small"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    num_inference_steps: int = 100

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> SchedulerConfig:
        """The checked ``scheduler`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "scheduler", file)
        kind = section.choice("type", SAMPLERS, fix=f"choose one of these ({scope('samplers')})")
        if kind in FLOWS:
            fix = f"flow matching samples what predicts velocities alone ({scope('samplers')})"
            scheduler = cls(
                type=kind,
                prediction_type=section.choice("prediction_type", (VELOCITY,), VELOCITY, fix),
                timestep_spacing=section.choice(
                    "timestep_spacing", ("leading",), "leading", "leave it out"
                ),
                num_inference_steps=section.integer("num_inference_steps", 1, MAX_TIMESTEPS, 100),
            )
            if scheduler.num_inference_steps % STAGES.get(kind, 1):
                expected, fix = whole_steps(kind, scheduler.num_inference_steps)
                got = scheduler.num_inference_steps
                raise section.error("num_inference_steps", expected, got, fix)
            section.done()
            return scheduler
        train = section.integer("num_train_timesteps", 1, MAX_TIMESTEPS, 100)
        scheduler = cls(
            type=kind,
            num_train_timesteps=train,
            beta_schedule=section.choice("beta_schedule", BETA_SCHEDULES, "squaredcos_cap_v2"),
            beta_start=section.number("beta_start", 0.0, 1.0, 0.0001),
            beta_end=section.number("beta_end", 0.0, 1.0, 0.02),
            prediction_type=section.choice(
                "prediction_type",
                PREDICTION_TYPES,
                "epsilon",
                f"train the policy to predict one of these ({scope('samplers')})",
            ),
            clip_sample=section.flag("clip_sample", kind != "dpmsolver++"),
            clip_sample_range=section.number("clip_sample_range", 0.0, 1e6, 1.0),
            variance_type=section.choice("variance_type", VARIANCE_TYPES, "fixed_small"),
            timestep_spacing=section.choice("timestep_spacing", TIMESTEP_SPACINGS, "leading"),
            steps_offset=section.integer("steps_offset", 0, MAX_TIMESTEPS, 0),
            set_alpha_to_one=section.flag("set_alpha_to_one", True),
            num_inference_steps=section.integer("num_inference_steps", 1, train, train),
        )
        section.done()
        return scheduler

    def to_dict(self) -> dict[str, Any]:
        """The ``scheduler`` object of ``config.json``, every key that its type has present."""
        if self.type in FLOWS:
            keys = ("type", "prediction_type", "timestep_spacing", "num_inference_steps")
            return {key: getattr(self, key) for key in keys}
        return asdict(self)


@dataclass(frozen=True)
class Affine:
    """``x_normalised = (x - shift) * scale + offset``, one number of each per dimension.

    A shift is what keeps a nearly constant number exact: its scale is huge. None is none.
    """

    scale: tuple[float, ...]
    offset: tuple[float, ...]
    shift: tuple[float, ...] | None = None

    @classmethod
    def identity(cls, dim: int) -> Affine:
        """The map that changes nothing."""
        return cls((1.0,) * dim, (0.0,) * dim)

    def normalise(self, raw: Any, dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """``raw`` (..., dim) in the network's units, computed in ``dtype``."""
        x = np.asarray(raw, dtype)
        if self.shift is not None:
            x = x - np.array(self.shift, dtype)
        normalised: NDArray[Any] = x * np.array(self.scale, dtype) + np.array(self.offset, dtype)
        return normalised

    def to_dict(self) -> dict[str, list[float]]:
        """One of the two objects of ``normalizer``."""
        data = {"scale": list(self.scale), "offset": list(self.offset)}
        return data if self.shift is None else data | {"shift": list(self.shift)}


@dataclass(frozen=True)
class NormalizerConfig:
    """The two maps between raw units and those of the network."""

    obs: Affine
    action: Affine

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], obs_dim: int, action_dim: int, *, file: str = "config.json"
    ) -> NormalizerConfig:
        """The checked ``normalizer`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "normalizer", file)
        maps = {}
        for key, dim in (("obs", obs_dim), ("action", action_dim)):
            part = Section(section.take(key), f"normalizer.{key}", file)
            part.known.append("shift")
            shift = part.numbers("shift", dim) if "shift" in part.data else (0.0,) * dim
            maps[key] = Affine(
                part.numbers("scale", dim),
                part.numbers("offset", dim),
                shift if any(shift) else None,
            )
            part.done()
        section.done()
        for i, scale in enumerate(maps["action"].scale):
            if abs(scale) < 1 / MAX_MAGNITUDE:  # actions are divided by it
                expected = f"a magnitude of at least {1 / MAX_MAGNITUDE:g}"
                raise section.error(f"action.scale[{i}]", expected, scale, "1 is no scaling")
        return cls(maps["obs"], maps["action"])

    def to_dict(self) -> dict[str, Any]:
        """The ``normalizer`` object of ``config.json``."""
        return {"obs": self.obs.to_dict(), "action": self.action.to_dict()}


@dataclass(frozen=True)
class PrunerConfig:
    """Shape of the pruner.

    ``"transformer"``: one pre-norm ReLU decoder layer over block tokens (arXiv 2605.13316).
    ``"mlp"``: the (1 + n_obs_steps) memory tokens of a step in a row, one hidden ReLU layer of
    ``hidden_dim``, 4 logits per block; ``n_head`` and ``dim_feedforward`` are 0.

    ``default``: whether it turns the dial of a policy just loaded; otherwise
    ``policy.planner = "pruner"`` chooses it.
    """

    hidden_dim: int = 512
    n_head: int = 8
    dim_feedforward: int = 1024
    type: str = PRUNER_TYPES[0]
    default: bool = True

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> PrunerConfig:
        """The checked ``pruner`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "pruner", file)
        kind = section.choice("type", PRUNER_TYPES, PRUNER_TYPES[0])
        default = section.flag("default", True)
        if kind == "mlp":
            mlp = cls(section.integer("hidden_dim", 1, MAX_WIDTH, 128), 0, 0, kind, default)
            section.done()
            return mlp
        pruner = cls(
            hidden_dim=section.integer("hidden_dim", 4, MAX_WIDTH, 512),
            n_head=section.integer("n_head", 1, MAX_HEADS, 8),
            dim_feedforward=section.integer("dim_feedforward", 1, 4 * MAX_WIDTH, 1024),
            default=default,
        )
        section.done()
        if pruner.hidden_dim % 2 or pruner.hidden_dim % pruner.n_head:
            expected = f"an even number divisible by n_head ({pruner.n_head})"
            raise section.error("hidden_dim", expected, pruner.hidden_dim)
        return pruner

    def arguments(self) -> dict[str, int]:
        """What the core takes of it; no heads are an MLP."""
        return {"hidden": self.hidden_dim, "heads": self.n_head, "ff": self.dim_feedforward}

    def to_dict(self) -> dict[str, Any]:
        """The ``pruner`` object of ``config.json``."""
        data = asdict(self)
        if self.type == "mlp":
            data = {"type": self.type, "hidden_dim": self.hidden_dim, "default": self.default}
        if data.pop("default"):
            return {"type": data.pop("type"), **data}
        return {"type": data.pop("type"), **data, "default": False}


@dataclass(frozen=True)
class Feature:
    """Some of the numbers of an observation: where they come from and how many."""

    name: str
    kind: str
    """LeRobot's type, one of `FEATURE_KINDS`: the robot's state or the environment's; or, of what
    an encoder makes of it, ``"VISUAL"`` or ``"LANGUAGE"``."""
    dim: int

    def to_dict(self) -> dict[str, Any]:
        """One of the list ``features`` of ``config.json``."""
        return {"name": self.name, "type": self.kind, "dim": self.dim}


@dataclass(frozen=True)
class PolicyConfig:
    """A whole ``config.json``; see the module docstring for every key."""

    network: Network
    scheduler: SchedulerConfig
    normalizer: NormalizerConfig
    costs: tuple[int, ...]
    pruner: PrunerConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    features: tuple[Feature, ...] = ()
    vision: VisionConfig | None = None

    @property
    def named_numbers(self) -> tuple[tuple[str, int], ...] | None:
        """Name and size of each feature, if all of them are as the robot measures or sees them."""
        kinds = RAW_KINDS if self.vision is None else (*RAW_KINDS, VISUAL)
        raw = bool(self.features) and all(f.kind in kinds for f in self.features)
        return tuple((f.name, f.dim) for f in self.features) if raw else None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> PolicyConfig:
        """The checked configuration of a parsed ``config.json``.

        ``file`` names the source in errors. Raises ``ValueError`` naming the key, what came, what
        was expected and the fix: for wrong types, values out of range, numbers that contradict
        each other, missing and unknown keys.
        """
        section = Section(data, "", file)
        section.choice("format", (FORMAT,))
        version = section.take("format_version")
        if isinstance(version, bool) or version != FORMAT_VERSION:
            fix = "update tsad, or convert the model again"
            raise section.error("format_version", str(FORMAT_VERSION), version, fix)
        network = read_network(section.take("network"), file=file)
        scheduler = SchedulerConfig.from_dict(section.take("scheduler"), file=file)
        normalizer = NormalizerConfig.from_dict(
            section.take("normalizer"), network.obs_dim, network.action_dim, file=file
        )
        default_costs = _costs_to_dict(block_costs(network))
        costs = _read_costs(section.take("cost", default_costs), network, file)
        pruner = None
        section.known.append("pruner")
        if "pruner" in section.data:
            pruner = PrunerConfig.from_dict(section.data.pop("pruner"), file=file)
        provenance = section.take("provenance", {})
        if not isinstance(provenance, Mapping):
            raise section.error("provenance", "a JSON object", provenance)
        features = _read_features(section, network.obs_dim)
        vision = _read_vision(section, features)
        section.done()
        free = copy.deepcopy(dict(provenance))
        return cls(network, scheduler, normalizer, costs, pruner, free, features, vision)

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads: a new plain dict, ready for ``json.dump``."""
        data: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "network": self.network.to_dict(),
            "scheduler": self.scheduler.to_dict(),
            "normalizer": self.normalizer.to_dict(),
            "cost": _costs_to_dict(self.costs),
        }
        if self.pruner is not None:
            data["pruner"] = self.pruner.to_dict()
        if self.features:
            data["features"] = [feature.to_dict() for feature in self.features]
        if self.vision is not None:
            data["vision"] = self.vision.to_dict()
        data["provenance"] = copy.deepcopy(self.provenance)
        return data


def _read_features(section: Section, obs_dim: int) -> tuple[Feature, ...]:
    data = section.take("features", [])
    if not isinstance(data, list | tuple):
        raise section.error("features", "a list of name, type and dim", data)
    features: list[Feature] = []
    for i, item in enumerate(data):
        part = Section(item, f"features[{i}]", section.file)
        name = part.take("name")
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise part.error("name", f"1 to {MAX_NAME} characters", name)
        if name in (f.name for f in features):
            raise part.error("name", "every name once", name)
        kind = part.choice("type", FEATURE_KINDS)
        features.append(Feature(name, kind, part.integer("dim", 1, MAX_DIM)))
        part.done()
    total = sum(f.dim for f in features)
    if features and total != obs_dim:
        expected = f"dims that add up to obs_dim, {obs_dim}"
        raise section.error("features", expected, Text(f"{total}"))
    return tuple(features)


def _read_vision(section: Section, features: tuple[Feature, ...]) -> VisionConfig | None:
    section.known.append("vision")
    if "vision" not in section.data:
        return None
    vision = VisionConfig.from_dict(section.data.pop("vision"), file=section.file)
    made = [(camera.name, vision.feature_dim(camera)) for camera in vision.cameras]
    wanted = [(f.name, f.dim) for f in features if f.kind == VISUAL]
    if made != wanted or any(f.kind not in (*RAW_KINDS, VISUAL) for f in features):
        expected = f"those of the features, and no others beside STATE and ENV: {wanted}"
        raise section.error("vision.cameras", expected, Text(f"{made}"))
    return vision


def _costs_to_dict(costs: tuple[int, ...]) -> dict[str, Any]:
    return {"version": COST_VERSION, "unit": "MAC", "blocks": list(costs)}


def _read_costs(data: Any, network: Network, file: str) -> tuple[int, ...]:
    section = Section(data, "cost", file)
    section.integer("version", COST_VERSION, COST_VERSION)
    section.choice("unit", ("MAC",))
    blocks = section.take("blocks")
    n_blocks = len(block_costs(network))
    expected = f"a list of {n_blocks} integers, one per block"
    if not isinstance(blocks, list | tuple):
        raise section.error("blocks", expected, blocks)
    if len(blocks) != n_blocks:
        raise section.error("blocks", expected, Text(f"a list of {len(blocks)}"))
    for i, cost in enumerate(blocks):
        if isinstance(cost, bool) or not isinstance(cost, int) or not 0 <= cost <= MAX_COST:
            raise section.error(f"blocks[{i}]", f"an integer from 0 to {MAX_COST}", cost)
    if sum(blocks) == 0:
        raise section.error("blocks", "at least one cost above 0", Text("only zeros"))
    section.done()
    return tuple(blocks)


def tensor_shapes(config: PolicyConfig) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``: the network's and the encoders'."""
    encoders = {} if config.vision is None else config.vision.shapes()
    return network_shapes(config.network) | encoders


def pruner_shapes(
    pruner: PrunerConfig | Mapping[str, Any], network: Network | Mapping[str, Any]
) -> Shapes:
    """Name -> shape of every tensor in ``pruner.safetensors``.

    The published pruner's names, or those of ``nn.Sequential(nn.Linear, nn.ReLU, nn.Linear)``.
    """
    net = as_transformer(as_network(network), "pruner")
    prn = pruner if isinstance(pruner, PrunerConfig) else PrunerConfig.from_dict(pruner)
    said: Shapes = _core.describe(**arguments(net), pruner=prn.arguments())["pruner"]
    return said
