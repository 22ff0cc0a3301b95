"""Published rules that decide whole steps, or layers of them, by a formula or by distances.

Static: `c3ache`, `delta_dit` and `deepcache`. Decided from how much something changes from step to
step: `teacache` and `fbcache`. Their authors measure it while denoising; here the distances are
given, recorded on some chunks, and the result is a fixed plan (or one per lane, from a chunk's own
distances).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.plan import COMPUTE, REUSE_ROLLOUT, Plan
from tsad.planners.base import (
    PolicyFacts,
    check_sparsity,
    full,
    integer,
    layers,
    make_plan,
    number,
    of_policy,
    own_values,
)

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@of_policy
def c3ache(policy: PolicyFacts, start: int, end: int) -> Plan:
    """Steps start to end, both included, reuse the chunk before; the other steps are computed.

    The first chunk after a reset is dense. The published method (arXiv 2606.08962) also refreshes
    every 4th or 8th chunk: set ``planners.dense(policy)`` for that chunk, else what is reused is as
    old as the episode.
    """
    steps = policy.num_inference_steps
    for name, step in (("start", start), ("end", end)):
        integer(name, step, 0, steps - 1, "both are steps that reuse")
    if start > end:
        raise ValueError(
            f"start, end: expected 0 <= start <= end < {steps} (num_inference_steps), got {start} "
            f"and {end}; both are steps that reuse"
        )
    sources = full(policy, COMPUTE)
    sources[start : end + 1] = REUSE_ROLLOUT
    return make_plan(policy, sources, None, planner="c3ache", start=start, end=end)


@of_policy
def delta_dit(policy: PolicyFacts, boundary: int, n_layers: int, interval: int) -> Plan:
    """Every ``interval``-th step computed; between, the last layers rest, later the first ones.

    Steps before ``boundary`` reuse the last ``n_layers`` layers, steps from it on the first
    ``n_layers``. Reusing every block's own value there is reusing the group's residual. Source:
    Delta-DiT, arXiv 2406.01125.
    """
    layer = layers(policy)
    steps, count = policy.num_inference_steps, int(layer.max()) + 1
    integer("n_layers", n_layers, 1, count, "of the policy's layers")
    integer("boundary", boundary, 0, steps, "a step")
    integer("interval", interval, 1, None, "1 is dense")
    computed = np.ones((steps, len(layer)), bool)
    for k in range(steps):
        if k % interval:
            computed[k] = layer < count - n_layers if k < boundary else layer >= n_layers
    return own_values(
        policy,
        computed,
        planner="delta_dit",
        boundary=boundary,
        n_layers=n_layers,
        interval=interval,
    )


@of_policy
def deepcache(policy: PolicyFacts, interval: int, levels: int = 1) -> Plan:
    """Every ``interval``-th step computed; between, the outer ``levels`` of a UNet alone.

    Outer are its first modules on the way down and as many of the last on the way up; what lies
    between takes what it added at the last computed step. Source: DeepCache, arXiv 2312.00858,
    uniform. There the deep levels' features are kept as a whole; here what their blocks add, and
    the changes of length and the 1x1 convolutions beside the blocks run at every step.
    """
    layer = layers(policy)
    steps, last = policy.num_inference_steps, int(layer.max())
    if not policy.blocks[0].startswith("down_modules."):
        raise ValueError(
            f"policy: expected a UNet, whose blocks are down_modules.0.0 and so on, got blocks as "
            f"{policy.blocks[0]}; use delta_dit"
        )
    most = (last - 1) // 2  # as many up as down, but for the innermost, and the middle
    integer("levels", levels, 1, most, "which leaves some deeper")
    integer("interval", interval, 1, None, "1 is dense")
    computed = np.zeros((steps, len(layer)), bool)
    computed[::interval] = True
    computed[:, (layer < levels) | (layer > last - levels)] = True
    return own_values(policy, computed, planner="deepcache", interval=interval, levels=levels)


@of_policy
def deepcache_sparse(policy: PolicyFacts, sparsity: float) -> Plan:
    """`deepcache` at the dial: of one outer level, the shortest interval that is sparse enough."""
    check_sparsity(policy, sparsity)
    for interval in range(1, policy.num_inference_steps + 1):
        plan = deepcache(policy, interval)
        if plan.sparsity >= sparsity - 1e-12:
            return plan
    raise ValueError(
        f"sparsity: expected at most {plan.sparsity:.4g}, what deepcache reaches, got {sparsity}; "
        "ask for less"
    )


def relative_l1(values: ArrayLike) -> Floats:
    """(K, K): sum |values[k] - values[i]| / sum |values[i]| of arrays (K, ...); row i, column k."""
    x = np.asarray(values, np.float64).reshape(len(np.asarray(values)), -1)
    size = np.abs(x).sum(axis=1)
    change = np.stack([np.abs(x - row).sum(axis=1) for row in x])
    return np.asarray(change / np.where(size > 0, size, 1.0)[:, None])


# ---- TeaCache


def fit_teacache(
    inputs: ArrayLike, outputs: ArrayLike, degree: int = 4
) -> tuple[Callable[[Floats], Floats], float]:
    """The polynomial from distances of inputs to distances of outputs, and its R^2.

    ``inputs`` and ``outputs`` (n,) are relative L1 distances between consecutive steps. Look at
    R^2: published coefficients have been used where they explain a tenth of the variance.
    """
    x, y = np.ravel(np.asarray(inputs, np.float64)), np.ravel(np.asarray(outputs, np.float64))
    if x.shape != y.shape or len(x) <= degree:
        raise ValueError(
            f"inputs, outputs: expected two lists of more than {degree} distances, equally long, "
            f"got {len(x)} and {len(y)}; record more steps"
        )
    polynomial = np.polynomial.Polynomial.fit(x, y, degree)
    spread = ((y - y.mean()) ** 2).sum()
    left = ((y - polynomial(x)) ** 2).sum()
    return polynomial, float(1 - left / spread) if spread > 0 else 1.0


def teacache_rows(distances: ArrayLike, threshold: float) -> Mask:
    """Which steps TeaCache computes, (K,) bool.

    ``distances`` (K,): how much the input of step k differs from that of k - 1, after the
    polynomial; the first is not read. Distances add up until they reach ``threshold``; then a step
    is computed and the sum starts again. The first and the last step are always computed. Source:
    arXiv 2411.19108.
    """
    d = np.asarray(distances, np.float64)
    if d.ndim != 1 or not len(d) or not np.isfinite(d[1:]).all():
        raise ValueError(f"distances: expected K finite numbers, got {d.shape}; one per step")
    threshold = number("threshold", threshold, "what distances may add up to")
    rows, total = np.zeros(len(d), bool), 0.0
    for k in range(len(d)):
        total += float(d[k]) if k else 0.0
        if k in (0, len(d) - 1) or total >= threshold:
            rows[k], total = True, 0.0
    return rows


def _per_chunk(
    policy: PolicyFacts, distances: ArrayLike, axes: int, plan: Callable[[Floats], Plan]
) -> Plan | list[Plan]:
    d = np.asarray(distances, np.float64)
    steps = policy.num_inference_steps
    if d.ndim not in (axes, axes + 1) or d.shape[-axes:] != (steps,) * axes:
        wanted = ", ".join([str(steps)] * axes)
        raise ValueError(
            f"distances: expected shape ({wanted}), or one such per lane, got {d.shape}; record "
            "them with this policy's sampler"
        )
    return plan(d) if d.ndim == axes else [plan(chunk) for chunk in d]


@of_policy
def teacache(policy: PolicyFacts, distances: ArrayLike, threshold: float) -> Plan | list[Plan]:
    """`teacache_rows` as a plan; from ``distances`` (lanes, K), one plan per lane.

    TeaCache takes the input of the first block, modulated by the time step. A network whose time
    comes as a token has no such thing; the embedded sample plus the time's embedding may stand in.
    """

    def plan(d: Floats) -> Plan:
        rows = teacache_rows(d, threshold)
        computed = np.repeat(rows[:, None], len(policy.blocks), axis=1)
        return own_values(policy, computed, planner="teacache", threshold=float(threshold))

    return _per_chunk(policy, distances, 1, plan)


# ---- First-block cache


def fbcache_rows(distances: ArrayLike, threshold: float) -> Mask:
    """Which steps the first-block cache computes in full, (K,) bool; the first one always.

    ``distances`` (K, K): row i, column k says how much the first layer's residual at step k differs
    from that of step i (`relative_l1`). A step is reused while that to the last computed step is
    below ``threshold``. Source: ParaAttention; diffusers' FirstBlockCacheConfig.
    """
    d = np.asarray(distances, np.float64)
    if d.ndim != 2 or d.shape[0] != d.shape[1]:
        raise ValueError(f"distances: expected shape (K, K), got {d.shape}; use relative_l1")
    threshold = number("threshold", threshold, "the distance from which a step is computed")
    rows, last = np.zeros(len(d), bool), 0
    for k in range(len(d)):
        if k == 0 or d[last, k] >= threshold:
            rows[k], last = True, k
    return rows


@of_policy
def fbcache(policy: PolicyFacts, distances: ArrayLike, threshold: float) -> Plan | list[Plan]:
    """`fbcache_rows` as a plan: the first layer always, the others in those steps.

    From ``distances`` (lanes, K, K), one plan per lane.
    """

    def plan(d: Floats) -> Plan:
        computed = np.repeat(fbcache_rows(d, threshold)[:, None], len(policy.blocks), axis=1)
        computed[:, layers(policy) == 0] = True
        return own_values(policy, computed, planner="fbcache", threshold=float(threshold))

    return _per_chunk(policy, distances, 2, plan)


class Threshold:
    """A row rule at the dial: the lowest threshold whose plan is sparse enough.

    Args:
        rule: `teacache` or `fbcache`.
        distances: of one chunk, or a mean over chunks.

    Rows are all or nothing, so it is met within one step; ValueError beyond what the rule reaches.
    """

    def __init__(
        self, rule: Callable[[PolicyFacts, Floats, float], Plan | Sequence[Plan]], distances: Floats
    ) -> None:
        self._rule, self._distances = rule, np.asarray(distances, np.float64)

    def __repr__(self) -> str:
        return f"Threshold({getattr(self._rule, '__name__', repr(self._rule))})"

    def _plan(self, policy: PolicyFacts, threshold: float) -> Plan:
        plan = self._rule(policy, self._distances, threshold)
        if not isinstance(plan, Plan):
            raise ValueError("distances: expected those of one chunk; take their mean over chunks")
        return plan

    def __call__(self, policy: PolicyFacts, sparsity: float) -> Plan:
        check_sparsity(policy, sparsity)
        most = self._plan(policy, float(np.finfo(np.float64).max))
        if most.sparsity < sparsity - 1e-12:
            raise ValueError(
                f"sparsity: expected at most {most.sparsity:.4g}, what {self!r} reaches, got "
                f"{sparsity}; ask for less"
            )
        low, high = 0.0, 1.0
        while self._plan(policy, high).sparsity < sparsity - 1e-12:
            low, high = high, high * 2
        for _ in range(60):
            middle = (low + high) / 2
            enough = self._plan(policy, middle).sparsity >= sparsity - 1e-12
            low, high = (low, middle) if enough else (middle, high)
        return self._plan(policy, high)
