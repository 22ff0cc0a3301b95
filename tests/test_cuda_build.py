"""The CUDA backend compiled for GPUs, where nvcc is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from cuda_library import SOURCES, builder

from tsad import _core

SHARED_BYTES = 48 * 1024  # of a block, without asking


def text_of(*names: str) -> str:
    return "".join((SOURCES / name).read_text() for name in names)


@pytest.mark.slow
def test_nothing_spills_and_the_library_loads(tmp_path: Path) -> None:
    script = builder()
    compiler = script["nvcc"]()
    if compiler is None:
        pytest.skip("needs nvcc")
    said = script["build"](tmp_path / "cuda.so", ptxas=True)
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+ bytes stack frame[^\n]*)\n"
        r"[^\n]*Used \d+ registers([^\n]*)",
        said,
        re.S,
    )
    kernels = set(re.findall(r"\w+_kernel(?=\()", text_of("kernels.cu", "list.cu")))
    numbers = script["architectures"](compiler)
    # of products there is one for each kind of weights
    expected = Counter(
        {(name, str(n)): 3 if name == "product_kernel" else 1 for name in kernels for n in numbers}
    )
    seen: Counter[tuple[str, str]] = Counter()
    for mangled, number, spills, used in found:
        name = next(name for name in kernels if re.search(f"{len(name)}{name}[EI]", mangled))
        seen[name, number] += 1
        assert re.findall(r"\d+", spills) == ["0", "0", "0"], f"{name}, sm_{number}: {spills}"
        shared = re.search(r"(\d+) bytes smem", used)
        assert shared is None or int(shared[1]) <= SHARED_BYTES
    assert seen == expected
    _core._load_backend(str(tmp_path / "cuda.so"))  # whether there is a GPU or not
    needs = subprocess.run(["ldd", str(tmp_path / "cuda.so")], capture_output=True, text=True)
    assert needs.returncode == 0 and "cuda" not in needs.stdout.replace(str(tmp_path), "")


@pytest.mark.slow
def test_an_older_compiler_takes_the_kernels() -> None:
    """TSAD_NVRTC: a folder with CUDA 12's wheels (cuda/nvrtc.py says which)."""
    folder = os.environ.get("TSAD_NVRTC")
    if folder is None:
        pytest.skip("needs TSAD_NVRTC")
    command = [sys.executable, str(SOURCES / "nvrtc.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = re.findall(r"sm_\d+: (\d+) kernels, 0 spill", done.stdout)
    text = text_of("kernels.cu", "list.cu")
    assert kernels == [str(text.count("__global__") + 2)] * 5  # products of three kinds of weights
