"""Rules that decide within a chunk, row by row, from what the row has come to.

What a rule sees is the chunk's own: as its authors run it, and unlike `teacache` and `fbcache`,
which make fixed plans of recorded distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tsad.plan import Plan
from tsad.planners.base import PolicyFacts, integer, layers, number

TERMS = 5  # of a polynomial: TSAD_RULE_TERMS in csrc/tsad.h
RULES = ("fbcache", "teacache")


@dataclass(frozen=True)
class RowRule:
    """A planner that decides at run time.

    >>> policy.planner = tsad.planners.RowRule("fbcache", 0.1)

    Args:
        rule: "fbcache", the first-block cache: each step computes its first layer, and the others
            if what that adds differs from what it added at the last step computed whole, sum
            |a - b| / sum |b|, by at least the threshold. "teacache": before each step the same
            distance of its input (the embedded sample) to that of the step before is added up,
            and at the threshold the step is computed and the sum begins anew; so is the last step.
            What is not computed repeats its own last value. The first step is always computed.
        threshold: at 0 all is computed.
        most: an upper bound of steps computed whole in a chunk; None: there is none.
        polynomial: TeaCache's, from a distance to what is added up; up to five coefficients, from
            the constant on (`fit_teacache`). A time that comes as a token changes no input.

    Every lane decides for itself, so what it does follows from its own observation and noise. The
    dial says nothing here: ``policy.sparsity`` is None, and ``policy.stats["mean_sparsity"]`` what
    was left out since the reset. On CPUs, for the transformer of Diffusion Policy, without a warm
    start; else setting it raises ``ValueError``.

    Raises ``ValueError`` or ``TypeError`` naming the argument.
    """

    rule: str
    threshold: float
    most: int | None = None
    polynomial: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule: expected 'fbcache' or 'teacache', got {self.rule!r}")
        threshold = number("threshold", self.threshold, "0 computes all, 0.1 leaves out more")
        if not 0 <= threshold < math.inf:
            raise ValueError(f"threshold: expected a number from 0, got {threshold}; e.g. 0.1")
        if self.most is not None:
            least = 1 if self.rule == "fbcache" else 2
            integer("most", self.most, least, None, "steps computed whole in a chunk")
        given = [number("polynomial", x, "e.g. (0, 1)") for x in self.polynomial]
        if not 1 <= len(given) <= TERMS or not all(map(math.isfinite, given)):
            raise ValueError(
                f"polynomial: expected 1 to {TERMS} finite coefficients, from the constant on, got "
                f"{list(self.polynomial)}; e.g. (0, 1)"
            )
        if self.rule == "fbcache" and given != [0.0, 1.0]:
            raise ValueError("polynomial: is TeaCache's, got one for 'fbcache'; leave it out")
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "polynomial", tuple(given))

    def __call__(self, policy: PolicyFacts, sparsity: float, /) -> Plan:
        """It makes no plans: ValueError."""
        raise ValueError(f"planner: {self!r} decides within a chunk; set it as policy.planner")

    def check_dial(self, value: float | None) -> float | None:
        """``value``, which is None, as a threshold decides; else ValueError."""
        if value is not None:
            raise ValueError(
                f"sparsity: expected None, as {self!r} decides by a threshold, got {value!r}; set "
                "a planner with another one, or policy.planner = 'uniform' first"
            )
        return value

    def set(self, policy: Any) -> None:
        """Let it decide; what ``policy.planner = rule`` does. ValueError where it can't."""
        refusal = self.refusal(policy)
        if refusal is not None:
            raise ValueError(f"planner: {self!r} {refusal}")
        blocks = int((layers(policy) == 0).sum()) if self.rule == "fbcache" else 0
        most = policy.num_inference_steps if self.most is None else self.most
        terms = (*self.polynomial, *[0.0] * (TERMS - len(self.polynomial)))
        policy._set_rule(blocks, self.threshold, min(most, 2**31 - 1), terms)

    def refusal(self, policy: Any) -> str | None:
        """Why it can't decide for a policy, in words; None if it can."""
        config = policy.config["network"]["type"]
        for what, got, expected in (
            ("a device that decides within a chunk", policy.device, "cpu"),
            ("a network", config, "diffusion_policy_transformer"),
            ("a warm start of", policy.warm_start, None),
        ):
            if got != expected:
                return (
                    f"expects {what} {expected!r}, got {got!r}; load the policy so, or use "
                    f"tsad.planners.{self.rule} with recorded distances"
                )
        return None
