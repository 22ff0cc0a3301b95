"""What a policy is fine-tuned on for a warm start: chunks that go on from the one before.

At run time such a chunk begins with the chunk before, moved by what was executed of it, its last
action repeated, and the noise of its first step. That is no noisy version of good actions, which is
all that a policy has seen in training: it lags, and the last actions stand still. Here a share of
the windows begins like that, and the target is the noise that leads from there to the actions that
were demonstrated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tsad.config import SchedulerConfig
from tsad.samplers import advance, make_sampler, tail

STEPS, SPACING = 16, "trailing"  # of DDIM; a warm start is so many of these from the end
_BEFORE_STEPS = 4  # the chunk before takes: as good as eight or more in closed loop on Push-T


class WarmStarts:
    """Of a policy with this schedule, ``warm_start`` of DDIM-16's trailing steps from the end."""

    def __init__(self, scheduler: SchedulerConfig, warm_start: int, n_action_steps: int) -> None:
        ddim = replace(scheduler, type="ddim", timestep_spacing=SPACING)
        self.cold = make_sampler(asdict(replace(ddim, num_inference_steps=_BEFORE_STEPS)))
        rows = tail(make_sampler(asdict(replace(ddim, num_inference_steps=STEPS))), warm_start)
        self.timestep = int(rows.timesteps[0])
        self.executed = n_action_steps

    @torch.no_grad()
    def __call__(self, net: Callable[..., Tensor], obs: Tensor, noise: Tensor) -> Tensor:
        """What the chunks after it begin with, (B, horizon, action_dim), without their noise.

        ``obs`` (B, n_obs_steps, obs_dim) of the chunk before, ``noise`` what that begins with.
        """
        x, before = noise, (torch.zeros_like(noise), torch.zeros_like(noise))
        for k, row in enumerate(self.cold.table.tolist()):
            output = net(x, int(self.cold.timesteps[k]), obs).float()
            x, before = advance(row, x, output, before)
        last = x[:, -1:].expand(-1, self.executed, -1)
        return torch.cat([x, last], 1)[:, self.executed :]


def spread(batch: int, share: float) -> Tensor:
    """(batch,) bool: a share of the rows, evenly spread, as the time steps of a batch rise."""
    counts = torch.floor(torch.arange(batch + 1) * share + 1e-9)
    return counts[1:] > counts[:-1]


def before_windows(
    now: NDArray[np.int64], ends: NDArray[np.int64], n_obs_steps: int, n_action_steps: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The observations of the chunks before (W, n_obs_steps), and whether there was one (W,).

    ``now`` (W,) are the steps of the latest observations of windows, ``ends`` of the episodes.
    """
    starts = np.concatenate([[0], ends[:-1]])[np.searchsorted(ends, now, side="right")]
    earlier = now - n_action_steps
    steps = earlier[:, None] + np.arange(1 - n_obs_steps, 1)
    return np.maximum(steps, starts[:, None]), earlier >= starts
