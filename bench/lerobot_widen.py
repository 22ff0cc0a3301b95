"""A wider LeRobot UNet that computes what a narrower one does: where `lerobot_policy.py train
--grow` begins.

Every channel is doubled (or taken `times` times); each copy gets what the one had, and what reads
them takes a share of each, drawn anew for every weight, so that the copies do not stay the same in
training. A GroupNorm's groups keep their mean and variance, as copies are neighbours. The idea is
that of Chen et al., *Net2Net: Accelerating Learning via Knowledge Transfer* (ICLR 2016).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SPREAD = 0.25  # of the shares, around 1 / times


def widen(narrow: nn.Module, wide: nn.Module, generator: torch.Generator) -> None:
    """Give ``wide`` the function of ``narrow``; its widths are whole multiples, the rest equal.

    Raises:
        ValueError: a width is no multiple of the other's, or a layer is of another kind.
    """
    for (name, theirs), ours in zip(narrow.named_modules(), wide.modules(), strict=True):
        if type(theirs) is not type(ours):
            raise ValueError(f"{name}: expected {type(theirs).__name__}, got {type(ours).__name__}")
        inputs = 0 if isinstance(theirs, nn.ConvTranspose1d) else 1
        for part, old in theirs.named_parameters(recurse=False):
            new = ours.get_parameter(part)
            value = old.detach()
            for dim, (size, wanted) in enumerate(zip(old.shape, new.shape, strict=True)):
                times, rest = divmod(wanted, size)
                if rest:
                    raise ValueError(f"{name}.{part}: {wanted} is no multiple of {size}")
                value = value.repeat_interleave(times, dim)
                if old.dim() > 1 and dim == inputs and times > 1:
                    value = value * shares(value.shape, dim, times, generator)
            with torch.no_grad():
                new.copy_(value)


def shares(shape: torch.Size, dim: int, times: int, generator: torch.Generator) -> Tensor:
    """What each of ``times`` neighbours along ``dim`` counts; together 1."""
    grouped = (*shape[:dim], shape[dim] // times, times, *shape[dim + 1 :])
    drawn = SPREAD * torch.randn(grouped, generator=generator, dtype=torch.float64)
    return (1 / times + drawn - drawn.mean(dim + 1, keepdim=True)).reshape(shape)
