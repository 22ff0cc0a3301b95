"""A setting: how a policy runs, beside its weights, its noise and the machine.

`tsad.load`, presets, settings files, the command line and workers all say it in one form, and
`Setting.apply` is the one place where plans, planners and dials are set by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tsad.fitted import Fitted
from tsad.guard import Bound, Guard
from tsad.plan import Plan, plan_sha256
from tsad.planners import Planner, RowRule
from tsad.planners.files import plan_of
from tsad.rule import Alternate, Rule, rule_dict, rule_of

if TYPE_CHECKING:
    from tsad.policy import SparsePolicy

# What the command line and settings files call some of the fields.
WORDS = {"num_inference_steps": "steps", "timestep_spacing": "spacing"}
LOADED = (
    "sampler",
    "num_inference_steps",
    "timestep_spacing",
    "precision",
    "warm_start",
    "lead",
    "smoothing",
    "fitted",
    "reuse_images",
    "vision_precision",
)
RULED = {
    **dict.fromkeys(("plan", "planner", "sparsity"), "leaves nothing to others to decide"),
    "guard": "has no plan that a guard could set aside",
    "fitted": "has no one plan that a sampler could be fitted for",
}
MOVED = ("lead", "smoothing")  # what is made of the actions that are executed
MAX_LEAD = 10.0  # TSAD_MAX_LEAD in csrc/tsad.h
MAX_REUSE = 255.0  # levels of a pixel: everything
VISION_PRECISIONS = ("float32", "int16", "int8")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a policy runs. None: as the policy was made, and dense.

    Args:
        sampler, num_inference_steps, timestep_spacing, precision, warm_start: as of `tsad.load`.
        lead, smoothing: as of `tsad.load`.
        fitted: a `Fitted`, or the path of one, for this sampler and plan.
        reuse_images, vision_precision: as of `tsad.load`.
        n_action_steps: actions executed of a chunk.
        guard: a `tsad.guard.Bound`, or the path of one, past which the policy starts anew.
        planner, sparsity: as of `SparsePolicy`; sparsity None with the planner "pruner" is its own
            choice.
        plan: what is computed, instead of these two: a `Plan`, the path of one, or a step mask such
            as "10000010": 1 computes a step, 0 repeats the one before.
        rule: who decides, instead of these three, in the forms of `tsad.rule`.
    """

    sampler: str | None = None
    num_inference_steps: int | None = None
    timestep_spacing: str | None = None
    precision: str | None = None
    n_action_steps: int | None = None
    warm_start: int | None = None
    lead: float | None = None
    smoothing: bool | None = None
    fitted: Fitted | Path | str | None = None
    reuse_images: float | None = None
    vision_precision: str | None = None
    guard: Bound | Path | str | None = None
    planner: str | Planner | None = None
    sparsity: float | None = None
    plan: Plan | Path | str | None = None
    rule: Rule | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any]) -> Setting:
        """From what the command line or a settings file says, by its `WORDS`; the rest is left.

        ``ValueError`` or ``TypeError`` naming a rule that is none, or beside what it decides.
        """
        names = [field.name for field in fields(Setting)]
        values = {name: words.get(WORDS.get(name, name)) for name in names}
        if values["precision"] == "auto":
            values["precision"] = None
        values["rule"] = rule_of(values["rule"])
        if values["rule"] is not None:
            for name in ("plan", "planner", "sparsity", "guard", "fitted"):
                if values[name] is not None:
                    raise ValueError(
                        f"rule: {RULED[name]}, got {name} {str(values[name])!r} beside it; leave "
                        "out one of the two"
                    )
        return Setting(**values)

    def to_dict(self) -> dict[str, Any]:
        """What is set, for JSON; files by their names, and not as objects."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("plan", "fitted", "guard"):
            if isinstance(values[name], Path):
                values[name] = values[name].name
        if self.rule is not None:
            values["rule"] = rule_dict(self.rule)
        return {name: value for name, value in values.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `tsad.load` that it is made with."""
        values = {name: getattr(self, name) for name in LOADED}
        return {**values, "precision": self.precision or "auto", "fitted": self.load_fitted()}

    def load_plan(self, policy: SparsePolicy) -> Plan | None:
        """Its plan for a policy; ``ValueError`` or ``OSError`` if that can't be read."""
        return None if self.plan is None else plan_of(self.plan, policy)

    def load_fitted(self) -> Fitted | None:
        """What `tsad fit` found for it; ``ValueError`` or ``OSError`` if that can't be read."""
        given = self.fitted
        return given if given is None or isinstance(given, Fitted) else Fitted.read(given)

    def load_guard(self) -> Bound | None:
        """Its bound; ``ValueError`` or ``OSError`` if that can't be read."""
        given = self.guard
        return given if given is None or isinstance(given, Bound) else Bound.read(given)

    def wrapped(self, policy: SparsePolicy) -> SparsePolicy:
        """The policy, in `Turns` or a `Guard` where the setting has them."""
        if isinstance(self.rule, Alternate):  # which has all that a policy has
            return cast("SparsePolicy", self.rule.around(policy))
        bound = self.load_guard()
        # a Guard has all that a policy has
        return policy if bound is None else cast("SparsePolicy", Guard(policy, bound))

    def alone(self, policy: SparsePolicy) -> Setting:
        """The same without any file: with its plan for a policy in it."""
        values = {field.name: getattr(self, field.name) for field in fields(Setting)}
        own: dict[str, Any] = {"plan": self.load_plan(policy), "fitted": self.load_fitted()}
        if isinstance(self.rule, Alternate):
            own["rule"] = self.rule.loaded(policy)
        return Setting(**{**values, **own, "guard": self.load_guard()})

    def apply(self, policy: SparsePolicy) -> None:
        """Set the policy's plan, or its planner and dial; the rest it was loaded with.

        ``ValueError`` and ``OSError`` as of `load_plan` and of these attributes, whose names begin
        the message.
        """
        plan = self.load_plan(policy)
        if isinstance(self.rule, RowRule):
            policy.planner = self.rule
        elif isinstance(self.rule, Alternate):  # until `wrapped` has it
            policy.plan = cast("Plan", self.rule.loaded(policy).plan)
        elif plan is not None:
            policy.plan = plan
        else:
            if self.planner is not None:
                policy.planner = self.planner
            dial = self.sparsity
            if dial is None and not (self.planner == "pruner" or isinstance(self.planner, RowRule)):
                dial = 0.0
            policy.sparsity = dial
        _check_plan(self.load_fitted(), policy)

    def key(self, policy: SparsePolicy) -> dict[str, Any]:
        """All of it that decides an episode's result, as the policy that it is applied to says it.

        Runs of equal keys can go on with each other. What equals the default is left out where it
        came later, so that older results can be gone on with.
        """
        scheduler = policy.config["scheduler"]
        key = {
            "sampler": scheduler["type"],
            "num_inference_steps": scheduler["num_inference_steps"],
            "device": str(policy.device),
            "precision": policy.precision,
            "backend": policy.backend,
            **self.computed(policy),
        }
        if self.n_action_steps not in (None, policy.n_action_steps):
            key["n_action_steps"] = self.n_action_steps
        if self.warm_start is not None:
            key["warm_start"] = self.warm_start
        key |= {name: v for name in (*MOVED, "reuse_images") if (v := getattr(self, name))}
        if self.vision_precision not in (None, "float32"):
            key["vision_precision"] = self.vision_precision
        if (fitted := self.load_fitted()) is not None:
            key["fitted_sha256"] = fitted.sha256
        if (guard := self.load_guard()) is not None:
            key["guard_sha256"] = guard.sha256
        if self.timestep_spacing is not None:
            key["timestep_spacing"] = self.timestep_spacing
        return key

    def computed(self, policy: SparsePolicy) -> dict[str, Any]:
        """The part of `key` that says what is computed."""
        if isinstance(self.rule, Alternate):
            own = self.rule.loaded(policy)
            both = "+".join(plan_sha256(cast("Plan", plan)) for plan in (own.plan, own.other))
            turns = self.rule.around(policy)
            return {
                "planner": f"turns, {own.words()}",
                "sparsity": 1 - turns.cost,
                "plan_sha256": both,
            }
        plan = self.load_plan(policy)
        if plan is not None:
            return {"planner": "file", "sparsity": plan.sparsity, "plan_sha256": plan_sha256(plan)}
        # At sparsity 0 every planner is dense: one name, so that such runs go on with each other.
        planner = "dense" if policy.sparsity == 0 else planner_name(policy)
        return {"planner": planner, "sparsity": policy.sparsity, "plan_sha256": None}


def steady_sha256(policy: SparsePolicy) -> str | None:
    """`plan_sha256` of the plan that a policy runs; None if a pruner makes them."""
    return None if policy._plans is None else plan_sha256(policy._plans[0])


def _check_plan(fitted: Fitted | None, policy: SparsePolicy) -> None:
    """ValueError if what is fitted was fitted through another plan than is set."""
    if fitted is not None and fitted.plan_sha256 != steady_sha256(policy):
        raise ValueError(
            "fitted: was made for another plan than this setting's; give the plan that it was made "
            "for, or fit this one (tsad fit)"
        )


def planner_name(policy: SparsePolicy) -> str:
    """The planner in words."""
    planner = policy.planner
    return planner if isinstance(planner, str) else repr(planner)
