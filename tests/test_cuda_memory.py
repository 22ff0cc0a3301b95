"""Where the emulated GPU has no memory left: the call says so, loses nothing and leaves nothing."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import test_device_arrays
from cases import config, random_inputs
from cuda_library import queue
from engine import make
from policies import make_policy, observations

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, device

STEPS, LANES = 3, 2


class Memory:
    """What the stand-in for CUDA says of it."""

    def __init__(self, library: str) -> None:
        backend = ctypes.CDLL(library)
        self._fail, self._living = backend.tsad_emulate_fail, backend.tsad_emulate_living
        self._graphs = backend.tsad_emulate_graphs
        self._fail.argtypes = [ctypes.c_long]
        self._fail.restype = self._living.restype = self._graphs.restype = ctypes.c_long

    def used(self) -> int:
        """How many arrays, streams, events and graphs there are."""
        gc.collect()
        return int(self._living() + self._graphs())

    def failures(self, call: Callable[[], Any]) -> Iterator[Any]:
        """The call with its first piece of memory refused, its second ... until it needs no more:
        what came each time, or what the error says."""
        left = -1
        for n in range(1000):
            self._fail(n)
            try:
                came = call()
            except MemoryError as error:
                came = str(error)  # not its frames, which hold a model
            left = self._fail(-1)
            yield came
            if left >= 0:
                return
        raise AssertionError("it never ends")


@pytest.fixture
def memory(blas: str) -> Iterator[Memory]:
    found = Memory(blas)
    yield found
    found._fail(-1)


@pytest.mark.parametrize("rows", ["0", "1"])
def test_a_policy_that_finds_no_room_leaves_nothing(memory: Memory, rows: str) -> None:
    """Model, stream, events, arrays of the device and of the host, with and without cuBLAS."""
    make("tiny", backend="cuda")  # the stream of those who name none comes with the first
    before, errors = memory.used(), 0
    with device.setting("TSAD_CUDA_BLAS", rows):
        for came in memory.failures(lambda: make("tiny_encoder", backend="cuda", pruner=True)):
            if isinstance(came, str):
                errors += 1
                assert "cuda: " in came and "out of memory" in came
                assert memory.used() == before
    assert errors > 10
    del came
    assert memory.used() == before


def test_slots_that_find_no_room_change_nothing(memory: Memory) -> None:
    """A plan that reads earlier chunks needs more of them."""
    policy, twin = (make("tiny", lanes=LANES, backend="cuda", steps=STEPS) for _ in range(2))
    dense = np.full((STEPS, policy.n_blocks), COMPUTE, np.uint8)
    sources = dense.copy()
    sources[1:, 2] = REUSE_ROLLOUT
    wanted = []
    for seed in range(4):
        obs, noise = random_inputs(config("tiny"), seed, lanes=LANES, steps=STEPS)
        if seed == 1:
            twin.reset()
            twin._set_plan(0, sources, dense)
        wanted.append(twin(obs, noise=noise).copy())
    obs, noise = random_inputs(config("tiny"), 0, lanes=LANES, steps=STEPS)
    np.testing.assert_array_equal(policy(obs, noise=noise), wanted[0])
    policy.reset()
    before, errors = memory.used(), 0
    for came in memory.failures(lambda: policy._set_plan(0, sources, dense)):
        errors += isinstance(came, str)
    assert errors == 1 and memory.used() <= before  # the old slots went, and their graphs
    for seed in range(1, 4):
        obs, noise = random_inputs(config("tiny"), seed, lanes=LANES, steps=STEPS)
        np.testing.assert_array_equal(policy(obs, noise=noise), wanted[seed])


def test_a_graph_that_finds_no_room_is_launched(memory: Memory) -> None:
    """The same bits, and no error."""
    policy, twin = (make("tiny", lanes=LANES, backend="cuda", steps=STEPS) for _ in range(2))
    for seed in range(3):
        obs, noise = random_inputs(config("tiny"), seed, lanes=LANES, steps=STEPS)
        wanted = twin(obs, noise=noise)
        if seed:
            np.testing.assert_array_equal(policy(obs, noise=noise), wanted)
            continue
        for came in memory.failures(
            lambda obs=obs, z=noise: (policy.reset(), policy(obs, noise=z))
        ):
            np.testing.assert_array_equal(came[1], wanted)


@pytest.mark.parametrize("blocks", ["0", "2"])
def test_a_capture_that_cannot_begin_does_nothing(memory: Memory, blas: str, blocks: str) -> None:
    """The sample is the caller's, on the GPU, and copied once: what is done in place of a capture,
    and then launched, would begin with the chunk's result."""
    library = test_device_arrays.Library(blas)
    with device.setting("TSAD_CUDA_ONE_KERNEL", blocks):
        policy, twin = (make("tiny", lanes=LANES, backend="cuda", steps=STEPS) for _ in range(2))
    obs, noise = random_inputs(config("tiny"), 0, lanes=LANES, steps=STEPS)
    wanted = twin(obs, noise=noise)
    there = test_device_arrays.TorchArray(library, noise, library.own)
    one_obs, one_noise = random_inputs(config("tiny"), 1, lanes=1, steps=STEPS)
    policy(one_obs, noise=one_noise, lanes=[0])  # of two such lists there is room then

    def call() -> Any:
        policy.reset()
        return policy(obs, noise=there)

    with test_device_arrays.current_stream(library):
        came = list(memory.failures(call))
    assert len(came) == 3  # the list's memory or the graph, where it begins, and none
    for actions in came:
        if isinstance(actions, str):
            assert blocks == "2" and "out of memory" in actions
        else:
            np.testing.assert_array_equal(actions, wanted)


@pytest.mark.parametrize("graphs", ["0", "1"])
@pytest.mark.parametrize("blocks", ["0", "2"])
def test_a_copy_that_fails_is_said(blas: str, blocks: str, graphs: str) -> None:
    """Each in turn, also where it comes before what is captured: no failure of a capture, after
    which all is launched with what was not copied."""
    fail = ctypes.CDLL(blas).tsad_emulate_fail_copy
    fail.argtypes, fail.restype = [ctypes.c_long], ctypes.c_long
    obs, noise = random_inputs(config("tiny"), 0, lanes=LANES, steps=STEPS)
    plan = np.full((STEPS, 6), REUSE_STEP, np.uint8)
    plan[0] = COMPUTE  # with sources, which are copied before
    failures = 0
    for n in range(20):
        with (
            device.setting("TSAD_CUDA_ONE_KERNEL", blocks),
            device.setting("TSAD_CUDA_GRAPHS", graphs),
        ):
            policy, twin = (
                make("tiny", lanes=LANES, backend="cuda", steps=STEPS) for _ in range(2)
            )
        for lane in range(LANES):
            policy._set_plan(lane, plan, plan)
            twin._set_plan(lane, plan, plan)
        wanted = twin(obs, noise=noise)
        fail(n)
        try:
            came = policy(obs, noise=noise)
        except RuntimeError as error:
            assert "cuda: upload: " in str(error)
            failures += 1
            fail(-1)
            policy.reset()
            came = policy(obs, noise=noise)
        finally:
            left = fail(-1)
        np.testing.assert_array_equal(came, wanted)
        if left >= 0 and n >= failures:
            break
    assert failures >= 2


def check_another_gpu(path: str) -> None:
    """As after torch.cuda.set_device(1): all is done on ours, and the thread keeps its own. (What a
    planted fault must not pass, cuda_mutants.py.)"""
    current = ctypes.CDLL(path).tsad_emulate_device
    try:
        current(1)
        library = test_device_arrays.Library(path)
        with test_device_arrays.current_stream(library):
            test_device_arrays.check_places(library, "unet")
            own = make_policy(lanes=LANES, steps=STEPS, backend="cuda")
            shape = (LANES, own.n_action_steps, own.action_dim)
            zeros = np.zeros(shape, np.float32)
            out = test_device_arrays.TorchArray(library, zeros, library.own)
            with queue(path, 0):
                before = library.waiting(library.own)  # type: ignore[attr-defined]
                own(observations(own, 0), out=out)
                # what comes next there waits for the chunk, and the host did not
                assert library.waiting(library.own) == before + 1  # type: ignore[attr-defined]
        policy = make("tiny_encoder", lanes=LANES, backend="cuda", steps=STEPS, pruner=True)
        dense = np.full((STEPS, policy.n_blocks), COMPUTE, np.uint8)
        sources = dense.copy()
        sources[1:, 2] = REUSE_ROLLOUT
        policy._set_plan(0, sources, dense)
        for seed in range(3):  # a graph that is made and two that are launched
            obs, noise = random_inputs(config("tiny_encoder"), seed, lanes=LANES, steps=STEPS)
            policy(obs, noise=noise)
            assert current(1) == 1
        policy._pruner_scores(obs[0])
        policy.predict_noise(noise[0], 1, obs)
        del policy
        gc.collect()
        assert current(1) == 1
    finally:
        current(0)


def test_a_thread_may_work_with_another_gpu(blas: str) -> None:
    check_another_gpu(blas)
