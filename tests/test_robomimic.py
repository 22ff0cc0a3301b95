"""The image encoder of Diffusion Policy's hybrid policies against robomimic's own, as recorded."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("dill")
pytest.importorskip("omegaconf")

import vision_cases as vision  # noqa: E402
from test_convert_vision import close  # noqa: E402

import tsad  # noqa: E402
from tsad.convert import read_checkpoint  # noqa: E402

SCRIPT = Path(__file__).parent / "fixtures" / "robomimic" / "make.py"
_spec = importlib.util.spec_from_file_location("make_robomimic", SCRIPT)
assert _spec is not None and _spec.loader is not None
robomimic = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(robomimic)


def recorded(norm: str) -> dict[str, Any]:
    with np.load(robomimic.FILE) as arrays:
        return {k.removeprefix(f"{norm}/"): arrays[k] for k in arrays if k.startswith(norm)}


@pytest.mark.parametrize("norm", robomimic.NORMS)
def test_an_encoder_of_robomimic_is_ours(norm: str, tmp_path: Path) -> None:
    """Two cameras and numbers: the names of its state dict, and what it computes."""
    expected = recorded(norm)
    shapes = [ast.literal_eval(shape) for shape in expected["shapes"]]
    own = robomimic.weights(dict(zip(expected["names"].tolist(), shapes, strict=True)))
    path, cores, state = vision.transformer_checkpoint(
        tmp_path / "x.ckpt", own=own, obs_encoder_group_norm=norm == "group"
    )
    names = {name for name in state if name.startswith("obs_encoder.")}
    assert names == {f"obs_encoder.{name}" for name in expected["names"]}
    affine = read_checkpoint(path).config.normalizer.obs
    policy = tsad.load(path)
    assert policy.n_obs_steps == robomimic.MOMENTS and len(cores) == 2
    obs = {}
    for key in robomimic.SHAPES:
        value = expected[key]
        if key not in cores:  # robomimic gets normalised numbers
            part = [state[f"normalizer.params_dict.{key}.{p}"].numpy() for p in ("scale", "offset")]
            value = ((value - part[1]) / part[0]).astype(np.float32)
        obs[key] = value
    planes = {key: np.moveaxis(obs[key], -1, 1) / np.float32(255) for key in cores}
    for given in (obs, obs | planes):
        close(affine.normalise(policy.encode(given), np.float64), expected["encoded_f64"])
    for key in cores:  # one camera changed, and nothing but its features
        moved = policy.encode(obs | {key: 255 - obs[key]}) != policy.encode(obs)
        at = [f["name"] == key for f in policy.config["features"] for _ in range(f["dim"])]
        assert moved[:, at].any() and not moved[:, np.logical_not(at)].any()


@pytest.mark.parametrize("norm", robomimic.NORMS)
def test_what_is_recorded_is_robomimics(norm: str) -> None:
    """Where robomimic is installed."""
    pytest.importorskip("robomimic")
    pytest.importorskip("torchvision")
    expected, made = recorded(norm), robomimic.encoder(norm)
    assert list(made.state_dict()) == expected["names"].tolist()
    obs = robomimic.observation(norm)
    for key, value in obs.items():
        np.testing.assert_array_equal(expected[key], value)
    got = robomimic.encoded(made, obs)
    np.testing.assert_allclose(got, expected["encoded_f64"], rtol=0, atol=1e-9)
