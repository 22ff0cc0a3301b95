"""What tsad runs and what not yet: README.md shows this table, and refusals quote its rows."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Two cells of the table."""

    supported: str
    not_yet: str


SCOPE = {
    "networks": Row(
        "Diffusion Policy's transformer (time_as_cond, obs_as_cond) and UNet (obs_as_global_cond), "
        "LeRobot's UNet and DiT; for images their ResNet-18 or 34 with spatial softmax",
        "other vision encoders (CLIP, ResNet-50: give their features as observations)",
    ),
    "checkpoints": Row(
        "Diffusion Policy's .ckpt (transformer, UNet, hybrid image), LeRobot folders (diffusion, "
        "multi_task_dit), tsad folders",
        "LeRobot's other policies, other formats",
    ),
    "samplers": Row(
        "DDPM, DDIM, DPM-Solver++, predicting the noise, the sample or v; flow matching in Euler's "
        "or Runge-Kutta steps",
        "other schedulers",
    ),
    "precisions": Row(
        "float32, on a CPU int16 and int8 (large matrices in 16 bits, their weights in 8), on CUDA "
        "float16 and bfloat16 (of weights), tf32 (products of 64 rows and more)",
        "float16 and bfloat16 on a CPU, or of activations",
    ),
    "devices": Row(
        "CPU: AVX-512, AVX2, NEON or plain C",
        "CUDA (written, tested in emulation, never run on a GPU), others",
    ),
    "systems": Row("Linux on x86-64; on ARM64 tested in emulation", "macOS, Windows"),
    "Python": Row("3.10 to 3.13 with NumPy 1.26 or newer", "PyPy, builds without the GIL"),
}


def scope(row: str) -> str:
    """A row in words, for the end of an error."""
    return f"supported {row}: {SCOPE[row].supported}; not yet: {SCOPE[row].not_yet}"


def table() -> str:
    """The table in Markdown."""
    head = ["| | supported | not yet |", "| --- | --- | --- |"]
    return "\n".join([*head, *(f"| {name} | {row[0]} | {row[1]} |" for name, row in SCOPE.items())])
