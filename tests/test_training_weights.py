"""The weights in a checkpoint: tensors of every kind, models in any wrapping, which of two sets.

Every file is written here by torch, and what torch makes of a tensor is the right value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoints
import numpy as np
import pytest
from checkpoints import payload, save

import tsad
from tsad.checkpoint import CheckpointError
from tsad.convert import convert, read_checkpoint, read_pruner

torch = pytest.importorskip("torch")
dill = pytest.importorskip("dill")
omegaconf = pytest.importorskip("omegaconf")


# --- tensors


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_number_types_and_views(tmp_path: Path, dtype: str, old: bool) -> None:
    """Transposed, sliced, expanded and shared views of every type, at torch's own values."""
    rng = np.random.default_rng(3)
    numbers = torch.from_numpy(rng.standard_normal((6, 8))).to(getattr(torch, dtype))
    cases = {
        "whole": numbers,
        "transposed": numbers.T,
        "part": numbers[1:4, ::3],
        "one": numbers[5, 7],
        "expanded": numbers[2, 3:5].expand(3, 2),
        "negative": torch._neg_view(numbers[2:]),
        "negative part": torch._neg_view(numbers.T)[1:3, 4],
        "parameter": torch.nn.Parameter(numbers[0]),
        "empty": numbers[:, 3:3],
    }
    assert cases["negative"].is_neg()
    path = tmp_path / "x.pt"
    torch.save(cases, path, _use_new_zipfile_serialization=not old)
    from tsad.convert.torch_file import TorchFile

    with TorchFile(path) as file:
        for name, tensor in cases.items():
            expected = tensor.detach().to(torch.float32).resolve_neg().numpy()
            found = file.read(file.value[name], name)
            assert found.dtype == np.float32 and found.flags.c_contiguous
            np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("old", [False, True])
def test_lazy_views_in_a_checkpoint(tmp_path: Path, old: bool) -> None:
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    for name in ("model.head.weight", "normalizer.params_dict.obs.scale", "model.mask"):
        ema[name] = torch._neg_view(-ema[name])
        assert ema[name].is_neg()
    path = save(tmp_path / "x.ckpt", value, _use_new_zipfile_serialization=not old)
    checkpoints.check_weights(path)
    scale = read_checkpoint(path).config.normalizer.obs.scale
    expected = checkpoints.state_dict(1)[1]["normalizer.params_dict.obs.scale"]
    assert np.array_equal(np.float32(scale), expected)


def float8(weight: Any) -> Any:
    return weight.to(torch.float8_e4m3fn)


UNREADABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "float8": (float8, "float8_e4m3fn"),
    "int": (lambda w: w.to(torch.int64), "int64"),
    "bool": (lambda w: w > 0, "bool"),
    "uint16": (lambda w: w.abs().to(torch.uint16), "uint16"),
    "complex": (lambda w: w.to(torch.complex64), "complex64"),
    "conjugate": (lambda w: (1j * w).conj(), "complex64"),
    "imaginary": (lambda w: (1j * w).conj().imag, ""),  # a negative view of every other number
    "sparse": (lambda w: w.to_sparse(), "a sparse tensor"),
    "csr": (lambda w: w.to_sparse_csr(), "a sparse tensor"),
    "quantised": (
        lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
        "a quantised tensor",
    ),
    "meta": (lambda w: w.to("meta"), "a tensor without numbers"),
    "array": (lambda w: w.numpy(), "an object that .*array makes"),
    "list": (lambda w: w.tolist(), "a list"),
    "none": (lambda w: None, "NoneType"),
    "ten dimensions": (lambda w: w.reshape(*[1] * 8, *w.shape), "_rebuild_tensor_v2"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", UNREADABLE)
def test_weights_of_other_kinds_are_refused_by_name(tmp_path: Path, name: str, old: bool) -> None:
    make, says = UNREADABLE[name]
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    ema["model.head.weight"] = make(ema["model.head.weight"])
    path = tmp_path / "x.ckpt"
    if name == "imaginary":
        save(path, value, _use_new_zipfile_serialization=not old)
        ema["model.head.weight"] = ema["model.head.weight"].resolve_neg()
        expected = read_checkpoint(save(tmp_path / "y.ckpt", value)).tensors["head.weight"]
        found = read_checkpoint(path).tensors["head.weight"]
        return np.testing.assert_array_equal(found, expected)
    save(path, value, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=rf"x.ckpt: model.head.weight: .*{says}"):
        read_checkpoint(path)
    value["state_dicts"]["model"], value["state_dicts"]["ema_model"] = (
        value["state_dicts"]["ema_model"],
        value["state_dicts"]["model"],
    )
    checkpoints.check_weights(
        save(path, value), seed=2
    )  # and does not matter where it is not needed
    return None


# --- models that were wrapped


class Tree(torch.nn.Module):
    """A module whose state dict has the names and tensors that it is given."""

    def __init__(self, state: dict[str, Any], wrap: Callable[[Any], Any]) -> None:
        super().__init__()
        groups: dict[str, dict[str, Any]] = {}
        for name, tensor in state.items():
            head, dot, rest = name.partition(".")
            if dot:
                groups.setdefault(head, {})[rest] = tensor
            elif "mask" in head:
                self.register_buffer(head, tensor)
            else:
                self.register_parameter(head, torch.nn.Parameter(tensor))
        for name, members in groups.items():
            made = Tree(members, lambda module: module)
            self.add_module(name, wrap(made) if name == "model" else made)


def parallel(module: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(module)


WRAPS = {
    "parallel": (parallel,),
    "data parallel": (torch.nn.DataParallel,),
    "compiled": (torch.compile,),
    "compiled, then parallel": (torch.compile, parallel),
    "parallel, then compiled": (parallel, torch.compile),
    "all": (torch.compile, parallel, torch.compile, torch.nn.DataParallel),
    "none": (),
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def wrapped(module: Any, name: str) -> Any:
    for wrap in WRAPS[name]:
        module = wrap(module)
    return module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("outside", "inside"),
    [
        *((name, "none") for name in WRAPS),
        *(("none", name) for name in WRAPS if name != "none"),
        ("parallel", "compiled"),
        ("compiled", "parallel"),
        ("all", "all"),
    ],
)
def test_wrapped_models(tmp_path: Path, group: None, inside: str, outside: str) -> None:
    value = payload()
    state, arrays = checkpoints.state_dict(1)
    model = wrapped(Tree(state, lambda module: wrapped(module, inside)), outside)
    names = set(model.state_dict())
    assert (names == set(arrays)) == (inside == outside == "none")
    value["state_dicts"]["ema_model"] = model.state_dict()
    path = save(tmp_path / "x.ckpt", value)
    checkpoints.check_weights(path)
    scale = read_checkpoint(path).config.normalizer.obs.scale
    assert np.array_equal(np.float32(scale), arrays["normalizer.params_dict.obs.scale"])


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    ema["module.model.head.weight"] = ema["model.head.weight"] + 1
    with pytest.raises(CheckpointError, match="module.model.head.weight: expected one tensor"):
        read_checkpoint(save(tmp_path / "x.ckpt", value))


def test_wrapped_pruners(tmp_path: Path) -> None:
    import cases

    from tsad.config import NetworkConfig

    network = NetworkConfig.from_dict(checkpoints.NETWORK)
    arrays = cases.random_pruner(cases.TINY_PRUNER, checkpoints.NETWORK, 4)
    for prefix in ("module._orig_mod.", "_orig_mod.module.", "_orig_mod."):
        state = {prefix + name: torch.from_numpy(value) for name, value in arrays.items()}
        sizes = {"attn_heads": np.int64(3), "hidden_dim": np.int32(24)}
        torch.save({"model_state_dict": state, **sizes}, tmp_path / "p.pt")
        pruner, tensors = read_pruner(tmp_path / "p.pt", network)
        assert pruner.n_head == 3 and set(tensors) == set(arrays)


# --- which weights, and snapshots


def without_ema(use_ema: Any) -> dict[str, Any]:
    config = checkpoints.lowdim_config()
    config["training"]["use_ema"] = use_ema
    config["no"] = False
    value = payload(config)
    del value["state_dicts"]["ema_model"]
    return value


@pytest.mark.parametrize("use_ema", [False, "${no}", None])
def test_runs_without_averaged_weights(tmp_path: Path, use_ema: Any) -> None:
    """As Diffusion Policy itself chooses: ``if cfg.training.use_ema: policy = ema_model``."""
    value = without_ema(use_ema)
    path = save(tmp_path / "x.ckpt", value)
    checkpoints.check_weights(path, seed=2)
    summary = convert(path, tmp_path / "out")
    assert summary["weights"] == "raw" and "without averaged weights" in summary["notes"][0]
    with pytest.warns(UserWarning, match="x.ckpt: the run was trained without averaged weights"):
        policy = tsad.load(path)
    assert policy.config["provenance"]["weights"] == "raw"
    with pytest.raises(CheckpointError, match=r'ema_model.*weights="raw".*--weights raw'):
        tsad.load(path, weights="ema")


def test_averaged_weights_that_are_not_there(tmp_path: Path) -> None:
    """The run has them, the file does not: nobody chooses others in silence."""
    path = save(tmp_path / "x.ckpt", without_ema(True))
    for read in (tsad.load, read_checkpoint):
        with pytest.raises(CheckpointError, match=r'ema_model.*weights="raw"'):
            read(path)
    assert tsad.load(path, weights="raw").config["provenance"]["weights"] == "raw"
    checkpoints.check_weights(save(tmp_path / "x.ckpt", payload()))
    both = tsad.load(tmp_path / "x.ckpt"), tsad.load(tmp_path / "x.ckpt", weights="raw")
    assert [policy.config["provenance"]["weights"] for policy in both] == ["ema", "raw"]


def test_weights_are_for_checkpoints(tmp_path: Path) -> None:
    path = save(tmp_path / "x.ckpt", payload())
    convert(path, tmp_path / "out")
    for source in ("pusht", tmp_path / "out"):
        with pytest.raises(ValueError, match="weights: expected it left out"):
            tsad.load(source, weights="raw")
    with pytest.raises(ValueError, match="weights: expected one of 'auto', 'ema', 'raw', got 'b'"):
        tsad.load(path, weights="b")


class Workspace:
    """Diffusion Policy's ``save_snapshot`` pickles the workspace itself."""

    def __init__(self) -> None:
        value = payload()
        self.cfg = value["cfg"]
        self.model, self.ema_model = (
            Tree(value["state_dicts"][name], lambda module: module)
            for name in ("model", "ema_model")
        )
        self.optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
        self._output_dir = None
        self.global_step, self.epoch = 3, 1


@pytest.mark.parametrize("old", [False, True])
def test_snapshots(tmp_path: Path, old: bool) -> None:
    options = {"_use_new_zipfile_serialization": not old}
    path = save(tmp_path / "latest.pkl", Workspace(), **options)
    assert isinstance(torch.load(path, pickle_module=dill, weights_only=False), Workspace)
    checkpoints.check_weights(path)
    workspace = Workspace()
    workspace.ema_model = None  # type: ignore[assignment]
    workspace.cfg.training.use_ema = False
    checkpoints.check_weights(save(path, workspace, **options), seed=2)


def test_modules_that_hold_themselves(tmp_path: Path) -> None:
    workspace = Workspace()
    workspace.ema_model._modules["again"] = workspace.ema_model
    with pytest.raises(CheckpointError, match="latest.pkl: expected a model of at most"):
        read_checkpoint(save(tmp_path / "latest.pkl", workspace))
    module: Any = torch.nn.Module()
    for _ in range(60):
        outer: Any = torch.nn.Module()
        outer.a = outer.b = module
        module = outer
    workspace.ema_model = module
    with pytest.raises(CheckpointError, match="latest.pkl: expected a model of at most"):
        read_checkpoint(save(tmp_path / "latest.pkl", workspace))


def test_the_commands_say_which_weights_they_took(tmp_path: Path, capsys: Any) -> None:
    from tsad.cli import main

    path = save(tmp_path / "x.ckpt", without_ema(False))
    assert main(["info", str(path)]) == 0
    assert "note: " in (said := capsys.readouterr().err) and "the raw ones are taken" in said
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    assert "the raw ones are taken" in capsys.readouterr().out
    assert main(["convert", str(path), str(tmp_path / "no"), "--weights", "ema"]) == 2
    assert "--weights raw" in capsys.readouterr().err
