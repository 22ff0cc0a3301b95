"""Where a policy runs: on the CPU, or on a GPU if the CUDA backend's library is there."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
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


class Cublas(NamedTuple):
    """NVIDIA's cuBLAS, which products of many rows go to where it is: its library, its version."""

    library: str | None
    version: str
    absent: str | None

    def words(self) -> str:
        """One line of it."""
        if self.absent:
            return f"not used: {self.absent}"
        return f"found: {self.version}, {self.library} (TSAD_CUDA_BLAS says from how many rows on)"


class Counts(NamedTuple):
    """What all policies of this process have asked of the GPU."""

    launches: int
    """Of kernels, one by one."""
    graphs: int
    """Of graphs."""
    kernels: int
    """Of both."""
    listed: int
    """What would be kernels where one does a list of them (``TSAD_CUDA_ONE_KERNEL``)."""
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
    """The GPU, its driver, runtime and cuBLAS, as far as what they compute may depend on them."""
    read = ctypes.CDLL(cuda().library).tsad_plugin_identity
    read.restype = ctypes.c_char_p
    build = ""
    with contextlib.suppress(OSError):  # which CUDA's runtime does not say
        build = Path("/proc/driver/nvidia/version").read_text()
    blas = f"cuBLAS {cublas().version} {os.environ.get('TSAD_CUDA_BLAS', '')}"
    one = f"one kernel {os.environ['TSAD_CUDA_ONE_KERNEL']}" if one_kernel() else ""
    return f"{read().decode(errors='replace')} {build} {blas} {one}".strip()


def one_kernel() -> bool:
    """Whether ``TSAD_CUDA_ONE_KERNEL`` is set: cuBLAS is asked for nothing then."""
    return os.environ.get("TSAD_CUDA_ONE_KERNEL", "") not in ("", "0")


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


def cublas() -> Cublas:
    """What of cuBLAS is here, loaded for the policies that are made from now on.

    ``TSAD_CUBLAS_LIBRARY`` names the library. Otherwise it is the backend's own (an emulated GPU
    has one), that of a wheel (``pip install nvidia-cublas``), one that the process has or the
    system knows, or the toolkit's.
    """
    library = cuda().library
    if library is None:
        return Cublas(None, "", "this build has no CUDA backend")
    return _load_cublas(library, os.environ.get("TSAD_CUBLAS_LIBRARY", ""))


@functools.cache
def _load_cublas(library: str, named: str) -> Cublas:
    try:
        backend = ctypes.CDLL(library)
        load, version = backend.tsad_plugin_blas, backend.tsad_plugin_blas_version
    except (OSError, AttributeError):  # what `cuda` says of it, too
        return Cublas(None, "", f"{library} is no CUDA backend")
    load.restype = version.restype = ctypes.c_char_p
    if named:
        paths = [named]
    elif hasattr(backend, "cublasCreate_v2"):
        paths = [library]
    else:
        paths = _cublas_paths(backend.tsad_plugin_blas_major())
    said = f"none of {', '.join(paths)} is here"
    for path in paths:
        problem: bytes | None = load(os.fsencode(path))
        if problem is None:
            return Cublas(path, version().decode(), None)
        said = problem.decode(errors="replace") if named else said
    return Cublas(None, "", f"{said}; pip install nvidia-cublas, or name it in TSAD_CUBLAS_LIBRARY")


@contextlib.contextmanager
def setting(name: str, value: str) -> Iterator[None]:
    """Policies made within have this setting of the backend, a variable of the environment."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@contextlib.contextmanager
def through_cublas() -> Iterator[bool]:
    """Policies made within have all products there that can go; whether there is one, in use."""
    wanted = os.environ.get("TSAD_CUDA_BLAS") != "0" and not one_kernel()
    used = cublas().absent is None and wanted
    with setting("TSAD_CUDA_BLAS", "1") if used else contextlib.nullcontext():
        yield used


def _cublas_paths(major: int) -> list[str]:
    """Where it may be: that of the runtime here first, and of the one beside it."""
    found, wheels = [], importlib.util.find_spec("nvidia")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    for number in (major, 12 if major == 13 else 13):
        name = f"libcublas.so.{number}"
        for folder in wheels.submodule_search_locations or () if wheels else ():
            inside = [Path(folder) / part / "lib" / name for part in (f"cu{number}", "cublas")]
            found += [str(path) for path in inside if path.exists()]
        found += [name, f"{home}/lib64/{name}"]
    return found


def check_device(device: Any) -> str:
    """``"cpu"`` or ``"cuda"``; ``ValueError`` says why it is neither, or is not offered here."""
    name = str(device)  # a torch.device too
    if name == "cpu":
        return name
    absent = cuda().absent if name in CUDA_NAMES else None
    if name in CUDA_NAMES and absent is None:
        cublas()  # for the policies to be made
        return "cuda"
    why = f", which is not offered: {absent}" if absent else ""
    raise ValueError(
        f'device: expected "cpu", got {name!r}{why}; leave the argument out ({scope("devices")})'
    )
