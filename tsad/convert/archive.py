"""The two containers of ``torch.save``: where its pickle and the numbers of its storages lie.

Since torch 1.6 a file is a zip archive of uncompressed entries: ``<root>/data.pkl`` is the pickle,
``<root>/data/<key>`` are the numbers of a storage. Before, and still with
``_use_new_zipfile_serialization=False``, it is a stream: three pickles that say what it is, the
pickle, one of the storages' keys, then every storage's length and numbers. Sizes are believed only
as far as the file bears them out.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tsad.arrays import entries
from tsad.checkpoint import CheckpointError, refuse_pointer
from tsad.convert.pickle_machine import Vocabulary, read_pickle

_ZIP = b"PK\x03\x04"
# what a stream begins with, each a pickle of its own
_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_VERSION = 1001


@dataclass(frozen=True)
class Storage:
    """The numbers behind tensors. ``dtype`` is torch's name of what they are, ``item`` their size
    in bytes, 0 if it is not known."""

    dtype: str
    key: str
    count: int
    item: int


class Words(Vocabulary, Protocol):
    """A vocabulary that keeps the storages which the pickle refers to."""

    storages: dict[str, Storage]


class Archive(Protocol):
    """``value`` is what the pickle describes."""

    value: Any
    big_endian: bool

    def storage(self, key: str) -> bytes:
        """The bytes of a storage."""

    def close(self) -> None:
        """Closes the file."""


class _File(io.BufferedReader):
    """A file whose reads ask for no more than it has: Python makes room for what is asked before
    it looks, and a pickle may say that a string has an exabyte."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path))
        self.size = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1) -> bytes:
        return super().read(size if size is None or size < self.size else -1)


def open_archive(path: str | os.PathLike[str], words: Words) -> Archive:
    """A file of ``torch.save``, its pickle read. ``FileNotFoundError``, ``CheckpointError``."""
    file = str(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{file}: expected a file of torch.save, found no file")
    stream = _File(path)
    try:
        start = stream.read(8)
        refuse_pointer(start, file)
        kind = ZipArchive if start[:4] == _ZIP else StreamArchive
        stream.seek(0)
        return kind(stream, words, file)
    except BaseException:
        stream.close()
        raise


class ZipArchive:
    """The zip format."""

    def __init__(self, stream: _File, words: Words, file: str) -> None:
        self.file = file
        self._stream = stream
        with self._guard("the archive"):
            self._zip = zipfile.ZipFile(stream)
            self._entries = entries(self._zip, stream.size)
        self._root = self._find_root()
        order = self._entry("byteorder", b"little")
        if order not in (b"little", b"big"):
            raise CheckpointError(
                f"{file}: {self._root}byteorder: expected little or big, got {order[:20]!r}; the "
                "file is damaged"
            )
        self.big_endian = order == b"big"
        content = io.BytesIO(self._entry("data.pkl"))
        self.value: Any = read_pickle(content, words, f"{file}: data.pkl")

    def close(self) -> None:
        self._zip.close()
        self._stream.close()

    def storage(self, key: str) -> bytes:
        return self._entry(f"data/{key}")

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

    def _entry(self, name: str, default: bytes | None = None) -> bytes:
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
        if info.CRC == 0:  # torch.serialization.set_crc32_options(False) leaves it out
            info.CRC = None  # type: ignore[assignment]
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


class StreamArchive:
    """The format before torch 1.6; its numbers are little-endian on every machine."""

    big_endian = False

    def __init__(self, stream: _File, words: Words, file: str) -> None:
        self.file = file
        self._stream = stream
        self._places: dict[str, tuple[int, int]] = {}
        if self._header(stream, words) != _MAGIC:
            raise CheckpointError(
                f"{file}: expected a file of torch.save, got something else; it is truncated, "
                "damaged or of another kind"
            )
        version = read_pickle(stream, words, file)
        if version != _STREAM_VERSION:
            raise CheckpointError(
                f"{file}: expected version {_STREAM_VERSION} of torch's format before 1.6, got "
                "another; load it with torch and save it again"
            )
        read_pickle(stream, words, file)  # sizes of C types on the machine that saved
        self.value: Any = read_pickle(stream, words, file)
        self._find_storages(read_pickle(stream, words, file), words.storages)

    def close(self) -> None:
        self._stream.close()

    def storage(self, key: str) -> bytes:
        if key not in self._places:
            raise CheckpointError(
                f"{self.file}: expected a storage {key!r:.100}, found none; the file is damaged"
            )
        start, length = self._places[key]
        self._stream.seek(start)
        content = self._stream.read(length)
        if len(content) != length:
            raise CheckpointError(f"{self.file}: the file became shorter while it was read")
        return content

    def _header(self, stream: _File, words: Words) -> Any:
        try:
            return read_pickle(stream, words, self.file)
        except CheckpointError:
            return None

    def _find_storages(self, keys: Any, storages: Mapping[str, Storage]) -> None:
        def refuse(what: str) -> CheckpointError:
            return CheckpointError(f"{self.file}: {what}; the file is truncated or damaged")

        known = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
        if not known or len(set(keys)) != len(keys) or not set(keys) <= set(storages):
            raise refuse("expected the keys of the storages, got another list")
        for key in keys:
            storage = storages[key]
            if not storage.item:
                raise CheckpointError(
                    f"{self.file}: expected storages of a known type, got {storage.dtype:.100}; "
                    "save it again without _use_new_zipfile_serialization=False"
                )
            start, length = self._stream.tell() + 8, storage.count * storage.item
            count = self._stream.read(8)
            if len(count) != 8 or int.from_bytes(count, "little", signed=True) != storage.count:
                raise refuse(f"storage {key!r:.100}: expected {storage.count} numbers, got another")
            if start + length > self._stream.size:
                raise refuse(f"storage {key!r:.100}: expected {length} bytes, got fewer")
            self._stream.seek(start + length)
            self._places[key] = (start, length)
