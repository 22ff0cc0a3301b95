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


def test_every_contender_runs_what_was_written(tmp_path: Path) -> None:
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


def test_without_an_export_the_peers_that_read_it_are_left_out(
    monkeypatch: Any, capsys: Any
) -> None:
    def run(command: list[str], **_: Any) -> SimpleNamespace:
        failed = command[-1] in ("export", "compile")
        said = "Traceback\nModuleNotFoundError: onnxscript\n" if command[-1] == "export" else ""
        return SimpleNamespace(returncode=failed, stdout="5000000\n", stderr=said)

    monkeypatch.setattr(memory.subprocess, "run", run)
    rows = memory.bench("unet-small", 1)["contenders"]
    assert list(rows) == ["eager", *(f"tsad {p}" for p in memory.OURS)]
    said = capsys.readouterr().out
    for name in ("onnxruntime", "openvino"):
        assert f"{name}: left out: no ONNX file: ModuleNotFoundError: onnxscript" in said
    assert "compile: left out: ended with" in said  # killed, say: it said nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "argument --threads: expected 1 or more, got 0"),
        (["--out", "nowhere/at/all.json"], "argument --out: expected a file in a folder that exi"),
        (["--out", "."], "argument --out: expected a file in a folder that exists, got ."),
        (["--contender", "write"], "argument --contender: expected 2 arguments"),
        (["--cases", "unet"], "argument --cases: got unet"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_measured(
    options: list[str], message: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setattr(memory, "bench", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    with pytest.raises(SystemExit) as left:
        memory.main()
    assert left.value.code == 2 and message in capsys.readouterr().err


def test_a_case_given_twice_is_measured_once(monkeypatch: Any) -> None:
    measured: list[str] = []
    monkeypatch.setattr(memory, "bench", lambda key, _: measured.append(key))
    monkeypatch.setattr(sys, "argv", ["memory.py", "--cases", "encoder,dit,encoder"])
    memory.main()
    assert measured == ["encoder", "dit"]
