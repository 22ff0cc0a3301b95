"""Samplers: one table of coefficients for DDPM, DDIM, DPM-Solver++(2M), and Euler's and Runge and
Kutta's steps of a flow.

A row of the table is one network evaluation. With e the network's output, x the sample, z the noise
of that row, x0' the x0 of the row before and x0'' that of two rows before, a row
(a, b, r, c, d, f, g, h, q) says

    x0 = clip(a x + b e, -r, r)                        r = inf: no clipping
    x  = c x0 + d x + f e + g x0' + h z + q x0''

Meaning and timesteps are those of diffusers' ``DDPMScheduler``, ``DDIMScheduler`` (eta 0) and
``DPMSolverMultistepScheduler`` (dpmsolver++, order 2, midpoint, final sigma 0): betas and their
cumulative product are float32 tables like there, coefficients are float64. Sources: DDPM
(arXiv 2006.11239), DDIM (2010.02502), DPM-Solver++ (2211.01095).

diffusers computes the coefficients of DDPM and DDIM in float32 too. Where the noise is small that
shows: 1 - A_t / A_(t-1) at beta = 1e-4 is wrong by up to 3e-4 of itself, and a chunk by 1e-5.
``coefficients=np.float32`` gives those numbers, to equal LeRobot.

Flow matching has its sample at time t from noise (0) to data (1), t data + (1 - t) noise, and the
network predicts the velocity data - noise; an Euler step is x + (t_next - t) e, as in LeRobot's
``multi_task_dit``, whose grid of times is float32. A step of Runge and Kutta's classic method of
fourth order is four rows, at the times t, twice the middle, and t_next; what they call x0 is what
later rows of the step need (`_rk4`).

Four cases where diffusers gives no usable result, and what happens here instead:

* trailing spacing, where diffusers' float stride yields one timestep too many, -1 (29 of 100 steps,
  say): the surplus timestep is left out;
* DDPM whose last timestep is not 0: diffusers adds noise after the last step. With
  ``fixed_small`` it is 1e-10 z and left out; with ``fixed_large`` it would ruin the actions, and
  the combination is refused;
* DPM-Solver++ with so many steps that a timestep comes twice (linspace, 100 of 100): diffusers
  divides by zero; here the row after the repetition is of first order;
* DPM-Solver++ with leading spacing and as many steps as in training: diffusers' stride is 0, and
  every timestep the same; refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.config import (
    EULER,
    FLOWS,
    RK4,
    SAMPLERS,
    STAGES,
    VELOCITY,
    SchedulerConfig,
    whole_steps,
)
from tsad.scope import scope
from tsad.section import MAX_TIMESTEPS

COLUMNS = ("a", "b", "r", "c", "d", "f", "g", "h", "q")
NOISE = COLUMNS.index("h")
MIN_VARIANCE = 1e-20

Float = NDArray[np.float64]
Shares = NDArray[np.floating[Any]]  # of the type that coefficients are computed in
Times = NDArray[Any]  # int64, of flow matching float64


@dataclass(frozen=True)
class Sampler:
    """A denoising loop of K network evaluations."""

    name: str
    """``"ddpm"``, ``"ddim"``, ``"dpmsolver++"``, ``"euler"`` or ``"rk4"``."""
    timesteps: Times
    """(K,) training timestep of each row, noisiest first; of a flow times from 0 on."""
    table: Float
    """(K, 9) rows of coefficients in the order of ``COLUMNS``."""
    adds_noise: bool
    """Whether any row has h != 0. The last row never has."""
    prediction_type: str
    """What the network's output is: ``scheduler["prediction_type"]``."""
    alphas_cumprod: Float
    """(K,) share of signal in the variance of the sample that each row gets."""

    def mixture(self, row: int) -> tuple[float, float]:
        """How much of the data, and how much noise, is in the sample that a row gets."""
        if self.prediction_type == VELOCITY:
            time = float(self.timesteps[row])
            return time, 1 - time
        share = float(self.alphas_cumprod[row])
        return math.sqrt(share), math.sqrt(1 - share)


def advance(row: Iterable[Any], x: Any, e: Any, before: tuple[Any, Any]) -> tuple[Any, Any]:
    """The sample after a row of a table, without its noise, and ``before`` for the next row.

    ``before`` is x0 of the last row and of the one before it. NumPy arrays or torch tensors.
    """
    a, b, r, c, d, f, g, _, q = row
    x0 = (a * x + b * e).clip(-r, r)
    return c * x0 + d * x + f * e + g * before[0] + q * before[1], (x0, before[0])


def make_sampler(
    scheduler: Mapping[str, Any],
    *,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    coefficients: type[np.floating[Any]] = np.float64,
) -> Sampler:
    """The sampler of a ``scheduler`` object of ``config.json`` (keys: ``tsad.config``).

    ``sampler`` overrides ``scheduler["type"]`` and ``num_inference_steps`` the key of that name;
    every other key keeps its meaning, ``clip_sample`` too: it says that the data lie in a range,
    and that holds whatever the sampler (diffusers' DPM-Solver++ has no clipping; where
    ``scheduler["type"]`` is ``"dpmsolver++"``, ``clip_sample`` is false unless given).
    ``coefficients`` is the type that DDPM's and DDIM's are computed in.
    Raises ``ValueError`` naming the key, the value, the choices and the fix.
    """
    given = dict(scheduler)
    flow = given.get("type") in FLOWS
    if not flow:
        given.setdefault("clip_sample", given.get("type") != "dpmsolver++")
    if sampler is not None:
        _check_sampler(sampler, flow)
        given["type"] = sampler
    if num_inference_steps is not None:
        given["num_inference_steps"] = _check_steps(num_inference_steps, given)
    config = SchedulerConfig.from_dict(given, file="scheduler")

    if flow:
        return (_euler if config.type == EULER else _rk4)(config.num_inference_steps)
    timesteps = _timesteps(config)
    alphas_cumprod = _alphas_cumprod(config)
    used = alphas_cumprod[timesteps]
    if not ((used > 0) & (used < 1)).all():
        raise ValueError(
            f"scheduler.beta_start, scheduler.beta_end: got {config.beta_start:g} and "
            f"{config.beta_end:g}, with which a timestep has no noise or no signal at all; "
            "expected betas well inside (0, 1): choose some such as 0.0001 and 0.02"
        )
    fill = {"ddpm": _fill_ddpm, "ddim": _fill_ddim, "dpmsolver++": _fill_dpmsolver}[config.type]
    exact = np.float64 if config.type == "dpmsolver++" else coefficients
    shares = alphas_cumprod.astype(exact)
    table = _fill_x0(config, shares[timesteps])
    fill(config, timesteps, shares, dict(zip(COLUMNS, table.T, strict=True)))
    return _freeze(config.type, timesteps, table, config.prediction_type, used)


def tail(sampler: Sampler, warm_start: int) -> Sampler:
    """The last ``warm_start`` steps of a sampler, for a sample that begins at their noise level.

    As diffusers on ``scheduler.timesteps[-warm_start:]`` with no history: the first row of
    DPM-Solver++ is of first order. Raises ``ValueError`` unless 1 <= ``warm_start`` <= K, and for
    one that begins within a step of Runge and Kutta's.
    """
    steps = len(sampler.timesteps)
    whole = isinstance(warm_start, int | np.integer) and not isinstance(warm_start, bool)
    if not whole or not 1 <= warm_start <= steps:
        raise ValueError(
            f"warm_start: expected an integer from 1 to {steps} (num_inference_steps), got "
            f"{warm_start!r}; choose one in this range, or None to start every chunk from noise"
        )
    if warm_start % STAGES.get(sampler.name, 1):
        expected, fix = whole_steps(sampler.name, warm_start)
        raise ValueError(f"warm_start: expected {expected}, got {warm_start}; {fix}")
    table = sampler.table[-warm_start:].copy()
    c, g = COLUMNS.index("c"), COLUMNS.index("g")
    table[0, c] += table[0, g]  # x0_previous = x0 is what makes a row of first order
    table[0, g] = 0
    return _freeze(
        sampler.name,
        sampler.timesteps[-warm_start:].copy(),
        table,
        sampler.prediction_type,
        sampler.alphas_cumprod[-warm_start:].copy(),
    )


def _freeze(
    name: str, timesteps: Times, table: Float, prediction_type: str, alphas_cumprod: Float
) -> Sampler:
    for array in (timesteps, table, alphas_cumprod):
        array.setflags(write=False)
    adds_noise = bool((table[:, COLUMNS.index("h")] != 0).any())
    return Sampler(name, timesteps, table, adds_noise, prediction_type, alphas_cumprod)


def _check_sampler(sampler: Any, flow: bool) -> None:
    fitting = [name for name in SAMPLERS if (name in FLOWS) == flow]
    if sampler not in fitting:
        choices = ", ".join(f'"{name}"' for name in fitting)
        why = "what this network predicts, velocities or not, is for these"
        raise ValueError(
            f"sampler: expected one of {choices}, got {sampler!r}; choose one of these "
            f"{f'({why}) ' if sampler in SAMPLERS else ''}"
            f"or None for the sampler of the checkpoint ({scope('samplers')})"
        )


def _check_steps(steps: Any, given: Mapping[str, Any]) -> int:
    train = given.get("num_train_timesteps", SchedulerConfig.num_train_timesteps)
    what = "num_train_timesteps"
    if given.get("type") in FLOWS:
        train, what = MAX_TIMESTEPS, "there is no sense in more"
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or not 1 <= steps <= train:
        raise ValueError(
            f"num_inference_steps: expected an integer from 1 to {train} ({what}), "
            f"got {steps!r}; choose one in this range, or None for the number of the checkpoint"
        )
    return int(steps)


# Schedules


def _linspace32(start: float, end: float, count: int) -> NDArray[np.float32]:
    """``torch.linspace`` in float32, to the bit: filled from both ends, one rounding each.

    The bits matter: 1 - beta is a float32 too, and at the small betas one unit in its last place is
    a few ten-thousandths of the noise level.
    """
    first, last = np.float32(start), np.float32(end)
    if count == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    values = np.where(i < count // 2, first + step * i, last - step * (count - 1 - i))
    return values.astype(np.float32)


def _cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2


def _betas(config: SchedulerConfig) -> NDArray[np.float32]:
    n, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    if config.beta_schedule == "linear":
        return _linspace32(start, end, n)
    if config.beta_schedule == "scaled_linear":
        return _linspace32(start**0.5, end**0.5, n) ** 2
    ratios = [_cosine((i + 1) / n) / _cosine(i / n) for i in range(n)]
    return np.array([min(1 - ratio, 0.999) for ratio in ratios], dtype=np.float32)


def _alphas_cumprod(config: SchedulerConfig) -> Float:
    """A_t, the share of signal variance: float32 values, accumulated in double as torch does."""
    alphas = np.float32(1) - _betas(config)
    products = np.cumprod(alphas.astype(np.float64)).astype(np.float32)
    return products.astype(np.float64)


def _timesteps(config: SchedulerConfig) -> Times:
    """Training timesteps in loop order, noisiest first (arXiv 2305.08891, table 2)."""
    train, steps = config.num_train_timesteps, config.num_inference_steps
    # DPM-Solver++ counts the noise-free end as one more point of the grid.
    points = steps + 1 if config.type == "dpmsolver++" else steps
    ascending: NDArray[Any]
    if config.timestep_spacing == "linspace":
        ascending = np.linspace(0, train - 1, points).round()
    elif config.timestep_spacing == "leading":
        stride = train // points
        if stride == 0:
            raise ValueError(
                f"num_inference_steps: expected at most {train - 1} with sampler dpmsolver++ and "
                f"timestep_spacing leading, got {steps}; pass fewer (10 is usual)"
            )
        ascending = np.arange(points) * stride + config.steps_offset
    else:
        ascending = np.arange(train, 0, -train / steps).round()[::-1] - 1
    timesteps = ascending[::-1][:steps].astype(np.int64)
    if timesteps[0] >= train:
        most = config.steps_offset - (timesteps[0] - (train - 1))
        raise ValueError(
            f"scheduler.steps_offset: expected at most {most} with {steps} steps, got "
            f"{config.steps_offset}, which leads to timestep {timesteps[0]} while training ended "
            f"at {train - 1}; lower it, or pass fewer num_inference_steps"
        )
    return timesteps


# Tables


def _euler(steps: int) -> Sampler:
    """x + (t_next - t) e on an even grid of times; x0, which nothing here uses, is at time 1."""
    grid = _linspace32(0, 1, steps + 1)
    times = grid[:-1].astype(np.float64)
    table = np.zeros((steps, len(COLUMNS)))
    column = dict(zip(COLUMNS, table.T, strict=True))
    column["a"][:] = 1
    column["b"][:] = 1 - times
    column["r"][:] = np.inf
    column["d"][:] = 1
    column["f"][:] = np.diff(grid)
    return _flow(EULER, times, table)


def _rk4(evaluations: int) -> Sampler:
    """Steps of x + dt/6 (k1 + 2 k2 + 2 k3 + k4), four rows each; ``evaluations`` of the network.

    With x the sample of the step's start, k1 to k4 the network's outputs and x1 = x, x2 = x +
    dt/2 k1, x3 = x + dt/2 k2 and x4 = x + dt k3 where it is asked:

        x0 = x1             x = x1 + dt/2 e
        x0 = x2 / 3         x = x0' + dt/2 e              x0'  is x1
        x0 = 2/3 x3 + dt/3 e    x = x0'' + dt e           x0'' is x1
                            x = x0' + x0'' + dt/6 e

    as x2 / 3 + 2/3 x3 is x + dt/6 k1 + dt/3 k2. Nothing larger than the sample is subtracted.
    """
    grid = _linspace32(0, 1, evaluations // 4 + 1)
    dt, start = np.diff(grid).astype(np.float64), grid[:-1].astype(np.float64)
    times = np.stack([start, start + dt / 2, start + dt / 2, start + dt], 1)
    table = np.zeros((len(dt), 4, len(COLUMNS)))
    column = dict(zip(COLUMNS, np.moveaxis(table, 2, 0), strict=True))
    column["a"][:] = [1, 1 / 3, 2 / 3, 0]
    column["b"][:, 2] = dt / 3
    column["r"][:] = np.inf
    column["d"][:, 0] = 1
    column["f"][:] = np.stack([dt / 2, dt / 2, dt, dt / 6], 1)
    column["g"][:] = [0, 1, 0, 1]
    column["q"][:] = [0, 0, 1, 1]
    # the network is asked at float32 times, as in LeRobot
    asked = times.ravel().astype(np.float32).astype(np.float64)
    return _flow(RK4, asked, table.reshape(evaluations, len(COLUMNS)))


def _flow(name: str, times: Times, table: Float) -> Sampler:
    share = times**2 / (times**2 + (1 - times) ** 2)
    return _freeze(name, times, table, VELOCITY, share)


def _fill_x0(config: SchedulerConfig, signal: Shares) -> Float:
    """A table with a, b and r filled: x0 from the sample and the network's output."""
    table = np.zeros((len(signal), len(COLUMNS)))
    column = dict(zip(COLUMNS, table.T, strict=True))
    roots = np.sqrt(signal), np.sqrt(1 - signal)
    alpha, sigma = (root.astype(np.float64) for root in roots)
    if config.prediction_type == "epsilon":
        column["a"][:] = 1 / alpha
        column["b"][:] = -sigma / alpha
    elif config.prediction_type == "sample":
        column["b"][:] = 1
    else:
        column["a"][:] = alpha
        column["b"][:] = -sigma
    column["r"][:] = config.clip_sample_range if config.clip_sample else np.inf
    return table


def _fill_ddpm(
    config: SchedulerConfig, timesteps: Times, alphas_cumprod: Shares, column: dict[str, Float]
) -> None:
    """Posterior mean and deviation between neighbouring timesteps of the list."""
    now = alphas_cumprod[timesteps]
    then = np.append(now[1:], now.dtype.type(1))
    beta = 1 - now / then
    column["c"][:] = np.sqrt(then) * beta / (1 - now)
    column["d"][:] = np.sqrt(now / then) * (1 - then) / (1 - now)
    variance = beta
    if config.variance_type != "fixed_large":  # fixed_small_log: fixed_small by way of a logarithm
        variance = np.maximum((1 - then) / (1 - now) * beta, MIN_VARIANCE)
    elif timesteps[-1] > 0:
        raise ValueError(
            'scheduler.variance_type: expected "fixed_small" when the last timestep is not 0 '
            f'(it is {timesteps[-1]}), got "fixed_large", which would add noise of deviation '
            f"{math.sqrt(beta[-1]):.2g} to the finished actions; choose fixed_small, or "
            "timestep_spacing leading with steps_offset 0"
        )
    column["h"][:-1] = np.sqrt(variance[:-1])


def _fill_ddim(
    config: SchedulerConfig, timesteps: Times, alphas_cumprod: Shares, column: dict[str, Float]
) -> None:
    """Deterministic (eta 0); the direction comes from the network's output, not from clipped x0."""
    now = alphas_cumprod[timesteps]
    # As in diffusers, one stride earlier: with trailing and linspace not the next of the list.
    earlier = timesteps - config.num_train_timesteps // config.num_inference_steps
    final = 1.0 if config.set_alpha_to_one else alphas_cumprod[0]
    then = np.where(earlier >= 0, alphas_cumprod[earlier], now.dtype.type(final))
    column["c"][:] = np.sqrt(then)
    direction = np.sqrt(1 - then).astype(np.float64)
    if config.prediction_type == "epsilon":
        column["f"][:] = direction
    elif config.prediction_type == "sample":  # epsilon = (x - sqrt(now) e) / sqrt(1 - now)
        column["d"][:] = direction / np.sqrt(1 - now)
        column["f"][:] = -column["d"] * np.sqrt(now)
    else:  # epsilon = sqrt(1 - now) x + sqrt(now) e
        column["d"][:] = direction * np.sqrt(1 - now)
        column["f"][:] = direction * np.sqrt(now)


def _fill_dpmsolver(
    config: SchedulerConfig, timesteps: Times, alphas_cumprod: Shares, column: dict[str, Float]
) -> None:
    """Second order from the x0 of two rows; first order in the first row and the last."""
    signal = np.append(alphas_cumprod[timesteps], 1.0)
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    column["d"][:] = sigma[1:] / sigma[:-1]
    # alpha_t (1 - exp(-h)), without the subtraction of two near numbers' logarithms
    column["c"][:] = alpha[1:] - column["d"] * alpha[:-1]
    log_snr = np.log(alpha[:-1]) - np.log(sigma[:-1])
    step = np.diff(log_snr)
    for k in range(1, len(timesteps) - 1):
        if step[k - 1] > 0:
            half = 0.5 * column["c"][k] * step[k] / step[k - 1]
            column["c"][k] += half
            column["g"][k] = -half
