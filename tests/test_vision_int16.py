"""Image encoders in 16 bits and with weights of 8: their reference, every path's bits, how far they
are from float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from test_vision_core import CASES, F, pixels, planes
from torch_encoder import Encoder, Weights, encode

from tsad import _core
from tsad.families.resnet import Camera, EncoderConfig
from tsad.reference import conv16, resnet

BITS = {"int16": 16, "int8": 8}
BOUND = {"int16": 5e-3, "int8": 6e-2}
"""Of the largest feature. Of random weights, whose keypoints are not sharp. A weight is off by half
a unit at most, of one in 8 bits 0.4 % of its channel's largest; of all cases but one the features
come to 2.0e-3 and 3.3e-2."""
FEW_PIXELS = {"odd, 34, group": 2}
"""34 layers with GroupNorm over a pixel or two: 2.8e-3, and 8.4e-2. So many times the bound."""

each_precision = pytest.mark.parametrize("precision", BITS)


def make(
    encoder: Encoder, precision: str, weights: Weights | None = None, **more: Any
) -> _core.Vision:
    own = encoder.weights() if weights is None else weights
    return _core.Vision(own, **({"precision": precision} | encoder.arguments() | more))


def reference(encoder: Encoder, precision: str, images: Any) -> Any:
    size = {"height": encoder.height, "width": encoder.width, "resize": None, "crop": None}
    camera = Camera("c", 0, scale=encoder.scale, offset=encoder.offset, **size)  # type: ignore[arg-type]
    config = EncoderConfig(
        f"resnet{encoder.depth}", encoder.norm, encoder.keypoints, encoder.features
    )
    return resnet.encode(encoder.weights(), config, camera, images, bits=BITS[precision])


@each_precision
@pytest.mark.parametrize("backend", _core.backends())
@pytest.mark.parametrize("case", CASES)
def test_features_are_near_torchs(case: str, backend: str, precision: str) -> None:
    encoder, n = CASES[case]
    images = planes(pixels(encoder, n))
    expected = encode(encoder, encoder.weights(), images).numpy()
    got = make(encoder, precision, backend=backend).encode(images)
    bound = BOUND[precision] * FEW_PIXELS.get(case, 1)
    assert np.abs(got - expected).max() <= bound * np.abs(expected).max()
    if min(encoder.height, encoder.width) > 8:  # it is in these bits
        exact = make(encoder, "float32" if precision == "int16" else "int16", backend=backend)
        assert np.abs(got - exact.encode(images)).max() > 1e-6


@each_precision
@pytest.mark.parametrize("case", CASES)
def test_every_path_makes_the_same_trunk(case: str, precision: str) -> None:
    """Up to the head, which is float32: no rounding may fall to another integer."""
    encoder, n = CASES[case]
    images = pixels(encoder, n)
    paths = [make(encoder, precision, backend=name) for name in _core.backends()]
    first, *others = [vision.encode(images) for vision in paths]
    for other in others:
        np.testing.assert_allclose(other, first, atol=2e-6 * np.abs(first).max())


@each_precision
@pytest.mark.parametrize("case", ["lerobot", "96", "34", "small", "one pixel", "large windows"])
def test_the_reference_is_the_core(case: str, precision: str) -> None:
    encoder, n = CASES[case]
    images = pixels(encoder, n)
    expected = reference(encoder, precision, images)
    np.testing.assert_allclose(
        make(encoder, precision).encode(images), expected, atol=5e-6 * np.abs(expected).max()
    )


@each_precision
def test_the_reference_is_the_core_with_a_group_norm(precision: str) -> None:
    """Whose sums differ in their last bit, so that some numbers are rounded to the next integer."""
    encoder = Encoder(norm="group", height=76, width=76)
    images = pixels(encoder, 2)
    expected = reference(encoder, precision, images)
    right = encode(encoder, encoder.weights(), planes(images)).numpy()
    apart = np.abs(make(encoder, precision).encode(images) - expected).max()
    assert apart <= np.abs(expected - right).max()


@each_precision
@pytest.mark.parametrize("backend", _core.backends())
@pytest.mark.parametrize("norm", ["folded", "group"])
def test_bits_depend_on_neither_threads_nor_company(
    backend: str, norm: str, precision: str
) -> None:
    encoder = Encoder(norm=norm, height=60, width=52, keypoints=3, features=5, relu=False)
    n = 3 if backend == "ref" else 9
    images = pixels(encoder, n)
    images[1] //= 16  # an image's units are its own
    expected = make(encoder, precision, backend=backend).encode(images)
    for threads in (2, 4):
        vision = make(encoder, precision, backend=backend, threads=threads)
        np.testing.assert_array_equal(vision.encode(images), expected)
        for i in (0, 1, n - 1):
            np.testing.assert_array_equal(vision.encode(images[i : i + 1]), expected[i : i + 1])
    alone = make(encoder, precision, backend=backend)
    np.testing.assert_array_equal(alone.encode(planes(images)), expected)


def largest_sums(weight: Any, signed: bool, bits: int) -> int:
    """The largest that a window's part can come to, on the way to its sum as well."""
    rows = np.moveaxis(weight, 1, 3).reshape(len(weight), -1)
    _, integers = conv16.round_weights(rows, weight.shape[1], signed, bits)
    assert np.abs(integers).max() <= 2 ** (bits - 1) - 1
    most = 0
    for at in conv16.parts(rows.shape[1], weight.shape[1]):
        part = integers[:, at]
        sides = np.maximum(part, 0).sum(1), np.maximum(-part, 0).sum(1)
        most = max(most, int((sum(sides) if signed else np.maximum(*sides)).max()))
    return most * conv16.INPUT


@each_precision
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    "shape",
    [(5, 3, 7, 7), (4, 64, 3, 3), (4, 128, 3, 3), (4, 512, 3, 3), (3, 256, 1, 1), (3, 13, 7, 7)],
)
def test_no_sum_passes_32_bits(shape: Any, signed: bool, precision: str) -> None:
    rng = np.random.default_rng(0)
    for weight in (rng.standard_normal(shape), np.ones(shape), rng.uniform(0, 1, shape) ** 8):
        assert largest_sums(weight.astype(F), signed, BITS[precision]) < 2**31


@each_precision
@pytest.mark.parametrize("backend", _core.backends())
def test_sums_at_their_largest(backend: str, precision: str) -> None:
    """White images and equal weights: every product is as large as it can be."""
    for size in (36, 20):  # with Winograd's form, and without
        encoder = Encoder(height=size, width=size, keypoints=2, features=3, scale=(1.0,) * 3,
                          offset=(0.0,) * 3)  # fmt: skip
        weights = encoder.weights()
        for name, value in weights.items():
            if name.startswith(("conv", "layer")):
                fill = 1 / value[0].size if name.endswith("weight") else 0
                weights[name] = np.full_like(value, fill)
        images = np.full((1, size, size, 3), 255, np.uint8)
        images[:, 3:7, 2:9] = 0
        expected = encode(encoder, weights, planes(images)).numpy()
        got = make(encoder, precision, weights, backend=backend).encode(images)
        assert np.abs(got - expected).max() <= 1e-3 * np.abs(expected).max()


@each_precision
def test_nothing_and_nearly_nothing(precision: str) -> None:
    encoder = Encoder(height=40, width=40, offset=(0.0,) * 3, keypoints=3, features=5)
    weights = {
        name: np.zeros_like(w) if name.endswith("bias") else w
        for name, w in encoder.weights().items()
    }
    black = np.zeros((1, 40, 40, 3), np.uint8)
    for backend in _core.backends():
        vision = make(encoder, precision, weights, backend=backend)
        np.testing.assert_allclose(
            vision.encode(black), encode(encoder, weights, planes(black)).numpy(), atol=1e-6
        )
    tiny = weights | {"conv1.weight": weights["conv1.weight"] * F(1e-38)}
    images = pixels(encoder, 1)
    assert np.isfinite(make(encoder, precision, tiny).encode(images)).all()


@each_precision
def test_numbers_that_overflow_are_seen(precision: str) -> None:
    encoder = Encoder(height=36, width=40, keypoints=3, features=5)
    weights = encoder.weights()
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"):
        weights[f"{name}.weight"] = np.full_like(weights[f"{name}.weight"], 1e12)
    for backend in _core.backends():
        with pytest.raises(RuntimeError, match=r"overflowed in the features of images\[0\]"):
            make(encoder, precision, weights, backend=backend).encode(pixels(encoder, 1))


def test_its_weights_take_about_half_and_a_quarter() -> None:
    whole, half, quarter = (make(Encoder(), name).weight_bytes for name in ("float32", *BITS))
    assert half < 0.6 * whole and quarter < 0.3 * whole


def test_a_trained_policys_features_and_actions() -> None:
    """Of the bundled policy that sees, on what its simulator shows: far nearer than random ones.

    Measured: features within 4.9e-5, with weights of 8 bits 6.5e-4; actions of 0 to 512 within 0.03
    and 0.5 in ten steps of DDIM, the latter in one image, in the others 0.07.
    """
    pytest.importorskip("gym_pusht")
    import tsad
    from tsad import sim

    world = sim.make("pusht_pixels")
    whole, half, quarter = (
        tsad.load("pusht_pixels", sampler="ddim", num_inference_steps=10, vision_precision=name)
        for name in ("float32", *BITS)
    )
    for seed in range(100000, 100012):
        seen = world.reset(seed)
        obs: dict[str, Any] = {
            "observation.image": np.stack([np.asarray(seen["observation.image"])] * 2),
            "observation.state": np.stack([np.asarray(seen["observation.state"], F)] * 2),
        }
        whole.reset(seed=seed)
        right = whole.encode(obs), whole(obs)
        for policy, features, actions in ((half, 2e-4, 0.1), (quarter, 2e-3, 2.0)):
            policy.reset(seed=seed)
            assert 0 < np.abs(policy.encode(obs) - right[0]).max() <= features
            assert np.abs(policy(obs) - right[1]).max() <= actions
