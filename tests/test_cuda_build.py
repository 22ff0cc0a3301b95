"""The CUDA backend compiled for GPUs, where nvcc is there."""

from __future__ import annotations

import os
import re
import runpy
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


CODE = """
\t\tFunction : _ZN12_GLOBAL__N_114product_kernelIfEEvNS_6TracksI12tsad_productEE
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0010*/                   FFMA R1, R1, R1, R1 ;
        /*0020*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/              @P1  LDS.128 R8, [R3+0x10] ;
        /*0040*/                   FFMA.FTZ R1, R4, R8, R1 ;
        /*0050*/              @!P0 BRA 0x20 ;
        /*0060*/                   LDG.E R1, desc[UR4][R2.64] ;
        /*0070*/               @P0 BRA 0x0 ;
        /*0080*/                   BRA 0x90 ;
\t\tFunction : _ZN12_GLOBAL__N_111tail_kernelENS_6TracksI9tsad_tailEE
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/              @!P0 BRA 0x0 ;
"""


def test_inner_loops_are_read_from_machine_code() -> None:
    """The innermost one of two, and none that reads nothing of the GPU's memory."""
    if not (SOURCES / "loops.py").exists():
        pytest.skip("needs the source tree")
    (found,) = runpy.run_path(str(SOURCES / "loops.py"))["loops"](CODE)
    assert found.kernel == "product_kernel f"
    assert found.counts == {"LDG.64": 1, "LDS.128": 1, "FFMA": 1, "BRA": 1}
