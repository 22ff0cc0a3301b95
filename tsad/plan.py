"""Plans: for each (step, block) cell of a chunk, where its value comes from.

Sources (paper: arXiv 2605.13316) are small integers: ``COMPUTE`` runs the branch, ``REUSE_TYPE``
takes the last computed branch of the same type in any layer, ``REUSE_STEP`` the same block's of an
earlier step, ``REUSE_ROLLOUT`` the same cell's of an earlier chunk of the episode, ``SKIP`` adds
nothing. The rules are those of the core (csrc/plan/plan_core.h), which checks every plan.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsad import _core
from tsad.arrays import parse_header, read_npz
from tsad.files import write_atomically

COMPUTE, REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP = range(5)
SOURCE_NAMES = ("compute", "reuse_type", "reuse_step", "reuse_rollout", "skip")

FORMAT = "tsad-plan"
FORMAT_VERSION = 1
_TRIPLE = ("self_attn", "cross_attn", "feed_forward")
_EMPTY_ROLLOUT = 5  # enum tsad_plan_reason of csrc/tsad.h

Sources = NDArray[np.uint8]


class Plan:
    """The sources of one chunk, uint8 (K, B), and of the first chunk after a reset. Immutable.

    Args:
        sources: integers 0 to 4, shape (K, B): K denoising steps, step 0 the noisiest, B blocks in
            execution order. A list of lists will do.
        first: what runs in the first chunk after a reset, (K, B) or a `Plan`; it can't reuse a
            rollout, and must compute every cell that ``sources`` takes from one. None: all
            computed.
        blocks: B names, for messages and pictures.
        types: B names; blocks of one type may stand in for each other (``REUSE_TYPE``).
        cost: B numbers, the cost of a cell of each block; without it every cell costs the same.
        metadata: a dict that JSON can hold, kept with the plan.

    Without ``blocks`` and ``types``, B divisible by 3 means the layers of a transformer:
    self-attention, cross-attention, feed-forward.

    Raises ``ValueError`` naming the step, the block and the reason if a cell reads an empty slot,
    or if shapes contradict each other; ``TypeError`` for anything but integers.

    Plans are equal when they do the same: names, costs and metadata don't count.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_costs",
        "_first",
        "_metadata",
        "_named",
        "_sources",
        "_types",
    )

    def __init__(
        self,
        sources: ArrayLike,
        first: ArrayLike | Plan | None = None,
        *,
        blocks: Sequence[str] | None = None,
        types: Sequence[str] | None = None,
        cost: ArrayLike | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        self._sources = _check_sources("sources", sources)
        n_blocks = self._sources.shape[1]
        self._named = blocks is not None
        self._blocks = _check_names("blocks", blocks, n_blocks) or _default_blocks(n_blocks)
        self._types = _check_names("types", types, n_blocks) or _default_types(n_blocks)
        if len(set(self._blocks)) < n_blocks:
            raise ValueError("blocks: expected distinct names, got some twice; rename them")
        self._costs = _check_costs(cost, n_blocks)
        self._metadata = _check_metadata(metadata)
        self._first = self._check_first(first)
        self._check_rules()

    # ---- checks

    def _check_first(self, first: ArrayLike | Plan | None) -> Plan | None:
        if first is None:
            return None
        sources = first.sources if isinstance(first, Plan) else _check_sources("first", first)
        if sources.shape != self._sources.shape:
            raise ValueError(
                f"first: expected shape {self._sources.shape} as `sources` has, got "
                f"{sources.shape}; make both for one policy"
            )
        if not sources.any():  # all computed: the default
            return None
        plan: Plan = object.__new__(Plan)
        plan._named, plan._blocks, plan._types = self._named, self._blocks, self._types
        plan._costs = self._costs
        plan._sources, plan._first, plan._metadata = sources, None, {}
        plan._check_cells("first", None)
        return plan

    def _check_rules(self) -> None:
        filled = np.ones_like(self._sources)
        if self._first is not None:
            filled = (self._first.sources == COMPUTE).astype(np.uint8)
        self._check_cells("sources", filled)

    def _check_cells(self, name: str, filled: Sources | None) -> None:
        uses_types = bool((self._sources == REUSE_TYPE).any())
        if self._types is None and uses_types:
            raise ValueError(
                f"types: expected one type name per block, {len(self._blocks)}, to know what "
                "reuse_type may take, got None; pass types=[...] (policy.block_types)"
            )
        order: dict[str, int] = {}
        for kind in self._types or ():
            order.setdefault(kind, len(order))
        ids = np.zeros(len(self._blocks), np.uint8)
        if uses_types and self._types is not None:
            ids[:] = [order[kind] for kind in self._types]
        fault = _core._plan_fault(self._sources, ids, filled)
        if fault is None:
            return
        step, block, code, reason = fault
        where = f"{name}: step {step}, block {block} ({self._blocks[block]})"
        if code == _EMPTY_ROLLOUT:
            raise ValueError(
                f"{where}: reuse_rollout, but `first` does not compute this cell, so nothing is "
                "there to reuse; compute it in `first`, or leave `first` out (all computed)"
            )
        raise ValueError(f"{where}: {reason}; compute it there, or before")

    # ---- facts

    @property
    def sources(self) -> Sources:
        """uint8 (K, B), read-only."""
        return self._sources

    @property
    def first(self) -> Plan | None:
        """The plan of the first chunk after a reset; None is all computed."""
        return self._first

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the B blocks, e.g. "layers.0.cross_attn"."""
        return self._blocks

    @property
    def has_block_names(self) -> bool:
        """Whether `blocks` were given, not made up."""
        return self._named

    @property
    def types(self) -> tuple[str, ...] | None:
        """Types of the B blocks; None if they are not known."""
        return self._types

    @property
    def block_costs(self) -> NDArray[np.int64] | None:
        """Cost of a cell of each block, (B,), read-only; None if they are not known."""
        return self._costs

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of what was kept with the plan."""
        copy: dict[str, Any] = json.loads(json.dumps(self._metadata))
        return copy

    @property
    def cost(self) -> float:
        """Cost of the computed cells as a fraction of all cells'."""
        computed = (self._sources == COMPUTE).sum(axis=0)
        if self._costs is None:
            return float(computed.sum() / self._sources.size)
        total = int(self._costs.sum()) * self._sources.shape[0]
        return float(int(computed @ self._costs) / total)

    @property
    def sparsity(self) -> float:
        """1 - cost; the same as `cell_sparsity` if the blocks' costs are not known."""
        return 1.0 - self.cost

    @property
    def cell_sparsity(self) -> float:
        """Fraction of cells that are not computed."""
        return float((self._sources != COMPUTE).mean())

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each source, by name."""
        numbers = np.bincount(self._sources.ravel(), minlength=len(SOURCE_NAMES))
        return {name: int(n) for name, n in zip(SOURCE_NAMES, numbers, strict=True)}

    # ---- text and pictures

    def __repr__(self) -> str:
        steps, blocks = self._sources.shape
        first = "dense" if self._first is None else f"sparsity {self._first.sparsity:.1%}"
        return (
            f"Plan({steps} steps x {blocks} blocks, sparsity {self.sparsity:.1%} of the cost, "
            f"{self.cell_sparsity:.1%} of the cells, first {first})"
        )

    def __str__(self) -> str:
        return self.render()

    def render(self, *, width: int = 120, color: bool = False) -> str:
        """The plan as text, a line per block, folded to `width` columns; `color` for terminals."""
        from tsad.plot.text import render

        return render(self, width=width, color=color)

    def plot(self, ax: Any = None) -> Any:
        """Draw it into matplotlib axes (None: new ones) and return them; needs the extra "sim"."""
        from tsad.plot import plot_plan

        return plot_plan(self, ax)

    # ---- comparison, copies

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return np.array_equal(self._sources, other._sources) and self._first == other._first

    def __hash__(self) -> int:
        return hash((self._sources.shape, self._sources.tobytes(), self._first))

    def __reduce__(self) -> tuple[Any, ...]:
        first = None if self._first is None else self._first.sources
        blocks = self._blocks if self._named else None
        return _rebuild, (self._sources, first, blocks, self._types, self._costs, self._metadata)

    # ---- files

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
        """Write an npz file, whole or not at all. Nothing in it is pickled.

        A file that is there is replaced, as `numpy.savez` does, or with ``overwrite=False``
        refused (``FileExistsError``); a link is followed; any other ``OSError`` names the file.
        """
        write_atomically(path, self.write, overwrite=overwrite)

    def write(self, file: IO[bytes]) -> None:
        """Write the bytes of `save` to a binary stream."""
        header = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "blocks": self._blocks if self._named else None,
            "types": self._types,
            "metadata": self._metadata,
        }
        arrays: dict[str, NDArray[Any]] = {"header": np.array(json.dumps(header))}
        arrays["sources"] = self._sources
        if self._first is not None:
            arrays["first"] = self._first.sources
        if self._costs is not None:
            arrays["block_costs"] = self._costs
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. ``ValueError`` names the file and what is wrong with it."""
        advice = "expected a plan saved by Plan.save"
        try:
            arrays = read_npz(path)
            header = parse_header(arrays["header"])
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
            version = header["version"]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{os.fspath(path)}: not a plan: {error}; {advice}") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{os.fspath(path)}: version {version!r}, expected {FORMAT_VERSION}; update tsad, "
                "or save the plan again"
            )
        try:
            return cls(
                arrays["sources"],
                arrays.get("first"),
                blocks=header["blocks"],
                types=header["types"],
                cost=arrays.get("block_costs"),
                metadata=header["metadata"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)}: not a plan: {error}; {advice}") from error


def _rebuild(
    sources: Sources,
    first: Sources | None,
    blocks: Sequence[str] | None,
    types: Sequence[str] | None,
    cost: NDArray[np.int64] | None,
    metadata: dict[str, Any],
) -> Plan:
    return Plan(sources, first, blocks=blocks, types=types, cost=cost, metadata=metadata)


def _check_sources(name: str, sources: ArrayLike) -> Sources:
    if isinstance(sources, np.ma.MaskedArray):
        raise TypeError(
            f"{name}: expected plain integers, got a masked array, whose mask would be lost; use "
            f"{name}.filled(value)"
        )
    array = np.asarray(sources)
    if array.dtype.kind not in "iu":
        raise TypeError(
            f"{name}: expected integers 0 (compute) to 4 (skip), got {array.dtype}; use "
            f"np.asarray({name}, dtype=np.uint8)"
        )
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"{name}: expected shape (num_inference_steps, blocks), got {array.shape}; reshape it"
        )
    wrong = np.argwhere((array < COMPUTE) | (array > SKIP))
    if len(wrong):
        step, block = wrong[0]
        raise ValueError(
            f"{name}: step {step}, block {block}: expected 0 (compute) to 4 (skip), got "
            f"{array[step, block]}; use tsad.COMPUTE ... tsad.SKIP"
        )
    # over bytes, the array can't be made writable again
    return np.frombuffer(array.astype(np.uint8).tobytes(), np.uint8).reshape(array.shape)


def _check_names(name: str, names: Sequence[str] | None, count: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    names = () if isinstance(names, str) else tuple(names)
    if len(names) != count or not all(isinstance(item, str) for item in names):
        raise ValueError(
            f"{name}: expected {count} strings, one per block, got {len(names)}; pass policy.{name}"
            if name == "blocks"
            else f"{name}: expected {count} strings, one per block, got {len(names)}; pass "
            "policy.block_types"
        )
    return names


def _default_blocks(count: int) -> tuple[str, ...]:
    if count % 3:
        return tuple(f"blocks.{b}" for b in range(count))
    return tuple(f"layers.{b // 3}.{_TRIPLE[b % 3]}" for b in range(count))


def _default_types(count: int) -> tuple[str, ...] | None:
    return None if count % 3 else _TRIPLE * (count // 3)


def _check_costs(cost: ArrayLike | None, count: int) -> NDArray[np.int64] | None:
    if cost is None:
        return None
    array = np.asarray(cost)
    if array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(
            f"cost: expected {count} integers, one per block, got {array.dtype} of shape "
            f"{array.shape}; pass policy.block_costs"
        )
    if (array < 0).any() or not array.any():
        raise ValueError(
            "cost: expected numbers of 0 or more, one of them above 0, got "
            f"{array.tolist()}; pass policy.block_costs"
        )
    return np.frombuffer(array.astype(np.int64).tobytes(), np.int64)


def _check_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata: expected a dict, got {type(metadata).__name__}; pass a dict")
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"metadata: expected what JSON can hold, got {error}; use plain numbers, strings, "
            "lists and dicts"
        ) from error
    return copy


def plan_sha256(plan: Plan) -> str:
    """SHA-256 of what a plan does."""
    digest = hashlib.sha256(repr(plan.sources.shape).encode() + plan.sources.tobytes())
    if plan.first is not None:
        digest.update(plan.first.sources.tobytes())
    return digest.hexdigest()
