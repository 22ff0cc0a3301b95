"""Diffusion Policy's UNet checkpoints: its actions, by its own scheduler, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
dill = pytest.importorskip("dill")
omegaconf = pytest.importorskip("omegaconf")
diffusers = pytest.importorskip("diffusers")

import checkpoints  # noqa: E402
from command_line import run  # noqa: E402
from torch_conditional_unet import ConditionalUnet1D  # noqa: E402
from torch_oracle import run_diffusers  # noqa: E402

import tsad  # noqa: E402
from tsad.checkpoint import CheckpointError, read_folder  # noqa: E402
from tsad.convert import convert, read_checkpoint  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*observation encoder stays outside:UserWarning")
N_OBS, HORIZON, OBS, ACTION = 2, 8, 5, 3
SHAPE = {
    "diffusion_step_embed_dim": 16,
    "down_dims": [16, 24, 32],
    "kernel_size": 5,
    "n_groups": 8,
    "cond_predict_scale": True,
}
POLICIES = "diffusion_policy.policy.diffusion_unet"
HYBRID = f"{POLICIES}_hybrid_image_policy.DiffusionUnetHybridImagePolicy"
IMAGE = f"{POLICIES}_image_policy.DiffusionUnetImagePolicy"


def settings(**shape: Any) -> dict[str, Any]:
    """Those of train_diffusion_unet_lowdim_workspace.yaml, small."""
    return {
        "name": "train_diffusion_unet_lowdim",
        "task": {"name": "toy_lowdim", "obs_dim": OBS, "action_dim": ACTION},
        "obs_dim": "${task.obs_dim}",
        "action_dim": "${task.action_dim}",
        "horizon": HORIZON,
        "n_obs_steps": N_OBS,
        "n_action_steps": 4,
        "n_latency_steps": 1,
        "obs_as_local_cond": False,
        "obs_as_global_cond": True,
        "policy": {
            "_target_": f"{POLICIES}_lowdim_policy.DiffusionUnetLowdimPolicy",
            "model": {
                "_target_": "diffusion_policy.model.diffusion.conditional_unet1d.ConditionalUnet1D",
                "input_dim": "${eval: ${task.action_dim} if ${obs_as_local_cond} or "
                "${obs_as_global_cond} else ${task.obs_dim} + ${task.action_dim}}",
                "local_cond_dim": "${eval: ${task.obs_dim} if ${obs_as_local_cond} else None}",
                "global_cond_dim": "${eval: ${task.obs_dim}*${n_obs_steps} if "
                "${obs_as_global_cond} else None}",
                **copy.deepcopy(SHAPE | shape),
            },
            "noise_scheduler": copy.deepcopy(checkpoints.DDPM),
            "horizon": "${horizon}",
            "obs_dim": "${obs_dim}",
            "action_dim": "${action_dim}",
            "n_action_steps": "${eval:'${n_action_steps}+${n_latency_steps}'}",
            "n_obs_steps": "${n_obs_steps}",
            "num_inference_steps": 100,
            "obs_as_local_cond": "${obs_as_local_cond}",
            "obs_as_global_cond": "${obs_as_global_cond}",
            "pred_action_steps_only": False,
            "oa_step_convention": True,
        },
        "training": {"use_ema": True},
    }


def image_settings(target: str, **shape: Any) -> dict[str, Any]:
    """The policy makes its own network and has an encoder."""
    config = settings()
    policy = config["policy"]
    for key in ("model", "obs_dim", "action_dim", "obs_as_local_cond", "oa_step_convention"):
        del policy[key]
    policy |= {"_target_": target, "shape_meta": {"action": {"shape": [ACTION]}}, **SHAPE | shape}
    policy |= {"obs_encoder": {"_target_": "x"}} if target == IMAGE else {"crop_shape": [76, 76]}
    policy["noise_scheduler"] = {
        "_target_": "diffusers.schedulers.scheduling_ddim.DDIMScheduler",
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "set_alpha_to_one": True,
        "steps_offset": 0,
    }
    policy["num_inference_steps"] = 5
    return config


class Policy(torch.nn.Module):
    """What a checkpoint's state dicts are of."""

    def __init__(self, seed: int, encoder: bool = False, local: bool = False, **shape: Any) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self._dummy_variable = torch.nn.Parameter(torch.zeros(0))
        if encoder:
            self.obs_encoder = torch.nn.Linear(3, 3)
        unet = SHAPE | shape | ({"local_cond_dim": 4} if local else {})
        self.model = ConditionalUnet1D(ACTION, N_OBS * OBS, **unet)
        self.normalizer = torch.nn.Module()
        self.normalizer.params_dict = torch.nn.ParameterDict()
        for key, dim in (("action", ACTION), ("rgb" if encoder else "obs", OBS)):
            numbers = {"scale": 0.5 + torch.rand(dim), "offset": torch.rand(dim) - 0.5}
            parameters = {k: torch.nn.Parameter(v, False) for k, v in numbers.items()}
            self.normalizer.params_dict[key] = torch.nn.ParameterDict(parameters)

    def numbers(self, key: str) -> tuple[Any, Any]:
        part = self.normalizer.params_dict[key]  # type: ignore[index]
        return part["scale"].double(), part["offset"].double()


def save(path: Path, config: dict[str, Any], policy: Policy, other: Policy | None = None) -> Path:
    payload = {
        "cfg": omegaconf.OmegaConf.create(config),
        "state_dicts": {
            "model": (other or policy).state_dict(),
            "ema_model": policy.state_dict(),
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        },
        "pickles": {"global_step": dill.dumps(10)},
    }
    return checkpoints.save(path, payload)


def predicted_actions(policy: Policy, config: dict[str, Any], obs: Any, noise: Any) -> Any:
    """Diffusion Policy's predict_action in float64, all of the horizon; noise (K, N, T, A)."""
    given = dict(config["policy"]["noise_scheduler"])
    scheduler = getattr(diffusers, given.pop("_target_").rpartition(".")[2])(**given)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(config["policy"]["num_inference_steps"])
    network = copy.deepcopy(policy.model).double()
    condition = torch.from_numpy(obs).double()
    if "obs" in policy.normalizer.params_dict:  # type: ignore[operator]
        scale, offset = policy.numbers("obs")
        condition = condition * scale + offset

    def predict(k: int, x: Any) -> Any:
        return network(x, scheduler.timesteps[k].expand(len(x)), condition.flatten(1))

    with torch.no_grad():
        sample = torch.from_numpy(run_diffusers(scheduler, noise, predict, torch.float64))
    scale, offset = policy.numbers("action")
    return ((sample - offset) / scale).numpy()


SHAPES: dict[str, dict[str, Any]] = {
    "as configured": {},
    "bias alone": {"cond_predict_scale": False},
    "kernel 3": {"kernel_size": 3, "n_groups": 4},
    "kernel 7": {"kernel_size": 7, "down_dims": [8, 16], "cond_predict_scale": False},
    "one level": {"down_dims": [16]},
    "four levels": {"down_dims": [8, 16, 16, 24]},
}


@pytest.mark.parametrize("what", SHAPES)
def test_actions_are_those_of_the_module(what: str, tmp_path: Path) -> None:
    shape = SHAPES[what]
    config, policy = settings(**shape), Policy(1, **shape)
    if what != "as configured":  # all hundred DDPM steps once
        config["policy"]["num_inference_steps"] = 10
    path = save(tmp_path / "latest.ckpt", config, policy)
    ours = tsad.load(path, lanes=2)
    convert(path, tmp_path / "folder")
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (2, N_OBS, OBS)).astype(np.float32)
    steps = ours.num_inference_steps
    noise = rng.standard_normal((steps, 2, HORIZON, ACTION), np.float32)
    expected = predicted_actions(policy, config, obs, noise)
    got = ours(obs, noise=noise, return_horizon=True)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())
    assert ours.n_action_steps == 5  # n_latency_steps is 1
    other = tsad.load(tmp_path / "folder", lanes=2)
    np.testing.assert_array_equal(other(obs, noise=noise), got[:, N_OBS - 1 : N_OBS + 4])


@pytest.mark.parametrize("target", [HYBRID, IMAGE])
def test_image_policies_take_encoded_observations(target: str, tmp_path: Path) -> None:
    config, policy = image_settings(target), Policy(1, encoder=True)
    path = save(tmp_path / "latest.ckpt", config, policy)
    with pytest.warns(UserWarning, match=f"observation encoder stays outside: .*{OBS} numbers"):
        ours = tsad.load(path)
    assert (ours.obs_dim, ours.action_dim, ours.num_inference_steps) == (OBS, ACTION, 5)
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (1, N_OBS, OBS)).astype(np.float32)
    noise = rng.standard_normal((5, 1, HORIZON, ACTION), np.float32)
    expected = predicted_actions(policy, config, obs, noise)
    got = ours(obs, noise=noise, return_horizon=True)
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_both_sets_of_weights_and_the_classes_defaults(tmp_path: Path) -> None:
    """Without settings of the network it is what ConditionalUnet1D is by itself: kernel 3, bias."""
    config = settings()
    for key in ("kernel_size", "n_groups", "cond_predict_scale"):
        del config["policy"]["model"][key]
    own = {"kernel_size": 3, "n_groups": 8, "cond_predict_scale": False}
    averaged, raw = Policy(1, **own), Policy(2, **own)
    path = save(tmp_path / "latest.ckpt", config, averaged, raw)
    for weights, policy in (("ema", averaged), ("raw", raw)):
        found = read_checkpoint(path, weights=weights)
        state = policy.model.state_dict()
        name = "up_modules.0.1.blocks.0.block.0.weight"
        tensor = found.tensors["up_modules.0.1.conv1.block.0.weight"]
        np.testing.assert_array_equal(tensor, state[name].numpy())
        assert len(found.tensors) == len(state)
        network = found.config.network.to_dict()
        assert (network["kernel_size"], network["use_film_scale_modulation"]) == (3, False)
        assert found.config.provenance["weights"] == weights
    hybrid = image_settings(HYBRID)
    for key in ("kernel_size", "n_groups", "cond_predict_scale"):
        del hybrid["policy"][key]
    found = read_checkpoint(save(tmp_path / "h.ckpt", hybrid, Policy(1, encoder=True)))
    network = found.config.network.to_dict()
    assert (network["kernel_size"], network["use_film_scale_modulation"]) == (5, True)


def test_a_snapshot_of_the_whole_workspace(tmp_path: Path) -> None:
    policy = Policy(1)

    class TrainDiffusionUnetLowdimWorkspace:
        pass

    workspace = TrainDiffusionUnetLowdimWorkspace()
    workspace.__dict__ |= {"cfg": omegaconf.OmegaConf.create(settings()), "ema_model": policy}
    one = read_checkpoint(checkpoints.save(tmp_path / "snapshot.pkl", workspace))
    two = read_checkpoint(save(tmp_path / "latest.ckpt", settings(), policy))
    assert one.tensors.keys() == two.tensors.keys()
    for name, value in two.tensors.items():
        np.testing.assert_array_equal(one.tensors[name], value)


def edited(**keys: Any) -> dict[str, Any]:
    """Settings with dotted keys (a__b) changed; ``...`` takes one out."""
    config = settings()
    for path, value in keys.items():
        *parents, key = path.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place.pop(key) if value is ... else place.update({key: value})
    return config


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "local condition": (
        edited(obs_as_local_cond=True, obs_as_global_cond=False),
        "obs_as_local_cond: expected false, got true, a local condition",
    ),
    "inpainting": (
        edited(obs_as_global_cond=False),
        "obs_as_global_cond: expected true, got false, which is inpainting",
    ),
    "inpainting by default": (
        edited(policy__obs_as_global_cond=...),
        "obs_as_global_cond: expected true, got false, which is inpainting",
    ),
    "window": (
        edited(policy__oa_step_convention=False),
        "oa_step_convention: expected true, got false",
    ),
    "window by default": (
        edited(policy__oa_step_convention=...),
        "oa_step_convention: expected true, got false",
    ),
    "steps alone": (
        edited(policy__pred_action_steps_only=True),
        "pred_action_steps_only: expected false",
    ),
    "network": (
        edited(policy__model___target_="x.TransformerForDiffusion"),
        "policy.model._target_: expected ConditionalUnet1D, got 'x.TransformerForDiffusion'",
    ),
    "unknown setting": (edited(policy__guidance=2), "policy.guidance: expected no such setting"),
    "horizon": (edited(horizon=6), "policy.horizon: expected a multiple of 4"),
    "too many actions": (
        edited(n_action_steps=7),
        r"policy.horizon: expected at least n_obs_steps - 1 \+ n_action_steps = 9",
    ),
    "widths": (edited(policy__model__down_dims=[8, 9]), "policy.down_dims: expected numbers div"),
    "kernel": (edited(policy__model__kernel_size=4), "policy.kernel_size: expected an odd number"),
    "other kernel": (
        edited(policy__model__kernel_size=3),
        "mid_modules.0.blocks.0.block.0.weight: expected shape",
    ),
    "fewer levels": (edited(policy__model__down_dims=[16, 24]), "expected"),
    "obs_dim": (edited(task__obs_dim=OBS + 1), r"cond_encoder.1.weight: expected shape"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_by_name(what: str, tmp_path: Path) -> None:
    config, match = REFUSED[what]
    path = save(tmp_path / "latest.ckpt", config, Policy(1))
    with pytest.raises(ValueError, match=match) as refused:
        tsad.load(path)
    assert str(path) in str(refused.value)
    with pytest.raises(ValueError, match=match):
        convert(path, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def damaged(change: Callable[[dict[str, Any]], Any], path: Path, config: Any = None) -> Path:
    policy = Policy(1, encoder=config is not None)
    state = dict(policy.state_dict())
    change(state)
    payload = {
        "cfg": omegaconf.OmegaConf.create(config or settings()),
        "state_dicts": {"ema_model": state},
    }
    return checkpoints.save(path, payload)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path, name = tmp_path / "x.ckpt", "model.down_modules.0.0.blocks.0.block.0.weight"
    with pytest.raises(CheckpointError, match="local_cond_dim: expected null, got a local cond"):
        read_checkpoint(save(path, settings(), Policy(1, local=True)))
    with pytest.raises(CheckpointError, match=r"down_modules.0.0.blocks.0.block.0.weight"):
        read_checkpoint(damaged(lambda state: state.pop(name), path))
    with pytest.raises(CheckpointError, match="down_modules.0.0.conv1.block.0.weight"):
        # the name of LeRobot's, which is none of this file's
        read_checkpoint(
            damaged(lambda s: s.update({name.replace("blocks.0", "conv1"): s[name]}), path)
        )
    with pytest.raises(CheckpointError, match="model.final_conv.1.weight: expected this tensor"):
        read_checkpoint(damaged(lambda state: state.pop("model.final_conv.1.weight"), path))
    with pytest.raises(CheckpointError, match="normalizer.params_dict.obs.scale: expected a tens"):
        read_checkpoint(damaged(lambda s: s.pop("normalizer.params_dict.obs.scale"), path))
    condition = "model.mid_modules.0.cond_encoder.1.weight"
    wide = image_settings(HYBRID)
    with pytest.raises(CheckpointError, match="expected 16 columns of the time's embedding"):
        read_checkpoint(damaged(lambda s: s.update({condition: torch.zeros(64, 27)}), path, wide))


def test_the_command_converts_it(tmp_path: Path, capsys: Any) -> None:
    path = save(tmp_path / "latest.ckpt", settings(), Policy(1))
    folder = tmp_path / "folder"
    code, out, _ = run(capsys, "convert", str(path), str(folder))
    assert code == 0 and "UNet of widths 16, 24, 32" in out
    config, _, _ = read_folder(folder)
    assert config.provenance["policy"] == "DiffusionUnetLowdimPolicy"
    policy = tsad.load(folder)
    policy.sparsity = 0.5
    policy.reset(seed=0)
    obs = np.zeros((N_OBS, OBS), np.float32)
    assert all(np.isfinite(policy(obs)).all() for _ in range(2))
