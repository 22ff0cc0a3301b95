"""tsad collect: what is recorded is what the engine does, and a folder that grows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config, random_tensors
from command_line import run
from policies import make_policy, save_policy

from tsad import reference, sim
from tsad.reference import dpt
from tsad.sim import recording
from tsad.sim.results import ResultsError


class World:
    """Ends at once for seed 3; its observations follow the actions."""

    name, max_steps, obs_meaning = "world", 20, "numbers"

    def __init__(self, policy: Any) -> None:
        self.obs_dim, self.action_dim = policy.obs_dim, policy.action_dim

    def reset(self, seed: int) -> Any:
        self.seed, self.steps = seed, 0
        self.state = np.random.default_rng(seed).standard_normal(self.obs_dim, np.float32)
        return self.state

    def step(self, action: Any) -> sim.Step:
        self.steps += 1
        self.state = (0.9 * self.state + 0.1 * np.resize(action, self.obs_dim)).astype(np.float32)
        score = float(np.abs(self.state).sum() % 1)
        return sim.Step(self.state, score, False, self.seed == 3 and self.steps == 4)


def play(policy: Any, seeds: list[int], lanes: int = 2) -> dict[int, list[Any]]:
    """By seed the chunks: observation and actions."""
    found: dict[int, list[Any]] = {}

    def keep(chunk: sim.Chunk) -> None:
        for row, seed in enumerate(chunk.seeds):
            found.setdefault(seed, []).append((chunk.obs[row], chunk.actions[row]))

    list(sim.rollouts(policy, [World(policy) for _ in range(lanes)], seeds, on_chunk=keep))
    return found


@pytest.mark.parametrize(
    ("sampler", "steps"), [(None, 8), ("ddim", 5), ("dpmsolver++", 4), ("ddpm", 3)]
)
def test_the_denoising_comes_back_from_the_seed(sampler: str | None, steps: int) -> None:
    policy = make_policy(lanes=2, sampler=sampler, steps=steps)
    sizes = (policy.horizon, policy.action_dim)
    for seed, chunks in play(policy, [0, 1, 2, 3, 4]).items():
        obs, actions = (np.stack(part) for part in zip(*chunks, strict=True))
        noise = recording.Recorded(seed, obs).noise(policy)
        assert noise.shape == (len(obs), steps, *sizes)
        # as the lane drew it: NumPy's own, from the seed that the rollouts give it
        stream = np.random.Generator(np.random.PCG64(sim.noise_seed(seed)))
        adds = sampler in (None, "ddpm")
        for z in noise:
            drawn = stream.standard_normal((steps if adds else 1, *sizes), np.float32)
            np.testing.assert_array_equal(z[: len(drawn)], drawn)
            assert not z[len(drawn) :].any()
        # and the engine makes the chunks that it made of it
        for row in range(len(obs)):
            policy.reset(seed=0)
            again = policy(obs[row][None], noise=noise[row][:, None], lanes=[0])
            np.testing.assert_array_equal(again[0], actions[row])
        inputs = recording.denoising_inputs(policy, obs, noise)
        wanted = reference_inputs(sampler, steps, obs, noise)
        np.testing.assert_allclose(inputs, wanted, rtol=1e-4, atol=1e-4)


def reference_inputs(sampler: str | None, steps: int, obs: Any, noise: Any) -> Any:
    """(C, K, horizon, action_dim): what the specification's network is given at each step."""
    case = config("tiny", prediction_type="sample", clip_sample=False)
    policy = reference.ReferencePolicy(
        case, random_tensors(case["network"], 0), sampler=sampler, num_inference_steps=steps
    )
    entered, predict = [], dpt.predict

    def watched(w: Any, network: Any, sample: Any, *rest: Any) -> Any:
        entered.append(sample)
        return predict(w, network, sample, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpt, "predict", watched)
        for each, z in zip(obs, noise, strict=True):
            policy.reset()
            policy(each[None], z[:, None])
    return np.reshape(entered, noise.shape)


def test_episodes_have_names() -> None:
    obs = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    seen = [recording.Recorded(7, obs), recording.Recorded(8, obs), recording.Recorded(7, obs + 1)]
    assert seen[0].name == seen[1].name != seen[2].name
    simulated = [recording.Recorded(seed, obs, simulated=True) for seed in (9, 8, 9)]
    assert recording.names_of([*seen, *simulated]) == [8, 9, *sorted({e.name for e in seen})]


def test_a_folder_grows_and_keeps_to_its_settings(tmp_path: Path) -> None:
    episodes = {
        seed: [np.stack(part) for part in zip(*chunks, strict=True)]
        for seed, chunks in play(make_policy(lanes=2), [3, 0]).items()
    }
    folder = tmp_path / "recorded"
    settings = {"policy": "a", "simulator": "world"}
    assert recording.open_collection(folder, settings) == []
    with pytest.raises(ResultsError, match="no episodes in it"):
        recording.read_collection(folder)
    recording.save_episode(folder, 3, *episodes[3])
    assert recording.open_collection(folder, settings) == [3]
    recording.save_episode(folder, 0, *episodes[0], score=0.5)
    read, found = recording.read_collection(folder)
    assert read == settings and [episode.number for episode in found] == [0, 3]
    assert all(episode.simulated for episode in found)
    for episode in found:
        np.testing.assert_array_equal(episode.obs, episodes[episode.number][0])
        kept = recording.read_episode(folder, episode.number, "actions")
        np.testing.assert_array_equal(kept, episodes[episode.number][1])
    assert recording.read_episode(folder, 0, "score") == 0.5
    with pytest.raises(ResultsError, match="policy: the file has 'a', this run 'b'"):
        recording.open_collection(folder, settings | {"policy": "b"})
    (folder / "episode-00003.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ResultsError, match="episode-00003.npz: broken"):
        recording.read_collection(folder)
    (folder / recording.FACTS_FILE).write_text("{}")
    with pytest.raises(ResultsError, match="not a collection of this version"):
        recording.read_collection(folder)
    with pytest.raises(ResultsError, match="made by 'tsad collect' or tsad.Recorder"):
        recording.read_collection(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ResultsError, match="is not empty"):
        recording.open_collection(tmp_path / "full", {})


def test_folders_of_version_1_are_read(tmp_path: Path) -> None:
    """They kept the inputs of the denoising, which now come from the noise."""
    settings = {"simulator": "world", "sampler": "ddpm", "num_inference_steps": 8}
    header = {"format": "tsad-collection", "format_version": 1, "settings": settings}
    (tmp_path / "collection.json").write_text(json.dumps(header))
    obs = np.random.default_rng(0).normal(size=(3, 2, 6)).astype(np.float32)
    arrays = {"obs": obs, "actions": obs[:, :, :2], "inputs": np.zeros((3, 8, 5, 2), np.float32)}
    np.savez(
        tmp_path / "episode-00007.npz",
        score=np.float64(0.5),
        success=np.bool_(False),
        adds_noise=np.bool_(True),
        **arrays,
    )
    assert recording.open_collection(tmp_path, settings) == [7]
    read, (episode,) = recording.read_collection(tmp_path)
    assert read == settings and (episode.number, episode.name) == (7, 7)
    np.testing.assert_array_equal(episode.obs, obs)


def test_collect(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 24)
    folder = tmp_path / "recorded"
    command = ["collect", "pusht", "--out", str(folder), "--sampler", "ddim", "--steps", "2"]
    code, out, _ = run(capsys, *command, "--episodes", "2", "--json")
    summary = json.loads(out)
    assert code == 0 and summary["episodes"] == summary["recorded_now"] == 2
    assert summary["chunks"] <= 6 and summary["bytes"] < 20_000

    # three more, one of them lost to Ctrl-C; the same command goes on
    save = recording.save_episode

    def interrupted(out: Path, seed: int, *arrays: Any, **facts: Any) -> None:
        if seed == 4:
            raise KeyboardInterrupt
        save(out, seed, *arrays, **facts)

    monkeypatch.setattr(recording, "save_episode", interrupted)
    code, _, err = run(capsys, *command, "--episodes", "5", "--lanes", "1")
    assert code == 130 and "4 episodes are kept; the same command goes on" in err
    monkeypatch.setattr(recording, "save_episode", save)
    code, out, _ = run(capsys, *command, "--episodes", "5")
    assert code == 0 and "5 episodes, 1 of them new" in out
    for extra, message in (
        (["--steps", "3"], "num_inference_steps: the file has 2, this run 3"),
        (["--first-seed", "9998", "--episodes", "3"], "--first-seed: got seeds 9998 to 10000"),
        (["--policy", "nowhere"], "--policy"),
    ):
        code, _, err = run(capsys, *command, *extra)
        assert code == 2 and message in err


def test_collect_in_processes(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """What is recorded does not depend on who plays."""
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    words = ["collect", "table", "--policy", save_policy(tmp_path / "p"), "--sampler", "ddim"]
    words += ["--steps", "2", "--spacing", "trailing", "--episodes"]
    for name, more in (("here", ["5", "--lanes", "2"]), ("there", ["3", "--jobs", "2"])):
        code, _, err = run(capsys, *words, *more, "--out", str(tmp_path / name))
        assert code == 0, err
    code, out, err = run(capsys, *words, "5", "--jobs", "8", "--out", str(tmp_path / "there"))
    assert code == 0 and "5 episodes, 2 of them new" in out, err
    for number in range(5):
        one, other = (
            np.load(recording.episode_path(tmp_path / name, number)) for name in ("here", "there")
        )
        assert set(one) == set(other)
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])
    failing = [*words, "8", "--jobs", "2", "--out", str(tmp_path / "lost")]
    sim.register("broken", "fakes:BrokenTable")
    failing[1] = "broken"
    code, _, err = run(capsys, *failing)
    assert code == 1 and "three legs" in err and "episodes are kept" in err
