"""Block-wise adaptive caching: compute where a block's output changes most between steps.

Source: "Block-wise Adaptive Caching for Accelerating Diffusion Policy", arXiv 2506.13456.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad.plan import Plan
from tsad.planners.base import PolicyFacts, budget, check_sparsity, layers, own_values
from tsad.planners.segments import Ints, Mask, Segments, spend

OBJECTIVES = ("code", "paper")
METRICS = ("cosine", "l1", "l2", "mse", "wasserstein")


def similarity(features: ArrayLike, metric: str = "cosine") -> NDArray[np.float64]:
    """How alike a block's outputs are at two steps: (B, K, K), larger is more alike.

    ``features`` (K, B, ...) are the branch outputs of a chunk, or (N, K, B, ...) of N chunks (then
    say so by a list of N arrays, or call it per chunk and take the mean). Distances are negated:
    "l1" and "mse" are means over the numbers of an output, "l2" is the root of their sum,
    "wasserstein" the distance of the sorted numbers.
    """
    if metric not in METRICS:
        raise ValueError(
            f"metric: expected one of {', '.join(METRICS)}, got {metric!r}; choose one of these"
        )
    if isinstance(features, list):
        return np.asarray(np.mean([similarity(chunk, metric) for chunk in features], axis=0))
    array = np.asarray(features, np.float64)
    if array.ndim < 3:
        raise ValueError(
            f"features: expected (steps, blocks, ...), got shape {array.shape}; give the branch "
            "outputs of one chunk, or a list of such arrays"
        )
    x = np.moveaxis(array.reshape(*array.shape[:2], -1), 1, 0)  # (B, K, D)
    if metric == "cosine":
        norm = np.linalg.norm(x, axis=2, keepdims=True)
        unit = x / np.where(norm > 0, norm, 1.0)
        return np.asarray(unit @ unit.swapaxes(1, 2))
    if metric == "wasserstein":
        x = np.sort(x, axis=2)
    rows = []
    for k in range(x.shape[1]):
        difference = x - x[:, k : k + 1]
        if metric in ("l1", "wasserstein"):
            rows.append(-np.abs(difference).mean(axis=2))
        elif metric == "mse":
            rows.append(-(difference**2).mean(axis=2))
        else:
            rows.append(-np.sqrt((difference**2).sum(axis=2)))
    return np.stack(rows, axis=1)


def _losses(alike: NDArray[np.float64], objective: str) -> NDArray[np.float64]:
    """(B, K, K + 1): minus the similarity that a segment [i, j) collects."""
    B, K, _ = alike.shape
    loss = np.zeros((B, K, K + 1))
    for i in range(K):
        if objective == "code":  # of every step to the computed one
            terms = alike[:, i, i:]
        else:  # of neighbours
            terms = np.zeros((B, K - i))
            terms[:, 1:] = alike[:, np.arange(i, K - 1), np.arange(i + 1, K)]
        loss[:, i, i + 1 :] = -np.cumsum(terms, axis=1)
    return loss


class Bac:
    """BAC as a planner: ``policy.planner = Bac(similarity(features))``.

    Args:
        alike: (B, K, K), `similarity` of the branch outputs of a few chunks.
        objective: what the dynamic programme maximises over the segments of a block. "code": the
            similarity of each step to the computed one, as the published code does; "paper": that
            of neighbouring steps inside a segment.
        n_bu: bubbling union: the ``n_bu`` blocks that change most are computed, too, wherever a
            feed-forward block of their layer or a later one is. (In the published code 1 acts like
            0; here it does not.)
        errors: (B,) how much each block changes, mean distance between two steps; for ``n_bu``.
            Default: 1 - the mean of ``alike``.

    ``plan(policy, n)`` is the published method, n computed steps for every block. At the dial n is
    the largest that fits; what is left, less than a step, goes to the blocks that gain most.
    """

    def __init__(
        self,
        alike: ArrayLike,
        *,
        objective: str = "code",
        n_bu: int = 0,
        errors: ArrayLike | None = None,
    ) -> None:
        table = np.asarray(alike, np.float64)
        if table.ndim != 3 or table.shape[1] != table.shape[2]:
            raise ValueError(
                f"alike: expected shape (blocks, steps, steps), got {table.shape}; use "
                "tsad.planners.similarity"
            )
        if objective not in OBJECTIVES:
            raise ValueError(
                f"objective: expected one of {', '.join(OBJECTIVES)}, got {objective!r}; choose "
                "one of these"
            )
        if not 0 <= n_bu <= len(table):
            raise ValueError(f"n_bu: expected 0 to {len(table)} blocks, got {n_bu}")
        self.objective, self.n_bu = objective, n_bu
        changes = 1 - table.mean(axis=(1, 2)) if errors is None else np.asarray(errors, np.float64)
        if changes.shape != (len(table),):
            raise ValueError(
                f"errors: expected {len(table)} numbers, one per block, got {changes.shape}"
            )
        self._bubbling = np.argsort(-changes, kind="stable")[:n_bu].tolist()
        self._segments = Segments(_losses(table, objective))

    def __repr__(self) -> str:
        return f"Bac(objective={self.objective!r}, n_bu={self.n_bu})"

    def _mask(self, policy: PolicyFacts, counts: Ints) -> Mask:
        computed = self._segments.mask(counts)
        layer, later = layers(policy), computed.copy()
        forward = np.array([kind == "feed_forward" for kind in policy.block_types])
        for block in self._bubbling:
            deeper = computed[:, forward & (layer >= layer[block])]
            later[:, block] |= deeper.any(axis=1)
        return later

    def _check(self, policy: PolicyFacts) -> None:
        K, B = self._segments.values.shape[0] - 1, self._segments.values.shape[1]
        if (K, B) != (policy.num_inference_steps, len(policy.blocks)):
            raise ValueError(
                f"policy: expected {K} steps and {B} blocks, as the features have, got "
                f"{policy.num_inference_steps} and {len(policy.blocks)}; use features of this "
                "policy and sampler"
            )

    def plan(self, policy: PolicyFacts, n: int) -> Plan:
        """Every block computed at ``n`` steps, 1 to K; with ``n_bu``, some at more."""
        self._check(policy)
        counts = np.full(len(policy.blocks), n, np.int64)
        return own_values(policy, self._mask(policy, counts), planner=repr(self), n=int(n))

    def __call__(self, policy: PolicyFacts, sparsity: float) -> Plan:
        """The plan at a sparsity of the cost; the planner's side of the dial."""
        self._check(policy)
        check_sparsity(policy, sparsity)
        costs, limit = np.asarray(policy.block_costs), budget(policy, sparsity)
        counts = np.ones(len(costs), np.int64)
        for n in range(policy.num_inference_steps, 1, -1):
            if n * costs.sum() > limit:
                continue  # not even without the union
            trial = np.full(len(costs), n, np.int64)
            if self._mask(policy, trial).sum(axis=0) @ costs <= limit:
                counts = trial
                break
        expand = (lambda trial: self._mask(policy, trial)) if self.n_bu else None
        counts = spend(self._segments, costs, limit, counts, expand)
        computed = self._mask(policy, counts)
        return own_values(policy, computed, planner=repr(self), sparsity=float(sparsity))
