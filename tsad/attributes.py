"""What is said of attributes that cannot be set."""

from __future__ import annotations

import difflib
import inspect
from typing import Any


def advice(kind: type, name: str, value: Any, load: Any) -> str:
    """What to do instead of setting this attribute; ``load`` makes objects of that kind."""
    arguments = inspect.signature(load).parameters
    if name in arguments:
        return f"expected as an argument; use tsad.load(..., {name}={value!r:.80})"
    if hasattr(kind, name):
        return "expected to be read, not set; what a policy is stays as it was loaded"
    settable = [key for key in dir(kind) if getattr(getattr(kind, key), "fset", None) is not None]
    near = difflib.get_close_matches(name, [*settable, *arguments], 1)
    fix = f"did you mean {near[0]!r}?" if near else "set one of these, or make a subclass"
    return f"expected one of {', '.join(settable)}, got {name!r}; {fix}"
