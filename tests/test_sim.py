"""tsad/sim: the score's definition, lanes that do not matter, results that survive Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import numpy as np
import pytest
from fakes import FakePolicy, FakeWorld

from tsad import sim
from tsad.sim import results
from tsad.sim.results import Journal, ResultsError

SEEDS = list(range(100, 120))


def play(lanes: int, seeds: list[int] = SEEDS) -> dict[int, sim.Episode]:
    policy = FakePolicy(lanes)
    worlds = [FakeWorld() for _ in range(min(lanes, len(seeds)))]
    # Times are not results.
    return {
        episode.seed: replace(episode, chunk_ms_mean=0.0, chunk_ms_max=0.0)
        for episode in sim.rollouts(policy, worlds, seeds)
    }


# --- rollouts


def test_lanes_do_not_change_results() -> None:
    alone = play(1)
    assert sorted(alone) == SEEDS
    # The case is only worth something if lanes end at different times, by both ways of ending.
    assert len({episode.steps for episode in alone.values()}) > 4
    assert {episode.success for episode in alone.values()} == {True, False}
    for lanes in (2, 3, 7, 20, 30):
        assert play(lanes) == alone


def test_order_of_seeds_does_not_change_results() -> None:
    assert play(3, SEEDS[::-1]) == play(2)


def test_only_running_lanes_are_called() -> None:
    policy = FakePolicy(4)
    list(sim.rollouts(policy, [FakeWorld() for _ in range(4)], SEEDS[:5]))
    assert policy.calls[0] == [0, 1, 2, 3]
    assert all(call == sorted(set(call)) for call in policy.calls)
    assert min(len(call) for call in policy.calls) == 1


def test_window_repeats_the_first_observation_and_then_slides() -> None:
    seen: list[sim.Chunk] = []
    world = FakeWorld()
    first = world.reset(7)
    list(sim.rollouts(FakePolicy(), [world], [7], on_chunk=seen.append))
    np.testing.assert_array_equal(seen[0].obs, [[first, first]])
    # Replay the first chunk by hand: the window holds the last two observations, in order.
    world.reset(7)
    observations = [world.step(action).obs for action in seen[0].actions[0]]
    np.testing.assert_array_equal(seen[1].obs[0], observations[-2:])


def test_episode_counts_and_score_is_the_largest_of_its_steps() -> None:
    trace: list[tuple[int, float]] = []
    (episode,) = sim.rollouts(
        FakePolicy(), [FakeWorld()], [104], on_step=lambda _, n, best: trace.append((n, best))
    )
    assert [steps for steps, _ in trace] == list(range(episode.steps + 1))
    assert trace[-1][1] == episode.score == max(best for _, best in trace)
    assert episode.chunks == -(-episode.steps // FakePolicy.n_action_steps)


def test_noise_is_not_the_simulators_own_stream() -> None:
    """The simulator starts from default_rng(seed): the noise must not repeat its bits."""
    seed = 100_000
    world, noise = np.random.default_rng(seed), np.random.default_rng(sim.noise_seed(seed))
    assert not np.allclose(world.standard_normal(8), noise.standard_normal(8))
    assert len({sim.noise_seed(seed) for seed in range(2000)}) == 2000
    assert all(0 <= sim.noise_seed(seed) < 2**63 for seed in range(100))


def test_policy_of_another_size_is_refused() -> None:
    policy = FakePolicy()
    policy.obs_dim = 4
    with pytest.raises(ValueError, match="obs_dim is 4, but the simulator 'fake' has 3"):
        next(sim.rollouts(policy, [FakeWorld()], [0]))


def test_more_environments_than_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match="environments: got 2, expected 1 to 1"):
        next(sim.rollouts(FakePolicy(1), [FakeWorld(), FakeWorld()], [0]))


def test_actions_that_are_not_finite_stop_the_run() -> None:
    class Broken(FakePolicy):
        def __call__(self, obs: np.ndarray, *, lanes: list[int]) -> np.ndarray:
            return super().__call__(obs, lanes=lanes) * np.nan

    with pytest.raises(RuntimeError, match="not finite in the episodes \\[5\\]"):
        next(sim.rollouts(Broken(), [FakeWorld()], [5]))


def test_registry() -> None:
    assert "pusht" in sim.names()
    assert sim.facts("pusht").first_seed == 100_000
    with pytest.raises(ValueError, match="unknown simulator 'pushT'; expected one of .*pusht"):
        sim.make("pushT")


# --- statistics


def episode(seed: int, score: float, success: bool = False, ms: float = 1.0, chunks: int = 2):
    return sim.Episode(seed, score, success, 10, chunks, ms, 2 * ms)


def test_summary() -> None:
    scores = [0.2, 0.4, 0.9, 1.0]
    few = [episode(i, s, s == 1.0, ms=i + 1.0, chunks=i + 1) for i, s in enumerate(scores)]
    assert results.summarise(few)["score"]["interval95"] is None  # of four
    assert results.summarise(few)["success"]["interval95"] is None
    scores, rows = scores * 6, few * 6
    summary = results.summarise(rows)
    assert summary["score"]["mean"] == pytest.approx(0.625)
    assert summary["score"]["standard_error"] == pytest.approx(np.std(scores, ddof=1) / 24**0.5)
    low, high = summary["score"]["interval95"]
    assert 0.4 <= low < 0.52 and 0.7 < high <= 0.8
    assert summary["success"]["mean"] == 0.25
    # Wilson's interval of 6 in 24, from its closed form.
    assert summary["success"]["interval95"] == pytest.approx([0.1200, 0.4490], abs=1e-3)
    # By chunks, not by episodes: (1 + 4 + 9 + 16) / 10.
    assert summary["chunk_ms"] == {"mean": pytest.approx(3.0), "max": 8.0}
    assert results.summarise(rows) == summary


def test_no_success_is_not_certainty() -> None:
    low, high = results.summarise([episode(i, 0.5) for i in range(20)])["success"]["interval95"]
    assert low == 0.0 and 0.1 < high < 0.2


def test_comparison_is_paired() -> None:
    ours = [episode(seed, 0.5 + 0.01 * seed) for seed in range(10)]
    theirs = [episode(seed, 0.4 + 0.01 * seed) for seed in range(5, 15)]
    paired = results.compare(ours, theirs)
    assert paired["pairs"] == 5
    assert paired["score"]["mean_difference"] == pytest.approx(0.1)
    # The seeds differ much, the pairs not at all.
    assert paired["score"]["standard_error"] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ResultsError, match="no seed in common"):
        results.compare(ours[:3], theirs)


# --- the journal

SETTINGS = {"sparsity": 0.9, "weights_sha256": "ab"}


def test_interrupted_run_goes_on_to_the_same_results(tmp_path) -> None:
    whole = play(2)
    out = tmp_path / "r.json"
    journal = Journal(out, SETTINGS)
    for count, done in enumerate(sim.rollouts(FakePolicy(3), [FakeWorld()] * 1, SEEDS)):
        if count == 6:
            break  # as Ctrl-C would
        journal.append(replace(done, chunk_ms_mean=0.0, chunk_ms_max=0.0))
    journal.close()
    assert not out.exists() and results.partial_path(out).exists()

    again = Journal(out, SETTINGS, resume=True)
    assert len(again.episodes) == 6
    todo = [seed for seed in SEEDS if seed not in again.episodes]
    for seed, done in play(2, todo).items():
        assert seed not in again.episodes
        again.append(done)
    assert again.episodes == whole
    again.finish(
        {
            "format": "tsad-eval",
            "format_version": 1,
            "settings": SETTINGS,
            "episodes": [asdict(done) for done in again.episodes.values()],
        }
    )
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert results.read_results(out) == (SETTINGS, list(again.episodes.values()))


def test_finished_run_can_be_extended(tmp_path) -> None:
    out = tmp_path / "r.json"
    document = {"format": "tsad-eval", "format_version": 1, "settings": SETTINGS}
    first = Journal(out, SETTINGS)
    first.finish({**document, "episodes": [asdict(episode(1, 0.5))]})
    assert Journal(out, SETTINGS, resume=True).episodes == {1: episode(1, 0.5)}


def test_torn_last_line_is_run_again(tmp_path) -> None:
    out = tmp_path / "r.json"
    journal = Journal(out, SETTINGS)
    journal.append(episode(1, 0.25))
    journal.append(episode(2, 0.5))
    journal.close()
    partial = results.partial_path(out)
    content = partial.read_bytes()
    for cut in range(len(content) - 40, len(content)):
        partial.write_bytes(content[:cut])
        again = Journal(out, SETTINGS, resume=True)
        again.append(episode(3, 0.75))
        again.close()
        assert list(Journal(out, SETTINGS, resume=True).episodes) == [1, 3]
    partial.write_bytes(content.replace(b'"seed": 1', b'"seed": ', 1))
    with pytest.raises(ResultsError, match="line 2 is broken"):
        Journal(out, SETTINGS, resume=True)


def test_other_settings_are_refused_by_name(tmp_path) -> None:
    out = tmp_path / "r.json"
    journal = Journal(out, SETTINGS)
    journal.append(episode(1, 0.5))
    journal.close()
    before = results.partial_path(out).read_bytes()
    with pytest.raises(ResultsError, match=r"sparsity: the file has 0\.9, this run 0\.5; fix"):
        Journal(out, {**SETTINGS, "sparsity": 0.5}, resume=True)
    with pytest.raises(ResultsError, match=r"--resume goes on with it, --overwrite starts anew"):
        Journal(out, SETTINGS)
    assert results.partial_path(out).read_bytes() == before
    again = Journal(out, {**SETTINGS, "sparsity": 0.5}, overwrite=True)
    assert again.episodes == {}
    again.close()  # without an episode nothing is left to go on with
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe", b"null"])
def test_foreign_files_are_refused_and_kept(tmp_path, content: bytes) -> None:
    out = tmp_path / "r.json"
    out.write_bytes(content)
    with pytest.raises(ResultsError, match="not a results file"):
        Journal(out, SETTINGS, resume=True)
    assert out.read_bytes() == content


def test_one_run_at_a_time(tmp_path) -> None:
    out = tmp_path / "r.json"
    code = (
        "import sys, time; from pathlib import Path; from tsad.sim.results import Journal\n"
        f"journal = Journal(Path({str(out)!r}), {{}})\n"
        "print('held', flush=True); time.sleep(600)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        wanted = f"{re.escape(str(out))} is being written by another run, process {other.pid}; fix"
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ResultsError, match=wanted):
                Journal(out, {}, **options)
    finally:
        other.kill()  # no good-bye: the lock goes with the process, its file stays
        other.wait()
        other.stdout.close()
    assert (tmp_path / "r.json.lock").exists()
    journal = Journal(out, {}, resume=True)
    with pytest.raises(ResultsError, match=f"process {os.getpid()};"):
        Journal(out, {}, resume=True)
    journal.finish({})
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_full_disk_in_mid_run(tmp_path, monkeypatch) -> None:
    out, full = tmp_path / "r.json", OSError(errno.ENOSPC, "No space left on device")
    out.write_text("old")
    journal = Journal(out, SETTINGS, overwrite=True)
    journal.append(episode(1, 0.25))
    flush = os.fsync

    def fsync(handle: int) -> None:
        os.ftruncate(handle, os.fstat(handle).st_size - 20)  # the line in hand is torn
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"r.json.partial' can't be written: No space left"):
            journal.append(episode(2, 0.5))
        assert journal.episodes == {1: episode(1, 0.25)}
        journal.close()
    assert os.fsync is flush and out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.json.partial"]
    assert list(Journal(out, SETTINGS, resume=True).episodes) == [1]


def test_going_on_or_anew(tmp_path) -> None:
    """With both it goes on with a run of the same settings and replaces any other."""
    out, both = tmp_path / "r.json", {"resume": True, "overwrite": True}
    first = Journal(out, SETTINGS)
    first.append(episode(1, 0.25))
    first.close()
    again = Journal(out, SETTINGS, **both)
    assert list(again.episodes) == [1]
    again.close()
    other = Journal(out, {**SETTINGS, "sparsity": 0.5}, **both)
    assert other.episodes == {}
    other.close()
    results.partial_path(out).write_text("{")
    assert Journal(out, SETTINGS, **both).episodes == {}


def test_a_run_through_a_link(tmp_path) -> None:
    """What is kept on the way lies beside the file, not beside the link: both lead to it."""
    (tmp_path / "far").mkdir()
    link, out = tmp_path / "link.json", tmp_path / "far" / "r.json"
    link.symlink_to(out)
    journal = Journal(link, SETTINGS)
    journal.append(episode(1, 0.25))
    with pytest.raises(ResultsError, match=f"process {os.getpid()};"):
        Journal(out, SETTINGS, resume=True)
    journal.close()
    again = Journal(out, SETTINGS, resume=True)
    assert list(again.episodes) == [1]
    again.finish({"format": "tsad-eval"})
    assert link.is_symlink() and [path.name for path in out.parent.iterdir()] == ["r.json"]


# --- Push-T


@pytest.fixture
def table():
    pytest.importorskip("gym_pusht")
    environment = sim.make("pusht")
    yield environment
    environment.close()


def test_corners_are_what_lerobots_policies_see(table) -> None:
    """The observations of gym-pusht's own environment of that kind, step by step."""
    gymnasium = pytest.importorskip("gymnasium")
    import gym_pusht  # noqa: F401

    theirs = gymnasium.make("gym_pusht/PushT-v0", obs_type="environment_state_agent_pos")
    ours = sim.make("pusht_corners")
    rng = np.random.default_rng(0)
    seen, _ = theirs.reset(seed=3)
    found, other = ours.reset(3), table.reset(3)
    for _ in range(12):
        expected = np.concatenate([seen["agent_pos"], seen["environment_state"]])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)  # pixels, in float32
        np.testing.assert_array_equal(found[:2], other[-2:])
        action = (found[2:4] + rng.uniform(-30, 30, 2)).astype(np.float32)  # towards the block
        seen, *_ = theirs.step(action)
        step, alike = ours.step(action), table.step(action)
        found, other = step.obs, alike.obs
        assert step[1:] == alike[1:]
    again = ours.restore(ours.snapshot())  # from a state in float32
    np.testing.assert_allclose(again, found, rtol=0, atol=1e-4)
    assert found.dtype == np.float32 and found.shape == (ours.obs_dim,)
    theirs.close()
    ours.close()


def place(table, x: float, y: float, angle: float) -> float:
    """Put the T at a pose, the agent far away, and take one step; returns the coverage."""
    table.reset(0)
    simulator = table._simulator
    simulator.agent.position = (40.0, 40.0)
    # pymunk turns a body about its centre of gravity: angle first, then the position.
    simulator.block.angle = angle
    simulator.block.position = (x, y)
    return simulator.step(np.array([40.0, 40.0]))[4]["coverage"]


def test_score_and_success_of_poses(table) -> None:
    goal = (256.0, 256.0, np.pi / 4)
    assert place(table, *goal) == pytest.approx(1.0)
    step = table.step(np.array([40.0, 40.0]))
    assert step.score == 1.0 and step.success and step.done

    # Moved along its stem by d, a T keeps a known part of its area: count it on a fine grid.
    moved = place(table, goal[0] + 10, goal[1], goal[2])
    axis = np.arange(-200, 200, 0.5) + 0.25
    gx, gy = np.meshgrid(axis, axis)

    def inside(dx: float, dy: float):
        c, s = np.cos(goal[2]), np.sin(goal[2])
        x, y = gx - dx, gy - dy
        u, v = c * x + s * y, -s * x + c * y
        return ((abs(u) < 60) & (v > 0) & (v < 30)) | ((abs(u) < 15) & (v >= 30) & (v < 120))

    expected = (inside(0, 0) & inside(10, 0)).sum() / inside(0, 0).sum()
    assert moved == pytest.approx(expected, abs=0.01)
    step = table.step(np.array([40.0, 40.0]))
    assert step.score == pytest.approx(moved / 0.95) and not step.success and not step.done


def test_scores_do_not_depend_on_addresses_in_memory() -> None:
    """gym-pusht adds areas in the order of a set of shapes, which follows their addresses."""
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    def play() -> list[float]:
        table, scores = PushT(), []
        obs = table.reset(10005)  # whose last bits did differ
        for _ in range(40):
            centre, agent = obs[:18].reshape(9, 2).mean(0), obs[18:]
            step = table.step(np.clip(agent + (centre - agent) * 1.5, 0, 512))
            scores.append(step.score)
            obs = step.obs
        return scores

    rng, first = np.random.default_rng(0), play()
    assert max(first) > 0.4
    for _ in range(12):
        other_addresses = [bytes(rng.integers(1, 4000)) for _ in range(rng.integers(20000))]
        assert play() == first, len(other_addresses)


def test_score_definition() -> None:
    from tsad.sim.pusht import score

    assert [score(c) for c in (0.0, 0.475, 0.95, 1.0)] == [0.0, 0.5, 1.0, 1.0]


def test_success_needs_more_than_95_percent(table) -> None:
    """Exactly 95 % is the full score and no success, as gym-pusht has it."""
    table.reset(0)
    simulator = table._simulator
    for value, expected in ((0.95, False), (0.9500001, True)):
        simulator._get_coverage = lambda value=value: value
        assert table.step(np.array([40.0, 40.0])).success is expected


def test_keypoints_are_those_of_the_demonstrations() -> None:
    """Frame 5000 of the published demonstrations (pusht_cchi_v7): its state and keypoints."""
    from tsad.sim.pusht import observation

    state = [116.22679, 133.8668, 176.613617, 236.507629, 2.22847414]
    recorded = [
        99.688,
        188.804,
        214.831,
        188.970,
        140.482,
        285.567,
        156.563,
        220.679,
        88.013,
        150.301,
        126.768,
        247.290,
        175.142,
        184.871,
        137.147,
        184.766,
        163.569,
        256.178,
    ]
    got = observation(np.array(state))
    assert got.dtype == np.float32 and got.shape == (20,)
    np.testing.assert_allclose(got[:18], recorded, atol=0.002)
    np.testing.assert_allclose(got[18:], state[:2], rtol=1e-6)


def test_keypoints_lie_on_the_t(table) -> None:
    """In the block's frame they are within the T that gym-pusht draws, to the line's width."""
    from tsad.sim.pusht import keypoints

    x, y = keypoints(0.0, 0.0, 0.0).T
    bar = (abs(x) < 62) & (y > -2) & (y < 34)
    stem = (abs(x) < 18) & (y > 0) & (y < 124)
    assert (bar | stem).all()
    # A quarter turn takes x to y.
    turned = keypoints(7.0, 9.0, np.pi / 2)
    np.testing.assert_allclose(turned, np.stack([7.0 - y, 9.0 + x], 1), atol=1e-9)


def test_same_seed_same_world_whatever_came_before(table) -> None:
    other = sim.make("pusht")
    actions = np.random.default_rng(0).uniform(100, 400, (40, 2))

    def trace(environment, seed):
        return [environment.reset(seed)] + [environment.step(a).obs for a in actions]

    trace(other, 3)
    trace(other, 4)
    np.testing.assert_array_equal(trace(table, 5), trace(other, 5))
    assert not np.array_equal(table.reset(5), table.reset(6))


def test_start_is_gym_pushts(table) -> None:
    """The start of a seed is that of gymnasium's own environment."""
    gymnasium = pytest.importorskip("gymnasium")
    from tsad.sim.pusht import observation

    reference = gymnasium.make("gym_pusht/PushT-v0", obs_type="state", disable_env_checker=True)
    for seed in (100_000, 100_001):
        state, _ = reference.reset(seed=seed)
        np.testing.assert_array_equal(table.reset(seed), observation(state))
    assert reference.spec.max_episode_steps == table.max_steps
    reference.close()


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_ctrl_c_inside_a_contact_is_not_lost(table) -> None:
    """pymunk calls back from C at a contact; what is raised there would be printed and dropped."""
    contacts = []

    def contact(arbiter, space, data) -> None:
        contacts.append(len(arbiter.contact_point_set.points))
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # gives Python the occasion to notice it here

    def push() -> list:
        """Through the block's centre, to and fro: the states after every step."""
        table.reset(3)
        target, states = table.state()[2:4], []
        for action in (target, 512 - target, target):
            for _ in range(20):
                try:
                    table.step(action)
                except KeyboardInterrupt:
                    interrupts.append(len(states))
                states.append(table.state())
        return states

    interrupts: list[int] = []
    undisturbed = push()
    assert not interrupts
    before = signal.getsignal(signal.SIGINT)
    table._simulator._handle_collision = contact
    try:
        disturbed = push()
    finally:
        del table._simulator._handle_collision
    assert len(contacts) > len(interrupts) > 3  # several contacts in a step are one interruption
    assert signal.getsignal(signal.SIGINT) is before
    np.testing.assert_array_equal(disturbed, undisturbed)  # no step was cut


def test_ctrl_c_of_a_caller_with_a_handler_of_its_own(table) -> None:
    """It is called once, after the step; steps in other threads leave signals alone."""
    heard = []
    table.reset(1)
    step = table._simulator.step

    def interrupted(action):
        signal.raise_signal(signal.SIGINT)
        heard.append("stepped")
        return step(action)

    table._simulator.step = interrupted
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        table.step(table.rest_action())
        assert heard == ["stepped", signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        table.step(table.rest_action())
        assert heard == ["stepped", signal.SIGINT, "stepped"]
    finally:
        signal.signal(signal.SIGINT, before)
        del table._simulator.step
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(table.step, table.rest_action()).result().score >= 0


def test_render(table) -> None:
    table.reset(1)
    frame = table.render(96)
    assert frame.shape == (96, 96, 3) and frame.dtype == np.uint8 and len(np.unique(frame)) > 10


def test_results_are_json() -> None:
    json.dumps(results.summarise([episode(1, 0.5)]), allow_nan=False)
