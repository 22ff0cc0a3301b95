"""What each reuse does to the executed actions, and the static plan that does least.

The tables are first-order: for recorded chunks, the gradient of the executed actions with respect
to every branch output, times the difference between the value that reuse would take and the right
one, squared. `tsad.training.sensitivity` measures them (torch); this module only uses them.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import write_atomically
from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan
from tsad.planners.base import PolicyFacts, budget, check_sparsity, own_values
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
    ``rollout``   (A, K, B)       the value of the same cell 1 .. A chunks ago

    For the published rules: ``alike`` (B, K, K) cosine similarity of outputs, ``changes`` (B,) mean
    L1 distance between two steps, ``first_layer`` (K, K) relative L1 of the first layer's residual
    (row: the cached step), ``inputs`` and ``outputs`` (K,) relative L1 to the step before, of the
    embedded sample plus time, and of the whole network's residual.

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an npz file, whole or not at all."""
        header = {"format": FORMAT, "version": FORMAT_VERSION, "metadata": dict(self.metadata)}
        arrays = {name: getattr(self, name) for name in _TABLES}
        buffer = BytesIO()
        np.savez_compressed(buffer, header=np.array(json.dumps(header)), **arrays)
        write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Effects:
        """Read what `save` wrote. ``ValueError`` names the file and what is wrong with it."""
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(str(arrays.pop("header")))
            if header["format"] != FORMAT or header["version"] != FORMAT_VERSION:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            return cls(**{name: arrays[name] for name in _TABLES}, metadata=header["metadata"])
        except OSError:
            raise
        except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{os.fspath(path)}: not a file of effects: {error}; expected what 'tsad plan "
                "measure' wrote"
            ) from error

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

    def predict(self, plan: Plan, coherent: bool = True) -> float:
        """The mean squared error of executed actions that these tables foresee for a plan.

        Blocks are taken as independent. A value from a block of the same type that is older than
        ``kind`` knows counts as that block's value, aged by its ``pair``.
        """
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


class EffectPlanner:
    """The best static plan of own values by measured effects: ``policy.planner = ...(effects)``.

    For every block the steps to compute by dynamic programming, over all blocks one price per cost:
    BAC's programme (arXiv 2506.13456), with the effect on actions in place of the similarity of
    features, and cells that weigh what they cost.
    """

    def __init__(self, effects: Effects, *, coherent: bool = True) -> None:
        self.effects, self.coherent = effects, coherent
        self._segments = Segments(effects.losses(coherent))

    def __repr__(self) -> str:
        return f"EffectPlanner(coherent={self.coherent})"

    def __call__(self, policy: PolicyFacts, sparsity: float) -> Plan:
        K, B = self.effects.skip.shape
        if (K, B) != (policy.num_inference_steps, len(policy.blocks)):
            raise ValueError(
                f"policy: expected {K} steps and {B} blocks, as the effects have, got "
                f"{policy.num_inference_steps} and {len(policy.blocks)}; measure them for this "
                "policy and sampler"
            )
        check_sparsity(policy, sparsity)
        counts = self._segments.allot(np.asarray(policy.block_costs), budget(policy, sparsity))
        computed = self._segments.mask(counts)
        return own_values(policy, computed, planner=repr(self), sparsity=float(sparsity))
