"""Files that are written: whole or not at all, through links, and over nothing that has to stay.

Every writer of this package uses these functions. A file is written beside its place, under a name
of its own, and then put there: readers see the old one or the new one, and a full disk or Ctrl-C
leaves the old one. Symbolic links are followed, also to a file that is not there yet, and what is
replaced hands on its permissions. (Another hard link to it keeps the old content.) Devices, pipes,
sockets and folders are refused, and so is a read-only file, though its folder could be changed,
and everything among the bundled policies.

Commands call `output_file` or `output_folder` before any work: hours of it shall not end in a
refusal. All errors are ``OSError``, with a message that says what is in the way and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

Content = bytes | Callable[[IO[bytes]], object]

_MOST_LINKS = 40
_BUNDLED = Path(__file__).resolve().parent / "assets"


def path_text(value: object, name: str = "path") -> str:
    """The text of a path; TypeError naming the argument. A number would be a file descriptor."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name}: expected a path, as str or Path, got {value!r}")
    return os.fsdecode(value)


def output_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The file to write for ``path``, links followed, after checking that it can be written.

    Changes nothing. Refuses a file that is there (``FileExistsError``, without ``overwrite``), a
    folder that is missing or none, what is not a file, a name too long, no permission.
    """
    text = path_text(path)
    target = _target(text, overwrite)
    with named(text), _beside(target):
        return target


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder to write into, links followed, after checking that it is one or can be made.

    It is not made: `make_folder` does that.
    """
    text = path_text(path)
    if not text:
        raise FileNotFoundError("got '', expected the name of a folder")
    with named(text):
        folder = there = Path(os.path.realpath(text))
        _check_not_bundled(text, folder)
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            what = "is a file" if there.is_file() else "is no folder"
            where = repr(text) if there == folder else f"{text!r} can't be made: {str(there)!r}"
            raise NotADirectoryError(f"{where} {what}, expected a folder; name another")
        with contextlib.suppress(FileNotFoundError):
            os.stat(folder)  # too long as a whole
        longest = os.pathconf(there, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in folder.parts):
            raise OSError(f"{text!r} has a name of more than {longest} bytes; shorten it")
        with _beside(there / "file"):
            return folder


def is_temporary(file: Path) -> bool:
    """Whether a file is one that is being written, or was when its process was killed."""
    return file.name.startswith(".tsad-") and file.name.endswith(".tmp")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """`output_folder`, and afterwards it is there, with the folders that it is in."""
    folder = output_folder(path)
    with named(os.fspath(path)):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(
    path: str | os.PathLike[str], content: Content, *, overwrite: bool = True
) -> None:
    """Write a file, whole or not at all.

    ``content`` is bytes, or a function that writes them to a binary stream. What `output_file`
    refuses is refused; without ``overwrite``, so is a file that appears in the meantime.
    """
    text = path_text(path)
    target = _target(text, overwrite)
    with named(text), _beside(target, content) as temporary:
        if overwrite:
            os.replace(temporary, target)
            return
        try:
            os.link(temporary, target)  # which replaces nothing
        except OSError:  # it is there, or this file system has no such links
            if os.path.lexists(target):
                raise _exists(text, target) from None
            os.replace(temporary, target)


def write_together(contents: Mapping[Path, Content]) -> None:
    """Write files that belong together: all are on disk before the first takes its place."""
    with contextlib.ExitStack() as stack:
        ready = []
        for path, content in contents.items():
            target = _target(os.fspath(path), True)
            with named(os.fspath(path)):
                ready.append((stack.enter_context(_beside(target, content)), target))
        for temporary, target in ready:
            with named(str(target)):
                os.replace(temporary, target)


def write_result(path: str | os.PathLike[str], content: Content, *, overwrite: bool) -> None:
    """`write_atomically` of what took long.

    A file that has appeared since `output_file` stays, and so does the result: it goes beside it,
    and the ``FileExistsError`` says where.
    """
    try:
        write_atomically(path, content, overwrite=overwrite)
        return
    except FileExistsError:
        pass
    for number in itertools.count(2):
        other = Path(path).with_stem(f"{Path(path).stem}-{number}")
        with contextlib.suppress(FileExistsError):
            write_atomically(other, content, overwrite=False)
            break
    raise FileExistsError(
        f"{os.fspath(path)!r} has appeared meanwhile and stays; the result is in {str(other)!r}"
    )


def write_json(path: str | os.PathLike[str], value: Any, *, overwrite: bool = True) -> None:
    """`write_atomically` of JSON for people and machines."""
    content = (json.dumps(value, indent=1) + "\n").encode()
    write_atomically(path, content, overwrite=overwrite)


def user_folder(variable: str, default: str) -> Path:
    """A folder of this user's, there or not: TSAD_HOME, or ``tsad`` in the one that the XDG
    standard's ``variable`` names, or in ``default`` of the home folder."""
    own, named = os.environ.get("TSAD_HOME"), os.environ.get(variable, "")
    if own:
        return Path(own).absolute()
    if os.path.isabs(named):  # else to be ignored, says the standard
        return Path(named, "tsad")
    return Path("/", os.path.expanduser("~"), default, "tsad")


def sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:  # hashlib.file_digest is of Python 3.11
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Lock:
    """One writer at a time: ``<path>.lock``, held from here until `release` or the end of a with.

    The system frees it when a process ends, however it ends; a file that is left says nothing.
    Waits ``wait`` seconds for another, then raises ``BlockingIOError``, which names the file and
    the process.
    """

    def __init__(self, path: Path, *, wait: float = 0.0) -> None:
        self._path = path.with_name(path.name + ".lock")
        self._file: Any = None
        try:
            import fcntl
        except ModuleNotFoundError:  # not a POSIX system: nothing guards there
            return
        end = time.monotonic() + wait
        while True:
            with named(os.fspath(path)):
                file = self._path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "unknown"
                file.close()
                if time.monotonic() < end:
                    time.sleep(0.02)
                    continue
                raise BlockingIOError(
                    f"{path} is being written by another run, process {holder}; fix: wait for it, "
                    "or name another file"
                ) from None
            # Whoever held it before may have removed the file between the two lines above.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                    break
            file.close()
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others in; once more does nothing."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # while it is still held: nobody else's can go
            self._file.close()
            self._file = None

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


# ---- where it goes, and how


def _target(text: str, overwrite: bool) -> Path:
    """The file that a path leads to, there or not, checked."""
    if text in ("", "-"):
        hint = "; standard output takes what --json prints" if text else ""
        raise IsADirectoryError(f"got {text!r}, expected the name of a file{hint}")
    if os.path.basename(text) in ("", ".", ".."):
        raise IsADirectoryError(f"{text!r} is a folder, expected the name of a file")
    with named(text):
        target = _followed(text)
        _check_not_bundled(text, target)
        try:
            mode = os.stat(target).st_mode
        except FileNotFoundError:
            return target
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{text!r} is a folder, expected the name of a file")
        if not stat.S_ISREG(mode):
            raise _odd(text)
        if not overwrite:
            raise _exists(text, target)
        with open(target, "r+b"):  # read-only ones could be replaced, but are not meant to be
            return target


def _followed(text: str) -> Path:
    """The real folder and the name that a path leads to, through symbolic links."""
    path = Path(text)
    for _ in range(_MOST_LINKS):
        _check_folder(path.parent)
        folder = os.path.realpath(path.parent)
        # Links there lead to streams of this process: /dev/stdout. But /dev/shm is a folder.
        if folder == "/dev" or folder.startswith(("/proc/", "/sys/")):
            raise _odd(text)
        path = Path(folder, path.name)
        if not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise OSError(f"{text!r} is a link that leads in a circle; name another file")


def _check_folder(folder: Path) -> None:
    """Says what is wrong with a folder that something is to be in."""
    for part in (*reversed(folder.parents), folder):
        if part.is_dir():
            continue
        if part.is_symlink():
            raise NotADirectoryError(
                f"{str(part)!r} is a link to {os.readlink(part)!r}, where no folder is; make it"
            )
        if os.path.lexists(part):
            raise NotADirectoryError(f"{str(part)!r} is a file, expected a folder; name another")
        raise FileNotFoundError(f"the folder {str(folder)!r} does not exist; make it")


def is_bundled(path: Path) -> bool:
    """Whether a path is among the policies that come with the package."""
    return Path(os.path.realpath(path)).is_relative_to(_BUNDLED)


def _check_not_bundled(text: str, target: Path) -> None:
    if is_bundled(target):
        raise PermissionError(
            f"{text!r} is of a policy that comes with tsad, which stays as it is; copy its folder"
        )


def _odd(text: str) -> OSError:
    return OSError(f"{text!r} is a device, a pipe or the like, expected a file; name another")


def _exists(text: str, target: Path) -> FileExistsError:
    through = "" if str(target) == os.path.abspath(text) else f" (a link to {str(target)!r})"
    return FileExistsError(
        f"{text!r} exists{through}; --overwrite (overwrite=True in Python) replaces it"
    )


@contextlib.contextmanager
def _beside(target: Path, content: Content = b"") -> Iterator[Path]:
    """A file in the target's folder with its permissions; gone afterwards, if it still is there."""
    # not the target's name and more: that might be too long
    temporary = target.with_name(f".tsad-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileNotFoundError):
            old = os.stat(target)
            with contextlib.suppress(PermissionError):  # another's, where all may write
                os.chown(temporary, old.st_uid, old.st_gid)
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def named(text: str) -> Iterator[None]:
    """Errors of the system inside say what was to be written; those of this module do already."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        said = type(error)(f"{text!r} can't be written: {os.strerror(error.errno)}")
        said.errno = error.errno
        raise said from error
