"""Capsules that lie, a fuzzer of what decides about them, and NumPy's relatives."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dlpack_maker import Producer, array
from policies import make_policy, observations
from test_warm import make as make_warm

from tsad import Plan, _core

F = np.float32
FUZZ = Path(__file__).parent / "fuzz"
CORE = Path(__file__).parents[1] / "csrc" / "python"


def policies() -> list[Any]:
    return [make_policy(), make_warm()]


# ---- NumPy's relatives


def test_masked_arrays_are_refused() -> None:
    """The numbers under a mask mean nothing."""
    for policy in policies():
        obs = observations(policy, 0)
        for masked in (np.ma.array(obs, mask=obs > 0), np.ma.array(obs)):
            message = r"obs: expected plain numbers, got a masked array.*use obs.filled\(value\)"
            with pytest.raises(TypeError, match=message):
                policy(masked)


def test_a_plan_of_a_masked_array_is_refused() -> None:
    for masked in (np.ma.array([[0, 2]], mask=[[0, 1]]), np.ma.array([[0, 0]])):
        with pytest.raises(TypeError, match=r"sources: .*masked array.*use sources.filled\("):
            Plan(masked)
        with pytest.raises(TypeError, match=r"first: .*masked array.*use first.filled\("):
            Plan(np.zeros((1, 2), int), first=masked)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("kind", ["matrix", "subclass", "read-only subclass", "memmap", "recarray"])
def test_subclasses_are_arrays(kind: str, tmp_path: Any) -> None:
    class Mine(np.ndarray):
        pass

    x = array((2, 3))
    path = tmp_path / "x"
    x.tofile(path)
    frozen = x.view(Mine)
    frozen.flags.writeable = False
    given = {
        "matrix": np.asmatrix(x),
        "subclass": x.view(Mine),
        "read-only subclass": frozen,
        "memmap": np.memmap(path, F, "r", shape=x.shape),
        "recarray": np.rec.array(x),
    }[kind]
    np.testing.assert_array_equal(_core._copy(given, "x"), x)
    assert _core._borrow(given)["ptr"] == given.ctypes.data
    assert _core._borrow(given)["read_only"] == (not given.flags.writeable)
    with pytest.raises(TypeError, match="x: expected float32, got >f4"):
        _core._copy(given.astype(">f4"), "x")


# ---- capsules that lie


def set_field(**fields: Any) -> Callable[[Any], None]:
    def change(producer: Any) -> None:
        for name, value in fields.items():
            setattr(producer.tensor, name, value)

    return change


def set_sizes(*sizes: int) -> Callable[[Any], None]:
    def change(producer: Any) -> None:
        producer.tensor.ndim = len(sizes)
        producer._shape = (ctypes.c_int64 * len(sizes))(*sizes)
        producer.tensor.shape = producer._shape
        producer.tensor.strides = None

    return change


INT64 = 2**63 - 1
LIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "no data": ("got none", set_field(data=None)),
    "no data but an offset": ("got none", set_field(data=None, byte_offset=64)),
    "the first page": ("got none", set_field(data=8)),
    "an offset into the first page": ("got none", set_field(data=4, byte_offset=4000)),
    "no shape": (r"got a capsule without a shape", set_field(shape=None)),
    "negative rank": ("expected at most 8 dimensions, got -1", set_field(ndim=-1)),
    "least rank": ("expected at most 8 dimensions", set_field(ndim=-(2**31))),
    "huge rank": ("expected at most 8 dimensions", set_field(ndim=2**31 - 1)),
    "negative size": ("got a negative size", set_sizes(2, -3)),
    "negative sizes": ("got a negative size", set_sizes(-2, -3)),
    "least size": ("got a negative size", set_sizes(-(2**63))),
    "too many numbers": ("got more bytes than memory has", set_sizes(2**62)),
    "a product beyond": ("got more bytes than memory has", set_sizes(2**32, 2**32)),
    "a product of 0": ("got more bytes than memory has", set_sizes(2**31, 2**31, 2**31)),
    "a product that wraps": ("more bytes", set_sizes(2**33, 2**31, 6)),
    "huge beside nothing": ("more bytes", set_sizes(0, INT64, INT64)),
    "the end of memory": ("more bytes", set_field(data=2**64 - 16)),
    "an offset beyond memory": ("more bytes", set_field(byte_offset=2**64 - 64)),
    "between numbers": ("expected aligned memory", set_field(byte_offset=2)),
    "on a device": (
        "expected memory of the CPU.*got cuda:3",
        set_field(device_type=2, device_id=3),
    ),
    "on no device": ("expected memory of the CPU.*type 0", set_field(device_type=0)),
    "on a negative device": ("expected memory of the CPU", set_field(device_type=-1)),
    "33 bits": ("expected float32, got float33", set_field(bits=33)),
    "no bits": ("expected float32, got float0", set_field(bits=0)),
    "two lanes": (r"expected float32, got DLPack \(2, 32, 2\)", set_field(lanes=2)),
    "no lanes": (r"expected float32, got DLPack \(2, 32, 0\)", set_field(lanes=0)),
    "another code": ("expected float32, got opaque32", set_field(code=3)),
    "an unknown code": (r"got DLPack \(200, 32, 1\)", set_field(code=200)),
}


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_capsules_that_lie(lie: str, versioned: bool) -> None:
    message, change = LIES[lie]
    for policy in policies():
        producer = Producer(array((2, 3)), versioned=versioned)
        change(producer)
        for arguments in (
            {"obs": producer},
            {"obs": observations(policy, 0), "noise": producer},
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                policy(**arguments)
    if lie != "no lanes":
        with pytest.raises((TypeError, ValueError)):
            make_policy()(observations(policy, 0), out=producer)
    assert producer.deleted == producer.exports > 0


@pytest.mark.parametrize("versioned", [False, True])
def test_capsules_that_say_little(versioned: bool) -> None:
    nothing = Producer(np.empty((0, 3), F), versioned=versioned)
    nothing.tensor.data = None
    assert _core._copy(nothing, "x").shape == (0, 3)
    scalar = Producer(np.array(5, F), versioned=versioned)
    scalar.tensor.shape = None
    scalar.tensor.strides = None
    assert _core._copy(scalar, "x") == 5
    odd = Producer(np.ones((1, 3), F), versioned=versioned)
    odd._strides[0] = -(2**63)  # of a size of 1: never taken
    assert _core._copy(odd, "x").tolist() == [[1, 1, 1]]


# ---- by chance

NEAR = [0, 1, 2, 3, 4, 5, 8, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**63 - 1]
SIGNED = [*NEAR, *(-n for n in NEAR), -(2**63)]
FIELDS: dict[str, list[int]] = {
    "data": [0, 1, 2, 4, 4095, 4096, 2**47, 2**63, 2**64 - 4096, 2**64 - 4],
    "byte_offset": [*NEAR, 4096, 2**63, 2**64 - 4096, 2**64 - 1],
    "device_type": [0, 1, 2, 3, 10, 11, 12, -1, 2**31 - 1, -(2**31)],
    "ndim": [*range(-2, 11), 2**31 - 1, -(2**31)],
    "code": [0, 1, 2, 3, 6, 255],
    "bits": [0, 8, 16, 31, 32, 33, 64, 255],
    "lanes": [0, 1, 2, 2**16 - 1],
}


def is_readable(tensor: Any, sizes: Any, strides: Any) -> bool:
    """In Python's integers, which do not wrap. Numbers of any kind, in whole bytes."""
    rank, bits, end = tensor.ndim, tensor.bits * tensor.lanes, 2**64 - 1
    if tensor.device_type not in (1, 3, 11) or bits % 8 or not bits or not 0 <= rank <= 8:
        return False
    sizes, item = sizes[:rank], bits // 8
    most = item * math.prod(n for n in sizes if n)
    if (rank and not tensor.shape) or min(sizes, default=0) < 0 or most >= 2**63:
        return False
    if 0 in sizes:
        return True
    own = [math.prod(sizes[i + 1 :]) for i in range(rank)]
    row = all(s == o or n == 1 for s, o, n in zip(strides, own, sizes, strict=False))
    begin = (tensor.data or 0) + tensor.byte_offset
    fits = 4096 <= begin and begin + most <= end and tensor.byte_offset < 2**63
    return (
        bool(tensor.data) and fits and begin % (item & -item) == 0 and (not tensor.strides or row)
    )


def random_capsule(random: Any) -> tuple[Any, list[int], list[int], Any]:
    """A producer with up to three lies, its sizes and strides, and the array behind it."""
    x = array(tuple(random.integers(0, 4, random.integers(0, 9))))
    producer = Producer(x, versioned=bool(random.integers(2)))
    own = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    sizes, strides = (ctypes.c_int64 * 8)(*x.shape), (ctypes.c_int64 * 8)(*own)
    tensor = producer.tensor
    tensor.shape, tensor.strides = sizes, strides
    for _ in range(random.integers(0, 4)):
        kind = random.integers(4)
        if kind == 0:
            field = str(random.choice(list(FIELDS)))
            setattr(tensor, field, FIELDS[field][random.integers(len(FIELDS[field]))])
        elif kind == 1:
            setattr(tensor, "shape" if random.integers(2) else "strides", None)
        else:
            numbers = sizes if kind == 2 else strides
            numbers[random.integers(8)] = SIGNED[random.integers(len(SIGNED))]
    return producer, list(sizes), list(strides), x


def check_random_capsules(seed: int, n: int) -> int:
    """How many were accepted. `_borrow` only looks; what lies in the array is read as well."""
    random, accepted = np.random.default_rng(seed), 0
    for _ in range(n):
        producer, sizes, strides, x = random_capsule(random)
        tensor = producer.tensor
        try:
            seen = _core._borrow(producer)
        except (TypeError, ValueError):
            seen = None
        expected = is_readable(tensor, sizes, strides)
        assert (seen is not None) == expected, (tensor.ndim, sizes, strides, tensor.data)
        if seen is not None:
            accepted += 1
            assert seen["shape"] == tuple(sizes[: tensor.ndim])
            begin = (tensor.data or 0) + tensor.byte_offset
            assert seen["ptr"] == (0 if 0 in seen["shape"] else begin)
            first, bytes_ = x.ctypes.data, 4 * math.prod(seen["shape"])
            inside = first <= begin and begin + bytes_ <= first + x.nbytes
            if seen["dtype"] == "float32" and (inside or not bytes_):
                at = (begin - first) // 4
                flat = x.ravel()[at : at + bytes_ // 4]
                got = _core._copy(producer, "x")
                assert got.shape == seen["shape"]
                np.testing.assert_array_equal(got.ravel(), flat)
        assert producer.deleted == producer.exports > 0
    return accepted


def test_random_capsules() -> None:
    assert 250 < check_random_capsules(0, 2000) < 1750


@pytest.mark.skipif(not CORE.is_dir(), reason="needs the source tree")
def test_the_fuzzers_corpus_and_changes_of_it(tmp_path: Path) -> None:
    """tests/fuzz/capsule.c without libFuzzer, under the sanitizers of whatever compiler is here."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program = tmp_path / "fuzz-capsule"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    sources = [FUZZ / "capsule.c", CORE / "dlpack_check.c"]
    build = [compiler, "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", *sanitize]
    subprocess.run([*build, "-DALONE", f"-I{CORE}", *sources, "-o", program], check=True)
    corpus = sorted((FUZZ / "capsule").iterdir())
    environment = {name: x for name, x in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [program, str(200_000 // len(corpus)), *corpus],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) >= 200_000
