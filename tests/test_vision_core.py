"""Image encoders in the C core, against PyTorch's operators in float64."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch_encoder import Encoder, encode

from tsad import _core

F = np.float32
TINY = Encoder(height=36, width=40, keypoints=3, features=5)


def make(encoder: Encoder = TINY, **more: Any) -> _core.Vision:
    return _core.Vision(encoder.weights(), **(encoder.arguments() | more))


def pixels(encoder: Encoder, n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Images as a camera gives them: smooth, so that not all is noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: encoder.height, : encoder.width, :1][:2]
    phase = rng.uniform(0, 6, (n, 1, 1, encoder.channels))
    waves = np.sin(rows * rng.uniform(0, 0.4) + columns * rng.uniform(0, 0.4) + phase)
    noise = rng.uniform(-0.3, 0.3, (n, encoder.height, encoder.width, encoder.channels))
    return (127.5 + 90 * np.clip(waves + noise, -1.4, 1.4)).astype(np.uint8)


def planes(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(F) / F(255)


CASES = {
    "lerobot": (Encoder(), 2),
    "diffusion policy": (Encoder(norm="group", relu=False, height=76, width=76), 1),
    "96": (Encoder(height=96, width=96, keypoints=33, features=70), 1),
    "34": (Encoder(depth=34, height=52, width=40, features=2), 1),
    "odd": (Encoder(height=75, width=91, keypoints=1, features=1, relu=False), 1),
    "odd, 34, group": (Encoder(depth=34, norm="group", height=37, width=61, features=1), 2),
    "small": (Encoder(height=9, width=33, keypoints=33), 5),
    "one pixel": (Encoder(height=1, width=1), 1),
    "wide": (Encoder(norm="group", height=3, width=70), 3),
    "grey, soft": (
        Encoder(height=40, width=40, channels=1, scale=(2.0,), offset=(-1.0,), temperature=2.5),
        2,
    ),
    "large windows": (  # of the first convolution and of the last
        Encoder(
            height=40,
            width=36,
            channels=13,
            keypoints=300,
            features=3,
            scale=(2.0,) * 13,
            offset=(-1.0,) * 13,
        ),
        1,
    ),
}


@pytest.mark.parametrize("backend", _core.backends())
@pytest.mark.parametrize("case", CASES)
def test_features_are_torchs(case: str, backend: str) -> None:
    encoder, n = CASES[case]
    images = planes(pixels(encoder, n))
    vision = make(encoder, backend=backend)
    expected = encode(encoder, encoder.weights(), images).numpy()
    got = vision.encode(images)
    assert got.shape == (n, encoder.features) == (n, vision.features)
    assert got.dtype == F
    assert np.abs(expected).max() > 0.1
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_conv_biases_before_a_group_norm_are_optional() -> None:
    encoder = Encoder(norm="group", height=33, width=40, keypoints=4, features=6)
    images = planes(pixels(encoder, 1))
    weights = encoder.weights()
    rng = np.random.default_rng(1)
    for name in list(weights):
        if "conv" in name or name.endswith("downsample.weight"):
            bias = rng.standard_normal(len(weights[name])).astype(F)
            weights[name.replace("weight", "bias")] = bias
    got = _core.Vision(weights, **encoder.arguments()).encode(images)
    expected = encode(encoder, weights, images).numpy()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(got - make(encoder).encode(images)).max() > 1e-3


@pytest.mark.parametrize("norm", ["folded", "group"])
def test_bytes_are_floats_of_a_255th(norm: str) -> None:
    encoder = Encoder(norm=norm, height=36, width=40, keypoints=3, features=5)
    images = pixels(encoder, 3)
    images[0, 0, :9, 0] = [0, 1, 2, 127, 128, 129, 253, 254, 255]
    vision = make(encoder)
    np.testing.assert_array_equal(vision.encode(images), vision.encode(planes(images)))


@pytest.mark.parametrize("backend", _core.backends())
@pytest.mark.parametrize("norm", ["folded", "group"])
def test_bits_depend_on_neither_threads_nor_company(backend: str, norm: str) -> None:
    """Nine images are more than go through the layers together; each alone is the same."""
    encoder = Encoder(norm=norm, height=44, width=44, keypoints=3, features=5, relu=False)
    n = 3 if backend == "ref" else 9  # plain C is slow, under a sanitizer above all
    images = pixels(encoder, n)
    expected = make(encoder, backend=backend).encode(images)
    assert len(np.unique(expected[:, 0])) == n
    for threads in (2, 4):
        vision = make(encoder, backend=backend, threads=threads)
        assert vision.threads == threads
        np.testing.assert_array_equal(vision.encode(images), expected)
        for i in (0, n - 1):
            np.testing.assert_array_equal(vision.encode(images[i : i + 1]), expected[i : i + 1])


def test_a_large_image_on_several_threads() -> None:
    """Several tasks a layer, and a memory that holds one image at a time."""
    encoder = Encoder(height=200, width=260, keypoints=5, features=7)
    images = pixels(encoder, 2)
    vision = make(encoder, threads=4)
    expected = encode(encoder, encoder.weights(), planes(images)).numpy()
    got = vision.encode(images)
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    np.testing.assert_array_equal(make(encoder).encode(images[1:]), got[1:])


def test_the_weights_are_its_own() -> None:
    weights = TINY.weights()
    images = pixels(TINY, 1)
    vision = _core.Vision(tensors=weights, **TINY.arguments())
    before = vision.encode(images)
    for name in weights:
        weights[name] = np.zeros_like(weights[name])
    np.testing.assert_array_equal(vision.encode(images), before)
    parameters = sum(w.size for w in weights.values())
    assert vision.weight_bytes >= 4 * parameters
    assert (vision.keypoints, vision.features, vision.height, vision.width) == (3, 5, 36, 40)
    assert vision.channels == 3
    assert vision.backend == _core.backends()[0]


def test_no_images_have_no_features() -> None:
    assert make().encode(np.zeros((0, 36, 40, 3), np.uint8)).shape == (0, 5)


def test_out_and_other_libraries() -> None:
    images = pixels(TINY, 2)
    vision = make()
    expected = vision.encode(images)
    out = np.full((2, 5), 9, F)
    assert vision.encode(images, out) is out
    np.testing.assert_array_equal(out, expected)
    got = vision.encode(torch.from_numpy(images))
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), expected)
    np.testing.assert_array_equal(vision.encode(torch.from_numpy(planes(images))), expected)


# ---- bad input


def with_value(x: Any, value: float) -> Any:
    x[1, 2, 3, 4] = value
    return x


IMAGES = pixels(TINY, 2)
PLANES = planes(IMAGES)
BAD_IMAGES = {
    "channels first": (
        lambda: np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)),
        r"images: expected shape \(n, 36, 40, 3\), got \(2, 3, 36, 40\); uint8 images have their "
        r"channels last.*transpose\(0, 2, 3, 1\)",
    ),
    "torch, channels first": (
        lambda: torch.from_numpy(IMAGES).permute(0, 3, 1, 2).contiguous(),
        r"images: .*channels last.*images.permute\(0, 2, 3, 1\).contiguous\(\)",
    ),
    "channels last": (
        lambda: IMAGES.astype(F) / F(255),
        r"images: expected shape \(n, 3, 36, 40\), got \(2, 36, 40, 3\); float32 images have "
        r"their channels first.*transpose\(0, 3, 1, 2\)",
    ),
    "one image": (lambda: IMAGES[0], r"images: .*got \(36, 40, 3\); .*images\[None\]"),
    "one image, float": (lambda: PLANES[0], r"images: .*got \(3, 36, 40\); .*images\[None\]"),
    "another size": (lambda: np.zeros((2, 40, 40, 3), np.uint8), "images: .*resize and crop"),
    "alpha": (lambda: np.zeros((2, 36, 40, 4), np.uint8), r"images: .*got \(2, 36, 40, 4\)"),
    "float64": (lambda: PLANES.astype(float), r"images: .*got float64; use images.astype"),
    "int64": (lambda: IMAGES.astype(int), r"images: expected uint8 .* or float32 .*got int64"),
    "other bytes": (lambda: PLANES.astype(">f4"), "images: .*got >f4"),
    "torch, half": (lambda: torch.from_numpy(PLANES).half(), r"got float16; use images.to\("),
    "nan": (lambda: with_value(PLANES.copy(), np.nan), r"got nan at images\[1, 2, 3, 4\]"),
    "infinite": (lambda: with_value(PLANES.copy(), -np.inf), r"got -inf at images\[1, 2, 3, 4\]"),
    "0 to 255": (
        lambda: with_value(PLANES.copy(), 255),
        r"images: expected numbers from 0 to 1, got 255.0 at images\[1, 2, 3, 4\]; divide by 255",
    ),
    "-1 to 1": (lambda: with_value(PLANES.copy(), -1), r"from 0 to 1, got -1.0 at"),
    "strided": (lambda: np.zeros((2, 36, 80, 3), np.uint8)[:, :, ::2], "images: .*C-contiguous"),
    "a list": (lambda: IMAGES.tolist(), "images: expected .*got list"),
    "none": (lambda: None, "images: expected .*got NoneType"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name: str) -> None:
    bad, message = BAD_IMAGES[name]
    vision, out = make(), np.full((2, 5), 9, F)
    with pytest.raises((TypeError, ValueError), match=message):
        vision.encode(bad(), out=out)
    assert (out == 9).all()
    vision.encode(IMAGES)  # free again


def test_bad_out() -> None:
    vision = make()
    memory = np.zeros(4 * PLANES.size, np.uint8).view(F)
    shared = memory[: PLANES.size].reshape(PLANES.shape)
    frozen = np.zeros((2, 5), F)
    frozen.flags.writeable = False
    for images, out, message in (
        (IMAGES, np.zeros((3, 5), F), r"out: expected shape \(2, 5\), got \(3, 5\); allocate it"),
        (IMAGES, np.zeros((2, 5)), "out: expected float32, got float64"),
        (IMAGES, frozen, "out: expected a writable array"),
        (IMAGES, np.zeros((2, 10), F)[:, ::2], "out: expected a C-contiguous"),
        (shared, memory[-10:].reshape(2, 5), "out: expected memory of its own.*`images`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            vision.encode(images, out=out)


BAD_ARGUMENTS = {
    "depth": (50, "depth: expected 18 or 34, got 50"),
    "norm": ("batch", r"norm: expected 'folded' .* or 'group', got 'batch'"),
    "keypoints": (4, r"tensor 'pool.weight': expected shape \(4, 512, 1, 1\), got \(3, 512"),
    "height": (0, "height: expected 1 to 8192, got 0"),
    "width": (9000, "width: expected 1 to 8192, got 9000"),
    "channels": (4, r"tensor 'conv1.weight': expected shape \(64, 4, 7, 7\), got \(64, 3"),
    "scale": (np.ones(4, F), r"scale: expected shape \(3,\), got \(4,\); one number per channel"),
    "offset": (np.array([0, np.nan, 0], F), "offset: expected numbers of magnitude up to"),
    "relu": ("yes", "relu: expected an integer, got 'yes'"),
    "threads": (0, "threads: expected 1 to 64, got 0"),
    "backend": ("tpu", "backend 'tpu' is unknown"),
    "precision": ("int4", "precision: expected 'float32', 'int16' or 'int8', got 'int4'"),
    "tensors": ([1], "tensors: expected a dict"),
    "colour": (1, "Vision: unknown key 'colour'"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name: str) -> None:
    value, message = BAD_ARGUMENTS[name]
    arguments = {"tensors": TINY.weights()} | TINY.arguments()
    if name in ("scale", "offset"):
        assert arguments.pop(name).shape == (3,)
    if name == "channels":
        del arguments["scale"], arguments["offset"]
    with pytest.raises((TypeError, ValueError), match=message):
        _core.Vision(**(arguments | {name: value}))


def test_missing_arguments() -> None:
    for name in ("tensors", "keypoints", "height", "width"):
        arguments = {"tensors": TINY.weights()} | TINY.arguments()
        del arguments[name]
        with pytest.raises(
            TypeError, match=f"{name}: expected a dict|the keyword {name}, got none"
        ):
            _core.Vision(**arguments)
    with pytest.raises(TypeError, match="expected tensors, then keyword arguments"):
        _core.Vision(TINY.weights(), 18)  # type: ignore[misc, call-arg]


def test_a_backend_without_an_encoder_says_so() -> None:
    with pytest.raises(
        ValueError, match="backend: expected one that encodes images, got 'guarded'"
    ):
        make(backend="guarded")


def test_bad_tensors() -> None:
    def refused(match: str, encoder: Encoder = TINY, remove: str = "", **change: Any) -> None:
        weights = encoder.weights()
        weights.pop(remove, None)
        weights |= {name.replace("__", "."): value for name, value in change.items()}
        with pytest.raises((TypeError, ValueError), match=match):
            _core.Vision(weights, **encoder.arguments())

    group = Encoder(norm="group", height=36, width=40)
    refused("tensor 'conv1.bias' is missing", remove="conv1.bias")
    refused("tensor 'layer4.1.conv2.weight' is missing", remove="layer4.1.conv2.weight")
    refused("tensor 'layer2.0.downsample.bias' is missing", remove="layer2.0.downsample.bias")
    refused("tensor 'layer3.1.bn2.bias' is missing", group, remove="layer3.1.bn2.bias")
    refused("tensor 'pool.bias' is missing", remove="pool.bias")
    refused("'out.bias': expected shape", remove="out.bias")
    refused("tensor 'fc.weight': expected those of a ResNet-18 with BatchNorm folded, got one more",
            fc__weight=np.zeros((2, 2), F))  # fmt: skip
    refused("tensor 'bn1.bias': .*got one more; remove it, or correct depth and norm",
            bn1__bias=np.zeros(64, F))  # fmt: skip
    refused(r"'out.weight': expected shape \(5, 6\), got \(5, 7\)", out__weight=np.ones((5, 7), F))
    refused("tensors.'conv1.bias'.: expected float32, got float64", conv1__bias=np.ones(64))
    refused("conv1.bias: expected numbers of magnitude up to 1e.12, got nan at flat index 0",
            conv1__bias=np.full(64, np.nan, F))  # fmt: skip
    for value in (0, -1, np.nan):
        refused("tensor 'pool.temperature': expected more than 0",
                pool__temperature=np.array(value, F))  # fmt: skip


def test_numbers_that_overflow_are_seen() -> None:
    weights = TINY.weights()
    for name in ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.1.conv1"):
        weights[f"{name}.weight"] = np.full_like(weights[f"{name}.weight"], 1e12)
    vision = _core.Vision(weights, **TINY.arguments())
    with pytest.raises(RuntimeError, match=r"overflowed in the features of images\[0\]"):
        vision.encode(IMAGES)


def test_one_thread_at_a_time() -> None:
    encoder = Encoder(height=96, width=96, keypoints=3, features=5)
    vision = make(encoder)
    images = np.zeros((64, 96, 96, 3), np.uint8)
    thread = threading.Thread(target=vision.encode, args=(images,))
    thread.start()
    with pytest.raises(RuntimeError, match="at work in another thread"):
        while thread.is_alive():
            vision.encode(images[:1])
    thread.join()
    vision.encode(images[:1])
