"""What stands between ``${`` and ``}`` in settings: OmegaConf's grammar, taken apart.

A text becomes a list of strings and interpolations: a ``Reference`` to another setting, or a
``Resolver`` with arguments, which are texts again. Nothing is looked up here; ``calculate`` is the
one resolver with a language of its own, ``eval``, as far as it is arithmetic.
"""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

_OPEN = re.compile(r"(\\*)\$\{\s*")
_NAME = re.compile(r"""[^\\{}()\[\]:. \t'"$,]+""")
_SPACE = re.compile(r"\s*")
_PLAIN = re.compile(r"""[^,{}\[\]'"]*?(?=\$\{|[,{}\[\]'"]|$)""", re.DOTALL)
_MAX_DEPTH = 20


@dataclass(frozen=True)
class Reference:
    """``${a.b[0]}``, or with leading dots relative to the setting; keys may be interpolations."""

    dots: int
    keys: tuple[Text, ...]


@dataclass(frozen=True)
class Resolver:
    """``${name:argument,...}``; an argument is a text, and whether it stood in quotes."""

    name: str
    arguments: tuple[tuple[Text, bool], ...]


Text: TypeAlias = "tuple[str | Reference | Resolver, ...]"


def parse(text: str) -> Text:
    """The parts of a setting. ``ValueError`` for what is not of the grammar."""
    return _Parser(text).text(None)


class _Parser:
    def __init__(self, source: str) -> None:
        self.source = source
        self.at = 0
        self.depth = 0

    def text(self, quote: str | None) -> Text:
        """Strings and interpolations up to the closing quote, or to the end."""
        parts: list[str | Reference | Resolver] = []
        stop = len(self.source)

        def add(text: str) -> None:
            parts.append(text if quote is None else text.replace(f"\\{quote}", quote))

        while True:
            found = _OPEN.search(self.source, self.at)
            if quote is not None:
                stop = self._closing(quote)
            if found is None or found.start() >= stop:
                break
            slashes = len(found[1])
            add(self.source[self.at : found.start()] + "\\" * (slashes // 2))
            self.at = found.end()
            parts.append("${" if slashes % 2 else self.interpolation())
        add(self.source[self.at : stop])
        self.at = stop + 1
        return tuple(part for part in parts if part != "")

    def _closing(self, quote: str) -> int:
        """Where the next quote is that no backslash takes its meaning from."""
        found = re.compile(rf"(?<!\\)(?:\\\\)*{quote}").search(self.source, self.at)
        if found is None:
            raise ValueError("a quote without its end")
        return found.end() - 1

    def interpolation(self) -> Reference | Resolver:
        """After ``${``."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise ValueError("too many nested interpolations")
        dots = 0
        while self._skip("."):
            dots += 1
        keys = [self._key()] if not self._looking_at("[") else []
        while True:
            if self._skip("["):
                keys.append(self._key())
                self._expect("]")
            elif self._skip("."):
                keys.append(self._key())
            else:
                break
        self._spaces()
        self.depth -= 1
        if self._skip("}"):
            return Reference(dots, tuple(keys))
        self._expect(":")
        if dots or not all(len(key) == 1 and isinstance(key[0], str) for key in keys):
            raise ValueError("a resolver without a name")
        self.depth += 1
        resolver = Resolver(".".join(str(key[0]) for key in keys), self._arguments())
        self.depth -= 1
        return resolver

    def _key(self) -> Text:
        if found := _OPEN.match(self.source, self.at):
            self.at = found.end()
            return (self.interpolation(),)
        found = _NAME.match(self.source, self.at)
        if found is None:
            raise ValueError("a key that is no name")
        self.at = found.end()
        return (found[0],)

    def _arguments(self) -> tuple[tuple[Text, bool], ...]:
        arguments: list[tuple[Text, bool]] = []
        self._spaces()
        if self._skip("}"):
            return ()
        while True:
            self._spaces()
            if self._looking_at("'") or self._looking_at('"'):
                quote = self.source[self.at]
                self.at += 1
                arguments.append((self.text(quote), True))
                self._spaces()
            else:
                arguments.append((self._plain(), False))
            if self._skip("}"):
                return tuple(arguments)
            self._expect(",")

    def _plain(self) -> Text:
        """An argument without quotes; spaces around it do not count."""
        parts: list[str | Reference | Resolver] = []
        while True:
            found = _PLAIN.match(self.source, self.at)
            assert found is not None  # it may be empty
            parts.append(found[0])
            self.at = found.end()
            opening = _OPEN.match(self.source, self.at)
            if opening is None:
                break
            self.at = opening.end()
            parts.append(self.interpolation())
        if isinstance(parts[-1], str):
            parts[-1] = parts[-1].rstrip()
        return tuple(part for part in parts if part != "")

    def _spaces(self) -> None:
        found = _SPACE.match(self.source, self.at)
        self.at = found.end() if found else self.at

    def _looking_at(self, character: str) -> bool:
        return self.source.startswith(character, self.at)

    def _skip(self, character: str) -> bool:
        there = self._looking_at(character)
        self.at += there
        return there

    def _expect(self, character: str) -> None:
        if not self._skip(character):
            raise ValueError(f"no {character!r} where one should be")


def literal(text: str) -> Any:
    """An argument without quotes as OmegaConf reads it: null, true, numbers, else itself."""
    word = text.lower()
    if word in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[word]
    if re.fullmatch(r"[+-]?(0|[1-9](_?\d)*)", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)", word):
        return float(text)
    return text


_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "bool": bool,
    "float": float,
    "int": int,
    "max": max,
    "min": min,
    "round": round,
}
_LARGEST = 2**53


def calculate(text: str) -> Any:
    """The value of a Python expression of numbers, comparisons and conditions.

    It is taken apart, not run: names other than those of ``_FUNCTIONS`` mean nothing.
    ``ValueError`` for any other expression.
    """
    if len(text) > 500:
        raise ValueError("a long expression")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, on how it is written
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body)
    except (
        SyntaxError,
        TypeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise ValueError(f"no arithmetic ({error})") from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.BinOp(left, kind, right) if type(kind) in _BINARY:
            return _number(_BINARY[type(kind)](_number(_value(left)), _number(_value(right))))
        case ast.UnaryOp(kind, operand) if type(kind) in _UNARY:
            value = _value(operand)
            return _UNARY[type(kind)](value if isinstance(kind, ast.Not) else _number(value))
        case ast.BoolOp(kind, values):
            stop = isinstance(kind, ast.Or)
            for item in values:
                value = _value(item)
                if bool(value) == stop:
                    break
            return value
        case ast.Compare(left, kinds, others) if all(type(kind) in _COMPARE for kind in kinds):
            value = _value(left)
            for comparison, item in zip(kinds, others, strict=True):
                other = _value(item)
                if not _COMPARE[type(comparison)](value, other):
                    return False
                value = other
            return True
        case ast.IfExp(test, body, other):
            return _value(body if _value(test) else other)
        case ast.Call(ast.Name(name), arguments, []) if name in _FUNCTIONS:
            return _number(_FUNCTIONS[name](*(_number(_value(item)) for item in arguments)))
    raise ValueError(f"{type(node).__name__} in an expression")


def _number(value: Any) -> Any:
    if not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise ValueError("no number, or a large one")
    return value
