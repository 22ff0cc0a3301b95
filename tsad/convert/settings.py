"""The settings (hydra/OmegaConf) inside a checkpoint, without OmegaConf.

``OmegaConf`` objects arrive as placeholders; ``plain`` takes their values out. ``Settings`` looks
up dotted keys and follows interpolations such as ``${horizon}``. Of resolvers it knows ``eval``
with sums of integers, which Diffusion Policy's configurations use for ``n_action_steps``.
"""

from __future__ import annotations

import re
from typing import Any

from tsad.checkpoint import CheckpointError
from tsad.convert.pickle_machine import Placeholder

_MAX_DEPTH = 64
_MAX_NODES = 200_000
_MAX_STEPS = 200
_INNERMOST = re.compile(r"\$\{([^${}]*)\}")
_SUM = re.compile(r"\s*\d{1,9}(\s*[-+]\s*\d{1,9}){0,9}\s*")
_MISSING = "???"


def plain(value: Any, file: str) -> Any:
    """Dicts, lists and values of a settings object; anything else in it becomes ``None``.

    The result is a tree of bounded size, whatever the pickle shared or nested.
    """
    nodes = 0

    def walk(value: Any, depth: int) -> Any:
        nonlocal nodes
        nodes += 1
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise CheckpointError(
                f"{file}: expected settings of at most {_MAX_DEPTH} levels and {_MAX_NODES} "
                "values, got more; the file is damaged"
            )
        if isinstance(value, Placeholder):
            state = (
                value.state[0] if isinstance(value.state, tuple) and value.state else value.state
            )
            if value.cls.module.split(".")[0] != "omegaconf" or not isinstance(state, dict):
                return None
            key = "_content" if "_content" in state else "_val"
            return walk(state.get(key), depth + 1)
        if isinstance(value, dict):
            return {str(k): walk(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v, depth + 1) for v in value]
        if value is None or isinstance(value, str | bool | int | float):
            return value
        return None

    return walk(value, 0)


class Settings:
    """Look-up in a tree of settings; errors name file and key."""

    def __init__(self, tree: Any, file: str) -> None:
        self.file = file
        if not isinstance(tree, dict) or not tree:
            raise CheckpointError(
                f"{file}: cfg: expected the settings of the training run, found none; without "
                "them the sampler is unknown, so convert a checkpoint that Diffusion Policy saved"
            )
        self._tree = tree
        self._steps = 0

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, interpolations resolved; ``default`` if it is not there."""
        found, value = self._find(key)
        if not found or value == _MISSING:
            return default
        self._steps = 0
        return self._resolve(value, key)

    def section(self, key: str) -> dict[str, Any]:
        """The keys of a dict with their values resolved, empty if it is not there."""
        found, value = self._find(key)
        if not found or not isinstance(value, dict):
            return {}
        return {name: self.get(f"{key}.{name}") for name in value}

    def _find(self, key: str) -> tuple[bool, Any]:
        value: Any = self._tree
        for part in key.split("."):
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part[:9]) < len(value):
                value = value[int(part[:9])]
            else:
                return False, None
        return True, value

    def _resolve(self, value: Any, key: str) -> Any:
        """Replaces the innermost ``${...}`` until none is left."""
        while isinstance(value, str) and (match := _INNERMOST.search(value)):
            self._steps += 1
            inner = self._expand(match[1], key)
            whole = match[0] == value
            if not whole and not isinstance(inner, str | int | float | None):
                raise self._unresolved(key, value)
            value = inner if whole else value[: match.start()] + str(inner) + value[match.end() :]
            if self._steps > _MAX_STEPS or (isinstance(value, str) and len(value) > 10_000):
                raise self._unresolved(key, value)
        return value

    def _expand(self, expression: str, key: str) -> Any:
        name, colon, argument = expression.partition(":")
        if colon:
            text = argument.strip().strip("'\"")
            if name.strip() != "eval" or not _SUM.fullmatch(text):
                raise self._unresolved(key, "${" + expression + "}")
            return sum(int(term.replace(" ", "")) for term in re.findall(r"-?\s*\d+", text))
        path = name.strip()
        if path.startswith("."):  # relative: one dot is the mapping that holds the key
            up = len(path) - len(path.lstrip("."))
            parents = key.split(".")[:-up]
            path = ".".join([*parents, path.lstrip(".")])
        found, value = self._find(path)
        if not found:
            raise self._unresolved(key, "${" + expression + "}")
        return value

    def _unresolved(self, key: str, value: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: cfg.{key}: expected a value, got the interpolation {value[:100]!r}, "
            "which cannot be resolved here; call OmegaConf.resolve(cfg) before saving"
        )
