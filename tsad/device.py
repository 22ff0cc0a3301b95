"""Where a policy runs: on the CPU, or on a GPU if the CUDA backend's library is there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tsad.scope import scope

CUDA_NAMES = ("cuda", "cuda:0")


class Cuda(NamedTuple):
    """The CUDA backend here: its library, its device's name, and why it is not offered."""

    library: str | None
    name: str
    absent: str | None

    def words(self) -> str:
        """One line of it."""
        return f"not offered: {self.absent}" if self.absent else f"offered: {self.name}"


class Counts(NamedTuple):
    """What all policies of this process have asked of the GPU."""

    launches: int
    """Of kernels, one by one."""
    graphs: int
    """Of graphs."""
    kernels: int
    """Of both."""
    uploads: int
    downloads: int
    uploaded_bytes: int
    downloaded_bytes: int
    waits: int
    device_ns: int
    """The GPU's time within `timed`."""

    def since(self, before: Counts) -> Counts:
        """What came after."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


class _Counts(ctypes.Structure):
    """`tsad_device_counts` of cuda/device.h."""

    _fields_ = [(name, ctypes.c_int64) for name in Counts._fields]


def counts() -> Counts:
    """The counts of now; the backend's library must be here."""
    read = ctypes.CDLL(cuda().library).tsad_plugin_counts
    read.restype = _Counts
    found = read()
    return Counts(*(getattr(found, name) for name in Counts._fields))


def identity() -> str:
    """The GPU, its driver and its runtime, as far as what they compute may depend on them."""
    read = ctypes.CDLL(cuda().library).tsad_plugin_identity
    read.restype = ctypes.c_char_p
    build = ""
    with contextlib.suppress(OSError):  # which CUDA's runtime does not say
        build = Path("/proc/driver/nvidia/version").read_text()
    return f"{read().decode(errors='replace')} {build}".strip()


@contextlib.contextmanager
def timed() -> Iterator[None]:
    """Within, chunks measure the GPU's time, which costs two events a chunk."""
    switch = ctypes.CDLL(cuda().library).tsad_plugin_time
    switch(1)
    try:
        yield
    finally:
        switch(0)


def cuda() -> Cuda:
    """What of CUDA is here. ``TSAD_CUDA_LIBRARY`` names another library than the build's own."""
    named = os.environ.get("TSAD_CUDA_LIBRARY", "")
    library = Path(named) if named else Path(__file__).parent / "_cuda.so"
    if not named and not library.exists():
        return Cuda(None, "", "this build has none; build with TSAD_CUDA=1 (docs/gpu.md)")
    return _load(str(library))


@functools.cache
def _load(library: str) -> Cuda:
    from tsad import _core

    try:
        return Cuda(library, *_core._load_backend(library))
    except ImportError as error:
        return Cuda(library, "", str(error))


def check_device(device: Any) -> str:
    """``"cpu"`` or ``"cuda"``; ``ValueError`` says why it is neither, or is not offered here."""
    name = str(device)  # a torch.device too
    if name == "cpu":
        return name
    absent = cuda().absent if name in CUDA_NAMES else None
    if name in CUDA_NAMES and absent is None:
        return "cuda"
    why = f", which is not offered: {absent}" if absent else ""
    raise ValueError(
        f'device: expected "cpu", got {name!r}{why}; leave the argument out ({scope("devices")})'
    )
