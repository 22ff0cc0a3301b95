"""`python -m tsad.gpu_check`: is the GPU right, and how fast is it?"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tsad.cli import main as command_line
from tsad.commands.common import Formatter, InterruptedRunError, add_overwrite, table
from tsad.commands.parser import Parser
from tsad.evaluation.progress import Progress
from tsad.evaluation.usage import real
from tsad.files import output_file, write_atomically

DESCRIPTION = """\
Checks the CUDA backend on this machine: that it says what the CPU says (conformance), that NVIDIA's
compute-sanitizer finds nothing in a small part of that (sanitizer), how long chunks take
(benchmark), and how long the same network takes in PyTorch and ONNX Runtime (peers). What is not
installed is skipped, and said. All of it takes less than eight minutes; --out is written after
every part, so that Ctrl-C loses the part under way alone."""

EPILOG = """\
examples:
  python -m tsad.gpu_check                                 all of it, printed
  python -m tsad.gpu_check --out h200.json                 and kept
  python -m tsad.gpu_check --skip peers sanitizer          faster
  python -m tsad.gpu_check --only conformance --small      half a minute

exit codes: 0 all agrees, 1 something does not, or there is no GPU, 2 wrong use, 130 interrupted"""

PARTS = ("conformance", "sanitizer", "benchmark", "peers")
# of the environment: they change what is checked
SETTINGS = ("TSAD_CUDA_GRAPHS", "TSAD_CUDA_BLAS", "TSAD_CUDA_ONE_KERNEL")
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZER_FOUND = 86  # its exit status then, and nobody else's


def build_parser() -> Parser:
    """The options."""
    parser = Parser(
        prog="python -m tsad.gpu_check",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("--out", metavar="FILE", help="write what was found there, as JSON")
    add_overwrite(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    which.add_argument("--skip", nargs="+", choices=PARTS, metavar="PART", help="all but these")
    parser.add_argument("--small", action="store_true", help="the quickest checks and cases alone")
    parser.add_argument(
        "--minutes",
        type=real(lambda value: 0 < value <= 1e4, "a number of minutes above 0; e.g. 8"),
        default=8.0,
        metavar="M",
        help="begin nothing new after so long (default: 8)",
    )
    parser.set_defaults(run=run)
    return parser


class Session:
    """What one run of the check is doing, and what it has found."""

    def __init__(self, args: argparse.Namespace, gpu: str) -> None:
        self.args, self.gpu, self.emulated = args, gpu, "emulated" in gpu
        self.small = args.small or self.emulated
        self.end = time.monotonic() + 60 * args.minutes
        self.found: dict[str, Any] = {}

    def document(self) -> dict[str, Any]:
        """All that was found until now."""
        import tsad

        return {
            "tsad": tsad.__version__,
            "gpu": self.gpu,
            "emulated": self.emulated,
            "driver": None if self.emulated else _driver(),
            "system": platform.platform(),
            "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
            "parts": self.found,
        }

    def save(self) -> None:
        """To --out, if there is one."""
        if self.args.out is not None:
            text = json.dumps(self.document(), indent=1) + "\n"
            write_atomically(self.args.out, text.encode())

    def each(self, part: str, items: list[Any], do: Callable[[Any], dict[str, Any]]) -> None:
        """Does the items of a part, as long as there is time."""
        rows: list[dict[str, Any]] = []
        self.found[part] = rows
        with Progress(len(items), part, unit="items") as progress:
            for item in items:
                if time.monotonic() > self.end:
                    name = item if isinstance(item, str) else item.name
                    rows.append({"check": name, "skipped": "no time left (--minutes)"})
                else:
                    rows.append(do(item))
                progress.update()
        self.save()


def _driver() -> str | None:
    """As nvidia-smi says it."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout else None


# ---- the parts


def conformance(session: Session) -> None:
    """Everything of `tsad.gpu_check.conformance`."""
    from tsad.gpu_check.conformance import checks

    items = [check for check in checks() if check.small or not session.small]
    session.each("conformance", items, lambda check: check.facts())


def _sanitize(tool: str) -> dict[str, Any]:
    """One tool over the small checks, in a process of its own."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(SANITIZER_FOUND)]
    command += [sys.executable, "-m", "tsad.gpu_check", "--only", "conformance", "--small"]
    command += ["--minutes", "0.75"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    except subprocess.TimeoutExpired:
        return {"check": tool, "skipped": "took more than 90 seconds"}
    tail = (done.stdout + done.stderr).splitlines()[-20:]
    passed = done.returncode == 0
    return {"check": tool, "passed": passed, **({} if passed else {"problem": "\n".join(tail)})}


def sanitizer(session: Session) -> None:
    """NVIDIA's, where it is there."""
    why = None
    if session.emulated:
        why = "an emulated GPU: it watches itself"
    elif shutil.which("compute-sanitizer") is None:
        why = "compute-sanitizer is not on PATH"
    if why is None:
        session.each("sanitizer", list(SANITIZER_TOOLS), _sanitize)
    else:
        session.found["sanitizer"] = [{"check": "sanitizer", "skipped": why}]
        session.save()


def benchmark(session: Session) -> None:
    """The cases of `tsad.gpu_check.benchmark`."""
    from tsad.gpu_check.benchmark import cases, run

    items = [case for case in cases() if case.small or not session.small]
    session.each(
        "benchmark", items, lambda case: run(case, gpu=session.gpu, emulated=session.emulated)
    )


def peers(session: Session) -> None:
    """The dense loop in other people's hands."""
    from tsad.gpu_check.peers import PEERS, run

    if session.emulated:
        session.found["peers"] = [{"peer": "all", "skipped": "an emulated GPU: no times"}]
        session.save()
    else:
        session.each("peers", list(PEERS), run)


# ---- the report


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)


def report(document: dict[str, Any]) -> str:
    """What was found, for people."""
    lines = [f"{document['gpu']}, tsad {document['tsad']}"]
    if document["emulated"]:
        lines.append("emulated on the CPU: this says nothing of a GPU, and there are no times")
    for name, value in document["settings"].items():
        lines.append(
            f"{name}={value}: what is checked and timed is not what others have without it"
        )
    for part, rows in document["parts"].items():
        cells = [["", "", *(["p50 ms", "p99 ms", "device ms", "of the floor"])]]
        if part in ("conformance", "sanitizer"):
            cells = [["", "", "error", "bound"]]
        for row in rows:
            name = row.get("check") or row.get("case") or row.get("peer")
            said = "" if "passed" not in row else "agrees" if row["passed"] else "DIFFERS"
            if part in ("conformance", "sanitizer"):
                numbers = [row.get("error"), row.get("bound")]
            else:
                wall, device = row.get("wall_ms", {}), row.get("device_ms", {})
                numbers = [wall.get("p50"), wall.get("p99"), device.get("p50")]
                numbers.append(row.get("share_of_floor"))
                if "kernels" in row:
                    said = f"{row['kernels']} kernels in {row['launches'] + row['graphs']} launches"
                if "error" in row:
                    said += f", {row['error']:.1e} from float32"
            cells.append([str(name), row.get("skipped") or said, *map(_cell, numbers)])
        lines += ["", part, table(cells)]
        lines += [f"{row['check']}: {row['problem']}" for row in rows if "problem" in row]
    return "\n".join(lines)


def run(args: argparse.Namespace) -> int:
    """Run the parts."""
    from tsad import device

    if args.out is not None:
        output_file(args.out, overwrite=args.overwrite)
    cuda = device.cuda()
    if cuda.absent is not None:
        raise RuntimeError(f"there is no GPU to check: {cuda.absent}")
    os.environ["TSAD_TRUST"] = "1"  # it is asked here at length, and has to be said
    session = Session(args, cuda.name)
    chosen = [part for part in args.only or PARTS if part not in (args.skip or ())]
    parts = {"conformance": conformance, "sanitizer": sanitizer}
    parts |= {"benchmark": benchmark, "peers": peers}
    try:
        for part in chosen:
            parts[part](session)
    except KeyboardInterrupt:
        session.save()
        print(report(session.document()))
        kept = "" if args.out is None else f"; what was found is in {Path(args.out)}"
        raise InterruptedRunError(f"the rest was not checked{kept}") from None
    print(report(session.document()))
    rows = [row for part in session.found.values() for row in part]
    return 0 if all(row.get("passed", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(command_line(parser=build_parser()))
