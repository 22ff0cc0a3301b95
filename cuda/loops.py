"""What the kernels' inner loops do per turn, read from their machine code: how much of the GPU's
memory a thread asks for before it waits, and how much it computes with that.

  pip install --target FOLDER nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
  python cuda/loops.py FOLDER [--architecture 90] [--sources cuda]

A loop that reads one number and computes with it waits for memory each turn, some 270 cycles; one
that reads many waits once for all of them. What the hardware makes of it nobody has measured.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).resolve().parent
CSRC = SOURCES.parent / "csrc"
FILES = ("kernels.cu", "list.cu")


class Loop(NamedTuple):
    """An innermost loop of a kernel."""

    kernel: str
    counts: Counter[str]


def disassemble(folder: Path, sources: Path, file: str, architecture: int) -> str:
    """nvcc's code for one architecture, as cuobjdump of the wheels in ``folder`` prints it."""
    compiler = runpy.run_path(str(SOURCES / "build.py"))["nvcc"]()
    if compiler is None:
        raise SystemExit("expected nvcc, found none on PATH or in $CUDA_HOME/bin")
    found = next(folder.rglob("bin/cuobjdump"), None)
    if found is None:
        raise SystemExit(f"folder: expected the wheel nvidia-cuda-cuobjdump in it, got {folder}")
    tools = {path.parent for path in (found, *folder.rglob("bin/nvdisasm"))}
    for tool in tools:
        for program in tool.iterdir():
            program.chmod(0o755)
    path = os.pathsep.join([*map(str, tools), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "code.cubin"
        command = [compiler, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}"]
        command += [f"-I{sources}", f"-I{CSRC}", str(sources / file), "-o", str(out)]
        subprocess.run(command, check=True)
        environment = {**os.environ, "PATH": path}
        shown = [str(found), "-sass", str(out)]
        return subprocess.run(
            shown, check=True, capture_output=True, text=True, env=environment
        ).stdout


def loops(code: str) -> list[Loop]:
    """Of each kernel, those that have no other in them and read the GPU's memory."""
    found = []
    for part in re.split(r"\n\s+Function : ", code)[1:]:
        name = part.split(maxsplit=1)[0]
        kernel = re.search(r"\d([a-z_]+_kernel)(?:I(?:NS_)?\d*([A-Z]\w*?|f)E)?", name)
        kind = "" if kernel is None or not kernel[2] else f" {kernel[2]}"
        lines = [
            (int(at, 16), operation.split())
            for at, operation in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", part)
        ]
        jumps = [
            (int(words[-1], 16), at)
            for at, words in lines
            if any(word.startswith("BRA") for word in words[:2])
            and words[-1].startswith("0x")
            and int(words[-1], 16) < at
        ]
        for begin, end in jumps:
            if any(begin <= b and e < end for b, e in jumps if (b, e) != (begin, end)):
                continue
            operations = [
                next(word for word in words if not word.startswith("@"))
                for at, words in lines
                if begin <= at <= end
            ]
            counts = Counter(
                re.sub(r"^(LDG|LDS|FFMA|FMUL|FADD).*?(\.64|\.128)?$", r"\1\2", operation)
                for operation in operations
            )
            if any(operation.startswith("LDG") for operation in counts):
                shown = kernel[1] if kernel else name
                found.append(Loop(f"{shown}{kind}", counts))
    return found


def main() -> None:
    """Prints a line for each loop."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where pip has put the two wheels")
    parser.add_argument("--architecture", type=int, default=90, help="80, 86 ... (default: 90)")
    parser.add_argument("--sources", type=Path, default=SOURCES, help="other ones, to compare with")
    args = parser.parse_args()
    shown = ("LDG", "LDG.64", "LDG.128", "LDS", "LDS.64", "LDS.128", "FFMA")
    print(f"{'kernel':28}" + "".join(f"{name:>9}" for name in shown))
    for file in FILES:
        if (args.sources / file).exists():
            code = disassemble(args.folder, args.sources, file, args.architecture)
            for loop in loops(code):
                counts = "".join(f"{loop.counts[name] or '':>9}" for name in shown)
                print(f"{loop.kernel:28}{counts}")


if __name__ == "__main__":
    main()
