"""What a planner is, and what it may ask of a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any, Concatenate, ParamSpec, Protocol, SupportsFloat, TypeVar

import numpy as np
from numpy.typing import NDArray

from tsad.plan import COMPUTE, REUSE_STEP, Plan, Sources


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


P = ParamSpec("P")
R = TypeVar("R")


def of_policy(
    make: Callable[Concatenate[PolicyFacts, P], R],
) -> Callable[Concatenate[PolicyFacts, P], R]:
    """What makes plans, which refuses what is no policy: TypeError."""

    @wraps(make)
    def checked(policy: PolicyFacts, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if not hasattr(policy, "num_inference_steps") or not hasattr(policy, "blocks"):
            raise TypeError(
                f"policy: expected one of tsad.load, got {type(policy).__name__}; "
                f"e.g. tsad.planners.{make.__name__}(tsad.load(...), ...)"
            )
        return make(policy, *args, **kwargs)

    return checked


def number(name: str, value: Any, what: str) -> float:
    """An argument that is a number; TypeError or ValueError naming it."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: expected a number, got {value!r}; {what}")
    found = float(value)
    if np.isnan(found):
        raise ValueError(f"{name}: expected a number, got nan; {what}")
    return found


def integer(name: str, value: Any, low: int, high: int | None, what: str) -> int:
    """An argument that counts something; TypeError or ValueError naming it."""
    limits = f"from {low}" + ("" if high is None else f" to {high}")
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer {limits}, got {value!r}; {what}")
    found = int(value)
    if found < low or (high is not None and found > high):
        raise ValueError(f"{name}: expected an integer {limits}, got {found}; {what}")
    return found


class Planner(Protocol):
    """A callable that plans for a policy and a sparsity from 0 (dense) to ``policy.max_sparsity``.

    It returns a plan for all lanes, or a sequence with one per lane. It is called when the dial
    moves, never while a chunk runs.
    """

    def __call__(self, policy: PolicyFacts, sparsity: float, /) -> Plan | Sequence[Plan]: ...


def make_plan(
    policy: PolicyFacts, sources: Sources, first: Sources | None, **metadata: Any
) -> Plan:
    """A plan with the policy's names and costs; ``metadata`` says who made it, and how."""
    return Plan(
        sources,
        first,
        blocks=policy.blocks,
        types=policy.block_types,
        cost=policy.block_costs,
        metadata=metadata,
    )


def full(policy: PolicyFacts, fill: int) -> Sources:
    """Sources (K, B), all the same."""
    return np.full((policy.num_inference_steps, len(policy.blocks)), fill, np.uint8)


def check_sparsity(policy: PolicyFacts, sparsity: float) -> None:
    """ValueError for what no plan reaches that computes step 0, TypeError for no number."""
    most = 1 - 1 / policy.num_inference_steps
    if not isinstance(sparsity, SupportsFloat):
        raise TypeError(
            f"sparsity: expected a number from 0 to {most:.6g}, got {sparsity!r}; "
            "0 is dense, 0.9 leaves out 90 % of the cost"
        )
    if not 0 <= sparsity <= most:
        raise ValueError(
            f"sparsity: expected 0 to {most:.6g} (step 0 is computed), got {sparsity}; ask for "
            "less, or load the policy with more num_inference_steps"
        )


def budget(policy: PolicyFacts, sparsity: float) -> int:
    """What computed cells may cost; rounding never turns 1 - 1/K into less than a row."""
    dense = policy.num_inference_steps * int(np.asarray(policy.block_costs).sum())
    return int((1 - sparsity) * dense * (1 + 1e-12))


def layers(policy: PolicyFacts) -> NDArray[np.int64]:
    """(B,) which layer each block is part of: blocks of one name up to its last dot are one."""
    names = [name.rpartition(".")[0] or name for name in policy.blocks]
    order = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], np.int64)


def own_values(policy: PolicyFacts, computed: NDArray[np.bool_], **metadata: Any) -> Plan:
    """The plan that computes the cells of a mask (K, B); the rest repeats the block's own value.

    It reads no rollout, so the first chunk after a reset runs it, too. ValueError if step 0 is not
    computed.
    """
    steps = policy.num_inference_steps
    if computed.shape != (steps, len(policy.blocks)):
        raise ValueError(
            f"computed: expected shape ({steps}, {len(policy.blocks)}), steps x blocks of this "
            f"policy, got {computed.shape}; make it for this policy"
        )
    sources = np.where(computed, np.uint8(COMPUTE), np.uint8(REUSE_STEP))
    return make_plan(policy, sources, sources, **metadata)
