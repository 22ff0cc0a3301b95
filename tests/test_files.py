"""Files that are written: what is refused before any work, and what is left after a failure."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tsad import files

NOBODY = 65534


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may look into, unlike tmp_path."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """As somebody whom permissions hold."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is refused


def make_odd_things() -> None:
    Path("file").write_bytes(b"old")
    Path("folder").mkdir()
    for link, to in (("link", "file"), ("ring", "ring2"), ("ring2", "ring"), ("lost", "gone")):
        os.symlink(to, link)
    os.symlink("/dev/null", "to-null")
    os.mkfifo("pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind("socket")
    server.close()


FILES: list[tuple[str, type[OSError], str]] = [
    ("", IsADirectoryError, "expected the name of a file"),
    ("-", IsADirectoryError, "standard output takes what --json prints"),
    ("file", FileExistsError, "'file' exists; --overwrite"),
    ("link", FileExistsError, r"'link' exists \(a link to .*file'\); --overwrite"),
    ("file/x.json", NotADirectoryError, "'file' is a file, expected a folder"),
    ("file/a/x.json", NotADirectoryError, "'file' is a file, expected a folder"),
    ("link/x.json", NotADirectoryError, "'link' is a .*folder"),
    ("gone/x.json", FileNotFoundError, "folder 'gone' does not exist; make it"),
    ("gone/more/x.json", FileNotFoundError, "folder 'gone/more' does not exist; make it"),
    ("lost/x.json", NotADirectoryError, "'lost' is a link to 'gone', where no folder is"),
    ("ring", OSError, "'ring' is a link that leads in a circle"),
    ("ring/x.json", NotADirectoryError, "'ring' is a link to"),
    ("folder", IsADirectoryError, "'folder' is a folder, expected the name of a file"),
    ("folder/", IsADirectoryError, "'folder/' is a folder"),
    ("new/", IsADirectoryError, "'new/' is a folder"),
    ("file/.", IsADirectoryError, "is a folder"),
    (".", IsADirectoryError, "is a folder"),
    ("..", IsADirectoryError, "is a folder"),
    ("pipe", OSError, "'pipe' is a device, a pipe or the like"),
    ("socket", OSError, "'socket' is a device, a pipe or the like"),
    ("/dev/null", OSError, "'/dev/null' is a device"),
    ("/dev/stdout", OSError, "'/dev/stdout' is a device"),
    ("/dev/fd/1", OSError, "'/dev/fd/1' is a device"),
    ("/proc/self/fd/1", OSError, "is a device"),
    ("to-null", OSError, "'to-null' is a device"),
    ("x" * 256, OSError, "File name too long"),
    ("a/" * 3000 + "x", OSError, "does not exist|File name too long"),
]


@pytest.mark.parametrize("path, kind, message", FILES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("overwrite", [False, True])
def test_no_place_for_a_file(
    here: Path, path: str, kind: type[OSError], message: str, overwrite: bool
) -> None:
    make_odd_things()
    before = sorted(os.listdir())
    if overwrite and kind is FileExistsError:
        target = files.output_file(path, overwrite=True)
        assert target == here / "file" and target.read_bytes() == b"old"
        return
    for refuse in (files.output_file, lambda p, **kw: files.write_atomically(p, b"new", **kw)):
        with pytest.raises(kind, match=message):
            refuse(path, overwrite=overwrite)
    assert sorted(os.listdir()) == before and Path("file").read_bytes() == b"old"


FOLDERS: list[tuple[str, str]] = [
    ("", "expected the name of a folder"),
    ("file", "'file' is a file, expected a folder"),
    ("link", "'link' is a file, expected a folder"),
    ("file/x", "'file/x' can't be made: .*file' is a file"),
    ("file/x/y", "'file/x/y' can't be made: .*file' is a file"),
    ("ring", "'ring' is no folder"),
    ("pipe", "'pipe' is no folder"),
    ("/dev/null", "'/dev/null' is no folder"),
    ("x" * 256, "File name too long|more than 255 bytes"),
    ("new/" + "ü" * 128, "more than 255 bytes"),
    ("a/" * 3000, "File name too long"),
]


@pytest.mark.parametrize("path, message", FOLDERS, ids=lambda v: str(v)[:20])
def test_no_place_for_a_folder(path: str, message: str) -> None:
    make_odd_things()
    before = sorted(os.listdir())
    for refuse in (files.output_folder, files.make_folder):
        with pytest.raises(OSError, match=message):
            refuse(path)
    assert sorted(os.listdir()) == before


def test_folders_that_can_be_made(here: Path) -> None:
    os.symlink("far/away", "link")
    Path("there").mkdir()
    for path, real in (("a/b/c", "a/b/c"), ("link", "far/away"), ("there", "there"), (".", ".")):
        assert files.output_folder(path) == here / real
    assert sorted(os.listdir()) == ["link", "there"]
    assert files.make_folder("link").is_dir() and files.make_folder("a/b/c").is_dir()
    assert (here / "far" / "away").is_dir() and os.path.islink("link")


def test_no_permission(open_folder: Path) -> None:
    (open_folder / "file").write_bytes(b"old")
    (open_folder / "closed").mkdir(mode=0o700)
    wide = open_folder / "wide"
    wide.mkdir()
    wide.chmod(0o777)
    (wide / "kept").write_bytes(b"old")
    (wide / "kept").chmod(0o444)
    os.chmod(open_folder, 0o555)
    if not os.geteuid():
        os.chown(open_folder / "file", NOBODY, NOBODY)
        os.chown(wide / "kept", NOBODY, NOBODY)
    try:
        with without_rights():
            for path in ("new", "file", "wide/kept"):  # the last could be replaced: don't
                for refuse in (files.output_file, lambda p, **_: files.write_atomically(p, b"x")):
                    with pytest.raises(PermissionError, match=f"{path}' can't be written"):
                        refuse(open_folder / path, overwrite=True)
            with pytest.raises(PermissionError, match="new' can't be written: Permission denied"):
                files.output_folder(open_folder / "new")
            files.write_atomically(wide / "mine", b"new")  # where it is allowed, it works
    finally:
        os.chmod(open_folder, 0o755)
    assert (open_folder / "file").read_bytes() == b"old"
    assert listing(wide) == {"kept": b"old", "mine": b"new"}
    assert sorted(p.name for p in open_folder.iterdir()) == ["closed", "file", "wide"]


# ---- what is written


@pytest.mark.parametrize(
    "content", [b"new", lambda stream: stream.write(b"new")], ids=["bytes", "function"]
)
def test_links_are_followed(here: Path, content: files.Content) -> None:
    Path("far").mkdir()
    Path("far/file").write_bytes(b"old")
    os.symlink("far/file", "one")
    os.symlink(here / "one", "two")
    os.symlink("../far/later", "far/chain")
    os.symlink("far/chain", "three")
    os.symlink("far", "folder")
    for path, target in (("two", "file"), ("three", "later"), ("folder/x", "x")):
        files.write_atomically(path, content)
        assert Path("far", target).read_bytes() == b"new" and not Path("far", target).is_symlink()
    assert all(os.path.islink(link) for link in ("one", "two", "three", "folder", "far/chain"))
    assert sorted(os.listdir("far")) == ["chain", "file", "later", "x"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_replaced_file_keeps_its_permissions(mode: int) -> None:
    files.write_atomically("file", b"old")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat("file").st_mode) == 0o666 & ~umask
    os.chmod("file", mode)
    files.write_atomically("file", b"new")
    assert stat.S_IMODE(os.stat("file").st_mode) == mode
    assert Path("file").read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root writes into others' files")
def test_a_replaced_file_keeps_its_owner() -> None:
    files.write_atomically("file", b"old")
    os.chown("file", NOBODY, NOBODY)
    files.write_atomically("file", b"new")
    assert (os.stat("file").st_uid, os.stat("file").st_gid) == (NOBODY, NOBODY)


def test_the_longest_name() -> None:
    files.write_atomically("x" * 255, b"new")
    assert os.listdir() == ["x" * 255]


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_nothing_is_overwritten_unasked(links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "this file system has none")

    if not links:
        monkeypatch.setattr(os, "link", no_link)

    def appears(stream: IO[bytes]) -> None:
        Path("late").write_bytes(b"another's")
        stream.write(b"mine")

    files.write_atomically("file", b"old", overwrite=False)
    with pytest.raises(FileExistsError, match="'file' exists"):
        files.write_atomically("file", b"new", overwrite=False)
    with pytest.raises(FileExistsError, match="'late' exists"):
        files.write_atomically("late", appears, overwrite=False)
    assert listing(Path()) == {"file": b"old", "late": b"another's"}


def test_a_result_is_not_lost() -> None:
    for name in ("plan.npz", "plan-2.npz"):
        Path(name).write_bytes(b"another's")
    with pytest.raises(FileExistsError, match=r"'plan.npz' has appeared .* 'plan-3.npz'"):
        files.write_result("plan.npz", b"mine", overwrite=False)
    assert Path("plan-3.npz").read_bytes() == b"mine"
    assert Path("plan.npz").read_bytes() == Path("plan-2.npz").read_bytes() == b"another's"
    files.write_result("plan.npz", b"mine", overwrite=True)
    assert Path("plan.npz").read_bytes() == b"mine" and len(os.listdir()) == 3


# ---- failures


def fill(stream: IO[bytes]) -> None:
    for _ in range(64):
        stream.write(bytes(65536))


WRITE: list[Callable[[Path], Any]] = [
    lambda path: files.write_atomically(path, bytes(4 << 20)),
    lambda path: files.write_atomically(path, fill),
    lambda path: files.write_together({path.with_name("other"): b"new", path: fill}),
    lambda path: files.write_result(path, fill, overwrite=True),
    lambda path: files.write_json(path, ["x" * (4 << 20)]),
]


def check_that_a_full_disk_keeps(folder: Path, write: Callable[[Path], Any]) -> None:
    """The old files stay, nothing else is there, and the message names the file."""
    path = folder / "file"
    for name in ("file", "other"):
        (folder / name).write_bytes(b"old")
    with pytest.raises(OSError, match="file' can't be written: (No space|File too large)") as told:
        write(path)
    assert told.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert listing(folder) == {"file": b"old", "other": b"old"}


@pytest.mark.parametrize("write", WRITE)
def test_a_file_that_becomes_too_large(here: Path, write: Callable[[Path], Any]) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # Python ignores SIGXFSZ
    try:
        check_that_a_full_disk_keeps(here, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("write", WRITE)
def test_a_full_disk(small_disk: Path, write: Callable[[Path], Any]) -> None:
    check_that_a_full_disk_keeps(small_disk, write)


def test_a_disk_that_is_read_only(small_disk: Path) -> None:
    (small_disk / "file").write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("file", "new"):
        with pytest.raises(OSError, match=f"{name}' can't be written: Read-only file system"):
            files.output_file(small_disk / name, overwrite=True)
    with pytest.raises(OSError, match="new' can't be written: Read-only file system"):
        files.output_folder(small_disk / "new")
    assert listing(small_disk) == {"file": b"old"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError, MemoryError])
def test_whatever_stops_a_write(here: Path, failure: type[BaseException]) -> None:
    def stop(stream: IO[bytes]) -> None:
        stream.write(b"half")
        raise failure

    for name in ("file", "other"):
        files.write_atomically(name, b"old")
    with pytest.raises(failure):
        files.write_atomically("file", stop)
    with pytest.raises(failure):
        files.write_together({Path("other"): b"new", Path("file"): stop})
    assert listing(here) == {"file": b"old", "other": b"old"}
