"""Arrays in the device's memory, on the emulated GPU, whose memory the host can't touch.

What is asked of another library's stream waits there until somebody waits for that stream: who
reads too early reads nothing that was written.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dlpack_maker import CUDA, Producer
from policies import make_policy, noises, observations, state

from tsad import _core, device

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
            ("waiting", size, [pointer]),
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


def test_work_goes_on_the_callers_stream(
    policy: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's current one: what it holds is read, and the call returns before `out` is written."""
    torch = pytest.importorskip("torch")
    stream = SimpleNamespace(cuda_stream=library.own)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    given = TorchArray(library, obs, library.own)  # on that stream, and not yet there
    out = TorchArray(library, np.zeros_like(expected), library.own)
    assert library.waiting(library.own) == 2
    policy(given, noise=noise, out=out)
    assert given.asked_stream == out.asked_stream == library.own
    assert library.waiting(library.own) == 1  # what writes it
    assert np.array_equal(out.read(library.own), expected)
    stream.cuda_stream = 0  # torch's word for the default one
    policy(TorchArray(library, obs, DEFAULT), noise=noise, out=out)
    assert out.asked_stream == DEFAULT and np.array_equal(out.read(), expected)


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


def test_numbers_are_checked_there_too(policy: Any, library: Any) -> None:
    obs, noise, out = fresh(policy)
    obs[0, 1, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"obs: expected finite numbers, got nan at obs\[0, 1, 2\]"
    ):
        policy(library.array(obs), noise=noise)
    noise[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="noise: expected finite numbers, got inf"):
        policy(fresh(policy)[0], noise=library.array(noise))
    read_only = library.array(out, versioned=True, read_only=True)
    with pytest.raises(ValueError, match="out: expected a writable array"):
        policy(fresh(policy)[0], out=read_only)
    both = library.array(np.zeros(64, np.float32))
    small, large = (library.array(x) for x in fresh(policy)[::2])
    small.tensor.data = large.tensor.data = both.memory
    with pytest.raises(ValueError, match="out: expected memory of its own.*overlaps `obs`"):
        policy(small, out=large)


def test_a_policy_on_the_cpu_refuses_them(library: Any) -> None:
    policy = make_policy(lanes=2, steps=2)
    with pytest.raises(TypeError, match="obs: expected memory of the CPU, where this policy runs"):
        policy(library.array(observations(policy, 0)))
