"""Every command that writes: what exists is refused before any work, and nothing is lost later."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import tsad
from tsad import cli, files
from tsad.evaluation.progress import Progress
from tsad.plot import save_plan

pytest.importorskip("gym_pusht")
pytest.importorskip("torch")
pytest.importorskip("dill")

FEW = " --sampler ddim --steps 4 --threads 1"
FILES = {
    "measure": "plan measure pusht --data recorded --chunks 8 --projections 1 --out OUT" + FEW,
    "make": "plan make random pusht --sparsity 0.5 --out OUT" + FEW,
    "search": "plan search pusht --data recorded --start plan.npz --minutes 0 --chunks 8 --lanes 4 "
    "--out OUT" + FEW,
    "import": "plan import mask.txt pusht --out OUT" + FEW,
    "eval": "eval pusht --seeds 1 --out OUT" + FEW,
    "generate": "generate pusht --seeds 0:4 --start 0.01 --particles 3 --chunks 4 --out OUT" + FEW,
    "show": "show plan.npz --png OUT",
}
SUFFIX = {"eval": ".json", "show": ".png"}
FOLDERS = {
    "demo": "demo --seeds 1 --sparsity 0.5 --out OUT" + FEW,
    "sweep": "eval pusht --seeds 2 --settings rows.json --out OUT --threads 1",
    "tune": "tune pusht --seeds 2 --settings rows.json --rounds 1 --out OUT --threads 1",
    "collect": "collect pusht --episodes 1 --out OUT" + FEW,
    "convert": "convert latest.ckpt OUT",
    "train": "train-policy demos.npz --out OUT --steps 4 --horizon 5 --n-action-steps 3 "
    "--n-layer 1 --n-head 2 --n-emb 16 --batch 8 --val-episodes 1 --device cpu --report-every 2",
}
# the file that an earlier run is known by; the others want an empty folder
RESULT = {"demo": "results.json", "sweep": "summary.json", "tune": "tune.json"}
OPTION = {"show": "argument --png: ", "convert": "argument FOLDER: "}
SHORT = ("make", "import", "show", "convert")  # no progress bar
ROWS = [
    {"name": "four", "sampler": "ddim", "steps": 4},
    {"name": "two", "sampler": "ddim", "steps": 2},
]


@pytest.fixture(autouse=True, scope="module")
def short_episodes() -> Iterator[None]:
    from tsad.commands import tune
    from tsad.sim import pusht

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pusht.PushT, "max_steps", 32)
        patch.setattr(pusht, "SUCCESS_COVERAGE", 0.05)
        patch.setattr(tune, "CHUNKS_PER_ROUND", 2)
        yield


@pytest.fixture(scope="module")
def material(tmp_path_factory: Any, short_episodes: None) -> Path:
    """What the commands read."""
    import checkpoints
    from demonstrations import standing_demonstrations

    folder: Path = tmp_path_factory.mktemp("material")
    checkpoints.save(folder / "latest.ckpt", checkpoints.payload())
    standing_demonstrations(folder)
    (folder / "mask.txt").write_text("1010")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    for command in (
        f"collect pusht --out {folder}/recorded --episodes 2",
        f"plan make uniform pusht --sparsity 0.5 --out {folder}/plan.npz",
    ):
        assert cli.main((command + FEW).split()) == 0
    return folder


@pytest.fixture
def work(monkeypatch: Any) -> list[str]:
    """The labels of progress bars that began: all long work has one. Loading is no work yet."""
    began: list[str] = []
    begin = Progress.__init__

    def note(self: Progress, total: int, label: str, **options: Any) -> None:
        if not options.get("brief"):
            began.append(label)
        begin(self, total, label, **options)

    monkeypatch.setattr(Progress, "__init__", note)
    return began


class Command:
    """One of the commands, run on the material."""

    def __init__(self, name: str, material: Path, capsys: Any) -> None:
        self.name, self._material, self._capsys = name, material, capsys
        self.suffix = SUFFIX.get(name, ".npz")
        self.overwrites = name not in ("collect", "train")

    def __call__(self, out: Any, *more: str) -> tuple[int, str, str]:
        words = (FILES | FOLDERS)[self.name].split()
        there = {path.name: str(path) for path in self._material.iterdir()} | {"OUT": str(out)}
        return run(self._capsys, *(there.get(word, word) for word in words), *more)

    def refused(self, out: Any, *more: str, why: str) -> None:
        code, text, err = self(out, *more)
        assert (code, text) == (2, ""), err
        assert OPTION.get(self.name, "argument --out: ") in err and why in err, err

    def done(self, out: Any, *more: str) -> None:
        code, _, err = self(out, *more)
        assert code == 0, err

    def is_whole(self, path: Path) -> bool:
        """Whether what was written can be read by what it is for."""
        if self.name == "eval":
            return json.loads(path.read_text())["format"] == "tsad-eval"
        if self.name == "show":
            return path.read_bytes().startswith(b"\x89PNG")
        if self.name in ("make", "search", "import"):
            return tsad.Plan.load(path).sparsity >= 0.4
        if self.name in ("measure", "generate"):
            return len(np.load(path).files) > 3
        if self.name in RESULT:
            written = json.loads((path / RESULT[self.name]).read_text())
            return written["format"] == f"tsad-{self.name}"
        if self.name == "collect":
            return (path / "episode-00000.npz").is_file()
        return tsad.load(path).lanes == 1


@pytest.fixture
def command(request: Any, material: Path, capsys: Any, tmp_path: Path, monkeypatch: Any) -> Command:
    monkeypatch.chdir(tmp_path)
    return Command(request.param, material, capsys)


writes_a_file = pytest.mark.parametrize("command", FILES, indirect=True)
writes_a_folder = pytest.mark.parametrize("command", FOLDERS, indirect=True)


# ---- files


@writes_a_file
def test_an_existing_file_is_kept(command: Command, work: list[str]) -> None:
    out, link = Path(f"out{command.suffix}"), Path(f"link{command.suffix}")
    os.symlink(out, link)
    out.write_bytes(b"old")
    out.chmod(0o640)
    for path in (out, link):
        command.refused(path, why="exists")
        command.refused(path, why="--overwrite")
        assert not work and out.read_bytes() == b"old" and len(os.listdir()) == 2
    command.done(link, "--overwrite")
    assert bool(work) == (command.name not in SHORT)
    assert command.is_whole(out) and link.is_symlink() and len(os.listdir()) == 2
    assert stat.S_IMODE(out.stat().st_mode) == 0o640


@writes_a_file
def test_a_link_to_no_file_yet(command: Command) -> None:
    Path("far").mkdir()
    link, new = Path(f"link{command.suffix}"), Path(f"far/new{command.suffix}")
    os.symlink(new, link)
    command.done(link)
    assert link.is_symlink() and command.is_whole(new)
    assert len(os.listdir()) == 2 and len(os.listdir("far")) == 1


@writes_a_file
def test_what_is_no_file(command: Command, work: list[str]) -> None:
    suffix = command.suffix
    Path("afile").write_bytes(b"old")
    Path(f"folder{suffix}").mkdir()
    os.mkfifo(f"pipe{suffix}")
    os.symlink(f"pipe{suffix}", f"link{suffix}")
    os.symlink("nowhere", "lost")
    before = sorted(os.listdir())
    cases = {
        f"pipe{suffix}": "is a device, a pipe or the like",
        f"link{suffix}": "is a device, a pipe or the like",
        f"folder{suffix}": "is a folder, expected the name of a file",
        f"afile/x{suffix}": "'afile' is a file, expected a folder",
        f"gone/x{suffix}": "the folder 'gone' does not exist; make it",
        f"lost/x{suffix}": "'lost' is a link to 'nowhere', where no folder is",
        "x" * 256 + suffix: "File name too long",
    }
    if command.name != "generate":  # which wants a name that ends in .npz, and says so
        cases |= {"": "expected the name of a file", "-": "expected the name of a file"}
        cases |= {"new/": "is a folder", "/dev/stdout": "is a device, a pipe or the like"}
    for path, message in cases.items():
        for more in ([], ["--overwrite"]):
            command.refused(path, *more, why=message)
    assert not work and sorted(os.listdir()) == before and Path("afile").read_bytes() == b"old"
    assert stat.S_ISFIFO(os.stat(f"pipe{suffix}").st_mode)


@pytest.fixture
def full_disk_at(monkeypatch: Any) -> list[str]:
    """Of files of these names only empty ones can be written; of all, if "" is among them."""
    names: list[str] = []
    plain = files._beside

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def beside(target: Path, content: Any = b"") -> Any:
        fails = content != b"" and ("" in names or target.name in names)
        return plain(target, full if fails else content)

    monkeypatch.setattr(files, "_beside", beside)
    return names


@pytest.fixture
def full_disk(full_disk_at: list[str]) -> None:
    full_disk_at.append("")


@writes_a_file
def test_a_full_disk_keeps_the_old_file(command: Command, full_disk: None) -> None:
    out = Path(f"out{command.suffix}")
    out.write_bytes(b"old")
    code, _, err = command(out, "--overwrite")
    assert code in (1, 2) and "can't be written: No space left on device" in err, err
    assert out.read_bytes() == b"old" and os.listdir() == [out.name]


@pytest.mark.parametrize("command", ["search"], indirect=True)
def test_a_file_that_appears_meanwhile(command: Command, monkeypatch: Any) -> None:
    """Minutes of searching are not lost, and neither is what somebody else has put there."""
    from tsad.planners.search import Search

    plain = Search.run

    def slow(self: Any, *args: Any, **options: Any) -> Any:
        Path("plan.npz").write_bytes(b"another's")
        return plain(self, *args, **options)

    monkeypatch.setattr(Search, "run", slow)
    code, _, err = command("plan.npz")
    assert code == 1 and "has appeared meanwhile and stays; the result is in 'plan-2.npz'" in err
    assert Path("plan.npz").read_bytes() == b"another's"
    assert command.is_whole(Path("plan-2.npz")) and len(os.listdir()) == 2


# ---- folders


@writes_a_folder
def test_what_is_no_folder(command: Command, work: list[str]) -> None:
    Path("afile").write_bytes(b"old")
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    before = sorted(os.listdir())
    cases = {
        "": "expected the name of a folder",
        "afile": "'afile' is a file, expected a folder",
        "afile/x": "afile' is a file, expected a folder",
        "pipe": "'pipe' is no folder",
        "link": "'link' is no folder",
        "x" * 256: "File name too long",
        "new/" + "x" * 256: "more than 255 bytes",
    }
    for path, message in cases.items():
        for more in ([], ["--overwrite"] if command.overwrites else []):
            command.refused(path, *more, why=message)
    assert not work and sorted(os.listdir()) == before and Path("afile").read_bytes() == b"old"


@writes_a_folder
def test_a_link_to_no_folder_yet_and_again(command: Command, work: list[str]) -> None:
    """Through the link; then once more: what can go on goes on, what can't says how to."""
    os.symlink("far/new", "link")
    command.done("link")
    folder = Path("far/new")
    assert Path("link").is_symlink() and command.is_whole(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not [name for name in before if name.startswith(".") or name.endswith("lock")]
    played = len(work)
    if command.name in ("convert", "train"):
        command.refused("link", why="--overwrite" if command.name == "convert" else "--resume")
        assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
        return
    command.done("link")
    assert {path.name for path in folder.iterdir()} == before.keys()
    # the demo shows everything anew, the others play nothing that they have
    anew = {"demo": work[:played], "tune": ["times"], "sweep": [], "collect": []}
    assert work[played:] == anew[command.name]
    for name in ("four.json", "two.json") if command.name in ("sweep", "tune") else ():
        episodes = json.loads(before[name])["episodes"]
        assert json.loads((folder / name).read_text())["episodes"] == episodes


@writes_a_folder
def test_what_another_has_there_is_kept(command: Command, work: list[str]) -> None:
    folder = Path("folder")
    folder.mkdir()
    theirs = folder / RESULT.get(command.name, "mine.txt")
    for content in ("mine", '{"format": "other"}', "[]"):
        theirs.write_text(content)
        command.refused(folder, why="")
        assert not work and theirs.read_text() == content and os.listdir(folder) == [theirs.name]
    if command.name == "convert":
        command.refused(folder, "--overwrite", why="expected a tsad folder to overwrite")
    if command.name in RESULT:
        command.done(folder, "--overwrite")
        assert command.is_whole(folder)
    else:
        assert os.listdir(folder) == [theirs.name] and theirs.read_text() == "[]"


@pytest.mark.parametrize("command", RESULT, indirect=True)
def test_a_picture_of_ones_own(command: Command, work: list[str]) -> None:
    """Where the results are not, the other files aren't an earlier run's."""
    name = {"demo": "plan.npz", "tune": "tune.png", "sweep": "summary.json"}[command.name]
    Path("folder").mkdir()
    Path("folder", name).write_bytes(b"mine")
    command.refused("folder", why=f"{name} exists")
    assert not work and Path("folder", name).read_bytes() == b"mine"
    Path("folder", name).unlink()
    os.mkfifo(f"folder/{name}")
    for more in ([], ["--overwrite"]):
        command.refused("folder", *more, why="is a device, a pipe or the like")
    assert not work


@pytest.mark.parametrize("command", ["demo"], indirect=True)
def test_what_was_changed_in_a_demo_is_kept(command: Command, work: list[str]) -> None:
    """A plan that somebody has improved under its name."""
    command.done("folder")
    Path("folder/demo.gif").unlink()
    Path("folder/plan.npz").write_bytes(b"better")
    work.clear()
    command.refused("folder", why="plan.npz exists, and is of another kind or run (plan.npz)")
    assert not work and Path("folder/plan.npz").read_bytes() == b"better"
    command.done("folder", "--overwrite")
    command.done("folder")


@writes_a_folder
def test_a_full_disk_keeps_the_old_files(command: Command, monkeypatch: Any, request: Any) -> None:
    command.done("folder")
    before = {path.name: path.read_bytes() for path in Path("folder").iterdir()}
    request.getfixturevalue("full_disk")
    more = {"collect": ["--episodes", "2"], "train": ["--resume", "--steps", "8"]}
    code, _, err = command("folder", *more.get(command.name, ["--overwrite"]))
    assert code in (1, 2) and "can't be written: No space left on device" in err, err
    assert before == {path.name: path.read_bytes() for path in Path("folder").iterdir()}


# ---- Python


def some_effects(material: Path) -> Any:
    from tsad.planners import Effects

    path = material / "effects.npz"
    if not path.exists():
        command = FILES["measure"].replace("recorded", f"{material}/recorded")
        assert cli.main(command.replace("OUT", str(path)).split()) == 0
    return Effects.load(path)


SAVES: dict[str, Any] = {
    "plan": lambda m, path, **o: tsad.Plan.load(m / "plan.npz").save(path, **o),
    "effects": lambda m, path, **o: some_effects(m).save(path, **o),
    "picture": lambda m, path, **o: save_plan(tsad.Plan.load(m / "plan.npz"), path, **o),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_saving_is_as_numpys_but_whole(save: Any, material: Path, tmp_path: Path) -> None:
    """A file is replaced, as np.savez does, unless that is not wanted; a link is followed."""
    out, link = tmp_path / "out.png", tmp_path / "link.png"
    link.symlink_to(out)
    save(material, link)
    content = out.read_bytes()
    out.write_bytes(b"old")
    with pytest.raises(FileExistsError, match="overwrite=True in Python"):
        save(material, link, overwrite=False)
    assert out.read_bytes() == b"old"
    save(material, str(out))
    assert len(out.read_bytes()) == len(content) and link.is_symlink()
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null", tmp_path, tmp_path / "no" / "x.png"):
        with pytest.raises(OSError, match="is a device|is a folder|does not exist; make it"):
            save(material, path)
    assert sorted(os.listdir(tmp_path)) == ["link.png", "out.png", "pipe"]


def test_a_policy_is_replaced_as_a_whole(tmp_path: Path, full_disk_at: list[str]) -> None:
    """New weights never lie under an old configuration."""
    from test_load import a_folder

    folder = a_folder(tmp_path / "policy")
    config, tensors, _ = tsad.checkpoint.read_folder(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    full_disk_at.append("config.json")
    doubled = {name: 2 * value for name, value in tensors.items()}
    with pytest.raises(OSError, match="config.json' can't be written: No space left"):
        tsad.checkpoint.write_folder(folder, config, doubled, dtype="float32")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
