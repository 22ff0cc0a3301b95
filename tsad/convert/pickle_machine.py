"""A pickle reader that runs nothing.

A pickle is a program for a stack machine, and ``pickle.load`` lets it call any importable function.
This machine has no such power: it takes the opcodes apart with ``pickletools`` and builds numbers,
strings, lists, dicts and inert ``Global`` and ``Placeholder`` records. No name is imported, nothing
from the file is called, no attribute is set. What a call would mean for the few names that a
checkpoint needs is decided by a ``Vocabulary``; any other call leaves a record of itself, so that
whatever lies beside the weights can be read past.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from tsad.checkpoint import CheckpointError

_MARK = object()
_MAX_OPCODES = 5_000_000


@dataclass(frozen=True)
class Global:
    """A name that a pickle refers to. It stands for itself; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class Placeholder:
    """An object of a class that is not here: what the pickle said about it, and no behaviour.

    ``cls`` is the name that the pickle calls to make it.
    """

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)


class Vocabulary(Protocol):
    """What a checkpoint's names mean. Methods raise ``CheckpointError``, or what ``read_pickle``
    makes one of: ``ValueError``, ``TypeError``, ``LookupError``."""

    def call(self, ref: Global, args: tuple[Any, ...]) -> Any:
        """What stands for the result of ``ref(*args)``."""

    def persistent(self, pid: Any) -> Any:
        """What stands for an object stored outside of the pickle."""


def read_pickle(stream: IO[bytes], vocabulary: Vocabulary, file: str) -> Any:
    """The object that the next pickle of a stream describes: plain values and inert records.

    ``file`` names the source in errors. Raises ``CheckpointError`` for anything that is not a
    complete pickle.
    """
    machine = _Machine(vocabulary, file)
    try:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > _MAX_OPCODES:
                raise CheckpointError(
                    f"{file}: expected at most {_MAX_OPCODES} pickle opcodes, got more; save the "
                    "weights without whatever else is in this file"
                )
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, arg)
    except CheckpointError:
        raise
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        # a malformed program: stack underflow, unknown memo entry, bad literal, truncated argument
        raise CheckpointError(
            f"{file}: expected a pickle, got something damaged or of another kind "
            f"({type(error).__name__}: {str(error)[:200]})"
        ) from None
    raise CheckpointError(f"{file}: expected a pickle that ends with STOP, got a truncated one")


class _Machine:
    """The stack, the memo and one handler per opcode."""

    def __init__(self, vocabulary: Vocabulary, file: str) -> None:
        self.vocabulary = vocabulary
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, arg: Any) -> None:
        if opcode in _LITERALS:
            self.stack.append(arg)
        elif opcode in _MAKERS:
            self.stack.append(_MAKERS[opcode]())
        elif opcode in _HANDLERS:
            _HANDLERS[opcode](self, arg)
        else:
            raise self.refuse(f"the opcode {opcode}")

    def result(self) -> Any:
        value = self.pop()
        if self.stack:
            raise CheckpointError(f"{self.file}: expected one object in the pickle, got more")
        return value

    def refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: refused: the pickle contains {what}, which torch.save does not write. "
            "Nothing of it was run"
        )

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise ValueError("a mark where a value should be")
        return value

    def pop_to_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                values = self.stack[i + 1 :]
                del self.stack[i:]
                return values
        raise ValueError("no mark on the stack")

    def key(self, value: Any) -> Any:
        """A dict key or set member: itself where hashing it is cheap and cannot be made to collide
        on purpose, else a record of it, which is equal to nothing."""
        if value is None or isinstance(value, str | bytes | Placeholder):
            return value
        if isinstance(value, int) and -(2**63) <= value < 2**63:
            return value
        return Placeholder(Global("builtins", type(value).__name__), (value,))

    def call(self, ref: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise TypeError(f"a {type(args).__name__} as arguments of a call")
        if isinstance(ref, Global):
            return self.vocabulary.call(ref, args)
        if isinstance(ref, Placeholder):  # a function that another call made
            return Placeholder(ref.cls, args)
        raise TypeError(f"a call of a {type(ref).__name__}")

    def add_items(self, target: Any, flat: list[Any]) -> None:
        if len(flat) % 2:
            raise ValueError("a key without a value")
        pairs = [(self.key(flat[i]), flat[i + 1]) for i in range(0, len(flat), 2)]
        if isinstance(target, dict):
            target.update(pairs)
        elif isinstance(target, Placeholder):
            target.items.extend(pairs)
        elif not isinstance(target, Global):  # such as the dict of a module, as dill names it
            raise TypeError(f"an item assignment to a {type(target).__name__}")

    def extend(self, target: Any, values: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(self.key(value) for value in values)
        elif isinstance(target, Placeholder):
            target.items.extend(values)
        else:
            raise TypeError(f"an append to a {type(target).__name__}")


def _global(machine: _Machine, arg: str) -> None:
    module, _, name = arg.partition(" ")
    machine.stack.append(Global(module, name))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise TypeError("a global name that is no string")
    machine.stack.append(Global(module, name))


def _reduce(machine: _Machine, _: Any) -> None:
    args, ref = machine.pop(), machine.pop()
    machine.stack.append(machine.call(ref, args))


def _newobj_ex(machine: _Machine, _: Any) -> None:
    kwargs, args, ref = machine.pop(), machine.pop(), machine.pop()
    made = machine.call(ref, args)
    if kwargs and isinstance(made, Placeholder):
        made.state = kwargs
    machine.stack.append(made)


def _inst(machine: _Machine, arg: str) -> None:
    args = tuple(machine.pop_to_mark())
    _global(machine, arg)
    machine.stack.append(machine.call(machine.pop(), args))


def _obj(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.stack.append(machine.call(values[0], tuple(values[1:])))


def _build(machine: _Machine, _: Any) -> None:
    """``obj.__setstate__(state)``, kept as data. Torch gives a dict of tensors its metadata."""
    state, target = machine.pop(), machine.top()
    if isinstance(target, Placeholder):
        target.state = state


def _put(machine: _Machine, arg: int) -> None:
    machine.memo[arg] = machine.top()


def _memoize(machine: _Machine, _: Any) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _get(machine: _Machine, arg: int) -> None:
    machine.stack.append(machine.memo[arg])


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def handler(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return handler


def _dict(machine: _Machine, _: Any) -> None:
    flat = machine.pop_to_mark()
    machine.stack.append({})
    machine.add_items(machine.top(), flat)


def _frozenset(machine: _Machine, _: Any) -> None:
    machine.stack.append(frozenset(machine.key(value) for value in machine.pop_to_mark()))


def _append(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    machine.extend(machine.top(), [value])


def _appends(machine: _Machine, _: Any) -> None:
    values = machine.pop_to_mark()
    machine.extend(machine.top(), values)


def _setitem(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.add_items(machine.top(), [key, value])


def _setitems(machine: _Machine, _: Any) -> None:
    flat = machine.pop_to_mark()
    machine.add_items(machine.top(), flat)


def _extension(machine: _Machine, code: int) -> None:
    """A name by its number in a registry of the process that saved."""
    machine.stack.append(Global("copyreg", f"extension {code}"))


def _persid(machine: _Machine, arg: Any) -> None:
    machine.stack.append(machine.vocabulary.persistent(arg))


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split()
)
_MAKERS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
# not here, so refused: NEXT_BUFFER and READONLY_BUFFER, which need buffers from outside
_HANDLERS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, arg: None,
    "FRAME": lambda machine, arg: None,
    "POP": lambda machine, arg: machine.stack.__delitem__(-1),
    "POP_MARK": lambda machine, arg: machine.pop_to_mark().clear(),
    "DUP": lambda machine, arg: machine.stack.append(machine.top()),
    "BYTEARRAY8": lambda machine, arg: machine.stack.append(bytes(arg)),
    "LIST": lambda machine, arg: machine.stack.append(machine.pop_to_mark()),
    "TUPLE": lambda machine, arg: machine.stack.append(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "DICT": _dict,
    "FROZENSET": _frozenset,
    "APPEND": _append,
    "APPENDS": _appends,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "ADDITEMS": _appends,
    "GET": _get,
    "BINGET": _get,
    "LONG_BINGET": _get,
    "PUT": _put,
    "BINPUT": _put,
    "LONG_BINPUT": _put,
    "MEMOIZE": _memoize,
    "EXT1": _extension,
    "EXT2": _extension,
    "EXT4": _extension,
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "INST": _inst,
    "OBJ": _obj,
    "BUILD": _build,
    "PERSID": _persid,
    "BINPERSID": lambda machine, arg: _persid(machine, machine.pop()),
}
