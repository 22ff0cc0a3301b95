"""A model of a chunk's time on GPUs that nobody here has: launches and bytes, no more.

A chunk is a chain of kernels that wait for each other, so its time is at least

    launches x pitch + bytes / bandwidth

``pitch`` is the time from one tiny dependent kernel to the next, and ``bytes`` are what the chain
reads at least: the weights of what is computed, once per computed block, and the branches that are
reused. Weights that fit a GPU's second-level cache come from there. Facts and their sources are in
`GPUS`; what follows from them is a prediction, and no kernel of ours may be as good.

Where one kernel does a list of launches on a few multiprocessors (``TSAD_CUDA_ONE_KERNEL``) what
is between two of them is a meeting of its threads, and a multiprocessor reads so much and
multiplies so much, which is no limit where all of the GPU works:

    launches x meeting + the longer of bytes / rate and multiply-adds / rate, of those few
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tsad import Plan, SparsePolicy
from tsad.device import Counts
from tsad.plan import COMPUTE, SKIP


class Gpu(NamedTuple):
    """Facts about a GPU: bytes and seconds."""

    word: str
    """What its name has in it."""
    pitch: float
    graph_pitch: float
    """The same within a CUDA graph."""
    memory: float
    """Bytes a second from its memory."""
    cache: int
    cache_rate: float
    """Bytes a second from its second-level cache, all of the GPU together."""
    meeting: float
    """Seconds from one listed launch to the next on one multiprocessor: a read from that cache."""
    cluster_meeting: float | None
    """The same on eight, with a cluster's barrier; None: it has none."""
    block_rate: float
    """Bytes a second from that cache to one multiprocessor."""
    multiply_rate: float
    """Multiply-adds a second of one multiprocessor, float32, outside its tensor cores."""
    source: str


GPUS = (
    Gpu(
        "H200", 2.5e-6, 1.36e-6, 4.8e12, 50_000_000, 10e12, 0.151e-6, 0.65e-6, 127e9, 253e9,
        "pitch and cache rate measured on an H200 by github.com/te42kyfo/gpu-benches "
        "(gpu-small-kernels, gpu-l2-cache), the cache's latency on an H100; a cluster's barrier "
        "measured on an H100 by github.com/revollllt/flash-vla; memory and cache of NVIDIA's data "
        "sheet; 64 bytes a cycle to a multiprocessor are a guess (others found 41 to 78)",
    ),
    Gpu(
        "4090", 1.64e-6, 1.0e-6, 1.008e12, 72_000_000, 5.2e12, 0.111e-6, None, 161e9, 323e9,
        "pitch, cache rate and latency measured on an L40, the same generation, by "
        "github.com/te42kyfo/gpu-benches; memory and cache of NVIDIA's data sheet; 64 bytes a "
        "cycle to a multiprocessor are a guess",
    ),
    Gpu(
        "Orin", 5.0e-6, 3.5e-6, 0.2048e12, 4_000_000, 1.0e12, 0.2e-6, None, 83e9, 166e9,
        "memory and cache of NVIDIA's data sheet (Jetson AGX Orin 64 GB); pitch, cache rate and "
        "latency are guesses from other GPUs at its clock",
    ),
)  # fmt: skip


class Work(NamedTuple):
    """What a chunk has to do at least."""

    weights: int
    """Bytes of weights of all blocks and what is beside them, each once."""
    bytes: int
    """Bytes read in a chunk."""
    multiply_adds: int
    """Of the computed blocks in a chunk."""


def work_of(policy: SparsePolicy, plan: Plan) -> Work:
    """What a chunk along a plan reads: weights per computed cell, float32 slots per reused one.

    A multiply-accumulate of a cell is one of its weights at one of the tokens, so a cell's weights
    are its cost by the horizon: a little more than they are, as attention has none, and less than
    they are of a UNet, whose inner levels have fewer tokens.
    """
    costs = policy.block_costs / policy.horizon
    computed = plan.sources == COMPUTE
    reused = ~computed & (plan.sources != SKIP)
    network = policy.config["network"]
    width = network.get("n_emb") or network.get("hidden_dim") or max(network.get("down_dims", [0]))
    half = policy.precision in ("float16", "bfloat16")
    # folded cross-attention has no weights but what an encoder makes of the observation
    sizes = np.array([2 if half and t != "cross_attn" else 4 for t in policy.block_types])
    times = computed.astype(float).sum(0)
    slots = 4.0 * policy.horizon * width * float(reused.sum())
    return Work(
        int((sizes * costs).sum()),
        int(float(times @ (sizes * costs)) + slots),
        int(times @ policy.block_costs),
    )


def find_gpu(name: str) -> Gpu | None:
    """The GPU of a driver's name for it; None if nothing is known of it here."""
    return next((gpu for gpu in GPUS if gpu.word in name), None)


def floor_ms(work: Work, asked: Counts, gpu: Gpu | None, blocks: int = 0) -> float | None:
    """What the model says of a chunk with these launches, in milliseconds; of one lane, where one
    kernel does it on so many multiprocessors."""
    if gpu is None:
        return None
    pitch = gpu.graph_pitch if asked.graphs else gpu.pitch
    rate = gpu.cache_rate if work.weights < gpu.cache else gpu.memory
    spent = asked.kernels * pitch
    if not blocks:
        return (spent + work.bytes / rate) * 1e3
    meeting = gpu.meeting if blocks == 1 else gpu.cluster_meeting
    if meeting is None:
        return None
    reads = work.bytes / min(rate, blocks * gpu.block_rate)
    multiplies = work.multiply_adds / (blocks * gpu.multiply_rate)
    return (spent + asked.listed * meeting + max(reads, multiplies)) * 1e3
