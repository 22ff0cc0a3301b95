"""Reading and writing tsad folders: ``config.json``, ``model.safetensors``, ``pruner.safetensors``.

The safetensors format is small (eight bytes of header length, a JSON header, the numbers), so it is
read and written here: inference then depends on NumPy alone. A file is trusted in nothing: every
length, offset, shape and number is checked before it is used, and an error names the file, the
tensor, what came and what was expected. Weights are float32 in memory, whatever they are on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tsad.config import PolicyConfig, Shapes, pruner_shapes, tensor_shapes
from tsad.families.resnet import VISION
from tsad.files import make_folder, write_atomically, write_together
from tsad.section import MAX_MAGNITUDE

Tensors = dict[str, NDArray[np.float32]]

CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
PRUNER_FILE = "pruner.safetensors"
STATE_FILE = "training.pt"  # of a training, in the folder of its result

# bytes per number of the types that can be read; all end up as float32
_ITEM_SIZE = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
# those that a file may have beside what is read of it
_OTHER_ITEM_SIZE = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}
_NUMPY_DTYPES = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?", "U8": "u1", "I8": "i1"}
_NUMPY_DTYPES |= {"I16": "<i2", "I32": "<i4", "I64": "<i8"}
_WRITE_DTYPES = {"float16": ("F16", "<f2"), "float32": ("F32", "<f4")}
_MAX_HEADER = 16 << 20
_MAX_JSON = 16 << 20
_MAX_DIMS = 8
_METADATA = "__metadata__"


class CheckpointError(ValueError):
    """A file that is truncated, foreign, corrupt, or does not fit its configuration."""


def unfinished(folder: Path) -> bool:
    """Whether a training of tsad's began in this folder, which has no policy yet."""
    begun = any((folder / name).exists() for name in (STATE_FILE, STATE_FILE + ".lock"))
    return begun and not (folder / CONFIG_FILE).exists()


def of_training(folder: Path) -> Path:
    """The policy's folder in one of LeRobot's checkpoints of a training; else the folder itself."""
    inner = folder / "pretrained_model"
    return inner if inner.is_dir() and not (folder / CONFIG_FILE).exists() else folder


def folder_kind(path: Path) -> str:
    """``"tsad"``, ``"lerobot"`` or ``"unknown"``, by what ``config.json`` says of itself.

    A ``config.json`` that is no JSON object raises ``CheckpointError``.
    """
    if not (path / CONFIG_FILE).is_file():
        return "unknown"
    data = read_json(path / CONFIG_FILE)
    if isinstance(data, Mapping) and "format" not in data and isinstance(data.get("type"), str):
        return "lerobot"
    return "tsad"


def read_folder(path: str | os.PathLike[str]) -> tuple[PolicyConfig, Tensors, Tensors | None]:
    """Configuration, network tensors and pruner tensors (``None`` without one) of a tsad folder.

    Tensors are float32 with the names and shapes of ``config.tensor_shapes``. Raises
    ``FileNotFoundError`` if there is no such folder, ``ValueError`` (``CheckpointError``) naming
    the file and the key or tensor if something in it is missing, foreign or damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a tsad folder, found no folder of that name")
    config_path = folder / CONFIG_FILE
    config = PolicyConfig.from_dict(read_json(config_path), file=str(config_path))
    model_path, pruner_path = folder / MODEL_FILE, folder / PRUNER_FILE
    tensors = read_safetensors(model_path)
    check_tensors(tensors, tensor_shapes(config), str(model_path))
    if config.pruner is None:
        if pruner_path.exists():
            raise CheckpointError(
                f'{config_path}: expected a "pruner" object because {PRUNER_FILE} is there, got '
                "none; remove that file or add the object"
            )
        return config, tensors, None
    pruner = read_safetensors(pruner_path)
    check_tensors(pruner, pruner_shapes(config.pruner, config.network), str(pruner_path))
    return config, tensors, pruner


def write_folder(
    path: str | os.PathLike[str],
    config: PolicyConfig,
    tensors: Mapping[str, NDArray[Any]],
    pruner: Mapping[str, NDArray[Any]] | None = None,
    dtype: str = "float16",
    pruner_dtype: str | None = None,
) -> PolicyConfig:
    """Writes a tsad folder that ``read_folder`` accepts, replacing one that is there.

    ``dtype`` of the numbers on disk is ``"float16"`` or ``"float32"``, ``pruner_dtype`` that of the
    pruner's (default: the same). Nothing is written unless
    configuration and tensors fit and there is room; ``config.json`` is replaced last.
    Returns the configuration as written, whose ``provenance["sha256"]`` maps file to hash.
    """
    folder = Path(path)
    config = PolicyConfig.from_dict(config.to_dict())
    if (pruner is None) != (config.pruner is None):
        raise CheckpointError(
            f"pruner: expected tensors {'with' if pruner is None else 'only with'} a config that "
            'has a "pruner" object; give both or neither'
        )
    files = {MODEL_FILE: (tensors, tensor_shapes(config))}
    if pruner is not None and config.pruner is not None:
        files[PRUNER_FILE] = (pruner, pruner_shapes(config.pruner, config.network))
    contents = {}
    for name, (values, shapes) in files.items():
        check_tensors(values, shapes, name)
        number = pruner_dtype or dtype if name == PRUNER_FILE else dtype
        contents[name] = safetensors_bytes(values, number, file=name)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    config = replace(config, provenance=config.provenance | {"sha256": hashes})
    contents[CONFIG_FILE] = format_json(config.to_dict()).encode()
    make_folder(folder)
    write_together({folder / name: content for name, content in contents.items()})
    if pruner is None:
        (folder / PRUNER_FILE).unlink(missing_ok=True)  # it belonged to the replaced model
    return config


def write_pruner(
    path: str | os.PathLike[str],
    config: PolicyConfig,
    pruner: Mapping[str, NDArray[Any]],
    dtype: str = "float16",
) -> PolicyConfig:
    """Adds ``pruner.safetensors`` to a tsad folder, or replaces it, with the ``config`` it needs.

    ``config`` is that of the folder with ``pruner`` filled in. Returns it as written.
    """
    config = PolicyConfig.from_dict(config.to_dict())
    if config.pruner is None:
        raise CheckpointError('config: expected one that has a "pruner" object, got one without')
    check_tensors(pruner, pruner_shapes(config.pruner, config.network), PRUNER_FILE)
    content = safetensors_bytes(pruner, dtype, file=PRUNER_FILE)
    hashes = config.provenance.get("sha256")
    hashes = dict(hashes) if isinstance(hashes, Mapping) else {}  # provenance is free
    hashes[PRUNER_FILE] = hashlib.sha256(content).hexdigest()
    config = replace(config, provenance=config.provenance | {"sha256": hashes})
    text = format_json(config.to_dict()).encode()
    write_together({Path(path) / PRUNER_FILE: content, Path(path) / CONFIG_FILE: text})
    return config


def network_tensors(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a policy's that the network has; the others are image encoders'."""
    return {name: value for name, value in tensors.items() if not name.startswith(VISION)}


class Shaped(Protocol):
    """An array, or something that will be one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_tensors(tensors: Mapping[str, Shaped], shapes: Shapes, file: str) -> None:
    """Refuses missing, extra and misshapen tensors: ``CheckpointError`` lists them all by name."""
    problems = [
        f"{name}: missing, expected shape {_shape(shape)}"
        for name, shape in shapes.items()
        if name not in tensors
    ]
    for name, value in tensors.items():
        if name not in shapes:
            problems.append(f"{name}: not expected, got shape {_shape(value.shape)}")
        elif tuple(value.shape) != shapes[name]:
            problems.append(
                f"{name}: expected shape {_shape(shapes[name])}, got {_shape(value.shape)}"
            )
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(
            f"{file}: {len(problems)} tensor(s) do not fit the network that the configuration "
            f"describes; correct the configuration or use its own weights:\n  {listed}"
        )


def check_finite(tensors: Mapping[str, NDArray[Any]], file: str) -> None:
    """Refuses what no network can represent, NaN and Inf too: ``CheckpointError`` says where."""
    for name, value in tensors.items():
        good = np.abs(value) <= np.float32(MAX_MAGNITUDE)  # which float16 would take for Inf
        if not good.all():
            index = tuple(int(i) for i in np.argwhere(~good)[0])
            raise CheckpointError(
                f"{file}: {name}: expected finite numbers of magnitude up to {MAX_MAGNITUDE:g}, "
                f"got {value[index]} at {list(index)}; the training diverged or the file is damaged"
            )


def read_safetensors(path: str | os.PathLike[str]) -> Tensors:
    """All tensors of a safetensors file as float32 arrays (F16, BF16, F32 or F64 on disk).

    Raises ``CheckpointError`` naming file and tensor: missing file, truncation, a header that lies
    about lengths, offsets or shapes, duplicate names, other number types, NaN and Inf.
    """
    file = str(path)
    tensors: Tensors = {}
    with _open(path) as stream:
        entries, start = _read_entries(stream, file, _ITEM_SIZE)
        for name, (dtype, shape, begin, end) in entries.items():
            stream.seek(start + begin)
            content = stream.read(end - begin)
            if len(content) != end - begin:
                raise CheckpointError(f"{file}: {name}: the file became shorter while it was read")
            tensors[name] = to_float32(content, dtype).reshape(shape)
    check_finite(tensors, file)
    return tensors


def map_safetensors(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """All tensors of a safetensors file as views of the mapped file, in the types they have there.

    Only the header is read; the numbers come from the disk when they are used, and are neither
    copied nor checked. They can't be written to. BF16, a type that NumPy lacks, is converted to
    float32. The file must stay as it is while they are in use. Raises as ``read_safetensors``.
    """
    file = str(path)
    tensors: dict[str, NDArray[Any]] = {}
    with _open(path) as stream:
        entries, start = _read_entries(stream, file, _ITEM_SIZE | _OTHER_ITEM_SIZE)
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    for name, (dtype, shape, begin, end) in entries.items():
        numbers: NDArray[Any]
        if dtype == "BF16":
            numbers = to_float32(mapped[start + begin : start + end], dtype)
            numbers.setflags(write=False)
        else:
            numpy_dtype, count = np.dtype(_NUMPY_DTYPES[dtype]), math.prod(shape)
            numbers = np.frombuffer(mapped, numpy_dtype, count, start + begin)
        tensors[name] = numbers.reshape(shape)
    return tensors


def to_float32(content: bytes, dtype: str) -> NDArray[np.float32]:
    """Little-endian numbers of type F16, BF16, F32 or F64 as a new flat float32 array."""
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)
    numbers = np.frombuffer(content, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    with np.errstate(over="ignore"):  # too large for float32 becomes Inf, which is refused
        return numbers.astype(np.float32)


def refuse_pointer(start: bytes, file: str) -> None:
    """``CheckpointError`` if a file, by its first eight bytes, only says where the weights are."""
    if start == b"version ":  # https://git-lfs.github.com/spec/v1
        raise CheckpointError(
            f"{file}: got a pointer of git LFS in place of the weights; run 'git lfs pull' in its "
            "repository, or download the file itself"
        )


def _read_header(stream: IO[bytes], size: int, file: str) -> tuple[dict[str, Any], int]:
    """The parsed JSON header and the offset of the first number."""
    start = stream.read(8)
    if len(start) < 8:
        raise CheckpointError(
            f"{file}: expected a safetensors file, got {size} bytes; it is empty or truncated"
        )
    refuse_pointer(start, file)
    length = int.from_bytes(start, "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{file}: expected a safetensors header of at most {min(size - 8, _MAX_HEADER)} bytes, "
            f"got {length}; the file is truncated or not a safetensors file"
        )
    header = parse_json(stream.read(length), file, "safetensors header")
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{file}: expected a JSON object as safetensors header, got {type(header).__name__}; "
            "the file is damaged or not a safetensors file"
        )
    return header, 8 + length


_Entry = tuple[str, tuple[int, ...], int, int]


def _read_entries(
    stream: IO[bytes], file: str, item_sizes: Mapping[str, int]
) -> tuple[dict[str, _Entry], int]:
    """Checked header entries by tensor name, and the offset of the first number."""
    size = os.fstat(stream.fileno()).st_size
    header, start = _read_header(stream, size, file)
    return _check_entries(header, size - start, file, item_sizes), start


def _check_entries(
    header: dict[str, Any], size: int, file: str, item_sizes: Mapping[str, int]
) -> dict[str, _Entry]:
    """Header entries as (dtype, shape, begin, end), which cover the ``size`` data bytes exactly."""
    header = dict(header)
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{file}: {_METADATA}: expected an object of strings, got another")
    entries = {
        name: _check_entry(entry, size, file, name, item_sizes) for name, entry in header.items()
    }
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a hole"
            raise CheckpointError(
                f"{file}: {name}: expected to begin at data byte {position}, got {begin}: it "
                f"{problem}; the header is damaged"
            )
        position = end
    if position != size:
        raise CheckpointError(
            f"{file}: expected {position} data bytes, as the header describes, got {size}; the "
            "file is damaged"
        )
    return entries


def _check_entry(
    entry: Any, size: int, file: str, name: str, item_sizes: Mapping[str, int]
) -> _Entry:
    def refuse(expected: str, got: object) -> CheckpointError:
        return CheckpointError(
            f"{file}: {name}: expected {expected}, got {str(got)[:200]}; the file is damaged or "
            "of a kind that tsad does not read"
        )

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise refuse("an object of dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in item_sizes:
        raise refuse(f"a dtype of {', '.join(item_sizes)}", repr(dtype))
    if not _counts(shape) or len(shape) > _MAX_DIMS:
        raise refuse(f"a shape of at most {_MAX_DIMS} sizes", shape)
    if not _counts(offsets) or len(offsets) != 2:
        raise refuse("two data_offsets", offsets)
    begin, end = offsets
    if not begin <= end <= size:
        raise refuse(f"data_offsets within {size} data bytes", f"{offsets} (is it truncated?)")
    expected = math.prod(shape) * item_sizes[dtype]
    if end - begin != expected:
        raise refuse(f"{expected} bytes for {dtype} {_shape(shape)}", f"{end - begin} bytes")
    # a size of 0 hides the others from the check above, and NumPy has a limit of its own
    if math.prod(n for n in shape if n) > 2**48:
        raise refuse("a shape of fewer than 2**48 numbers", shape)
    return dtype, tuple(shape), begin, end


def _counts(value: Any) -> bool:
    """Whether it is a list of integers that are not negative."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def safetensors_bytes(
    tensors: Mapping[str, NDArray[Any]], dtype: str = "float16", *, file: str = MODEL_FILE
) -> bytes:
    """A safetensors file in memory; ``dtype`` is ``"float16"`` or ``"float32"``.

    Tensors are stored by name, so equal tensors give equal bytes. A number that is not finite in
    that type is refused by tensor name (``CheckpointError``); ``file`` is named in errors.
    """
    if dtype not in _WRITE_DTYPES:
        raise ValueError(
            f"dtype: expected one of {', '.join(_WRITE_DTYPES)}, got {dtype!r}; choose one of these"
        )
    code, numpy_dtype = _WRITE_DTYPES[dtype]
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    chunks = []
    position = 0
    for name in sorted(tensors):
        if name == _METADATA:
            raise CheckpointError(f"{file}: {name}: expected a tensor name, got the reserved one")
        value = np.asarray(tensors[name])
        with np.errstate(over="ignore"):
            stored = value.astype(numpy_dtype)
        if not np.isfinite(stored).all():
            peak = np.max(np.abs(value)) if value.size else 0.0
            raise CheckpointError(
                f"{file}: {name}: expected numbers that are finite in {dtype}, got {peak}; "
                'write dtype="float32", unless the weights themselves are broken'
            )
        content = stored.tobytes()
        end = position + len(content)
        header[name] = {"dtype": code, "shape": list(value.shape), "data_offsets": [position, end]}
        chunks.append(content)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # keeps the numbers aligned
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray[Any]], dtype: str = "float16"
) -> None:
    """Writes a safetensors file, whole or not at all; see ``safetensors_bytes``."""
    write_atomically(path, safetensors_bytes(tensors, dtype, file=str(path)))


def read_json(path: str | os.PathLike[str]) -> Any:
    """A JSON file; ``CheckpointError`` if it is missing, huge, or not JSON with distinct keys."""
    with _open(path) as stream:
        content = stream.read(_MAX_JSON + 1)
    if len(content) > _MAX_JSON:
        raise CheckpointError(f"{path}: expected at most {_MAX_JSON} bytes of JSON, got more")
    return parse_json(content, str(path), "file")


def parse_json(content: bytes, file: str, what: str) -> Any:
    """Parsed UTF-8 JSON without duplicate keys, NaN or Infinity; else ``CheckpointError``."""

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{file}: {twice}: expected once in the {what}, got twice")
        return result

    def constant(name: str) -> Any:
        raise CheckpointError(f"{file}: expected finite numbers in the {what}, got {name}")

    try:
        text = content.decode("utf-8")
        return json.loads(text, object_pairs_hook=distinct, parse_constant=constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # decoding and JSON errors are ValueErrors
        raise CheckpointError(
            f"{file}: expected JSON in the {what}, got something else ({error}); the file is "
            "damaged or of another kind"
        ) from None


def format_json(value: Any, indent: str = "") -> str:
    """JSON for people: one line per key, lists of numbers on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = indent + "  "
    items = (f"{inner}{json.dumps(k)}: {format_json(v, inner)}" for k, v in value.items())
    return "{\n" + ",\n".join(items) + "\n" + indent + "}" + ("" if indent else "\n")


def _belongs(folder: Path) -> str:
    """What is in a folder of this kind."""
    with contextlib.suppress(CheckpointError, OSError):
        if folder_kind(folder) == "lerobot":
            return (
                f"a LeRobot folder has {CONFIG_FILE}, {MODEL_FILE}, policy_preprocessor.json, "
                "policy_postprocessor.json and the tensors that these two name; copy all of it"
            )
    return (
        f"a tsad folder has {CONFIG_FILE}, {MODEL_FILE} and perhaps {PRUNER_FILE} (tsad convert "
        "makes one)"
    )


@contextlib.contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    target = Path(path)
    if not target.is_file():
        found = "something that is not a file" if target.exists() else "nothing"
        raise CheckpointError(
            f"{target}: expected this file, found {found}; {_belongs(target.parent)}"
        )
    with open(target, "rb") as stream:
        yield stream


def _shape(shape: Iterable[int]) -> str:
    return str(list(shape))
