"""Simulators with cameras: what a policy sees of them, and what may come in between."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import vision_cases as vision  # noqa: E402
from command_line import run  # noqa: E402
from fakes import CopyableWorld, FakePolicy, FakeWorld  # noqa: E402

import tsad  # noqa: E402
from tsad import sim  # noqa: E402
from tsad.sim.disturbance import Disturbance, Disturbed  # noqa: E402
from tsad.sim.pusht import PushTPixels  # noqa: E402
from tsad.sim.search import Search, Searcher  # noqa: E402

TOP, SIDE = CAMERAS = ["observation.images.top", "observation.images.side"]
SIZE = (32, 40)
SHORT = ["--sampler", "ddim", "--steps", "2"]
DISTURBANCES = ["brightness=0.5", "noise=0.1", "occlusion=0.5", "brightness=1,noise=0.2"]


class Scene(CopyableWorld):
    """A fake world with two cameras, one of them in floats, and a number that no policy sees."""

    name = "scene"
    obs_shapes = {
        TOP: (*SIZE, 3), SIDE: (3, *SIZE), vision.STATE: (3,), vision.ENV: (4,), "joint": (1,),
    }  # fmt: skip
    obs_dim = None
    drawn: Any = None

    def seen(self) -> Any:
        if self.drawn is None:
            self.drawn = np.empty((*SIZE, 3), np.uint8)
        rows = (
            np.arange(np.prod(SIZE))[:, None] * self.position
        )  # one buffer for all, as renderers do
        self.drawn[:] = (127 * (1 + np.sin(rows))).reshape(*SIZE, 3)
        side = np.float32(self.drawn[::-1].transpose(2, 0, 1) / 255)
        numbers = np.resize(self.position, 4)
        return {
            TOP: self.drawn,
            SIDE: side,
            vision.STATE: numbers[:3],
            vision.ENV: numbers,
            "joint": [7],
        }


class Seer(FakePolicy):
    """`FakePolicy` that acts by all that it is shown."""

    def __call__(self, obs: Any, *, lanes: Any = None) -> Any:
        n = len(lanes)
        assert {k: (v.dtype, v.shape[:2]) for k, v in obs.items()} == {
            k: (np.uint8 if k == TOP else np.float32, (n, self.n_obs_steps))
            for k in Scene.obs_shapes
        }
        rows = [
            [sum(float(np.sin(v[i, t]).mean()) for v in obs.values()), obs[SIDE][i, t].mean(),
             obs["joint"][i, t, 0]]
            for i in range(n) for t in range(self.n_obs_steps)
        ]  # fmt: skip
        flat = np.array(rows, np.float32).reshape(n, self.n_obs_steps, 3)
        return super().__call__(flat, lanes=lanes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("seeing") / "policy"
    vision.lerobot_folder(path, CAMERAS, SIZE)
    return path


@lru_cache
def loaded(folder: Path, lanes: int) -> Any:
    return tsad.load(folder, lanes=lanes, sampler="ddim", num_inference_steps=2)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("scene", "test_sim_images:Scene", first_seed=100_000)


def play(policy: Any, lanes: int, seeds: Any = range(8), **options: Any) -> dict[int, Any]:
    worlds = [Scene() for _ in range(lanes)]
    played = sim.rollouts(policy, worlds, seeds, **options)
    return {e.seed: replace(e, chunk_ms_mean=0.0, chunk_ms_max=0.0) for e in played}


# ---- episodes


@pytest.mark.parametrize("disturb", [None, *DISTURBANCES])
def test_lanes_change_nothing(disturb: str | None) -> None:
    how = None if disturb is None else Disturbance.parse(disturb)
    alone = play(Seer(1), 1, disturb=how)
    assert (
        play(Seer(3), 3, disturb=how) == alone == play(Seer(2), 1, reversed(range(8)), disturb=how)
    )
    assert (alone == play(Seer(1), 1)) is (how is None)


def test_an_image_policy_sees_what_it_has_names_for(folder: Path) -> None:
    policy = loaded(folder, 1)
    chunks: list[sim.Chunk] = []
    assert sorted(play(policy, 1, range(6), on_chunk=chunks.append)) == list(range(6))
    first = chunks[0].obs
    assert set(first) == {feature["name"] for feature in policy.config["features"]}
    seen = Scene().reset(0)
    for name, value in first.items():
        np.testing.assert_array_equal(value[0], np.stack([seen[name]] * 2).astype(value.dtype))
    # what was called is what a loop of one's own calls, and images of the past are no buffers
    long = next(a.seeds[0] for a, b in zip(chunks, chunks[1:], strict=False) if a.seeds == b.seeds)
    policy.reset(seed=[sim.noise_seed(long)])
    for chunk in (chunk for chunk in chunks if chunk.seeds == [long]):
        np.testing.assert_array_equal(policy(chunk.obs), chunk.actions)
    assert not np.array_equal(chunk.obs[TOP][0, 0], chunk.obs[TOP][0, 1])


def test_particles_see_it_too() -> None:
    search = Search(particles=2, start=0.3, chunks=4, winners=1)
    found = [Searcher(Seer(2), [Scene(), Scene()], search)(seed) for seed in range(6)]
    assert any(found)
    for demonstration in (d for some in found for d in some):
        np.testing.assert_array_equal(demonstration.states[0].dtype, np.float32)
    blind = type("Blind", (Scene,), {"state": property()})
    with pytest.raises(ValueError, match="'scene' has obs_shapes and no method state"):
        Searcher(Seer(2), [blind(), blind()], search)


# ---- what does not fit


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({SIDE: None}, f"it sees '{SIDE}', but the simulator 'scene' gives '{TOP}', "),
        (
            {TOP: (40, 32, 3)},
            rf"its '{TOP}' is \(32, 40, 3\) or \(3, 32, 40\), but .* \(40, 32, 3\)",
        ),
        (
            {vision.ENV: (5,)},
            rf"its '{vision.ENV}' is \(4,\), but the simulator 'scene' gives \(5,\)",
        ),
        ({vision.ENV: (4, 4, 3)}, rf"its '{vision.ENV}' is \(4,\), but"),
        ({TOP: (3,)}, rf"its '{TOP}' is \(32, 40, 3\) or"),
    ],
)
def test_a_policy_that_sees_other_things_is_refused(
    folder: Path, shapes: dict[str, Any], message: str
) -> None:
    merged = Scene.obs_shapes | shapes
    world = type("Other", (Scene,), {"obs_shapes": {k: v for k, v in merged.items() if v}})
    with pytest.raises(ValueError, match=f"^policy: {message}"):
        sim.check(loaded(folder, 1), world())


def test_other_policies_and_simulators_are_refused(folder: Path) -> None:
    low = tsad.load("pusht", num_inference_steps=2, sampler="ddim")
    with pytest.raises(ValueError, match="policy: it sees 20 numbers without names, but .*'joint'"):
        sim.check(low, Scene())
    with pytest.raises(ValueError, match=r"it sees images .*; play it in one that gives images"):
        sim.check(loaded(folder, 1), FakeWorld())
    how = Disturbance(noise=0.1)
    with pytest.raises(
        ValueError, match="^disturb: images are disturbed, but of the simulator 'fake'"
    ):
        list(sim.rollouts(FakePolicy(), [FakeWorld()], [0], disturb=how))
    numbers = type("Numbers", (Scene,), {"obs_shapes": {"joint": (1,)}})
    with pytest.raises(ValueError, match="^disturb: .* the policy sees none"):
        sim.check(FakePolicy(), numbers(), disturb=how)


@pytest.mark.parametrize(
    ("shapes", "given"),
    [
        ({}, "{}"),
        ([("a", (1,))], "a"),
        ({"a": 3}, "3"),
        ({"a": (4, 5)}, "4, 5"),
        ({1: (3,)}, "1"),
        ({"a": (4, 5, 4)}, "4, 5, 4"),
        ({"a": (0,)}, "0"),
        ({"a": (2.0,)}, "2.0"),
    ],
)
def test_obs_shapes_are_checked(monkeypatch: Any, shapes: Any, given: str) -> None:
    monkeypatch.setattr(Scene, "obs_shapes", shapes)
    with pytest.raises(ValueError, match=f"Scene whose obs_shapes is .*{given}.*, expected a dict"):
        sim.make("scene")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs[TOP], rf"expected a dict with the keys \['{TOP}', .*, got a ndarray"),
        (lambda obs: {**obs, "a": 1}, r"expected a dict .* got \['a', 'joint', "),
        (lambda obs: {**obs, TOP: obs[TOP][1:]}, r"expected uint8 \(32, 40, 3\), .*\(31, 40, 3\)"),
        (lambda obs: {**obs, TOP: obs[TOP] / 255}, r"expected uint8 .* got float64 .*; uint8 "),
        (lambda obs: {**obs, SIDE: obs[TOP]}, r"side'\] of .*: expected float32 \(3, 32, 40\),"),
        (lambda obs: {**obs, "joint": [np.nan]}, r"\['joint'\] of .*expected 1 finite numbers"),
    ],
)
@pytest.mark.parametrize("call", ["reset", "step"])
def test_what_a_simulator_shows_is_checked(change: Any, message: str, call: str) -> None:
    class Odd(Scene):
        def reset(self, seed: int) -> Any:
            obs = super().reset(seed)
            return change(obs) if call == "reset" else obs

        def step(self, action: Any) -> Any:
            step = super().step(action)
            return step._replace(obs=change(step.obs))

    where = r"the observation.*reset\(5\)" if call == "reset" else r"its obs.*step\(action\)"
    with pytest.raises(sim.SimulatorError, match=message) as info:
        list(sim.rollouts(Seer(1), [Odd()], [5]))
    assert re.search(f"simulator 'scene': {where}", str(info.value))


# ---- disturbed


@pytest.mark.parametrize("floats", [False, True])
def test_what_is_done_to_images(floats: bool) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(60, 120, (40, 30, 3), np.uint8)
    given = np.float32(image / 255).transpose(2, 0, 1) if floats else image
    obs = {"a": given, "b": given, "n": np.ones(2, np.float32)}

    def seen(how: Disturbance, seed: Any, name: str = "a", times: int = 1) -> Any:
        camera = Disturbed(how, seed)
        for _ in range(times):
            found = camera(obs)
        assert found["n"] is obs["n"] and found[name].dtype == given.dtype
        value = found[name]
        assert value.shape == given.shape
        return value.transpose(1, 2, 0) * 255 if floats else value.astype(np.float32)

    plain = image.astype(np.float32)
    bright = Disturbance(brightness=0.5)
    factors = np.array([seen(bright, seed).sum() / plain.sum() for seed in range(40)])
    assert 0.5 <= factors.min() < 0.6 and 1.4 < factors.max() <= 1.5
    np.testing.assert_allclose(seen(bright, 3), plain * factors[3], atol=0.6)
    np.testing.assert_array_equal(seen(bright, 3), seen(bright, 3, "b", 4))

    noisy = seen(Disturbance(noise=0.05), 1) - plain
    assert abs(noisy.std() / 255 - 0.05) < 0.003 and abs(noisy.mean()) < 1
    assert not np.array_equal(noisy, seen(Disturbance(noise=0.05), 1, times=2) - plain)
    assert (
        0 <= seen(Disturbance(noise=1.0), 1).min() and seen(Disturbance(noise=1.0), 1).max() <= 255
    )

    hidden = Disturbance(occlusion=0.5)
    places = []
    for seed in range(20):
        changed = np.abs(seen(hidden, seed) - plain).max(-1) > 0.6
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert np.ptp(rows) < 15 and np.ptp(columns) < 15 and changed.sum() > 200  # of 15 x 15
        colour = seen(hidden, seed)[changed]
        assert np.ptp(colour, 0).max() < 1e-3
        np.testing.assert_array_equal(seen(hidden, seed), seen(hidden, seed, times=3))
        places.append((rows[0], columns[0]))
    assert len(set(places)) > 15
    assert not np.array_equal(seen(hidden, 0, "a"), seen(hidden, 0, "b"))  # cameras apart
    np.testing.assert_array_equal(image, plain.astype(np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got ''"),
        ("light=0.3", "got 'light=0.3', expected KIND=AMOUNT"),
        ("noise", "got 'noise'"),
        ("noise=x", "got"),
        ("noise=0.1,noise=0.2", "got"),
        ("noise=1.5", "noise: expected a number"),
        ("noise=-0.1", "noise: expected"),
        ("noise=nan", "noise: expected"),
        ("noise=0", "above 0"),
        ("brightness=0.1,", "got"),
    ],
)
def test_words_for_it(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Disturbance.parse(text)
    how = Disturbance.parse("noise=.05, brightness=0.30")
    assert how == Disturbance(brightness=0.3, noise=0.05)
    assert str(how) == "brightness=0.3,noise=0.05" and Disturbance.parse(str(how)) == how


# ---- commands


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder with a simulator of one's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    Path("cameras.py").write_text("from test_sim_images import Scene\n")
    yield
    sys.modules.pop("cameras", None)


@pytest.mark.slow  # nothing that other tests have not shown a sanitizer
def test_commands_play_it(capsys: Any, own: None, folder: Path) -> None:
    line = ["--simulator", "cameras:Scene", "--policy", str(folder)]
    rows = [
        {"name": "clean", "steps": 2, "sampler": "ddim"},
        {"name": "dark", "steps": 2, "sampler": "ddim", "disturb": "brightness=0.80"},
    ]
    Path("rows.json").write_text(json.dumps(rows))
    seeds = ["--seeds", "3", "--lanes", "2"]
    code, out, err = run(
        capsys, "eval", *line, *seeds, "--settings", "rows.json", "--out", "rows", "--json"
    )
    assert code == 0, err
    found = json.loads(out)["rows"]
    assert found["dark"]["settings"]["disturb"] == "brightness=0.8"
    assert "disturb" not in found["clean"]["settings"]
    more = [*seeds, *SHORT, "--disturb", "brightness=.8"]
    code, out, err = run(capsys, "eval", *line, *more, "--baseline", "rows/clean.json")
    assert code == 0 and "seen     with brightness=0.8" in out and "3 pairs of equal seed" in out
    assert f"score    {found['dark']['score']['mean']:.3f}," in out  # a row is the option
    code, out, err = run(capsys, "collect", *line, "--episodes", "2", "--out", "kept", *SHORT)
    assert code == 0, err
    policy = loaded(folder, 1)
    _, episodes = tsad.sim.recording.read_collection(Path("kept"))
    seen = {k: np.stack([v] * 2) for k, v in Scene().reset(0).items() if k != "joint"}
    expected = policy.encode({k: v if v.ndim == 4 else np.float32(v) for k, v in seen.items()})
    np.testing.assert_array_equal(episodes[0].obs[0], expected)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--disturb", "fog=1"], "argument --disturb: got 'fog=1', expected KIND=AMOUNT"),
        (
            ["--settings", "bad.json", "--out", "o"],
            r"setting 0: disturb: got 'fog=1', expected KIND",
        ),
        (
            ["--settings", "late.json", "--out", "o"],
            "argument --disturb: images are disturbed, but",
        ),
        (
            ["--disturb", "noise=0.1"],
            "argument --disturb: images are disturbed, but of the simulator",
        ),
    ],
)
def test_what_cannot_be_disturbed(capsys: Any, own: None, more: list[str], message: str) -> None:
    Path("bad.json").write_text('[{"name": "a", "disturb": "fog=1"}]')
    Path("late.json").write_text('[{"name": "a"}, {"name": "b", "disturb": "noise=0.1"}]')
    code, _, err = run(capsys, "eval", "pusht", "--seeds", "2", *more)
    assert code == 2 and message in err, err
    assert not Path("o").exists()


# ---- Push-T


@pytest.mark.slow  # the same code as above
def test_an_image_policy_plays_pushts_pixels(
    capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gym_pusht")
    vision.pusht_folder(tmp_path / "policy")
    rows = [{"name": "a", "sampler": "ddim", "steps": 1}]
    rows += [rows[0] | {"name": "b", "disturb": "noise=0.5"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["--policy", str(tmp_path / "policy"), "--seeds", "2", "--lanes", "2", "--json"]
    monkeypatch.setattr(PushTPixels, "max_steps", 16)
    code, out, err = run(
        capsys, "eval", "pusht_pixels", *words, "--settings", str(tmp_path / "rows.json"),
        "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert found["rows"]["b"]["settings"]["disturb"] == "noise=0.5"
    assert found["rows"]["a"]["settings"]["packages"].keys() >= {"gym-pusht", "opencv-python"}


def test_pixels_are_what_lerobots_policies_see() -> None:
    """The observations of gym-pusht's own environment of that kind, step by step."""
    pytest.importorskip("gym_pusht")
    import gym_pusht  # noqa: F401
    import gymnasium

    theirs = gymnasium.make("gym_pusht/PushT-v0", obs_type="pixels_agent_pos")
    ours: Any = sim.make("pusht_pixels")
    rng = np.random.default_rng(0)
    seen, _ = theirs.reset(seed=3)
    found = ours.reset(3)
    for _ in range(6):
        assert {name: value.shape for name, value in found.items()} == ours.obs_shapes
        np.testing.assert_array_equal(found["observation.image"], seen["pixels"])
        np.testing.assert_array_equal(found["observation.state"], np.float32(seen["agent_pos"]))
        for name, other in (("image", "observation.image"), ("agent_pos", "observation.state")):
            np.testing.assert_array_equal(found[name], found[other])  # Diffusion Policy's
        action = found["observation.state"] + rng.uniform(-60, 60, 2).astype(np.float32)
        before, found = found, ours.step(action).obs
        seen, *_ = theirs.step(action)
    assert not np.array_equal(before["observation.image"], found["observation.image"])
    again = ours.restore(ours.snapshot())
    np.testing.assert_array_equal(again["observation.image"], found["observation.image"])
    theirs.close()
    ours.close()
