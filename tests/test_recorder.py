"""tsad.Recorder: what a loop of one's own leaves on disk, however it ends."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Table
from policies import make_policy, observations, save_policy

import tsad
from tsad import sim
from tsad.sim import recording
from tsad.sim.recording import read_collection, read_episode
from tsad.sim.results import ResultsError

LOAD: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 2, "threads": 1}


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return save_policy(tmp_path / "tiny")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "recorded"


def seen(folder: Path) -> dict[int, Any]:
    """Observations by episode."""
    return {episode.number: episode.obs for episode in read_collection(folder)[1]}


# ---- what is recorded


def test_every_chunk_is_recorded_and_nothing_changed(tiny: str, folder: Path) -> None:
    policy, alone = (tsad.load(tiny, lanes=3, **LOAD) for _ in range(2))
    given = [observations(policy, seed, 3) for seed in range(6)]
    with tsad.Recorder(policy, folder) as recorder:
        recorder.sparsity = alone.sparsity = 0.5
        assert policy.sparsity == 0.5 and recorder.policy is policy
        said = []
        for target, keep in ((recorder, said.append), (alone, lambda actions: None)):
            target.reset(seed=0)
            keep(target(given[0]))
            keep(target(given[1][:2], lanes=[2, 0]))
            target.reset(lanes=[0], seed=[7])
            keep(target(given[2], return_horizon=True))
            target.reset(lanes=np.array([2]))
            target.reset(lanes=[2])  # an episode without a chunk is none
            out = np.empty((2, policy.n_action_steps, policy.action_dim), np.float32)
            keep(target(given[3][:2], lanes=(1, 2), out=out))
        np.testing.assert_array_equal(recorder(given[4], lanes=range(3)), alone(given[4]))
        with pytest.raises(ValueError, match="sparsity"):
            recorder.sparsity = 2
        with pytest.raises((TypeError, ValueError), match="obs"):
            recorder(given[5].astype(np.float64))  # refused, so not recorded
    # by hand, in the order in which the episodes began: lanes 0, 1, 2, then 0 and 2 again
    begin = policy.n_obs_steps - 1
    third = said[2][:, begin : begin + policy.n_action_steps]
    chunks = {
        0: [(given[0][0], said[0][0]), (given[1][1], said[1][1])],
        1: [
            (given[0][1], said[0][1]),
            (given[2][1], third[1]),
            (given[3][0], said[3][0]),
        ],
        2: [(given[0][2], said[0][2]), (given[1][0], said[1][0]), (given[2][2], third[2])],
        3: [(given[2][0], third[0])],
        4: [(given[3][1], said[3][1])],
    }
    assert list(seen(folder)) == [0, 1, 2, 3, 4]
    for number, episode in seen(folder).items():
        wanted = [obs for obs, _ in chunks[number]]
        if number in (1, 3, 4):
            wanted.append(given[4][{1: 1, 3: 0, 4: 2}[number]])
        np.testing.assert_array_equal(episode, wanted)
        actions = read_episode(folder, number, "actions")[: len(chunks[number])]
        np.testing.assert_array_equal(actions, [said for _, said in chunks[number]])
    assert not any(episode.simulated for episode in read_collection(folder)[1])
    assert {path.suffix for path in folder.iterdir()} == {".npz", ".json"}


def test_arrays_of_others_and_a_lane_without_its_axis(tiny: str, folder: Path) -> None:
    torch = pytest.importorskip("torch")
    policy = tsad.load(tiny, **LOAD)
    obs = observations(policy, 0)[0]
    with tsad.Recorder(policy, folder) as recorder:
        recorder(obs)
        actions = recorder(torch.from_numpy(obs) * 2)
        assert isinstance(actions, torch.Tensor)  # as the policy's
        recorder(torch._neg_view(torch.from_numpy(obs)))  # whose memory holds other numbers
        recorder(obs, out=np.empty(actions.shape, np.float32))
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a Recorder writes a folder and can't be copied"):
                duplicate(recorder)
    np.testing.assert_array_equal(seen(folder)[0], [obs, 2 * obs, -obs, obs])


def test_masks_of_lanes(tiny: str, folder: Path) -> None:
    policy = tsad.load(tiny, lanes=3, **LOAD)
    obs = observations(policy, 0, 3)
    with tsad.Recorder(policy, folder) as recorder:
        recorder(obs)
        recorder.reset(lanes=np.array([False, True, False]))
        recorder(obs[:2], lanes=[True, True, False])
        recorder.reset(lanes=np.flatnonzero([False] * 3))  # nobody's
        recorder(obs[:1] + 1, lanes=np.int64(2))
    found = {number: len(episode) for number, episode in seen(folder).items()}
    assert found == {0: 2, 1: 1, 2: 2, 3: 1}
    np.testing.assert_array_equal(seen(folder)[2], [obs[2], obs[0] + 1])


def test_a_warm_start_and_a_simulator(tiny: str, folder: Path) -> None:
    """Two lanes; the recorded policy plays the episodes that the policy plays."""
    load = {**LOAD, "num_inference_steps": 4, "warm_start": 2, "lanes": 2}
    chunks: dict[int, list[Any]] = {}

    def keep(chunk: sim.Chunk) -> None:
        for seed, obs in zip(chunk.seeds, chunk.obs, strict=True):
            chunks.setdefault(seed, []).append(obs)

    plain = list(
        sim.rollouts(
            tsad.load(tiny, **load), [Table(), Table()], range(5), on_chunk=keep, n_action_steps=2
        )
    )
    with tsad.Recorder(tsad.load(tiny, **load), folder) as recorder:
        recorded = list(sim.rollouts(recorder, [Table(), Table()], range(5), n_action_steps=2))
    assert [(e.seed, e.score) for e in recorded] == [(e.seed, e.score) for e in plain]
    found = seen(folder)
    assert list(found) == list(range(5)) and len({len(obs) for obs in found.values()}) > 1
    for seed, obs in found.items():
        np.testing.assert_array_equal(obs, chunks[seed])


def test_in_a_thread(tiny: str, folder: Path) -> None:
    """A simulator in a thread; whoever calls meanwhile is told so, and nothing of it is kept."""
    policy = tsad.load(tiny, **LOAD | {"num_inference_steps": 100})
    obs = [observations(policy, seed)[0] for seed in range(20)]
    recorder = tsad.Recorder(policy, folder)
    started, errors = threading.Event(), []

    def loop() -> None:
        recorder.reset(seed=0)
        for each in obs:
            while True:
                try:
                    recorder(each)
                    break
                except RuntimeError as error:
                    errors.append(str(error))
            started.set()

    thread = threading.Thread(target=loop)
    thread.start()
    started.wait(60)
    while thread.is_alive():
        try:
            recorder.reset(lanes=[])
        except (RuntimeError, ValueError) as error:  # busy, or no lanes to reset
            errors.append(str(error))
    thread.join()
    recorder.close()
    recorder.close()
    assert any("busy" in error for error in errors)
    np.testing.assert_array_equal(seen(folder)[0], obs)
    with pytest.raises(RuntimeError, match="closed; make another"):
        recorder(obs[0])
    assert policy(obs[0]).shape == (policy.n_action_steps, policy.action_dim)


# ---- whose folder it is


def test_a_folder_is_gone_on_with(tiny: str, folder: Path, tmp_path: Path) -> None:
    policy = tsad.load(tiny, **LOAD)
    obs = observations(policy, 0)[0]
    for session in range(3):
        other = tsad.load(tiny, sampler="ddpm", num_inference_steps=session + 2)
        with tsad.Recorder(other, folder) as recorder:
            recorder(obs + session)
            recorder.reset()
            recorder(obs - session)
    found = seen(folder)
    assert len(found) == 6
    for number, episode in found.items():
        sign = -1 if number % 2 else 1
        np.testing.assert_array_equal(episode, [obs + sign * (number // 2)])

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = tsad.load(save_policy(tmp_path / "other", seed=1), **LOAD)
    with pytest.raises(ResultsError, match=r"files_sha256, model\.safetensors: the file has '"):
        tsad.Recorder(others, folder)
    with tsad.Recorder(policy, folder), pytest.raises(ResultsError, match="by another run, proc"):
        tsad.Recorder(policy, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ResultsError, match="is not empty and holds no collection"):
        tsad.Recorder(policy, tmp_path / "full")
    with pytest.raises(OSError, match=r"notes\.txt"):
        tsad.Recorder(policy, tmp_path / "full" / "notes.txt" / "deeper")
    for wrong in (tsad.Recorder, None, lambda obs: obs):
        with pytest.raises(TypeError, match=r"policy: expected one of tsad\.load, got "):
            tsad.Recorder(wrong, tmp_path / "new")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got SparsePolicy made otherwise; save the observations"):
        tsad.Recorder(make_policy(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_collection_is_no_recording(tiny: str, folder: Path) -> None:
    recording.open_collection(folder, {"simulator": "pusht"})
    with pytest.raises(ResultsError, match="simulator: the file has 'pusht', this run None"):
        tsad.Recorder(tsad.load(tiny, **LOAD), folder)


# ---- however it ends

LOOP = """
import sys, time
import numpy as np
import tsad

policy = tsad.Recorder(tsad.load(sys.argv[1], sampler="ddim", num_inference_steps=2), sys.argv[2])
{0}
for chunk in range(10**6):
    if chunk % 5 == 0:
        policy.reset()
    policy(np.full((policy.n_obs_steps, policy.obs_dim), chunk, np.float32))
    print(chunk, flush=True)
    {1}
    time.sleep(0.02)
"""


def start(tiny: str, folder: Path, before: str = "", each: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LOOP.format(before, each), tiny, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def chunks_of(folder: Path) -> list[int]:
    """The numbers of the chunks, in order; each is seen in every number of its observation."""
    found = [obs for episode in seen(folder).values() for obs in episode]
    assert all((obs == obs.flat[0]).all() for obs in found)
    return [int(obs.flat[0]) for obs in found]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_mid_episode(tiny: str, folder: Path, how: signal.Signals) -> None:
    process = start(tiny, folder)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 12:
        pass
    time.sleep(0.01)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    said = 12 + len(out.split())
    found = chunks_of(folder)
    assert found == list(range(len(found)))
    # killed, a chunk or two may not have reached the disk yet; on a busy machine they have not
    assert said + 1 <= len(found) if how == signal.SIGINT else said - 2 <= len(found)
    assert len(found) <= said + 2
    assert ("KeyboardInterrupt" in err) == (how == signal.SIGINT)
    # killed: the last episode is not finished, and the next session does that
    unfinished = list(folder.glob("*.part"))
    assert len(unfinished) == (how != signal.SIGINT and len(found) % 5 > 0)
    with tsad.Recorder(tsad.load(tiny, **LOAD), folder) as recorder:
        recorder(observations(recorder, 0)[0])
    again = seen(folder)
    assert len(again) == -(-len(found) // 5) + 1 and not list(folder.glob("*.part"))
    assert [int(obs.flat[0]) for n in list(again)[:-1] for obs in again[n]] == found


@pytest.mark.parametrize("ending", ["sys.exit(3)", "raise ValueError('a loop of my own')", "break"])
def test_an_end_without_a_good_bye(tiny: str, folder: Path, ending: str) -> None:
    process = start(tiny, folder, each=f"if chunk == 7: {ending}")
    out, err = process.communicate(timeout=60)
    assert out.split()[-1] == "7" and ("Traceback" in err) == ("ValueError" in ending)
    assert chunks_of(folder) == list(range(8)) and not list(folder.glob("*.part"))


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_never_stops_a_chunk(tiny: str, folder: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 10**9))"
    process = start(tiny, folder, limit)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and out.split()[-1] == "4"  # all of the episode
    said = re.search(r"OSError: .*recorded: recording has ended, (.*); mend that and make", err)
    assert said and "File too large" in said[1] or "no space left" in err
    found = chunks_of(folder)
    assert 0 < len(found) < 5 and found == list(range(len(found)))
    with tsad.Recorder(tsad.load(tiny, **LOAD), folder) as recorder:
        recorder(observations(recorder, 0)[0])
    assert list(seen(folder)) == [0, 1] and len(seen(folder)[0]) == len(found)


def test_a_torn_part_gives_what_is_whole(tmp_path: Path) -> None:
    chunk = np.dtype([("obs", np.float32, (2, 3)), ("actions", np.float32, (1, 2))])
    rows = np.arange(3 * 8, dtype=np.float32).view(chunk)
    whole = recording.part_header(chunk) + rows.tobytes()
    path = tmp_path / "episode-00000.part"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        found = recording.read_part(path)
        count = max(0, length - (len(whole) - rows.nbytes)) // chunk.itemsize
        assert (0 if found is None else len(found)) == count
        if found is not None:
            np.testing.assert_array_equal(found, rows[:count])


def test_import_stays_light() -> None:
    code = "import sys, tsad; assert not [m for m in sys.modules if m.startswith('tsad.sim')]"
    code += "; from tsad import Recorder; assert Recorder is tsad.Recorder"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
