"""What each part of the published pipeline is worth, measured in our engine on a CPU.

    python bench/ladder.py                    about a minute; writes results/DATE-CPU-ladder.json
    python bench/ladder.py --rounds 1 --chunks 3

Every rung denoises the same 95 % plan of the standard transformer (random weights, which cost what
trained ones do), with the engine's exact rewrites in the decoder. The rungs differ in what happens
outside the decoder, and when:

- in the loop: at every step the memory (observations and time embedded, encoded, projected to keys
  and values and folded, for every layer), then the pruner on it, whole;
- encoder once: the memory of all steps in one batch before the loop, the pruner at every step;
- all steps at once: the pruner in one batch too, as the published code ends up;
- hoisted, one thread: time tokens are tables, observation tokens are encoded once, the pruner's
  constants are made at load;
- hoisted, shared: what the engine does, threads take the pruner's steps in turn;
- hoisted, beside step 0: one core begins to prune while the other computes step 0, which no plan
  decides, and then helps (two threads only).

Plain memory and pruner run on one thread, on the engine's kernels, and are checked against its
tables and scores before anything is timed; so are all actions. The pruners: the published layout,
in the published size and in a smaller one, and an MLP (three memory tokens in a row, 768 - 128 -
96, for all blocks of a step at once). Noise is given, not drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import instructions  # noqa: E402
import measure  # noqa: E402
import tasks  # noqa: E402, F401  (finds the tree's own tsad)
from plans import sparse95  # noqa: E402

import tsad  # noqa: E402
from tsad.files import write_atomically  # noqa: E402

STAGES = ("encode", "prune", "plan", "denoise", "total")


def run(threads: int, rounds: int, chunks: int) -> list[dict[str, Any]]:
    """Medians of each pruner, rung and round, in milliseconds.

    Raises:
        instructions.CountError: ladder.c did not build, or a check in it failed.
    """
    with tempfile.TemporaryDirectory(prefix="tsad-ladder-") as name:
        program = instructions.build(Path(name), source="ladder.c")
        plan = Path(name) / "plan"
        plan.write_bytes(sparse95().sources.tobytes())
        command = [str(program), str(plan), str(threads), str(rounds), str(chunks)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise instructions.CountError(f"ladder: {result.stdout[-500:]}{result.stderr}")
    return [json.loads(line) for line in result.stdout.splitlines()]


def summarise(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each pruner and rung: the round with the lowest total, and the spread.

    `outside` is the total less the denoising. Where the pruner runs beside step 0 the two cannot be
    told apart, so there it is the total less the denoising of the rung before.
    """
    rungs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        rungs.setdefault((line["pruner"], line["rung"]), []).append(line)
    entries = []
    for (pruner, rung), rounds in rungs.items():
        best = min(rounds, key=lambda line: line["total"])
        entry = {"pruner": pruner, "rung": rung, **{stage: best[stage] for stage in STAGES}}
        if rung.endswith("step 0"):
            entry["denoise"] = entries[-1]["denoise"]
        totals = [line["total"] for line in rounds]
        entry |= {
            "outside": entry["total"] - entry["denoise"],
            "p50": float(np.median(totals)),
            "spread": [min(totals), max(totals)],
        }
        entries.append(entry)
    return entries


def table(entries: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    rows = [
        "| pruner | rung | memory | pruner | outside the decoder | decoder | whole chunk | Hz |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for e in entries:
        numbers = [e["encode"], e["prune"], e["outside"], e["denoise"], e["total"]]
        cells = " | ".join(f"{value:.2f}" for value in numbers)
        rows.append(f"| {e['pruner']} | {e['rung']} | {cells} | {1e3 / e['total']:.0f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=10, help="of each rung in each round")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if not (1 <= args.threads <= 64 and args.rounds >= 1 and 1 <= args.chunks <= 1000):
        parser.error("--threads: 1 to 64, --rounds: at least 1, --chunks: 1 to 1000")
    machine, date = measure.machine(), time.strftime("%Y-%m-%d", time.gmtime())
    try:
        lines = run(args.threads, args.rounds, args.chunks)
    except instructions.CountError as error:
        print(error, file=sys.stderr)
        return 2
    entries = summarise(lines)
    document = {
        "format": "tsad-ladder", "format_version": 1, "date": date, "tsad": tsad.__version__,
        "machine": machine, "backend": os.environ.get("TSAD_CPU") or "auto",
        "threads": args.threads, "rounds": args.rounds, "chunks": args.chunks,
        "load_average": os.getloadavg()[0], "rungs": entries,
        "rounds_ms": lines,
    }  # fmt: skip
    out = args.out or HERE / "results" / f"{date}-{measure.slug(machine)}-ladder.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    print(f"{table(entries)}\n\nmilliseconds, medians of the best of {args.rounds} rounds; {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
