"""What is shown during long work, and where nothing can be shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run

import tsad
from tsad.evaluation.progress import EpisodeProgress, Progress

SHARE = re.compile(r"(\d+) of (\d+) episodes(?: \((\d+)%\))?, ")


def shares(err: str) -> list[tuple[int, int]]:
    """(episodes, percent) of every line of a log."""
    found = SHARE.findall(err)
    return [(int(done), 100 if share == "" else int(share)) for done, _, share in found]


@pytest.mark.parametrize("more", [["--lanes", "4"], ["--lanes", "2", "--jobs", "2"]])
def test_progress_moves_before_the_first_episode_ends(
    capsys: Any, monkeypatch: Any, more: list[str]
) -> None:
    """All of `--lanes` end at the same time: by episodes alone it stood at 0 % until then."""
    pytest.importorskip("gym_pusht")
    from tsad.sim import parallel

    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(parallel, "TELL_SECONDS", 0.02)
    few = ["--seeds", "4", "--sampler", "ddim", "--steps", "2", "--threads", "1"]
    code, _, err = run(capsys, "eval", "pusht", *few, *more)
    seen = shares(err)
    assert code == 0 and seen[-1] == (4, 100), err
    before = {share for done, share in seen if done == 0}
    assert len(before) > 3 and max(before) > 20, seen
    assert [share for _, share in seen] == sorted(share for _, share in seen)


def test_collecting_moves_too(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(PushT, "max_steps", 80)
    options = ["--episodes", "2", "--sampler", "ddim", "--steps", "2", "--out", str(tmp_path / "x")]
    code, _, err = run(capsys, "collect", "pusht", *options)
    assert code == 0 and len({share for done, share in shares(err) if done == 0}) > 3, err


def test_chunks_count_as_parts_of_the_longest_episode(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    with EpisodeProgress(4, "x", longest=10) as progress:
        progress.chunks(5)  # of two episodes: half an episode of four
        progress.chunks(10)
        progress.episode(8, "ended early")  # 7 are of others
        progress.episode(7, "")
    assert shares(capsys.readouterr().err) == [(0, 12), (0, 38), (1, 42), (2, 50)]


def test_without_a_unit_a_share_is_shown(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    with Progress(1000, "train", unit="") as progress:
        progress.update("step 7", 70)
        progress.update("step 99", 930)
    said = capsys.readouterr().err
    assert said == "train: 7%, 0 s, step 7\ntrain: 100%, 0 s, step 99\n"


def test_a_log_says_nothing_of_brief_work_that_is_brief(capsys: Any, monkeypatch: Any) -> None:
    with Progress(2, "loading", unit="settings", brief=True) as progress:
        progress.update("one")
        progress.update("two")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Progress, "LOG_SECONDS", 0.0)
    with Progress(2, "loading", unit="settings", brief=True) as progress:
        progress.update("one")
        progress.update("two")
    lines = "loading: 1 of 2 settings (50%), 0 s, one\nloading: 2 of 2 settings, 0 s, two\n"
    assert capsys.readouterr().err == lines


# ---- where it goes


@pytest.fixture(scope="module")
def plan(tmp_path_factory: Any) -> str:
    path = tmp_path_factory.mktemp("plans") / "pl\u00e4n.npz"
    policy = tsad.load("pusht", sampler="ddim", num_inference_steps=4)
    tsad.planners.uniform(policy, 2).save(path)
    return str(path)


def started(arguments: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **options.pop("env", {})}
    command = [sys.executable, "-m", "tsad", *arguments]
    return subprocess.run(command, env=environment, timeout=120, check=False, **options)


@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb", "NO_COLOR": "1"},
    ],
    ids=["ascii", "C", "dumb"],
)
def test_terminals_that_know_little(plan: str, env: dict[str, str]) -> None:
    """The issue's command; the file's name is not ASCII."""
    pytest.importorskip("matplotlib")
    png = str(Path(plan).with_suffix(".png"))
    done = started(["show", plan, "--png", png, "--overwrite"], capture_output=True, env=env)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert b"48 of 96 computed" in done.stdout and b"\x1b" not in done.stdout
    assert done.stdout.isascii() or "TERM" in env
    done = started(["show", plan[:-1]], capture_output=True, env=env)
    assert done.returncode == 2 and b"which is not a file" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full")
@pytest.mark.parametrize("command", [["show"], ["info", "pusht"], ["--help"], ["--version"]])
def test_output_that_goes_nowhere(plan: str, command: list[str]) -> None:
    command = ["show", plan] if command == ["show"] else command
    with open("/dev/full", "w") as full:
        done = started(command, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"tsad"), done.stderr
    assert b"No space left on device" in done.stderr and done.stderr.count(b"\n") == 1
    read, write = os.pipe()
    os.close(read)
    done = started(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b"", done.stderr
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        line = " ".join([sys.executable, "-m", "tsad", *command, closed])
        done = subprocess.run(line, shell=True, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0 and done.stderr == b"", (closed, done.stderr)
