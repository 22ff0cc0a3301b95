"""The CUDA backend on a GPU that is emulated on the CPU (cuda/emulate/), for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "cuda"
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")


def builder() -> dict[str, Any]:
    """The names of cuda/build.py."""
    if not SOURCES.exists():
        pytest.skip("needs the source tree")
    return runpy.run_path(str(SOURCES / "build.py"))


def need_compiler() -> None:
    """Skips where there is no C++ compiler."""
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("needs a C++ compiler")


@contextlib.contextmanager
def queue(library: str, most: int) -> Iterator[None]:
    """So many pieces of work of a stream wait at most (0: all), and a launch blocks."""
    say = ctypes.CDLL(library).tsad_emulate_queue
    say.restype, say.argtypes = ctypes.c_long, [ctypes.c_long]
    before = say(most)
    try:
        yield
    finally:
        say(before)


def pending(library: str) -> int:
    """Of all streams, what is asked for and not done."""
    count = ctypes.CDLL(library).tsad_emulate_pending
    count.restype = ctypes.c_size_t
    return int(count())


def build_emulated(out: Path) -> str:
    """Builds the library."""
    need_compiler()
    builder()["build"](out, emulate=True, sanitize=SANITIZED)
    return str(out)
