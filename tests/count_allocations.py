"""Run by test_edge.py with malloc_count.so preloaded: no allocation from the second call on."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from policies import make_policy, noises, observations
from torch_encoder import Encoder

from tsad import _core, planners

library: Any = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
for name in ("chunks", "allocations", "frees"):
    getattr(library, f"tsad_count_{name}").restype = ctypes.c_long


def counted() -> tuple[int, int]:
    return library.tsad_count_allocations(), library.tsad_count_frees()


# The counter counts: an allocation between the marks is seen, one outside is not.
library.free(ctypes.c_void_p(library.malloc(100)))
assert counted() == (0, 0)
library.tsad_mark_chunk_begin()
memory = library.malloc(100)
library.free(ctypes.c_void_p(memory))
library.tsad_mark_chunk_end()
assert counted()[0] >= 1 and counted()[1] >= 1, counted()

begun = library.tsad_count_chunks()
total = 0
for threads, warm_start in ((1, None), (2, None), (1, 3), (2, 3)):
    for lanes in (1, 3):
        policy = make_policy(lanes=lanes, threads=threads, pruner=True, warm_start=warm_start)
        obs, noise = observations(policy, 0), noises(policy, 1)

        def run(count: int, policy: Any = policy, obs: Any = obs, noise: Any = noise) -> int:
            for i in range(count):
                policy(obs, noise=noise if i % 2 else None)
            return count

        for plan in ("dense", "random", "pruner")[: 3 if warm_start is None else 2]:
            policy.reset(seed=0)
            if plan == "pruner":
                policy.sparsity = 0.5
            elif plan == "random":
                policy.plan = planners.random(policy, 0.5, 0)
            total += run(2)
            before = counted()
            total += run(20)
            assert counted() == before, (plan, lanes, threads, np.subtract(counted(), before))
assert library.tsad_count_chunks() - begun == total, "the extension does not call the marks"
print(f"no allocation in {total * 20 // 22} chunks")

encoder = Encoder(height=40, width=40, keypoints=3, features=5)
images, features = np.zeros((3, 40, 40, 3), np.uint8), np.empty((3, 5), np.float32)
begun = library.tsad_count_chunks()
for threads in 1, 2:
    vision = _core.Vision(encoder.weights(), **encoder.arguments(), threads=threads)
    vision.encode(images, out=features)
    before = counted()
    for _ in range(5):
        vision.encode(images, out=features)
    assert counted() == before, (threads, np.subtract(counted(), before))
assert library.tsad_count_chunks() - begun == 12, "the extension does not call the marks"
print("nor in 10 calls of an encoder")
