"""Schedules of other programs as plans.

* EVO (arXiv 2607.20293): JSON, a list of [block, step] pairs, or a dict with such a list under
  "selected_block_timestep_pairs", "optimal_ij_pairs" or "pairs".
* Step masks (cache-dit's and stable-diffusion.cpp's SCM): a text of 0 and 1, one per step, with or
  without commas, spaces or brackets; 1 computes the step.
* npy: (K, B) bool or 0/1 (1 computes), or integers 0 to 4 as in `tsad.Plan`.
* npz: what `Plan.save` wrote.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.arrays import read_npy
from tsad.files import path_text
from tsad.plan import REUSE_ROLLOUT, Plan
from tsad.planners.base import PolicyFacts, make_plan, of_policy, own_values

_EVO_KEYS = ("selected_block_timestep_pairs", "optimal_ij_pairs", "pairs")
_EVO_LAST = 99  # the step that EVO's executor refreshes, besides 0, whatever the sampler


@of_policy
def import_plan(
    policy: PolicyFacts, path: str | os.PathLike[str], *, opcodes: bool | None = None
) -> Plan:
    """The plan in a file of another program; see the module for the formats.

    ``opcodes`` tells how an npy file of integers is meant: True: sources as in `tsad.Plan`; False:
    a mask, where not 0 computes; None: a mask if it holds 0 and 1 alone and its first step is 1,
    sources otherwise. Raises ``ValueError`` naming the file and what is wrong with it.
    """
    path = Path(path_text(path))
    where = os.fspath(path)
    if path.suffix == ".npz":
        return Plan.load(path)
    try:
        if path.suffix == ".npy":
            return _from_array(policy, read_npy(path), opcodes)
        text = path.read_text()
        if path.suffix == ".json" or text.lstrip().startswith("{") or "[[" in text.replace(" ", ""):
            return from_pairs(policy, _evo_pairs(json.loads(text)))
        return from_steps(policy, text)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{where}: not a schedule for this policy: {error}; expected EVO pairs (json), a step "
            "mask (text of 0 and 1), an array (npy) or a plan (npz)"
        ) from error


def _evo_pairs(content: Any) -> Any:
    if isinstance(content, dict):
        for key in _EVO_KEYS:
            if content.get(key):
                return content[key]
        raise ValueError(f"none of the keys {', '.join(_EVO_KEYS)} holds pairs")
    return content


@of_policy
def from_pairs(policy: PolicyFacts, pairs: Iterable[Any]) -> Plan:
    """EVO's [block, step] pairs as its own executor runs them.

    Blocks count in order of execution, steps in loop order. Step 0 is computed, and so is step 99;
    a block that no pair names is computed at every step.
    """
    K, B = policy.num_inference_steps, len(policy.blocks)
    computed = np.zeros((K, B), bool)
    if not isinstance(pairs, Iterable):
        raise TypeError(f"pairs: expected a list of [block, step], got {pairs!r}")
    for pair in pairs:
        block, step = (int(number) for number in pair)
        if not (0 <= block < B and 0 <= step < K):
            raise ValueError(
                f"pair [{block}, {step}]: expected a block below {B} and a step below {K}"
            )
        computed[step, block] = True
    computed[:, ~computed.any(axis=0)] = True
    computed[0] = True
    if K > _EVO_LAST:
        computed[_EVO_LAST] = True
    return own_values(policy, computed, planner="evo")


@of_policy
def from_steps(policy: PolicyFacts, mask: str | Iterable[int]) -> Plan:
    """A step mask, "1110100..." or a list of 0 and 1: all of a step is computed, or nothing.

    ValueError if it has not one digit per step, or does not compute the first.
    """
    if not isinstance(mask, Iterable):
        raise TypeError(f"mask: expected a text or list of 0 and 1, one per step, got {mask!r}")
    text = re.sub(r"[\s,\[\]]", "", mask) if isinstance(mask, str) else "".join(map(str, mask))
    steps = policy.num_inference_steps
    if len(text) != steps or set(text) - {"0", "1"}:
        raise ValueError(f"mask: expected {steps} times 0 or 1, one per step, got {text[:40]!r}")
    if text[0] != "1":
        raise ValueError("mask: expected the first step to be computed (1), got 0")
    rows = np.array([digit == "1" for digit in text])
    computed = np.repeat(rows[:, None], len(policy.blocks), axis=1)
    return own_values(policy, computed, planner="steps")


def is_mask(plan: str | Path) -> bool:
    """Whether a plan is given as a step mask, such as 10000010, instead of a file."""
    return set(str(plan)) <= {"0", "1"} and not Path(plan).exists()


def plan_of(given: Plan | Path | str, policy: PolicyFacts) -> Plan:
    """A plan of a setting; ``ValueError`` or ``OSError`` if it can't be read."""
    if isinstance(given, Plan):
        return given
    return from_steps(policy, str(given)) if is_mask(given) else read_plan(given)


def read_plan(path: str | Path) -> Plan:
    """A plan file; ``FileNotFoundError`` or ``ValueError`` if it is missing or not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"got {str(path)!r}, which is not a file; expected a plan saved by Plan.save or by "
            "'tsad demo'"
        )
    return Plan.load(path)


def _from_array(policy: PolicyFacts, array: NDArray[Any], opcodes: bool | None) -> Plan:
    shape = (policy.num_inference_steps, len(policy.blocks))
    if array.shape != shape:
        raise ValueError(f"array: expected shape {shape}, steps x blocks, got {array.shape}")
    if array.dtype != bool and array.dtype.kind not in "iu":
        raise ValueError(f"array: expected bool or integers, got {array.dtype}")
    if opcodes is None:
        opcodes = array.dtype != bool and not (array.max() <= 1 and (array[0] == 1).all())
    if not opcodes:
        return own_values(policy, array != 0, planner="mask")
    reads_rollouts = bool((array == REUSE_ROLLOUT).any())
    return make_plan(policy, array, None if reads_rollouts else array, planner="sources")
