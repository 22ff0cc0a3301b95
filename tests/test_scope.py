"""What is not supported is refused in the words of one table, which README.md shows too."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lerobot_cases
import numpy as np
import pytest
from cases import config

import tsad
from tsad.config import PolicyConfig
from tsad.samplers import make_sampler
from tsad.scope import SCOPE, scope

PACKAGE = Path(tsad.__file__).parent


def changed(section: str, key: str, value: Any) -> Callable[[Path], Any]:
    """Reads a config.json that says so."""

    def read(folder: Path) -> Any:
        case = config("tiny")
        case[section][key] = value
        return PolicyConfig.from_dict(case)

    return read


def lerobot(kind: str) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        (folder / "config.json").write_text(json.dumps({"type": kind}))
        return tsad.load(folder)

    return load


def lerobot_dit(key: str, value: Any) -> Callable[[Path], Any]:
    """Loads a multi_task_dit of flow matching whose settings say so."""

    def load(folder: Path) -> Any:
        copied = lerobot_cases.copy("../lerobot_dit/flow_euler_mha_positions", folder / "dit")
        lerobot_cases.edit_json(copied / "config.json", **{key: value})
        return tsad.load(copied)

    return load


def checkpoint(path: str, value: Any) -> Callable[[Path], Any]:
    """Loads a Diffusion Policy checkpoint whose settings say so."""

    def load(folder: Path) -> Any:
        pytest.importorskip("dill")
        pytest.importorskip("omegaconf")
        import checkpoints

        payload = checkpoints.payload()
        *parents, key = path.split(".")
        place = payload["cfg"]
        for parent in parents:
            place = place[parent]
        place[key] = value
        checkpoints.save(folder / "x.ckpt", payload)
        return tsad.load(folder / "x.ckpt")

    return load


def twin(folder: Path) -> Any:
    pytest.importorskip("torch")
    from tsad.training.network import from_config

    return from_config({"obs_as_cond": False})


REFUSED = [
    ("devices", lambda _: tsad.load("pusht", device="cuda:0")),
    ("devices", lambda _: tsad.load("pusht", device="mps")),
    ("precisions", lambda _: tsad.load("pusht", precision="bfloat16")),
    ("samplers", lambda _: tsad.load("pusht", sampler="euler")),
    ("samplers", changed("scheduler", "prediction_type", "score")),
    ("samplers", changed("scheduler", "type", "flow_matching")),
    ("samplers", lambda _: make_sampler(config("tiny")["scheduler"], sampler="pndm")),
    ("networks", changed("network", "type", "mamba")),
    ("networks", changed("network", "time_as_cond", False)),
    ("networks", twin),
    ("samplers", lerobot_dit("integration_method", "heun")),
    ("checkpoints", lerobot("act")),
    ("checkpoints", checkpoint("policy._target_", "a.DiffusionUnetVideoPolicy")),
    ("networks", checkpoint("policy.model._target_", "a.Mamba")),
    ("networks", checkpoint("policy.pred_action_steps_only", True)),
    ("networks", checkpoint("policy.model.causal_attn", False)),
    ("samplers", checkpoint("policy.noise_scheduler._target_", "diffusers.PNDMScheduler")),
    ("samplers", checkpoint("policy.noise_scheduler.thresholding", True)),
]


@pytest.mark.parametrize(("row", "call"), REFUSED)
def test_refusals_quote_the_table(row: str, call: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        call(tmp_path)
    assert str(refused.value).endswith(f"({scope(row)})")
    assert SCOPE[row].not_yet in scope(row) and SCOPE[row].supported in scope(row)


def test_setup_refuses_other_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = PACKAGE.parent / "setup.py"
    if not setup.exists():
        pytest.skip("needs the source tree")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(PACKAGE.parent)
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    command = runpy.run_path(str(setup))["ParallelBuildExt"](setuptools.Distribution())
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="got win32") as refused:
        command.run()
    assert scope("systems") in str(refused.value)


def test_nothing_is_refused_in_other_words() -> None:
    """No string of the package, docstrings apart, speaks of support on its own."""
    found = []
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "scope.py"}:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if "support" in node.value and id(node) not in docs:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.value}")
    assert not found


def test_what_is_supported_runs() -> None:
    """The rows that one call can show: samplers, precisions, predictions."""
    obs = np.full((2, 20), 256, np.float32)
    for sampler in ("ddpm", "ddim", "dpmsolver++"):
        for precision in ("float32", "int16", "int8"):
            policy = tsad.load("pusht", sampler=sampler, num_inference_steps=2, precision=precision)
            policy.reset(seed=0)
            assert np.isfinite(policy(obs)).all()
    for kind in ("epsilon", "sample"):
        assert changed("scheduler", "prediction_type", kind)(Path()).scheduler
