"""Lead and smoothing: what is made of the actions that are executed, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from command_line import run
from fakes import FakeWorld
from hypothesis import given, settings
from hypothesis import strategies as st
from policies import make_policy, noises, observations, save_policy

import tsad
from tsad import Plan, _core, sim
from tsad.presets import Preset, model_sha256, read_presets, save_presets
from tsad.reference import LeadReference, ReferencePolicy, WarmReference
from tsad.reference.lead import executed_actions
from tsad.sim import offline


def by_numpy(policy: Any, chunks: list[Any], executed: int, clip: float = np.inf) -> Any:
    """What is executed of the last of these chunks (T, action_dim), raw units, float64."""
    chunk = np.array(chunks[-1], np.float64)
    T, actions = len(chunk), chunk.copy()
    if policy.smoothing:
        for t in range(1, T - 1):
            actions[t] = 0.25 * chunk[t - 1] + 0.5 * chunk[t] + 0.25 * chunk[t + 1]
    if policy.lead and len(chunks) > 1:
        for t in range(T):
            actions[t] += policy.lead * (actions[t] - chunks[-2][min(t + executed, T - 1)])
        affine = policy.config["normalizer"]["action"]
        ends = [(end - np.array(affine["offset"])) / affine["scale"] for end in (-clip, clip)]
        actions = np.clip(actions, *ends)
    begin = policy.n_obs_steps - 1
    return actions[begin : begin + policy.n_action_steps]


def close(got: Any, wanted: Any, lead: float) -> None:
    scale = (1 + 2 * lead) * max(np.abs(wanted).max(), 1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("warm", [None, 3])
@pytest.mark.parametrize(
    ("lead", "smoothing"), [(0.0, True), (0.3, False), (0.3, True), (10.0, True)]
)
@pytest.mark.parametrize("name", ["tiny", "tiny_long"])
def test_executed_actions_are_moved_and_nothing_else(
    name: str, lead: float, smoothing: bool, warm: int | None, clip: bool
) -> None:
    options: dict[str, Any] = {"lanes": 2, "warm_start": warm, "clip": clip, "sampler": "ddim"}
    policy, whole, plain = (
        make_policy(name, threads=threads, **options, **moved)
        for threads, moved in (
            (2, {"lead": lead, "smoothing": smoothing}),
            (1, {"lead": lead, "smoothing": smoothing}),
            (1, {}),
        )
    )
    for each in (policy, whole, plain):
        each.sparsity = 0.3
    assert (policy.lead, policy.smoothing) == (lead, smoothing) and plain.lead == 0
    seen: list[list[Any]] = [[], []]
    limit, reached = 1.0 if clip else np.inf, False
    for chunk, moved in enumerate(([0, 0], [2, 4], [3, 0], [5, 1], [2, 2])):
        if chunk == 3:  # one lane starts anew
            seen[1] = []
            for each in (policy, whole, plain):
                each.reset(lanes=[1])
        obs, noise = observations(policy, chunk), noises(policy, chunk)
        knows = {"executed": moved} if warm or lead else {}
        chunks = plain(
            obs, noise=noise, return_horizon=True, **({"executed": moved} if warm else {})
        )
        np.testing.assert_array_equal(whole(obs, noise=noise, return_horizon=True, **knows), chunks)
        got = policy(obs, noise=noise, **knows)
        for lane in range(2):
            seen[lane].append(chunks[lane])
            wanted = by_numpy(policy, seen[lane], moved[lane], limit)
            close(got[lane], wanted, lead)
            free = by_numpy(policy, seen[lane], moved[lane])
            reached |= bool(np.abs(free - wanted).max() > 1e-3)
    assert reached == (clip and lead > 0)
    assert policy.stats["chunks"] == plain.stats["chunks"]
    assert policy.plan == plain.plan


def test_without_being_told_all_that_a_chunk_returns_was_executed() -> None:
    policy, told = (make_policy("tiny_long", lead=0.4) for _ in range(2))
    for chunk in range(3):
        obs, noise = observations(policy, chunk), noises(policy, chunk)
        got = policy(obs, noise=noise)
        np.testing.assert_array_equal(got, told(obs, noise=noise, executed=policy.n_action_steps))


@pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])
def test_lanes_apart_and_together(backend: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TSAD_CPU", backend)
    options: dict[str, Any] = {"lead": 0.3, "smoothing": True, "lanes": 3}
    together, apart = (make_policy(threads=threads, **options) for threads in (2, 1))
    for chunk in range(3):
        obs, noise = observations(together, chunk), noises(together, chunk)
        got = together(obs, noise=noise, executed=[1, 2, 3])
        for lane in (2, 0, 1):
            alone = apart(
                obs[lane : lane + 1],
                noise=np.ascontiguousarray(noise[:, lane : lane + 1]),
                lanes=[lane],
                executed=lane + 1,
            )
            np.testing.assert_array_equal(alone[0], got[lane])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(["tiny", "tiny_long"]),
    kind=st.sampled_from(["ddpm", "ddim", "dpmsolver++"]),
    warm=st.none() | st.integers(1, 4),
    lead=st.floats(0, 2),
    smoothing=st.booleans(),
    clip=st.booleans(),
    moved=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=3),
    seed=st.integers(0, 99),
)
def test_the_engine_is_its_specification(
    name: str, kind: str, warm: int | None, lead: float, smoothing: bool, clip: bool,
    moved: list[tuple[int, int]], seed: int,
) -> None:  # fmt: skip
    policy = make_policy(
        name, sampler=kind, steps=5, lanes=2, warm_start=warm, lead=lead, smoothing=smoothing,
        clip=clip,
    )  # fmt: skip
    case = cases.config(name, prediction_type="sample", clip_sample=clip)
    args = case, cases.random_tensors(case["network"], 0)
    options: dict[str, Any] = {"lanes": 2, "sampler": kind, "num_inference_steps": 5}
    inner = (
        ReferencePolicy(*args, **options)
        if warm is None
        else WarmReference(*args, **options, warm_start=warm)
    )
    twin = LeadReference(inner, lead=lead, smoothing=smoothing)
    sources = cases.random_plan(
        np.random.default_rng(seed), policy.num_inference_steps, policy.n_blocks, filled=False
    )
    policy.plan = Plan(sources, first=Plan(sources))
    for chunk, executed in enumerate([(0, 0), *moved]):
        obs, noise = observations(policy, seed + chunk), noises(policy, seed + chunk)
        wanted = twin(obs, noise, executed, sources, first=sources)
        knows = {"executed": list(executed)} if warm or np.float32(lead) else {}
        got = policy(obs, noise=noise, **knows)
        assert np.abs(got - wanted).max() <= 1e-4 * (1 + 2 * lead) * max(np.abs(wanted).max(), 1)


def test_a_straight_line_stays_one() -> None:
    """Also at the ends of the horizon, and for a chunk that goes on as the one before foresaw."""
    line = np.linspace([0.0, 1.0], [0.9, -1.0], 10)
    options: dict[str, Any] = {"smoothing": True, "clip": np.inf}
    got = executed_actions(line, line, 0, lead=0.7, **options)
    np.testing.assert_allclose(got, line, rtol=0, atol=1e-15)
    step = (np.arange(10) >= 5)[:, None] * np.ones(2)
    got = executed_actions(step, None, 0, lead=0.7, **options)
    np.testing.assert_array_equal(got[:, 0], [0, 0, 0, 0, 0.25, 0.75, 1, 1, 1, 1])


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "p")
    assert tsad.load(folder, lead=1e-300).lead == 0  # what float32 takes for none
    for wrong in (-0.1, 10.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"lead: expected a number from 0 \(none\) to 10, got"):
            tsad.load(folder, lead=wrong)
        with pytest.raises(ValueError, match=r"lead: expected a number from 0 \(none\) to 10, got"):
            _core.Policy(make_policy().model, lead=wrong)
    for wrong in ("0.2", True, [0.2]):
        with pytest.raises(TypeError, match="lead: expected a number from 0"):
            tsad.load(folder, lead=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="smoothing: expected True or False, got 1 "):
        tsad.load(folder, smoothing=1)  # type: ignore[arg-type]
    policy = tsad.load(folder, lead=0.2, num_inference_steps=4)
    with pytest.raises(AttributeError, match=r"use tsad.load\(..., lead=0.3\)"):
        policy.lead = 0.3  # type: ignore[misc]
    with pytest.raises(ValueError, match="executed: expected an int from 0 to 5"):
        policy(observations(policy, 0), executed=6)
    smooth = tsad.load(folder, smoothing=True, num_inference_steps=4)
    assert smooth.smoothing and "smoothed" in repr(smooth) and "lead 0.2" in repr(policy)
    with pytest.raises(TypeError, match="executed: expected None.*or with a lead"):
        smooth(observations(smooth, 0), executed=1)


class Line(FakeWorld):
    """Keeps what it was told to do."""

    obs_dim = 6

    def reset(self, seed: int) -> Any:
        super().reset(seed)
        self.done: list[Any] = []
        return np.zeros(6, np.float32)

    def step(self, action: Any) -> Any:
        self.done.append(np.array(action))
        return super().step(action)._replace(obs=np.zeros(6, np.float32), done=False)


def test_episodes_tell_what_was_executed() -> None:
    policy, by_hand = (make_policy("tiny_long", lead=0.5, steps=4) for _ in range(2))
    world = Line()
    (episode,) = sim.rollouts(policy, [world], [3], n_action_steps=3)
    by_hand.reset(lanes=[0], seed=[sim.rollout.noise_seed(3)])
    obs, told = np.zeros((1, 2, 6), np.float32), []
    for chunk in range(episode.chunks):
        told += list(by_hand(obs, executed=3 if chunk else 0)[0, :3])
    np.testing.assert_array_equal(world.done, told[: len(world.done)])


def test_an_offline_error_sees_the_chunk_before(tmp_path: Path) -> None:
    folder = save_policy(tmp_path / "p")
    plain, led = (tsad.load(folder, num_inference_steps=4, lead=lead) for lead in (0, 0.5))
    windows = np.random.default_rng(0).normal(size=(3, 2, 3, 6)).astype(np.float32)
    assert not offline.needs_past(plain) and offline.needs_past(led)
    first, second = offline.actions(plain, windows), offline.actions(led, windows)
    assert (first != second).all()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: Any) -> list[str]:
    """Words of a command that plays a small policy on a small table."""
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    return ["--policy", save_policy(tmp_path / "p"), "--seeds", "8", "--lanes", "4"]


def test_eval_plays_a_lead_and_keeps_it_apart(
    capsys: Any, tmp_path: Path, table: list[str]
) -> None:
    def score(*more: str) -> Any:
        few = ["--sampler", "ddim", "--steps", "4", "--json"]
        code, text, err = run(capsys, "eval", "table", *table, *few, *more)
        assert code == 0, err
        return json.loads(text)

    out = str(tmp_path / "one.json")
    plain, led = score("--out", out), score("--lead", "0.4", "--smoothing")
    assert led["settings"]["lead"] == 0.4 and led["settings"]["smoothing"] is True
    assert plain["summary"]["score"] != led["summary"]["score"]
    assert not {"lead", "smoothing"} & plain["settings"].keys()
    code, _, err = run(capsys, "eval", "table", *table, "--sampler", "ddim", "--steps", "4",
                       "--out", out, "--resume", "--lead", "0.4")  # fmt: skip
    assert code == 2 and "was made with other settings; lead: the file has None" in err
    for wrong in ("-1", "11", "nan", "x"):
        code, _, err = run(capsys, "eval", "table", *table, "--lead", wrong)
        assert code == 2 and f"argument --lead: got '{wrong}', expected a number from 0" in err
    code, text, err = run(capsys, "eval", "table", *table, "--sampler", "ddim", "--steps", "4",
                          "--lead", "0.4", "--baseline", out)  # fmt: skip
    assert code == 0 and "have a lead: judge it by a dense baseline" in text, err


def test_a_sweep_shows_each_loss_against_dense_and_dense_with_a_lead(
    capsys: Any, tmp_path: Path, table: list[str]
) -> None:
    few = {"sampler": "ddim", "steps": 4}
    rows: list[dict[str, Any]] = [
        {"name": "dense", **few},
        {"name": "half", **few, "sparsity": 0.5},
        {"name": "half-led", **few, "sparsity": 0.5, "lead": 0.3},
        {"name": "led", **few, "lead": 0.3},
        {"name": "smooth", **few, "smoothing": True},
        {"name": "other-noise", **few, "lead": 0.3, "noise": 1},
    ]
    file, out = tmp_path / "rows.json", tmp_path / "out"
    file.write_text(json.dumps(rows))
    words = ["eval", "table", *table, "--settings", str(file), "--out", str(out)]
    code, text, err = run(capsys, *words)
    assert code == 0, err
    summary = json.loads((out / "summary.json").read_text())
    played = {
        row["name"]: json.loads((out / f"{row['name']}.json").read_text())["episodes"]
        for row in rows
    }
    scores = {name: np.array([e["score"] for e in own]) for name, own in played.items()}
    won = {name: np.array([float(e["success"]) for e in own]) for name, own in played.items()}
    led = max(("led", "smooth"), key=lambda name: scores[name].mean())
    assert (
        summary["compared_with_lead"]["baseline"] == led
        and summary["compared"]["baseline"] == "dense"
    )
    for key, base, values in (
        ("compared", "dense", scores),
        ("compared_with_lead", led, scores),
        ("compared_success", "dense", won),
    ):
        found = summary[key]["rows"]
        assert found.keys() == scores.keys() - {base}
        for name, facts in found.items():
            wanted = (values[name] - values[base]).mean()
            assert facts["mean_difference"] == pytest.approx(wanted)
    assert "to dense with lead" in text and f"dense with lead: {led}," in text
    assert "success, difference" in text
    # no dense row with a lead: nothing is claimed against one
    file.write_text(json.dumps(rows[:3]))
    code, text, err = run(capsys, *words)
    assert code == 0 and "dense with lead" not in text, err
    for wrong, says in (
        ({"lead": 11}, "lead: got 11, expected a number from 0"),
        ({"lead": True}, "lead: expected float, got True"),
        ({"smoothing": 1}, "smoothing: expected bool, got 1"),
    ):
        file.write_text(json.dumps([{**rows[0], **wrong}]))
        code, _, err = run(capsys, *words)
        assert code == 2 and says in err, err


def test_a_preset_says_it(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    save_policy(folder)
    digest = model_sha256(folder)
    few: dict[str, Any] = {
        "sampler": "ddim", "num_inference_steps": 4, "timestep_spacing": "leading",
    }  # fmt: skip
    wanted = {"led": (0.3, True), "none": (0.0, False), "plain": (None, None)}
    save_presets(
        folder,
        [
            (Preset(name, digest, **few, lead=lead, smoothing=smoothing), None)
            for name, (lead, smoothing) in wanted.items()
        ],
    )
    found = read_presets(folder)
    assert {n: (p.lead, p.smoothing) for n, p in found.items()} == wanted
    assert "smoothed, lead 0.3" in found["led"].words() and ", lead" not in found["none"].words()
    for name, (lead, smoothing) in wanted.items():
        for more in ({}, {"lead": lead or 0, "smoothing": bool(smoothing)}):
            policy = tsad.load(folder, preset=name, **more)
            assert (policy.lead, policy.smoothing) == (lead or 0.0, bool(smoothing))
        with pytest.raises(ValueError, match=f"lead: got 0.5, but the preset '{name}' has"):
            tsad.load(folder, preset=name, lead=0.5)
        with pytest.raises(ValueError, match=f"smoothing: got {not smoothing}, but the preset"):
            tsad.load(folder, preset=name, smoothing=not smoothing)
    file = folder / "presets.json"
    text = file.read_text()
    for old, new, says in (
        ('"lead": 0.3', '"lead": -0.3', r"lead: expected a number from 0 \(none\) to 10, got -0.3"),
        ('"lead": 0.3', '"lead": 11', "lead: expected a number above -1 and at most 10, got 11"),
        ('"smoothing": true', '"smoothing": 1', "smoothing: expected true or false, got 1"),
    ):
        assert old in text
        file.write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=says):
            read_presets(folder)
