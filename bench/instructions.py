"""How many instructions a chunk takes, against the committed counts: a guard without a clock.

    python bench/instructions.py             compare; exit status 1 if a case takes more
    python bench/instructions.py --update    write what was counted to instructions.json

bench/instructions.c, the core without Python, runs under valgrind's callgrind on the AVX2 path
(valgrind knows no AVX-512), one thread. The count of a case may exceed the committed one by the
margin in the file. Compilers differ by more than that, so counts are only held against those of the
same compiler and machine type; with another one they are printed, and the exit status is 0.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE)]

import tasks  # noqa: E402, F401  (finds the tree's own tsad)
from plans import equal_shares  # noqa: E402

from tsad import COMPUTE, REUSE_STEP  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.reference.dpt import BLOCK_TYPES  # noqa: E402

EXPECTED = HERE / "instructions.json"
MARGIN = 0.03
TYPES = 2 * list(BLOCK_TYPES)  # of the two layers in instructions.c
STEPS, DENSE_STEPS = 50, 4
FLAGS = ["-std=gnu11", "-O3", "-g", "-DNDEBUG", "-ffp-contract=off"]  # setup.py's, and symbols


class CountError(RuntimeError):
    """Nothing could be counted; the message says why."""


def plans() -> dict[str, NDArray[np.uint8]]:
    """The plans of each case in the order of instructions.c, (lanes, K, B)."""
    every_tenth = np.full((STEPS, len(TYPES)), REUSE_STEP, np.uint8)
    every_tenth[::10] = COMPUTE
    lanes = [equal_shares(STEPS, TYPES, 0.05, seed) for seed in range(8)]
    return {
        "dense": np.zeros((1, DENSE_STEPS, len(TYPES)), np.uint8),
        "uniform-90": every_tenth[None],
        "sparse95": np.stack(lanes[:1]),
        "lanes8": np.stack(lanes),
        "pruner": np.zeros((1, STEPS, len(TYPES)), np.uint8),  # not looked at
    }


def compiler() -> str:
    """The C compiler's name and version, and the machine type."""
    command = [os.environ.get("CC", "cc"), "-v"]
    try:
        text = subprocess.run(command, capture_output=True, text=True).stderr
    except OSError as error:
        raise CountError(f"{command[0]}: {error}; set CC to a C compiler") from error
    found = re.search(r"(gcc|clang) version (\d+\.\d+)", text)
    version = " ".join(found.groups()) if found else text.strip().splitlines()[-1]
    return f"{version}, {platform.machine()}"


def build(folder: Path, flags: Sequence[str] = (), source: str = "instructions.c") -> Path:
    """A program of this folder with the core, compiled."""
    program = folder / Path(source).stem
    sources = [HERE / source]
    for part in ("", "net", "plan", "stage", "cpu"):
        sources += sorted((ROOT / "csrc" / part).glob("*.c"))
    command = [os.environ.get("CC", "cc"), *FLAGS, *flags, f"-I{ROOT / 'csrc'}"]
    command += [f"-I{ROOT / 'tests'}", *map(str, sources), "-lm", "-lpthread", "-o", str(program)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CountError(f"{' '.join(command)}\n{result.stderr}")
    return program


def count(flags: Sequence[str] = ()) -> dict[str, int]:
    """Instructions of each case.

    Raises:
        CountError: valgrind is missing, or something did not build or run.
    """
    with tempfile.TemporaryDirectory(prefix="tsad-instructions-") as name:
        folder = Path(name)
        program, file = build(folder, flags), folder / "plans"
        file.write_bytes(b"".join(plan.tobytes() for plan in plans().values()))
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        command += [f"--callgrind-out-file={folder / 'out'}", str(program), str(file)]
        environment = {**os.environ, "TSAD_CPU": "avx2"}
        try:
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
        except FileNotFoundError as error:
            raise CountError("valgrind is not installed; apt-get install valgrind") from error
        if result.returncode:
            raise CountError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
        counts = {}
        for path in glob.glob(f"{folder}/out.*"):
            text = Path(path).read_text()
            case = re.search(r"^desc: Trigger: .*?Request: (\S+)$", text, re.M)
            total = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            if case and total:
                counts[case[1]] = int(total[1])
        if set(counts) != set(plans()):
            raise CountError(f"expected counts of {', '.join(plans())}, got {counts}; does "
                             "valgrind come with its headers?")  # fmt: skip
        return {name: counts[name] for name in plans()}


def compare(counts: Mapping[str, int], expected: Mapping[str, Any]) -> tuple[list[str], bool]:
    """A line for each case, and whether none takes more than the margin allows."""
    lines, good, margin = [], True, float(expected["margin"])
    for name, got in counts.items():
        before = expected["instructions"].get(name)
        if before is None:
            lines.append(f"{name}: {got:,}, a new case; run with --update")
            good = False
            continue
        change = got / before - 1
        verdict = ""
        if change > margin:
            verdict, good = f": more than {margin:.0%} over, look why", False
        elif change < -margin:
            verdict = "; better, run with --update to hold it"
        lines.append(f"{name}: {got:,}, {change:+.2%} of {before:,}{verdict}")
    return lines, good


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the counts to the file")
    parser.add_argument("--flags", default="", help="more compiler flags, e.g. to see it fail")
    args = parser.parse_args(argv)
    try:
        version, counts = compiler(), count(args.flags.split())
    except CountError as error:
        print(error, file=sys.stderr)
        return 2
    if args.update:
        document = {"compiler": version, "margin": MARGIN, "instructions": counts}
        write_json(EXPECTED, document)
        print(f"written to {EXPECTED}")
    expected = json.loads(EXPECTED.read_text())
    lines, good = compare(counts, expected)
    print("\n".join(lines))
    if expected["compiler"] != version:
        print(f"not held against them: counted with {expected['compiler']}, here is {version}")
        return 0
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
