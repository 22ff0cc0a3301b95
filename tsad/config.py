"""``config.json`` of a tsad folder: everything that the network and the sampler need.

A tsad folder holds ``config.json``, ``model.safetensors`` and, if there is one,
``pruner.safetensors``. This is every key of ``config.json``; a key that is not listed is refused by
name, and keys without a default must be there.

``format``                   always ``"tsad"``
``format_version``           always 1

``network``                  Diffusion Policy's ``TransformerForDiffusion``:
  ``type``                   ``"diffusion_policy_transformer"`` (default), the only one so far
  ``horizon``                T, actions that one denoising loop predicts
  ``n_obs_steps``            To, observations in the window; the last one is now
  ``n_action_steps``         actions executed of the horizon, which must reach that far:
                             ``[n_obs_steps - 1 : n_obs_steps - 1 + n_action_steps]``
  ``obs_dim``                numbers per observation (of an image policy: encoded features)
  ``action_dim``             numbers per action
  ``n_layer``, ``n_head``    decoder layers, attention heads
  ``n_emb``                  d, width: even, divisible by ``n_head``; feed-forward width is 4 d
  ``n_cond_layers``          0: token-wise MLP encoder (default); n > 0: ``nn.TransformerEncoder``
                             of n layers
  ``causal_attn``            whether the two causal masks are applied (default true)
  ``time_as_cond``           true (default); false, the encoder-only variant, is refused
  ``obs_as_cond``            true (default); false, observations in the sample, is refused

``scheduler``                the denoising loop, with the meaning of the diffusers classes:
  ``type``                   ``"ddpm"``, ``"ddim"`` (eta 0) or ``"dpmsolver++"`` (2M: order 2,
                             midpoint)
  ``num_train_timesteps``    timesteps of training (default 100)
  ``beta_schedule``          ``"linear"``, ``"scaled_linear"``, ``"squaredcos_cap_v2"`` (default)
  ``beta_start``             first and last beta (default 0.0001 and 0.02);
  ``beta_end``               ``squaredcos_cap_v2`` ignores them
  ``prediction_type``        what the network predicts: ``"epsilon"`` (default) or ``"sample"``
  ``clip_sample``            whether the predicted sample is clipped (default true, but false for
                             ``"dpmsolver++"``, as in diffusers) ...
  ``clip_sample_range``      ... to plus and minus this, in normalised units (default 1.0)
  ``variance_type``          noise that DDPM adds: ``"fixed_small"`` (default),
                             ``"fixed_small_log"`` or ``"fixed_large"``
  ``timestep_spacing``       ``"leading"`` (default), ``"trailing"`` or ``"linspace"``
  ``steps_offset``           added to each timestep of the leading spacing (default 0)
  ``set_alpha_to_one``       DDIM: whether alpha past the last step is 1 (default) or that of
                             timestep 0
  ``num_inference_steps``    K, network evaluations per chunk (default ``num_train_timesteps``)

``normalizer``               ``x_normalised = x * scale + offset``, number by number:
  ``obs``, ``action``        each ``{"scale": [...], "offset": [...]}``, ``obs_dim`` and
                             ``action_dim`` long

``cost``                     cost of a cell of each block; sparsity is counted in it
  ``version``, ``unit``      always 1 and ``"MAC"``: multiply-accumulates, after exact rewrites
  ``blocks``                 one integer per block, 3 per layer: self-attention, cross-attention,
                             feed-forward. Without ``cost`` it is ``block_costs(network)``

``pruner``                   only with ``pruner.safetensors``
  ``type``                   ``"transformer"`` (default), the paper's one layer (arXiv 2605.13316),
                             or ``"mlp"``: the memory tokens of a step in a row, one hidden ReLU
                             layer, four numbers per block; it has a width alone
  ``hidden_dim``             width (default 512, of an MLP 128), divisible by ``n_head``
  ``n_head``                 attention heads (default 8)
  ``dim_feedforward``        feed-forward width (default 1024)

``provenance``               a free JSON object (default empty): source, licence, sha256, training,
                             scores
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

FORMAT = "tsad"
FORMAT_VERSION = 1
COST_VERSION = 1
BLOCK_TYPES = ("self_attn", "cross_attn", "feed_forward")

NETWORK_TYPES = ("diffusion_policy_transformer",)
SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "sample")
PRUNER_TYPES = ("transformer", "mlp")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# Far above any policy in use: a corrupt number becomes an error, not an exhausted machine.
MAX_HORIZON = 4096
MAX_OBS_STEPS = 255
MAX_DIM = 65536
MAX_LAYERS = 256
MAX_HEADS = 256
MAX_WIDTH = 16384
MAX_TIMESTEPS = 100_000
MAX_COST = 2**53  # float64 counts exactly up to here

Shapes = dict[str, tuple[int, ...]]


class Section:
    """A JSON object being read: methods take out a key and check it, ``done`` refuses the rest."""

    def __init__(self, data: Any, name: str, file: str) -> None:
        self.name = name
        self.file = file
        if not isinstance(data, Mapping):
            raise ValueError(
                f"{file}: {name or 'the file'}: expected a JSON object, got {_show(data)}; "
                'write it as { "key": value, ... }'
            )
        self.data: dict[Any, Any] = dict(data)
        self.known: list[str] = []

    def error(self, key: str, expected: str, got: Any, fix: str = "") -> ValueError:
        path = f"{self.name}.{key}" if self.name else key
        return ValueError(
            f"{self.file}: {path}: expected {expected}, got {_show(got)}; "
            f"{fix or 'correct this key'}"
        )

    def take(self, key: str, default: Any = None) -> Any:
        self.known.append(key)
        if key in self.data:
            return self.data.pop(key)
        if default is None:
            path = f"{self.name}.{key}" if self.name else key
            raise ValueError(
                f"{self.file}: {path}: expected this key, got nothing; add it "
                "(python -m pydoc tsad.config describes every key)"
            )
        return default

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.error(key, f"an integer from {low} to {high}", value)
        if not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return int(value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.take(key, default)
        expected = f"a number above {low:g} and at most {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise self.error(key, expected, value)
        if not low < value <= high:  # false for NaN too
            raise self.error(key, expected, value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool | np.bool_):
            raise self.error(key, "true or false", value)
        return bool(value)

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.take(key, default)
        if not isinstance(value, str) or value not in choices:
            named = ", ".join(f'"{choice}"' for choice in choices)
            raise self.error(key, f"one of {named}", value, "choose one of these")
        return value

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        value = self.take(key)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if not isinstance(value, list | tuple):
            raise self.error(key, f"a list of {count} numbers", value)
        if len(value) != count:
            got = _Text(f"a list of {len(value)}")
            raise self.error(key, f"a list of {count} numbers", got, "give one per dimension")
        for i, number in enumerate(value):
            bad = isinstance(number, bool) or not isinstance(number, int | float | np.number)
            if bad or not math.isfinite(np.float32(_clamp(number))):
                raise self.error(f"{key}[{i}]", "a finite float32 number", number)
        return tuple(float(number) for number in value)

    def done(self) -> None:
        if not self.data:
            return
        key = next(iter(self.data))
        close = difflib.get_close_matches(str(key), self.known, n=1)
        hint = f'did you mean "{close[0]}"?' if close else "remove it"
        where = f" in {self.name}" if self.name else ""
        raise ValueError(
            f"{self.file}: unknown key {_show(key)}{where}: "
            f"expected only {', '.join(self.known)}; {hint}"
        )


class _Text(str):
    """A description that error messages print without quotes."""


def _show(value: Any) -> str:
    if isinstance(value, _Text):
        return str(value)
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    if len(text) > 80:
        text = text[:77] + "..."
    plain = value is None or isinstance(value, str | int | float)
    return text if plain else f"{text} ({type(value).__name__})"


def _clamp(number: Any) -> float:
    """A JSON integer may be too large for a float; make it infinite, which the caller refuses."""
    try:
        value = float(number)
    except OverflowError:
        return math.inf
    return value if abs(value) <= float(np.finfo(np.float32).max) else math.inf


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of the denoising network: the ``network`` keys of the module docstring."""

    horizon: int
    n_obs_steps: int
    n_action_steps: int
    obs_dim: int
    action_dim: int
    n_layer: int
    n_head: int
    n_emb: int
    n_cond_layers: int = 0
    causal_attn: bool = True
    time_as_cond: bool = True
    obs_as_cond: bool = True
    type: str = NETWORK_TYPES[0]

    @property
    def n_memory(self) -> int:
        """S: memory tokens that cross-attention reads, one for the time and one per observation."""
        return 1 + self.n_obs_steps

    @property
    def n_blocks(self) -> int:
        """B: prunable residual blocks."""
        return len(BLOCK_TYPES) * self.n_layer

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> NetworkConfig:
        """The checked ``network`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "network", file)
        network = cls(
            type=section.choice("type", NETWORK_TYPES, NETWORK_TYPES[0]),
            horizon=section.integer("horizon", 1, MAX_HORIZON),
            n_obs_steps=section.integer("n_obs_steps", 1, MAX_OBS_STEPS),
            n_action_steps=section.integer("n_action_steps", 1, MAX_HORIZON),
            obs_dim=section.integer("obs_dim", 1, MAX_DIM),
            action_dim=section.integer("action_dim", 1, MAX_DIM),
            n_layer=section.integer("n_layer", 1, MAX_LAYERS),
            n_head=section.integer("n_head", 1, MAX_HEADS),
            n_emb=section.integer("n_emb", 4, MAX_WIDTH),
            n_cond_layers=section.integer("n_cond_layers", 0, MAX_LAYERS, 0),
            causal_attn=section.flag("causal_attn", True),
            time_as_cond=section.flag("time_as_cond", True),
            obs_as_cond=section.flag("obs_as_cond", True),
        )
        section.done()
        if network.n_emb % 2 or network.n_emb % network.n_head:
            expected = f"an even number divisible by n_head ({network.n_head})"
            raise section.error("n_emb", expected, network.n_emb)
        last = network.n_obs_steps - 1 + network.n_action_steps
        if last > network.horizon:
            expected = f"at least n_obs_steps - 1 + n_action_steps = {last}, the last one executed"
            fix = "lower n_action_steps, or train a longer horizon"
            raise section.error("horizon", expected, network.horizon, fix)
        fix = "other variants are not supported; train with time_as_cond=True and obs_as_cond=True"
        for key in ("time_as_cond", "obs_as_cond"):
            if not getattr(network, key):
                raise section.error(key, "true", False, fix)
        return network

    def to_dict(self) -> dict[str, Any]:
        """The ``network`` object of ``config.json``, every key present."""
        data = asdict(self)
        return {"type": data.pop("type"), **data}


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
        kind = section.choice("type", SAMPLERS)
        train = section.integer("num_train_timesteps", 1, MAX_TIMESTEPS, 100)
        scheduler = cls(
            type=kind,
            num_train_timesteps=train,
            beta_schedule=section.choice("beta_schedule", BETA_SCHEDULES, "squaredcos_cap_v2"),
            beta_start=section.number("beta_start", 0.0, 1.0, 0.0001),
            beta_end=section.number("beta_end", 0.0, 1.0, 0.02),
            prediction_type=section.choice("prediction_type", PREDICTION_TYPES, "epsilon"),
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
        """The ``scheduler`` object of ``config.json``, every key present."""
        return asdict(self)


@dataclass(frozen=True)
class Affine:
    """``x_normalised = x * scale + offset``, one number of each per dimension."""

    scale: tuple[float, ...]
    offset: tuple[float, ...]

    @classmethod
    def identity(cls, dim: int) -> Affine:
        """The map that changes nothing."""
        return cls((1.0,) * dim, (0.0,) * dim)


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
            maps[key] = Affine(part.numbers("scale", dim), part.numbers("offset", dim))
            part.done()
        section.done()
        for i, scale in enumerate(maps["action"].scale):
            # float32 is what the inverse is computed in
            if abs(scale) < float(np.finfo(np.float32).tiny):
                path = f"action.scale[{i}]"
                raise section.error(path, "a number other than 0", scale, "use 1 for no scaling")
        return cls(maps["obs"], maps["action"])

    def to_dict(self) -> dict[str, Any]:
        """The ``normalizer`` object of ``config.json``."""
        return {
            key: {"scale": list(affine.scale), "offset": list(affine.offset)}
            for key, affine in (("obs", self.obs), ("action", self.action))
        }


@dataclass(frozen=True)
class PrunerConfig:
    """Shape of the pruner.

    ``"transformer"``: one pre-norm ReLU decoder layer over block tokens (arXiv 2605.13316).
    ``"mlp"``: the (1 + n_obs_steps) memory tokens of a step in a row, one hidden ReLU layer of
    ``hidden_dim``, 4 logits per block; ``n_head`` and ``dim_feedforward`` are 0.
    """

    hidden_dim: int = 512
    n_head: int = 8
    dim_feedforward: int = 1024
    type: str = PRUNER_TYPES[0]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, file: str = "config.json") -> PrunerConfig:
        """The checked ``pruner`` object; ``ValueError`` names key, value and expectation."""
        section = Section(data, "pruner", file)
        kind = section.choice("type", PRUNER_TYPES, PRUNER_TYPES[0])
        if kind == "mlp":
            mlp = cls(section.integer("hidden_dim", 1, MAX_WIDTH, 128), 0, 0, kind)
            section.done()
            return mlp
        pruner = cls(
            hidden_dim=section.integer("hidden_dim", 4, MAX_WIDTH, 512),
            n_head=section.integer("n_head", 1, MAX_HEADS, 8),
            dim_feedforward=section.integer("dim_feedforward", 1, 4 * MAX_WIDTH, 1024),
        )
        section.done()
        if pruner.hidden_dim % 2 or pruner.hidden_dim % pruner.n_head:
            expected = f"an even number divisible by n_head ({pruner.n_head})"
            raise section.error("hidden_dim", expected, pruner.hidden_dim)
        return pruner

    def to_dict(self) -> dict[str, Any]:
        """The ``pruner`` object of ``config.json``."""
        if self.type == "mlp":
            return {"type": self.type, "hidden_dim": self.hidden_dim}
        data = asdict(self)
        return {"type": data.pop("type"), **data}


@dataclass(frozen=True)
class PolicyConfig:
    """A whole ``config.json``; see the module docstring for every key."""

    network: NetworkConfig
    scheduler: SchedulerConfig
    normalizer: NormalizerConfig
    costs: tuple[int, ...]
    pruner: PrunerConfig | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

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
        network = NetworkConfig.from_dict(section.take("network"), file=file)
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
        section.done()
        free = copy.deepcopy(dict(provenance))
        return cls(network, scheduler, normalizer, costs, pruner, free)

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
        data["provenance"] = copy.deepcopy(self.provenance)
        return data


def _costs_to_dict(costs: tuple[int, ...]) -> dict[str, Any]:
    return {"version": COST_VERSION, "unit": "MAC", "blocks": list(costs)}


def _read_costs(data: Any, network: NetworkConfig, file: str) -> tuple[int, ...]:
    section = Section(data, "cost", file)
    section.integer("version", COST_VERSION, COST_VERSION)
    section.choice("unit", ("MAC",))
    blocks = section.take("blocks")
    expected = f"a list of {network.n_blocks} integers, one per block (3 x n_layer)"
    if not isinstance(blocks, list | tuple):
        raise section.error("blocks", expected, blocks)
    if len(blocks) != network.n_blocks:
        raise section.error("blocks", expected, _Text(f"a list of {len(blocks)}"))
    for i, cost in enumerate(blocks):
        if isinstance(cost, bool) or not isinstance(cost, int) or not 0 <= cost <= MAX_COST:
            raise section.error(f"blocks[{i}]", f"an integer from 0 to {MAX_COST}", cost)
    if sum(blocks) == 0:
        raise section.error("blocks", "at least one cost above 0", _Text("only zeros"))
    section.done()
    return tuple(blocks)


def _as_network(network: NetworkConfig | Mapping[str, Any]) -> NetworkConfig:
    return network if isinstance(network, NetworkConfig) else NetworkConfig.from_dict(network)


def _linear(name: str, out_dim: int, in_dim: int) -> Shapes:
    return {f"{name}.weight": (out_dim, in_dim), f"{name}.bias": (out_dim,)}


def _norm(name: str, dim: int) -> Shapes:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def _attention(name: str, dim: int) -> Shapes:
    packed: Shapes = {
        f"{name}.in_proj_weight": (3 * dim, dim),
        f"{name}.in_proj_bias": (3 * dim,),
    }
    return packed | _linear(f"{name}.out_proj", dim, dim)


def _transformer_layer(name: str, dim: int, feed_forward: int, *, decoder: bool) -> Shapes:
    """Tensors of torch's ``TransformerDecoderLayer``, or of ``TransformerEncoderLayer``."""
    shapes = _attention(f"{name}.self_attn", dim)
    if decoder:
        shapes |= _attention(f"{name}.multihead_attn", dim)
    shapes |= _linear(f"{name}.linear1", feed_forward, dim)
    shapes |= _linear(f"{name}.linear2", dim, feed_forward)
    for i in range(1, 4 if decoder else 3):
        shapes |= _norm(f"{name}.norm{i}", dim)
    return shapes


def network_shapes(network: NetworkConfig | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor in ``model.safetensors``.

    Names are those of ``TransformerForDiffusion`` in github.com/real-stanford/diffusion_policy; its
    masks and its empty ``_dummy_variable`` are not stored. Weights are (out, in), as in torch.
    """
    net = _as_network(network)
    dim = net.n_emb
    shapes: Shapes = {"pos_emb": (1, net.horizon, dim), "cond_pos_emb": (1, net.n_memory, dim)}
    shapes |= _linear("input_emb", dim, net.action_dim)
    shapes |= _linear("cond_obs_emb", dim, net.obs_dim)
    if net.n_cond_layers == 0:
        shapes |= _linear("encoder.0", 4 * dim, dim) | _linear("encoder.2", dim, 4 * dim)
    for i in range(net.n_cond_layers):
        shapes |= _transformer_layer(f"encoder.layers.{i}", dim, 4 * dim, decoder=False)
    for i in range(net.n_layer):
        shapes |= _transformer_layer(f"decoder.layers.{i}", dim, 4 * dim, decoder=True)
    return shapes | _norm("ln_f", dim) | _linear("head", net.action_dim, dim)


def pruner_shapes(
    pruner: PrunerConfig | Mapping[str, Any], network: NetworkConfig | Mapping[str, Any]
) -> Shapes:
    """Name -> shape of every tensor in ``pruner.safetensors``.

    The published pruner's names, or those of ``nn.Sequential(nn.Linear, nn.ReLU, nn.Linear)``.
    """
    net = _as_network(network)
    prn = pruner if isinstance(pruner, PrunerConfig) else PrunerConfig.from_dict(pruner)
    if prn.type == "mlp":
        first = _linear("0", prn.hidden_dim, net.n_memory * net.n_emb)
        return first | _linear("2", 4 * net.n_blocks, prn.hidden_dim)
    shapes = _linear("memory_proj", prn.hidden_dim, net.n_emb)
    shapes |= _transformer_layer(
        "transformer_decoder.layers.0", prn.hidden_dim, prn.dim_feedforward, decoder=True
    )
    return shapes | _linear("head", 4, prn.hidden_dim)


def block_names(network: NetworkConfig | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order, e.g. ``"layers.0.cross_attn"``."""
    net = _as_network(network)
    return [f"layers.{layer}.{kind}" for layer in range(net.n_layer) for kind in BLOCK_TYPES]


def block_types(network: NetworkConfig | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order: one of ``BLOCK_TYPES``."""
    return list(BLOCK_TYPES) * _as_network(network).n_layer


def block_costs(network: NetworkConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """Cost table, version 1: multiply-accumulates of one cell of each block, as executed.

    Self-attention: four d x d projections of T tokens, scores and mix. Feed-forward: two d x 4d
    matrices. Cross-attention: keys, values and output projection fold into S = 1 + n_obs_steps
    score and value vectors per head, so a cell is two (T x d) by (d x S n_head) products.
    """
    net = _as_network(network)
    tokens, dim = net.horizon, net.n_emb
    self_attn = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attn = 2 * tokens * net.n_memory * net.n_head * dim
    feed_forward = 8 * tokens * dim * dim
    return (self_attn, cross_attn, feed_forward) * net.n_layer
