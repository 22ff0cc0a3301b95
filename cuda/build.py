"""Builds the library of the CUDA backend, with nvcc or, for tests, for a GPU emulated on the CPU.

  python cuda/build.py OUT.so [--emulate] [--sources FOLDER] [--sanitize] [--ptxas]

setup.py calls `build` where TSAD_CUDA is 1. The emulated library is never part of an installation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ("kernels.cu", "list.cu", "device.cu", "blas.cu")
STAND_INS = ("emulate.cpp", "cublas.cpp")  # of emulate/
HOST = ("caller.c", "engine.c", "graph.c", "node.c", "pack.c", "plugin.c", "prune.c", "run.c")
CORE = ("arena.c",)  # of csrc/: what the files here call and the core does not lend
ARCHITECTURES = (80, 86, 87, 89, 90, 100)  # and PTX of the newest, for those to come


def nvcc() -> str | None:
    """The compiler, from TSAD_NVCC, PATH or CUDA's usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = os.environ.get("TSAD_NVCC") or shutil.which("nvcc")
    return found or shutil.which("nvcc", path=f"{home}/bin")


def architectures(compiler: str) -> list[int]:
    """Those of `ARCHITECTURES` that this toolkit has (the last one came with CUDA 12.8)."""
    known = _run([compiler, "--list-gpu-code"]).split()
    return [number for number in ARCHITECTURES if f"sm_{number}" in known]


def _nvcc_command(compiler: str) -> list[str]:
    """Everything but the file: code for each architecture, and PTX."""
    numbers = architectures(compiler)
    return [
        *(compiler, "-std=c++17", "-O3", "-c", "-Xcompiler=-fPIC,-fvisibility=hidden"),
        *(f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers),
        f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}",
    ]


def _flags(emulate: bool, sanitize: bool) -> list[str]:
    flags = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", "-D_GNU_SOURCE"]
    flags += ["-ffp-contract=off"]  # what the host rounds is rounded alike in a kernel
    if sanitize:
        flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        return [*flags, "-fno-omit-frame-pointer"]
    return [*flags, "-O2", "-g1"] if emulate else [*flags, "-O3", "-DNDEBUG"]


def commands(
    folder: Path,
    sources: Path,
    *,
    emulate: bool = False,
    sanitize: bool = False,
    ptxas: bool = False,
) -> tuple[list[list[str]], list[str]]:
    """What compiles each file into `folder`, and what links them, but for the result's name."""
    cc, cxx = os.environ.get("CC", "cc").split(), os.environ.get("CXX", "c++").split()
    flags, csrc = _flags(emulate, sanitize), ROOT / "csrc"
    include = [f"-I{sources}", f"-I{csrc}"]
    files = [*(sources / name for name in HOST), *(csrc / name for name in CORE)]
    jobs = [[*cc, "-std=gnu11", *flags, *include, "-c", str(file)] for file in files]
    if emulate:
        # what a kernel leaves unset is not by chance what it needs
        cpp = [*cxx, "-std=c++17", *flags, f"-I{sources / 'emulate'}", *include]
        unset = ["-x", "c++"]
        if "clang" in cxx[0] or _gcc_fills(cxx):
            unset = ["-ftrivial-auto-var-init=pattern", *unset]
        jobs += [[*cpp, *unset, "-c", str(sources / name)] for name in KERNELS]
        jobs += [[*cpp, "-c", str(sources / "emulate" / name)] for name in STAND_INS]
        link = [*cxx, "-shared", "-pthread", *(f for f in flags if f.startswith("-fsanitize"))]
    else:
        compiler = nvcc()
        if compiler is None:
            raise SystemExit(
                "TSAD_CUDA: expected nvcc, found none on PATH or in $CUDA_HOME/bin; install the "
                "CUDA toolkit (12.4 or newer), name the compiler in TSAD_NVCC, or leave the "
                "variable out"
            )
        how = [*_nvcc_command(compiler), *(["-Xptxas=-v"] if ptxas else []), *include]
        jobs += [[*how, str(sources / name)] for name in KERNELS]
        link = [compiler, "-shared", "-cudart=static"]
    for job in jobs:
        job += ["-o", str(folder / (Path(job[-1]).name + ".o"))]
    return jobs, [*link, *(job[-1] for job in jobs)]


def _gcc_fills(cxx: list[str]) -> bool:
    test = [*cxx, "-ftrivial-auto-var-init=pattern", "-x", "c++", "-fsyntax-only", "/dev/null"]
    return subprocess.run(test, capture_output=True).returncode == 0


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(out: Path, sources: Path = ROOT / "cuda", **options: bool) -> str:
    """Compiles and links; what the compilers said."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs, link = commands(Path(folder), sources, **options)
        said = "".join(pool.map(_run, jobs))
        out.parent.mkdir(parents=True, exist_ok=True)
        return said + _run([*link, "-o", str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--sources", type=Path, default=ROOT / "cuda", help="other ones, for tests")
    parser.add_argument("--emulate", action="store_true", help="for the CPU, for tests")
    parser.add_argument("--sanitize", action="store_true", help="with the address sanitizer")
    parser.add_argument("--ptxas", action="store_true", help="print registers and spills")
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("emulate", "sanitize", "ptxas")}
    print(build(args.out, args.sources, **options), end="")


if __name__ == "__main__":
    main()
