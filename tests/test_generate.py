"""tsad generate: searched demonstrations are real episodes, and depend on their seed alone."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes import CopyableWorld, FakePolicy

import tsad
from tsad import sim
from tsad.commands import generate
from tsad.commands.common import InterruptedRunError, UsageError
from tsad.sim import pusht
from tsad.sim.demonstrations import Record
from tsad.sim.results import ResultsError
from tsad.sim.search import Demonstration, Search, Searcher, noise_seeds

SEARCH = Search(particles=4, start=0.3, interval=1, chunks=3, winners=2)
SEEDS = range(20, 40)


def searcher(search: Search = SEARCH, policy: Any = None) -> Searcher:
    worlds = [CopyableWorld() for _ in range(search.particles)]
    return Searcher(policy or FakePolicy(search.particles), worlds, search)


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.seed == y.seed
        and np.array_equal(x.states, y.states)
        and np.array_equal(x.actions, y.actions)
        for x, y in zip(a, b, strict=True)
    )


# --- the search


def test_a_demonstration_replays_to_success() -> None:
    search = searcher()
    found = [d for seed in SEEDS for d in search(seed)]
    # The case needs seeds of which several particles win, and lineages that split at a selection.
    assert len(found) > len({d.seed for d in found}) > 5
    for demonstration in found:
        world = CopyableWorld()
        world.reset(demonstration.seed)
        steps = []
        for state, action in zip(demonstration.states, demonstration.actions, strict=True):
            np.testing.assert_array_equal(world.state(), state)
            steps.append(world.step(action))
        assert [step.success for step in steps] == [False] * (len(steps) - 1) + [True]
        assert len(steps) <= world.max_steps


def test_what_comes_of_a_seed_depends_on_it_alone() -> None:
    one = searcher()
    forwards = {seed: one(seed) for seed in SEEDS}
    for seed in reversed(SEEDS):
        assert same(searcher()(seed), forwards[seed])
    assert not same(forwards[20], forwards[21])


def test_selection_keeps_the_better_half() -> None:
    kept: list[tuple[list[float], list[float]]] = []

    class Watched(Searcher):
        def _advance(self, particles: Any, execute: int) -> None:
            if len(particles) == 4:
                kept.append((sorted(p.score for p in particles), []))
            super()._advance(particles, execute)
            if len(particles) == 4:
                kept[-1][1].extend(sorted(p.score for p in particles))

    worlds = [CopyableWorld() for _ in range(4)]
    watched = Watched(FakePolicy(4), worlds, Search(4, 0.3, 1, 3, None, 4))
    for seed in SEEDS:
        kept.clear()
        watched(seed)
        for (_, after), (before, _) in zip(kept, kept[1:], strict=False):
            assert before == sorted(after[2:] * 2)


def test_search_gives_up_and_winners_are_bounded() -> None:
    class Hopeless(CopyableWorld):
        def step(self, action: Any) -> sim.Step:
            return super().step(action)._replace(score=0.5, success=False, done=False)

    policy = FakePolicy(4)
    hopeless = Searcher(policy, [Hopeless() for _ in range(4)], SEARCH)
    assert hopeless(3) == []
    assert [len(call) for call in policy.calls] == [1, 4, 4, 4]
    never = Searcher(policy, [Hopeless() for _ in range(4)], Search(4, start=0.9))
    policy.calls.clear()
    assert never(3) == []
    assert [len(call) for call in policy.calls] == [1] * 6  # 23 steps of 4
    assert all(len(searcher(Search(4, 0.3, winners=1))(seed)) <= 1 for seed in SEEDS)


def test_the_last_steps_are_those_of_the_whole() -> None:
    whole = [d for seed in SEEDS for d in searcher()(seed)]
    last = [d for seed in SEEDS for d in searcher(replace(SEARCH, last=6))(seed)]
    assert {len(d.actions) for d in whole} != {len(d.actions) for d in last}
    cut = [d._replace(states=d.states[-6:], actions=d.actions[-6:]) for d in whole]
    assert same(last, cut)


def test_noise_is_not_that_of_an_evaluation() -> None:
    seeds = noise_seeds(7, 4)
    assert len({*seeds, sim.noise_seed(7)}) == 5


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"particles": 1}, "particles: expected at least 2"),
        ({"start": 1.0}, "start: expected a score"),
        ({"winners": 9}, "winners: expected 1 to particles, got 9"),
        ({"execute": 5}, "execute: expected 1 to 4, the policy's n_action_steps, got 5"),
        ({"last": 0}, "last: expected at least 1"),
        ({"particles": 5}, "lanes: got 4, expected at least 5"),
    ],
)
def test_impossible_searches_are_refused_by_name(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        searcher(Search(**{"particles": 4, "winners": 1, **bad}), FakePolicy(4))


# --- Push-T


@pytest.fixture
def table():
    pytest.importorskip("gym_pusht")
    world = sim.make("pusht")
    yield world
    world.close()


def test_a_copied_table_goes_on_as_the_first(table: Any) -> None:
    """Copied in mid-push: the block turns and the agent moves."""
    table.reset(100_003)
    rng = np.random.default_rng(1)
    for _ in range(40):
        table.step(table.state()[2:4] + rng.uniform(-30, 30, 2))
    other = sim.make("pusht")
    other.reset(5)
    np.testing.assert_array_equal(other.restore(table.snapshot()), pusht.observation(table.state()))
    moved = table.state()
    for _ in range(10):
        action = table.state()[2:4] + rng.uniform(-30, 30, 2)
        table.step(action)
        other.step(action)
        # Chipmunk starts contacts from those of the step before, which a copy doesn't have.
        np.testing.assert_allclose(other.state(), table.state(), atol=0.5)
    assert np.abs(table.state() - moved)[2:].max() > 5
    other.close()


def test_coverage_is_gym_pushts(table: Any) -> None:
    table.reset(0)
    near = np.random.default_rng(0).normal([256, 256, np.pi / 4], [25, 25, 0.3], (30, 3))
    far = [[100, 400, 1.0], [256, 256, np.pi / 4]]
    states = np.concatenate([np.full((32, 2), 20.0), np.concatenate([near, far])], 1)
    simulator = table._simulator
    expected = []
    for state in states:
        simulator.agent.position, simulator.block.angle = tuple(state[:2]), state[4]
        simulator.block.position = tuple(state[2:4])
        expected.append(simulator._get_coverage())
    got = pusht.coverage(states)
    assert got.shape == (32,) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert got[-1] == pytest.approx(1) and got[-2] == 0 and 0.3 < got[:30].mean() < 0.9


# --- the command


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    return int((args := parser.parse_args(["generate", *words])).run(args))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sim, "make", lambda name: CopyableWorld())
    scheduler = {"type": "ddim", "num_inference_steps": 4}
    monkeypatch.setattr(FakePolicy, "config", {"scheduler": scheduler}, raising=False)
    for name, value in (("num_inference_steps", 4), ("precision", "float32")):
        monkeypatch.setattr(FakePolicy, name, value, raising=False)
    monkeypatch.setattr(tsad, "load", lambda source, *, lanes, **_: FakePolicy(lanes))


OPTIONS = "--start 0.3 --interval 1 --chunks 3 --particles 4 --winners 2".split()


def arrays(path: Any) -> dict[str, Any]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


def test_interrupted_run_goes_on_to_the_same_file(fake, tmp_path, monkeypatch, capsys) -> None:
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    assert call("pusht", "--out", str(whole), "--seeds", "20:40", "--json", *OPTIONS) == 0
    summary = json.loads(capsys.readouterr().out)
    search = Searcher.__call__

    def interrupted(self: Any, seed: int) -> Any:
        if seed == 33:
            raise KeyboardInterrupt
        return search(self, seed)

    monkeypatch.setattr(Searcher, "__call__", interrupted)
    with pytest.raises(InterruptedRunError, match="--resume goes on"):
        call("pusht", "--out", str(parts), "--seeds", "20:40", *OPTIONS)
    monkeypatch.setattr(Searcher, "__call__", search)
    assert arrays(parts)["next_seed"] == 33
    with pytest.raises(UsageError, match="--resume goes on with it, --overwrite"):
        call("pusht", "--out", str(parts), "--seeds", "20:40", *OPTIONS)
    with pytest.raises(UsageError, match="search, interval: the file has 1, this run 2"):
        call("pusht", "--out", str(parts), "--seeds", "20:40", "--resume", "--start", "0.3",
             "--chunks", "3", "--particles", "4", "--winners", "2")  # fmt: skip
    call("pusht", "--out", str(parts), "--seeds", "20:30", "--resume", *OPTIONS)  # nothing to do
    assert call("pusht", "--out", str(parts), "--seeds", "20:40", "--resume", *OPTIONS) == 0
    assert whole.read_bytes() == parts.read_bytes()
    data = arrays(whole)
    assert len(data["seed"]) == len(data["episode_ends"]) == summary["episodes"] > 10
    assert data["episode_ends"][-1] == len(data["state"]) == len(data["action"]) == summary["steps"]
    assert len(set(data["seed"].tolist())) == summary["seeds_won"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pusht", "--out", "OUT/x.json"], "--out: got .* ends in .npz"),
        (["pusht", "--out", "OUT/no/x.npz"], "--out: the folder .* does not exist"),
        (["chess", "--out", "OUT/x.npz"], "unknown simulator 'chess'"),
        (["pusht", "--out", "OUT/x.npz", "--winners", "9"], "winners: expected 1 to particles"),
        (["pusht", "--out", "OUT/x.npz", "--execute", "9"], "execute: expected 1 to 4"),
        (["pusht", "--out", "OUT/x.npz", "--resume", "--overwrite"], "not together"),
    ],
)
def test_command_names_what_is_wrong(fake, tmp_path, words, message) -> None:
    words = [word.replace("OUT", str(tmp_path)) for word in words]
    with pytest.raises(UsageError, match=message):
        call(*words, "--seeds", "1:3")
    assert not list(tmp_path.iterdir())


def test_a_foreign_file_is_kept(fake, tmp_path) -> None:
    out = tmp_path / "x.npz"
    out.write_bytes(b"notes")
    with pytest.raises(UsageError, match="not a file of 'tsad generate'"):
        call("pusht", "--out", str(out), "--seeds", "1:3", "--resume", *OPTIONS)
    assert out.read_bytes() == b"notes"


@pytest.mark.parametrize("text", ["5", "5:5", "a:b", "-3:4"])
def test_seeds_are_a_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected A:B"):
        generate._range(text)


def test_training_reads_the_file(tmp_path) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.training.data import load_demonstrations

    goal = [100.0, 100.0, 256.0, 256.0, np.pi / 4]
    states = np.array([[50, 60, 400, 400, 0], goal], np.float32)
    made = [Demonstration(seed, states, np.full((2, 2), seed, np.float32)) for seed in (1, 2)]
    record = Record(tmp_path / "x.npz", {"first_seed": 1})
    record.add(1, made)
    with pytest.raises(
        ResultsError, match=f"x.npz is being written by another run, process {os.getpid()}"
    ):
        Record(tmp_path / "x.npz", {"first_seed": 1}, overwrite=True)
    record.save()
    record.close()
    data = load_demonstrations(tmp_path / "x.npz", coverage=True)
    assert data.ends.tolist() == [2, 4] and data.action[:, 0].tolist() == [1, 1, 2, 2]
    np.testing.assert_allclose(data.coverage, [0, 1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(data.obs[1], pusht.observation(states[1]))
