"""What computed cells differ by from the values that reuse would have taken: a free audit.

A block's slot holds its value of when it was last computed. Where a cell is computed and the slot's
value is of an earlier step of the chunk, that is what `reuse_step` takes; where it is of the same
cell in an earlier chunk of the episode, what `reuse_rollout` takes. Other values are no cell's to
take, and are not compared.
"""

from __future__ import annotations

import numpy as np

from tsad.reference.layers import Array


class Audit:
    """Of one lane's episode: sums of squares over the cells of the last chunk, by kind.

    ``apart``: of what was computed less what was there; ``size``: of what was computed. Both (2,):
    beside an earlier step of the chunk, and beside the same cell of an earlier chunk.
    """

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, Array]] = {}  # by block: step and value
        self._now: set[int] = set()  # blocks that this chunk has computed
        self.apart, self.size = np.zeros(2), np.zeros(2)

    def copy(self) -> Audit:
        """One that goes on by itself."""
        twin = Audit()
        twin._slots = dict(self._slots)
        return twin

    def begin(self) -> None:
        """A chunk begins."""
        self._now = set()
        self.apart, self.size = np.zeros(2), np.zeros(2)

    def computed(self, step: int, block: int, value: Array) -> None:
        """A cell was computed."""
        there = self._slots.get(block)
        if there is not None and (block in self._now or there[0] == step):
            kind = 0 if block in self._now else 1
            self.apart[kind] += ((value - there[1]) ** 2).sum()
            self.size[kind] += (np.asarray(value) ** 2).sum()
        self._slots[block] = step, value
        self._now.add(block)

    @property
    def statistic(self) -> tuple[float | None, float | None]:
        """Relative root mean squares by kind; None where no cell was compared."""
        step, rollout = (
            float(np.sqrt(apart / size)) if size > 0 else None
            for apart, size in zip(self.apart, self.size, strict=True)
        )
        return step, rollout
