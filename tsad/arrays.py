"""npz and npy files that are trusted in nothing, and JSON of any origin.

``numpy.load`` raises whatever zip, zlib, the tokenizer and the system raise for a broken file,
makes room for what a header claims, and inflates without end. Here every fault is a ``ValueError``
that says what is wrong and not where: whoever calls names the file and the fix. Errors of the
system, such as ``FileNotFoundError``, stay what they are.
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tsad.files import path_text

_MOST_INFLATED = 1 << 30
_MAGIC = b"\x93NUMPY"


def read_npz(
    path: str | os.PathLike[str], names: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of an npz file by name; those that are not among ``names`` are empty."""
    with open(path_text(path), "rb") as file, _faults():
        size = os.fstat(file.fileno()).st_size
        if not zipfile.is_zipfile(file):
            raise ValueError("it is not an npz file")
        with zipfile.ZipFile(file) as archive:
            arrays = {}
            for entry in entries(archive, size).values():
                name = entry.filename.removesuffix(".npy")
                if names is not None and name not in names:
                    arrays[name] = np.empty(0)
                    continue
                # the first time for what its header claims
                with archive.open(entry) as stream:
                    _check(stream, entry.file_size)
                with archive.open(entry) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def read_npy(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array of an npy file."""
    with open(path_text(path), "rb") as file, _faults():
        _check(file, os.fstat(file.fileno()).st_size)
        file.seek(0)
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def read_any_json(path: str | os.PathLike[str]) -> Any:
    """JSON as Python reads it, NaN included."""
    content = Path(path).read_bytes()
    with _faults():
        return json.loads(content.decode("utf-8"))


def parse_header(array: NDArray[Any]) -> dict[str, Any]:
    """The JSON object that this package's npz files have as their array ``header``."""
    with _faults():
        if array.dtype.kind != "U" or array.ndim:
            raise ValueError("its header is no text")
        # not str(array), which makes strings of code points that there are not
        content = array.astype(array.dtype.newbyteorder("<")).tobytes()
        header = json.loads(content.decode("utf-32-le").rstrip("\0"))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
    return header


def entries(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """What is in an archive of ``size`` bytes, by name, if it can be.

    Refuses a name that is there twice, entries that share their bytes, and those that inflate to
    more than a gigabyte.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    for entry in archive.infolist():
        if entry.filename in found:
            raise ValueError(f"{entry.filename:.200}: expected once, got twice")
        found[entry.filename] = entry
    packed = sum(entry.compress_size for entry in found.values())
    inflated = sum(
        entry.file_size for entry in found.values() if entry.file_size != entry.compress_size
    )
    if packed > size or inflated > _MOST_INFLATED:
        raise ValueError(f"its parts claim {max(packed, inflated)} bytes, more than it can have")
    return found


def _check(stream: IO[bytes], size: int) -> None:
    """The header of an npy file of ``size`` bytes must describe them exactly."""
    version = np.lib.format.read_magic(stream)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read is None:
        raise ValueError(f"an array of version {version}, expected 1 or 2")
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not read")
    counts = all(type(n) is int and n >= 0 for n in shape)
    if (
        not counts
        or math.prod(shape) * dtype.itemsize != size - stream.tell()
        or not dtype.itemsize
    ):
        raise ValueError(
            f"an array of {dtype} and shape {str(shape):.100} that is not as long as that"
        )


@contextmanager
def _faults() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ValueError(f"{str(error)[:300] or type(error).__name__}") from error
