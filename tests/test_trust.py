"""Whether a GPU is asked, at first use, if it computes what the CPU does: on the emulated one."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config, random_pruner, random_tensors
from policies import save_policy

import tsad
from tsad import _core, device, trust
from tsad.checkpoint import write_folder
from tsad.config import PolicyConfig

STEPS: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 3}


@pytest.fixture(autouse=True)
def cache(emulated_cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    monkeypatch.delenv("TSAD_TRUST", raising=False)
    monkeypatch.delenv("TSAD_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tsad" / "trusted"


def load(folder: str, **options: Any) -> tsad.SparsePolicy:
    return tsad.load(folder, device="cuda", **STEPS | options)


def test_it_is_asked_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each model, GPU, driver and build."""
    asked = []
    right = trust.problem_of
    monkeypatch.setattr(trust, "problem_of", lambda *of: asked.append(1) or right(*of))
    one, other = save_policy(tmp_path / "one"), save_policy(tmp_path / "other", seed=1)

    def times(folder: str, **options: Any) -> int:
        asked.clear()
        load(folder, **options)
        return len(asked)

    assert times(one) == 1 and len(list(cache.iterdir())) == 1
    assert times(one) == times(one, lanes=3) == 0
    assert times(other) == 1 and times(one, num_inference_steps=4) == 1
    with monkeypatch.context() as patch:
        patch.setattr(device, "identity", lambda: "another driver")
        assert times(one) == 1
        patch.setattr(trust, "sha256", lambda path: "another build")
        assert times(one) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one" / "config.json"))  # no folder
    assert times(one) == times(one) == 1
    monkeypatch.setenv("TSAD_TRUST", "1")
    assert times(one) == 0


def plant(monkeypatch: pytest.MonkeyPatch, tensor: str, pruner: bool = False) -> None:
    """From now on a GPU's model has other numbers in this tensor."""
    loading = import_module("tsad.load")
    right = loading.make_model

    def wrong(parsed: Any, tensors: Any, pruned: Any, *args: Any, **options: Any) -> Any:
        if options.get("backend") is not None:
            tensors, pruned = dict(tensors), None if pruned is None else dict(pruned)
            named = pruned if pruner else tensors
            named[tensor] = named[tensor] * np.float32(1.01)
        return right(parsed, tensors, pruned, *args, **options)

    monkeypatch.setattr(loading, "make_model", wrong)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (
            "decoder.layers.0.self_attn.in_proj_weight",
            "step 0, block 'layers.0.self_attn' (compute",
        ),
        ("decoder.layers.1.linear2.weight", "step 0, block 'layers.1.feed_forward' (compute"),
        ("input_emb.weight", "without any block computed"),
    ],
)
def test_the_first_cell_that_differs_is_said(
    tensor: str, said: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_policy(tmp_path / "policy")
    plant(monkeypatch, tensor)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(RuntimeError, match="^device: expected a GPU that computes") as refused:
            load(folder)
        assert said in str(refused.value) and "emulated" in str(refused.value)
        assert not cache.exists()
    tsad.load(folder, **STEPS)
    monkeypatch.setenv("TSAD_TRUST", "1")
    load(folder)


def test_a_pruner_is_asked_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = config("tiny", pruner=True, prediction_type="sample", clip_sample=False)
    pruner = random_pruner(case["pruner"], case["network"], 0)
    tensors = random_tensors(case["network"], 0)
    write_folder(tmp_path / "policy", PolicyConfig.from_dict(case), tensors, pruner)
    folder = str(tmp_path / "policy")
    with monkeypatch.context() as patch:
        plant(patch, next(name for name in pruner if name.endswith("weight")), pruner=True)
        with pytest.raises(RuntimeError, match=r"whose pruner score \[\d+, \d+, \d+\] is"):
            load(folder)
    load(folder)


def test_products_of_cublas_are_asked_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one lane no product has the rows for it by itself; in more lanes some may."""
    folder, right = save_policy(tmp_path / "policy"), trust.Comparison.problem

    def problem(self: trust.Comparison) -> str | None:
        return right(self) or (os.environ.get("TSAD_CUDA_BLAS") == "1" and "it is wrong") or None

    monkeypatch.setattr(trust.Comparison, "problem", problem)
    with pytest.raises(RuntimeError, match=r"it is wrong, with cuBLAS 0\.0\.1: TSAD_CUDA_BLAS=0"):
        load(folder)
    assert "TSAD_CUDA_BLAS" not in os.environ
    monkeypatch.setenv("TSAD_CUDA_BLAS", "0")
    load(folder)
