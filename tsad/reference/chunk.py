"""One chunk: K steps of a sampler, each cell computed or taken from where its source says.

Plans and caches are written here once, for every family: a family asks for the value of each of
its blocks, and gets the branch computed or a cached one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tsad.reference.audit import Audit
from tsad.reference.dpt import embed
from tsad.reference.families import family_of
from tsad.reference.layers import Array, Compute, Network, Tensors
from tsad.reference.rule import Rule
from tsad.samplers import Sampler

COMPUTE, REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP = range(5)

Sources = NDArray[np.uint8]
Rollout = dict[tuple[int, int], Array]


def denoise(
    w: Tensors,
    network: Network,
    sampler: Sampler,
    memory: Array,
    noise: Array,
    sources: Sources,
    rollout: Rollout,
    rule: Rule | None = None,
    audit: Audit | None = None,
) -> Array:
    """One chunk: the final sample (T, action_dim), normalised.

    ``memory`` (K, ...) is what the family's ``encode`` gives for each step, ``noise`` (K, T,
    action_dim), ``sources`` (K, B). ``rollout[k, b]`` holds the value that cell had when it was
    last computed in this episode; it is read and written here. Only computing writes, and it
    writes all three caches. A ``rule`` decides instead of the plan, all `COMPUTE`, into which what
    it came to is written. An ``audit`` sees what is computed.
    """
    family = family_of(network)
    types = family.block_types(network)
    last_of_type: dict[str, Array] = {}
    last_of_block: dict[int, Array] = {}
    seen: Array = np.zeros(())  # what the rule looks at in this row

    def value(b: int, compute: Compute) -> Array | float:
        nonlocal seen
        if rule is not None and b == rule.blocks:
            sources[k, b:] = COMPUTE if rule.computes(k, seen) else REUSE_STEP
        found = _value(b, compute)
        if rule is not None and b < rule.blocks:
            seen = seen + found
        return found

    def _value(b: int, compute: Compute) -> Array | float:
        source = sources[k, b]
        if source == COMPUTE:
            computed = compute()
            last_of_type[types[b]] = last_of_block[b] = rollout[k, b] = computed
            if audit is not None:
                audit.computed(k, b, computed)
            return computed
        if source == REUSE_TYPE and types[b] in last_of_type:
            return last_of_type[types[b]]
        if source == REUSE_STEP and b in last_of_block:
            return last_of_block[b]
        if source == REUSE_ROLLOUT and (k, b) in rollout:
            return rollout[k, b]
        if source == SKIP:
            return 0.0
        name = family.block_names(network)[b]
        raise ValueError(_unreadable(k, b, name, types[b], int(source)))

    if audit is not None:
        audit.begin()
    x: Array = noise[0]
    last, older = np.zeros_like(x), np.zeros_like(x)  # x0 of the last two rows
    for k in range(len(sources)):
        seen = np.zeros(()) if rule is None or rule.blocks else embed(w, x)
        e = family.predict(w, network, x, memory[k], value)
        a, b_, r, c, d, f, g, s, q = sampler.table[k].tolist()
        x0 = np.clip(a * x + b_ * e, -r, r)
        x = c * x0 + d * x + f * e + g * last + q * older
        if k + 1 < len(sources):
            x = x + s * noise[k + 1]
        last, older = x0, last
    return x


def corrected(chunk: Array, start: Array | None, gain: Array, shift: Array, clip: float) -> Array:
    """A chunk (T, action_dim), normalised, with what `tsad fit` found for it.

    ``start`` is what a warm chunk starts from, without noise; None is of no warm start.
    """
    move = 0.0 if start is None else gain * (chunk - start)
    within: Array = np.clip(chunk + move + shift, -clip, clip)
    return within


def _unreadable(step: int, block: int, name: str, kind: str, source: int) -> str:
    reason = {
        REUSE_TYPE: f"reuse_type, but no {kind} block is computed before it",
        REUSE_STEP: "reuse_step, but the block is not computed at an earlier step",
        REUSE_ROLLOUT: "reuse_rollout, but no earlier rollout of this episode computed this cell",
    }.get(source, f"{source}, which is not one of 0 (compute) to 4 (skip)")
    return (
        f"plan: step {step}, block {block} ({name}): got {reason}; "
        "expected a source that exists: set this cell to compute (0)"
    )
