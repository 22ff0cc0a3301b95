"""Files of ``torch.save``, read without torch and without running anything in them.

The pickle in such a file is read by ``pickle_machine``; every tensor in it is a view (offset,
shape, strides) of a storage in the ``archive``, and becomes a ``TensorRef``, whose numbers are read
only when asked for. Everything else that a training run saves beside its weights becomes plain
containers and ``Placeholder`` records.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import CheckpointError, check_finite, to_float32
from tsad.convert.archive import Storage, open_archive
from tsad.convert.pickle_machine import Global, Placeholder

_MAX_DIMS = 8

# torch's name -> (dtype code of tsad.checkpoint, bytes per number)
_FLOATS = {
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
}
# storage class -> (torch's name of its numbers, bytes per number)
_STORAGES = {
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "BoolStorage": ("bool", 1),
    "ByteStorage": ("uint8", 1),
    "CharStorage": ("int8", 1),
    "ShortStorage": ("int16", 2),
    "IntStorage": ("int32", 4),
    "LongStorage": ("int64", 8),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "QUInt8Storage": ("quint8", 1),
    "QInt8Storage": ("qint8", 1),
    "QInt32Storage": ("qint32", 4),
    "QUInt4x2Storage": ("quint4x2", 1),
    "QUInt2x4Storage": ("quint2x4", 1),
    "UntypedStorage": ("uint8", 1),
}
_SCALARS = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
# tensors that are no view of numbers, as an error should call them
_OTHER_TENSORS = {
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without numbers (device meta)",
}
# Where modules have moved: what protocol 2 and older torch and NumPy write.
_MOVED = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "torch.tensor": "torch._tensor",
    "numpy.core.multiarray": "numpy._core.multiarray",
}
# Calls that no training run leaves in its checkpoint: they are said, though they do nothing here.
_ALARMING_MODULES = frozenset(
    "os posix nt subprocess sys shutil socket runpy pty importlib webbrowser ctypes".split()
)
_ALARMING_BUILTINS = frozenset("eval exec compile open __import__".split())


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read: a strided view of a storage, counted in numbers.

    ``dtype`` is torch's name of its numbers; ``negated``: they are those of the storage times -1,
    a view that torch makes lazily.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negated: bool = False


class TorchFile:
    """A file of ``torch.save``; ``value`` is what was saved, with a ``TensorRef`` per tensor.

    Containers are plain (an ``OrderedDict`` is a dict); objects of any other class are
    ``Placeholder`` records; ``notes`` says what in the file is suspicious. Use it as a context
    manager. Raises ``CheckpointError``, a ``ValueError``, for truncated and foreign files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = str(path)
        words = _Torch()
        self._archive = open_archive(path, words)
        self._budget = 2 * os.path.getsize(path)
        self._cached: tuple[str, bytes] = ("", b"")
        self.value: Any = self._archive.value
        self.notes = [
            f"loading the file with torch would call {name}; here nothing in it was run, but beware"
            for name in sorted(words.alarming)
        ]

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._archive.close()

    def read(self, ref: Any, name: str) -> NDArray[np.float32]:
        """The numbers of a ``TensorRef`` as a new float32 array; ``name`` is for errors.

        Half, bfloat16, float and double tensors can be read. NaN and Inf are refused, and whatever
        is no tensor.
        """
        array = self._read(ref, name)
        check_finite({name: array}, self.file)
        return array

    def read_mask(self, ref: Any, name: str) -> NDArray[np.float32]:
        """Like ``read`` for an additive attention mask, which holds -inf."""
        return self._read(ref, name)

    def _read(self, ref: Any, name: str) -> NDArray[np.float32]:
        def refuse(expected: str, got: object) -> CheckpointError:
            return CheckpointError(
                f"{self.file}: {name}: expected {expected}, got {got}; the file is damaged or of "
                "a kind that tsad does not read"
            )

        if not isinstance(ref, TensorRef):
            raise refuse("a tensor", describe(ref))
        if ref.dtype not in _FLOATS:
            raise refuse(f"one of {', '.join(_FLOATS)}", ref.dtype)
        code, item = _FLOATS[ref.dtype]
        count, length = math.prod(ref.shape), ref.storage.count * ref.storage.item
        if count == 0:
            return np.zeros(ref.shape, np.float32)
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
        if last >= length // item or count > length // item:
            got = f"offset {ref.offset}, shape {list(ref.shape)}, strides {list(ref.stride)}"
            raise refuse(f"a view inside a storage of {length // item} numbers", got)
        self._budget -= count * item
        if self._budget < 0:
            raise refuse("tensors that the file can hold", "more data than it has")
        content = self._storage(ref.storage.key)
        if len(content) != length:
            raise refuse(f"{length} bytes of storage", len(content))
        raw = np.frombuffer(content, f"<u{item}", count=length // item)[ref.offset :]
        strides = tuple(item * s for s in ref.stride)
        view = np.ascontiguousarray(np.lib.stride_tricks.as_strided(raw, ref.shape, strides))
        if self._archive.big_endian:
            view = view.byteswap()
        array = to_float32(view.tobytes(), code).reshape(ref.shape)
        return -array if ref.negated else array

    def _storage(self, key: str) -> bytes:
        if self._cached[0] != key:
            self._cached = (key, self._archive.storage(key))
        return self._cached[1]


def describe(value: Any) -> str:
    """What an object in a file is, for errors."""
    if isinstance(value, Placeholder):
        name = str(value.cls)
        return _OTHER_TENSORS.get(name, f"an object that {name:.200} makes")
    if isinstance(value, TensorRef):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, dict):
        names = ", ".join(repr(str(key)[:40]) for key in list(value)[:8])
        return f"a dict of {names or 'nothing'}"
    return f"a {type(value).__name__}"


class _Torch:
    """The names of torch and NumPy that describe tensors, containers and numbers."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.alarming: set[str] = set()
        self._functions: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor_v2,
            "torch._utils._rebuild_tensor_v3": _tensor_v3,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
            "torch._tensor._rebuild_from_type": self._of_type,
            "torch._tensor._rebuild_from_type_v2": self._of_type,
            "torch.Size": _sizes,
            "collections.OrderedDict": lambda: {},
            "collections.defaultdict": lambda factory=None: {},
            "numpy._core.multiarray.scalar": _scalar,
            "_codecs.encode": _encode,
        }

    def call(self, ref: Global, args: tuple[Any, ...]) -> Any:
        ref = Global(_MOVED.get(ref.module, ref.module), ref.name)
        function = self._functions.get(str(ref))
        if function is not None and len(args) < 10:
            try:
                return function(*args)
            except (TypeError, ValueError):  # what it cannot be may lie beside what is needed
                return Placeholder(ref, args)
        builtin = ref.module == "builtins"
        name = ref.name if builtin else ref.module.partition(".")[0]
        alarming = name in (_ALARMING_BUILTINS if builtin else _ALARMING_MODULES)
        if alarming and len(self.alarming) < 10:
            self.alarming.add(f"{str(ref):.200}")
        return Placeholder(ref, args)

    def persistent(self, pid: Any) -> Any:
        match pid:
            case ("storage", Global() as kind, str(key), _, count, *views) if _is_count(count):
                dtype, item = _STORAGES.get(kind.name, (f"{kind.name:.100}", 0))
                storage = Storage(dtype, key, count, item)
                if key not in self.storages:
                    self.storages[key] = storage
                if views in ([], [None]):  # torch stopped writing views of storages at 0.4
                    return storage
            case ("module", Global() as kind, *_):  # a class with its source, before torch 1.6
                return kind
        return Placeholder(Global("pickle", "persistent_load"), (pid,))

    def _of_type(self, function: Any, kind: Any, args: Any, state: Any) -> Any:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise TypeError("a tensor that no function makes")
        return self.call(function, args)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _sizes(value: Any = ()) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMS:
        raise TypeError("sizes that are no short list")
    if not all(_is_count(n) for n in value):
        raise TypeError("sizes that are no counts")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> TensorRef:
    sizes, strides = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or not _is_count(offset) or len(sizes) != len(strides):
        raise TypeError("a tensor that is no view of a storage")
    return TensorRef(storage, storage.dtype, offset, sizes, strides)


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, lazy: Any = None
) -> TensorRef:
    ref = _tensor(storage, offset, shape, stride)
    if not lazy:
        return ref
    if not isinstance(lazy, dict) or len(lazy) > 2 or not set(lazy) <= {"neg", "conj"}:
        raise ValueError("a view of an unknown kind")
    return replace(ref, negated=bool(lazy.get("neg")))  # a conjugate is complex, so not read


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    grad: Any,
    hooks: Any,
    dtype: Any,
    lazy: Any = None,
) -> TensorRef:
    if not isinstance(dtype, Global):
        raise TypeError("a tensor of no known type")
    ref = _tensor_v2(storage, offset, shape, stride, grad, hooks, lazy)
    return replace(ref, dtype=f"{dtype.name:.100}")


def _scalar(dtype: Any, content: Any) -> int | float | bool:
    """A NumPy scalar, such as a size that was computed."""
    match dtype:
        case Placeholder(args=(str(kind), *_), state=(_, str(order), *_)) if kind in _SCALARS:
            name = (">" if order == ">" else "<") + kind
            value: int | float | bool = np.frombuffer(content, name, count=1)[0].item()
            return value
    raise TypeError("a scalar that is no number")


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes; only scalars are read, so long ones are left alone."""
    if not isinstance(text, str) or encoding != "latin1" or len(text) > 16:
        raise ValueError("no bytes of a scalar")
    return text.encode(encoding)
