"""Rules that decide row by row, within a chunk, whether the rest of a row is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tsad.reference.layers import Array


class Rule:
    """The first-block cache (``blocks`` above 0) or TeaCache (0), for one chunk of ``steps`` rows.

    ``blocks``: so many are computed in every row before it looks. ``most``: rows computed whole.
    """

    def __init__(
        self,
        blocks: int,
        threshold: float,
        most: int,
        steps: int,
        polynomial: Sequence[float] = (0.0, 1.0),
    ) -> None:
        self.blocks, self.threshold, self.most, self.steps = blocks, threshold, most, steps
        self.polynomial = np.polynomial.Polynomial(polynomial)
        self._then = np.zeros(())
        self._computed, self._total = 0, 0.0

    def computes(self, row: int, seen: Array) -> bool:
        """Whether the rest of a row is computed.

        ``seen`` is what the first blocks added to the input, or for TeaCache the input.
        """
        apart = 0.0
        if row:
            size = float(np.abs(self._then).sum())
            apart = float(np.abs(seen - self._then).sum()) / (size if size > 0 else 1.0)
        if self.blocks:
            yes = row == 0 or (self._computed < self.most and not apart < self.threshold)
            self._then = seen if yes else self._then
        else:
            self._total += float(self.polynomial(apart)) if row else 0.0
            last = row == self.steps - 1
            room = self._computed < self.most - 1
            yes = row == 0 or last or (room and not self._total < self.threshold)
            self._then = seen
            self._total = 0.0 if yes else self._total
        self._computed += yes
        return yes
