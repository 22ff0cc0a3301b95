"""tsad.load: every kind of source, every argument, and what is said when they are wrong."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest

import tsad
from tsad.checkpoint import CheckpointError, write_folder
from tsad.config import PolicyConfig
from tsad.load import THREADS_PER_LANE, bundled, usable_cpus

ASSET = Path(tsad.__file__).parent / "assets" / "pusht"


def a_folder(path: Path, *, pruner: bool = False) -> Path:
    config = cases.config("tiny", pruner=pruner, num_train_timesteps=20, num_inference_steps=20)
    network = config["network"]
    extra = cases.random_pruner(config["pruner"], network, 2) if pruner else None
    tensors = cases.random_tensors(network, 1)
    write_folder(path, PolicyConfig.from_dict(config), tensors, extra, dtype="float32")
    return path


def actions(policy: Any, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (policy.lanes, policy.n_obs_steps, policy.obs_dim)
    policy.reset(seed=0)
    return policy(rng.random(shape, np.float32))


def test_bundled() -> None:
    assert bundled() == ["pusht", "pusht_corners", "pusht_pixels"]
    policy = tsad.load("pusht", num_inference_steps=4, sampler="ddim", lanes=2)
    assert (policy.horizon, policy.n_obs_steps, policy.n_action_steps) == (10, 2, 8)
    assert (policy.obs_dim, policy.action_dim, len(policy.blocks)) == (20, 2, 24)
    assert policy.num_inference_steps == 4 and policy.lanes == 2
    assert policy.device == "cpu" and policy.precision == "float32"
    obs = np.full((2, 2, 20), 256, np.float32)
    policy.reset(seed=0)
    result = policy(obs)
    assert result.shape == (2, 8, 2) and (result > 0).all() and (result < 512).all()


def test_a_folder_by_str_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_folder(tmp_path / "pusht")
    expected = actions(tsad.load(folder))
    np.testing.assert_array_equal(actions(tsad.load(str(folder))), expected)
    # a name is the bundled policy's, whatever lies in the current folder
    monkeypatch.chdir(tmp_path)
    assert tsad.load("pusht").obs_dim == 20
    assert tsad.load("./pusht").obs_dim == tsad.load(Path("pusht")).obs_dim == 6


def test_a_folder_with_a_pruner_plans_with_it(tmp_path: Path) -> None:
    policy = tsad.load(a_folder(tmp_path / "with", pruner=True))
    assert policy.planner == "pruner"
    assert tsad.load(a_folder(tmp_path / "without")).planner == "uniform"


def test_the_bundled_pruner_works_when_it_is_chosen() -> None:
    assert tsad.load("pusht", sparsity=0.95).planner == "uniform"
    policy = tsad.load("pusht", planner="pruner")
    obs = np.full((policy.n_obs_steps, policy.obs_dim), 256, np.float32)
    policy.reset(seed=0)
    policy(obs)  # the first chunk of a pruner is dense
    for dial in (None, 0.95, 0.9):
        if dial is not None:
            policy.sparsity = dial
        assert policy.sparsity == dial
        policy(obs)
        low, high = (0.8, 0.99) if dial is None else (dial, dial + 0.005)
        assert low <= policy.plan.sparsity <= high


def test_planner_and_dial_can_be_given(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "with", pruner=True)
    for given, planner, sparsity in (
        ({}, "pruner", 0.0),
        ({"sparsity": 0.5}, "pruner", 0.5),
        ({"planner": "pruner"}, "pruner", None),
        ({"planner": "uniform", "sparsity": 0.5}, "uniform", 0.5),
        ({"planner": "dense"}, "dense", 0.0),
    ):
        policy = tsad.load(folder, **given)
        assert (policy.planner, policy.sparsity) == (planner, sparsity)
        policy.planner = "uniform"
        policy.sparsity = 0.25
        again = pickle.loads(pickle.dumps(policy))
        assert (again.planner, again.sparsity) == ("uniform", 0.25)
    for wrong, error in (
        ({"planner": "best"}, "planner: .* got 'best'"),
        ({"sparsity": 2}, "sparsity: .* got 2"),
        ({"sparsity": ""}, "sparsity: .* got ''"),
        ({"planner": "pruner", "warm_start": 2}, "planner: got 'pruner'"),
    ):
        with pytest.raises((ValueError, TypeError), match=error):
            tsad.load(folder, **wrong)


def test_a_planner_of_ones_own_can_be_given(tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "with", pruner=True)
    own, rule = tsad.planners.uniform_sparse, tsad.planners.RowRule("fbcache", 0.4)
    policy = tsad.load(folder, planner=own, sparsity=0.5)
    assert policy.planner is own and policy.sparsity == 0.5
    assert tsad.load(folder, planner=own).sparsity == 0.0
    policy = tsad.load(folder, planner=rule)
    assert policy.planner is rule and policy.sparsity is None
    with pytest.raises(ValueError, match="sparsity: expected None, as RowRule"):
        tsad.load(folder, planner=rule, sparsity=0.5)
    with pytest.raises(ValueError, match="planner: got RowRule.* but the preset 'fast'"):
        tsad.load("pusht", planner=rule, preset="fast")


def test_a_pruner_that_is_not_the_default_waits_to_be_chosen(tmp_path: Path) -> None:
    """Then the dial is that of a policy without any, to the bit, at any dial."""
    folder, without = a_folder(tmp_path / "with", pruner=True), a_folder(tmp_path / "without")
    config = json.loads((folder / "config.json").read_text())
    config["pruner"]["default"] = False
    (folder / "config.json").write_text(json.dumps(config))
    policy, other = tsad.load(folder), tsad.load(without)
    assert policy.planner == "uniform"
    for sparsity in (0.0, 0.5, 0.9):
        policy.sparsity = other.sparsity = sparsity
        assert policy.plan == other.plan
        np.testing.assert_array_equal(actions(policy), actions(other))
    policy.planner = "pruner"
    policy.sparsity = None
    assert "'pruner', its own sparsity" in repr(policy)
    actions(policy)
    policy(np.ones((policy.n_obs_steps, policy.obs_dim), np.float32))
    assert policy.plan.sparsity > 0


def test_a_checkpoint_equals_its_converted_folder(tmp_path: Path) -> None:
    checkpoints = pytest.importorskip("checkpoints")
    from tsad.convert import convert

    source = checkpoints.save(tmp_path / "latest.ckpt", checkpoints.payload())
    convert(source, tmp_path / "folder")
    policy = tsad.load(source)
    np.testing.assert_array_equal(actions(policy), actions(tsad.load(tmp_path / "folder")))
    assert policy.config["provenance"]["weights"] == "ema"


def test_sampler_and_steps_override_the_checkpoint(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    assert tsad.load(folder).num_inference_steps == 20
    policy = tsad.load(folder, sampler="dpmsolver++", num_inference_steps=5)
    assert len(policy.timesteps) == policy.num_inference_steps == 5


def test_threads_default_to_what_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() >= 1
    import tsad.policy

    seen = []

    class Spy:
        def __init__(self, model: Any, **options: Any) -> None:
            seen.append((options["lanes"], options["threads"]))

    monkeypatch.setattr(tsad.policy, "SparsePolicy", Spy)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(1000)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
    tsad.load("pusht")
    tsad.load("pusht", lanes=3)
    tsad.load("pusht", lanes=1000)
    tsad.load("pusht", threads=2)
    monkeypatch.setattr(Path, "read_text", lambda _: "150000 100000\n")  # a container's quota
    tsad.load("pusht")
    assert seen == [(1, THREADS_PER_LANE), (3, 3 * THREADS_PER_LANE), (1000, 64), (1, 2), (1, 2)]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lanes": 0}, ValueError, "lanes: expected an integer from 1 to .*, got 0"),
        ({"lanes": -1}, ValueError, "lanes: .*got -1"),
        ({"lanes": 1.0}, TypeError, r"lanes: .*1\.0 \(float\)"),
        ({"lanes": True}, TypeError, "lanes"),
        ({"threads": 0}, ValueError, "threads: expected an integer from 1 to 64, got 0"),
        ({"threads": "2"}, TypeError, "threads"),
        (
            {"device": "cuda"},
            ValueError,
            "device: expected \"cpu\", got 'cuda', which is .*not yet: CUDA",
        ),
        ({"device": "cuda:1"}, ValueError, "device: .*'cuda:1'"),
        ({"device": "tpu"}, ValueError, "device: .*'tpu'"),
        (
            {"precision": "bfloat16"},
            ValueError,
            "precision: .*'auto', 'float32', 'int16', 'int8' on device 'cpu', got 'bfloat16'",
        ),
        ({"sampler": "euler"}, ValueError, "sampler: .*ddpm.*ddim.*got 'euler'"),
        ({"num_inference_steps": 0}, ValueError, "num_inference_steps: .*1 to 100"),
        ({"num_inference_steps": 101}, ValueError, "num_inference_steps: .*got 101"),
        ({"num_inference_steps": 2.5}, ValueError, "num_inference_steps: .*got 2.5"),
    ],
)
def test_arguments_are_refused_by_name(options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        tsad.load("pusht", **options)


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'pusht'.*LeRobot folder.*ckpt.*got 'puhst'"):
        tsad.load("puhst")
    for path in ("nowhere/at/all", "latest.ckpt", tmp_path / "x"):
        with pytest.raises(FileNotFoundError, match="source: "):
            tsad.load(path)
    with pytest.raises(TypeError, match="source: .*got int"):
        tsad.load(3)
    with pytest.raises(ValueError, match=r"source: .*no config\.json"):
        tsad.load(tmp_path)
    a_folder(tmp_path / "folder")
    with pytest.raises(ValueError, match="source: .*give the folder"):
        tsad.load(tmp_path / "folder" / "model.safetensors")
    (tmp_path / "x.ckpt").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        tsad.load(tmp_path / "x.ckpt")


def test_the_folder_of_a_training_under_way(tmp_path: Path) -> None:
    (tmp_path / "training.pt.lock").touch()  # from the first step on; the state comes later
    with pytest.raises(ValueError, match="has no config.json; a training in it has not ended: wa"):
        tsad.load(tmp_path)


def test_lerobot_folders_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"type": "diffusion", "horizon": 16}')
    with pytest.raises(ValueError, match="config.json: input_features: expected an object"):
        tsad.load(tmp_path)
    (tmp_path / "config.json").write_text('{"type": "act"}')
    with pytest.raises(ValueError, match="type: expected a LeRobot policy of type"):
        tsad.load(tmp_path)


@pytest.mark.parametrize("size", [0, 100, 20_000, -1])
def test_truncated_weights(tmp_path: Path, size: int) -> None:
    folder = shutil.copytree(ASSET, tmp_path / "copy")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:size])
    with pytest.raises(CheckpointError, match=r"copy/model\.safetensors: .*truncated"):
        tsad.load(folder)


def test_loading_imports_numpy_only() -> None:
    """Not torch and not safetensors, even where they are installed; nor what converts pickles."""
    code = (
        "import sys, tsad\n"
        "tsad.load('pusht', num_inference_steps=2)\n"
        "heavy = {'torch', 'safetensors', 'omegaconf', 'dill', 'diffusers', 'matplotlib', 'rich'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
