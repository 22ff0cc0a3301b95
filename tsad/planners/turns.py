"""Plans that take turns from chunk to chunk, by a rule that sees nothing.

What decides by looking has to do better than these at the same average cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tsad.plan import REUSE_ROLLOUT, Plan
from tsad.planners.base import integer, number

_STREAM = 18  # beside a lane's noise, which is drawn from the same seed
_OWN = frozenset(("policy", "every", "share", "_plans", "_chunks", "_random", "_now"))


class Turns:
    """A policy around a policy: some chunks run ``other``, the rest ``plan``.

    >>> policy = tsad.planners.Turns(tsad.load("pusht"), cheap, dear, every=3)
    >>> policy.reset(seed=0)
    >>> actions = policy(obs)

    It is called and reset like the policy, and has its attributes; `tsad.sim.rollouts` takes it.
    The plan is set before a chunk begins.

    Args:
        policy: a `tsad.SparsePolicy`; its plan is changed.
        plan, other: of that policy; they read no rollouts.
        every: the first chunk of an episode runs ``other``, and every so many-th after it.
        share: or each chunk does so at random, with this probability. What a lane draws follows
            from the seed of its last `reset`, and not from other lanes.

    Raises ``ValueError`` naming the argument.
    """

    def __init__(
        self,
        policy: Any,
        plan: Plan,
        other: Plan,
        *,
        every: int | None = None,
        share: float | None = None,
    ) -> None:
        if not hasattr(policy, "_bind_one"):
            raise TypeError(f"policy: expected one of tsad.load, got {type(policy).__name__}")
        for name, one in (("plan", plan), ("other", other)):
            if not isinstance(one, Plan):
                raise TypeError(
                    f"{name}: expected a tsad.Plan, got {type(one).__name__}; "
                    "e.g. tsad.planners.uniform(policy, 8)"
                )
        every, share = self.check(every, share)
        self.policy, self.every, self.share = policy, every, share
        for name, one in (("plan", plan), ("other", other)):
            if (one.sources == REUSE_ROLLOUT).any():
                raise ValueError(
                    f"{name}: expected a plan that reads no rollouts, got one that does; the chunk "
                    "before may have run the other one"
                )
        self._plans = [
            policy._bind_one(one, name)
            for name, one in zip(("plan", "other"), (plan, other), strict=True)
        ]
        self._chunks = [0] * policy.lanes
        self._random = [np.random.default_rng() for _ in range(policy.lanes)]
        self._now = [self._plans[0]] * policy.lanes

    @staticmethod
    def check(every: Any, share: Any) -> tuple[int | None, float | None]:
        """The rule of turns, checked: ``ValueError`` or ``TypeError`` naming the argument."""
        if (every is None) == (share is None):
            got = "neither" if every is None else "both"
            raise ValueError(f"every, share: expected one of them, got {got}; e.g. every=3")
        if every is not None:
            every = integer("every", every, 1, None, "e.g. every=3")
        if share is not None:
            share = number("share", share, "of the chunks, from 0 to 1")
            if not 0 <= share <= 1:
                raise ValueError(f"share: expected a number from 0 to 1, got {share}")
        return every, share

    def __getattr__(self, name: str) -> Any:
        if name == "policy" or name.startswith("__"):  # of one not made yet; of protocols
            raise AttributeError(name)
        return getattr(self.policy, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            object.__setattr__(self, name, value)
        else:
            setattr(self.policy, name, value)

    def __repr__(self) -> str:
        rule = f"every {self.every}" if self.share is None else f"a share of {self.share:g}"
        return f"Turns({self.policy!r}, {rule}, cost {self.cost:.2%}, at most {self.most:.2%})"

    @property
    def _varies(self) -> bool:
        """Whether chunks may cost more or less than the one before."""
        return True

    @property
    def cost(self) -> float:
        """Of a chunk on average, as a fraction of a dense one."""
        share = 1 / self.every if self.every is not None else float(self.share or 0)
        return float((1 - share) * self._plans[0].cost + share * self._plans[1].cost)

    @property
    def most(self) -> float:
        """What a chunk costs at most."""
        return float(max(plan.cost for plan in self._plans))

    def reset(self, lanes: Any = None, seed: int | Sequence[int] | None = None) -> None:
        """As the policy's."""
        rows = self.policy._lanes(lanes)
        self.policy.reset(lanes=lanes, seed=seed)
        for row, lane in enumerate(rows):
            self._chunks[lane] = 0
            if seed is not None:
                key = (seed, lane) if isinstance(seed, int) else (seed[row],)
                self._random[lane] = np.random.default_rng([_STREAM, *map(int, key)])

    def __call__(self, obs: Any, *, lanes: Any = None, **options: Any) -> Any:
        """As the policy's."""
        rows = self.policy._lanes(lanes)
        before = self._now, [self._random[lane].bit_generator.state for lane in rows]
        self._now = list(self._now)
        for lane in rows:
            if self.every is not None:
                turn = self._chunks[lane] % self.every == 0
            else:
                turn = bool(self._random[lane].random() < (self.share or 0))
            self._now[lane] = self._plans[turn]
        try:
            self.policy.plan = self._now
            actions = self.policy(obs, lanes=rows, **options)
        except BaseException:  # a refused call has drawn nothing
            self._now = before[0]
            for lane, state in zip(rows, before[1], strict=True):
                self._random[lane].bit_generator.state = state
            raise
        for lane in rows:
            self._chunks[lane] += 1
        return actions
