"""Files of ``torch.save``, read without torch and without running anything in them.

Such a file is a zip archive of uncompressed entries: ``<root>/data.pkl`` is a pickle in which
every tensor is a view (offset, shape, strides) of a storage, ``<root>/data/<key>`` are the raw
numbers. The pickle is read by ``pickle_machine``; tensors become ``TensorRef`` records, whose
numbers are read only when asked for. Sizes are believed only as far as the file bears them out.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad.checkpoint import CheckpointError, check_finite, to_float32
from tsad.convert.pickle_machine import Global, Placeholder, read_pickle

_MAX_PICKLE = 64 << 20
_MAX_DIMS = 8
# the pickled number with which torch's format before 1.6 begins, at protocol 2
_OLD_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")

# storage class -> (dtype code of tsad.checkpoint, bytes per number)
_FLOATS = {
    "HalfStorage": ("F16", 2),
    "BFloat16Storage": ("BF16", 2),
    "FloatStorage": ("F32", 4),
    "DoubleStorage": ("F64", 8),
}

# Classes whose objects become placeholders: data that a training run leaves in its checkpoint.
_DATA_PACKAGES = ("omegaconf", "hydra", "diffusion_policy")
_DATA_CLASSES = frozenset(
    {
        "datetime.date",
        "datetime.datetime",
        "datetime.timedelta",
        "datetime.timezone",
        "numpy.dtype",
        "numpy.core.multiarray._reconstruct",
        "numpy.core.multiarray.scalar",
        "numpy._core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "pathlib.Path",
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "torch.device",
        "torch._utils._rebuild_tensor_v3",
    }
)
# Types that may be mentioned; where Python would call one of the first group, see _Torch.functions.
_BUILTIN_TYPES = frozenset(
    "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple "
    "NoneType".split()
)


@dataclass(frozen=True)
class Storage:
    """The numbers behind tensors: an entry of the archive. ``kind`` is torch's class name."""

    kind: str
    key: str
    count: int


@dataclass(frozen=True)
class TensorRef:
    """A tensor that has not been read: a strided view of a storage, counted in numbers."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile:
    """A file of ``torch.save``; ``value`` is what was saved, with a ``TensorRef`` per tensor.

    Containers are plain (an ``OrderedDict`` is a dict); objects of known data classes are
    ``Placeholder`` records. Use it as a context manager. Raises ``CheckpointError``, a
    ``ValueError``, for truncated and foreign files and for a pickle that asks for anything else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{self.file}: expected a file of torch.save, found no file")
        self._size = os.path.getsize(path)
        self._budget = 2 * self._size
        self._cached: tuple[str, bytes] = ("", b"")
        with open(path, "rb") as stream:
            start = stream.read(64)
        if start.startswith(_OLD_MAGIC):
            raise CheckpointError(
                f"{self.file}: expected the zip format of torch.save, got the format of before "
                "torch 1.6; load it with torch and save it again"
            )
        with self._guard("the archive"):
            self._zip = zipfile.ZipFile(path)
        try:
            self._entries = self._list_entries()
            self._root = self._find_root()
            self._big_endian = self._entry("byteorder", b"little") == b"big"
            content = self._entry("data.pkl", limit=_MAX_PICKLE)
            self.value: Any = read_pickle(content, _Torch(self.file), f"{self.file}: data.pkl")
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._zip.close()

    def read(self, ref: TensorRef, name: str) -> NDArray[np.float32]:
        """The numbers of a tensor as a new float32 array; ``name`` is for errors.

        Half, bfloat16, float and double tensors can be read. NaN and Inf are refused.
        """
        array = self._read(ref, name)
        check_finite({name: array}, self.file)
        return array

    def read_mask(self, ref: TensorRef, name: str) -> NDArray[np.float32]:
        """Like ``read`` for an additive attention mask, which holds -inf."""
        return self._read(ref, name)

    def _read(self, ref: TensorRef, name: str) -> NDArray[np.float32]:
        def refuse(expected: str, got: object) -> CheckpointError:
            return CheckpointError(
                f"{self.file}: {name}: expected {expected}, got {got}; the file is damaged or of "
                "a kind that tsad does not read"
            )

        if ref.storage.kind not in _FLOATS:
            raise refuse(f"one of {', '.join(_FLOATS)}", ref.storage.kind)
        code, item = _FLOATS[ref.storage.kind]
        count = math.prod(ref.shape)
        if count == 0:
            return np.zeros(ref.shape, np.float32)
        last = ref.offset + sum((n - 1) * s for n, s in zip(ref.shape, ref.stride, strict=True))
        if last >= ref.storage.count or count > ref.storage.count:
            got = f"offset {ref.offset}, shape {list(ref.shape)}, strides {list(ref.stride)}"
            raise refuse(f"a view inside a storage of {ref.storage.count} numbers", got)
        self._budget -= count * item
        if self._budget < 0:
            raise refuse("tensors that the file can hold", "more data than it has")
        content = self._storage(ref.storage.key)
        if len(content) != ref.storage.count * item:
            raise refuse(f"{ref.storage.count * item} bytes of storage", len(content))
        if self._big_endian:
            content = np.frombuffer(content, f"<u{item}").byteswap().tobytes()
        numbers = to_float32(content, code)
        strides = tuple(4 * s for s in ref.stride)
        view = np.lib.stride_tricks.as_strided(numbers[ref.offset :], ref.shape, strides)
        return np.array(view, order="C")

    def _storage(self, key: str) -> bytes:
        if self._cached[0] != key:
            self._cached = (key, self._entry(f"data/{key}"))
        return self._cached[1]

    def _list_entries(self) -> dict[str, zipfile.ZipInfo]:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if info.filename in entries:
                raise CheckpointError(f"{self.file}: {info.filename}: expected once, got twice")
            entries[info.filename] = info
        total = sum(info.file_size for info in entries.values())
        if total > self._size:  # compressed, or entries that share their bytes
            raise CheckpointError(
                f"{self.file}: expected entries of at most {self._size} bytes, the size of the "
                f"file, got {total}; torch.save does not write such files"
            )
        return entries

    def _find_root(self) -> str:
        roots = [name[: -len("data.pkl")] for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise CheckpointError(
                f"{self.file}: expected a zip file of torch.save with one data.pkl, got "
                f"{len(roots)}; it is another kind of file"
            )
        if f"{roots[0]}constants.pkl" in self._entries:
            raise CheckpointError(
                f"{self.file}: expected a file of torch.save, got a TorchScript program; save the "
                "state dict instead"
            )
        return roots[0]

    def _entry(self, name: str, default: bytes | None = None, limit: int | None = None) -> bytes:
        info = self._entries.get(self._root + name)
        if info is None:
            if default is not None:
                return default
            raise CheckpointError(
                f"{self.file}: expected an entry {self._root + name!r}, found none; the file is "
                "damaged"
            )
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if not stored or info.flag_bits & 1:
            raise CheckpointError(
                f"{self.file}: {info.filename}: expected an uncompressed entry, as torch.save "
                "writes it, got a compressed or encrypted one"
            )
        if limit is not None and info.file_size > limit:
            raise CheckpointError(
                f"{self.file}: {info.filename}: expected at most {limit} bytes, got "
                f"{info.file_size}"
            )
        with self._guard(info.filename), self._zip.open(info) as stream:
            content = stream.read()
            if len(content) != info.file_size:
                raise zipfile.BadZipFile(f"{info.file_size} bytes promised, {len(content)} found")
        return content

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """Everything that ``zipfile`` raises for damaged archives, as one error."""
        try:
            yield
        except (
            zipfile.BadZipFile,
            struct.error,
            NotImplementedError,
            EOFError,
            RuntimeError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:
            raise CheckpointError(
                f"{self.file}: expected a zip file of torch.save, got something else: {what} "
                f"cannot be read ({error}); it is truncated, damaged or of another kind"
            ) from None


class _Torch:
    """The names that checkpoints of training runs use."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.functions: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda ref, kind, args, state: self.call(
                ref, args
            ),
            "torch.Size": lambda sizes=(): _sizes(sizes),
            "collections.OrderedDict": lambda pairs=(): _pairs(pairs),
            "collections.defaultdict": lambda factory=None, pairs=(): _pairs(pairs),
            "builtins.dict": lambda pairs=(): _pairs(pairs),
            "builtins.list": lambda values=(): list(_sequence(values)),
            "builtins.tuple": lambda values=(): tuple(_sequence(values)),
            "builtins.set": lambda values=(): frozenset(map(_primitive, _sequence(values))),
            "builtins.frozenset": lambda values=(): frozenset(map(_primitive, _sequence(values))),
            "builtins.bytearray": lambda content=b"", *_: content,
            "_codecs.encode": _encode,
            "copyreg._reconstructor": self._reconstruct,
            "dill._dill._load_type": lambda name: Global("types", str(name)[:100]),
        }

    def name(self, ref: Global) -> Any:
        if ref.module == "__builtin__":  # as protocol 2 and older write it
            ref = Global("builtins", ref.name)
        if ref.module == "copy_reg":
            ref = Global("copyreg", ref.name)
        path = str(ref)
        allowed = (
            path in self.functions
            or self._is_data(ref)
            or (ref.module == "builtins" and ref.name in _BUILTIN_TYPES)
            or ref.module == "typing"
            or (ref.module in ("torch", "torch.storage") and ref.name.endswith("Storage"))
            or (ref.module == "torch" and ref.name in _TORCH_DTYPES)
            or path in ("numpy.ndarray", "torch._tensor.Tensor", "torch.Tensor")
            or path in ("torch.nn.parameter.Parameter", "torch.nn.Parameter")
        )
        if not allowed:
            raise self._refuse(f"the name {path!r:.200}")
        return ref

    def call(self, ref: Any, args: Any) -> Any:
        if not isinstance(ref, Global) or not isinstance(args, tuple):
            raise self._refuse("a call of something that is no name")
        function = self.functions.get(str(ref))
        if function is not None:
            return function(*args)
        if self._is_data(ref):
            return Placeholder(ref, args)
        raise self._refuse(f"a call of {str(ref)!r:.200}")

    def persistent(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise self._refuse("a reference to something outside that is no storage")
        _, kind, key, _, count = pid
        known = isinstance(kind, Global) and kind.name.endswith("Storage")
        if not known or not isinstance(key, str) or not _is_count(count):
            raise self._refuse("a reference to something outside that is no storage")
        return Storage(kind.name, key, count)

    def _reconstruct(self, cls: Any, base: Any, state: Any) -> Placeholder:
        if not isinstance(cls, Global) or not self._is_data(cls):
            raise self._refuse(f"an object of {str(cls)!r:.200}")
        return Placeholder(cls, (), state)

    def _is_data(self, ref: Global) -> bool:
        return ref.module.split(".")[0] in _DATA_PACKAGES or str(ref) in _DATA_CLASSES

    def _refuse(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.file}: refused: the pickle in it contains {what}, which no checkpoint of a "
            "policy needs; expected tensors, plain containers and OmegaConf settings. Nothing of "
            "it was run. If the file is yours, save plain dicts and tensors only"
        )


_TORCH_DTYPES = frozenset(
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 half float double float16 bfloat16 "
    "float32 float64 short int long complex64 complex128 strided".split()
)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _sizes(value: Any) -> tuple[int, ...]:
    value = value if isinstance(value, tuple | list) else (value,)
    if len(value) > _MAX_DIMS or not all(_is_count(n) for n in value):
        raise ValueError("sizes that are no list of counts")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    sizes, strides = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or not _is_count(offset) or len(sizes) != len(strides):
        raise ValueError("a tensor that is no view of a storage")
    return TensorRef(storage, offset, sizes, strides)


def _sequence(value: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError(f"a {type(value).__name__} where a list should be")
    return value


def _primitive(value: Any) -> Any:
    if not isinstance(value, str | bytes | int | float | None):
        raise TypeError(f"a {type(value).__name__} in a set")
    return value


def _pairs(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return dict(value)
    return {_primitive(_sequence(pair)[0]): _sequence(pair)[1] for pair in _sequence(value)}


def _encode(text: Any, encoding: Any = "utf-8", *_: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise TypeError("an encoding other than latin1")
    return text.encode(encoding)
