"""Which way round the wall a policy goes: the score is 1 where the puck passes it on the right.

    tsad eval --simulator bench.metaworld_sides:Right --policy metaworld \\
        --settings bench/frontier/metaworld.json --out sides --seeds 60 --first-seed 10000

Demonstrations go either way, so about half of the episodes that pass should do. The result
that is kept has five of the rows.
"""

from __future__ import annotations

import tsad
from bench.metaworld_task import Array, PushWall

WALL = 0.75  # metres: its y


class Right(PushWall):
    """`PushWall` with another score."""

    def reset(self, seed: int) -> Array:
        """As there."""
        self._passed = False
        return super().reset(seed)

    def step(self, action: Array) -> tsad.sim.Step:
        """Move the hand; 1 in the step that brings the puck past the wall's middle line."""
        step = super().step(action)
        x, y = step.obs[4:6]
        passes, self._passed = y > WALL and not self._passed, self._passed or y > WALL
        return step._replace(score=float(passes and x > 0))
