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

import numpy as np

from tsad.section import MAX_WIDTH, Section, interface

TYPE = "unet1d"
FINAL_GROUPS = 8
MAX_LEVELS = 12
MAX_KERNEL = 31


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

    def arguments(self) -> dict[str, Any]:
        """What ``_core`` takes of this family alone."""
        return {
            "n_emb": self.diffusion_step_embed_dim,
            "down_dims": np.array(self.down_dims, np.int32),
            "kernel_size": self.kernel_size,
            "n_groups": self.n_groups,
            "use_film_scale_modulation": self.use_film_scale_modulation,
        }


def describe(network: Unet1dConfig) -> str:
    """Its size in a few words."""
    return f"UNet of widths {', '.join(map(str, network.down_dims))}"
