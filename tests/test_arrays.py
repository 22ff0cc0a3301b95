"""npz and npy files that lie, inflate or are broken: a ValueError, and little memory."""

from __future__ import annotations

import functools
import io
import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tsad import Plan
from tsad.arrays import read_any_json, read_npy, read_npz
from tsad.planners.effects import Effects
from tsad.planners.files import import_plan
from tsad.sim import recording
from tsad.sim.demonstrations import Record
from tsad.sim.results import ResultsError, read_results
from tsad.training.data import load_demonstrations


def npy(array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def headed(shape: Any, dtype: str, content: bytes = b"", version: Any = (1, 0)) -> bytes:
    """An npy file whose header says anything."""
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    write = np.lib.format.write_array_header_1_0 if version == (1, 0) else None
    (write or np.lib.format.write_array_header_2_0)(buffer, header)
    return buffer.getvalue() + content


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as made:
        for name, content in members.items():
            made.writestr(name, content)
    return path


def test_what_numpy_writes(tmp_path: Path) -> None:
    arrays = {
        "matrix": np.arange(6.0).reshape(2, 3),
        "transposed": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "swapped": np.arange(3, dtype=">f4"),
        "text": np.array(json.dumps({"a": 1})),
        "empty": np.zeros((0, 5), np.uint8),
        "number": np.array(3),
        "record": np.zeros(2, [("a", "f4", (2,)), ("b", "i8")]),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
        some = read_npz(tmp_path / "x.npz", ("number",))
        assert some["number"] == 3 and list(some) == list(arrays) and some["matrix"].size == 0
    for array in arrays.values():
        np.save(tmp_path / "x.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / "x.npy"), array)


OBJECTS = npy(np.array([{}], object), allow_pickle=True)
BROKEN_ARRAYS = {
    "objects": OBJECTS,
    "a terabyte": headed((2**40,), "<f4", b"\0" * 64),
    "more than it has": headed((17,), "<f4", b"\0" * 64),
    "less than it has": headed((15,), "<f4", b"\0" * 64),
    "no bytes at all": headed((2**60,), "<U0"),
    "negative": headed((-1, -16), "<f4", b"\0" * 64),
    "overflowing": headed((2**32, 2**32, 0), "|V0"),
    "true": headed((True,), "<f4", b"\0" * 4),
    "second version": headed((2**40,), "<f4", version=(2, 0)),
    "third version": npy(np.zeros(1))[:6] + b"\x03" + npy(np.zeros(1))[7:],
    "no header": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    "zeros in the header": b"\x93NUMPY\x01\x00\x10\x00" + b"\0" * 16,
    "deep header": b"\x93NUMPY\x01\x00\x00\x20" + b"[" * 0x2000,
    "signs": b"\x93NUMPY\x01\x00\x00\x20" + b"-" * 0x1FFF + b"1",
    "cut": npy(np.zeros(100))[:500],
    "empty": b"",
    "a pickle": b"\x80\x04N.",
}


@pytest.mark.parametrize("name", BROKEN_ARRAYS)
def test_broken_arrays(tmp_path: Path, name: str) -> None:
    content = BROKEN_ARRAYS[name]
    (tmp_path / "x.npy").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_npy(tmp_path / "x.npy")
        for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            path = archive(tmp_path / "x.npz", {"obs.npy": content}, compression)
            with pytest.raises(ValueError):
                read_npz(path)
            assert list(read_npz(path, ())) == ["obs"]  # and does not matter if it is not read
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def bomb(path: Path) -> Path:
    """More than a gigabyte of zeros in a few megabytes."""
    size = 1025 << 20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as made:
        with made.open("a.npy", "w") as member:
            member.write(headed((size,), "|u1"))
            for _ in range(size >> 20):
                member.write(bytes(1 << 20))
    assert path.stat().st_size < 10 << 20
    return path


def overlapping(path: Path) -> Path:
    """A directory that lists one block of bytes many times."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("0.npy", npy(np.zeros(10_000)))
        first = made.filelist[0]
        for i in range(1, 100):
            info = zipfile.ZipInfo(f"{i}.npy")
            info.file_size = info.compress_size = first.file_size
            info.CRC, info.header_offset = first.CRC, first.header_offset
            made.filelist.append(info)
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize("make", [pytest.param(bomb, marks=pytest.mark.slow), overlapping])
def test_archives_that_inflate(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "x.npz")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="its parts claim"):
            read_npz(path)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_broken_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    good = archive(path, {"a.npy": npy(np.zeros(3))}).read_bytes()
    with zipfile.ZipFile(path, "a") as made:
        made.writestr("a.npy", npy(np.ones(3)))
    with pytest.raises(ValueError, match=r"a\.npy: expected once, got twice"):
        read_npz(path)
    for content in (b"", b"PK", good[:100], good[:-30], good.replace(b"\x93NUMPY", b"\x92NUMPY")):
        path.write_bytes(content)
        with pytest.raises(ValueError):
            read_npz(path)
    encrypted = bytearray(good)
    encrypted[good.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(encrypted)
    with pytest.raises(ValueError, match="password"):
        read_npz(path)
    method = bytearray(good)
    method[good.rindex(b"PK\x01\x02") + 10] = 77
    path.write_bytes(method)
    with pytest.raises(ValueError, match="method"):
        read_npz(path)
    for read in (read_npz, read_npy, read_any_json):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nowhere")
        with pytest.raises(IsADirectoryError):
            read(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        np.array([0x110000, 0x30], "<u4").view("<U2").reshape(()),
        np.array("[" * 100_000),
        np.array("[]"),
        np.array(["{}"]),
        np.array(b"{}"),
        np.array(3),
    ],
    ids=["no code point", "deep", "list", "dimension", "bytes", "number"],
)
def test_headers(tmp_path: Path, header: Any) -> None:
    """Of the first, str() makes a string that Python itself fails on later."""
    for dtype in (header.dtype, header.dtype.newbyteorder()):
        np.savez(tmp_path / "x.npz", header=header.astype(dtype), sources=np.zeros((2, 3), int))
        for load in (Plan.load, Effects.load):
            with pytest.raises(ValueError, match=r"x\.npz: not a"):
                load(tmp_path / "x.npz")


@pytest.mark.parametrize("key", ["blocks", "types"])
def test_names_in_plans_are_lists(tmp_path: Path, key: str) -> None:
    Plan(np.zeros((2, 3), int)).save(tmp_path / "x.npz")
    arrays = dict(np.load(tmp_path / "x.npz"))
    header = json.loads(str(arrays["header"])) | {key: "abc"}
    np.savez(tmp_path / "x.npz", **arrays | {"header": np.array(json.dumps(header))})
    with pytest.raises(ValueError, match=rf"x\.npz: not a plan: {key}: expected 3 strings"):
        Plan.load(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("skip", np.zeros((4, 3, 1))),
        ("skip", np.zeros((0, 3))),
        ("skip", np.zeros((4, 3), int)),
        ("pair", np.zeros((3, 4))),
        ("segment", np.zeros((3, 4, 4))),
        ("kind", np.zeros((3, 4, 4))),
        ("outputs", np.array("text")),
        ("rollout", np.zeros((2, 4, 2))),
    ],
)
def test_tables_of_effects_fit_each_other(tmp_path: Path, name: str, value: Any) -> None:
    shapes = {"pair": (3, 4, 4), "segment": (3, 4, 5), "kind": (4, 3, 3), "skip": (4, 3)}
    shapes |= {"rollout": (2, 4, 3), "alike": (3, 4, 4), "changes": (3,), "first_layer": (4, 4)}
    tables = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    tables |= {"inputs": np.zeros(4), "outputs": np.zeros(4)}
    Effects(**tables, metadata={}).save(tmp_path / "x.npz")
    assert Effects.load(tmp_path / "x.npz").rollout.shape == (2, 4, 3)
    Effects(**tables | {name: value}, metadata={}).save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=rf"x\.npz: not a file of effects: {name}: "):
        Effects.load(tmp_path / "x.npz")


def test_every_reader_names_the_broken_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", {"header.npy": BROKEN_ARRAYS["zeros in the header"]})
    (tmp_path / "collection.json").write_text(
        '{"format": "tsad-collection", "format_version": 2, "settings": {}}'
    )
    episode = archive(tmp_path / "episode-00000.npz", {"obs.npy": BROKEN_ARRAYS["signs"]})
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    policy = SimpleNamespace(num_inference_steps=4, blocks=["a"])
    resume = functools.partial(Record, settings={"first_seed": 0}, resume=True)
    readers: dict[Path, Any] = {
        path: (Plan.load, Effects.load, load_demonstrations, resume),
        episode: (lambda p: recording.read_collection(p.parent),),
        deep: (read_results, functools.partial(import_plan, policy)),
    }
    for file, functions in readers.items():
        for function in functions:
            with pytest.raises(ValueError, match=file.name):
                function(file)


@pytest.mark.parametrize(
    ("obs", "says"),
    [
        (np.zeros((2, 3), np.float32), r"shape \(2, 3\)"),
        (np.full((2, 1, 3), np.nan, np.float32), "finite"),
        (np.array([[["a"]]]), "<U1"),
        (np.zeros((0, 1, 3), np.float32), r"shape \(0, 1, 3\)"),
    ],
)
def test_recorded_observations_are_checked(tmp_path: Path, obs: Any, says: str) -> None:
    folder = tmp_path / "recorded"
    recording.open_collection(folder, {})
    recording.save_episode(folder, 3, obs, np.zeros((2, 1, 1), np.float32))
    with pytest.raises(ResultsError, match=f"episode-00003.npz: obs: .*{says}"):
        recording.read_collection(folder)
    (folder / "episode-later.npz").write_bytes(b"")  # another's name
    (folder / "episode-00003.npz").unlink()
    with pytest.raises(ResultsError, match="no episodes"):
        recording.read_collection(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": None}, "not a results file"),
        ({"episodes": None}, "episodes: expected a list"),
        ({"episodes": [3]}, "not an episode"),
        ({"episodes": [{"seed": 1}]}, "not an episode"),
        ({"score": "0.5"}, r"not an episode \(its score\)"),
        ({"success": 1}, r"not an episode \(its success\)"),
        ({"seed": 10**400}, r"not an episode \(its seed\)"),
        ({"steps": True}, r"not an episode \(its steps\)"),
    ],
)
def test_results_are_checked(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    row: dict[str, Any] = {"seed": 1, "score": 0.5, "success": False, "steps": 8, "chunks": 1}
    row |= {"chunk_ms_mean": 1.0, "chunk_ms_max": 2.0}
    document: dict[str, Any] = {"format": "tsad-eval", "format_version": 1, "settings": {}}
    document["episodes"] = [row]
    path = tmp_path / "r.json"
    path.write_text(json.dumps(document))
    assert len(read_results(path)[1]) == 1
    row.update({key: value for key, value in change.items() if key in row})
    document.update({key: value for key, value in change.items() if key not in row})
    path.write_text(json.dumps(document))
    with pytest.raises(ResultsError, match=rf"r\.json.*: {says}|r\.json: {says}"):
        read_results(path)
