"""tsad eval --jobs and --ray: the same episodes, whoever plays them and however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from policies import save_policy

import tsad
from tsad import sim
from tsad.setting import Setting
from tsad.sim.parallel import Player, Work, WorkerError, identity, play
from tsad.sim.results import read_results

slow = pytest.mark.slow
SHORT = ["--sampler", "ddim", "--steps", "2"]
SETTING = Setting(sampler="ddim", num_inference_steps=2)
LOAD = {"sampler": "ddim", "num_inference_steps": 2, "lanes": 2, "threads": 1}


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TABLES_OWNER", str(os.getpid()))
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    sim.register("broken", "fakes:BrokenTable")
    sim.register("deadly", "fakes:DeadlyTable")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """A policy's folder; other episodes in other processes would be seen: nothing is clipped."""
    return save_policy(tmp_path / "tiny")


def command(tiny: str, simulator: str, out: Path, *more: str, seeds: int = 8) -> list[str]:
    words = ["eval", simulator, "--policy", tiny, "--seeds", str(seeds), "--out", str(out)]
    return [*words, *(more if "--sampler" in more else [*SHORT, *more])]


def results(path: Path) -> Any:
    """Settings, and episodes by seed without their times."""
    settings, episodes = read_results(path)
    return settings, sorted((e.seed, e.score, e.success, e.steps, e.chunks) for e in episodes)


# ---- processes


def test_a_sweep_in_processes_is_the_sweep(capsys: Any, tmp_path: Path, tiny: str) -> None:
    tsad.planners.uniform(tsad.load(tiny, **LOAD), 1).save(tmp_path / "one.npz")
    rows = [
        {"name": "warm", "noise": 1, "n_action_steps": 2, "warm_start": 1},
        {"name": "file", "plan": "one.npz"},
        {"name": "half", "sparsity": 0.5, "precision": "int16"},
    ]
    settings = tmp_path / "sweep.json"
    settings.write_text(json.dumps(rows))
    for folder, more in (("alone", []), ("jobs", ["--jobs", "2", "--lanes", "2"])):
        line = command(tiny, "table", tmp_path / folder, "--settings", str(settings), *more)
        code, _, err = run(capsys, *line)
        assert code == 0, err
    found = [results(tmp_path / "jobs" / f"{row['name']}.json") for row in rows]
    assert found == [results(tmp_path / "alone" / f"{row['name']}.json") for row in rows]
    scores = [[score for _, score, *_ in episodes] for _, episodes in found]
    assert scores[0] != scores[1] != scores[2]
    ran = json.loads((tmp_path / "jobs" / "half.json").read_text())["run"]
    assert ran["jobs"] == 2 and not ran["ray"] and 1 <= ran["threads"]


@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=slow)])
def test_stopped_and_resumed(capsys: Any, tmp_path: Path, tiny: str, how: Any) -> None:
    out, code = tmp_path / "r.json", "import sys; from tsad import cli, sim\n"
    code += "sim.register('table', 'fakes:Table'); sys.exit(cli.main(sys.argv[1:]))"
    more = ["--sampler", "ddim", "--steps", "50", "--jobs", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command(tiny, "table", out, *more, seeds=100_000)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    partial, deadline = tmp_path / "r.json.partial", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if partial.exists() and partial.read_bytes().count(b"\n") >= 4:
            break
        time.sleep(0.02)
    if how == signal.SIGINT:  # as the terminal does: to all of them
        os.killpg(process.pid, how)
    else:
        process.kill()
    # The workers have the other end of this pipe too: it ends with the last of them.
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    kept = {row["seed"]: row for row in map(json.loads, partial.read_text().splitlines()[1:])}
    assert len(kept) >= 3
    if how == signal.SIGKILL:
        return
    said = re.search(r"(\d+) episodes are kept; the same command with --resume goes on", err)
    assert process.returncode == 130 and said
    assert len(kept) - 1 <= int(said[1]) <= len(kept)  # one may just have been written

    seeds = max(kept) + 4
    line = command(tiny, "table", out, *more, "--resume", seeds=seeds)
    assert run(capsys, *line)[0] == 0
    again = {row["seed"]: row for row in json.loads(out.read_text())["episodes"]}
    assert {seed: again[seed] for seed in kept} == kept  # to the microsecond: not played again
    whole = tmp_path / "whole.json"
    assert run(capsys, *command(tiny, "table", whole, *more[:-2], seeds=seeds))[0] == 0
    assert results(out) == results(whole)


def test_an_error_in_a_worker(capsys: Any, tmp_path: Path, tiny: str) -> None:
    out = tmp_path / "r.json"
    code, _, err = run(capsys, *command(tiny, "broken", out, "--jobs", "2"))
    assert code == 1
    assert "a worker failed in the episodes [5]: LookupError: the table has three legs (" in err
    kept = (tmp_path / "r.json.partial").read_text().splitlines()[1:]
    assert f"; {len(kept)} episodes are kept; the same command with --resume goes on" in err
    assert not out.exists() and len(kept) < 8


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_worker_that_is_killed(capsys: Any, tmp_path: Path, tiny: str) -> None:
    (tmp_path / "s.json").write_text('[{"name": "a"}]')
    more = ["--settings", str(tmp_path / "s.json"), "--jobs", "2"]
    code, _, err = run(capsys, *command(tiny, "deadly", tmp_path / "out", *more))
    assert code == 1 and "error: setting a: a worker process ended in the middle of" in err
    kept = (tmp_path / "out" / "a.json.partial").read_text().splitlines()[1:]
    assert err.endswith(f"; {len(kept)} episodes are kept; the same command goes on\n")


def test_a_worker_that_would_give_other_results_is_refused(tiny: str) -> None:
    policy = tsad.load(tiny, **LOAD)
    same = identity(policy, ["numpy"])
    assert same["tsad"] == tsad.__version__ and same["numpy"] and same["backend"] == policy.backend
    facts = sim.facts("table")._replace(packages=("numpy",))
    assert len(Player(Work("table", tiny, SETTING, 2, 1, identity=same), facts).play([1, 2])) == 2
    other = Player(Work("table", tiny, SETTING, 2, 1, identity=same | {"backend": "abacus"}), facts)
    got = other.play([1, 2])
    assert f"backend: this worker has {policy.backend}, the caller abacus; results would" in got


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_wrong_jobs(capsys: Any, tmp_path: Path, tiny: str, value: str) -> None:
    code, _, err = run(capsys, *command(tiny, "table", tmp_path / "r.json", "--jobs", value))
    assert code == 2 and f"argument --jobs: got '{value}', expected an integer of at least 1" in err


# ---- Ray


class FakeRay(types.ModuleType):
    """As much of Ray as is used; its actors live in this process."""

    def __init__(self, cpus: int) -> None:
        super().__init__("ray")
        self.cpus, self.connected, self.actors, self.killed = cpus, False, [], []
        self.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **_: Any) -> None:
        self.connected = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus), "memory": 1e9}

    def remote(self, *, num_cpus: int) -> Any:
        def kind(cls: Any) -> Any:
            def actor(*args: Any) -> Any:
                self.actors.append(cls(*args))
                play = types.SimpleNamespace(remote=self.actors[-1].play)
                return types.SimpleNamespace(play=play, num_cpus=num_cpus)

            return types.SimpleNamespace(remote=actor)

        return kind

    def kill(self, actor: Any) -> None:
        self.killed.append(actor.num_cpus)


class FakeActorPool:
    """Finishes the last one first."""

    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def map_unordered(self, function: Any, values: list[Any]) -> Iterator[Any]:
        for index, value in reversed(list(enumerate(values))):
            yield function(self.actors[index % len(self.actors)], value)


def fake_ray(monkeypatch: pytest.MonkeyPatch, cpus: int) -> FakeRay:
    ray = FakeRay(cpus)
    monkeypatch.setitem(sys.modules, "ray", ray)
    util = types.SimpleNamespace(ActorPool=FakeActorPool)
    monkeypatch.setitem(sys.modules, "ray.util", util)  # type: ignore[arg-type]
    return ray


def test_on_a_fake_ray(
    capsys: Any, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = fake_ray(monkeypatch, 7)
    more = ["--ray", "--threads", "2"]
    assert run(capsys, *command(tiny, "table", tmp_path / "ray.json", *more))[0] == 0
    assert ray.connected and len(ray.actors) == 3 and ray.killed == [2, 2, 2]
    assert run(capsys, *command(tiny, "table", tmp_path / "alone.json"))[0] == 0
    assert results(tmp_path / "ray.json") == results(tmp_path / "alone.json")
    ran = json.loads((tmp_path / "ray.json").read_text())["run"]
    assert (ran["jobs"], ran["threads"], ran["ray"]) == (3, 2, True)

    code, _, err = run(capsys, *command(tiny, "table", tmp_path / "x.json", *more, "--jobs", "4"))
    assert code == 2 and "--ray: got 4 processes (--jobs) of 2 threads (--threads), but" in err
    assert not list(tmp_path.glob("x.json*"))

    ray.killed.clear()
    code, _, err = run(capsys, *command(tiny, "broken", tmp_path / "b.json", *more))
    assert code == 1 and "LookupError: the table has three legs" in err and ray.killed == [2, 2, 2]


def test_a_ray_worker_that_ends(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = fake_ray(monkeypatch, 2)

    def lost(*_: Any) -> Any:
        raise ray.exceptions.RayError("the node is gone")

    monkeypatch.setattr(Player, "play", lost)
    with pytest.raises(WorkerError, match="Ray cluster ended: the node is gone"):
        list(play(Work("table", tiny, SETTING, 2, 1), range(8), 2, ray=True))
    assert ray.killed == [1, 1]


def test_ray_is_an_extra(
    capsys: Any, tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    code, _, err = run(capsys, *command(tiny, "table", tmp_path / "r.json", "--ray"))
    assert code == 1 and "not installed; fix: pip install 'tsad-policy[ray]'" in err
    assert not list(tmp_path.glob("r.json*"))


@slow
def test_on_ray(capsys: Any, tmp_path: Path, tiny: str) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, log_to_driver=False)
    try:
        for lanes in ("1", "3"):
            out = tmp_path / f"{lanes}.json"
            line = command(tiny, "table", out, "--ray", "--jobs", "2", "--lanes", lanes)
            code, _, err = run(capsys, *line)
            assert code == 0, err
        code, _, err = run(capsys, *command(tiny, "broken", tmp_path / "b.json", "--ray"))
        assert code == 1 and "LookupError: the table has three legs" in err
        code, _, err = run(capsys, *command(tiny, "deadly", tmp_path / "d.json", "--ray"))
        assert code == 1 and "a worker of the Ray cluster ended" in err and "are kept" in err
    finally:
        ray.shutdown()
    assert run(capsys, *command(tiny, "table", tmp_path / "alone.json"))[0] == 0
    alone = results(tmp_path / "alone.json")
    assert results(tmp_path / "1.json") == results(tmp_path / "3.json") == alone
