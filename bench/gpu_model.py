"""Counts what the CUDA backend asks of a GPU for a chunk, and predicts its time. No clock, no GPU.

  python bench/gpu_model.py [--library FILE]

The library is the emulated one, built for this. Predictions are of `tsad.gpu_check.model`, which
has its facts and where they are from: none of it was measured.
"""

from __future__ import annotations

import argparse
import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def found() -> list[dict[str, Any]]:
    """The cases of `gpu_check`, and a chunk whose first step alone is computed."""
    import tsad
    from tsad.gpu_check.benchmark import Case, cases, run

    def row_0() -> tsad.SparsePolicy:
        policy = tsad.load("pusht", device="cuda")
        sources = np.full((policy.num_inference_steps, policy.n_blocks), tsad.REUSE_STEP, np.uint8)
        sources[0] = tsad.COMPUTE
        policy.plan = tsad.Plan(sources)
        return policy

    chosen = [case for case in cases() if not case.small]
    chosen.append(Case("row 0 computed, all else reused", row_0))
    return [run(case, gpu="", emulated=True) for case in chosen]


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report() -> str:
    """Counts, then what the model makes of them."""
    from tsad.device import Counts
    from tsad.gpu_check.model import GPUS, Work, floor_ms

    counts, times = [], []
    for case in found():
        asked = Counts(*(case[name] for name in Counts._fields))
        work = Work(case["weights"], case["bytes"], case["multiply_adds"])
        each = asked.launches + asked.graphs
        counts.append([
            case["case"], f"{asked.kernels}", f"{asked.listed}", f"{each}",
            f"{asked.uploads}", f"{asked.downloads}",
            f"{(asked.uploaded_bytes + asked.downloaded_bytes) / 1e3:.0f}", f"{asked.waits}",
            f"{work.bytes / 1e6:.0f}",
        ])  # fmt: skip
        floors = [floor_ms(work, asked, gpu, case["blocks"]) for gpu in GPUS]
        times.append([case["case"], *("-" if ms is None else f"{ms:.2f}" for ms in floors)])
    names = [
        "kernels",
        "in a list",
        "launches",
        "copies in",
        "out",
        "kB copied",
        "waits",
        "MB read",
    ]
    return "\n\n".join([
        table(["a chunk", *names], counts),
        table(["predicted, ms", *(gpu.word for gpu in GPUS)], times),
        *(f"{gpu.word}: {gpu.source}" for gpu in GPUS),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", default=None, help="the backend's library (default: emulated)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = args.library
        if library is None:
            library = str(Path(folder) / "emulated.so")
            build = runpy.run_path(str(ROOT / "cuda" / "build.py"))["build"]
            build(Path(library), emulate=True)
        os.environ |= {"TSAD_CUDA_LIBRARY": library, "TSAD_EMULATE_COUNT": "1", "TSAD_TRUST": "1"}
        print(report())


if __name__ == "__main__":
    main()
