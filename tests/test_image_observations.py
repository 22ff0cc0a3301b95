"""Observations with images: every form of them, what is encoded once, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vision_cases as vision  # noqa: E402
from command_line import run  # noqa: E402
from dlpack_maker import Producer  # noqa: E402

import tsad  # noqa: E402
from tsad import cameras as seeing  # noqa: E402
from tsad.presets import Preset, model_sha256, save_presets  # noqa: E402
from tsad.setting import Setting  # noqa: E402
from tsad.sim import recording  # noqa: E402

CAMERAS = ["observation.images.top", "observation.images.side"]
TOP, SIDE = CAMERAS
SIZE = (40, 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("images") / "policy"
    vision.lerobot_folder(path, CAMERAS, SIZE, crop_shape=[33, 40])
    return path


@lru_cache
def loaded(folder: Path, lanes: int) -> Any:
    return tsad.load(folder, lanes=lanes, sampler="ddim", num_inference_steps=2)


def load(folder: Path, lanes: int = 1) -> Any:
    """A policy of one's own, whose weights all share."""
    policy = copy.copy(loaded(folder, lanes))
    policy.reset(seed=3)
    return policy


def observed(policy: Any, *lead: int, seed: int = 0) -> dict[str, Any]:
    """A random observation (*lead, n_obs_steps, ...)."""
    obs = vision.images(CAMERAS, *lead, policy.n_obs_steps, *SIZE, seed=seed)
    rng = np.random.default_rng(seed)
    for name, dim in ((vision.STATE, 3), (vision.ENV, 4)):
        obs[name] = rng.uniform(-1, 1, (*lead, policy.n_obs_steps, dim)).astype(np.float32)
    return obs


def floats(image: Any) -> Any:
    return np.ascontiguousarray(np.moveaxis(image, -1, -3)) / np.float32(255)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of an engine encoded."""
    counts: list[int] = []
    original = seeing.Cameras.encode

    def encode(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        counts.append(result[2].encoded)
        return result

    monkeypatch.setattr(seeing.Cameras, "encode", encode)
    return counts


def test_every_form_gives_the_same_actions(folder: Path) -> None:
    policy = load(folder)
    assert isinstance(policy, tsad.ImagePolicy) and isinstance(policy, tsad.SparsePolicy)
    obs = observed(policy, 1)
    expected = policy(obs)
    assert expected.shape == (1, policy.n_action_steps, policy.action_dim)
    bare = {name: value[0] for name, value in obs.items()}
    flipped = obs | {TOP: np.ascontiguousarray(obs[TOP][..., ::-1])[..., ::-1]}  # as of BGR
    forms = {
        "bare": bare,
        "torch": {name: torch.from_numpy(value) for name, value in obs.items()},
        "strides": flipped,
        "lent": {name: Producer(value) for name, value in bare.items()},
        "features": policy.encode(obs),
    }
    for what, form in forms.items():
        policy.reset(seed=3)
        got = policy(form)
        assert isinstance(got, torch.Tensor) == (what == "torch"), what
        right = expected[0] if what in ("bare", "lent") else expected
        np.testing.assert_array_equal(np.asarray(got), right, err_msg=what)
    out = np.empty_like(expected[0])
    policy.reset(seed=3)
    assert policy(bare, out=out) is out
    np.testing.assert_array_equal(out, expected[0])
    policy.reset(seed=3)
    got = policy(obs | {name: floats(obs[name]) for name in CAMERAS})
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_library_of_the_result_is_the_first_features(folder: Path) -> None:
    policy = load(folder)
    obs = observed(policy)
    first = policy.config["features"][0]["name"]
    assert isinstance(policy(obs | {first: torch.from_numpy(obs[first])}), torch.Tensor)
    assert isinstance(policy(obs | {TOP: torch.from_numpy(obs[TOP])}), np.ndarray)


def test_lanes_are_as_policies_of_their_own(folder: Path) -> None:
    many, one = load(folder, lanes=3), load(folder)
    obs = observed(many, 3)
    actions, features = many(obs), many.encode(obs)
    for lane in range(3):
        row = {name: value[lane : lane + 1] for name, value in obs.items()}
        np.testing.assert_array_equal(one.encode(row), features[lane : lane + 1])
    part = {name: value[1:2] for name, value in obs.items()}
    many.reset(seed=3)
    first = many(obs)
    np.testing.assert_array_equal(first, actions)
    many.reset(seed=3)
    np.testing.assert_array_equal(many(part, lanes=[1]), actions[1:2])
    many.reset(seed=3)
    np.testing.assert_array_equal(many(part, lanes=[False, True, False]), actions[1:2])


def test_a_frame_that_is_known_is_encoded_once(folder: Path, encoded: list[int]) -> None:
    policy, fresh = load(folder), load(folder)
    n = policy.n_obs_steps
    steps = [observed(policy, seed=i) for i in range(2)]
    first = steps[0]
    second = {  # begins with the frame that the first one ended with
        name: np.concatenate([first[name][-1:], steps[1][name][: n - 1]]) for name in first
    }
    policy(first)
    assert policy.stats["images"] == {"encoded": 2 * n, "known": 0, "reused": 0}
    got = policy(second)
    assert policy.stats["images"] == {"encoded": 2 * (n - 1), "known": 2, "reused": 0}
    assert encoded[-1] == 2 * (n - 1)
    fresh(first)
    fresh.reset()  # forgets the images ...
    fresh.reset(seed=3)
    fresh(first)
    fresh._seen = [{}]
    again = fresh(second)
    assert fresh.stats["images"]["encoded"] == 2 * n
    np.testing.assert_array_equal(got, again)  # ... which changes no bit
    still = {name: np.repeat(value[:1], n, 0) for name, value in first.items()}
    policy.reset(seed=3)
    policy(still)
    assert policy.stats["images"] == {"encoded": 2, "known": 2 * (n - 1), "reused": 0}
    changed = still | {TOP: still[TOP].copy()}
    changed[TOP][-1, 0, 0, 0] ^= 1
    policy(changed)
    assert policy.stats["images"] == {"encoded": 1, "known": 2 * n - 1, "reused": 0}


def test_another_lane_is_not_looked_at_and_the_callers_array_may_change(folder: Path) -> None:
    policy = load(folder, lanes=2)
    obs = observed(policy, 2)
    policy({name: value[:1].copy() for name, value in obs.items()}, lanes=[0])
    policy({name: value[:1].copy() for name, value in obs.items()}, lanes=[1])
    assert policy.stats["images"]["known"] == 0
    kept = policy.encode(obs)
    for name in CAMERAS:  # a camera that writes into one buffer
        obs[name][:] = 255 - obs[name]
    assert not np.array_equal(policy.encode(obs), kept)


def test_zero_and_minus_zero_are_two(folder: Path) -> None:
    policy = load(folder)
    n = policy.n_obs_steps
    obs = observed(policy)
    obs |= {name: np.zeros((n, 3, *SIZE), np.float32) for name in CAMERAS}
    obs[TOP][-1] = -0.0
    policy(obs)
    assert policy.stats["images"] == {"encoded": 3, "known": 2 * n - 3, "reused": 0}


def test_timings_have_the_images(folder: Path) -> None:
    policy = load(folder)
    assert list(policy.timings)[0] == "vision"
    obs = observed(policy)
    policy(obs)
    t = policy.timings
    assert t["vision"] > 0
    assert t["total"] >= t["vision"] + t["denoise"]
    policy(policy.encode(obs))
    assert policy.timings["vision"] == 0


def test_the_network_alone(folder: Path) -> None:
    policy = load(folder)
    obs = observed(policy, 2)
    sample = np.random.default_rng(0).standard_normal((2, policy.horizon, policy.action_dim))
    sample = sample.astype(np.float32)
    many = load(folder, lanes=2)
    right = policy.predict_noise(sample, 1, many.encode(obs))
    np.testing.assert_array_equal(policy.predict_noise(sample, 1, obs), right)


Change = Callable[[dict[str, Any]], Any]
REFUSED: dict[str, tuple[Change, type[Exception], str]] = {
    "missing": (
        lambda o: {k: v for k, v in o.items() if k != SIDE},
        ValueError,
        "got no 'observation.images.side'; add it, uint8 .lanes, n_obs_steps, 40, 48, 3.",
    ),
    "no state": (
        lambda o: {k: v for k, v in o.items() if k != vision.STATE},
        ValueError,
        f"got no '{vision.STATE}'; add it",
    ),
    "mistyped": (
        lambda o: {k.replace("images.top", "image.top"): v for k, v in o.items()},
        ValueError,
        "unknown one, 'observation.image.top'; did you mean 'observation.images.top'",
    ),
    "channels first": (
        lambda o: o | {TOP: np.moveaxis(o[TOP], -1, -3)},
        ValueError,
        r"images.top'\]: expected shape \(2, 2, 40, 48, 3\), got \(2, 2, 3, 40, 48\); uint8 images "
        r"are .height, width, 3.: use np.moveaxis\(x, -3, -1\)",
    ),
    "channels last": (
        lambda o: o | {TOP: o[TOP].astype(np.float32) / 255},
        ValueError,
        r"expected shape \(2, 2, 3, 40, 48\).*float32 images are .3, height, width.: use "
        r"np.moveaxis\(x, -1, -3\)",
    ),
    "another size": (
        lambda o: o | {TOP: o[TOP][..., :39, :, :]},
        ValueError,
        r"images.top'\]: expected shape \(2, 2, 40, 48, 3\), got \(2, 2, 39, 48, 3\)",
    ),
    "one step": (lambda o: o | {TOP: o[TOP][:, :1]}, ValueError, r"got \(2, 1, 40, 48, 3\)"),
    "one lane": (
        lambda o: o | {TOP: o[TOP][:1]},
        ValueError,
        r"got \(1, 2, 40, 48, 3\).*pass lanes=\[...\] to run a subset",
    ),
    "bare": (lambda o: o | {TOP: o[TOP][0]}, ValueError, r"images.top'\]: expected shape \(2, 2,"),
    "bare state": (
        lambda o: o | {vision.STATE: o[vision.STATE][0]},
        ValueError,
        r"state'\]: expected shape \(2, 2, 3\), got \(2, 3\); the arrays of a call have the axis",
    ),
    "255": (
        lambda o: o | {TOP: floats(o[TOP]) * 255},
        ValueError,
        r"images.top'\]: expected pixels from 0 to 1, got numbers from 0 to 2\d\d; divide by 255",
    ),
    "normalised": (
        lambda o: o | {TOP: floats(o[TOP]) * 2 - 1},
        ValueError,
        "got numbers from -1 to 0.9.*; undo a normalisation",
    ),
    "nan": (
        lambda o: o | {SIDE: floats(o[SIDE]) * np.float32(np.nan)},
        ValueError,
        r"images.side'\]: expected finite pixels from 0 to 1, got nan at \(0, 0, 0\) of an image",
    ),
    "inf": (
        lambda o: o | {SIDE: floats(o[SIDE]) + np.float32(np.inf)},
        ValueError,
        r"images.side'\]: expected finite pixels from 0 to 1, got inf at \(0, 0, 0\)",
    ),
    "16 bits": (
        lambda o: o | {TOP: o[TOP].astype(np.uint16)},
        TypeError,
        r"got uint16; use .*astype\(np.uint8\), after bringing its values to 0 to 255",
    ),
    "true or false": (
        lambda o: o | {TOP: o[TOP] > 9},
        TypeError,
        r"got bool; use .*astype\(np.uint8\) \* 255",
    ),
    "bfloat16": (
        lambda o: o | {TOP: torch.from_numpy(floats(o[TOP])).bfloat16()},
        TypeError,
        r"of a torch tensor use .to\(torch.float32\)",
    ),
    "masked": (
        lambda o: o | {TOP: np.ma.masked_equal(o[TOP], 3)},
        TypeError,
        r"images.top'\]: got a masked array, .*\.filled\(0\)",
    ),
    "one image": (
        lambda o: o | {TOP: o[TOP][0, 0]},
        ValueError,
        r"got \(40, 48, 3\).*this is one image: of one moment np.stack",
    ),
    "images alone": (
        lambda o: o[TOP],
        TypeError,
        r"expected a dict of arrays, its keys .*got uint8 \(2, 2, 40, 48, 3\): put images into the",
    ),
    "float64": (
        lambda o: o | {TOP: floats(o[TOP]).astype(np.float64)},
        TypeError,
        r"got float64; use obs\['observation.images.top'\].astype\(np.float32\)",
    ),
    "int64 of torch": (
        lambda o: o | {TOP: torch.from_numpy(o[TOP]).long()},
        TypeError,
        r"got int64; use obs\['observation.images.top'\].to\(torch.uint8\)",
    ),
    "a list": (
        lambda o: o | {TOP: o[TOP].tolist()},
        TypeError,
        r"images.top'\]: expected an array uint8 .*got list; use np.asarray",
    ),
    "gradients": (
        lambda o: o | {TOP: torch.from_numpy(floats(o[TOP])).requires_grad_()},
        TypeError,
        "a Tensor that can't be lent .*use .detach",
    ),
    "state of float64": (
        lambda o: o | {vision.STATE: o[vision.STATE].astype(np.float64)},
        TypeError,
        "state'.: expected float32, got float64",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_call_names_the_key_and_changes_nothing(folder: Path, what: str) -> None:
    change, kind, match = REFUSED[what]
    one, two = load(folder, lanes=2), load(folder, lanes=2)
    obs = observed(one, 2)
    with pytest.raises(kind, match=match):
        one(change(dict(obs)))
    assert one.stats["chunks"] == 0 and one.stats["images"] == {
        "encoded": 0,
        "known": 0,
        "reused": 0,
    }
    assert one._seen == [{}, {}]
    np.testing.assert_array_equal(one(obs), two(obs))  # no noise was drawn


@pytest.mark.parametrize("obs", [np.zeros((2, 34), np.float32), None, [1]])
def test_what_is_encoded_is_a_dict(folder: Path, obs: Any) -> None:
    with pytest.raises(TypeError, match=r"obs: expected a dict of arrays, its keys \[.*got "):
        load(folder).encode(obs)


def test_no_lanes_at_all(folder: Path) -> None:
    """As a policy without cameras: an empty answer, nothing changed."""
    policy = load(folder, lanes=2)
    none = {name: value[:0] for name, value in observed(policy, 2).items()}
    assert policy(none, lanes=[]).shape == (0, policy.n_action_steps, policy.action_dim)
    assert policy.encode(none, lanes=[]).shape == (0, policy.n_obs_steps, policy.obs_dim)


def test_a_torch_tensor_of_channels_first_is_told_movedim(folder: Path) -> None:
    policy = load(folder)
    obs = observed(policy)
    obs[TOP] = torch.from_numpy(obs[TOP]).movedim(-1, -3)
    with pytest.raises(ValueError, match=r"of a torch tensor x.movedim\(-3, -1\)"):
        policy(obs)
    policy(obs | {TOP: obs[TOP].movedim(-3, -1)})


def test_copies_and_pickles_see_too(folder: Path) -> None:
    policy = load(folder)
    policy.sparsity = 0.25
    obs = observed(policy)
    expected = policy(obs)
    for twin in (copy.copy(policy), copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert isinstance(twin, tsad.ImagePolicy) and twin.sparsity == 0.25
        twin.reset(seed=3)
        np.testing.assert_array_equal(twin(obs), expected)
        assert twin.stats["images"]["known"] == 0  # an episode of its own
    assert copy.copy(policy)._cameras is policy._cameras


def test_a_recorder_keeps_features(folder: Path, tmp_path: Path, encoded: list[int]) -> None:
    policy = load(folder)
    obs = observed(policy)
    with tsad.Recorder(policy, tmp_path / "recorded") as recorder:
        recorder(obs)
        recorder(obs)
    assert encoded == [4, 0, 0, 0]  # nothing is encoded again to be recorded
    with np.load(recording.episode_path(tmp_path / "recorded", 0)) as episode:
        np.testing.assert_array_equal(episode["obs"], np.repeat(policy.encode(obs)[None], 2, 0))


def test_one_thread_at_a_time_while_it_sees(folder: Path, monkeypatch: Any) -> None:
    policy = load(folder)
    obs = observed(policy)
    inside, go_on = threading.Event(), threading.Event()
    original = seeing.Cameras.encode

    def slow(self: Any, *args: Any) -> Any:
        inside.set()
        assert go_on.wait(10)
        return original(self, *args)

    monkeypatch.setattr(seeing.Cameras, "encode", slow)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(policy(obs)))
    thread.start()
    assert inside.wait(10)
    busy: list[Callable[[], Any]] = [
        lambda: policy(obs),
        lambda: policy.reset(),
        lambda: setattr(policy, "sparsity", 0.5),
    ]
    for call in busy:
        with pytest.raises(RuntimeError, match="policy is busy"):
            call()
    go_on.set()
    thread.join()
    assert len(results) == 1 and policy.sparsity == 0


def test_the_error_bound_of_int8_is_measured(folder: Path) -> None:
    policy = tsad.load(folder, sampler="ddim", num_inference_steps=2, precision="int8")
    assert 0 < policy.stats["error_bound"] < 10


def test_commands_show_it_images_or_say_that_they_cannot(folder: Path, capsys: Any) -> None:
    few = ("--sampler", "ddim", "--steps", "2")
    code, out, _ = run(capsys, "bench", str(folder), *few, "--chunks", "5", "--json")
    document = json.loads(out)
    assert code == 0 and document["images"] == {TOP: [40, 48], SIDE: [40, 48]}
    for result in document["results"]:
        stages = result["stages_ms"]
        assert stages["total"]["p50"] >= stages["vision"]["p50"] > 0
    code, out, _ = run(capsys, "info", str(folder))
    assert code == 0 and "48 x 40, crop 40 x 33, encoder 0: resnet18, BatchNorm, folded" in out
    for command in (("eval", "pusht", "--seeds", "1"), ("collect", "pusht", "--episodes", "1")):
        out_folder = str(folder.parent / command[0])
        code, _, err = run(capsys, *command, "--policy", str(folder), "--out", out_folder)
        assert code == 2 and f"it sees images ({TOP}, {SIDE}), but the simulator 'pusht'" in err


# Features that are reused under a bound


def level(value: float, n: int, *changes: tuple[int, int, int]) -> Any:
    """n uint8 images of one level; ``changes``: of image i, level and size of a square in it."""
    images = np.full((n, *SIZE, 3), value, np.uint8)
    for i, other, size in changes:
        images[i, :size, -size:] = other
    return images


def reusing(folder: Path, bound: float, lanes: int = 1) -> Any:
    options = {"sampler": "ddim", "num_inference_steps": 2}
    return tsad.load(folder, lanes=lanes, reuse_images=bound, **options)


def test_the_difference_of_images_is_that_of_their_worst_square() -> None:
    one, other = level(100, 2, (1, 228, 8))
    assert seeing.difference(one, other) == 128  # 40 x 48 is whole squares
    assert seeing.difference(one, level(100, 1, (0, 228, 4))[0]) == 32
    noisy = np.clip(one + np.random.default_rng(0).normal(0, 3, one.shape), 0, 255).astype(np.uint8)
    assert 2 < seeing.difference(one, noisy) < 4 < np.abs(noisy - one.astype(int)).max()
    assert seeing.difference(floats(one), floats(other)) == pytest.approx(128)
    narrow = one[:33, :41].copy()  # squares at the edges of one row and one column
    narrow[-1] += 6
    assert seeing.difference(one[:33, :41], narrow) == 6


def test_a_frame_within_the_bound_takes_the_features_of_the_one_encoded(folder: Path) -> None:
    policy, n = reusing(folder, 3.0), load(folder).n_obs_steps
    assert policy.reuse_images == 3 and load(folder).reuse_images == 0
    assert "reused within 3)" in repr(policy) and "reused" not in repr(load(folder))
    obs = observed(policy)

    def see(top: Any) -> tuple[Any, dict[str, int]]:
        found = policy.encode(obs | {TOP: top})
        policy(obs | {TOP: top})
        return found, policy.stats["images"]

    first, counts = see(level(100, n))
    assert counts == {"encoded": 1 + n, "known": n - 1, "reused": 0}
    near, counts = see(level(103, n))  # a camera of its own: the other one is known
    assert counts == {"encoded": 0, "known": n, "reused": n}
    np.testing.assert_array_equal(near, first)
    # 106 is 3 from what came last, but 6 from what was encoded: nothing adds up
    far, counts = see(level(106, n))
    assert counts["encoded"] == 1 and not np.array_equal(far, first)
    np.testing.assert_array_equal(far, load(folder).encode(obs | {TOP: level(106, n)}))
    small, counts = see(level(106, n, (n - 1, 206, 8)))  # a thing of 8 x 8 pixels
    assert counts["encoded"] == 1 and not np.array_equal(small, far)
    policy.reset()
    _, counts = see(level(106, n))
    assert counts == {"encoded": 1 + n, "known": n - 1, "reused": 0}


def test_reuse_is_of_a_lane_and_its_camera(folder: Path) -> None:
    policy, n = reusing(folder, 3.0, lanes=2), load(folder).n_obs_steps
    obs = observed(policy, 2)
    still = {TOP: np.stack([level(100, n), level(200, n)]), SIDE: np.stack([level(200, n)] * 2)}
    policy(obs | still)
    assert policy.stats["images"]["encoded"] == 4
    moved = {TOP: still[TOP] + np.uint8(2), SIDE: still[SIDE]}
    moved[TOP][1] = 101  # within the bound of the other lane's
    policy(obs | moved)
    assert policy.stats["images"] == {"encoded": 1, "known": 3 * n - 1, "reused": n}


def test_of_several_the_nearest_is_taken(folder: Path) -> None:
    policy, n = reusing(folder, 4.0), load(folder).n_obs_steps
    obs = observed(policy)
    policy(obs | {TOP: level(100, n, (n - 1, 106, 48))})
    assert policy.stats["images"]["encoded"] == n + 2
    for top, encoded in ((104, 106), (102, 100)):
        got = policy.encode(obs | {TOP: level(top, n)})
        np.testing.assert_array_equal(got, load(folder).encode(obs | {TOP: level(encoded, n)}))


def test_the_bound_is_kept_and_checked(folder: Path) -> None:
    policy = reusing(folder, 3.0)
    for twin in (copy.copy(policy), pickle.loads(pickle.dumps(policy))):
        assert twin.reuse_images == 3
    setting = Setting.of({"reuse_images": 2})
    assert setting.options()["reuse_images"] == 2 and setting.key(policy)["reuse_images"] == 2
    assert "reuse_images" not in Setting(reuse_images=0).key(policy)
    wrong: dict[Any, Any] = {-1: ValueError, 256: ValueError, np.nan: ValueError, "2": TypeError}
    for value, error in (*wrong.items(), (True, TypeError)):
        with pytest.raises(error, match="reuse_images: expected a number from 0"):
            tsad.load(folder, reuse_images=value)
    with pytest.raises(ValueError, match="reuse_images: expected None, .* no images, got 2"):
        tsad.load("pusht", reuse_images=2)


@pytest.mark.parametrize(("precision", "bound"), [("int16", 5e-3), ("int8", 6e-2)])
def test_the_encoders_precision_is_kept_and_checked(
    folder: Path, precision: str, bound: float
) -> None:
    half = tsad.load(folder, vision_precision=precision, sampler="ddim", num_inference_steps=2)
    whole = load(folder)
    assert (half.vision_precision, whole.vision_precision) == (precision, "float32")
    assert half.precision == whole.precision == "float32"
    obs = observed(half)
    right, found = whole.encode(obs), half.encode(obs)
    images = right[:, : -3 - 4] if found.shape == right.shape else right
    assert 0 < np.abs(found - right).max() <= bound * np.abs(images).max()
    assert half.stats["weight_bytes"] < whole.stats["weight_bytes"]
    for twin in (copy.copy(half), pickle.loads(pickle.dumps(half))):
        assert twin.vision_precision == precision
        np.testing.assert_array_equal(twin.encode(obs), found)
    setting = Setting.of({"vision_precision": precision})
    assert setting.options()["vision_precision"] == precision
    assert setting.key(half)["vision_precision"] == precision
    assert "vision_precision" not in Setting(vision_precision="float32").key(whole)
    named = "vision_precision: expected one of 'float32', 'int16', 'int8', got 'int4'"
    with pytest.raises(ValueError, match=named):
        tsad.load(folder, vision_precision="int4")
    with pytest.raises(ValueError, match="vision_precision: expected None, .* sees no images"):
        tsad.load("pusht", vision_precision=precision)


@pytest.mark.parametrize("precision", ["int16", "int8"])
def test_a_preset_has_the_encoders_precision(
    folder: Path, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    preset = Preset(
        name="half",
        model_sha256=model_sha256(folder),
        sampler="ddim",
        num_inference_steps=2,
        timestep_spacing="leading",
        precision="float32",
        vision_precision=precision,
    )
    assert f"images in {precision}" in preset.words()
    save_presets(folder, [(preset, None)])
    try:
        policy = tsad.load(folder, preset="half")
        assert policy.vision_precision == precision
        assert f"images in {precision})" in repr(policy)
        assert tsad.load(folder, preset="half", vision_precision=precision) is not None
        with pytest.raises(ValueError, match="vision_precision: got 'float32', but the preset"):
            tsad.load(folder, preset="half", vision_precision="float32")
        code, out, _ = run(capsys, "info", str(folder))
        assert code == 0 and "folded, float32, " in out and f"images in {precision}" in out
    finally:
        (folder / "presets.json").unlink()
