"""docs/own_robot.md runs from top to bottom, in an empty folder."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run

import tsad
from tsad.sim.recording import read_collection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_robot.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="needs the source tree")


@pytest.mark.slow  # nothing that other tests have not shown a sanitizer
def test_the_page_runs(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(tsad.sim.simulators, "_REGISTRY", dict(tsad.sim.simulators._REGISTRY))
    threads = torch.get_num_threads()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.S | re.M)
    assert [kind for kind, _ in blocks].count("python") == 4
    try:
        torch.set_num_threads(1)
        for kind, text in blocks:
            if text.startswith("# reach.py\n"):
                Path("reach.py").write_text(text)
            elif kind == "python":
                exec(compile(text, PAGE.name, "exec"), {})
            else:
                assert kind == "sh"
                for line in text.splitlines():
                    program, *words = shlex.split(line)
                    assert program == "tsad"
                    code, _, err = run(capsys, *words)
                    assert code == 0, f"{line}\n{err}"
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("reach", None)

    # what it says came of it
    settings, episodes = read_collection(Path("recorded"))
    assert len(episodes) == 8 and "model.safetensors" in settings["files_sha256"]
    policy = tsad.load("policy")
    ends = np.load("demos.npz")["episode_ends"]
    assert len(ends) == 200 and ends[-1] < 200 * 60  # the demonstrator arrives
    for name in ("plan", "better", "from-demos"):
        plan = tsad.Plan.load(f"{name}.npz")
        assert plan.sparsity >= 0.7 - 1e-9
        policy.plan = plan
    dense = json.loads(Path("dense.json").read_text())
    assert dense["settings"]["simulator"] == "reach:Reach"
    assert dense["summary"]["score"]["mean"] > 0.75  # standing still scores 0.2
    frontier = json.loads(Path("offline/tune.json").read_text())
    assert frontier["simulator"] is None and len(frontier["rows"]) > 5
    assert read_collection(Path("collected"))[0]["simulator"] == "reach:Reach"


def test_what_the_page_names_is_there() -> None:
    names = re.findall(r"`(tsad\.[\w.]+)[`(]", PAGE.read_text())
    assert len(names) > 5
    for name in names:
        pkgutil.resolve_name(name)
