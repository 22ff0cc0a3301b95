"""The engine's bits, as recorded before a rebuild that must not change them.

``python tests/test_bits.py`` prints the digests of this machine's paths; tests/bits.json holds
those of the commit that it names. Another compiler or C library may round otherwise, so digests
are compared only where the plain path's first one, which every machine has, is the recorded one.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from cases import config, random_inputs, random_plan
from engine import make

import tsad
from tsad import _core

FILE = Path(__file__).with_name("bits.json")
RECORDED = json.loads(FILE.read_text())
OPEN = {"prediction_type": "sample", "clip_sample": False}


def bundled(threads: int, **settings: object) -> bytes:
    """Three chunks of the bundled policy and one more after a reset, noise from a seed."""
    policy = tsad.load("pusht", threads=threads, **settings)  # type: ignore[arg-type]
    rng = np.random.default_rng(5)
    chunks = []
    for seed in (0, None, None, 1):
        if seed is not None:
            policy.reset(seed=seed)
        obs = rng.uniform(100, 400, (policy.n_obs_steps, policy.obs_dim)).astype(np.float32)
        chunks.append(policy(obs, return_horizon=True).tobytes())
    return b"".join(chunks)


def plans(backend: str, name: str, precision: str, rounds: int, threads: int) -> bytes:
    """Random plans, three rollouts each, four lanes."""
    K, lanes = 6, 4
    engine = make(
        name, lanes=lanes, threads=threads, backend=backend, steps=K, precision=precision, **OPEN
    )
    B = engine.model.n_blocks
    rng = np.random.default_rng(7)
    out = hashlib.sha256()
    for _ in range(rounds):
        engine.reset()
        for lane in range(lanes):
            first = random_plan(rng, K, B, filled=False)
            engine._set_plan(lane, random_plan(rng, K, B, filled=first == tsad.COMPUTE), first)
        for _rollout in range(3):
            seed = int(rng.integers(1 << 30))
            obs, noise = random_inputs(config(name), seed, lanes=lanes, steps=K)
            out.update(engine(obs, noise=noise, return_horizon=True).tobytes())
    return out.digest()


def pruned(backend: str, name: str, kind: bool | str, threads: int) -> bytes:
    """Chunks that a pruner plans."""
    K = 6
    engine = make(name, threads=threads, backend=backend, steps=K, pruner=kind, **OPEN)
    engine._set_pruner(0.6)
    chunks = []
    for seed in range(4):
        obs, noise = random_inputs(config(name), seed, steps=K)
        chunks.append(engine(obs, noise=noise, return_horizon=True).tobytes())
    return b"".join(chunks)


def digests(backend: str, threads: int) -> dict[str, str]:
    found = {}
    with mock.patch.dict(os.environ, TSAD_CPU=backend):
        for name, settings in {
            "ddim-16": dict(sampler="ddim", num_inference_steps=16),
            "ddpm-12": dict(num_inference_steps=12),
            "dpm-10-int16": dict(sampler="dpmsolver++", num_inference_steps=10, precision="int16"),
            "fast": dict(preset="fast"),
            "lossless": dict(preset="lossless"),
            "warm": dict(sampler="dpmsolver++", num_inference_steps=8, warm_start=3),
        }.items():
            found[name] = hashlib.sha256(bundled(threads, **settings)).hexdigest()
    for name in ("tiny", "tiny_encoder", "odd"):
        for precision in ("float32", "int16"):
            rounds = 250 if (name, precision) == ("tiny", "float32") else 10
            digest = hashlib.sha256(plans(backend, name, precision, rounds, threads))
            found[f"plans-{name}-{precision}"] = digest.hexdigest()
    for name in ("tiny", "tiny_encoder"):
        for kind in (True, "mlp"):
            digest = hashlib.sha256(pruned(backend, name, kind, threads))
            found[f"pruner-{name}-{kind}"] = digest.hexdigest()
    return found


# of plain C, which takes most of a minute, one of the two: threads share work alike on every path
CASES = [(backend, n) for backend in _core.backends() for n in (1, 2) if (backend, n) != ("ref", 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "threads"), CASES)
def test_bits_are_those_recorded(backend: str, threads: int) -> None:
    if backend not in RECORDED["digests"]:
        pytest.skip(f"no digests of {backend} were recorded")
    plain = hashlib.sha256(plans("ref", "tiny", "float32", 250, 1)).hexdigest()
    if plain != RECORDED["digests"]["ref"]["plans-tiny-float32"]:
        pytest.skip("this compiler or C library rounds otherwise")
    assert digests(backend, threads) == RECORDED["digests"][backend]


if __name__ == "__main__":
    print(json.dumps({backend: digests(backend, 1) for backend in _core.backends()}, indent=1))
