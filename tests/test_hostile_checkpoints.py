"""Checkpoints that want to run something, to exhaust the machine, or that lie about their sizes.

Where Python's own ``pickle.loads`` would run the payload, the test first lets it, on a canary file:
so a payload that has gone stale cannot pass for one that was not run.
"""

from __future__ import annotations

import builtins
import copyreg
import io
import os
import pickle
import struct
import subprocess
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsad import load
from tsad.checkpoint import CheckpointError
from tsad.convert import convert, read_checkpoint
from tsad.convert.torch_file import TensorRef, TorchFile

torch = pytest.importorskip("torch")


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> Any:
        return self.function, self.args


def text(value: str) -> bytes:
    """A string on the stack."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def reduced(protocol: int) -> Callable[[str], bytes]:
    return lambda command: pickle.dumps(Call(os.system, command), protocol)


def chain(command: str) -> bytes:
    """getattr(__import__("os"), "system")(command), with no name but those of builtins."""
    return pickle.dumps(Call(getattr, Call(__import__, "os"), "system"))[:-1] + (
        text(command) + b"\x85R."
    )


EVALUATE = "__import__('os').system({!r})"

# name -> (pickle of a command, whether pickle.loads runs it)
PAYLOADS: dict[str, tuple[Callable[[str], bytes], bool]] = {
    **{f"REDUCE, protocol {p}": (reduced(p), True) for p in range(6)},
    "eval": (lambda c: pickle.dumps(Call(eval, EVALUATE.format(c))), True),
    "exec": (lambda c: pickle.dumps(Call(exec, EVALUATE.format(c))), True),
    "getattr chain": (chain, True),
    "nested in a list of dicts": (lambda c: pickle.dumps([{"a": (1, Call(os.system, c))}]), True),
    "as a dict key": (lambda c: pickle.dumps({Call(os.system, c): 1}), True),
    "before the object": (lambda c: pickle.dumps(Call(os.system, c))[:-1] + b"0}.", True),
    "popped with a mark": (lambda c: b"(" + pickle.dumps(Call(os.system, c))[:-1] + b"1}.", True),
    "GLOBAL": (lambda c: b"cos\nsystem\n" + text(c) + b"\x85R.", True),
    "STACK_GLOBAL": (lambda c: text("os") + text("system") + b"\x93" + text(c) + b"\x85R.", True),
    "INST": (lambda c: b"(" + text(c) + b"ios\nsystem\n.", True),
    "OBJ": (lambda c: b"(cos\nsystem\n" + text(c) + b"o.", True),
    "NEWOBJ": (lambda c: b"csubprocess\nPopen\n" + text(c) + b"\x85\x81.", False),
    "NEWOBJ_EX": (lambda c: b"csubprocess\nPopen\n" + text(c) + b"\x85}\x92.", False),
    "NEWOBJ_EX with keywords": (
        lambda c: b"comegaconf\nDictConfig\n)}" + text("a") + text(c) + b"s\x92.",
        False,
    ),
    "EXT1": (lambda c: b"\x82\xf0" + text(c) + b"\x85R.", True),
    "EXT2": (lambda c: b"\x83\xf0\x00" + text(c) + b"\x85R.", True),
    "EXT4": (lambda c: b"\x84\xf0\x00\x00\x00" + text(c) + b"\x85R.", True),
    "BUILD of a class": (lambda c: b"ccollections\nOrderedDict\n}" + text("a") + b"Nsb.", False),
    "BUILD with __setstate__": (
        # an object whose state is a dict with __setstate__ = os.system, then a state for it
        lambda c: (
            b"ctypes\nSimpleNamespace\n)R}"
            + text("__setstate__")
            + b"cos\nsystem\nsb"
            + text(c)
            + b"b."
        ),
        True,
    ),
    "BUILD of a list": (lambda c: b"]" + text(c) + b"b.", False),
    "PERSID": (lambda c: b"Pos.system\n.", False),
    "BINPERSID": (lambda c: b"cos\nsystem\n" + text(c) + b"\x86Q.", False),
    "storage type that is a function": (
        lambda c: b"(" + text("storage") + b"cos\nsystem\n" + text("0") + text(c) + b"K\x01tQ.",
        False,
    ),
    "subprocess": (lambda c: pickle.dumps(Call(subprocess.getoutput, c)), True),
    "builtins through torch": (
        lambda c: b"ctorch.storage\nos.system\n" + text(c) + b"\x85R.",
        False,
    ),
    "torch.load": (lambda c: b"ctorch\nload\n" + text(c) + b"\x85R.", False),
    "torch.hub": (lambda c: b"ctorch.hub\nload\n" + text(c) + text("x") + b"\x86R.", False),
    "numpy": (lambda c: b"cnumpy\nload\n" + text(c) + b"\x85R.", False),
    "typing": (lambda c: b"ctyping\nget_type_hints\n" + text(c) + b"\x85R.", False),
    "call of a tensor's function": (
        lambda c: b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nN" + text(c) + b"\x85NtR.",
        True,
    ),
    "dill's importer": (lambda c: b"cdill._dill\n_import_module\n" + text("os") + b"\x85R.", False),
    "codecs": (lambda c: b"c_codecs\nencode\n" + text(c) + text("idna") + b"\x86R.", False),
}


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def registered() -> Any:
    """os.system under an extension code, as a library may have registered something."""
    copyreg.add_extension("posix", "system", 0xF0)
    yield
    copyreg.remove_extension("posix", "system", 0xF0)
    copyreg.clear_extension_cache()


@pytest.mark.parametrize("name", PAYLOADS)
def test_hostile_pickles_do_nothing(
    tmp_path: Path, canary: Path, name: str, request: pytest.FixtureRequest
) -> None:
    make, runs = PAYLOADS[name]
    if name.startswith("EXT"):
        request.getfixturevalue("registered")
    content = make(f"touch {canary}")
    if runs:
        try:
            pickle.loads(content)
        except Exception:  # what follows the command does not matter
            pass
        assert canary.exists(), "the payload itself is broken"
        canary.unlink()
    source = checkpoints.with_pickle(tmp_path / "x.ckpt", content)
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "out")
    assert str(source) in str(error.value) and "x.ckpt" in str(error.value)
    assert not canary.exists() and not (tmp_path / "out").exists()


# Their calls show only when they are run: a number of a registry, and a method taken from a state.
QUIET = ("EXT1", "EXT2", "EXT4", "BUILD with __setstate__")


@pytest.mark.parametrize("name", [name for name, (_, runs) in PAYLOADS.items() if runs])
def test_hostile_pickles_beside_good_weights_do_nothing(
    tmp_path: Path, canary: Path, good: bytes, name: str, request: pytest.FixtureRequest
) -> None:
    """torch.load of the same file runs them; here the weights are read, and the call is said."""
    if name.startswith("EXT"):
        request.getfixturevalue("registered")
    source = tmp_path / "x.ckpt"
    source.write_bytes(good)
    evil = PAYLOADS[name][0](f"touch {canary}")
    assert evil.endswith(b".")

    def change(entries: dict[str, bytes]) -> None:
        # made and thrown away before the checkpoint itself is
        entries["x/data.pkl"] = b"(" + evil[:-1] + b"1" + entries["x/data.pkl"]

    checkpoints.rewrite(source, change)
    try:
        torch.load(source, weights_only=False)
    except Exception:  # what follows the command does not matter
        pass
    assert canary.exists(), "the payload itself is broken"
    canary.unlink()
    converted = read_checkpoint(source)
    _, arrays = checkpoints.state_dict(1)
    for tensor, value in converted.tensors.items():
        np.testing.assert_array_equal(value, arrays[f"model.{tensor}"])
    assert not canary.exists()
    assert (name in QUIET) == (converted.notes == [])
    assert all("nothing in it was run" in note for note in converted.notes)


@pytest.mark.parametrize("place", ["cfg", "optimizer", "key", "other"])
def test_hostile_parts_beside_what_is_needed(tmp_path: Path, canary: Path, place: str) -> None:
    value = checkpoints.payload()
    evil = Call(os.system, f"touch {canary}")
    if place == "cfg":
        value["cfg"] = checkpoints.lowdim_config() | {"evil": evil}
    elif place == "optimizer":
        value["state_dicts"]["optimizer"]["evil"] = [evil]
    else:
        value[evil if place == "key" else "other"] = evil
    source = checkpoints.save(tmp_path / "x.ckpt", value)
    summary = convert(source, tmp_path / "out")
    assert len(summary["notes"]) == 1 and "would call posix.system" in summary["notes"][0]
    with pytest.warns(UserWarning, match=r"x\.ckpt: .*posix\.system"):
        load(source)
    assert not canary.exists()


@pytest.mark.parametrize("place", ["cfg", "setting", "state", "weights", "tensor", "normalizer"])
def test_hostile_parts_that_are_needed(tmp_path: Path, canary: Path, place: str) -> None:
    value: Any = checkpoints.payload()
    evil = Call(os.system, f"touch {canary}")
    says = "posix.system"
    ema = value["state_dicts"]["ema_model"]
    if place == "cfg":
        value["cfg"] = evil
    elif place == "setting":
        value["cfg"] = checkpoints.lowdim_config() | {"horizon": evil}
        says = r"cfg\.policy\.horizon: .*posix\.system"
    elif place == "state":
        value["state_dicts"] = evil
    elif place == "weights":
        value["state_dicts"]["ema_model"] = evil
    elif place == "tensor":
        ema["model.head.bias"] = evil
        says = r"model\.head\.bias: .*posix\.system"
    else:
        ema["normalizer.params_dict.obs.scale"] = evil
        says = r"params_dict\.obs\.scale: .*posix\.system"
    source = checkpoints.save(tmp_path / "x.ckpt", value)
    with zipfile.ZipFile(source) as archive:
        assert b"system" in archive.read("x/data.pkl")
    with pytest.raises(CheckpointError, match=says):
        convert(source, tmp_path / "out")
    assert not canary.exists() and not (tmp_path / "out").exists()


def test_nested_pickles_stay_bytes(tmp_path: Path, canary: Path) -> None:
    """``pickles`` holds byte strings that Diffusion Policy unpickles; here nobody does."""
    value = checkpoints.payload()
    value["pickles"]["epoch"] = pickle.dumps(Call(os.system, f"touch {canary}"))
    read_checkpoint(checkpoints.save(tmp_path / "x.ckpt", value))
    assert not canary.exists()


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a name that is allowed: OmegaConf may be absent, and torch is not needed."""
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload())
    real, asked = builtins.__import__, []

    def spy(name: str, *args: Any) -> Any:
        asked.append(name.partition(".")[0])
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", spy)
    read_checkpoint(source)
    monkeypatch.undo()
    assert not {"torch", "omegaconf", "dill", "diffusion_policy", "typing"} & set(asked)


# --- structures that exhaust


def laughs(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value, value]
    return value


def test_shared_and_nested_settings_end_in_time(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep = b"]" * 200_000 + b"a" * 199_999
    cfg = pickle.dumps({"cfg": 0, "state_dicts": {}}, 2)
    contents = [
        pickle.dumps({"cfg": {"a": value}, "state_dicts": {}}, 2)
        for value in (
            laughs(60),
            endless,
            "${a}${a}",
            "${" * 5000 + "}" * 5000,
            "\\" * 10**6 + "${a}",
        )
    ]
    contents.append(cfg.replace(b"K\x00", deep))
    assert contents[-1] != cfg
    for content in contents:
        start = time.monotonic()
        with pytest.raises(CheckpointError):
            read_checkpoint(checkpoints.with_pickle(tmp_path / "x.ckpt", content))
        assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "content",
    [
        b"\x8e" + struct.pack("<Q", 2**60) + b"x",  # BINBYTES8 of an exabyte
        b"\x8d" + struct.pack("<Q", 2**62) + b"x",
        b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",  # LONG4
        b"L" + b"9" * 10_000 + b"L\n.",
        b"Nr\xff\xff\xff\xff.0.",  # LONG_BINPUT far away: allowed, and small
        b"}" + b"\x85" * 100_000 + b"K\x01s.",  # a deep tuple as key
        b"}]K\x01s.",  # a list as key
        b"}}K\x01s.",
        b"R.",
        b"0.",
        b"1.",
        b"a.",
        b"(.",
        b"((o.",
        b"(s.",
        b"N",
        b"",
        b".",
        b"NN.",
        b"h\x05.",
        b"\x80\x63N.",
        b"\xff.",
        b"\x97.",
        b"\x98.",
    ],
)
def test_malformed_pickles(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_checkpoint(checkpoints.with_pickle(tmp_path / "x.ckpt", content))


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes_as_pickle(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(checkpoints.with_pickle(tmp_path / "x.ckpt", content))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x.ckpt"
    return checkpoints.save(path, checkpoints.payload()).read_bytes()


@FUZZ
@given(data=st.data())
def test_damage_in_the_pickle(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    """Changed bytes inside a whole archive, so that the checksums of zip do not hide them."""
    source = tmp_path / "x.ckpt"
    source.write_bytes(good)

    def change(entries: dict[str, bytes]) -> None:
        content = bytearray(entries["x/data.pkl"])
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        entries["x/data.pkl"] = bytes(content)

    checkpoints.rewrite(source, change)
    try:
        converted = read_checkpoint(source)
    except ValueError:
        return
    assert all(np.isfinite(value).all() for value in converted.tensors.values())


@FUZZ
@given(data=st.data())
def test_damage_in_the_archive(tmp_path: Path, good: bytes, data: st.DataObject) -> None:
    content = bytearray(good)
    for _ in range(data.draw(st.integers(0, 3))):
        # mostly in the directory at the end, where zip keeps its sizes and offsets
        place = data.draw(st.integers(len(content) - 3000, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([0, 1, 30, 5000, len(content) // 2]))
    (tmp_path / "x.ckpt").write_bytes(bytes(content[: len(content) - cut]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read_checkpoint(tmp_path / "x.ckpt")
        except ValueError as error:
            assert "x.ckpt" in str(error)


@pytest.mark.parametrize("size", [0, 3, 100, 5000, 50_000])
def test_truncated(tmp_path: Path, good: bytes, size: int) -> None:
    (tmp_path / "x.ckpt").write_bytes(good[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(tmp_path / "x.ckpt")


# --- archives


def test_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    for content in (b"", b"hello", bytes(range(256)) * 50, pickle.dumps({"cfg": 1})):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="a file of torch.save, got something else"):
            read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<a/>")
    with pytest.raises(CheckpointError, match="one data.pkl, got 0"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="found no file"):
        read_checkpoint(tmp_path)


def test_torchscript(tmp_path: Path) -> None:
    checkpoints.with_pickle(tmp_path / "x.pt", b"N.")
    add = {"archive/constants.pkl": b""}
    checkpoints.rewrite(tmp_path / "x.pt", lambda entries: entries.update(add))
    with pytest.raises(CheckpointError, match="TorchScript"):
        read_checkpoint(tmp_path / "x.pt")


def test_compressed_entries(tmp_path: Path) -> None:
    """A zip bomb: 1000 times its size when inflated."""
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N" * 10**7 + b".")
    with pytest.raises(CheckpointError, match="parts claim|uncompressed"):
        read_checkpoint(tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"N.")
    with pytest.raises(CheckpointError, match="uncompressed"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_entries_that_share_their_bytes(tmp_path: Path) -> None:
    """The other zip bomb: a directory that lists one block of bytes many times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/data/0", b"\0" * 4000)
        for i in range(1, 50):
            info = zipfile.ZipInfo(f"a/data/{i}")
            info.file_size = info.compress_size = 4000
            info.CRC = archive.filelist[1].CRC
            info.header_offset = archive.filelist[1].header_offset
            archive.filelist.append(info)
    (tmp_path / "x.ckpt").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError, match="parts claim|uncompressed"):
        TorchFile(tmp_path / "x.ckpt")


def test_names_twice(tmp_path: Path) -> None:
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/data.pkl", b"}.")
    with pytest.raises(CheckpointError, match="a/data.pkl: expected once, got twice"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_paths_in_names_lead_nowhere(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "x.ckpt", checkpoints.payload())

    def add(entries: dict[str, bytes]) -> None:
        entries |= {"../escaped": b"x", "/tmp/tsad_escaped": b"x", "x/data/../../escaped": b"x"}

    before = set(tmp_path.parent.rglob("*"))
    convert(checkpoints.rewrite(source, add), tmp_path / "out")
    made = {
        path.relative_to(tmp_path).parts[0] for path in set(tmp_path.parent.rglob("*")) - before
    }
    assert made == {"out"} and not Path("/tmp/tsad_escaped").exists()


# --- views of storages


class Storage:
    """Pickles as a reference to a storage entry of the archive."""

    def __init__(self, key: str, count: Any, kind: Any = torch.FloatStorage) -> None:
        self.pid = ("storage", kind, key, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, Storage) else None


def view(path: Path, offset: Any, shape: Any, stride: Any, **changes: Any) -> Path:
    """A torch file with one tensor of any description over six float32 numbers 0 to 5."""
    storage = Storage(changes.get("key", "0"), changes.get("count", 6))
    function = torch._utils._rebuild_tensor_v2
    tensor = Call(function, storage, offset, shape, stride, False, OrderedDict())
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": tensor})
    checkpoints.with_pickle(path, buffer.getvalue())
    data = {"archive/data/0": np.arange(6, dtype="<f4").tobytes()} | changes.get("entries", {})
    return checkpoints.rewrite(path, lambda entries: entries.update(data))


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "expected"),
    [
        (0, (6,), (1,), [0, 1, 2, 3, 4, 5]),
        (1, (2, 2), (1, 2), [[1, 3], [2, 4]]),
        (5, (), (), 5),
        (5, (1,), (10**9,), [5]),
        (0, (2, 3), (0, 1), [[0, 1, 2], [0, 1, 2]]),
        (0, (0, 7), (7, 1), []),
    ],
)
def test_views(tmp_path: Path, offset: int, shape: Any, stride: Any, expected: Any) -> None:
    with TorchFile(view(tmp_path / "x", offset, shape, stride)) as file:
        ref = file.value["w"]
        assert isinstance(ref, TensorRef)
        array = file.read(ref, "w")
        assert array.shape == shape and array.ravel().tolist() == np.ravel(expected).tolist()


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "changes"),
    [
        (0, (7,), (1,), {}),
        (1, (6,), (1,), {}),
        (6, (), (), {}),
        (0, (2, 3), (4, 1), {}),
        (-1, (2,), (1,), {}),
        (0, (2,), (-1,), {}),
        (0, (-2,), (1,), {}),
        (0, (2,), (1, 1), {}),
        (0, (2.0,), (1,), {}),
        (True, (2,), (1,), {}),
        (0, (2,) * 40, (0,) * 40, {}),
        (0, (2**40,), (0,), {}),  # one number, shown a million million times
        (0, (3, 3), (1, 1), {}),  # more numbers than the storage has
        (0, (2**62,), (1,), {}),
        (0, (6,), (1,), {"count": 5}),
        (0, (6,), (1,), {"count": 7}),
        (0, (6,), (1,), {"count": 2**60}),
        (0, (6,), (1,), {"count": "6"}),
        (0, (6,), (1,), {"key": "1"}),
        (0, (6,), (1,), {"key": "../data.pkl"}),
        (0, (6,), (1,), {"key": 0}),
        (0, (6,), (1,), {"entries": {"archive/data/0": b"\0" * 23}}),
    ],
)
def test_views_that_lie(
    tmp_path: Path, offset: Any, shape: Any, stride: Any, changes: dict[str, Any]
) -> None:
    path = view(tmp_path / "x", offset, shape, stride, **changes)
    with pytest.raises(CheckpointError) as error, TorchFile(path) as file:
        file.read(file.value["w"], "w")
    assert str(path) in str(error.value)


def test_big_endian_files(tmp_path: Path) -> None:
    numbers = np.array([1.5, -2.25, 3, 4, 5, 6], ">f4").tobytes()
    entries = {"archive/data/0": numbers, "archive/byteorder": b"big"}
    with TorchFile(view(tmp_path / "x", 0, (6,), (1,), entries=entries)) as file:
        assert file.read(file.value["w"], "w").tolist() == [1.5, -2.25, 3, 4, 5, 6]


def test_many_views_of_one_storage_stay_within_the_file(tmp_path: Path) -> None:
    with TorchFile(view(tmp_path / "x", 0, (6,), (1,))) as file:
        with pytest.raises(CheckpointError, match="more data than it has"):
            for i in range(10_000):
                file.read(file.value["w"], str(i))
        assert i < 200
