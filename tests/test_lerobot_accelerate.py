"""`tsad.lerobot.accelerate`: the same random numbers, the same actions, and LeRobot's own policy.

Runs on a stand-in with LeRobot's interface; tests/test_lerobot_real.py runs LeRobot itself.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import lerobot_standin as standin
import numpy as np
import pytest
import torch
from torch_unet import Shape

import tsad
from tsad import Plan, lerobot, planners
from tsad.lerobot import patch, plugin
from tsad.lerobot.engine import Engine, Settings

SHAPE = Shape(down_dims=(16, 32), horizon=8)
BOUND = 2e-5  # of actions in [-1, 1]: float32 against the stand-in's float64 network


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    standin.install(monkeypatch)
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    yield
    patch.uninstall()
    patch.on_first_chunk = None


def make(seed: int = 0, **config: Any) -> standin.DiffusionPolicy:
    config = {"num_inference_steps": 10, "noise_scheduler_type": "DDIM"} | config
    return standin.DiffusionPolicy(standin.config(SHAPE, **config), SHAPE, seed).eval()


def episode(policy: Any, batch: int = 2, chunks: int = 3, seed: int = 0) -> torch.Tensor:
    """Chunks after a reset, LeRobot's global generator seeded."""
    conds = torch.randn(
        (chunks, batch, SHAPE.n_obs_steps * SHAPE.obs_dim),
        generator=torch.Generator().manual_seed(7),
    )
    torch.manual_seed(seed)
    policy.reset()
    return torch.stack([policy.predict_action_chunk(cond) for cond in conds])


@pytest.mark.parametrize(
    "config",
    [
        dict(noise_scheduler_type="DDIM", num_inference_steps=10),
        dict(noise_scheduler_type="DDPM", num_inference_steps=25),
        dict(noise_scheduler_type="DDPM", prediction_type="sample", clip_sample=False),
        dict(noise_scheduler_type="DDPM", beta_schedule="linear", num_inference_steps=20),
    ],
)
def test_actions_are_lerobots_own(config: dict[str, Any]) -> None:
    policy = make(**config)
    expected = episode(policy)
    state = torch.get_rng_state()
    assert lerobot.accelerate(policy) is policy and lerobot.is_accelerated(policy)
    got = episode(policy)
    assert (got - expected).abs().max() < BOUND * max(1.0, float(expected.abs().max()))
    assert torch.equal(torch.get_rng_state(), state)  # as many numbers were drawn
    assert lerobot.restore(policy) is policy and not lerobot.is_accelerated(policy)
    assert torch.equal(episode(policy), expected)


@torch.no_grad()
def test_given_noise_a_generator_and_other_batch_sizes() -> None:
    policy, plain = make(), make()
    lerobot.accelerate(policy)
    for batch in (1, 3, 2):
        cond = torch.randn(batch, SHAPE.n_obs_steps * SHAPE.obs_dim)
        noise = torch.randn(batch, SHAPE.horizon, SHAPE.action_dim)
        for given in ({"noise": noise}, {"generator": torch.Generator().manual_seed(3)}):
            twin = (
                {"generator": torch.Generator().manual_seed(3)} if "generator" in given else given
            )
            got = policy.predict_action_chunk(cond, **given)
            assert (got - plain.predict_action_chunk(cond, **twin)).abs().max() < BOUND


def test_copies_and_pickles_stay_accelerated_and_take_their_own_weights() -> None:
    policy = lerobot.accelerate(make())
    first = episode(policy)
    twin, pickled = copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))
    for other in (twin, pickled):
        assert lerobot.is_accelerated(other) and torch.equal(episode(other), first)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    plain = copy.deepcopy(twin)
    lerobot.restore(plain)
    assert (episode(twin) - episode(plain)).abs().max() < BOUND
    assert torch.equal(episode(policy), first)


def test_changed_weights_are_taken() -> None:
    policy, other = lerobot.accelerate(make(seed=0)), make(seed=1)
    episode(policy)
    policy.load_state_dict(other.state_dict())
    assert (episode(policy) - episode(other)).abs().max() < BOUND
    before = [p.data.clone() for p in policy.parameters()]
    for p in policy.parameters():  # as an EMA swaps: unseen until the next reset
        p.data = p.data * 0.9
    for p, old in zip(policy.parameters(), before, strict=True):
        p.data.copy_(old * 1.1)
    plain = copy.deepcopy(policy)
    lerobot.restore(plain)
    assert (episode(policy) - episode(plain)).abs().max() < BOUND


def test_gradients_are_lerobots() -> None:
    policy = lerobot.accelerate(make())
    cond = torch.randn(2, SHAPE.n_obs_steps * SHAPE.obs_dim)
    engine: Engine = policy.diffusion.__dict__["_tsad"]
    policy.diffusion.conditional_sample(2, global_cond=cond)  # gradients are on
    assert engine._policy is None  # it did not run here
    policy.predict_action_chunk(cond)
    assert engine._policy is not None
    assert not any("tsad" in name for name in policy.state_dict())


def test_in_training_mode_the_network_is_the_same() -> None:
    """A policy that nobody called ``eval()`` on, as LeRobot's own test of Push-T leaves it."""
    policy = make().train()
    expected = episode(policy)
    lerobot.accelerate(policy)
    assert (episode(policy) - expected).abs().max() < BOUND
    assert policy.training and policy.diffusion.__dict__["_tsad"]._policy is not None


def test_policies_that_nobody_accelerated_run_as_they_are() -> None:
    expected = episode(make())
    lerobot.accelerate(make(seed=3))
    assert torch.equal(episode(make()), expected)


def test_other_settings_sample_otherwise() -> None:
    policy, dense = make(), lerobot.accelerate(make())
    lerobot.accelerate(policy, num_inference_steps=4, precision="int8", threads=1)
    assert (episode(policy) - episode(dense)).abs().max() > 1e-3
    inner = policy.diffusion.__dict__["_tsad"]._policy
    assert inner.num_inference_steps == 4 and inner.precision == "int8"
    lerobot.accelerate(policy, sparsity=0.5)
    episode(policy)
    inner = policy.diffusion.__dict__["_tsad"]._policy
    assert inner.sparsity == 0.5
    lerobot.accelerate(policy, plan=planners.uniform_sparse(inner, 0.75))
    episode(policy)
    assert policy.diffusion.__dict__["_tsad"]._policy.sparsity >= 0.75


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(precision="int4"), "precision: expected one of"),
        (dict(sampler="euler"), "sampler"),
        (dict(num_inference_steps=101), "num_inference_steps"),
        (dict(sparsity=0.5, plan=object()), "plan, sparsity: expected one of the two"),
        (dict(plan=Plan([[0] * 4])), "plan: expected 10 steps x 8 blocks, as this policy has, got"),
        (dict(plan="x"), "plan: expected a tsad.Plan, a list with one per lane, or None, got str"),
        (
            dict(warm_start=4),
            "accelerate: unknown keyword 'warm_start'; known are sampler, num",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    policy = make()
    with pytest.raises((TypeError, ValueError), match=message):
        lerobot.accelerate(policy, **settings)
    assert not lerobot.is_accelerated(policy)


@pytest.mark.parametrize(
    "settings",
    [
        *(dict(threads=n) for n in (-1, 0, "2", 1000, True, 1.5)),
        *(dict(sparsity=s) for s in (2, -1, "x", "0.5", True, float("nan"))),
        dict(sparsity=0.99, num_inference_steps=6),
        *(dict(timestep_spacing=s) for s in ("x", 3)),
    ],
)
def test_they_are_refused_as_tsad_load_refuses_them(settings: dict[str, Any]) -> None:
    loaded = {"num_inference_steps": 10} | settings
    with pytest.raises((TypeError, ValueError)) as right:
        tsad.load("pusht", **loaded).planner = "uniform"
    policy = make()
    with pytest.raises(right.type) as got:
        lerobot.accelerate(policy, **settings)
    assert str(got.value) == str(right.value).replace("'pruner'", "'uniform'")
    assert not lerobot.is_accelerated(policy)


def test_other_policies_are_refused() -> None:
    with pytest.raises(TypeError, match="DiffusionPolicy or MultiTaskDiTPolicy, got torch"):
        lerobot.accelerate(torch.nn.Linear(1, 1))


# ---- without a line of code


def test_the_sidecar_and_the_variable_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.activate()
    plain = make()
    expected = episode(plain)
    assert plain.diffusion.__dict__["_tsad"] is None
    (tmp_path / "tsad.json").write_text("{}")
    policy = make(pretrained_path=tmp_path)
    assert (episode(policy) - expected).abs().max() < BOUND
    assert lerobot.is_accelerated(policy)
    (tmp_path / "tsad.json").write_text(json.dumps({"num_inference_steps": 4}))
    assert episode(make(pretrained_path=tmp_path)).sub(expected).abs().max() > 1e-3
    monkeypatch.setenv("TSAD", "off")
    assert torch.equal(episode(make(pretrained_path=tmp_path)), expected)
    monkeypatch.setenv("TSAD", "sampler=ddim, num_inference_steps=5,precision=int16")
    policy = make()
    episode(policy)
    settings = policy.diffusion.__dict__["_tsad"].settings
    assert settings == Settings(sampler="ddim", num_inference_steps=5, precision="int16")
    assert not settings.is_exact and Settings(threads=2).is_exact


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object of settings"),
        ("{", "expected a file with a JSON object of settings, got"),
        ('{"threads": -1}', "threads: expected an integer from 1 to 64, got -1"),
        ('{"steps": 4}', "unknown setting 'steps': expected only sampler"),
        ('{"precision": "int3"}', "precision: expected one of"),
    ],
)
def test_a_sidecar_that_does_not_fit_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tsad.json").write_text(text)
    with pytest.raises(ValueError, match=f"tsad.json: {message}"):
        plugin.wanted(tmp_path)


def test_a_variable_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TSAD", "fast")
    with pytest.raises(ValueError, match='TSAD: expected "exact", "off" or key=value'):
        plugin.wanted(None)


def test_a_value_that_does_not_fit_the_policy_is_named_with_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plugin.activate()
    caplog.set_level("INFO", "tsad")
    (tmp_path / "tsad.json").write_text('{"num_inference_steps": "8", "sampler": "ddim"}')
    with pytest.raises(ValueError, match=r"/tsad\.json: num_inference_steps: .* got '8'"):
        episode(make(pretrained_path=tmp_path))
    (tmp_path / "tsad.json").write_text('{"sparsity": "x"}')  # a TypeError of accelerate
    with pytest.raises(ValueError, match=r"/tsad\.json: sparsity: expected a number .* got 'x'"):
        episode(make(pretrained_path=tmp_path))
    monkeypatch.setenv("TSAD", "num_inference_steps=500")
    with pytest.raises(ValueError, match="^TSAD: num_inference_steps: .* got 500"):
        episode(make(pretrained_path=tmp_path))
    assert not caplog.records  # nothing says that tsad samples


@pytest.mark.parametrize("kind", ["folder", "dangling link"])
def test_a_sidecar_that_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "tsad.json"
    if kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("nothing")
    with pytest.raises(ValueError, match="tsad.json: expected a file with a JSON object .* remove"):
        plugin.wanted(tmp_path)


def test_a_wrong_variable_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """And by the first chunk: LeRobot logs what a plugin raises, and goes on."""
    monkeypatch.setenv("TSAD", "exat")
    with pytest.raises(ValueError, match='TSAD: expected "exact", "off" or key=value'):
        plugin.activate()
    with pytest.raises(ValueError, match='TSAD: expected "exact", "off" or key=value'):
        episode(make())


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """LeRobot's server of asynchronous inference, as far as tsad's stands on it, and tsad's."""
    from tsad.lerobot import policy_server

    class Theirs:
        def SendPolicyInstructions(self, request: Any, context: Any) -> str:  # noqa: N802
            self.policy = context
            return "answer"

    for name in ("lerobot.async_inference", "lerobot.async_inference.policy_server"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    theirs: Any = sys.modules["lerobot.async_inference.policy_server"]
    package: Any = sys.modules["lerobot.async_inference"]
    package.policy_server, theirs.PolicyServer = theirs, Theirs
    policy_server.activate()
    return theirs.PolicyServer()


def test_the_server_has_the_core_ready_before_the_first_chunk(server: Any, tmp_path: Path) -> None:
    policy = make(pretrained_path=tmp_path)
    assert server.SendPolicyInstructions(None, policy) == "answer"
    made = policy.diffusion.__dict__["_tsad"]._policy
    assert made is not None
    episode(policy, batch=1)
    assert policy.diffusion.__dict__["_tsad"]._policy is made
    assert server.SendPolicyInstructions(None, torch.nn.Linear(1, 1)) == "answer"  # another kind


def test_the_server_tells_the_client_what_does_not_fit(server: Any, tmp_path: Path) -> None:
    (tmp_path / "tsad.json").write_text('{"num_inference_steps": 500}')
    with pytest.raises(ValueError, match=r"tsad\.json: num_inference_steps: .* got 500"):
        server.SendPolicyInstructions(None, make(pretrained_path=tmp_path))
    assert server.policy is None
    broken = make(pretrained_path=tmp_path.parent)
    with torch.no_grad():
        next(broken.parameters())[:] = float("nan")
    with pytest.raises(ValueError, match="nan|finite"):  # found when the weights are taken
        server.SendPolicyInstructions(None, broken)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (
            "sys.modules['lerobot'] = None",
            'install it with: pip install "lerobot[async,diffusion]"',
        ),
        (
            "import lerobot_standin, os, types, _pytest.monkeypatch as m; "
            "lerobot_standin.install(m.MonkeyPatch()); os.environ['TSAD'] = 'exat'; "
            "p = types.ModuleType('lerobot.async_inference'); sys.modules[p.__name__] = p; "
            "p.policy_server = types.SimpleNamespace(PolicyServer=object); ",
            'TSAD: expected "exact", "off" or key=value',
        ),
    ],
)
def test_the_server_does_not_start_with_what_cannot_work(prepare: str, message: str) -> None:
    code = f"import sys; {prepare}\nimport tsad.lerobot.policy_server as s; s.main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("tsad.lerobot.policy_server: error: ") and message in done.stderr


def test_the_plugins_name_is_one_that_lerobot_finds() -> None:
    """LeRobot looks for the metadata's name, underscores and all."""
    import tomllib

    folder = Path(__file__).resolve().parents[1] / "plugins" / "lerobot_policy_tsad"
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "lerobot_policy_tsad"
    assert (folder / project["name"] / "__init__.py").is_file()


def test_numpy_is_enough_to_import() -> None:
    assert np.__name__  # tsad.lerobot itself asks for neither torch nor LeRobot
    code = "import sys, tsad.lerobot; assert not {'torch', 'lerobot'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
