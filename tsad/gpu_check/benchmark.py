"""How long chunks take on the GPU, and what they ask of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import tsad
from tsad import device
from tsad.evaluation.timing import observations, percentiles, sampler_name
from tsad.gpu_check.conformance import (
    LARGE_UNET,
    TRANSFORMER,
    Pair,
    difference,
    random_policy,
)
from tsad.gpu_check.model import find_gpu, floor_ms, work_of

WARM_UP, MOST_CHUNKS, SECONDS = 5, 1000, 8.0
"""Chunks that do not count; then as many as come in so many seconds."""


class Case(NamedTuple):
    """A policy and how it is run."""

    name: str
    make: Callable[[], tsad.SparsePolicy]
    small: bool = False
    blas: str | None = None
    """TSAD_CUDA_BLAS; None: as it is."""
    blocks: int = 0
    """On so many multiprocessors as one kernel; 0: as TSAD_CUDA_ONE_KERNEL is."""
    exact: Callable[[], tsad.SparsePolicy] | None = None
    """The same in float32: how far a chunk is from its is said."""


def _pusht(sparsity: float = 0.0, **options: Any) -> tsad.SparsePolicy:
    policy = tsad.load("pusht", device="cuda", **options)
    policy.sparsity = sparsity
    return policy


def cases() -> Iterator[Case]:
    """What is timed."""
    tiny = partial(random_policy, TRANSFORMER, "cuda")
    yield Case("tiny, dense", tiny, small=True)
    in_tf32 = partial(tiny, precision="tf32")
    yield Case("tiny, tf32", in_tf32, small=True, blas="1", exact=tiny)
    yield Case("tiny, one kernel on 1", tiny, small=True, blocks=1)
    yield Case("dense", _pusht)
    yield Case("DDIM-10", partial(_pusht, sampler="ddim", num_inference_steps=10))
    for name in ("lossless", "fast"):
        yield Case(f"preset {name}", partial(tsad.load, "pusht", device="cuda", preset=name))
    for sparsity in (0.8, 0.9, 0.95):
        yield Case(f"{sparsity:.0%} sparse", partial(_pusht, sparsity))
    yield Case("dense, float16", partial(_pusht, precision="float16"))
    lossless = partial(tsad.load, "pusht", device="cuda", preset="lossless")
    for blocks in (1, 8):
        yield Case(f"preset lossless, one kernel on {blocks}", lossless, blocks=blocks)
        yield Case(f"95% sparse, one kernel on {blocks}", partial(_pusht, 0.95), blocks=blocks)
    yield Case("dense, one kernel on 8", _pusht, blocks=8)
    half = partial(_pusht, precision="float16")
    yield Case("dense, float16, one kernel on 8", half, blocks=8)
    unet = partial(random_policy, LARGE_UNET, "cuda", steps=100)
    yield Case("UNet, DDPM-100", unet)
    yield Case("UNet, float16", partial(unet, precision="float16"))
    # which rows are worth cuBLAS: its products and our own, of 16 rows and of 64
    yield Case("UNet, cuBLAS", unet, blas="1")
    in_tf32 = partial(unet, precision="tf32")
    yield Case("UNet, tf32", in_tf32, blas="1", exact=unet)
    yield Case("UNet, 4 lanes, no cuBLAS", partial(unet, lanes=4), blas="0")
    yield Case("UNet, 4 lanes, cuBLAS", partial(unet, lanes=4), blas="1")
    four = partial(unet, lanes=4)
    yield Case("UNet, 4 lanes, tf32", partial(in_tf32, lanes=4), blas="1", exact=four)
    yield Case("dense, cuBLAS", _pusht, blas="1")


def run(case: Case, *, gpu: str, emulated: bool) -> dict[str, Any]:
    """Times and counts of a case; of an emulated GPU the counts alone, which are as true."""
    absent = device.cublas().absent
    if absent and case.blas not in (None, "0"):
        return {"case": case.name, "skipped": absent}
    one_kernel = case.blocks or os.environ.get("TSAD_CUDA_ONE_KERNEL", "")
    try:
        with (
            device.setting("TSAD_CUDA_BLAS", case.blas or os.environ.get("TSAD_CUDA_BLAS", "")),
            device.setting("TSAD_CUDA_ONE_KERNEL", str(one_kernel)),
        ):
            policy = case.make()
    except ValueError as error:
        if case.blocks:  # more than this GPU can
            return {"case": case.name, "skipped": str(error)}
        raise
    policy.reset(seed=0)
    given = observations(policy, 64)
    for obs in given[: 3 if emulated else WARM_UP]:
        policy(obs)
    before = device.counts()
    policy(given[0])
    asked = device.counts().since(before)
    plan = policy.plan
    plan = plan[0] if isinstance(plan, list) else plan
    assert isinstance(plan, tsad.Plan)
    work = work_of(policy, plan)
    facts: dict[str, Any] = {
        "case": case.name,
        "sampler": sampler_name(policy),
        "sparsity": float(plan.sparsity),
        "precision": policy.precision,
        "lanes": policy.lanes,
        "cublas": device.cublas().version,
        "blocks": case.blocks,
        **asked._asdict(),
        "weights": work.weights,
        "bytes": work.bytes,
        "multiply_adds": work.multiply_adds,
    }
    if case.exact and (case.small or not emulated):
        facts["error"] = difference(Pair(case.exact(), policy), 1, 0)
    if emulated:
        return facts
    wall: list[float] = []
    spent: list[float] = []
    begin = time.perf_counter()
    with device.timed():
        while len(wall) < MOST_CHUNKS and time.perf_counter() - begin < SECONDS:
            before, tick = device.counts(), time.perf_counter()
            policy(given[len(wall) % len(given)])
            wall.append((time.perf_counter() - tick) * 1e3)
            spent.append(device.counts().since(before).device_ns / 1e6)
    least = floor_ms(work, asked, find_gpu(gpu), case.blocks)
    facts |= {
        "chunks": len(wall),
        "wall_ms": percentiles(wall),
        "device_ms": percentiles(spent),
        "floor_ms": least,
        "share_of_floor": None if least is None else least / float(np.median(wall)),
    }
    return facts
