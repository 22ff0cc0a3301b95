"""Changes to files that keep what a loader checks first, so that they get further than noise.

Members of a zip file are changed inside it and its checksums made right, values of JSON are
replaced by awkward ones, the steps of a pickle by others. All is drawn from a ``random.Random``.
"""

from __future__ import annotations

import io
import json
import pickletools
import random
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Bytes = Callable[[bytes, int], bytes]

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**53 + 1,
    2**64,
    -(10**40),
    10**400,
    0.5,
    1e308,
    -1e-300,
    float("nan"),
    float("inf"),
    "",
    "a",
    "${a}",
    "${.a}${..b}",
    "${a[0].${b}}",
    "${eval:'1+1'}",
    "${oc.select:a,1}",
    "\\${",
    "???",
    "../../x",
    "\ud800",
    "9" * 5000,
    "x" * 3000,
    [],
    {},
    [[]],
    {"a": {}},
    [0, "1", None],
]
# steps of pickles: text and names on the stack, calls, states, marks, the memo
STEPS = [
    b"N",
    b"K\x01",
    b"J\xff\xff\xff\x7f",
    b"\x8a\x09\x01\x00\x00\x00\x00\x00\x00\x00\x01",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"]",
    b"}",
    b")",
    b"\x8f",
    b"(",
    b"0",
    b"1",
    b"2",
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"l",
    b"d",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"b",
    b"o",
    b"\x81",
    b"\x92",
    b"\x90",
    b"\x91",
    b"Q",
    b"q\x00",
    b"h\x00",
    b"\x94",
    b"X\x01\x00\x00\x00a",
    b"B\x02\x00\x00\x00ab",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor_v3\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nSize\n",
    b"cnumpy._core.multiarray\nscalar\n",
    b"cnumpy\ndtype\n",
    b"c_codecs\nencode\n",
    b"comegaconf.dictconfig\nDictConfig\n",
    b"cos\nsystem\n",
    b"\x82\x01",
    b"\x97",
    b".",
]


def noise(draw: random.Random) -> Bytes:
    """A few bytes changed, dropped, doubled or put in, for where libFuzzer's own is not there."""

    def change(content: bytes, most: int) -> bytes:
        result = bytearray(content)
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            at = draw.randrange(len(result) + 1)
            length = draw.choice((1, 1, 2, 4, 8, 64))
            kind = draw.randrange(5)
            if kind == 0 and at < len(result):
                result[at] = draw.randrange(256)
            elif kind == 1:
                del result[at : at + length]
            elif kind == 2:
                result[at:at] = result[at : at + length]
            elif kind == 3:
                result[at:at] = draw.randbytes(length)
            else:
                number = draw.choice((0, 1, 127, 255, 2**15, 2**31 - 1, 2**32 - 1, 2**63))
                result[at : at + 8] = number.to_bytes(8, "little")[: draw.choice((1, 2, 4, 8))]
        return bytes(result[:most])

    return change


def mutate(content: bytes, most: int, draw: random.Random, change: Bytes) -> bytes:
    """Another file; ``change`` is for plain bytes."""
    if draw.random() < 0.2:
        return change(content, most)
    if content.startswith(b"PK\x03\x04"):
        return _zip(content, most, draw, change)
    return _part(content, most, draw, change)[:most]


def _part(content: bytes, most: int, draw: random.Random, change: Bytes) -> bytes:
    try:
        if content[:1] in b"{[" and draw.random() < 0.8:
            return _json(content, draw)
        if content[:1] in b"\x80](" and draw.random() < 0.7:
            return _pickle(content, draw)
        if content.startswith(b"\x93NUMPY") and draw.random() < 0.6:
            return _npy(content, draw, change)
    except Exception:  # what is broken already is changed as bytes
        pass
    return change(content, most)


def _zip(content: bytes, most: int, draw: random.Random, change: Bytes) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [
                (info.filename, archive.read(info))
                for info in archive.infolist()
                if info.file_size <= 1 << 20
            ]
    except Exception:  # whatever a broken archive makes zipfile raise
        return change(content, most)
    if not entries:
        return change(content, most)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        number = draw.randrange(len(entries))
        # the pickle and the header decide what the others mean
        for i, (name, _) in enumerate(entries):
            if name.endswith(("data.pkl", "header.npy")) and draw.random() < 0.4:
                number = i
        name, member = entries[number]
        kind = draw.random()
        if kind < 0.02 and len(entries) > 1:
            del entries[number]
        elif kind < 0.04:
            entries.append((name + draw.choice(("", "x")), member))
        elif kind < 0.06:
            entries[number] = (draw.choice(("", "../x", "a/b", "header.npy")), member)
        else:
            entries[number] = (name, _part(member, most, draw, change))
    buffer = io.BytesIO()
    kind_ = zipfile.ZIP_STORED if draw.random() < 0.9 else zipfile.ZIP_DEFLATED
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", kind_) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, member in entries:
            archive.writestr(name or "x", member)
    result = buffer.getvalue()
    return result if len(result) <= most else content


def _json(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n") if content.count(b"\n{") else [content]
    number = draw.randrange(len(lines))
    root = [json.loads(lines[number] or b"0")]
    for _ in range(draw.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        pending: list[Any] = [root]
        while pending and len(places) < 2000:
            value = pending.pop()
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    pending.append(value[key])
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind == 0 and len(holder) > 1:
            del holder[key]
        elif kind == 1:
            other, name = draw.choice(places)
            holder[key] = other[name] if other is not holder else draw.choice(VALUES)
        elif kind == 2 and isinstance(holder, dict):
            holder[str(draw.choice([*VALUES[:9], "name", "plan"]))[:50]] = holder.pop(key)
        else:
            holder[key] = draw.choice(VALUES)
    text = json.dumps(root[0])
    if draw.random() < 0.01:
        depth = draw.choice((30, 400, 900, 20_000))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + text[-1]
    lines[number] = text.encode()
    return b"\n".join(lines)


def _pickle(content: bytes, draw: random.Random) -> bytes:
    starts = []
    for _, _, at in pickletools.genops(content):
        starts.append(at or 0)
    steps = [content[a:b] for a, b in zip(starts, [*starts[1:], starts[-1] + 1], strict=True)]
    rest = content[starts[-1] + 1 :]
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(steps))
        kind = draw.randrange(5)
        if kind == 0:
            del steps[at : at + draw.choice((1, 2, 8))]
        elif kind == 1:
            steps[at:at] = steps[draw.randrange(len(steps)) :][: draw.choice((1, 4, 16))]
        elif kind == 2:
            steps[at] = draw.choice(STEPS)
        else:
            steps[at:at] = [draw.choice(STEPS) for _ in range(draw.choice((1, 2, 3)))]
        if not steps:
            steps = [b"N."]
    return b"".join(steps) + rest


def _npy(content: bytes, draw: random.Random, change: Bytes) -> bytes:
    array = np.load(io.BytesIO(content), allow_pickle=False)
    buffer = io.BytesIO()
    if array.dtype.kind == "U" and array.ndim == 0:  # JSON
        text = _part(str(array).encode("utf-8", "surrogatepass"), 1 << 16, draw, change)
        array = np.array(text.decode("utf-8", "replace"))
    else:
        dtype = draw.choice(("u1", "i8", "f4", "f8", ">f2", "?", "c8", "U3", "S2", "M8[s]", "V3"))
        kind = draw.randrange(5)
        if kind == 0:
            array = np.zeros(array.shape, dtype)
        elif kind == 1:
            array = np.zeros(draw.choice(((), (0,), (1,), (2, 0), (1, 1, 1), (3, 2))), array.dtype)
        elif kind == 2:
            array = array.reshape(draw.choice((-1, (1, *array.shape), (*array.shape, 1))))
        elif kind == 3:
            array = np.asfortranarray(array[::-1] if array.ndim else array)
        else:
            array = np.array(array)
            values = (-1, 0, 1, 5, 255, 2**31, float("nan"), 1e300)
            with np.errstate(all="ignore"):
                array.flat[draw.randrange(max(array.size, 1))] = draw.choice(values)
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
