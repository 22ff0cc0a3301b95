"""Arrays of other libraries: what DLPack cannot say about them, and results in the library that the
observation came in. The right actions are those of plain NumPy arrays with the numbers that the
other library says.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dlpack_maker import Producer
from policies import make_policy, noises, observations
from test_warm import make as make_warm

import tsad
from tsad import _core

F = np.float32
torch: Any = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")


def policies() -> list[Any]:
    return [make_policy(), make_warm()]


# ---- torch: what DLPack cannot say


def lazy_views(x: Any) -> dict[str, Any]:
    """Tensors of the numbers of x whose memory holds others."""
    t = torch.from_numpy(x)
    pairs = torch.complex(t, -t).conj()
    return {
        "negative view": torch._neg_view(-t),
        "in a subclass": torch._neg_view(-t).as_subclass(torch.nn.Parameter),
        "real view of a conjugate": pairs.imag.contiguous(),
    }


@pytest.mark.parametrize("kind", lazy_views(np.zeros((1, 1), F)))
def test_lazy_views_keep_their_sign(kind: str) -> None:
    for policy in policies():
        obs, noise = observations(policy, 0), noises(policy, 1)
        policy.reset(seed=1)
        expected = policy(obs, noise=noise)
        for given in (
            {"obs": lazy_views(obs)[kind], "noise": noise},
            {"obs": obs, "noise": lazy_views(noise)[kind]},
        ):
            policy.reset(seed=1)
            np.testing.assert_array_equal(policy(**given), expected)
    policy = make_policy()
    sample = noises(policy, 1)[0]
    expected = policy.predict_noise(sample, 1, obs)
    got = policy.predict_noise(lazy_views(sample)[kind], 1, lazy_views(obs)[kind])
    np.testing.assert_array_equal(got, expected)


def test_a_conjugate_transpose_of_one_real_part() -> None:
    """The imaginary part of a conjugate, where it happens to be contiguous: one number a row."""
    x = torch.arange(3.0)
    part = torch.complex(x, x)[:1].conj().imag
    assert part.is_neg() and part.is_contiguous()
    assert _core._copy(part, "x").tolist() == part.tolist()
    assert _core._copy(torch._neg_view(x), "x").tolist() == [-0.0, -1.0, -2.0]
    with pytest.raises(TypeError, match="x: expected float32, got complex64"):
        _core._copy(torch.complex(x, x).conj(), "x")


def test_weights_keep_their_sign() -> None:
    import cases

    from tsad.config import PolicyConfig
    from tsad.load import make_model
    from tsad.samplers import make_sampler

    case = cases.config("tiny")
    tensors = cases.random_tensors(case["network"], 0)
    lazy = {name: torch._neg_view(torch.from_numpy(-x)) for name, x in tensors.items()}
    sampler = make_sampler(case["scheduler"], num_inference_steps=4)
    config = PolicyConfig.from_dict(case)
    one, other = (_core.Policy(make_model(config, x, None, sampler)) for x in (tensors, lazy))
    obs, noise = observations(one, 0), noises(one, 1)
    np.testing.assert_array_equal(one(obs, noise=noise), other(obs, noise=noise))


def test_out_must_hold_its_own_numbers() -> None:
    policy = make_policy()
    obs = observations(policy, 0)
    memory = torch.zeros(1, 3, 2)
    message = r"out: expected plain memory, got a lazy view of another tensor \(is_neg\(\) is True"
    with pytest.raises(ValueError, match=message):
        policy(obs, out=torch._neg_view(memory))
    assert not memory.any()
    with pytest.raises(ValueError, match=r"out: .*requires grad; use out.detach\(\)"):
        policy(obs, out=memory.clone().requires_grad_())
    with pytest.raises(TypeError, match="out: expected plain memory, got a masked array"):
        policy(obs, out=np.ma.masked_all((1, 3, 2), F))


def fake(x: Any, part: slice = slice(None)) -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode().from_tensor(torch.from_numpy(np.concatenate([x, x])))[part][:1]


def shrunk(x: Any, size: int) -> Any:
    t = torch.from_numpy(x).clone()
    t.untyped_storage().resize_(size)
    return t


def two(x: Any) -> Any:
    internal = pytest.importorskip("torch.testing._internal.two_tensor")
    return internal.TwoTensor(torch.from_numpy(x), torch.from_numpy(x))


NOWHERE = "NAME: expected an array of numbers in memory, got none .*; pass a plain tensor on the C"
TENSORS: dict[str, tuple[type[Exception], str, Callable[[Any], Any]]] = {
    "double": (
        TypeError,
        r"NAME: expected float32, got float64; use NAME.to\(torch.float32\)",
        lambda x: torch.from_numpy(x).double(),
    ),
    "bfloat16": (TypeError, "got bfloat16", lambda x: torch.from_numpy(x).bfloat16()),
    "half": (TypeError, "got float16", lambda x: torch.from_numpy(x).half()),
    "bool": (TypeError, "got bool", lambda x: torch.from_numpy(x) > 0),
    "complex": (TypeError, "got complex64", lambda x: torch.complex(*2 * [torch.from_numpy(x)])),
    "transposed": (
        ValueError,
        r"use NAME.contiguous\(\)",
        lambda x: torch.from_numpy(x).mT.contiguous().mT,
    ),
    "every second": (
        ValueError,
        r"use NAME.contiguous\(\)",
        lambda x: torch.from_numpy(np.repeat(x, 2, -1))[..., ::2],
    ),
    "expanded": (
        ValueError,
        r"got strides .*0.*; use NAME.contiguous\(\)",
        lambda x: torch.from_numpy(x[..., :1].copy()).expand(x.shape),
    ),
    "requires grad": (
        ValueError,
        r"requires grad; use NAME.detach\(\)",
        lambda x: torch.from_numpy(x).clone().requires_grad_(),
    ),
    "of a graph": (
        ValueError,
        r"requires grad; use NAME.detach\(\)",
        lambda x: torch.from_numpy(x).clone().requires_grad_() * 2,
    ),
    "sparse": (ValueError, r"NAME.to_dense\(\)", lambda x: torch.from_numpy(x).to_sparse()),
    "sparse rows": (ValueError, r"to_dense\(\)", lambda x: torch.from_numpy(x)[0].to_sparse_csr()),
    "oneDNN": (ValueError, r"NAME.to_dense\(\)", lambda x: torch.from_numpy(x).to_mkldnn()),
    "quantized": (
        ValueError,
        r"a quantized tensor; use NAME.dequantize\(\)",
        lambda x: torch.quantize_per_tensor(torch.from_numpy(x), 0.1, 0, torch.quint8),
    ),
    "meta": (
        TypeError,
        "NAME: .*pass a plain tensor on the CPU",
        lambda x: torch.empty_like(torch.from_numpy(x), device="meta"),
    ),
    "fake": (ValueError, NOWHERE, fake),
    "slice of a fake": (ValueError, "NAME: expected an array of n", lambda x: fake(x, slice(1, 2))),
    "functional": (
        ValueError,
        NOWHERE,
        lambda x: torch._to_functional_tensor(torch.from_numpy(x)),
    ),
    "zeros that are not there": (
        ValueError,
        NOWHERE,
        lambda x: torch._efficientzerotensor(x.shape),
    ),
    "a wrapper": (ValueError, NOWHERE, two),
    "without storage": (ValueError, NOWHERE, lambda x: shrunk(x, 0)),
    "with half its storage": (
        ValueError,
        "NAME: .*got a tensor that reaches beyond its storage",
        lambda x: shrunk(x, x.nbytes // 2),
    ),
    "masked": (
        TypeError,
        "NAME: ",
        lambda x: torch.masked.masked_tensor(torch.from_numpy(x), torch.from_numpy(x) > 0),
    ),
    "nested": (TypeError, "NAME: ", lambda x: torch.nested.nested_tensor([torch.from_numpy(x[0])])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_refused(kind: str) -> None:
    error, message, make = TENSORS[kind]
    for place in ("obs", "noise"):
        for policy, twin in zip(policies(), policies(), strict=True):
            obs = observations(policy, 0)
            for one in (policy, twin):
                one.reset(seed=1)
                one(obs)
            x = obs if place == "obs" else np.zeros((policy.model.n_steps, 1, 5, 2), F)
            given = {"obs": obs} | {place: make(x)}
            with pytest.raises(error, match=message.replace("NAME", place)):
                policy(**given)
            np.testing.assert_array_equal(policy(obs), twin(obs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "functionalize"])
def test_inside_a_transform_of_torch(transform: str) -> None:
    """A tensor there stands for others."""
    policy, func = make_policy(), torch.func
    obs = torch.from_numpy(observations(policy, 0))
    calls = {
        "vmap": lambda: torch.vmap(policy)(obs[None]),
        "grad": lambda: func.grad(lambda x: policy(x).sum())(obs),
        "jvp": lambda: func.jvp(policy, (obs,), (obs,)),
        "functionalize": lambda: func.functionalize(policy)(obs),
    }
    with pytest.raises((TypeError, ValueError), match="obs: expected"):
        calls[transform]()
    assert policy(obs).shape == (1, 3, 2)


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_fine() -> None:
    policy = make_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)

    class Mine(torch.Tensor):
        pass

    t = torch.from_numpy(obs)
    with torch.inference_mode():
        inference = t.clone()
    wide = torch.from_numpy(np.concatenate([obs, obs], 1))
    for given in (
        t,
        t.as_subclass(Mine),
        torch.nn.Parameter(t, requires_grad=False),
        inference,
        wide[:, 3:],  # an offset into its storage
        t[None].expand(1, *t.shape)[0],
        t.requires_grad_(False),
        t.clone().requires_grad_().detach(),
    ):
        got = policy(given, noise=noise)
        assert type(got) is torch.Tensor
        np.testing.assert_array_equal(got, expected)
    with torch.no_grad():
        np.testing.assert_array_equal(policy(t, noise=noise), expected)


# ---- results in the library of the observation


def test_torch_gives_torch_and_copies_nothing() -> None:
    for policy, plain in zip(policies(), policies(), strict=True):
        policy.reset(seed=1)
        plain.reset(seed=1)
        for chunk in range(2):
            obs = observations(policy, chunk)
            got, expected = policy(torch.from_numpy(obs)), plain(obs)
            assert type(expected) is np.ndarray and type(got) is torch.Tensor
            assert got.dtype == torch.float32 and got.device.type == "cpu"
            assert not got.requires_grad and got.is_contiguous()
            np.testing.assert_array_equal(got, expected)
        one = policy(torch.from_numpy(obs[0]), return_horizon=True)
        assert one.shape == (policy.horizon, policy.action_dim)
        address, numbers = one.data_ptr(), one.clone()
        gc.collect()
        one += 1  # writable, and alive on its own
        assert one.data_ptr() == address and torch.equal(one, numbers + 1)
        out = np.empty((1, 3, 2), F)
        assert policy(torch.from_numpy(obs), out=out) is out
        empty = policy(torch.from_numpy(obs[:0]), lanes=[])
        assert type(empty) is torch.Tensor and empty.shape == (0, 3, 2)
    policy = make_policy()
    sample, obs = noises(policy, 1)[0], observations(policy, 0)
    got = policy.predict_noise(torch.from_numpy(sample), 2, torch.from_numpy(obs))
    assert type(got) is torch.Tensor
    np.testing.assert_array_equal(got, policy.predict_noise(sample, 2, obs))


def test_the_memory_is_handed_over() -> None:
    """Zero-copy: torch's tensor lies in the NumPy array that the core wrote."""
    memory = np.arange(6, dtype=F)
    handed = _core._hand(memory, torch.zeros(1))
    assert handed.data_ptr() == memory.ctypes.data
    assert _core._hand(memory, memory) is memory
    assert _core._hand(memory, Producer(memory)) is memory
    assert _core._hand(memory, "x") is memory


def test_torch_settings_do_not_move_the_result() -> None:
    policy = make_policy()
    obs = torch.from_numpy(observations(policy, 0))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            got = policy(obs)
    finally:
        torch.set_default_dtype(before)
    assert got.device.type == "cpu" and got.dtype == torch.float32


def test_jax_gives_jax() -> None:
    jax = pytest.importorskip("jax")
    for policy, plain in zip(policies(), policies(), strict=True):
        policy.reset(seed=1)
        plain.reset(seed=1)
        obs = observations(policy, 0)
        got = policy(jax.numpy.asarray(obs))
        assert isinstance(got, jax.Array) and got.dtype == F
        np.testing.assert_array_equal(got, plain(obs))
        empty = policy(jax.numpy.asarray(obs[:0]), lanes=[])
        assert isinstance(empty, jax.Array) and empty.shape == (0, 3, 2)
        with pytest.raises(TypeError, match="obs: expected a float32 array"):
            jax.jit(policy)(obs)


def test_a_library_of_the_array_standard_gives_its_own() -> None:
    """Anything with `__array_namespace__`; without, or where that fails, NumPy."""

    class Library:
        @staticmethod
        def from_dlpack(x: Any) -> Any:
            return "mine", np.from_dlpack(x)

    class Standard(Producer):
        def __array_namespace__(self) -> Any:
            return Library

    class Half(Producer):
        def __array_namespace__(self) -> Any:
            raise RuntimeError("not today")

    policy = make_policy()
    obs, noise = observations(policy, 0), noises(policy, 1)
    expected = policy(obs, noise=noise)
    name, got = policy(Standard(obs), noise=noise)
    assert name == "mine"
    np.testing.assert_array_equal(got, expected)
    for plain in (Half(obs), Producer(obs)):
        assert type(policy(plain, noise=noise)) is np.ndarray


def test_tsad_does_not_import_torch() -> None:
    code = (
        "import sys, numpy, tsad; p = tsad.load('pusht', sampler='ddim', num_inference_steps=1);"
        "p(numpy.zeros((2, 20), 'f')); assert not {'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert tsad.__name__ in sys.modules
