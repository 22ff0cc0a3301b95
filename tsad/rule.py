"""Rules of a setting: what decides how much a chunk computes while an episode runs.

A settings file says one as an object, the command line as text with the same words::

    {"fbcache": 0.2, "most": 20}                                fbcache=0.2,most=20
    {"teacache": 1.0}                                           teacache=1.0
    {"every": 3, "plan": "10000000", "other": "10001000"}       every=3,plan=10000000,other=10001000
    {"share": 0.3, "plan": "cheap.npz", "other": "dear.npz"}    share=0.3,plan=...,other=...

The first two are `tsad.planners.RowRule`, the others `tsad.planners.Turns`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.plan import Plan
from tsad.planners import RowRule, Turns
from tsad.planners.files import is_mask, plan_of
from tsad.planners.runtime import RULES

if TYPE_CHECKING:
    from tsad.policy import SparsePolicy

EXAMPLES = "fbcache=0.2, teacache=1,most=20 or every=3,plan=A.npz,other=B.npz"
_ROW_WORDS = (*RULES, "most", "polynomial")
_TURN_WORDS = ("every", "share", "plan", "other")


@dataclass(frozen=True)
class Alternate:
    """Two plans that take turns, as of `tsad.planners.Turns`: objects, files or step masks."""

    plan: Plan | Path | str
    other: Plan | Path | str
    every: int | None = None
    share: float | None = None

    def words(self) -> str:
        """E.g. "every 3"."""
        return f"every {self.every}" if self.share is None else f"share {self.share:g}"

    def loaded(self, policy: SparsePolicy) -> Alternate:
        """The same with plans in place of files and masks; ``ValueError`` or ``OSError``."""
        return replace(self, plan=plan_of(self.plan, policy), other=plan_of(self.other, policy))

    def within(self, folder: Path) -> Alternate:
        """The same with files relative to a folder."""

        def placed(given: Any) -> Any:
            inside = not isinstance(given, Plan) and not is_mask(given)
            return folder / given if inside else given

        return replace(self, plan=placed(self.plan), other=placed(self.other))

    def around(self, policy: SparsePolicy) -> Turns:
        """The policy with it."""
        own = self.loaded(policy)
        assert isinstance(own.plan, Plan) and isinstance(own.other, Plan)
        return Turns(policy, own.plan, own.other, every=self.every, share=self.share)


Rule = RowRule | Alternate


def rule_of(given: Any) -> Rule | None:
    """A rule as a setting says it; ``ValueError`` or ``TypeError`` that begin with ``rule:``."""
    if given is None or isinstance(given, RowRule | Alternate):
        return given
    words = _words(given) if isinstance(given, str) else given
    if not isinstance(words, Mapping):
        raise TypeError(f"rule: expected an object or text, got {given!r}; e.g. {EXAMPLES}")
    kinds = [name for name in (*RULES, "every", "share") if name in words]
    if len(kinds) != 1:
        got = " and ".join(map(repr, kinds)) if kinds else "none of them"
        raise ValueError(
            f"rule: expected one of fbcache, teacache, every, share, got {got} in {given!r}; e.g. "
            f"{EXAMPLES}"
        )
    known = _ROW_WORDS if kinds[0] in RULES else _TURN_WORDS
    for name in words:
        if name not in known:
            raise ValueError(
                f"rule: unknown word {name!r} beside {kinds[0]!r}; known are {', '.join(known)}"
            )
    try:
        return _row_rule(kinds[0], words) if kinds[0] in RULES else _alternate(kinds[0], words)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"rule: {error}") from error


def _row_rule(kind: str, words: Mapping[str, Any]) -> RowRule:
    polynomial = words.get("polynomial", (0.0, 1.0))
    if not isinstance(polynomial, list | tuple):
        raise TypeError(f"polynomial: expected a list, got {polynomial!r}; e.g. [0, 1]")
    return RowRule(kind, words[kind], words.get("most"), polynomial)


def _alternate(kind: str, words: Mapping[str, Any]) -> Alternate:
    plans = {name: words.get(name) for name in ("plan", "other")}
    for name, given in plans.items():
        if not isinstance(given, str | Path) or not str(given):
            raise ValueError(
                f"{name}: expected a plan file or a step mask such as 10000000, got {given!r}"
            )
    Turns.check(**{"every": None, "share": None, kind: words[kind]})
    return Alternate(**plans, **{kind: words[kind]})  # type: ignore[arg-type]


def _words(text: str) -> dict[str, Any]:
    """Of ``a=b,c=d``; numbers are numbers, but for masks."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value or name in found:
            raise ValueError(
                f"rule: expected words NAME=VALUE with commas between, each once, got {text!r}; "
                f"e.g. {EXAMPLES}"
            )
        found[name] = value if name in ("plan", "other") else _number(value)
    return found


def _number(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def rule_dict(rule: Rule) -> dict[str, Any]:
    """A rule as a settings file says it; plans by their names, and not as objects."""
    if isinstance(rule, Alternate):
        values = {name: value for name, value in vars(rule).items() if value is not None}
        return {n: v.name if isinstance(v, Path) else v for n, v in values.items()}
    values = asdict(rule)
    found = {values.pop("rule"): values.pop("threshold"), **values}
    if found["most"] is None:
        del found["most"]
    if tuple(found["polynomial"]) == (0.0, 1.0):
        del found["polynomial"]
    else:
        found["polynomial"] = list(found["polynomial"])
    return found


def rule_words(rule: Rule) -> str:
    """In words, e.g. "fbcache 0.2, at most 20 steps"."""
    if isinstance(rule, Alternate):
        return f"plans that take turns, {rule.words()}"
    text = f"{rule.rule} {rule.threshold:g}"
    return text if rule.most is None else f"{text}, at most {rule.most} steps"
