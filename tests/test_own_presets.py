"""Presets of one's own: where they go, which comes first, what a broken file of them does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from test_load import a_folder
from test_presets import a_preset

import tsad
from tsad import presets
from tsad.presets import PRESETS_FILE, home, places, read_presets, save_presets

BUNDLED = Path(tsad.__file__).parent / "assets" / "pusht"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("TSAD_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "presets"


@pytest.fixture(autouse=True)
def bundled_stay() -> Iterator[None]:
    before = contents(BUNDLED)
    yield
    assert contents(BUNDLED) == before


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Another process."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        cwd=BUNDLED.parents[2],
    )


def mine(folder: Path, name: str = "fast", **fields: Any) -> Any:
    return a_preset(folder, name, num_inference_steps=3, **fields)


# ---- where they go


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"TSAD_HOME": "/a/b", "XDG_DATA_HOME": "/c"}, "/a/b"),
        ({"XDG_DATA_HOME": "/c", "HOME": "/d"}, "/c/tsad"),
        ({"XDG_DATA_HOME": "c", "HOME": "/d"}, "/d/.local/share/tsad"),  # so says the standard
        ({"TSAD_HOME": "", "XDG_DATA_HOME": "", "HOME": "/d"}, "/d/.local/share/tsad"),
        ({"TSAD_HOME": "here"}, "CWD/here"),
    ],
)
def test_home(variables: dict[str, str], folder: str, monkeypatch: Any) -> None:
    for name in ("TSAD_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(home()) == folder.replace("CWD", os.getcwd())


def test_of_a_bundled_policy_they_are_yours(own_home: Path) -> None:
    with pytest.raises(PermissionError, match="comes with tsad, which stays as it is"):
        save_presets(BUNDLED, [(mine(BUNDLED), None)])
    place = places(BUNDLED)[0]
    assert place == own_home / presets.model_sha256(BUNDLED) and not own_home.exists()
    plan = tsad.planners.uniform(tsad.load("pusht", sampler="ddim", num_inference_steps=3), 3)
    save_presets(place, [(mine(BUNDLED), plan)])
    assert sorted(contents(place)) == ["preset-fast.npz", PRESETS_FILE]
    assert tsad.load("pusht", preset="fast").plan == plan  # yours is first
    theirs = read_presets(BUNDLED)["lossless"]
    policy = tsad.load("pusht", preset="lossless")
    assert policy.config["scheduler"]["num_inference_steps"] == theirs.num_inference_steps != 3


def test_they_never_apply_to_other_weights(tmp_path: Path, own_home: Path) -> None:
    save_presets(places(BUNDLED)[0], [(mine(BUNDLED, "mine"), None)])
    copy = tmp_path / "copy"
    shutil.copytree(BUNDLED, copy)
    assert tsad.load(copy, preset="mine").num_inference_steps == 3  # the same weights
    config, tensors, pruner = tsad.checkpoint.read_folder(copy)
    name, value = next(iter(tensors.items()))
    tsad.checkpoint.write_folder(copy, config, tensors | {name: value + np.float32(0.5)}, pruner)
    with pytest.raises(ValueError, match="preset: got 'mine', but"):
        tsad.load(copy, preset="mine")
    # nor if somebody puts the file there
    place = places(copy)[1]
    shutil.copytree(places(BUNDLED)[0], place)
    with pytest.raises(ValueError, match="'mine' was made for other weights"):
        tsad.load(copy, preset="mine")


def test_of_a_policy_of_your_own_they_go_with_it(tmp_path: Path, own_home: Path) -> None:
    folder = a_folder(tmp_path / "policy")
    yours = own_home / presets.model_sha256(folder)
    assert places(folder) == [folder, yours]
    save_presets(folder, [(mine(folder), None)])
    save_presets(yours, [(a_preset(folder, "fast"), None), (a_preset(folder, "more"), None)])
    assert tsad.load(folder, preset="fast").num_inference_steps == 3
    assert tsad.load(folder, preset="more").num_inference_steps == 5
    # one that was made for other weights hides nothing
    save_presets(folder, [(replace(mine(folder), model_sha256="ab" * 32), None)])
    assert tsad.load(folder, preset="fast").num_inference_steps == 5


def test_of_a_policy_that_cannot_be_changed_they_are_yours(own_home: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # which others may look into, unlike tmp_path
        os.chmod(name, 0o755)
        folder = a_folder(Path(name) / "policy")
        save_presets(folder, [(mine(folder), None)])
        folder.chmod(0o555)
        code = (
            "import os, sys\nfrom pathlib import Path\nfrom tsad.presets import places\n"
            "os.getuid() or os.setuid(65534)\nprint(places(Path(sys.argv[1]))[0])"
        )
        found = python(code, str(folder)).communicate()[0]
        folder.chmod(0o755)
        assert found.strip() == str(own_home / presets.model_sha256(folder))


def test_who_saves_at_the_same_time_loses_nothing(own_home: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom tsad.presets import Preset, save_presets\n"
        "for n in range(5):\n"
        "    p = Preset(f'{sys.argv[1]}-{n}', 'ab' * 32, sampler='ddim',"
        " num_inference_steps=4, timestep_spacing='leading')\n"
        "    save_presets(Path(sys.argv[2]), [(p, None)])\n"
    )
    writers = [python(code, name, str(own_home / "place")) for name in "abcd"]
    assert [writer.wait() for writer in writers] == [0] * 4
    names = {f"{name}-{n}" for name in "abcd" for n in range(5)}
    assert read_presets(own_home / "place").keys() == names
    assert os.listdir(own_home / "place") == [PRESETS_FILE]


# ---- files that can't be read


def broken(place: Path, kind: str) -> Path:
    place.mkdir(parents=True)
    path = place / PRESETS_FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        os.symlink(PRESETS_FILE, path)
    else:
        path.write_text({"text": "{", "other": '{"format": "x"}', "list": "[]", "empty": ""}[kind])
    return path


@pytest.mark.parametrize("kind", ["text", "other", "list", "empty", "folder", "loop"])
def test_a_broken_file_is_said_and_hides_nothing(kind: str, capsys: Any) -> None:
    path = broken(places(BUNDLED)[0], kind)
    if kind == "loop":  # as if it were not there
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tsad.load("pusht", preset="fast")
        return
    with pytest.warns(UserWarning, match=f"{path}: .*until then its presets are left out") as told:
        policy = tsad.load("pusht", preset="fast")
    assert told[0].filename == __file__
    scheduler = policy.config["scheduler"]
    assert scheduler["num_inference_steps"] == read_presets(BUNDLED)["fast"].num_inference_steps
    with pytest.raises(ValueError, match=str(path)):
        tsad.load("pusht", preset="mine")
    assert tsad.load("pusht").lanes == 1  # asks for none
    code, out, err = run(capsys, "info", "pusht")
    assert code == 0 and f"presets that can't be read\n  {path}: " in out, err
    assert f"presets in {BUNDLED / PRESETS_FILE}\n  fast" in out
    if kind == "text":
        code, _, err = run(capsys, "bench", "pusht", "--preset", "fast", "--chunks", "5")
        assert code == 0 and f"note: {path}: " in err and "Warning" not in err
    command = ["tune", "pusht", "--out", "never", "--save"]
    code, _, err = run(capsys, *command)
    assert code == 2 and "argument --save: " in err and str(path) in err, err
    assert not Path("never").exists()


def test_a_file_that_may_not_be_read() -> None:
    from test_files import without_rights

    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = shutil.copytree(BUNDLED, Path(name) / "pusht")  # where anybody can read it
        place = Path(name) / "presets" / presets.model_sha256(BUNDLED)
        place.mkdir(parents=True)
        save_presets(place, [(mine(BUNDLED), None)])
        (place / PRESETS_FILE).chmod(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TSAD_HOME", name)
            with without_rights(), pytest.warns(UserWarning, match="can't be read .Permission"):
                found = presets.find_preset(folder, "fast", "pusht")
            assert found == read_presets(folder)["fast"]


def test_a_folder_without_weights(tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "eval", "pusht", "--policy", str(tmp_path), "--preset", "fast")
    assert code == 2 and "argument --preset: " in err and "weights can't be read" in err, err


# ---- the commands


def test_info_says_where_each_is_from(own_home: Path, capsys: Any) -> None:
    place = places(BUNDLED)[0]
    save_presets(place, [(mine(BUNDLED), None), (mine(BUNDLED, "mine"), None)])
    code, out, err = run(capsys, "info", "pusht")
    assert code == 0 and f"presets in {place / PRESETS_FILE}\n  fast  ddim, 3 steps" in out, err
    assert "not used, there is another of this name above" in out and str(own_home) in out
    code, out, err = run(capsys, "info", "pusht", "--json")
    facts = json.loads(out)
    rows = [(r["name"], Path(r["file"]).parent, r["hidden"]) for r in facts["policy"]["presets"]]
    assert rows == [
        ("fast", place, False),
        ("mine", place, False),
        *((name, BUNDLED, name == "fast") for name in read_presets(BUNDLED)),
    ]
    assert facts["policy"]["preset_problems"] == []
    assert facts["build"]["presets of yours"] == str(own_home)


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"milliseconds": 1.5, "cpu": "Z80", "threads": 2}, "1.50 ms a chunk on Z80, 2 threads"),
        ({"milliseconds": 1, "threads": 1}, "1.00 ms a chunk on an unknown processor, 1 thread"),
        ({"milliseconds": "fast", "cpu": 3, "threads": "all", "mean_difference": []}, ""),
    ],
)
def test_times_name_their_processor(
    own_home: Path, capsys: Any, measured: dict[str, Any], said: str
) -> None:
    """In info, bench and eval; what a preset says of itself can be anything."""
    place = places(BUNDLED)[0]
    save_presets(place, [(replace(mine(BUNDLED), measured=measured), None)])
    code, out, err = run(capsys, "info", "pusht")
    row = next(line for line in out.splitlines() if line.startswith("  fast "))
    assert code == 0 and row.startswith("  fast  ddim, 3 steps") and said in row, err
    assert ("ms a chunk" in row) == bool(said) and ("(not here: " in row) == ("Z80" in said)
    code, out, err = run(capsys, "bench", "pusht", "--preset", "fast", "--chunks", "1")
    assert code == 0 and ("preset fast was timed at" in out) == bool(said) and said in out, err


def test_tune_saves_yours(own_home: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """The issue's command: the bundled presets stay as they are (`bundled_stay`)."""
    pytest.importorskip("gym_pusht")
    from tsad.commands import tune
    from tsad.sim import results
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 24)
    monkeypatch.setattr(tune, "CHUNKS_PER_ROUND", 2)
    monkeypatch.setattr(tune, "LEAST_SEEDS", 2)
    monkeypatch.setattr(results, "LEAST_EPISODES", 2)
    rows = [{"name": "eight", "sampler": "ddim", "steps": 8}]
    rows += [{"name": "one", "sampler": "ddim", "steps": 1, "precision": "int16"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    command = ["tune", "pusht", "--out", str(tmp_path / "tuned"), "--save", "--within", "9"]
    command += ["--settings", str(tmp_path / "rows.json"), "--seeds", "2", "--rounds", "1"]
    code, out, err = run(capsys, *command)
    place = places(BUNDLED)[0]
    assert code == 0 and f'kept in {place}: tsad.load(..., preset="fast")' in out, err
    assert read_presets(place)["fast"].num_inference_steps == 1
    assert tsad.load("pusht", preset="fast").num_inference_steps == 1
    before = contents(place)
    code, out, err = run(capsys, *command)
    assert (code, out) == (
        2,
        "",
    ) and "presets.json has fast and lossless; --overwrite replaces" in err
    assert contents(place) == before
    code, out, err = run(capsys, *command, "--overwrite")
    assert code == 0 and "episodes" not in err, err  # the episodes are kept
