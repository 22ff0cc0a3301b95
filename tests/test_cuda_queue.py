"""A queue that is full, on the emulated GPU: launches block and work begins while the host goes on,
so that Ctrl-C is heard in the middle of a chunk that is launched row by row.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_cuda
import test_cuda_blas
import test_device_arrays
from cases import PLAN_TOLERANCE, config, random_inputs, relative_error
from cuda_library import pending, queue
from engine import make
from policies import noises, observations
from test_device_arrays import Library, TorchArray, current_stream
from test_interrupts import signalled

from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, _core, device

STEPS = 1000
MOST = 50
"""Launches that wait at most: a few rows, of 1000."""

needs_signals = pytest.mark.skipif(os.name == "nt", reason="signals")


@pytest.fixture(autouse=True)
def cuda(emulated_cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A library of its own: no stream of another test has work in it."""
    library = shutil.copy(emulated_cuda, tmp_path / "emulated.so")
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", str(library))
    _core._load_backend(str(library))
    with queue(str(library), MOST):
        yield str(library)


# ---- in order


@pytest.mark.parametrize("graphs", ["0", "1"])
@pytest.mark.parametrize("most", [1, 2, 7])
def test_chunks_equal_the_cpu_whenever_their_work_begins(most: int, graphs: str, cuda: str) -> None:
    with queue(cuda, most), device.setting("TSAD_CUDA_GRAPHS", graphs):
        test_cuda.check_all()


@pytest.mark.parametrize("most", [1, pytest.param(2, marks=pytest.mark.slow), 7])
def test_arrays_there_are_read_and_written_in_order(most: int, cuda: str) -> None:
    with queue(cuda, most), device.setting("TSAD_CUDA_GRAPHS", "0"):
        test_device_arrays.check_there(cuda)


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 7])
def test_products_of_cublas_are_in_order(most: int, cuda: str) -> None:
    with queue(cuda, most):
        test_cuda_blas.check_blas(cuda)


@pytest.mark.parametrize("most", [0, 1, 7])
def test_a_full_queue_makes_the_host_wait(most: int, cuda: str) -> None:
    """What is under way when a call returns that nobody waits for; a graph is one."""
    library = Library(cuda)
    with current_stream(library), queue(cuda, most):
        for graphs, asked in (("0", 30), ("1", 3)):
            with device.setting("TSAD_CUDA_GRAPHS", graphs):
                policy = make("tiny", backend="cuda", steps=3)
            obs, noise = random_inputs(config("tiny"), 0, steps=3)
            expected = policy(obs, noise=noise)
            out = TorchArray(library, np.zeros_like(expected), library.own)
            assert library.read(library.own, expected.ctypes.data, out.memory, 0) == 0
            assert policy(obs, noise=noise, out=out) is out
            if most:  # of its own and, what waits for it, of the caller's
                assert pending(cuda) <= most + 1
            else:
                assert pending(cuda) >= asked
            np.testing.assert_array_equal(out.read(library.own), expected)


# ---- Ctrl-C


class Heard(NamedTuple):
    launches: int
    pending: int


@contextmanager
def hearing(library: str, number: int, error: type[BaseException] | None) -> Iterator[list[Heard]]:
    """What the GPU was asked for, and how much of it was not done, when the signal was heard."""
    heard: list[Heard] = []

    def hear(*_: Any) -> None:
        heard.append(Heard(device.counts().launches, pending(library)))
        if error is not None:
            raise error

    before = signal.signal(number, hear)
    try:
        yield heard
    finally:
        signal.signal(number, before)


def interrupted(library: str, call: Any, whole: int) -> None:
    """In the middle of `whole` launches: then no more is asked for, little was, and that ends."""
    begun = device.counts()
    with hearing(library, signal.SIGINT, KeyboardInterrupt) as heard, signalled(0.15):
        with pytest.raises(
            KeyboardInterrupt, match="nothing is returned, and its lanes start anew"
        ):
            call()
        assert device.counts().launches == heard[0].launches
    assert len(heard) == 1
    assert heard[0].pending < heard[0].launches - begun.launches < whole * 3 // 4
    assert device.counts().since(begun).graphs == 0
    assert 0 < heard[0].pending <= MOST
    assert pending(library) == 0


def long_policy(
    backend: str | None,
    lanes: int = 1,
    graphs: str = "0",
    pruner: bool = False,
    steps: int = STEPS,
) -> Any:
    """Fixed plans are launched, too, without graphs."""
    with device.setting("TSAD_CUDA_GRAPHS", graphs):
        policy = make(
            "tiny",
            backend=backend,
            lanes=lanes,
            steps=steps,
            num_train_timesteps=steps,
            sampler="ddim",
            prediction_type="sample",
            clip_sample_range=2.0,
            pruner=pruner,
        )
    first = np.full((steps, policy.n_blocks), REUSE_STEP, np.uint8)
    first[::8] = COMPUTE
    later = first.copy()
    later[8::8, 2] = REUSE_ROLLOUT
    for lane in range(lanes):
        policy._set_plan(lane, later, first)
    return policy


@needs_signals
def test_a_plan_that_changes_each_chunk_is_stopped(cuda: str) -> None:
    """A pruner's. The policy goes on as one that was never called."""
    policy, twin, cpu = (long_policy(b, graphs="1", pruner=True) for b in ("cuda", "cuda", None))
    obs, sample = observations(policy, 0), noises(policy, 1)[0]
    out = np.full((1, policy.n_action_steps, policy.action_dim), 7, np.float32)
    policy._set_pruner(0.5)
    interrupted(cuda, lambda: policy(obs, out=out), whole=STEPS * 6)
    assert (out == 7).all() and policy._stats(0)["chunks"] == 0
    np.testing.assert_array_equal(policy._ages(0), twin._ages(0))
    got, same, right = (p.predict_noise(sample, 7, obs) for p in (policy, twin, cpu))
    np.testing.assert_array_equal(got, same)
    assert relative_error(got, right) < PLAN_TOLERANCE
    np.testing.assert_array_equal(policy._pruner_scores(obs[0]), twin._pruner_scores(obs[0]))


@needs_signals
def test_lanes_that_were_not_called_go_on(cuda: str) -> None:
    """Two lanes with earlier rollouts, one of them interrupted; a twin that never heard of it, and
    the CPU."""
    policy, twin, cpu = policies = [long_policy(b, lanes=2) for b in ("cuda", "cuda", None)]
    obs, noise = observations(policy, 0), noises(policy, 1)
    before = device.counts()
    for p in policies:
        p(obs, noise=noise)
    launched = device.counts().since(before).launches // 2
    one = np.ascontiguousarray(noise[:, 1:])
    interrupted(cuda, lambda: policy(obs[1:], noise=one, lanes=[1]), whole=launched)
    for p in (twin, cpu):
        p.reset(lanes=[1])
    for lane in range(2):
        np.testing.assert_array_equal(policy._ages(lane), twin._ages(lane))
    got, same, right = (p(obs, noise=noise) for p in policies)
    np.testing.assert_array_equal(got, same)
    assert relative_error(got, right) < PLAN_TOLERANCE


@needs_signals
def test_arrays_there_are_let_go(cuda: str) -> None:
    """The caller's stream goes on, `out` is as it was, and what was wrong with an array that the
    chunk had read is not said of the next one."""
    library = Library(cuda)
    policy, twin = (long_policy("cuda") for _ in range(2))
    obs, noise = observations(policy, 0), noises(policy, 1)
    seven = np.full((1, policy.n_action_steps, policy.action_dim), 7, np.float32)
    with current_stream(library):
        wrong = np.full_like(obs, np.nan)
        arrays = [TorchArray(library, x, library.own) for x in (wrong, noise, seven)]
        interrupted(
            cuda, lambda: policy(arrays[0], noise=arrays[1], out=arrays[2]), whole=STEPS * 2
        )
        assert [x.deleted for x in arrays] == [x.exports for x in arrays] == [1, 1, 1]
        assert (arrays[2].read(library.own) == 7).all()
        arrays[0] = TorchArray(library, obs, library.own)
        assert policy(arrays[0], noise=arrays[1], out=arrays[2]) is arrays[2]
        np.testing.assert_array_equal(arrays[2].read(library.own), twin(obs, noise=noise))
        policy.reset()  # which says what failed


@needs_signals
def test_out_there_has_the_gangs_that_were_done(cuda: str) -> None:
    """Four lanes of eight, with an `out` that nobody waits for."""
    library = Library(cuda)
    policy, twin = (long_policy("cuda", lanes=8, steps=150) for _ in range(2))
    obs, noise = observations(policy, 0), noises(policy, 1)
    before = device.counts()
    right = twin(obs, noise=noise)
    gang, begun = device.counts().since(before).launches // 2, device.counts()

    def hear(*_: Any) -> None:
        if device.counts().since(begun).launches > gang + MOST:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    handler = signal.signal(signal.SIGALRM, hear)
    try:
        with current_stream(library):
            out = TorchArray(library, np.full_like(right, 7), library.own)
            signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
            with pytest.raises(KeyboardInterrupt, match="lanes start anew"):
                policy(obs, noise=noise, out=out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    written = out.read(library.own)
    np.testing.assert_array_equal(written[:4], right[:4])
    assert (written[4:] == 7).all()
    assert [policy._stats(lane)["chunks"] for lane in range(8)] == [0] * 8


@needs_signals
def test_a_handler_that_returns_changes_nothing(cuda: str) -> None:
    """It is called again and again, and the GPU is never far behind."""
    policy, twin = (long_policy("cuda") for _ in range(2))
    obs, noise = observations(policy, 0), noises(policy, 1)
    with hearing(cuda, signal.SIGALRM, None) as heard:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        try:
            got = policy(obs, noise=noise)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    np.testing.assert_array_equal(got, twin(obs, noise=noise))
    during = [now for now in heard if 0 < now.pending]
    assert all(now.pending <= MOST for now in during)
    assert len({now.launches for now in during}) >= 3
