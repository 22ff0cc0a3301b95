"""The CUDA backend on an emulated GPU: the reference and the CPU core say what is right.

The emulator (cuda/emulate/cuda_runtime.h) runs the kernels' own text, in random order, in memory
that is full of NaN at first. What it can't show is said in docs/gpu.md.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_dit as dit
import test_unet1d as unet
import torch_dit
import torch_unet
from cases import (
    CHUNK_TOLERANCE,
    NETWORK_TOLERANCE,
    PLAN_TOLERANCE,
    SMALL,
    config,
    random_inputs,
    relative_error,
)
from cases import random_plan as random_dpt_plan
from engine import make, make_reference
from policies import observations, save_policy
from test_engine import OPEN
from test_nodes import check_toy_unet

import tsad
from tsad import _core, device


@pytest.fixture(autouse=True, scope="module")
def cuda(emulated_cuda: str) -> str:
    name, absent = _core._load_backend(emulated_cuda)
    assert "emulated" in name and absent is None
    return emulated_cuda


@pytest.mark.parametrize("name", SMALL)
def test_a_transformer_equals_the_reference(name: str) -> None:
    reference, engine = make_reference(name, steps=3), make(name, backend="cuda", steps=3)
    with pytest.raises(ValueError, match="planner: expected a CPU"):
        engine._set_rule(3, 0.1, 3, (0.0, 1.0, 0.0, 0.0, 0.0))
    obs, noise = random_inputs(config(name), 1, lanes=2, steps=1)
    for step in (0, 2):
        got = engine.predict_noise(noise[0], step, obs)
        assert relative_error(got, reference.predict_noise(noise[0], step, obs)) < NETWORK_TOLERANCE


@pytest.mark.parametrize("name", ["lerobot", "bias_only", "two_levels", "odd"])
def test_a_unet_equals_pytorch(name: str) -> None:
    shape = unet.SHAPES[name]
    weights = shape.weights(seed=1)
    policy = unet.make(shape, weights, backend="cuda")
    obs, z = unet.inputs(shape, 2, lanes=1, K=1)
    codes = unet.time_emb(shape, 5)[4:5]
    expected = torch_unet.predict(shape, weights, z[0], codes, obs).numpy()
    assert relative_error(policy.predict_noise(z[0], 4, obs), expected) < NETWORK_TOLERANCE


@pytest.mark.parametrize("name", ["lerobot", "both", "mha", "one_token"])
def test_a_dit_equals_pytorch(name: str) -> None:
    shape = dit.SHAPES[name]
    weights = shape.weights(seed=1)
    policy = dit.make(shape, weights, backend="cuda")
    obs, z = dit.inputs(shape, 2, lanes=1, K=1)
    codes = dit.time_emb(shape, 5)[4:5]
    expected = torch_dit.predict(shape, weights, z[0], codes, obs).numpy()
    assert relative_error(policy.predict_noise(z[0], 4, obs), expected) < NETWORK_TOLERANCE


def test_a_list_of_nodes_equals_the_oracle() -> None:
    """Strides, concatenation, copies, gates from a table, convolutions without a halo."""
    check_toy_unet("cuda", seeds=4)


def check_dense(steps: int) -> None:
    options: dict[str, Any] = OPEN | {"sampler": "ddpm", "steps": steps}
    reference = make_reference("tiny", lanes=2, **options)
    engine = make("tiny", lanes=2, backend="cuda", **options)
    obs, noise = random_inputs(config("tiny"), 2, lanes=2, steps=steps)
    got = engine(obs, noise=noise, return_horizon=True)
    assert relative_error(got, reference(obs, noise, return_horizon=True)) < CHUNK_TOLERANCE


def test_a_dense_chunk_equals_the_reference() -> None:
    check_dense(10)


def check_plans(family: str, rounds: int, precision: str = "float32") -> None:
    """Plans of three lanes over three rollouts, on the emulated GPU and on the CPU."""
    K, lanes, rng = 4, 3, np.random.default_rng(5)
    policies: list[Any] = []
    for backend in ("cuda", None):
        if family == "transformer":
            options: dict[str, Any] = {"steps": K, "precision": precision, **OPEN}
            policies.append(make("tiny", lanes=lanes, backend=backend, **options))
        else:
            test: Any = {"unet": unet, "dit": dit}[family]
            shape = test.SHAPES[{"unet": "two_levels", "dit": "both"}[family]]
            options = {"K": K, "precision": precision}
            weights = shape.weights(3)
            policies.append(test.make(shape, weights, lanes=lanes, backend=backend, **options))
    types = policies[0].model.block_type.tolist()

    def plan(filled: Any) -> Any:
        if family == "transformer":
            return random_dpt_plan(rng, K, len(types), filled=False if filled is None else filled)
        return unet.random_plan(rng, types, K, filled)

    for turn in range(rounds):
        first = [plan(None) for _ in range(lanes)]
        later = [plan(sources == 0) for sources in first]
        if not turn:  # rows that add one sum again and again, which is kept
            first[0] = later[0] = np.full_like(first[0], tsad.REUSE_STEP)
            first[0][0] = tsad.COMPUTE
        for policy in policies:
            policy.reset()
            for lane in range(lanes):
                policy._set_plan(lane, later[lane], first[lane])
        for _rollout in range(3):
            seed = int(rng.integers(1 << 30))
            if family == "transformer":
                obs, noise = random_inputs(config("tiny"), seed, lanes=lanes, steps=K)
            else:
                obs, noise = test.inputs(shape, seed, lanes, K)
            got, expected = (p(obs, noise=noise, return_horizon=True) for p in policies)
            assert relative_error(got, expected) < PLAN_TOLERANCE


@pytest.mark.parametrize("family", ["transformer", "unet", "dit"])
def test_random_plans_equal_the_cpu(family: str) -> None:
    check_plans(family, rounds=2)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "rounds"), [("transformer", 60), ("unet", 20), ("dit", 60)])
def test_many_random_plans_equal_the_cpu(family: str, rounds: int) -> None:
    """Three plans a round; a UNet's take three times as long in emulation."""
    check_plans(family, rounds=rounds)


def check_pruner(name: str, pruner: str) -> None:
    engine = make(name, pruner=pruner, backend="cuda", steps=6)
    reference = make_reference(name, pruner=pruner, steps=6)
    obs, _ = random_inputs(config(name), 4)
    expected = reference.prune(obs[0])[::-1]
    assert relative_error(engine._pruner_scores(obs[0]), expected) < NETWORK_TOLERANCE


@pytest.mark.parametrize("pruner", ["transformer", "mlp"])
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_pruner_scores_equal_the_reference(name: str, pruner: str) -> None:
    check_pruner(name, pruner)


def check_changes() -> None:
    """Plans that change, slots that move when the first one reads rollouts, lanes apart."""
    still = np.full((3, 6), tsad.REUSE_STEP, np.uint8)
    still[0] = tsad.COMPUTE
    steps = still.copy()
    steps[1] = tsad.COMPUTE
    steps[2] = tsad.REUSE_TYPE
    rollout = still.copy()
    rollout[1] = tsad.REUSE_ROLLOUT
    dense = np.zeros_like(still)
    policies = [make("tiny", lanes=3, backend=b, steps=3, **OPEN) for b in ("cuda", None)]
    turns = ((still, steps, dense), (steps, dense, still), (rollout, None, None))
    for turn, plans in enumerate(turns):
        for policy in policies:
            policy.reset()
            for lane, plan in enumerate(plans):
                if plan is not None:  # the others go on, also where slots have moved
                    policy._set_plan(lane, plan, dense)
        for seed, lanes in enumerate((None, None, [2], [0, 2], [1], None, None)):
            # in mid-episode, where the chunk before has left a graph of these lanes
            if seed == 6 and turn < 2:
                for policy in policies:
                    policy._set_plan(0, (steps, still)[turn], dense)
            rows = 3 if lanes is None else len(lanes)
            obs, noise = random_inputs(config("tiny"), 10 * turn + seed, lanes=rows, steps=3)
            got, expected = (p(obs, noise=noise, lanes=lanes) for p in policies)
            assert relative_error(got, expected) < PLAN_TOLERANCE


def test_changes_equal_the_cpu() -> None:
    check_changes()


def check_rows() -> None:
    """More tokens than a block has warps."""
    gpu, cpu = (make("tiny_long", backend=backend, steps=2) for backend in ("cuda", None))
    obs, noise = random_inputs(config("tiny_long"), 3, lanes=1, steps=1)
    got, expected = (policy.predict_noise(noise[0], 1, obs) for policy in (gpu, cpu))
    assert relative_error(got, expected) < NETWORK_TOLERANCE


def check_all() -> None:
    """A little of everything: what a planted fault must not pass (cuda_mutants.py)."""
    check_changes()
    for family in ("transformer", "unet", "dit"):
        check_plans(family, rounds=1)
    check_pruner("tiny", "transformer")
    check_dense(3)  # without rollout memory
    check_rows()


def test_load_runs_on_the_device(
    cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", cuda)
    folder = save_policy(tmp_path)
    on_cpu, on_cuda = (
        tsad.load(folder, device=device, sampler="ddim", num_inference_steps=4)
        for device in ("cpu", "cuda")
    )
    assert on_cuda.device == on_cuda.backend == "cuda" and "emulated" in device.cuda().words()
    obs = observations(on_cpu, 0)
    for policy in (on_cpu, on_cuda):
        policy.reset(seed=0)
    assert relative_error(on_cuda(obs), on_cpu(obs)) < CHUNK_TOLERANCE
    for copied in (copy.copy(on_cuda), pickle.loads(pickle.dumps(on_cuda))):
        assert copied.device == copied.backend == "cuda"


@pytest.mark.parametrize("library", ["missing.so", "text.so", "other.so"])
def test_a_library_that_is_none_is_said(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / library
    if library == "text.so":
        path.write_text("not a library")
    elif library == "other.so":
        path = Path(_core.__file__)  # a library, but not one of a backend
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", str(path))
    said = device.cuda()
    assert said.absent is not None and str(path) in said.absent
    with pytest.raises(ValueError, match=re.escape(f"got 'cuda', which is not offered: {path}")):
        tsad.load("pusht", device="cuda")


def test_without_the_library_the_fix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TSAD_CUDA_LIBRARY", raising=False)
    if device.cuda().library is not None:
        pytest.skip("this build has the backend")
    with pytest.raises(ValueError, match="not offered: this build has none; build with TSAD_CUDA"):
        tsad.load("pusht", device="cuda")
