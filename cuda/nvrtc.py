"""Compiles the kernels with NVRTC, the compiler of a CUDA whose nvcc is not at hand: the same front
end, optimiser and ptxas, of the GPU's code alone.

  pip install --no-deps --target FOLDER nvidia-cuda-nvrtc-cu12==12.4.127 \\
      nvidia-cuda-runtime-cu12==12.4.127
  python cuda/nvrtc.py FOLDER [ARCHITECTURE ...]
"""

from __future__ import annotations

import argparse
import ctypes
import re
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
CSRC = SOURCES.parent / "csrc"
KNOWN = (80, 86, 87, 89, 90)
NET = (CSRC / "net/net.h").read_text()
HEADERS = {
    # of the host: it has none of them, and kernels need a few names
    "atomic": "namespace std { template <typename T> struct atomic { T v; void operator++(int); };"
    "}",
    "float.h": "#define FLT_MAX 3.402823466e+38F",
    "math.h": "#define NAN __int_as_float(0x7fffffff)\n#define INFINITY __int_as_float(0x7f800000)",
    "stdint.h": "typedef signed char int8_t; typedef short int16_t; typedef int int32_t;"
    "typedef long long int64_t; typedef unsigned char uint8_t; typedef unsigned short uint16_t;"
    "typedef unsigned uint32_t; typedef unsigned long long uint64_t;"
    "typedef unsigned long uintptr_t;",
    **dict.fromkeys(("string.h", "stddef.h", "stdbool.h", "stdlib.h", "new"), ""),
    "cuda_runtime.h": "#define cudaLaunchKernel(...) cudaSuccess",
    # C that g++ takes in C++, and this does not
    "net/net.h": NET.replace("return (tsad_tensors){", "return {").replace('"../', '"'),
}


FILES = ("kernels.cu", "list.cu")


def _kernels(file: str) -> str:
    """What nobody can call from outside would be left out. The host's part of a list is no code of
    a GPU, and too much for this compiler."""
    text = (SOURCES / file).read_text().split("/* ---- writing it down")[0]
    named = text.replace("\nnamespace\n{", "\nnamespace kernels\n{")
    return named.replace("} // namespace\n", "}\nusing namespace kernels;\n")


def _list(words: list[str]) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * len(words))(*(word.encode() for word in words))


class Nvrtc:
    """The library of the wheels in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "nvidia"
        found = sorted((self.folder / "cuda_nvrtc/lib").glob("libnvrtc.so.*"))
        if not found:
            raise SystemExit(f"folder: expected NVRTC's wheel in it, got {folder}")
        self.library = ctypes.CDLL(str(found[0]))

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, architecture: int, file: str) -> str:
        """What ptxas says of a file's kernels."""
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        names, texts = _list(list(HEADERS)), _list(list(HEADERS.values()))
        text = _kernels(file).encode()
        create = self.library.nvrtcCreateProgram
        if create(ctypes.byref(program), text, file.encode(), len(HEADERS), texts, names):
            raise SystemExit("nvrtc: no program")
        options = [f"--gpu-architecture=sm_{architecture}", "-std=c++17", "-default-device"]
        options += [f"-I{SOURCES}", f"-I{CSRC}", f"-I{self.folder / 'cuda_runtime/include'}"]
        options += ["-Xptxas=-v"]
        failed = self.library.nvrtcCompileProgram(program, len(options), _list(options))
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        self.library.nvrtcDestroyProgram(ctypes.byref(program))
        if failed:
            raise SystemExit(f"{file}, sm_{architecture}: {log.value.decode()}")
        return log.value.decode()


def main() -> int:
    """Prints a line for each architecture; how many kernels spill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where pip has put the two wheels")
    parser.add_argument("architectures", type=int, nargs="*", default=KNOWN, metavar="80")
    args = parser.parse_args()
    compiler, spilt = Nvrtc(args.folder), 0
    for number in args.architectures:
        log = "".join(compiler.compile(number, file) for file in FILES)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
        spills = sum(frame != ("0", "0") for frame in frames)
        print(f"NVRTC {compiler.version()}, sm_{number}: {len(frames)} kernels, {spills} spill")
        spilt += spills
    return spilt


if __name__ == "__main__":
    raise SystemExit(main())
