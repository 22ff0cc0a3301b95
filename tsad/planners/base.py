"""What a planner is, and what it may ask of a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tsad.plan import Plan


class PolicyFacts(Protocol):
    """What the planners here ask of a policy; `tsad.SparsePolicy` has it."""

    @property
    def num_inference_steps(self) -> int: ...
    @property
    def blocks(self) -> list[str]: ...
    @property
    def block_types(self) -> list[str]: ...
    @property
    def block_costs(self) -> NDArray[np.int64]: ...


class Planner(Protocol):
    """A callable that plans for a policy and a sparsity from 0 (dense) to ``policy.max_sparsity``.

    It returns a plan for all lanes, or a sequence with one per lane. It is called when the dial
    moves, never while a chunk runs.
    """

    def __call__(self, policy: PolicyFacts, sparsity: float, /) -> Plan | Sequence[Plan]: ...
