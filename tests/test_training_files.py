"""Whatever ``torch.save`` of a training run writes, by any of its options, is read.

Every file is written here by torch, with pickle, dill or cloudpickle, and torch itself reads it
back first: so a file that nobody could use proves nothing.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import itertools
import pathlib
import pickle
import random
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import numpy as np
import pytest
from checkpoints import payload, save

from tsad.checkpoint import CheckpointError
from tsad.convert import read_checkpoint

torch = pytest.importorskip("torch")
dill = pytest.importorskip("dill")
omegaconf = pytest.importorskip("omegaconf")


class Colour(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self) -> None:
        self.a, self.b = 1, [2]


class Words(dict):  # type: ignore[type-arg]
    """A dict of one's own class, with an attribute."""

    def __init__(self) -> None:
        super().__init__(a=1)
        self.b = 2


class Keyword:
    """Made with keyword arguments, as protocol 4 writes it."""

    def __new__(cls, *, a: int) -> Keyword:
        made = super().__new__(cls)
        made.a = a  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (), {"a": self.a}  # type: ignore[attr-defined]


class LoudParameter(torch.nn.Parameter):
    """A subclass of a parameter."""


def by_value() -> Any:
    """A class of the script that is run: dill saves its code with the object."""
    kind = type("Helper", (), {"__module__": "__main__", "twice": lambda self: 2 * self.x})
    helper: Any = kind()
    helper.x = 3
    return [kind, helper, helper.twice]


def with_method() -> Any:
    counter = collections.Counter([30, 60, 60])
    return [counter.most_common, counter]


def optimizer() -> Any:
    weight = torch.nn.Parameter(torch.ones(3))
    made = torch.optim.AdamW([weight])
    weight.sum().backward()
    made.step()
    return made


def schedules() -> Any:
    made = optimizer()
    return [
        torch.optim.lr_scheduler.MultiStepLR(made, [30, 60]).state_dict(),
        torch.optim.lr_scheduler.LambdaLR(made, lambda epoch: 0.9**epoch).state_dict(),
        torch.optim.lr_scheduler.CosineAnnealingLR(made, 100).state_dict(),
    ]


def numpy_things() -> Any:
    structured = np.zeros(3, [("a", "f4"), ("b", "i8", 2)])
    return [
        np.arange(12.0).reshape(3, 4).T,
        np.array(["a", None, 1], object),
        np.array(["text"]),
        np.array(1 + 2j),
        np.float64(0.5),
        np.int64(3),
        np.bool_(True),
        np.datetime64("2026-01-01"),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        structured,
        structured.dtype,
        np.zeros(0),
        np.float32,
    ]


def random_states() -> Any:
    return [
        np.random.RandomState(0),
        np.random.RandomState(0).get_state(),
        np.random.default_rng(0),
        np.random.default_rng(0).bit_generator.state,
        np.random.SeedSequence(5),
        random.Random(0),
        random.getstate(),
        torch.get_rng_state(),
        torch.Generator().get_state(),
    ]


def odd_tensors() -> Any:
    """Tensors that are not read, and need not be."""
    tensors = [
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.quint8
        ),
        torch.empty(3, device="meta"),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(3, dtype=torch.uint16),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2),
        torch.tensor([True, False]),
        torch.tensor(7),
        torch.zeros(0, 5),
        torch.nn.Parameter(torch.ones(2)),
        LoudParameter(torch.ones(2)),
        torch.nn.Buffer(torch.ones(2)),
        torch.nn.parameter.UninitializedParameter(),
    ]
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.no_decay = True  # type: ignore[attr-defined]
    return [*tensors, attributed]


def torch_things() -> Any:
    return [
        torch.Size([1, 2]),
        torch.float32,
        torch.bfloat16,
        torch.device("cuda:0"),
        torch.strided,
        torch.preserve_format,
        torch.Generator,
        torch.nn.Linear(2, 2),
        torch.nn.Sequential(torch.nn.LSTM(2, 2)),
        torch.ones(3).untyped_storage(),
        torch.nn.functional.relu,
    ]


def plain_things() -> Any:
    return [
        {1, "a"},
        frozenset([1, (2, frozenset([3]))]),
        collections.OrderedDict(a=1, b=collections.OrderedDict()),
        collections.defaultdict(list, {"a": [1], 2: []}),
        collections.deque([1, 2], maxlen=3),
        collections.ChainMap({"a": 1}),
        complex(1, 2),
        b"bytes" * 20,
        bytearray(b"bytearray"),
        slice(1, None, 2),
        range(3),
        10**5000,
        -(2**63),
        1.5,
        float("nan"),
        "\ud800 and a lone surrogate",
        ...,
        NotImplemented,
        int,
        type(None),
        print,
    ]


def library_things() -> Any:
    return [
        pathlib.Path("a/b"),
        pathlib.PurePosixPath("a"),
        pathlib.PureWindowsPath("a"),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        datetime.datetime.now(),
        datetime.timedelta(1),
        datetime.date(2026, 1, 2),
        datetime.timezone(datetime.timedelta(hours=1)),
        decimal.Decimal("1.5"),
        fractions.Fraction(1, 3),
        uuid.UUID(int=3),
        functools.partial(max, 1, key=abs),
        itertools.count(3),
        Colour.RED,
        Point(1, 2),
        Slotted(),
        Words(),
        Keyword(a=1),
        ValueError("wrong"),
    ]


def odd_keys() -> Any:
    weight = torch.nn.Parameter(torch.ones(2))
    keys = [weight, (1, (2, 3)), 1.5, None, True, Colour.RED, 2**70, frozenset([1]), b"b", int]
    return {**dict.fromkeys(keys, 1), pathlib.Path("a"): 2}


def cyclic() -> Any:
    ring: list[Any] = [{}]
    ring[0]["ring"] = ring
    return ring


def settings_things() -> Any:
    make = omegaconf.OmegaConf.create
    return [make({"a": {"b": "${c}"}, "c": None, "d": "???"}), make([1, [2]]), make({})]


EXTRAS: dict[str, Callable[[], Any]] = {
    "plain": plain_things,
    "library": library_things,
    "keys": odd_keys,
    "cyclic": cyclic,
    "numpy": numpy_things,
    "random states": random_states,
    "tensors": odd_tensors,
    "torch": torch_things,
    "optimizer": lambda: optimizer().state_dict(),
    "schedules": schedules,
    "settings": settings_things,
}
# what only dill and cloudpickle save
BY_VALUE: dict[str, Callable[[], Any]] = {
    "lambda": lambda: lambda x: x + 1,
    "closure": lambda: (lambda y: lambda x: x + y)(2),
    "partial of a lambda": lambda: functools.partial(lambda a, b: a, 1),
    "class of the script": by_value,
    "method": with_method,
    "generator function": lambda: lambda: (yield 1),
    "module": lambda: [np, random],
}


def load(path: Path) -> Any:
    """What torch itself makes of a file."""
    return torch.load(path, pickle_module=dill, weights_only=False, map_location="cpu")


def beside(extra: Any) -> dict[str, Any]:
    """A checkpoint with something before, after and amidst its weights."""
    value = payload()
    value["state_dicts"]["optimizer"] = extra
    value["state_dicts"]["ema_model"]._metadata["extra"] = extra
    return {"before": extra, **value, "after": [extra, {"again": extra}]}


FORMATS = [
    pytest.param({"pickle_protocol": protocol, **options}, id=f"{name}-{protocol}")
    for protocol in (2, 3, 4, 5)
    for name, options in (("zip", {}), ("old", {"_use_new_zipfile_serialization": False}))
]


@pytest.mark.filterwarnings("ignore")  # torch warns of quantised and nested tensors
@pytest.mark.parametrize("name", [*EXTRAS, *BY_VALUE])
def test_what_lies_beside_the_weights(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "x.ckpt", beside({**EXTRAS, **BY_VALUE}[name]()))
    load(path)
    checkpoints.check_weights(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", FORMATS)
def test_every_format(tmp_path: Path, options: dict[str, Any]) -> None:
    """All of it at once; no note, which is for calls that can do harm."""
    extra = {name: make() for name, make in {**EXTRAS, **BY_VALUE}.items()}
    path = save(tmp_path / "x.ckpt", beside(extra), **options)
    zipped = "_use_new_zipfile_serialization" not in options
    assert zipfile.is_zipfile(path) == zipped
    if zipped:  # torch cannot read back the tensors of newer types that it writes in the old format
        load(path)
    checkpoints.check_weights(path)
    assert read_checkpoint(path).notes == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("module", ["pickle", "cloudpickle"])
def test_other_picklers(tmp_path: Path, module: str, old: bool) -> None:
    pickler = pytest.importorskip(module)
    # dill saves no optimizer of this torch itself
    value = payload() | {"extra": [plain_things(), library_things(), optimizer()]}
    if module == "cloudpickle":
        value["functions"] = {name: make() for name, make in BY_VALUE.items()}
    path = tmp_path / "x.ckpt"
    torch.save(value, path, pickle_module=pickler, _use_new_zipfile_serialization=not old)
    checkpoints.check_weights(path)


def test_pickles_that_are_no_files_of_torch(tmp_path: Path) -> None:
    for value in (payload()["cfg"], {"cfg": 1}, 0x1950A86A20F9469CFC6C, Slotted):
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps(value))
        with pytest.raises(CheckpointError, match="x.ckpt: expected"):
            read_checkpoint(tmp_path / "x.ckpt")


# --- torch.save's own options


def test_without_checksums_and_byte_order(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "x.ckpt", payload())
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.BadZipFile, match="CRC"):
        archive.read("x/data.pkl")
    checkpoints.check_weights(path)
    checkpoints.check_weights(save(tmp_path / "y.ckpt", payload(), _disable_byteorder_record=True))


def test_alignment(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    before = config.save.storage_alignment
    config.save.storage_alignment = 4096
    try:
        path = save(tmp_path / "x.ckpt", payload())
    finally:
        config.save.storage_alignment = before
    checkpoints.check_weights(path)


@pytest.mark.parametrize("old", [False, True])
def test_storages_of_other_devices(tmp_path: Path, old: bool) -> None:
    """Saved on cuda:0, which is a word in the pickle; torch writes it for a tensor that says so."""
    path = save(tmp_path / "x.ckpt", payload(), _use_new_zipfile_serialization=not old)
    content = path.read_bytes()
    if old:
        # the first is written, the others refer to it
        assert content.count(b"X\x03\x00\x00\x00cpu") == 1
        path.write_bytes(content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    else:

        def change(entries: dict[str, bytes]) -> None:
            text = entries["x/data.pkl"]
            assert text.count(b"X\x03\x00\x00\x00cpu") == 1
            changed = text.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            entries["x/data.pkl"] = changed

        checkpoints.rewrite(path, change)
    load(path)
    checkpoints.check_weights(path)


def test_large_arrays_beside_the_weights(tmp_path: Path) -> None:
    """NumPy's numbers lie in the pickle itself: the replay buffer, say."""
    path = save(tmp_path / "x.ckpt", payload() | {"buffer": np.zeros(70 << 20, np.uint8)})
    assert path.stat().st_size > 70 << 20
    checkpoints.check_weights(path)
