"""The floor: what the chunk's arithmetic and the weights' bytes cost at the machine's peak.

roofline.c is compiled on the fly for the engine's instruction set and run beside the contenders.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad import COMPUTE
from tsad.config import block_costs, block_types

SOURCE = Path(__file__).with_suffix(".c")
# Backends of the engine: vector bytes and compiler flags. "ref" is plain C, which the compiler
# vectorises with what every x86-64 has.
ISA: dict[str, tuple[int, list[str]]] = {
    "avx512": (64, ["-mavx512f", "-mfma"]),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "neon": (16, []),
    "ref": (16, []),
}


# more flags where the processor has them: /proc/cpuinfo's name, the compiler's
EXTRA = {"avx512": (("avx512bw", "-mavx512bw"), ("avx512_vnni", "-mavx512vnni"))}
WIDE = ("self_attn", "feed_forward")  # blocks whose matrices precision="int16" keeps in 16 bits


class RooflineError(RuntimeError):
    """The micro-benchmark could not be compiled or run; the message says why."""


class Roofline:
    """The compiled micro-benchmark for one backend of the engine."""

    def __init__(self, backend: str) -> None:
        if backend not in ISA:
            raise RooflineError(f"backend: expected one of {', '.join(ISA)}, got {backend!r}")
        self.backend = backend
        self._folder = tempfile.TemporaryDirectory(prefix="tsad-roofline-")
        self._program = str(Path(self._folder.name) / "roofline")
        width, flags = ISA[backend]
        flags = flags + [flag for name, flag in EXTRA.get(backend, ()) if name in _cpu_flags()]
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-O2", "-std=gnu11", "-ffp-contract=fast", *flags]
        command += [f"-DVECTOR_BYTES={width}", str(SOURCE), "-o", self._program, "-pthread"]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            raise RooflineError(f"{compiler}: {error}; set CC to a C compiler") from error
        if result.returncode:
            raise RooflineError(f"{' '.join(command)}\n{result.stderr}")

    def run(self, threads: int, n_bytes: int, seconds: float) -> dict[str, Any]:
        """Peak GFLOP/s, 16-bit GOP/s and GB/s of `threads` threads; roofline.c has the keys.

        The buffer has `n_bytes`, at least 64 KiB for each thread.
        """
        size = max(n_bytes, 65536 * threads)
        command = [self._program, str(threads), str(size), str(seconds)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RooflineError(f"roofline: exit {result.returncode}: {result.stderr}")
        facts: dict[str, Any] = json.loads(result.stdout)
        del facts["sink"]
        return {"backend": self.backend, **facts}

    @staticmethod
    def best(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The peaks of several runs, and the lowest and highest of each."""
        peak = dict(runs[0])
        for key in ("gflops", "int16_gops", "read_gbs"):
            if key not in peak:
                continue
            values = [float(run[key]) for run in runs]
            peak[key] = max(values)
            peak[f"{key}_spread"] = [min(values), max(values)]
        return peak


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return frozenset(line.split())


def block_bytes(network: Mapping[str, Any], precision: str = "float32") -> list[int]:
    """Bytes that one cell of each block must read: its weights after the exact rewrites.

    Self-attention has four d x d matrices, feed-forward eight; cross-attention folds to a score
    and a value vector per head and memory token, float32 always.
    """
    d, heads = int(network["n_emb"]), int(network["n_head"])
    memory = 1 + int(network["n_obs_steps"])
    size = {"self_attn": 4 * d * d, "cross_attn": 2 * memory * heads * d, "feed_forward": 8 * d * d}
    half = precision == "int16"
    return [(2 if half and kind in WIDE else 4) * size[kind] for kind in block_types(network)]


def work(
    network: Mapping[str, Any], plans: Sequence[NDArray[np.uint8]], precision: str = "float32"
) -> tuple[float, float]:
    """Multiply-adds and bytes of one call: one plan, sources (K, B), for each lane.

    The embedding and the head are in both. Lanes that compute a cell at the same step can share
    its weights, so they count once. What is reused costs nothing here.
    """
    computed = np.stack([plan == COMPUTE for plan in plans])
    steps = computed.shape[1]
    ends = int(network["action_dim"]) * int(network["n_emb"]) * 2
    macs = (computed.sum((0, 1)) * np.array(block_costs(network), np.float64)).sum()
    macs += len(plans) * steps * ends * int(network["horizon"])
    n_bytes = computed.any(0).sum(0) * np.array(block_bytes(network, precision), np.float64)
    return float(macs), float(n_bytes.sum() + steps * 4 * ends)


def work16(network: Mapping[str, Any], plans: Sequence[NDArray[np.uint8]]) -> float:
    """Of the multiply-adds of `work`, those with matrices that precision="int16" keeps in 16 bits.

    Attention's scores and mixing are not among them.
    """
    d, tokens = int(network["n_emb"]), int(network["horizon"])
    size = {"self_attn": 4 * tokens * d * d, "cross_attn": 0, "feed_forward": 8 * tokens * d * d}
    cost = np.array([size[kind] for kind in block_types(network)], np.float64)
    return float(sum(((plan == COMPUTE).sum(0) * cost).sum() for plan in plans))


def floor(
    macs: float, n_bytes: float, peak: Mapping[str, Any], macs16: float = 0.0
) -> dict[str, float]:
    """Milliseconds that the arithmetic and the bytes need at the peak, and the larger of them.

    `macs16` of the `macs` go at the rate of 16-bit integers.
    """
    compute = 2 * (macs - macs16) / float(peak["gflops"]) * 1e-6
    if macs16:
        compute += 2 * macs16 / float(peak["int16_gops"]) * 1e-6
    memory = n_bytes / float(peak["read_gbs"]) * 1e-6
    return {"compute_ms": compute, "memory_ms": memory, "ms": max(compute, memory)}
