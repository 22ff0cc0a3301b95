"""bench/memory.py: what a contender holds."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import memory  # noqa: E402

SMALL = memory.CASES["unet-small"].__class__()  # a network of a few kilobytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_resident_memory_is_what_is_held() -> None:
    before = memory.resident()
    held = np.ones(50_000_000, np.uint8)
    assert 45e6 < memory.resident() - before < 60e6
    del held
    assert abs(memory.resident() - before) < 5e6


def test_every_contender_runs_what_was_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(memory.torch.onnx, "export", lambda *_, **__: None)
    memory.write(SMALL, tmp_path)
    weights = memory.weights_of(tmp_path)
    assert list(weights) == list(SMALL.weights(0))
    right = memory.networks.twin(SMALL).predict(SMALL, SMALL.weights(0), *memory.inputs(SMALL))
    eager = memory.theirs(SMALL, tmp_path, "eager", 1)().numpy()
    assert np.abs(eager - right.numpy()).max() < 1e-5
    for precision in memory.OURS:
        assert np.isfinite(memory.ours(SMALL, tmp_path, precision, 1)()).all()


def test_a_contender_that_does_not_run_is_said(monkeypatch: Any, capsys: Any) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        name = command[-1]
        return SimpleNamespace(
            returncode=name == "openvino",
            stdout=f"noise\n{len(name)}000000\n",
            stderr="a\nno wheel\n",
        )

    monkeypatch.setattr(memory.subprocess, "run", run)
    rows = memory.bench("unet-small", 1)["contenders"]
    assert list(rows) == ["eager", "compile", "onnxruntime", *(f"tsad {p}" for p in memory.OURS)]
    assert rows["eager"] == {"bytes": 5_000_000}
    assert "openvino: left out: no wheel" in capsys.readouterr().out
