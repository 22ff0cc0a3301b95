"""The safetensors reader and writer, and tsad folders: round trips, and files that lie."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tsad
from tsad.checkpoint import (
    CheckpointError,
    check_tensors,
    format_json,
    read_folder,
    read_safetensors,
    safetensors_bytes,
    write_folder,
    write_pruner,
    write_safetensors,
)
from tsad.config import PolicyConfig, PrunerConfig

ASSET = Path(__file__).parents[1] / "tsad" / "assets" / "pusht"


def encode(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"b": (3,), "a.weight": (2, 5), "scalar": (), "none": (0, 4), "cube": (2, 3, 4)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


# --- round trips


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_own_round_trip(tmp_path: Path, dtype: str) -> None:
    tensors = some_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors, dtype)
    read = read_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        assert read[name].dtype == np.float32 and read[name].flags.c_contiguous
        np.testing.assert_array_equal(read[name], value.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_safetensors_package_reads_ours(tmp_path: Path, dtype: str) -> None:
    package = pytest.importorskip("safetensors.numpy")
    tensors = some_tensors()
    write_safetensors(tmp_path / "x.safetensors", tensors, dtype)
    read = package.load_file(tmp_path / "x.safetensors")
    assert {name: value.dtype for name, value in read.items()} == dict.fromkeys(tensors, dtype)
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.astype(dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_we_read_the_safetensors_package(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    tensors = {
        name: torch.from_numpy(value).to(getattr(torch, dtype))
        for name, value in some_tensors().items()
    }
    package.save_file(tensors, tmp_path / "x.safetensors", metadata={"any": "thing"})
    read = read_safetensors(tmp_path / "x.safetensors")
    assert set(read) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(read[name], value.float().numpy())


def test_mixed_types_in_one_file(tmp_path: Path) -> None:
    data = np.array([1.5], "<f4").tobytes() + np.array([2.5, 3.5], "<f2").tobytes()
    header = {"half": entry([2], 4, 8, "F16"), "single": entry([1], 0, 4)}
    (tmp_path / "x").write_bytes(encode(header, data))
    read = read_safetensors(tmp_path / "x")
    assert read["half"].tolist() == [2.5, 3.5] and read["single"].tolist() == [1.5]


def test_equal_tensors_give_equal_bytes() -> None:
    tensors = some_tensors()
    other = dict(reversed(tensors.items()))
    assert safetensors_bytes(tensors, "float32") == safetensors_bytes(other, "float32")


def test_the_numbers_are_aligned() -> None:
    for name in ("a", "ab", "abc", "abcd" * 3):
        content = safetensors_bytes({name: np.zeros(1, np.float32)})
        assert int.from_bytes(content[:8], "little") % 8 == 0


# --- what the writer refuses


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_nan_or_inf_is_written(bad: float) -> None:
    with pytest.raises(CheckpointError, match=r"w\.b: expected numbers that are finite"):
        safetensors_bytes({"w.b": np.array([1, bad], np.float32)}, "float32")


def test_too_large_for_float16() -> None:
    tensors = {"w": np.array([1e5], np.float32)}
    with pytest.raises(CheckpointError, match="w: .*float16.*100000.*float32"):
        safetensors_bytes(tensors, "float16")
    safetensors_bytes(tensors, "float32")


def test_unknown_dtype_and_reserved_name() -> None:
    with pytest.raises(ValueError, match="dtype: expected one of float16, float32, got 'int8'"):
        safetensors_bytes({}, "int8")
    with pytest.raises(CheckpointError, match="__metadata__"):
        safetensors_bytes({"__metadata__": np.zeros(1)})


# --- what the reader refuses

F4 = np.array([1, 2], "<f4").tobytes()  # two float32 numbers

LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "seven bytes": (b"\0" * 7, "7 bytes"),
    "no header": (encode(b""), "expected JSON"),
    "huge header": (encode({}, b"", 2**63), "header of at most"),
    "header longer than the file": (encode({}, b"", 3), "header of at most 2 bytes, got 3"),
    "header that eats the data": (encode({"a": entry([1], 0, 4)}, F4, 60), "expected JSON"),
    "no json": (encode(b"{hello"), "expected JSON"),
    "no utf-8": (encode(b'{"\xff": 1}'), "expected JSON"),
    "a list": (encode([]), "JSON object as safetensors header, got list"),
    "deep nesting": (encode(b"[" * 100_000), "expected JSON"),
    "a number of 5000 digits": (encode(b"[" + b"9" * 5000 + b"]"), "expected JSON"),
    "a name twice": (
        encode(
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            F4,
        ),
        "w: expected once",
    ),
    "NaN in the header": (encode(b'{"w": NaN}'), "finite numbers.*NaN"),
    "metadata of numbers": (encode({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry is no object": (encode({"w": 1}), "w: expected an object of dtype"),
    "entry without shape": (encode({"w": {"dtype": "F32", "data_offsets": [0, 0]}}), "w: exp"),
    "entry with more": (encode({"w": entry([], 0, 4) | {"x": 1}}, F4[:4]), "w: expected an ob"),
    "int8": (encode({"w": entry([8], 0, 8, "I8")}, F4), "w: expected a dtype of F16.*'I8'"),
    "dtype is a list": (encode({"w": entry([8], 0, 8, [])}, F4), "w: expected a dtype"),
    "shape is no list": (encode({"w": entry(2, 0, 8)}, F4), "w: expected a shape"),  # type: ignore
    "negative shape": (encode({"w": entry([-1, -2], 0, 8)}, F4), "w: expected a shape"),
    "fractional shape": (encode({"w": entry([2.0], 0, 8)}, F4), "w: expected a shape"),
    "boolean shape": (encode({"w": entry([True, 2], 0, 8)}, F4), "w: expected a shape"),
    "too many dimensions": (encode({"w": entry([1] * 40 + [2], 0, 8)}, F4), "at most 8 sizes"),
    "three offsets": (
        encode({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, F4),
        "w: expected two data_offsets",
    ),
    "offsets past the end": (encode({"w": entry([3], 0, 12)}, F4), "w: expected data_offsets"),
    "offsets backwards": (encode({"w": entry([2], 8, 0)}, F4), "w: expected data_offsets"),
    "negative offsets": (encode({"w": entry([2], -8, 0)}, F4), "w: expected two data_offsets"),
    "shape larger than the bytes": (encode({"w": entry([3], 0, 8)}, F4), "12 bytes for F32"),
    "shape smaller than the bytes": (encode({"w": entry([1], 0, 8)}, F4), "4 bytes for F32"),
    "shape that overflows": (encode({"w": entry([2**63, 2], 0, 8)}, F4), "w: expected 737869"),
    "a zero hides a huge shape": (encode({"w": entry([0, 2**62, 2**62], 0, 0)}), "2\\*\\*48"),
    "overlap": (encode({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, F4), "b: .*overlaps"),
    "same bytes twice": (encode({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, F4), "overlaps"),
    "hole": (encode({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, F4 + F4[:4]), "b: .*hole"),
    "late start": (encode({"a": entry([1], 4, 8)}, F4), "a: .*hole"),
    "bytes at the end": (encode({"a": entry([1], 0, 4)}, F4), "expected 4 data bytes.*got 8"),
    "truncated": (encode({"a": entry([2], 0, 8)}, F4[:7]), "a: .*truncated"),
    "nan": (encode({"a": entry([2], 0, 8)}, np.array([1, np.nan], "<f4").tobytes()), r"a: .*\[1\]"),
    "inf": (encode({"a": entry([2], 0, 4, "F16")}, np.array([1, np.inf], "<f2").tobytes()), "a: "),
    "too large": (encode({"a": entry([1], 0, 8, "F64")}, np.array([1e99]).tobytes()), "a: .*inf"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    content, says = LIES[name]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: expected this file, found nothing"):
        read_safetensors(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="something that is not a file"):
        read_safetensors(tmp_path)


numbers = st.one_of(
    st.integers(-5, 40), st.just(2**64), st.floats(allow_nan=False), st.none(), st.booleans()
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F16", "BF16", "F32", "F64", "I8", "", 1]),
        "shape": st.lists(st.integers(-1, 9) | numbers, max_size=3) | numbers,
        "data_offsets": st.lists(st.integers(0, 40) | numbers, min_size=1, max_size=3),
    },
    optional={"more": numbers},
)
headers = st.dictionaries(st.text(max_size=3), entries | numbers, max_size=4)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(header=headers, size=st.integers(0, 48), shift=st.integers(-9, 9))
def test_any_header_is_read_or_refused(
    tmp_path: Path, header: dict[str, Any], size: int, shift: int
) -> None:
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(text, b"\0" * size, max(len(text) + shift, 0)))
    try:
        tensors = read_safetensors(path)
    except CheckpointError:
        return
    # accepted: then the tensors are exactly the bytes of the file
    used = sum(
        math.prod(item["shape"]) * {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}[item["dtype"]]
        for item in header.values()
    )
    # a shorter or longer header can only differ by what JSON ignores, which is nothing here
    assert shift == 0 and used == size and set(tensors) == set(header)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed, cut off or added anywhere in a good file: no other exception than ours."""
    content = bytearray(safetensors_bytes(some_tensors(), "float32"))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / "x.safetensors"
    path.write_bytes(bytes(content) + data.draw(st.binary(max_size=4)))
    try:
        tensors = read_safetensors(path)
    except CheckpointError:
        return
    assert all(np.isfinite(value).all() for value in tensors.values())


# --- folders


def a_folder(path: Path, *, pruner: bool = False) -> tuple[PolicyConfig, dict, dict | None]:
    config = cases.config("tiny", pruner=pruner)
    tensors = cases.random_tensors(config["network"], 1)
    extra = cases.random_pruner(config["pruner"], config["network"], 2) if pruner else None
    written = write_folder(path, PolicyConfig.from_dict(config), tensors, extra, dtype="float32")
    return written, tensors, extra


@pytest.mark.parametrize("pruner", [False, True])
def test_folder_round_trip(tmp_path: Path, pruner: bool) -> None:
    written, tensors, extra = a_folder(tmp_path / "new" / "folder", pruner=pruner)
    config, read, read_extra = read_folder(tmp_path / "new" / "folder")
    assert config == written
    for expected, got in ((tensors, read), (extra or {}, read_extra or {})):
        assert set(expected) == set(got)
        for name, value in expected.items():
            np.testing.assert_array_equal(got[name], value)
    for name, digest in config.provenance["sha256"].items():
        content = (tmp_path / "new" / "folder" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest


def test_missing_extra_and_misshapen_tensors_are_all_named(tmp_path: Path) -> None:
    _, tensors, _ = a_folder(tmp_path)
    del tensors["head.bias"], tensors["pos_emb"]
    tensors["more"] = np.zeros((2, 3), np.float32)
    tensors["ln_f.bias"] = np.zeros(3, np.float32)
    tensors["input_emb.weight"] = tensors["input_emb.weight"].T.copy()
    write_safetensors(tmp_path / "model.safetensors", tensors, "float32")
    with pytest.raises(CheckpointError) as error:
        read_folder(tmp_path)
    message = str(error.value)
    for line in (
        "model.safetensors: 5 tensor(s)",
        "head.bias: missing, expected shape [2]",
        "pos_emb: missing, expected shape [1, 5, 16]",
        "more: not expected, got shape [2, 3]",
        "ln_f.bias: expected shape [16], got [3]",
        "input_emb.weight: expected shape [16, 2], got [2, 16]",
    ):
        assert line in message


def test_nothing_is_written_if_it_does_not_fit(tmp_path: Path) -> None:
    config = PolicyConfig.from_dict(cases.config("tiny"))
    tensors = cases.random_tensors(config.network.to_dict(), 1)
    with pytest.raises(CheckpointError, match="head.bias"):
        write_folder(tmp_path / "x", config, {k: v for k, v in tensors.items() if k != "head.bias"})
    tensors["head.bias"][0] = np.nan
    with pytest.raises(CheckpointError, match="head.bias"):
        write_folder(tmp_path / "x", config, tensors)
    tensors["head.bias"][0] = 0
    with pytest.raises(CheckpointError, match="pruner"):
        write_folder(tmp_path / "x", config, tensors, {})
    wrong = replace(config, network=replace(config.network, n_head=7))
    with pytest.raises(ValueError, match="n_emb"):
        write_folder(tmp_path / "x", wrong, tensors)
    assert not (tmp_path / "x").exists()


def test_pruner_file_and_config_must_agree(tmp_path: Path) -> None:
    config, _, _ = a_folder(tmp_path, pruner=True)
    (tmp_path / "pruner.safetensors").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"pruner\.safetensors: expected this file"):
        read_folder(tmp_path)
    (tmp_path / "kept").rename(tmp_path / "pruner.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(replace(config, pruner=None).to_dict()))
    with pytest.raises(CheckpointError, match=r'config\.json: expected a "pruner" object'):
        read_folder(tmp_path)


def test_a_new_model_takes_the_old_pruner_away(tmp_path: Path) -> None:
    a_folder(tmp_path, pruner=True)
    a_folder(tmp_path, pruner=False)
    assert read_folder(tmp_path)[2] is None


def test_write_pruner(tmp_path: Path) -> None:
    config, tensors, _ = a_folder(tmp_path)
    model = (tmp_path / "model.safetensors").read_bytes()
    sizes = PrunerConfig(**cases.TINY_PRUNER)
    pruner = cases.random_pruner(sizes.to_dict(), config.network.to_dict(), 3)
    with pytest.raises(CheckpointError, match="pruner"):
        write_pruner(tmp_path, config, pruner)
    written = write_pruner(tmp_path, replace(config, pruner=sizes), pruner, "float32")
    read, _, read_pruner = read_folder(tmp_path)
    assert read == written and set(read.provenance["sha256"]) == {
        "model.safetensors",
        "pruner.safetensors",
    }
    assert read_pruner is not None
    np.testing.assert_array_equal(read_pruner["head.weight"], pruner["head.weight"])
    assert (tmp_path / "model.safetensors").read_bytes() == model


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_damaged_config(tmp_path: Path, content: bytes) -> None:
    a_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        read_folder(tmp_path)


def test_config_errors_name_the_file_and_key(tmp_path: Path) -> None:
    config, _, _ = a_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"format_version": 9}))
    with pytest.raises(ValueError, match=r"config\.json: format_version: expected 1, got 9"):
        read_folder(tmp_path)


def test_missing_folder_and_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_folder(tmp_path)
    a_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_folder(tmp_path)


# --- JSON


def test_format_json_is_json() -> None:
    value = {"a": {"b": [1, 2.5, None], "ü": "x"}, "c": {}, "d": True}
    text = format_json(value)
    assert json.loads(text) == value and text.endswith("}\n") and '"b": [1, 2.5, null]' in text
    with pytest.raises(ValueError):
        format_json({"a": math.nan})


def test_check_tensors_accepts_what_fits() -> None:
    check_tensors({"a": np.zeros((2, 3))}, {"a": (2, 3)}, "x")


# --- the bundled policy


def test_the_asset_is_what_its_card_says() -> None:
    config, tensors, pruner = read_folder(ASSET)
    content = (ASSET / "model.safetensors").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    own = (ASSET / "pruner.safetensors").read_bytes()
    of_pruner = hashlib.sha256(own).hexdigest()
    assert config.provenance["sha256"] == {
        "model.safetensors": digest,
        "pruner.safetensors": of_pruner,
    }
    assert pruner is not None and config.pruner is not None and not config.pruner.default
    card = (ASSET / "README.md").read_text()
    assert f"`{digest}`" in card and f"`{of_pruner}`" in card
    assert len(own) < 1e6
    assert f"{sum(value.size for value in tensors.values()):,} numbers" in card
    assert len(content) < 20e6
    assert content == safetensors_bytes(tensors, "float16")  # float16 on disk, and our own format
    for name, row in config.provenance["scores"].items():
        if isinstance(row, dict):
            label = name.upper().replace("-LEADING", ", leading spacing")
            assert f"| {label} | {row['score']:.3f} | {row['success']:.2f} |" in card


def test_the_keypoints_are_the_nine_of_the_dataset() -> None:
    """Nine distinct points on the T of the simulator."""
    data = json.loads((ASSET / "keypoints.json").read_text())
    points = np.array(data["local_keypoints_block_frame_px"])
    assert points.shape == (9, 2) and len(np.unique(points, axis=0)) == 9
    # a bar of 120 x 30 pixels and a stem of 30 x 120, as gym-pusht builds it (scale 30)
    bar = (np.abs(points[:, 0]) <= 61) & (points[:, 1] >= -2) & (points[:, 1] <= 33)
    stem = (np.abs(points[:, 0]) <= 17) & (points[:, 1] >= 28) & (points[:, 1] <= 123)
    assert (bar | stem).all()


@pytest.mark.parametrize("name", ["policy.ckpt", "model.safetensors"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 12345\n"
    source = tmp_path / "policy"
    shutil.copytree(Path(tsad.__file__).parent / "assets" / "pusht_corners", source)
    (source / name).write_text(pointer)
    with pytest.raises(CheckpointError, match="got a pointer of git LFS .*; run 'git lfs pull'"):
        tsad.load(source / name if name.endswith(".ckpt") else source)
