"""Checkpoints with image encoders load whole, and make of images what PyTorch makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("dill")
pytest.importorskip("omegaconf")

import lerobot_cases as lerobot  # noqa: E402
import vision_cases as vision  # noqa: E402

import tsad  # noqa: E402
from tsad.checkpoint import read_folder  # noqa: E402
from tsad.convert import convert, read_checkpoint  # noqa: E402
from tsad.convert.lerobot import read_lerobot  # noqa: E402

SIZE = (44, 56)
ONE, TWO = ["observation.image"], ["observation.images.wrist", "observation.images.front"]
LEROBOT: dict[str, tuple[list[str], dict[str, Any]]] = {
    "one, GroupNorm, cropped": (ONE, {"group": True, "crop_shape": [39, 48], "mode": "IDENTITY"}),
    "two of their own": (TWO, {"separate": True}),
    "two share one, resized": (
        TWO,
        {"resize_shape": [40, 41], "crop_ratio": 0.9, "crop_shape": [36, 36], "mode": "MIN_MAX"},
    ),
}


def close(got: Any, right: Any, relative: float = 1e-4) -> None:
    assert got.shape == right.shape and np.ptp(right) > 0.01
    assert np.abs(got - right).max() <= relative * np.abs(right).max()


def observation(policy: Any, cameras: list[str], seed: int = 0) -> dict[str, Any]:
    """Images, and random numbers of the rest."""
    rng = np.random.default_rng(seed)
    obs = vision.images(cameras, 1, policy.n_obs_steps, *SIZE, seed=seed)
    for feature in policy.config["features"]:
        if feature["name"] not in obs:
            shape = (1, policy.n_obs_steps, feature["dim"])
            obs[feature["name"]] = rng.uniform(-1, 1, shape).astype(np.float32)
    return obs


@pytest.mark.parametrize("what", LEROBOT)
def test_lerobots_folders(what: str, tmp_path: Path) -> None:
    cameras, options = LEROBOT[what]
    encoders = vision.lerobot_folder(tmp_path / "policy", cameras, SIZE, **options)
    policy = tsad.load(tmp_path / "policy", sampler="ddim", num_inference_steps=2)
    names = [feature["name"] for feature in policy.config["features"]]
    assert names == [vision.STATE, *cameras, vision.ENV]
    obs = observation(policy, cameras)
    right = vision.lerobot_features(
        tmp_path / "policy", encoders, {name: obs[name] for name in cameras}
    )
    beside = np.concatenate([right.get(name, obs[name]) for name in names], -1)
    got = policy.encode(obs)
    close(got, beside.astype(np.float32))
    for name in cameras:
        at = names.index(name)
        begin = sum(f["dim"] for f in policy.config["features"][:at])
        close(got[..., begin : begin + right[name].shape[-1]], right[name])
    policy.reset(seed=1)
    actions = policy(obs)
    policy.reset(seed=1)
    np.testing.assert_array_equal(actions, policy(got))
    # the whole way to actions, from the right features
    policy.reset(seed=1)
    np.testing.assert_allclose(actions, policy(beside.astype(np.float32)), rtol=1e-3, atol=1e-3)


def test_a_tsad_folder_keeps_the_encoders(tmp_path: Path) -> None:
    vision.lerobot_folder(tmp_path / "theirs", TWO, SIZE, separate=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    one, two = tsad.load(tmp_path / "theirs"), tsad.load(tmp_path / "ours")
    obs = observation(one, TWO)
    np.testing.assert_array_equal(one.encode(obs), two.encode(obs))
    assert one.config["vision"] == two.config["vision"]
    assert read_folder(tmp_path / "ours")[0].to_dict()["vision"]["cameras"][1]["encoder"] == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One camera; a test that changes it puts it back."""
    path: Path = tmp_path_factory.mktemp("vision") / "policy"
    vision.lerobot_folder(path, ONE, SIZE)
    return path


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        read_lerobot(folder)
    assert str(folder) in str(error.value)


E = "diffusion.rgb_encoder."
TENSORS: list[tuple[dict[str, Any], str]] = [
    ({f"{E}backbone.0.weight": ...}, "backbone.0.weight: missing, expected shape .64, 3, 7, 7"),
    ({f"{E}backbone.1.running_var": ...}, "backbone.1.running_var: missing"),
    ({f"{E}backbone.8.weight": np.ones(1)}, "backbone.8.weight: not expected"),
    ({f"{E}out.weight": np.ones((3, 8), np.float32)}, r"out.weight: expected shape \[8, 8\]"),
    ({f"{E}pool.pos_grid": np.zeros((4, 2), np.float32)}, "pos_grid: expected x and y of a 2 x 2"),
    ({f"{E}pool.nets.bias": np.full(4, np.nan, np.float32)}, "pool.nets.bias: expected finite"),
]


@pytest.mark.parametrize(("changes", "match"), TENSORS)
def test_every_tensor_has_its_place(folder: Path, changes: dict[str, Any], match: str) -> None:
    before = (folder / "model.safetensors").read_bytes()
    values = lerobot.tensors(folder) | changes
    lerobot.save(folder, {name: value for name, value in values.items() if value is not ...})
    try:
        refused(folder, match)
    finally:
        (folder / "model.safetensors").write_bytes(before)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"vision_backbone": "resnet50"},
            'vision_backbone: expected one of "resnet18", "resnet34"',
        ),
        ({"use_group_norm": True}, "running_mean: not expected"),
        (
            {"use_separate_rgb_encoder_per_camera": True},
            r"rgb_encoder.0.backbone.0.weight: missing",
        ),
        ({"crop_shape": [45, 48]}, r"crop: expected at most what there is to crop, \[44, 56\]"),
        ({"crop_shape": [40]}, "crop_shape: expected .height, width."),
        ({"crop_shape": [40, 0]}, "crop: expected .height, width. of 1 to"),
        ({"resize_shape": [40, 40], "crop_ratio": 0}, "crop_ratio: expected a number above 0"),
        ({"crop_shape": [20, 20]}, "pos_grid: expected shape .1, 2."),
    ],
)
def test_settings_that_do_not_fit(folder: Path, changes: dict[str, Any], match: str) -> None:
    before = (folder / "config.json").read_text()
    lerobot.edit_json(folder / "config.json", **changes)
    try:
        refused(folder, match)
    finally:
        (folder / "config.json").write_text(before)


def test_images_that_are_none(folder: Path) -> None:
    before = (folder / "config.json").read_text()
    inputs = json.loads(before)["input_features"]
    try:
        for shape in ([1, 44, 56], [44, 56]):
            other = inputs | {ONE[0]: {"type": "VISUAL", "shape": shape}}
            lerobot.edit_json(folder / "config.json", input_features=other)
            refused(folder, "observation.image.shape: expected .3, height, width.")
    finally:
        (folder / "config.json").write_text(before)


def test_statistics_of_one_number_a_channel(folder: Path) -> None:
    before = (folder / vision.STATISTICS).read_bytes()
    values = lerobot.tensors(folder, vision.STATISTICS)
    try:
        lerobot.save(folder, values | {f"{ONE[0]}.mean": np.ones(3, np.float32)}, vision.STATISTICS)
        refused(folder, r"observation.image.mean: expected shape \[3, 1, 1\]")
    finally:
        (folder / vision.STATISTICS).write_bytes(before)


# Diffusion Policy


def test_diffusion_policys_hybrid_transformer(tmp_path: Path) -> None:
    path, cores, state = vision.transformer_checkpoint(tmp_path / "x.ckpt")
    converted = read_checkpoint(path)
    assert not any("outside" in note for note in converted.notes)
    policy = tsad.load(path)
    assert [f["name"] for f in policy.config["features"]] == list(vision.SHAPE_META)
    obs = vision.images(list(cores), 1, policy.n_obs_steps, 44, 52)
    rng = np.random.default_rng(3)
    for key, meta in vision.SHAPE_META.items():
        if key not in cores:
            shape = (1, policy.n_obs_steps, *meta["shape"])
            obs[key] = rng.uniform(-1, 1, shape).astype(np.float32)
    right = vision.robomimic_features(cores, state, obs)
    affine = converted.config.normalizer.obs
    close(affine.normalise(policy.encode(obs), np.float64), right)
    policy.reset(seed=0)
    assert np.isfinite(policy(obs)).all()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"eval_fixed_crop": False}, "crops at random"),
        ({"crop_shape": [39, 47]}, ""),  # maps of the same size
        ({"crop_shape": [20, 20]}, "pos_x: expected shape"),
        ({"shape_meta": {"obs": {"agentview_image": {"shape": [3, 44, 52], "type": "rgb"}}}}, "it"),
        ({"shape_meta": {"obs": {"a": {"shape": [3, 44, 52], "type": "depth"}}}}, "is depth"),
    ],
)
def test_another_encoder_stays_outside_and_is_said(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    path, _, _ = vision.transformer_checkpoint(tmp_path / "x.ckpt", **changes)
    converted = read_checkpoint(path)
    outside = [note for note in converted.notes if "the observation encoder stays outside" in note]
    assert len(outside) == (1 if why else 0) and all(why in note for note in outside)
    assert (converted.config.vision is None) == bool(why)
    assert any(name.startswith("vision.") for name in converted.tensors) != bool(why)


def test_the_hybrid_unet_has_the_same_encoder_here_with_batchnorm(tmp_path: Path) -> None:
    path, cores, state = vision.unet_checkpoint(tmp_path / "x.ckpt")
    policy = tsad.load(path)
    obs = vision.images(list(cores), 1, policy.n_obs_steps, 44, 52)
    obs |= {
        key: np.full((1, policy.n_obs_steps, *meta["shape"]), 0.5, np.float32)
        for key, meta in vision.SHAPE_META.items()
        if key not in cores
    }
    affine = read_checkpoint(path).config.normalizer.obs
    got = affine.normalise(policy.encode(obs), np.float64)
    close(got, vision.robomimic_features(cores, state, obs))
    assert np.isfinite(policy(obs)).all()
