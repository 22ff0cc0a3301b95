"""The reference of the image encoders beside PyTorch's modules, in float64 and float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_resnet  # noqa: E402

from tsad.convert.trunk import trunk_tensors  # noqa: E402
from tsad.families.resnet import Camera, EncoderConfig, map_size, shapes  # noqa: E402
from tsad.reference import resnet  # noqa: E402

SIZE, KEYPOINTS = (37, 50), 5


def ours(encoder: EncoderConfig, module: Any) -> dict[str, Any]:
    """An encoder's tensors of LeRobot's module."""
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    start = "backbone."
    trunk = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    found: dict[str, Any] = trunk_tensors(encoder, trunk)
    for part in ("weight", "bias"):
        found[f"pool.{part}"], found[f"out.{part}"] = (
            state[f"pool.nets.{part}"],
            state[f"out.{part}"],
        )
    return found


def camera(**changes: Any) -> Camera:
    scale, offset = (1.5, 2.0, 4.0), (-0.5, 0.25, -2.0)
    height, width = SIZE
    fields = {"name": "c", "encoder": 0, "height": height, "width": width, "resize": None}
    return Camera(**fields | {"crop": None, "scale": scale, "offset": offset} | changes)


def expected(module: Any, c: Camera, images: Any) -> Any:
    x = torch.from_numpy(images).double().movedim(-1, -3) / 255
    x = torch_resnet.seen(x, c.resize, c.crop)
    scale, offset = (torch.tensor(n).double()[:, None, None] for n in (c.scale, c.offset))
    with torch.no_grad():
        return module.double()(x * scale + offset).numpy()


@pytest.mark.parametrize(
    ("depth", "group", "changes"),
    [
        (18, True, {}),
        (18, False, {"crop": (32, 45)}),
        (34, False, {"resize": (30, 64), "crop": (29, 33)}),
    ],
)
def test_features_are_torchs(depth: int, group: bool, changes: dict[str, Any]) -> None:
    c = camera(**changes)
    module = torch_resnet.LerobotEncoder(c.seen, KEYPOINTS, depth, group)
    torch_resnet.randomise(module, depth)
    encoder = EncoderConfig(
        f"resnet{depth}", "group" if group else "folded", KEYPOINTS, 2 * KEYPOINTS
    )
    w = ours(encoder, module)
    assert {name: value.shape for name, value in w.items()} == shapes(encoder)
    images = torch_resnet.images(np.random.default_rng(1), 2, *SIZE)
    right = expected(module, c, images)
    assert np.ptp(right, 0).max() > 0.01 and (right > 0).any()  # images make a difference
    wide = {name: value.astype(np.float64) for name, value in w.items()}
    # of float32 tensors: folding rounds them
    assert np.abs(resnet.encode(wide, encoder, c, images) - right).max() <= 1e-5
    narrow = resnet.encode(w, encoder, c, images)
    assert narrow.dtype == np.float32
    assert np.abs(narrow - right).max() <= 1e-4 * np.abs(right).max()
    floats = np.moveaxis(images, -1, 1) / np.float32(255)
    np.testing.assert_allclose(resnet.encode(w, encoder, c, floats), narrow, atol=1e-5)


@pytest.mark.parametrize("new", [(13, 20), (64, 84), (80, 119), (96, 31), (1, 1)])
def test_resizing_is_torchvisions(new: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((2, 3, 80, 120))
    right = torch_resnet.seen(torch.from_numpy(x), new).numpy()
    assert np.abs(resnet.resize(x, new) - right).max() <= 1e-12


@pytest.mark.parametrize(
    ("size", "place"), [((83, 84), (6, 6)), ((81, 95), (8, 0)), ((93, 1), (2, 48))]
)
def test_an_odd_margin_is_rounded_to_even_as_pythons_round(size: Any, place: Any) -> None:
    x = np.arange(96 * 96).reshape(96, 96)
    got = resnet.center_crop(x, size)
    assert got.shape == size and got[0, 0] == place[0] * 96 + place[1]


@pytest.mark.parametrize("seen", [(1, 1), (76, 76), (83, 84), (97, 130)])
def test_the_maps_size(seen: tuple[int, int]) -> None:
    layers = torch_resnet.trunk(18, True)
    assert map_size(seen) == torch_resnet.map_of(layers, seen)
