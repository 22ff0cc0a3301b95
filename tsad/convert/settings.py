"""The settings (hydra/OmegaConf) inside a checkpoint, without OmegaConf.

``OmegaConf`` objects arrive as placeholders; their values are taken out. ``Settings`` looks up
dotted keys and follows interpolations such as ``${horizon}`` in every form that OmegaConf has,
references to whole sections included. Of resolvers it knows those that need nothing but the
settings: ``oc.select``, ``oc.deprecated``, and for ``eval``, which Diffusion Policy registers,
arithmetic.
"""

from __future__ import annotations

from typing import Any

from tsad.checkpoint import CheckpointError
from tsad.convert.interpolation import Reference, Resolver, Text, calculate, literal, parse
from tsad.convert.pickle_machine import Global, Placeholder
from tsad.convert.torch_file import describe

_MAX_DEPTH = 64
_MAX_NODES = 200_000
_MAX_STEPS = 200
_MAX_NESTED = 40
_MAX_TEXT = 2000
_MISSING = "???"

_Path = tuple[str, ...]


class Settings:
    """Look-up in the settings of a training run; errors name file and key.

    ``cfg`` is what the file holds: a dict, or OmegaConf's object as a ``Placeholder``.
    """

    def __init__(self, cfg: Any, file: str) -> None:
        self.file = file
        root, self._prefix = _root(cfg)
        self._tree = plain(root, file)
        self._steps = self._nested = 0
        if not isinstance(self._tree, dict) or not self._tree:
            raise CheckpointError(
                f"{file}: cfg: expected the settings of the training run, got {describe(cfg)}; "
                "without them the sampler is unknown, so convert a checkpoint that Diffusion "
                "Policy saved"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a dotted key, interpolations resolved; ``default`` if it is not there."""
        return self._get(tuple(key.split(".")), default)

    def keys(self, key: str) -> list[str]:
        """The keys of a section, or of the one that it refers to; none if it is not there."""
        section = self.get(key)
        return list(section) if isinstance(section, dict) else []

    def section(self, key: str) -> dict[str, Any]:
        """The keys of a section with their values resolved, empty if it is not there."""
        return {name: self._get((*key.split("."), name), None) for name in self.keys(key)}

    def _get(self, path: _Path, default: Any) -> Any:
        self._steps = self._nested = 0
        try:
            found = self._select((*self._prefix, *path))
        except ValueError as error:
            raise CheckpointError(
                f"{self.file}: cfg.{'.'.join(path)[:200]}: expected a value, got {error}, which "
                "cannot be resolved here; load the file where it was trained, call "
                "OmegaConf.resolve on its cfg and save it again"
            ) from None
        if found is None or found[1] == _MISSING:
            return default
        value = found[1]
        if value is not None and not isinstance(value, str | bool | int | float | list | dict):
            raise CheckpointError(
                f"{self.file}: cfg.{'.'.join(path)[:200]}: expected a plain value, got "
                f"{describe(value)}, which is not read; save a number or a string"
            )
        return value

    def _select(self, path: _Path) -> tuple[_Path, Any] | None:
        """Where a value really is, and the value: references on the way are followed."""
        at: _Path = ()
        value: Any = self._tree
        for part in path:
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and _is_index(part, len(value)):
                value = value[int(part)]
            else:
                return None
            at, value = self._follow((*at, part), value)
        return at, value

    def _follow(self, at: _Path, value: Any) -> tuple[_Path, Any]:
        """What a setting stands for: itself, unless it has an interpolation."""
        if not isinstance(value, str) or "${" not in value:
            return at, value
        self._steps += 1
        self._nested += 1
        if self._steps > _MAX_STEPS or self._nested > _MAX_NESTED or len(value) > _MAX_TEXT:
            raise ValueError(f"the endless interpolation {value[:100]!r}")
        try:
            return self._evaluate(parse(value), at)
        except _UnresolvedError:
            raise
        except ValueError as error:
            raise _UnresolvedError(f"the interpolation {value[:100]!r} ({error})") from None
        finally:
            self._nested -= 1

    def _evaluate(self, text: Text, at: _Path) -> tuple[_Path, Any]:
        """The value of a text, and where it is: a lone reference is what it refers to."""
        if len(text) == 1 and isinstance(text[0], Reference):
            return self._refer(text[0], at)
        if len(text) == 1 and isinstance(text[0], Resolver):
            return self._resolve(text[0], at)
        result = ""
        for part in text:
            value = part if isinstance(part, str) else self._evaluate((part,), at)[1]
            if value is not None and not isinstance(value, str | int | float):
                raise ValueError(f"{describe(value)} inside a text")
            result += str(value)
            if len(result) > _MAX_TEXT:
                raise ValueError("a text without end")
        return at, result

    def _refer(self, reference: Reference, at: _Path) -> tuple[_Path, Any]:
        keys = tuple(str(self._evaluate(key, at)[1]) for key in reference.keys)
        if reference.dots > len(at):
            raise ValueError("it leads out of the settings")
        # one dot is the section that holds the setting
        base = at[: -reference.dots] if reference.dots else ()
        found = self._select((*base, *(part for key in keys for part in key.split("."))))
        if found is None:
            raise ValueError(f"there is no {'.'.join(keys)[:100]!r}")
        if found[1] == _MISSING:
            raise ValueError(f"{'.'.join(keys)[:100]!r} is missing, ???")
        if found[0] == at[: len(found[0])]:
            raise ValueError("it leads to what holds it")
        return found

    def _resolve(self, resolver: Resolver, at: _Path) -> tuple[_Path, Any]:
        name = resolver.name
        if name not in ("eval", "oc.select", "oc.deprecated"):
            why = "depends on the machine" if name == "oc.env" else "is not known here"
            raise ValueError(f"the resolver {name[:50]!r} {why}")
        arguments = []
        for text, quoted in resolver.arguments:
            word = text[0] if len(text) == 1 else None
            bare = isinstance(word, str) and not quoted
            arguments.append((at, literal(str(word))) if bare else self._evaluate(text, at))
        if not arguments or not isinstance(arguments[0][1], str):
            raise ValueError(f"{name} takes a text")
        first = arguments[0][1]
        if name == "eval":
            return at, calculate(first)
        reference = parse("${" + first + "}")
        if name == "oc.select" and len(arguments) > 1:
            try:
                return self._evaluate(reference, at)
            except ValueError:
                return arguments[1]
        return self._evaluate(reference, at)


class _UnresolvedError(ValueError):
    """A value that cannot be told; the message names the interpolation."""


def _is_index(part: str, count: int) -> bool:
    digits = part.removeprefix("-")
    return digits.isdecimal() and digits.isascii() and -count <= int(part[:9]) < count


def _state(value: Any) -> dict[Any, Any]:
    """The attributes of one of OmegaConf's objects, empty for anything else."""
    if not isinstance(value, Placeholder) or value.cls.module.split(".")[0] != "omegaconf":
        return {}
    state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
    return state if isinstance(state, dict) else {}


def _root(cfg: Any) -> tuple[Any, _Path]:
    """The settings that ``cfg`` is a section of, which its interpolations start from, and where."""
    path: _Path = ()
    for _ in range(_MAX_DEPTH):
        parent = _state(cfg).get("_parent")
        if not _state(parent):
            break
        path = (str(_state(_state(cfg).get("_metadata")).get("key")), *path)
        cfg = parent
    return cfg, path


def plain(value: Any, file: str) -> Any:
    """Dicts, lists and values of a settings object; any other object in it stays what it is.

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
        state = _state(value)
        if state:
            return walk(state.get("_content" if "_content" in state else "_val"), depth + 1)
        if isinstance(value, dict):
            return {str(k): walk(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [walk(v, depth + 1) for v in value]
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return Placeholder(Global("builtins", "int"))  # too long to print, and no setting
        return value

    return walk(value, 0)
