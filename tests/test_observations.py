"""Observations of any origin: the same numbers give the same plans, whatever file they are in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from fakes import Table
from policies import observations, save_policy

import tsad
from tsad import planners, sim
from tsad.sim.observations import read_observations
from tsad.sim.results import ResultsError

STEPS = ["--sampler", "ddim", "--steps", "4", "--threads", "1"]
LOAD: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 4, "threads": 1}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return save_policy(tmp_path / "tiny")


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")


def played(policy: Any, seeds: range) -> tuple[list[Any], list[Any]]:
    """Of each episode: the observations of its chunks, and of all its steps but the last."""
    steps: dict[int, list[Any]] = {}
    chunks: dict[int, list[Any]] = {}

    class Watched(Table):
        def reset(self, seed: int) -> Any:
            self.steps = steps.setdefault(seed, [super().reset(seed)])
            return self.steps[0]

        def step(self, action: Any) -> sim.Step:
            step = super().step(action)
            self.steps.append(step.obs)
            return step

    def keep(chunk: sim.Chunk) -> None:
        for seed, obs in zip(chunk.seeds, chunk.obs, strict=True):
            chunks.setdefault(seed, []).append(obs)

    list(sim.rollouts(policy, [Watched()], seeds, on_chunk=keep))
    return [np.stack(chunks[s]) for s in seeds], [np.stack(steps[s][:-1]) for s in seeds]


def files(policy: Any, seeds: range, folder: Path) -> dict[str, Path]:
    """The same episodes in every form."""
    chunks, steps = played(policy, seeds)
    assert len({len(each) for each in chunks}) > 1
    ends = np.cumsum([len(each) for each in chunks])
    step_ends = np.cumsum([len(each) for each in steps])
    found = {name: folder / f"{name}.npz" for name in ("chunks", "steps", "doubles")}
    np.savez(found["chunks"], obs=np.concatenate(chunks), episode_ends=ends)
    np.savez(found["steps"], obs=np.concatenate(steps), action=0, episode_ends=step_ends)
    doubles = np.concatenate(chunks).astype(np.float64)
    np.savez_compressed(found["doubles"], obs=doubles, episode_ends=ends.astype(np.uint16))
    try:
        import zarr
    except ModuleNotFoundError:
        return found
    version: Any = {} if zarr.__version__.startswith("2.") else {"zarr_format": 2}
    root = zarr.open_group(str(folder / "steps.zarr"), mode="w", **version)  # of Diffusion Policy
    for name, value in (("data/obs", np.concatenate(steps)), ("meta/episode_ends", step_ends)):
        root[name] = value
    return found | {"zarr": folder / "steps.zarr"}


def test_every_form_is_read_alike(tiny: str, tmp_path: Path) -> None:
    policy = tsad.load(tiny, **LOAD)
    chunks, _ = played(policy, range(6))
    for path in files(policy, range(6), tmp_path).values():
        settings, episodes = read_observations(path, policy)
        assert settings == {} and [episode.number for episode in episodes] == list(range(6))
        assert not any(episode.simulated for episode in episodes)
        for episode, wanted in zip(episodes, chunks, strict=True):
            assert episode.obs.dtype == np.float32
            np.testing.assert_array_equal(episode.obs, wanted)
    single = np.concatenate(chunks)
    np.save(tmp_path / "single.npy", single)
    np.savez(tmp_path / "single.npz", obs=single, other="words")
    for name in ("single.npy", "single.npz"):
        _, episodes = read_observations(tmp_path / name, policy)
        assert [episode.number for episode in episodes] == list(range(len(single)))
        np.testing.assert_array_equal([episode.obs[0] for episode in episodes], single)


def test_pushts_states_are_observations(tmp_path: Path) -> None:
    """As `tsad generate` writes them, and Diffusion Policy's own data has them."""
    from tsad.sim.pusht import observation

    states = np.random.default_rng(0).uniform(50, 400, (20, 5))
    np.savez(tmp_path / "d.npz", state=states, action=states[:, :2], episode_ends=[9, 20])
    _, episodes = read_observations(tmp_path / "d.npz", tsad.load("pusht"))
    # called at steps 0 and 8 of the first episode, and 9 and 17 of all
    assert [len(episode.obs) for episode in episodes] == [2, 2]
    rows = [(0, 0), (7, 8), (9, 9), (16, 17)]
    wanted = [[observation(states[i]) for i in row] for row in rows]
    found = np.concatenate([episode.obs for episode in episodes])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


OBS = np.zeros((7, 3, 6))  # of a policy that sees 3 x 6
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"observations": OBS}, r"expected an array 'obs'.*got only 'observations'; save the"),
    ({}, r"got only nothing"),
    ({"obs": OBS.swapaxes(1, 2)}, r"expected shape \(N, 3, 6\).*got \(7, 6, 3\); swap the axes"),
    ({"obs": np.zeros((6, 4, 6))}, r"got \(6, 4, 6\); this policy sees the last 3: obs\[:, -3:\]"),
    ({"obs": np.zeros((6, 18))}, r"got \(6, 18\); use obs\.reshape\(-1, 3, 6\)"),
    ({"obs": np.zeros((6, 3, 7))}, r"got \(6, 3, 7\); this policy sees 3 observations of 6 num"),
    ({"obs": np.zeros(6)}, r"got \(6,\); this policy sees"),
    ({"obs": np.zeros((3, 6, 3, 6))}, r"got \(3, 6, 3, 6\); this policy sees"),
    ({"obs": np.zeros((0, 3, 6))}, r"obs: expected numbers, got float64 of shape \(0,"),
    ({"obs": OBS.astype(bool)}, r"obs: expected numbers, got bool.*astype\(np\.float32"),
    ({"obs": OBS.astype(complex)}, r"obs: expected numbers, got complex128"),
    ({"obs": OBS.astype("U3")}, r"obs: expected numbers, got <U3"),
    ({"obs": np.full((6, 3, 6), np.nan)}, r"obs: expected finite float32 numbers, got.*row 0"),
    ({"obs": np.full((6, 3, 6), 1e39)}, r"obs: expected finite float32 numbers"),
    ({"obs": OBS.astype(object)}, r"expected an npz file without pickled objects"),
    (
        {"obs": np.zeros((9, 6))},
        r"\(9, 6\), every step of episodes, without 'episode_ends'.*=\[9\]",
    ),
    (
        {"obs": OBS, "episode_ends": [2, 5]},
        r"episode_ends: expected increasing.*end at 7.*2 \.\. 5",
    ),
    ({"obs": OBS, "episode_ends": [4, 2, 6]}, r"episode_ends: expected increasing numbers"),
    ({"obs": OBS, "episode_ends": [3.0, 6.0]}, r"episode_ends: expected integers of shape \(E,\)"),
    ({"obs": OBS, "episode_ends": 7}, r"episode_ends: expected integers of shape \(E,\)"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG)
def test_what_is_wrong_is_named(
    tiny: str, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        read_observations(path, tsad.load(tiny, **LOAD))


def test_a_collection_of_another_policy_is_refused(tiny: str, tmp_path: Path) -> None:
    """By what it saw: sizes of a folder are checked as those of a file are."""
    policy = tsad.load(tiny, **LOAD)
    with tsad.Recorder(policy, tmp_path / "mine") as recorded:
        recorded.reset(seed=0)
        recorded(np.zeros((policy.n_obs_steps, policy.obs_dim), np.float32))
    assert len(read_observations(tmp_path / "mine", policy)[1]) == 1
    other = tsad.load("pusht")
    seen = (policy.n_obs_steps, policy.obs_dim)
    message = rf"mine: obs: expected shape \(N, 2, 20\), .*got \(1, {seen[0]}, {seen[1]}\)"
    with pytest.raises(ValueError, match=message):
        read_observations(tmp_path / "mine", other)


def test_what_is_no_file_of_observations(tiny: str, tmp_path: Path) -> None:
    policy = tsad.load(tiny, **LOAD)
    for name, content, message in (
        ("text.npz", b"obs", "expected an npz file without pickled objects"),
        ("text.npy", b"obs", "expected an npy file without pickled objects"),
        ("cut.npy", b"\x93NUMPY\x01\x00", "expected an npy file"),
        ("empty.npz", b"", "expected an npz file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_observations(tmp_path / name, policy)
    np.savez(tmp_path / "npz.npy.npz", obs=OBS)
    (tmp_path / "npz.npy.npz").rename(tmp_path / "npz.npy")
    with pytest.raises(ValueError, match=r"whose name ends in \.npz"):
        read_observations(tmp_path / "npz.npy", policy)
    np.save(tmp_path / "steps.npy", np.zeros((9, 6)))
    with pytest.raises(ValueError, match=r"np\.savez\(file, obs=obs, episode_ends=\[9\]\)"):
        read_observations(tmp_path / "steps.npy", policy)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResultsError, match=r"no collection\.json in it"):
        read_observations(tmp_path / "folder", policy)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz', where nothing is"):
        read_observations(tmp_path / "nowhere.npz", policy)


# ---- the commands


def measured(capsys: Any, source: str, data: Path, out: Path) -> planners.Effects:
    pytest.importorskip("torch")
    command = ["plan", "measure", source, "--data", str(data), "--out", str(out)]
    code, _, err = run(capsys, *command, "--chunks", "99", *STEPS)
    assert code == 0, err
    return planners.Effects.load(out)


def collected(capsys: Any, simulator: str, source: str, out: Path, episodes: int) -> Path:
    command = ["collect", simulator, "--policy", source, "--out", str(out), *STEPS]
    code, _, err = run(capsys, *command, "--episodes", str(episodes), "--lanes", "2")
    assert code == 0, err
    return out


def same_effects(a: planners.Effects, b: planners.Effects) -> None:
    for name, value in vars(a).items():
        if name != "metadata":
            np.testing.assert_array_equal(value, getattr(b, name), err_msg=name)


def test_the_same_observations_give_the_same_plans(
    capsys: Any, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tsad collect, a Recorder of two lanes, and arrays: measure, search, tune, eval."""
    from tsad.planners.search import Search

    policy, pair = tsad.load(tiny, **LOAD), tsad.load(tiny, lanes=2, **LOAD)
    sources = {"collect": collected(capsys, "table", tiny, tmp_path / "collected", 6)}
    with tsad.Recorder(pair, tmp_path / "recorded") as recorder:
        list(sim.rollouts(recorder, [Table(), Table()], range(6)))
    sources |= {"Recorder": tmp_path / "recorded", **files(policy, range(6), tmp_path)}

    effects = {
        name: measured(capsys, tiny, path, tmp_path / f"effects-{name}.npz")
        for name, path in sources.items()
    }
    first = effects.pop("collect")
    assert first.metadata["seeds"] == list(range(6)) and first.knows_rollouts
    names = {tuple(each.metadata["seeds"]) for each in effects.values()}
    assert len(names) == 1 and all(isinstance(name, str) for (row,) in [names] for name in row)
    for each in effects.values():
        same_effects(each, first)

    plain = Search.run
    monkeypatch.setattr(Search, "run", lambda self, s, **more: plain(self, s, tries=15, **more))
    start = str(tmp_path / "start.npz")
    planners.uniform(policy, 2).save(start)
    grid = tmp_path / "grid.json"
    rows = [{"name": "four"}, {"name": "two", "steps": 2, "sampler": "ddim"}]
    rows += [{"name": "warm", "sampler": "ddim", "steps": 4, "warm_start": 2}]
    grid.write_text(json.dumps(rows))
    found: dict[str, Any] = {}
    for name, path in sources.items():
        out = tmp_path / f"found-{name}.npz"
        command = ["plan", "search", tiny, "--data", str(path), "--start", start, *STEPS]
        command += ["--out", str(out), "--chunks", "8", "--lanes", "4", "--json"]
        code, text, err = run(capsys, *command)
        assert code == 0, err
        searched = json.loads(text)
        plan = tsad.Plan.load(out).sources.tolist()
        command = ["tune", "--policy", tiny, "--observations", str(path), "--draws", "3"]
        command += ["--settings", str(grid), "--out", str(tmp_path / f"tune-{name}"), "--json"]
        code, text, err = run(capsys, *command, "--rounds", "1")
        assert code == 0, err
        errors = {
            row: [cells[key] for key in ("action_rms", "distance", "spread")]
            for row, cells in json.loads(text)["rows"].items()
        }
        found[name] = (searched["rms"], searched["tried"], plan, errors)
    assert found["collect"][0] > 0 < found["collect"][3]["warm"][1]
    for name, each in found.items():
        assert each == found["collect"], name


def test_pushts_own_observations(capsys: Any, tmp_path: Path) -> None:
    """What `tsad collect pusht` records, given as arrays: the same effects to the bit."""
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PushT, "max_steps", 32)
        folder = collected(capsys, "pusht", "pusht", tmp_path / "recorded", 2)
    settings, episodes = read_observations(folder, tsad.load("pusht"))
    assert settings["simulator"] == "pusht" and [e.name for e in episodes] == [0, 1]
    ends = np.cumsum([len(episode.obs) for episode in episodes])
    mine = tmp_path / "mine.npz"
    np.savez(mine, obs=np.concatenate([e.obs for e in episodes]), episode_ends=ends)
    first, second = (
        measured(capsys, "pusht", data, tmp_path / f"{data.stem}-effects.npz")
        for data in (folder, mine)
    )
    same_effects(first, second)


def test_single_observations(capsys: Any, tmp_path: Path, tiny: str) -> None:
    pytest.importorskip("torch")
    policy = tsad.load(tiny, **LOAD)
    single, effects = tmp_path / "single.npy", tmp_path / "effects.npz"
    np.save(single, observations(policy, 1, 9))
    command = ["plan", "measure", tiny, "--data", str(single), "--out", str(effects), *STEPS]
    code, text, err = run(capsys, *command)
    assert code == 0 and "9 chunks; no chunk has one before it" in text, err
    tables = planners.Effects.load(effects)
    assert not tables.knows_rollouts and np.isfinite(tables.pair).all()
    assert tables.predict(planners.EffectPlanner(tables)(policy, 0.5)) > 0
    with pytest.raises(ValueError, match="plan: reads earlier chunks, but the effects are of si"):
        tables.predict(planners.c3ache(policy, 1, 3))

    rows = [{"name": "four", "steps": 4, "sampler": "ddim"}]
    rows += [{"name": "two", "steps": 2, "sampler": "ddim"}]
    grid = tmp_path / "grid.json"
    grid.write_text(json.dumps(rows))
    command = ["tune", "--policy", tiny, "--observations", str(single), "--draws", "3"]
    command += ["--out", str(tmp_path / "out"), "--rounds", "1", "--settings", str(grid)]
    code, text, err = run(capsys, *command, "--json")
    assert code == 0 and json.loads(text)["rows"]["two"]["distance"] > 0, err
    warm = {"name": "warm", "sampler": "ddim", "steps": 4, "warm_start": 2}
    grid.write_text(json.dumps([*rows, warm]))
    code, _, err = run(capsys, *command, "--overwrite")
    assert code == 2 and re.search(
        r"--settings: warm: its chunks depend on the one before, and --observations are single "
        r"ones; give successive observations \('episode_ends'\), or leave it out",
        err,
    )
    # in a simulator it can be played, and only its errors are not known
    command = [word for word in command if word != "--rounds"]
    command = ["eval", "table", *command[1:-3], "--settings", str(grid), "--seeds", "2"]
    code, text, err = run(capsys, *command)
    assert code == 0 and "no errors of warm: its chunks depend on the one before" in text, err


def test_the_grid_of_tune_leaves_out_what_single_observations_cannot_tell(
    capsys: Any, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tsad.commands import tune

    names = ("dense", "ddim-4", "ddim-8-warm-4-1-actions")
    grid = tune.default_grid
    monkeypatch.setattr(
        tune, "default_grid", lambda policy: [r for r in grid(policy) if r["name"] in names]
    )
    policy, single = tsad.load(tiny), tmp_path / "single.npy"
    assert [row["name"] for row in tune.default_grid(policy)] == list(names)
    np.save(single, observations(policy, 1, 6))
    command = ["tune", "--policy", tiny, "--observations", str(single), "--draws", "2"]
    command += ["--out", str(tmp_path / "out"), "--rounds", "1", "--no-int16"]
    code, text, err = run(capsys, *command)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert list(found["rows"]) == ["dense", "ddim-4"]


@pytest.mark.parametrize(
    "command",
    [
        ["plan", "measure", "POLICY", "--out", "e.npz", "--data"],
        ["plan", "search", "POLICY", "--start", "p.npz", "--out", "f.npz", "--data"],
        ["tune", "--policy", "POLICY", "--out", "t", "--observations"],
        ["eval", "table", "--policy", "POLICY", "--out", "t", "--settings", "s.json",
         "--observations"],
    ],
)  # fmt: skip
def test_commands_say_what_is_wrong(
    capsys: Any, tmp_path: Path, tiny: str, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "measure" in command:
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    planners.uniform(tsad.load(tiny), 2).save("p.npz")
    Path("s.json").write_text('[{"name": "a"}, {"name": "b", "sparsity": 0.5}]')
    argv = [tiny if word == "POLICY" else word for word in command]
    np.savez("bad.npz", obs=np.zeros((4, 3, 7)))
    before = sorted(Path().iterdir())
    for data, message in (
        ("bad.npz", r"bad\.npz: obs: expected shape \(N, 3, 6\).*got \(4, 3, 7\)"),
        ("none.npz", "got 'none.npz', where nothing is"),
        ("s.json", "expected an npz file"),
    ):
        code, _, err = run(capsys, *argv, data)
        assert code == 2 and re.search(f"argument {command[-1]}: .*{message}", err), err
    assert sorted(Path().iterdir()) == before
