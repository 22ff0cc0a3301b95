"""The conditional UNet over time of LeRobot's and Diffusion Policy's diffusion policies.

``network`` keys of a policy of this family, all of them required:

``type``                        ``"unet1d"``
``horizon``                     actions predicted at once, a multiple of 2^(levels - 1)
``n_obs_steps``                 observations seen
``n_action_steps``              actions executed; there are none beyond the horizon
``obs_dim``                     numbers per observation
``action_dim``                  numbers per action
``down_dims``                   channels of each level, outermost first
``kernel_size``                 taps of the convolutions in blocks, odd
``n_groups``                    groups of the norms in blocks; that of the last convolution has 8
``diffusion_step_embed_dim``    width of the time embedding
``use_film_scale_modulation``   whether the condition scales channels beside moving them

Tensor names are those of LeRobot's ``DiffusionConditionalUnet1d``. Blocks are its residual blocks
in order of execution, named by their modules; a block's value, what it adds to its residual, is
(channels, time steps), and blocks of one such shape are of one type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tsad.section import MAX_WIDTH, Section, Shapes, interface

TYPE = "unet1d"
FINAL_GROUPS = 8
STEP_EXPANSION = 4
MAX_LEVELS = 12
MAX_KERNEL = 99
DOWN_KERNEL, UP_KERNEL = 3, 4


@dataclass(frozen=True)
class Unet1dConfig:
    """The ``network`` keys of the module docstring."""

    horizon: int
    n_obs_steps: int
    n_action_steps: int
    obs_dim: int
    action_dim: int
    down_dims: tuple[int, ...]
    kernel_size: int
    n_groups: int
    diffusion_step_embed_dim: int
    use_film_scale_modulation: bool
    type: str = TYPE

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, name: str = "network", file: str = "config.json"
    ) -> Unet1dConfig:
        """The checked ``network`` object; ``ValueError`` names key, value and expectation.

        ``name`` and ``file`` say in errors where it stood.
        """
        section = Section(data, name, file)
        dims = section.take("down_dims")
        network = cls(
            type=section.choice("type", (TYPE,)),
            **interface(section),
            down_dims=tuple(dims) if isinstance(dims, list | tuple) else (),
            kernel_size=section.integer("kernel_size", 1, MAX_KERNEL),
            n_groups=section.integer("n_groups", 1, MAX_WIDTH),
            diffusion_step_embed_dim=section.integer("diffusion_step_embed_dim", 4, MAX_WIDTH),
            use_film_scale_modulation=section.flag("use_film_scale_modulation", False),
        )
        section.done()
        network._check_widths(section, dims)
        halvings = 2 ** (len(network.down_dims) - 1)
        if network.horizon % halvings:
            expected = f"a multiple of {halvings}, as each level but the last halves it"
            raise section.error("horizon", expected, network.horizon)
        if network.kernel_size % 2 == 0:
            raise section.error("kernel_size", "an odd number", network.kernel_size)
        if network.diffusion_step_embed_dim % 2:
            got = network.diffusion_step_embed_dim
            raise section.error("diffusion_step_embed_dim", "an even number", got)
        return network

    def _check_widths(self, section: Section, given: Any) -> None:
        expected = f"a list of 1 to {MAX_LEVELS} integers from 1 to {MAX_WIDTH}"
        good = all(type(dim) is int and 1 <= dim <= MAX_WIDTH for dim in self.down_dims)
        if not good or not 1 <= len(self.down_dims) <= MAX_LEVELS:
            raise section.error("down_dims", expected, given)
        for dim in self.down_dims:
            if dim % self.n_groups:
                expected = f"numbers divisible by n_groups ({self.n_groups})"
                raise section.error("down_dims", expected, given)
        if self.down_dims[0] % FINAL_GROUPS:
            expected = f"a first number divisible by {FINAL_GROUPS}, the last norm's groups"
            raise section.error("down_dims", expected, given)

    def to_dict(self) -> dict[str, Any]:
        """The ``network`` object of ``config.json``, every key present."""
        data = asdict(self)
        return {"type": data.pop("type"), **data, "down_dims": list(self.down_dims)}

    @property
    def n_blocks(self) -> int:
        """B: prunable residual blocks, two at each level of either way and two between."""
        return 4 * len(self.down_dims)

    @property
    def condition_dim(self) -> int:
        """Width of what conditions every block: the time's embedding, then all observations."""
        return self.diffusion_step_embed_dim + self.n_obs_steps * self.obs_dim


@dataclass(frozen=True)
class Block:
    """A residual block: its module's name, channels in and out, time steps."""

    name: str
    channels_in: int
    channels: int
    length: int

    @property
    def type(self) -> str:
        """Blocks of one type can stand in for each other: their values have one shape."""
        return f"conv_residual[{self.channels}x{self.length}]"


def _as_network(network: Unet1dConfig | Mapping[str, Any]) -> Unet1dConfig:
    return network if isinstance(network, Unet1dConfig) else Unet1dConfig.from_dict(network)


def blocks(network: Unet1dConfig | Mapping[str, Any]) -> list[Block]:
    """The prunable blocks in order of execution."""
    net = _as_network(network)
    dims, length, channels = net.down_dims, net.horizon, net.action_dim
    found: list[Block] = []

    def pair(name: str, channels_in: int, channels: int) -> None:
        found.append(Block(f"{name}.0", channels_in, channels, length))
        found.append(Block(f"{name}.1", channels, channels, length))

    for i, dim in enumerate(dims):
        pair(f"down_modules.{i}", channels, dim)
        channels = dim
        if i < len(dims) - 1:
            length //= 2
    pair("mid_modules", channels, channels)
    for i, dim in enumerate(reversed(dims[:-1])):  # the skip connection doubles the channels in
        pair(f"up_modules.{i}", 2 * dims[-1 - i], dim)
        length *= 2
    return found


def block_names(network: Unet1dConfig | Mapping[str, Any]) -> list[str]:
    """Names of the prunable blocks in execution order, e.g. ``"down_modules.0.1"``."""
    return [block.name for block in blocks(network)]


def block_types(network: Unet1dConfig | Mapping[str, Any]) -> list[str]:
    """Type of each block in execution order, e.g. ``"conv_residual[512x16]"``."""
    return [block.type for block in blocks(network)]


def block_costs(network: Unet1dConfig | Mapping[str, Any]) -> tuple[int, ...]:
    """Multiply-accumulates of one cell of each block as executed.

    Its two convolutions, without the taps that only meet padding. Its 1x1 residual is computed
    whatever the block's source, and FiLM is a table and one product per chunk.
    """
    net = _as_network(network)
    half = net.kernel_size // 2
    costs = []
    for block in blocks(net):
        T = block.length
        taps = sum(max(0, T - abs(j)) for j in range(-half, half + 1))
        costs.append(taps * block.channels * (block.channels_in + block.channels))
    return tuple(costs)


def shapes(network: Unet1dConfig | Mapping[str, Any]) -> Shapes:
    """Name -> shape of every tensor; convolutions are (out, in, taps), transposed (in, out, 4)."""
    net = _as_network(network)
    dim, dims = net.diffusion_step_embed_dim, net.down_dims
    found = _layer("diffusion_step_encoder.1", STEP_EXPANSION * dim, dim)
    found |= _layer("diffusion_step_encoder.3", dim, STEP_EXPANSION * dim)
    for block in blocks(net):
        n = block.channels
        found |= _convolution(f"{block.name}.conv1", n, block.channels_in, net.kernel_size)
        film = 2 * n if net.use_film_scale_modulation else n
        found |= _layer(f"{block.name}.cond_encoder.1", film, net.condition_dim)
        found |= _convolution(f"{block.name}.conv2", n, n, net.kernel_size)
        if block.channels_in != n:
            found |= _layer(f"{block.name}.residual_conv", n, block.channels_in, 1)
    for i, (down, up) in enumerate(zip(dims[:-1], reversed(dims[:-1]), strict=True)):
        found |= _layer(f"down_modules.{i}.2", down, down, DOWN_KERNEL)
        found |= _layer(f"up_modules.{i}.2", up, up, UP_KERNEL)
    found |= _convolution("final_conv.0", dims[0], dims[0], net.kernel_size)
    return found | _layer("final_conv.1", net.action_dim, dims[0], 1)


def _layer(name: str, out_dim: int, *others: int) -> Shapes:
    return {f"{name}.weight": (out_dim, *others), f"{name}.bias": (out_dim,)}


def _convolution(name: str, out_dim: int, in_dim: int, kernel: int) -> Shapes:
    """Convolution and norm of a ``Conv1dBlock``."""
    return _layer(f"{name}.block.0", out_dim, in_dim, kernel) | _layer(f"{name}.block.1", out_dim)


def describe(network: Unet1dConfig) -> str:
    """Its size in a few words."""
    return f"UNet of widths {', '.join(map(str, network.down_dims))}"
