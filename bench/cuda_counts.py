"""Counts what the CUDA backend asks of a GPU for a chunk: launches, copies, bytes. No clock.

  python bench/cuda_counts.py [--library FILE]

The library is the emulated one, built for this, or one of nvcc where there is a GPU. Counts depend
on a network's blocks, not on its width, so the network is the bundled policy's, 16 channels wide:
8 layers, 24 blocks, DDPM of 100 steps; random weights.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100


def plans() -> dict[str, Any]:
    """(K, B) of a dense chunk, of 95 % sparsity, and of row 0 alone."""
    row_0 = np.full((STEPS, 24), 2, np.uint8)  # reuse_step
    row_0[0] = 0
    sparse = np.load(ROOT / "bench" / "plans" / "sparse95.npz")["sources"]
    return {"dense": np.zeros_like(row_0), "sparse95.npz": sparse, "row 0 alone": row_0}


def count(library: str) -> dict[str, dict[str, int]]:
    """The counts of the second chunk of each plan."""
    sys.path.insert(0, str(ROOT / "tests"))
    import cases
    import engine

    from tsad import device

    os.environ["TSAD_CUDA_LIBRARY"] = library
    absent = device.cuda().absent
    if absent is not None:
        raise SystemExit(f"--library: {library}: {absent}")
    cases.NETWORKS["narrow"] = cases.NETWORKS["pusht"] | {"n_emb": 16}
    found = {}
    for name, plan in plans().items():
        policy = engine.make(
            "narrow", backend="cuda", prediction_type="sample", clip_sample_range=2.0
        )
        policy._set_plan(0, plan, np.zeros_like(plan))
        for seed in range(2):
            before = device.counts()
            obs, noise = cases.random_inputs(cases.config("narrow"), seed)
            policy(obs, noise=noise)
        found[name] = device.counts().since(before)._asdict()
    return found


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
        found = count(library)
    names = [name for name in next(iter(found.values())) if name != "device_ns"]
    print("| a chunk | " + " | ".join(names) + " |")
    print("| --- |" + " --- |" * len(names))
    for name, counts in found.items():
        print(f"| {name} | " + " | ".join(str(counts[key]) for key in names) + " |")


if __name__ == "__main__":
    main()
