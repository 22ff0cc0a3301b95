"""A chunk as one kernel that does a list of launches, on the emulated GPU: launches say what is
right, bit for bit, as both do the same sums in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cuda
import test_cuda_memory
import test_device_arrays
import test_dit as dit
import test_unet1d as unet
from cases import config, random_inputs
from cases import random_plan as random_dpt_plan
from cuda_library import SANITIZED, need_compiler, queue
from cuda_mutants import Mutant, Workshop, survives
from engine import make
from test_cuda_memory import Memory
from test_engine import OPEN

import tsad
from tsad import _core, device
from tsad.gpu_check.conformance import TRANSFORMER, random_policy

SETTING, K = "TSAD_CUDA_ONE_KERNEL", 3


@pytest.fixture(autouse=True)
def cuda(blas: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", blas)
    _core._load_backend(blas)
    return blas


def policy_of(family: str, blocks: int, **options: Any) -> Any:
    """On so many multiprocessors as one kernel; 0: as launches."""
    graphs = options.pop("graphs", "1" if blocks else "0")
    with device.setting(SETTING, str(blocks)), device.setting("TSAD_CUDA_GRAPHS", graphs):
        if family == "transformer":
            return make(options.pop("name", "tiny"), backend="cuda", steps=K, **OPEN, **options)
        test: Any = {"unet": unet, "dit": dit}[family]
        shape = test.SHAPES[{"unet": "two_levels", "dit": "both"}[family]]
        return test.make(shape, shape.weights(3), K=K, backend="cuda", **options)


def inputs(family: str, seed: int, lanes: int) -> Any:
    if family == "transformer":
        return random_inputs(config("tiny"), seed, lanes=lanes, steps=K)
    test: Any = {"unet": unet, "dit": dit}[family]
    shape = test.SHAPES[{"unet": "two_levels", "dit": "both"}[family]]
    return test.inputs(shape, seed, lanes, K)


def plans(family: str, seed: int, lanes: int, types: list[int]) -> list[tuple[Any, Any]]:
    """(later, first) of each lane."""
    rng = np.random.default_rng(seed)

    def plan(filled: Any) -> Any:
        if family == "transformer":
            return random_dpt_plan(rng, K, len(types), filled=False if filled is None else filled)
        return unet.random_plan(rng, types, K, filled)

    first = [plan(None) for _ in range(lanes)]
    return [(plan(sources == 0), sources) for sources in first]


def check_family(family: str, blocks: int, lanes: int = 3, **options: Any) -> None:
    """Plans of the lanes over three rollouts, other plans, some of the lanes."""
    policies = [policy_of(family, n, lanes=lanes, **options) for n in (blocks, 0)]
    types = policies[0].model.block_type.tolist()
    for turn in range(2):
        for policy in policies:
            policy.reset()
            for lane, (later, first) in enumerate(plans(family, turn, lanes, types)):
                policy._set_plan(lane, later, first)
        for seed, chosen in enumerate((None, None, [1, 0], None)):
            obs, noise = inputs(family, 10 * turn + seed, lanes if chosen is None else len(chosen))
            given = {"noise": noise, "lanes": chosen, "return_horizon": True}
            one, launched = (policy(obs, **given) for policy in policies)
            np.testing.assert_array_equal(one, launched)


def check_one_kernel() -> None:
    """A little of everything: what a planted fault must not pass (cuda_mutants.py)."""
    check_family("transformer", 2)
    check_family("unet", 1, lanes=2)
    check_family("dit", 8, lanes=2)
    check_family("transformer", 2, lanes=5)  # more than go together
    check_family("transformer", 1, lanes=2, precision="bfloat16")
    check_pruner("mlp")
    check_longer_lists()


def check_pruner(kind: str, name: str = "tiny_encoder") -> None:
    """Its plans are others in every chunk: a list each."""
    policies = [policy_of("transformer", n, name=name, pruner=kind) for n in (2, 0)]
    for policy in policies:
        policy._set_pruner(0.5)
    for seed in range(3):
        obs, noise = random_inputs(config(name), seed, steps=K)
        one, launched = (policy(obs, noise=noise) for policy in policies)
        np.testing.assert_array_equal(one, launched)
        np.testing.assert_array_equal(*(policy._pruner_scores(obs[0]) for policy in policies))


def check_longer_lists() -> None:
    """Launched once, as graphs are off: one that is longer than all before, and not waited for."""
    policies = [policy_of("transformer", n, lanes=9, graphs="0") for n in (2, 0)]
    short = np.full((K, 6), tsad.REUSE_STEP, np.uint8)
    short[0] = tsad.COMPUTE
    dense = np.zeros_like(short)
    for policy in policies:
        for lane in range(9):
            plan = dense if lane > 3 else short
            policy._set_plan(lane, plan, plan)
    for seed in range(2):
        obs, noise = random_inputs(config("tiny"), seed, lanes=9, steps=K)
        np.testing.assert_array_equal(*(policy(obs, noise=noise) for policy in policies))


@pytest.mark.parametrize("blocks", [1, 2, 8])
@pytest.mark.parametrize("family", ["transformer", "unet", "dit"])
def test_one_kernel_equals_launches_bit_for_bit(family: str, blocks: int) -> None:
    check_family(family, blocks, lanes=2 if blocks == 8 else 3)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_weights_of_16_bits(precision: str) -> None:
    check_family("transformer", 2, lanes=2, precision=precision)


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_a_pruners_plans(kind: str) -> None:
    check_pruner(kind)


def test_lanes_of_several_gangs() -> None:
    check_family("transformer", 2, lanes=6)
    check_longer_lists()


@pytest.mark.parametrize("most", [1, 3])
def test_whenever_their_work_begins(most: int, cuda: str) -> None:
    with queue(cuda, most):
        check_longer_lists()
        check_pruner("transformer")


@pytest.mark.parametrize("graphs", ["0", "1"])
def test_the_cpu_agrees_and_arrays_there_are_read(cuda: str, graphs: str) -> None:
    with device.setting(SETTING, "2"), device.setting("TSAD_CUDA_GRAPHS", graphs):
        test_cuda.check_all()
        test_device_arrays.check_there(cuda)


def test_a_chunk_is_one_kernel() -> None:
    """Of a fixed plan with all its lanes, and it counts what it stands for."""
    found = []
    for blocks in (2, 0):
        policy = policy_of("transformer", blocks, lanes=3)
        for seed in range(3):
            obs, noise = inputs("transformer", seed, 3)
            before = device.counts()
            policy(obs, noise=noise)
        found.append(device.counts().since(before))
    one, launched = found
    assert (one.kernels, one.launches, one.graphs) == (1, 0, 1)
    assert one.uploads == one.downloads == one.waits == 1
    assert launched.listed == 0 and one.listed == 3 * launched.kernels  # lanes share no launch


def test_a_plan_that_changes_is_a_list_each() -> None:
    policy = policy_of("transformer", 2, pruner="transformer")
    policy._set_pruner(0.5)
    for seed in range(3):
        obs, noise = inputs("transformer", seed, 1)
        before = device.counts()
        policy(obs, noise=noise)
    asked = device.counts().since(before)
    assert asked.graphs == 0 and asked.launches == asked.kernels <= 5 < asked.listed


def test_cublas_is_asked_for_nothing() -> None:
    with device.setting("TSAD_CUDA_BLAS", "1"):
        policy = policy_of("transformer", 1)
        obs, noise = inputs("transformer", 0, 1)
        policy(obs, noise=noise)
        with device.setting(SETTING, "1"), device.through_cublas() as used:
            assert not used
    before = device.counts()
    policy(obs, noise=noise)
    assert device.counts().since(before).kernels == 1


def test_who_trusts_it_trusts_it_as_it_is_set() -> None:
    found = {device.identity()}
    for blocks in "12":
        with device.setting(SETTING, blocks):
            found.add(device.identity())
    assert len(found) == 3


@pytest.mark.parametrize("given", ["-1", "9", "many", "1.5", " "])
def test_a_wrong_setting_is_said(given: str) -> None:
    with device.setting(SETTING, given):
        with pytest.raises(ValueError, match=rf"{SETTING}: expected 0 .*, 1 to 8, got '{given}'"):
            make("tiny", backend="cuda")


@pytest.fixture
def older(cuda: str) -> Iterator[None]:
    """A GPU without clusters."""
    say = ctypes.CDLL(cuda).tsad_emulate_major
    before = say(8)
    yield
    say(before)


def test_several_multiprocessors_need_clusters(older: None) -> None:
    with device.setting(SETTING, "2"):
        with pytest.raises(ValueError, match=rf"{SETTING}: more than one .* got '2' on 8\.0; set"):
            make("tiny", backend="cuda")
    check_family("transformer", 1, lanes=2)


@pytest.fixture
def memory(blas: str) -> Iterator[Memory]:
    found = Memory(blas)
    yield found
    found._fail(-1)


def test_what_finds_no_room_changes_nothing(memory: Memory) -> None:
    """A list's memory, with a graph's or for a chunk alone."""
    with device.setting(SETTING, "2"):
        test_cuda_memory.test_a_policy_that_finds_no_room_leaves_nothing(memory, "0")
        test_cuda_memory.test_slots_that_find_no_room_change_nothing(memory)
    obs, noise = inputs("transformer", 0, 1)
    for graphs in "01":
        policy, twin = (policy_of("transformer", n, graphs=graphs) for n in (2, 0))
        came = list(memory.failures(partial(policy, obs, noise=noise)))
        said = [error for error in came if isinstance(error, str)]
        assert len(said) > 1 and all("out of memory" in error for error in said)
        expected = twin(obs, noise=noise)
        for actions in came[len(said) :]:  # a graph that finds none is none
            np.testing.assert_array_equal(actions, expected)


def test_what_a_block_may_share_is_the_same_for_all_policies() -> None:
    """It is the kernel's: a policy that asked for less would take it from another thread's, between
    what that asks for and its launch. The wide one shares more than a product does."""
    wide = TRANSFORMER | {"horizon": 33, "n_obs_steps": 33, "n_action_steps": 1}
    wide |= {"n_head": 96, "n_emb": 96, "n_layer": 1}
    for network in (TRANSFORMER, wide, TRANSFORMER):
        found = []
        for blocks in "20":
            with device.setting(SETTING, blocks):
                policy = random_policy(network, "cuda", steps=1)
            obs = np.ones((1, policy.n_obs_steps, policy.obs_dim), np.float32)
            noise = np.ones((1, 1, policy.horizon, policy.action_dim), np.float32)
            found.append(policy(obs, noise=noise, return_horizon=True))
        np.testing.assert_array_equal(*found)


# ---- where one kernel can't


def test_a_block_that_can_share_too_little_is_no_failure(tmp_path: Path) -> None:
    """What is listed is launched then."""
    need_compiler()
    if SANITIZED:
        pytest.skip("it is compiled once more: minutes, with a sanitizer")
    little = Mutant("list: a block can share little", "list.cu", "= 96 * 1024", "= 32 * 1024")
    library = Workshop(tmp_path / "shop").build(little)
    assert survives(library, check_one_kernel)
    assert not survives(library, test_a_chunk_is_one_kernel)
