"""What fits a policy as its dial and its plan, of its steps and blocks alone.

`SparsePolicy` asks when they are set, and `tsad.lerobot` before there is a policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tsad.plan import Plan
from tsad.planners.base import Planner
from tsad.planners.runtime import RowRule


def end_of_dial(planner: str | Planner, steps: int) -> float:
    """The largest sparsity: step 0 is computed."""
    return 0.0 if planner == "dense" else 1 - 1 / steps


def check_dial(planner: str | Planner, value: Any, steps: int) -> float | None:
    """A sparsity for this planner; ``TypeError`` or ``ValueError`` saying what fits."""
    if isinstance(planner, RowRule):
        return planner.check_dial(value)
    if value is None:
        if planner == "pruner":
            return None
        raise ValueError(
            "sparsity: None is the pruner's own choice, but the planner is "
            f"{planner!r}; set a number, or policy.planner = 'pruner' first"
        )
    end = end_of_dial(planner, steps)
    try:
        number = float("no" if isinstance(value, str | bool | np.bool_) else value)
    except (TypeError, ValueError):
        raise TypeError(
            f"sparsity: expected a number from 0 (dense) to {end:.6g}, got {value!r}; set a float"
        ) from None
    if not 0 <= number <= 1:
        raise ValueError(
            f"sparsity: expected a number from 0 (dense) to {end:.6g}, got {number!r}; it is the "
            "fraction of a chunk's cost to save"
        )
    if number > end:
        raise ValueError(
            f"sparsity: expected at most policy.max_sparsity, {end:.6g} with the planner "
            f"{planner!r} at {steps} steps, got {number!r}; use less, or load the policy with "
            "more num_inference_steps"
        )
    return number


def plans_of(plan: Any, lanes: int | None, name: str = "plan") -> Sequence[Plan]:
    """One plan per lane, of a single one or of a list; ``lanes`` None: as many as there are."""
    given = [plan] * (lanes or 1) if isinstance(plan, Plan) else plan
    if not isinstance(given, list | tuple) or not all(isinstance(p, Plan) for p in given):
        raise TypeError(
            f"{name}: expected a tsad.Plan, a list with one per lane, or None, got "
            f"{type(plan).__name__}; wrap sources in tsad.Plan(sources)"
        )
    expected = max(1, len(given)) if lanes is None else lanes
    if len(given) != expected:
        raise ValueError(
            f"{name}: expected one plan per lane, {expected}, got {len(given)}; pass a "
            "single plan for all lanes"
        )
    return given


def bound_plan(
    plan: Plan,
    steps: int,
    blocks: Sequence[str],
    types: Sequence[str],
    *,
    cost: ArrayLike | None = None,
    name: str = "plan",
) -> Plan:
    """The plan with a policy's names, types and costs; ``ValueError`` if it is not for these."""
    if plan.sources.shape != (steps, len(blocks)):
        raise ValueError(
            f"{name}: expected {steps} steps x {len(blocks)} blocks, as this policy has, "
            f"got {plan.sources.shape[0]} x {plan.sources.shape[1]}; make one for this policy, "
            "or load it with other num_inference_steps"
        )
    if plan.blocks != tuple(blocks) and plan.has_block_names:
        pairs = zip(plan.blocks, blocks, strict=True)
        block, (got, wanted) = next((b, p) for b, p in enumerate(pairs) if p[0] != p[1])
        raise ValueError(
            f"{name}: expected a plan for the blocks of this policy, got one whose block "
            f"{block} is {got!r}, not {wanted!r}; make one for this policy"
        )
    try:
        return Plan(
            plan.sources, plan.first, blocks=blocks, types=types, cost=cost, metadata=plan.metadata
        )
    except ValueError as error:  # other types than the plan was made for
        raise ValueError(f"{name}: {error}") from error
