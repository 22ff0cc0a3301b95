"""tsad collect: what is recorded is what the engine does, and a folder that grows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from policies import make_policy

from tsad import sim
from tsad.samplers import make_sampler
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


def record(policy: Any, seeds: list[int], lanes: int = 2) -> dict[int, recording.Recorded]:
    recorder = recording.Recorder(policy)
    lane_of: dict[int, int] = {}
    worlds = [World(policy) for _ in range(lanes)]
    return {
        episode.seed: recorder.take(lane_of[episode.seed], episode)
        for episode in sim.rollouts(recorder, worlds, seeds, on_start=lane_of.__setitem__)
    }


@pytest.mark.parametrize(
    ("sampler", "steps"), [(None, 8), ("ddim", 5), ("dpmsolver++", 4), ("ddpm", 3)]
)
def test_records_are_what_the_engine_does(sampler: str | None, steps: int) -> None:
    policy = make_policy(lanes=2, sampler=sampler, steps=steps)
    table = make_sampler(policy.config["scheduler"])
    engine: dict[int, list[Any]] = {}

    def keep(chunk: sim.Chunk) -> None:
        for row, seed in enumerate(chunk.seeds):
            engine.setdefault(seed, []).append((chunk.obs[row], chunk.actions[row]))

    list(sim.rollouts(policy, [World(policy), World(policy)], range(5), on_chunk=keep))
    for seed, episode in record(policy, list(range(5))).items():
        chunks = len(episode.obs)
        assert episode.inputs.shape == (chunks, steps, policy.horizon, policy.action_dim)
        start = policy.n_obs_steps - 1
        executed = episode.actions[:, start : start + policy.n_action_steps]
        np.testing.assert_allclose(executed, [a for _, a in engine[seed]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(episode.obs, [o for o, _ in engine[seed]], rtol=1e-4, atol=1e-4)
        # the noise comes back from the seed, and the engine makes the same chunk of it
        noise = episode.noise()
        np.testing.assert_array_equal(noise[:, 0], episode.inputs[:, 0])
        assert table.adds_noise == bool(noise[:, 1:].any())
        for row in range(0, chunks, 2):
            two = slice(row, row + 2)
            lanes = list(range(len(episode.obs[two])))
            policy.reset(seed=0)
            again = policy(
                episode.obs[two],
                noise=np.ascontiguousarray(noise[two].swapaxes(0, 1)),
                lanes=lanes,
                return_horizon=True,
            )
            np.testing.assert_allclose(again, episode.actions[two], rtol=1e-4, atol=1e-4)


def test_lanes_do_not_change_records() -> None:
    policy = make_policy(lanes=3)
    one, three = record(policy, [0, 1, 3, 5], 1), record(policy, [0, 1, 3, 5], 3)
    assert [len(one[seed].obs) for seed in (0, 1, 3)] == [7, 7, 2]
    for seed, episode in one.items():
        np.testing.assert_allclose(three[seed].inputs, episode.inputs, rtol=1e-4, atol=1e-4)


def test_a_folder_grows_and_keeps_to_its_settings(tmp_path: Path) -> None:
    episodes = record(make_policy(lanes=2), [3, 0])
    folder = tmp_path / "recorded"
    assert recording.open_collection(folder, {"policy": "a"}) == []
    with pytest.raises(ResultsError, match="no episodes in it"):
        recording.read_collection(folder)
    recording.save_episode(folder, episodes[3])
    assert recording.open_collection(folder, {"policy": "a"}) == [3]
    recording.save_episode(folder, episodes[0])
    settings, found = recording.read_collection(folder)
    assert settings == {"policy": "a"} and [episode.seed for episode in found] == [0, 3]
    for name, value in asdict(episodes[0]).items():
        np.testing.assert_array_equal(getattr(found[0], name), value)
    assert recording.read_collection(folder, [3])[1][0].seed == 3
    with pytest.raises(ResultsError, match="policy: the file has 'a', this run 'b'"):
        recording.open_collection(folder, {"policy": "b"})
    with pytest.raises(ResultsError, match="no seed 4 in it"):
        recording.read_collection(folder, [3, 4])
    (folder / "episode-00003.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ResultsError, match="episode-00003.npz: broken"):
        recording.read_collection(folder)
    (folder / recording.FACTS_FILE).write_text("{}")
    with pytest.raises(ResultsError, match="not a collection of this version"):
        recording.read_collection(folder)
    with pytest.raises(ResultsError, match="made by 'tsad collect'"):
        recording.read_collection(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ResultsError, match="is not empty"):
        recording.open_collection(tmp_path / "full", {})


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

    def interrupted(out: Path, episode: recording.Recorded) -> None:
        if episode.seed == 4:
            raise KeyboardInterrupt
        save(out, episode)

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
