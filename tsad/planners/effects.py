"""What each reuse does to the executed actions, and the static plan that does least.

The tables are first-order: for recorded chunks, the gradient of the executed actions with respect
to every branch output, times the difference between the value that reuse would take and the right
one, squared. `tsad.training.sensitivity` measures them (torch); this module only uses them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tsad.arrays import parse_header, read_npz
from tsad.files import write_atomically
from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan
from tsad.planners.base import PolicyFacts, budget, check_sparsity, make_plan
from tsad.planners.segments import Segments

Floats = NDArray[np.float64]

FORMAT = "tsad-effects"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Effects:
    """Mean squared change of an executed action number, normalised units, per reuse. Float32.

    K steps, B blocks; means over chunks and random projections of the actions.

    ``pair``      (B, K, K)       block b at step k (last axis) takes its value of step i
    ``segment``   (B, K, K + 1)   all steps between i and j (last axis) take the value of step i
    ``kind``      (K, B, B)       block b (middle) takes the value of block c of its type: of the
                                  same step if c < b, else of the step before; NaN for other types
    ``skip``      (K, B)          nothing is added
    ``rollout``   (A, K, B)       the value of the same cell 1 .. A chunks ago; NaN where no
                                  measured chunk has one so long before it

    For the published rules: ``alike`` (B, K, K) cosine similarity of outputs, ``changes`` (B,) mean
    L1 distance between two steps, ``first_layer`` (K, K) relative L1 of the first layer's residual
    (row: the cached step), ``inputs`` and ``outputs`` (K,) relative L1 to the step before, of what
    enters the first block, the time with it, and of what the network gives.

    ``metadata``: the policy's files, the sampler, how many chunks.
    """

    pair: NDArray[np.float32]
    segment: NDArray[np.float32]
    kind: NDArray[np.float32]
    skip: NDArray[np.float32]
    rollout: NDArray[np.float32]
    alike: NDArray[np.float32]
    changes: NDArray[np.float32]
    first_layer: NDArray[np.float32]
    inputs: NDArray[np.float32]
    outputs: NDArray[np.float32]
    metadata: Mapping[str, Any]

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Write an npz file, as `tsad.Plan.save` does."""
        write_atomically(path, self.write, overwrite=overwrite)

    def write(self, file: IO[bytes]) -> None:
        """Write the bytes of `save` to a binary stream."""
        header = {"format": FORMAT, "version": FORMAT_VERSION, "metadata": dict(self.metadata)}
        arrays = {name: getattr(self, name) for name in _TABLES}
        np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Effects:
        """Read what `save` wrote. ``ValueError`` names the file and what is wrong with it."""
        try:
            arrays = read_npz(path)
            header = parse_header(arrays["header"])
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            tables = {name: arrays[name] for name in _TABLES}
            _check_shapes(tables)
            if not isinstance(header["metadata"], dict):
                raise ValueError("its metadata is no JSON object")
            return cls(**tables, metadata=header["metadata"])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{os.fspath(path)}: not a file of effects: {error}; expected what 'tsad plan "
                "measure' wrote"
            ) from error

    @property
    def knows_rollouts(self) -> bool:
        """Whether chunks were measured that have another before them."""
        return not np.isnan(self.rollout[0]).all()

    def losses(self, coherent: bool = True) -> Floats:
        """(B, K, K + 1) for `Segments`: what reuse loses from i to j.

        ``coherent``: the errors of a segment's steps add up before they are squared, as they were
        measured; else every step's error is a square of its own.
        """
        if coherent:
            return self.segment.astype(np.float64)
        B, K, _ = self.pair.shape
        loss = np.zeros((B, K, K + 1))
        loss[:, :, 1:] = np.cumsum(np.triu(self.pair.astype(np.float64), 1), axis=2)
        return loss

    def late(self) -> tuple[Floats, NDArray[np.uint8]]:
        """What it costs to compute a block at step j for the first time, and how to wait for it.

        Losses (B, K + 1), infinite for the first layer but at j = 0, so that there is a value of
        each type; and sources (K, B): until then a cell takes the value of the block before of its
        type, or nothing, whichever does less.
        """
        K, B = self.skip.shape
        # the nearest block of the same type below; a block without one can't wait
        below = [[c for c in range(b) if not np.isnan(self.kind[0, b, c])] for b in range(B)]
        loss = np.full((B, K + 1), np.inf)
        loss[:, 0] = 0.0
        sources = np.full((K, B), SKIP, np.uint8)
        for b, candidates in enumerate(below):
            if candidates:
                kind = self.kind[:, b, candidates[-1]].astype(np.float64)
                sources[kind < self.skip[:, b], b] = REUSE_TYPE
                loss[b, 1:] = np.cumsum(np.minimum(kind, self.skip[:, b]))
        return loss, sources

    def predict(self, plan: Plan, coherent: bool = True) -> float:
        """The mean squared error of executed actions that these tables foresee for a plan.

        Blocks are taken as independent. A value from a block of the same type that is older than
        ``kind`` knows counts as that block's value, aged by its ``pair``.

        Raises:
            ValueError: it reads an earlier chunk, and single ones were measured.
        """
        if not self.knows_rollouts and (plan.sources == REUSE_ROLLOUT).any():
            raise ValueError(
                "plan: reads earlier chunks, but the effects are of single observations; measure "
                "them on successive chunks of episodes"
            )
        loss, K = self.losses(coherent), len(plan.sources)
        total = 0.0
        types = plan.types or plan.blocks
        last_of_type: dict[str, tuple[int, int]] = {}
        begin = [0] * len(types)
        for k, row in enumerate(plan.sources.tolist()):
            for b, source in enumerate(row):
                if source == COMPUTE:
                    begin[b], last_of_type[types[b]] = k, (k, b)
                    end = k + 1
                    while end < K and plan.sources[end, b] == REUSE_STEP:
                        end += 1
                    total += float(loss[b, k, end])
                elif source == SKIP:
                    total += float(self.skip[k, b])
                elif source == REUSE_ROLLOUT:
                    total += float(self.rollout[0, k, b])
                elif source == REUSE_STEP and plan.sources[k - 1, b] not in (COMPUTE, REUSE_STEP):
                    # cut off from its segment by another source
                    end = k
                    while end < K and plan.sources[end, b] == REUSE_STEP:
                        total += float(self.pair[b, begin[b], end])
                        end += 1
                elif source == REUSE_TYPE:
                    i, c = last_of_type[types[b]]
                    if c == b:
                        total += float(self.pair[b, i, k])
                        continue
                    total += float(self.kind[k, b, c])
                    age = k if c < b else k - 1
                    if i < age:
                        total += float(self.pair[c, i, age])
        return total


_TABLES = tuple(field.name for field in fields(Effects) if field.name != "metadata")


# K steps, B blocks, J = K + 1, A chunks ago
_SHAPES = {
    "pair": "BKK",
    "segment": "BKJ",
    "kind": "KBB",
    "skip": "KB",
    "rollout": "AKB",
    "alike": "BKK",
    "changes": "B",
    "first_layer": "KK",
    "inputs": "K",
    "outputs": "K",
}


def _check_shapes(tables: Mapping[str, NDArray[Any]]) -> None:
    """``ValueError`` if the tables of a file do not fit each other."""
    sizes: dict[str, int] = {}
    for name in ("skip", *_TABLES):
        table, letters = tables[name], _SHAPES[name]
        if table.ndim == len(letters):
            sizes |= {k: n for k, n in zip(letters, table.shape, strict=True) if k not in sizes}
            sizes["J"] = sizes["K"] + 1
        wanted = tuple(sizes.get(letter) for letter in letters)
        if table.shape != wanted or table.dtype.kind != "f" or 0 in tables["skip"].shape:
            raise ValueError(f"{name}: {table.dtype} of shape {table.shape}")


class EffectPlanner:
    """The best static plan of own values by measured effects: ``policy.planner = ...(effects)``.

    For every block the steps to compute by dynamic programming, over all blocks one price per cost:
    BAC's programme (arXiv 2506.13456), with the effect on actions in place of the similarity of
    features, and cells that weigh what they cost.

    Args:
        coherent: see `Effects.losses`.
        late: blocks above the first layer may be computed later than at step 0 (`Effects.late`):
            in a few steps the first one is much of the budget. Such a plan can be sparser than the
            dial goes: call the planner and set ``policy.plan``. Below about ten steps first order
            misleads: compare with `uniform` in closed loop, and let ``tsad plan search`` begin with
            both.
    """

    def __init__(self, effects: Effects, *, coherent: bool = True, late: bool = False) -> None:
        self.effects, self.coherent, self.late = effects, coherent, late
        before, self._waiting = effects.late()
        self._segments = Segments(effects.losses(coherent), before if late else None)

    def __repr__(self) -> str:
        return f"EffectPlanner(coherent={self.coherent}, late={self.late})"

    def __call__(self, policy: PolicyFacts, sparsity: float) -> Plan:
        K, B = self.effects.skip.shape
        if (K, B) != (policy.num_inference_steps, len(policy.blocks)):
            raise ValueError(
                f"policy: expected {K} steps and {B} blocks, as the effects have, got "
                f"{policy.num_inference_steps} and {len(policy.blocks)}; measure them for this "
                "policy and sampler"
            )
        costs = np.asarray(policy.block_costs)
        if self.late:
            most = 1 - costs[np.isinf(self._segments.values[0])].sum() / (costs.sum() * K)
            if not 0 <= sparsity <= most:
                raise ValueError(
                    f"sparsity: expected 0 to {most:.6g} (step 0 of the first layer is computed), "
                    f"got {sparsity}; ask for less"
                )
        else:
            check_sparsity(policy, sparsity)
        computed = self._segments.mask(self._segments.allot(costs, budget(policy, sparsity)))
        sources = np.where(computed, np.uint8(COMPUTE), np.uint8(REUSE_STEP))
        waits = ~np.logical_or.accumulate(computed, axis=0)
        sources[waits] = self._waiting[waits]
        return make_plan(policy, sources, sources, planner=repr(self), sparsity=float(sparsity))
