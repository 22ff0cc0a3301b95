"""Arrays in the device's memory, on the emulated GPU, whose memory the host can't touch.

What is asked of another library's stream waits there until somebody waits for that stream: who
reads too early reads nothing that was written.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_unet1d as unet
from dlpack_maker import CUDA, Producer
from policies import make_policy, noises, observations, save_policy, state
from test_fit import made_up

import tsad
from tsad import Recorder, _core, device

DEFAULT = 1


class Library:
    """Another library: streams and memory."""

    def __init__(self, path: str) -> None:
        lib = ctypes.CDLL(path)
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        for name, result, arguments in (
            ("memory", pointer, [size]), ("free", ctypes.c_int, [pointer]), ("stream", pointer, []),
            ("write", None, [pointer, pointer, pointer, size]),
            ("read", ctypes.c_int, [pointer, pointer, pointer, size]),
            ("waiting", size, [pointer]), ("capture", None, [pointer, ctypes.c_int]),
        ):  # fmt: skip
            function = getattr(lib, f"tsad_emulate_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.own = int(self.stream())  # type: ignore[attr-defined]

    def array(self, values: Any, stream: int = DEFAULT, **options: Any) -> DeviceArray:
        return DeviceArray(self, values, stream, **options)


class DeviceArray(Producer):
    """An array of it, filled on a stream. `asked_stream`: what `__dlpack__` was given."""

    def __init__(self, library: Any, values: Any, stream: int, **options: Any) -> None:
        self.library, self.host = library, values
        self.memory = library.memory(max(values.nbytes, 1))
        there = SimpleNamespace(
            ndim=values.ndim, shape=values.shape, itemsize=values.itemsize, dtype=values.dtype,
            strides=values.strides, ctypes=SimpleNamespace(data=self.memory),
        )  # fmt: skip
        super().__init__(there, **{"device": (CUDA, 0), **options})
        flat = np.ascontiguousarray(values)
        library.write(stream, self.memory, flat.ctypes.data, flat.nbytes)
        self.asked_stream: Any = None

    def __dlpack__(self, **keywords: Any) -> Any:
        self.asked_stream = keywords.pop("stream")
        return super().__dlpack__(**keywords)

    def read(self, stream: int = DEFAULT) -> Any:
        out = np.empty(self.host.shape, np.float32)
        assert self.library.read(stream, out.ctypes.data, self.memory, out.nbytes) == 0
        return out


class TorchArray(DeviceArray):
    """One that says it is torch's."""

    __module__ = "torch.emulated"

    def is_conj(self) -> bool:
        return False

    is_neg = is_conj

    def untyped_storage(self) -> Any:
        return SimpleNamespace(data_ptr=lambda: self.memory, nbytes=lambda: self.host.nbytes)


@pytest.fixture
def library(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    assert device.cuda().absent is None
    return Library(emulated_cuda)


@pytest.fixture
def policy(library: Any) -> Any:
    return make_policy(lanes=2, steps=2, backend="cuda")


@pytest.mark.parametrize("versioned", [False, True])
def test_arrays_on_the_device_are_read_and_written(
    policy: Any, library: Any, versioned: bool
) -> None:
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    there = [library.array(x, versioned=versioned) for x in (obs, noise)]
    got = policy(there[0], noise=there[1])
    assert type(got) is np.ndarray and np.array_equal(got, expected)
    out = library.array(np.full_like(expected, 7), versioned=versioned)
    assert policy(obs, noise=there[1], out=out) is out  # some here, some there
    assert np.array_equal(out.read(), expected)
    assert all(x.exports == x.deleted > 0 and x.asked_stream == DEFAULT for x in (*there, out))
    alone = policy.predict_noise(library.array(noise[0]), 1, there[0])
    assert np.array_equal(alone, policy.predict_noise(noise[0], 1, obs))


@contextlib.contextmanager
def current_stream(library: Library) -> Iterator[Any]:
    """torch's, `.cuda_stream`: one of its own, or 0, its word for the default one."""
    torch = pytest.importorskip("torch")
    stream = SimpleNamespace(cuda_stream=library.own)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_stream", lambda index: stream)
        yield stream


@pytest.fixture
def torch_stream(library: Any) -> Iterator[Any]:
    with current_stream(library) as stream:
        yield stream


def test_work_goes_on_the_callers_stream(policy: Any, library: Any, torch_stream: Any) -> None:
    """torch's current one: what it holds is read, and the call returns before that is there."""
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    given = TorchArray(library, obs, library.own)  # on that stream, and not yet there
    out = TorchArray(library, np.zeros_like(expected), library.own)
    assert library.waiting(library.own) == 2
    before = device.counts()
    assert policy(given, noise=noise, out=out) is out
    asked = device.counts().since(before)
    assert (asked.waits, asked.graphs, asked.uploads, asked.downloads) == (0, 1, 1, 1)
    assert given.asked_stream == out.asked_stream == library.own
    assert library.waiting(library.own) == 3  # and that what comes next waits for the chunk
    assert np.array_equal(out.read(library.own), expected)
    torch_stream.cuda_stream = 0
    policy(TorchArray(library, obs, DEFAULT), noise=noise, out=out)
    assert out.asked_stream == DEFAULT and np.array_equal(out.read(), expected)


def made(library: Any, family: str, **options: Any) -> Any:
    """A policy of two lanes whose numbers are normalised in every way."""
    if family == "unet":
        shape, rng = unet.SHAPES["bias_only"], np.random.default_rng(0)
        affine = {
            f"{name}_{part}": rng.uniform(0.5, 2, size).astype(np.float32)
            for name, size in (("obs", shape.obs_dim), ("action", shape.action_dim))
            for part in ("scale", "offset", "shift")
        }
        return unet.make(shape, shape.weights(1), K=2, lanes=2, backend="cuda", **affine)
    if (warm := options.pop("fitted", None)) is not None:
        options |= {"fitted": made_up("tiny", "ddim", warm or None), "sampler": "ddim", "steps": 5}
    return make_policy(**{"lanes": 2, "steps": 2, "backend": "cuda"} | options)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "unet": ("unet", {}),
    "warm start": ("transformer", {"sampler": "ddim", "warm_start": 1}),
    "pruner": ("transformer", {"pruner": True}),
    "lead": ("transformer", {"lead": 0.2, "smoothing": True}),
    "smoothing": ("transformer", {"name": "tiny_now", "smoothing": True}),  # from action 0 on
    "fitted": ("transformer", {"fitted": 0, "clip": True, "lead": 0.3}),
    "fitted, warm": (
        "transformer",
        {"fitted": 3, "warm_start": 3, "clip": True, "lead": 0.5, "smoothing": True},
    ),
}


def given_noise(policy: Any, kind: str, seed: int) -> Any:
    noise = {} if kind == "drawn" else {"noise": noises(policy, seed)}
    return {"noise": noise["noise"][0]} if kind == "initial" else noise


def check_places(library: Library, kind: str) -> None:
    """Bit for bit, over an episode: each argument here or there, calls that nobody waits for."""
    here, there = (made(library, KINDS[kind][0], **KINDS[kind][1]) for _ in range(2))
    if kind == "pruner":
        for policy in (here, there):
            policy.planner = "pruner"
    for policy in (here, there):
        policy.reset(seed=3)
    written, expected = [], []
    for turn in range(8):  # obs, noise and out here or there, in every combination
        whole = turn % 2 == 1
        noise = given_noise(here, ("drawn", "initial", "whole")[turn % 3], 10 + turn)
        obs = observations(here, turn)
        if isinstance(here, tsad.SparsePolicy) and (here.warm_start or here.lead):
            noise["executed"] = [turn % 5, 2]
        expected.append(here(obs, **noise, return_horizon=whole))
        there_obs = TorchArray(library, obs, library.own) if turn & 1 else obs
        if turn & 2 and "noise" in noise:
            noise["noise"] = TorchArray(library, noise["noise"], library.own)
        if turn & 4:
            out = TorchArray(library, np.zeros_like(expected[-1]), library.own)
            written.append(there(there_obs, **noise, out=out, return_horizon=whole))
        else:
            written.append(there(there_obs, **noise, return_horizon=whole))
    for got, right in zip(written, expected, strict=True):
        there_too = isinstance(got, DeviceArray)
        np.testing.assert_array_equal(got.read(library.own) if there_too else got, right)


@pytest.mark.parametrize("kind", KINDS)
def test_where_arrays_are_makes_no_difference(library: Any, torch_stream: Any, kind: str) -> None:
    check_places(library, kind)


def test_gangs_of_lanes_are_written_each(library: Any, torch_stream: Any) -> None:
    """Four go together; what the last ones make is not waited for."""
    policy = make_policy(lanes=6, steps=2, backend="cuda")
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    out = TorchArray(library, np.zeros_like(expected), library.own)
    before = device.counts()
    policy(TorchArray(library, obs, library.own), noise=noise, out=out)
    assert device.counts().since(before).waits == 1
    del policy  # nobody asks it again
    assert np.array_equal(out.read(library.own), expected)


def test_a_fixed_plan_stays_one_graph(policy: Any, library: Any, torch_stream: Any) -> None:
    """Wherever the arrays are, and whichever they are; four small kernels beside it."""
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    for turn in range(3):
        arrays = [TorchArray(library, x, library.own) for x in (obs, noise, expected * 0)]
        before = device.counts()
        policy(arrays[0], noise=arrays[1], out=arrays[2])
        asked = device.counts().since(before)
        lanes, takes, writes = 2, 3, 1  # obs, what the chunk begins with, what the sampler adds
        assert (asked.launches, asked.graphs) == (lanes * (takes + writes), 1), turn
        # the call before is ended: that is the wait
        assert (asked.uploads, asked.downloads, asked.waits) == (0, 1, int(turn > 0))
        assert np.array_equal(arrays[2].read(library.own), expected)


def test_arrays_are_kept_as_long_as_they_may_be_read(
    policy: Any, library: Any, torch_stream: Any
) -> None:
    def call() -> list[Any]:
        shape = (2, policy.n_action_steps, policy.action_dim)
        values = observations(policy, 0), noises(policy, 1), np.zeros(shape, np.float32)
        arrays = [TorchArray(library, x, library.own) for x in values]
        policy(arrays[0], noise=arrays[1], out=arrays[2])
        return arrays

    first, second = call(), call()
    assert [x.deleted for x in (*first, *second)] == [1, 1, 1, 0, 0, 0]
    policy.timings  # noqa: B018  whatever is asked
    assert [x.deleted for x in second] == [1, 1, 1]
    other, last = make_policy(lanes=2, steps=2, backend="cuda"), call()
    other(last[0], out=last[2])
    assert [x.deleted for x in last] == [0, 0, 0]
    del other
    assert [x.deleted for x in last] == [1, 0, 1]


def test_a_stream_that_captures_is_refused(policy: Any, library: Any, torch_stream: Any) -> None:
    obs, noise, out = (TorchArray(library, x, library.own) for x in fresh(policy))
    policy(fresh(policy)[0])
    before = repr(state(policy))
    library.capture(library.own, 1)
    try:
        with pytest.raises(RuntimeError, match="stream: expected one that takes work.*captured"):
            policy(obs, noise=noise, out=out)
    finally:
        library.capture(library.own, 0)
    assert repr(state(policy)) == before


def test_an_unknown_stream_is_waited_for(policy: Any, library: Any) -> None:
    obs, noise = observations(policy, 0), noises(policy, 1)
    out = library.array(np.zeros((2, policy.n_action_steps, policy.action_dim), np.float32))
    policy(obs, noise=noise, out=out)
    assert library.waiting(DEFAULT) == 0


def fresh(policy: Any) -> tuple[Any, Any, Any]:
    shape = (2, policy.n_action_steps, policy.action_dim)
    return observations(policy, 0), noises(policy, 1), np.zeros(shape, np.float32)


NAMES = ("obs", "noise", "out")
WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "another device": (lambda x: x, {"device": (CUDA, 1)}, "the CPU, or of cuda:0, .*got cuda:1"),
    "another kind": (lambda x: x, {"device": (8, 0)}, "or of cuda:0, where.*got metal:0"),
    "float64": (lambda x: x.astype(np.float64), {}, "expected float32, got float64"),
    "strides": (lambda x: x[..., ::-1], {}, "expected a C-contiguous array, got strides"),
    "a shape": (lambda x: x[..., 1:].copy(), {}, "expected shape"),
    "a version": (lambda x: x, {"versioned": True, "major": 2}, "expected DLPack version 1"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_refused_and_changes_nothing(
    policy: Any, library: Any, what: str, name: str
) -> None:
    change, options, message = WRONG[what]
    arrays = dict(zip(NAMES, fresh(policy), strict=True))
    policy(arrays["obs"], noise=arrays["noise"])
    before = repr(state(policy))
    arrays[name] = wrong = library.array(change(arrays[name]), **options)
    with pytest.raises((TypeError, ValueError), match=f"{name}: .*{message}"):
        policy(arrays.pop("obs"), **arrays)
    assert repr(state(policy)) == before and wrong.exports == wrong.deleted


WRONG_NUMBERS: dict[str, tuple[str, Any, float, str]] = {
    "obs": ("obs", (0, 1, 2), np.nan, r"obs: expected finite numbers, got nan at obs\[0, 1, 2\]"),
    "obs, infinite": ("obs", (1, 0, 3), -np.inf, r"got -inf at obs\[1, 0, 3\]; check where"),
    "obs, large": ("obs", (1, 2, 0), 3e30, "obs: expected magnitudes up to 1e.12 after.*row 1, obs"
                   "ervation step 2, element 0"),
    "noise": ("noise", (0, 1, 2, 1), np.inf, r"noise: .* finite .* inf at noise\[0, 1, 2, 1\]"),
    "noise, added": ("noise", (1, 0, 4, 1), np.nan, r"got nan at noise\[1, 0, 4, 1\]"),
    "noise, large": ("noise", (1, 1, 0, 0), -2e12, "noise: expected magnitudes up to 1e.12, got -2e"
                     r".12 at denoising step 1, row 1, action 0, element 0"),
    "initial": ("initial", (1, 3, 0), np.nan, r"got nan at noise\[1, 3, 0\]"),
}  # fmt: skip


def check_numbers(policy: Any, library: Library, what: str) -> None:
    """In the words of arrays on the host. A call that waits raises it; after one that does not,
    `out` is NaN, and the next one raises it. The lanes start anew."""
    name, at, value, message = WRONG_NUMBERS[what]
    obs, noise, out = fresh(policy)
    noise = noise[0] if name == "initial" else noise
    given, lane = (obs if name == "obs" else noise), at[name == "noise"]
    given[at] = value
    with pytest.raises(ValueError, match=message):
        policy(obs, noise=noise)
    place = given[at[0]][lane] if name == "noise" else given[lane]  # what comes later is not said
    place.reshape(-1)[np.ravel_multi_index(at[-2:], place.shape) :] = value
    good = fresh(policy)
    policy(good[0], noise=good[1])
    arrays = [TorchArray(library, x, library.own) for x in (obs, noise, out)]
    with pytest.raises(ValueError, match=f"{message}.*; nothing is returned.*start anew"):
        policy(arrays[0], noise=arrays[1])
    assert [policy._stats(lane)["chunks"] for lane in (0, 1)] == [0, 0]
    assert policy(arrays[0], noise=arrays[1], out=arrays[2]) is arrays[2]
    bad = np.isnan(arrays[2].read(library.own)).all(axis=(1, 2))
    assert bad.tolist() == [lane == 0, lane == 1]
    with pytest.raises(ValueError, match=f"{message}.*; this is of the call before"):
        policy.reset()
    assert [policy._stats(lane)["chunks"] for lane in (0, 1)] == [0, 0]
    right = policy(good[0], noise=good[1])
    there = policy(library.array(good[0]), noise=library.array(good[1]))
    np.testing.assert_array_equal(there, right)


@pytest.mark.parametrize("what", WRONG_NUMBERS)
def test_numbers_are_checked_there_too(
    policy: Any, library: Any, torch_stream: Any, what: str
) -> None:
    check_numbers(policy, library, what)


WRONG_SAMPLES: dict[str, tuple[Any, float, str]] = {
    "sample": ((1, 2, 0), np.nan, r"sample: expected finite numbers, got nan at sample\[1, 2, 0\]"),
    "sample, large": ((0, 1, 1), -2e12, r"sample: expected magnitudes up to 1e.12, got -2e.12 at "
                      "denoising step 1, row 0, action 1, element 1"),
    "obs": ((1, 0, 2), np.inf, r"obs: expected finite numbers, got inf at obs\[1, 0, 2\]"),
}  # fmt: skip


def check_network_alone(policy: Any, library: Library) -> None:
    """`predict_noise` reads both there, after what their stream holds."""
    for seed in range(2):
        obs, sample = observations(policy, seed), noises(policy, seed)[0]
        expected = policy.predict_noise(sample, 1, obs)
        for there in (3, 2, 1):
            given = [
                TorchArray(library, x, library.own) if there & bit else x
                for bit, x in ((1, sample), (2, obs))
            ]
            assert np.array_equal(policy.predict_noise(given[0], 1, given[1]), expected)
        for what, (at, value, message) in WRONG_SAMPLES.items():
            wrong = [sample.copy(), obs.copy()]
            wrong[what == "obs"][at] = value
            there_too = [TorchArray(library, x, library.own) for x in wrong]
            for arrays in (wrong, there_too):
                with pytest.raises(ValueError, match=message):
                    policy.predict_noise(arrays[0], 1, arrays[1])
            assert np.array_equal(policy.predict_noise(sample, 1, obs), expected)


def test_the_network_alone_reads_there(policy: Any, library: Any, torch_stream: Any) -> None:
    check_network_alone(policy, library)
    library.capture(library.own, 1)
    try:
        with pytest.raises(RuntimeError, match="stream: expected one that takes work.*captured"):
            there = TorchArray(library, observations(policy, 0), library.own)
            policy.predict_noise(noises(policy, 0)[0], 1, there)
    finally:
        library.capture(library.own, 0)


@pytest.mark.parametrize("kind", ["lead", "fitted, warm"])
def test_what_is_made_of_actions_is_not_waited_for(
    library: Any, torch_stream: Any, kind: str
) -> None:
    """One more copy in for each lane: what the chunk before has for its actions."""
    policy = made(library, KINDS[kind][0], **KINDS[kind][1])
    for turn in range(4):
        obs, noise = observations(policy, turn), noises(policy, turn)
        shape = (2, policy.n_action_steps, policy.action_dim)
        arrays = [TorchArray(library, x, library.own) for x in (obs, noise)]
        out = TorchArray(library, np.zeros(shape, np.float32), library.own)
        before = device.counts()
        policy(arrays[0], noise=arrays[1], out=out, executed=[turn, 1])
        asked = device.counts().since(before)
    begins = 2 if policy.warm_start else 0
    assert (asked.waits, asked.graphs, asked.uploads) == (1, 1, begins + 2)  # of the call before
    del policy  # what was executed is not the edge's any more
    assert np.isfinite(out.read(library.own)).all()


def check_there(path: str) -> None:
    """A little of everything: what a planted fault must not pass (cuda_mutants.py)."""
    library = Library(path)
    with current_stream(library):
        for kind in ("unet", "warm start", "pruner", "smoothing", "fitted", "fitted, warm"):
            check_places(library, kind)
        policy = make_policy(lanes=2, steps=2, backend="cuda")
        for what in ("obs", "obs, large", "noise, added", "noise, large"):
            check_numbers(policy, library, what)
        check_network_alone(policy, library)


def test_one_lane_without_its_axis(library: Any, torch_stream: Any) -> None:
    policy = make_policy(steps=2, backend="cuda")
    obs = observations(policy, 0)[0]
    policy.reset(seed=0)
    expected = policy(obs)
    policy.reset(seed=0)
    out = TorchArray(library, np.zeros_like(expected), library.own)
    policy(TorchArray(library, obs, library.own), out=out)
    assert np.array_equal(out.read(library.own), expected)
    obs[2, 1] = np.nan
    with pytest.raises(ValueError, match=r"got nan at obs\[2, 1\]; check"):
        policy(library.array(obs))


def test_what_is_not_read_is_not_looked_at(library: Any) -> None:
    """On the host all numbers of a noise must be finite; there, those that the sampler adds."""
    policy = make_policy(steps=3, backend="cuda", sampler="ddim")
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    noise[1:] = np.nan
    np.testing.assert_array_equal(policy(obs, noise=library.array(noise)), expected)


def test_memory_is_not_shared(policy: Any, library: Any) -> None:
    out = fresh(policy)[2]
    read_only = library.array(out, versioned=True, read_only=True)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        policy(fresh(policy)[0], out=read_only)
    both = library.array(np.zeros(64, np.float32))
    small, large = (library.array(x) for x in fresh(policy)[::2])
    small.tensor.data = large.tensor.data = both.memory
    with pytest.raises(ValueError, match="out: expected memory of its own.*overlaps `obs`"):
        policy(small, out=large)


def test_a_recorder_takes_arrays_of_the_host(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so before the policy has run."""
    monkeypatch.setenv("TSAD_TRUST", "1")
    ddim: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 2}
    policy = tsad.load(save_policy(tmp_path / "policy"), device="cuda", lanes=2, **ddim)
    obs, _, out = fresh(policy)
    before = repr(state(policy))
    with Recorder(policy, tmp_path / "recorded") as recorder:
        for name, arguments in (
            ("obs", {"obs": library.array(obs)}),
            ("out", {"obs": obs, "out": library.array(out)}),
        ):
            with pytest.raises(TypeError, match=f"{name}: expected memory of the CPU.*{name}.cpu"):
                recorder(**arguments)
        assert repr(state(policy)) == before
        recorder(obs, out=out)


def test_a_policy_on_the_cpu_refuses_them(library: Any) -> None:
    policy = make_policy(lanes=2, steps=2)
    with pytest.raises(TypeError, match="obs: expected memory of the CPU, where this policy runs"):
        policy(library.array(observations(policy, 0)))
