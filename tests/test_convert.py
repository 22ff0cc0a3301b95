"""Diffusion Policy checkpoints to tsad folders: the same numbers, or a refusal by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import cases
import checkpoints
import numpy as np
import pytest
from checkpoints import payload, save

from tsad.checkpoint import CheckpointError, read_folder
from tsad.config import NetworkConfig, network_shapes
from tsad.convert import convert, convert_pruner, read_checkpoint, read_pruner

torch = pytest.importorskip("torch")


def check_numbers(tensors: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    assert set(tensors) == set(network_shapes(checkpoints.NETWORK))
    for name, value in tensors.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        np.testing.assert_array_equal(value, arrays[f"model.{name}"], err_msg=name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_lowdim(tmp_path: Path, weights: str, protocol: int) -> None:
    source = save(tmp_path / "latest.ckpt", payload(), pickle_protocol=protocol)
    summary = convert(source, tmp_path / "out", weights=weights)
    config, tensors, pruner = read_folder(tmp_path / "out")
    _, arrays = checkpoints.state_dict({"ema": 1, "raw": 2}[weights])
    check_numbers(tensors, arrays)
    assert pruner is None
    assert config.network.to_dict() == checkpoints.NETWORK
    assert config.scheduler.to_dict() == cases.SCHEDULER
    for key in ("obs", "action"):
        affine = getattr(config.normalizer, key)
        for part in ("scale", "offset"):
            expected = arrays[f"normalizer.params_dict.{key}.{part}"]
            assert np.array_equal(np.float32(getattr(affine, part)), expected)
    assert config.provenance["task"] == "toy_lowdim" and config.provenance["weights"] == weights
    json.dumps(summary)
    assert summary["weights"] == weights and summary["notes"] == []
    assert summary["parameters"] == sum(value.size for value in tensors.values())


def test_hybrid_image_policy_takes_encoded_observations(tmp_path: Path) -> None:
    source = save(tmp_path / "latest.ckpt", payload(hybrid=True))
    summary = convert(source, tmp_path / "out")
    config, tensors, _ = read_folder(tmp_path / "out")
    check_numbers(tensors, checkpoints.state_dict(1, hybrid=True)[1])
    dim = checkpoints.NETWORK["obs_dim"]
    assert config.network.obs_dim == dim
    assert config.normalizer.obs.scale == (1.0,) * dim
    assert config.normalizer.obs.offset == (0.0,) * dim
    assert config.scheduler.type == "ddim" and config.scheduler.num_inference_steps == 8
    assert "encoder stays outside" in summary["notes"][0] and str(dim) in summary["notes"][0]


@pytest.mark.parametrize("change", [{"n_cond_layers": 2}, {"causal_attn": False}])
def test_network_variants(tmp_path: Path, change: dict[str, Any]) -> None:
    converted = read_checkpoint(save(tmp_path / "x.ckpt", payload(**change)))
    assert converted.config.network.to_dict() == checkpoints.NETWORK | change


def test_resolved_settings_and_plain_dicts(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    config = checkpoints.lowdim_config()
    del config["logging"], config["policy"]["model"]["input_dim"]
    del config["policy"]["model"]["output_dim"]
    config["policy"]["n_action_steps"] = 3
    resolved = OmegaConf.create(config)
    OmegaConf.resolve(resolved)
    for i, cfg in enumerate((resolved, OmegaConf.to_container(resolved))):
        value = payload()
        value["cfg"] = cfg
        converted = read_checkpoint(save(tmp_path / f"{i}.ckpt", value))
        assert converted.config.network.to_dict() == checkpoints.NETWORK


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_number_types(tmp_path: Path, dtype: str) -> None:
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    for name in ema:
        ema[name] = ema[name].to(getattr(torch, dtype))
    expected = {name: tensor.float().numpy() for name, tensor in ema.items()}
    check_numbers(read_checkpoint(save(tmp_path / "x.ckpt", value)).tensors, expected)


def test_views_parameters_and_shared_storage(tmp_path: Path) -> None:
    """Transposed and sliced views, parameters and tensors of one storage keep their numbers."""
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    _, arrays = checkpoints.state_dict(1)
    name = "model.head.weight"
    ema[name] = torch.nn.Parameter(ema[name].T.contiguous()).T  # strides (1, 2)
    block = torch.zeros(40)
    weight = ema["model.ln_f.weight"]
    block[3:35:2] = weight
    ema["model.ln_f.weight"] = block[3:35:2]
    block[4:36:2] = ema["model.ln_f.bias"]
    ema["model.ln_f.bias"] = block[4:36:2]
    name = "model.input_emb.weight"
    ema[name] = torch.nn.Parameter(ema[name])
    assert not ema["model.head.weight"].is_contiguous()
    check_numbers(read_checkpoint(save(tmp_path / "x.ckpt", value)).tensors, arrays)


def test_float16_on_disk(tmp_path: Path) -> None:
    source = save(tmp_path / "x.ckpt", payload())
    summary = convert(source, tmp_path / "out", dtype="float16")
    _, tensors, _ = read_folder(tmp_path / "out")
    _, arrays = checkpoints.state_dict(1)
    expected = arrays["model.head.weight"].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(tensors["head.weight"], expected)
    assert summary["dtype"] == "float16"


# --- settings that are refused, or mean something


def changed(path: str, value: Any, config: dict[str, Any] | None = None) -> dict[str, Any]:
    config = copy.deepcopy(config or checkpoints.lowdim_config())
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if value is DELETE:
        del section[last]
    else:
        section[last] = value
    return config


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("policy._target_", "a.b.DiffusionUnetVideoPolicy", "supported checkpoints: .*not yet"),
        ("policy._target_", "a.b.MyPolicy", "policy._target_: .*'a.b.MyPolicy'"),
        ("policy._target_", DELETE, "policy._target_"),
        ("policy.model._target_", "a.b.MyTransformer", "policy.model._target_: .*MyTransformer"),
        ("policy.noise_scheduler._target_", "diffusers.PNDMScheduler", "DDPMScheduler.*PNDM"),
        ("policy.noise_scheduler.thresholding", True, "noise_scheduler.thresholding"),
        ("policy.noise_scheduler.trained_betas", [0.1], "noise_scheduler.trained_betas"),
        ("policy.noise_scheduler.mystery", 1, "noise_scheduler.mystery: expected no such"),
        ("policy.noise_scheduler.prediction_type", "score", "scheduler.prediction_type"),
        ("policy.noise_scheduler.variance_type", "learned", "scheduler.variance_type"),
        ("policy.pred_action_steps_only", True, "pred_action_steps_only"),
        ("policy.eta", 0.5, "policy.eta"),
        ("policy.mystery", 1, "policy.mystery"),
        ("policy.model.time_as_cond", False, "network.time_as_cond: expected true"),
        ("policy.obs_as_cond", False, "network.obs_as_cond: expected true"),
        ("policy.obs_as_cond", DELETE, "network.obs_as_cond: expected true"),
        ("policy.model.n_head", 3, "divisible by n_head"),
        ("policy.model.n_layer", 3, "decoder.layers.2.*missing"),
        ("policy.model.n_emb", 32, "expected shape"),
        ("policy.model.causal_attn", False, "mask: expected the mask of causal_attn=False"),
        ("policy.horizon", "${nowhere}", "cfg.policy.horizon: .*nowhere"),
        ("policy.horizon", "${oc.env:HOME}", "cfg.policy.horizon: .*oc.env"),
        ("policy.horizon", "${policy.horizon}", "cfg.policy.horizon"),
        ("policy.horizon", "${policy.horizon}${policy.horizon}", "cfg.policy.horizon"),
        ("policy.num_inference_steps", 101, "num_inference_steps"),
        ("policy.obs_dim", 7, "cond_obs_emb.weight: expected shape"),
    ],
)
def test_settings_are_refused_by_name(tmp_path: Path, path: str, value: Any, says: str) -> None:
    source = save(tmp_path / "x.ckpt", payload(changed(path, value)))
    with pytest.raises(ValueError, match=says) as e:
        convert(source, tmp_path / "out")
    assert str(source) in str(e.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "value", "key", "expected"),
    [
        ("policy.num_inference_steps", None, "num_inference_steps", 100),
        ("policy.num_inference_steps", DELETE, "num_inference_steps", 100),
        ("policy.eta", 0, "type", "ddpm"),
        # diffusers' defaults, not ours
        ("policy.noise_scheduler", {"_target_": "x.DDPMScheduler"}, "num_train_timesteps", 1000),
        ("policy.noise_scheduler", {"_target_": "x.DDPMScheduler"}, "beta_schedule", "linear"),
        (
            "policy.noise_scheduler",
            {"_target_": "x.DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++"},
            "timestep_spacing",
            "linspace",
        ),
    ],
)
def test_settings_that_have_a_meaning(
    tmp_path: Path, path: str, value: Any, key: str, expected: Any
) -> None:
    converted = read_checkpoint(save(tmp_path / "x.ckpt", payload(changed(path, value))))
    assert converted.config.scheduler.to_dict()[key] == expected


def test_relative_interpolation(tmp_path: Path) -> None:
    config = changed("policy.model.n_head", "${..heads_elsewhere}")
    config["policy"] |= {"obs_as_cond": "${.also}"}
    config = changed("policy.model.n_head", "${...heads}", config)
    config |= {"heads": 2}
    config["policy"]["obs_as_cond"] = "${..obs_as_cond}"
    converted = read_checkpoint(save(tmp_path / "x.ckpt", payload(config)))
    assert converted.config.network.n_head == 2


# --- tensors that do not fit


def test_tensors_are_refused_by_name(tmp_path: Path) -> None:
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    del ema["model.head.bias"]
    ema["model.more"] = torch.zeros(2, 3)
    ema["model.ln_f.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(save(tmp_path / "x.ckpt", value))
    for line in (
        "head.bias: missing, expected shape [2]",
        "more: not expected, got shape [2, 3]",
        "ln_f.bias: expected shape [16], got [3]",
    ):
        assert line in str(error.value)
    read_checkpoint(tmp_path / "x.ckpt", weights="raw")  # those are whole


@pytest.mark.parametrize(
    ("name", "tensor", "says"),
    [
        ("model.head.bias", [1.0, float("nan")], "model.head.bias: expected finite"),
        ("model.head.bias", [1.0, 1e300], "model.head.bias: expected finite"),
        ("model.mask", [[0.0] * 5] * 5, "model.mask: expected the mask"),
        ("normalizer.params_dict.obs.scale", None, "params_dict.obs.scale: expected a tensor"),
        ("normalizer.params_dict.obs.scale", [1.0, 2.0], r"obs.scale: .*shape \[2\]"),
        ("normalizer.params_dict.action.scale", [1.0, 0.0], r"normalizer.action.scale\[1\]"),
        ("normalizer.params_dict.action.offset", [1.0, float("inf")], "action.offset: .*finite"),
    ],
)
def test_numbers_are_refused_by_name(
    tmp_path: Path, name: str, tensor: list[Any] | None, says: str
) -> None:
    value = payload()
    ema = value["state_dicts"]["ema_model"]
    if tensor is None:
        del ema[name]
    else:
        ema[name] = torch.tensor(tensor, dtype=torch.float64)
    with pytest.raises(ValueError, match=says):
        read_checkpoint(save(tmp_path / "x.ckpt", value))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    value = payload()
    value["state_dicts"]["ema_model"]["model.head.bias"] = torch.tensor([1, 2])
    with pytest.raises(CheckpointError, match="model.head.bias: .*int64"):
        read_checkpoint(save(tmp_path / "x.ckpt", value))


@pytest.mark.parametrize("value", [None, [1], {"state_dict": {}}, {"cfg": None, "state_dicts": {}}])
def test_foreign_torch_files(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match="expected"):
        read_checkpoint(tmp_path / "x.ckpt")


# --- where it is written


def test_an_existing_folder_is_kept_unless_told(tmp_path: Path) -> None:
    source, out = save(tmp_path / "x.ckpt", payload()), tmp_path / "out"
    out.mkdir()
    (out / ".tsad-0123456789abcdef.tmp").write_text("half")  # of one that was killed
    convert(source, out)  # empty is as good as new
    (out / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(source, out, weights="raw")
    assert read_folder(out)[0].provenance["weights"] == "ema"
    convert(source, out, weights="raw", overwrite=True)
    assert read_folder(out)[0].provenance["weights"] == "raw"
    assert (out / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [None, "{}", '{"type": "diffusion"}', "no json", "[]"])
def test_other_folders_are_never_overwritten(tmp_path: Path, content: str | None) -> None:
    source, out = save(tmp_path / "x.ckpt", payload()), tmp_path / "out"
    out.mkdir()
    (out / ("config.json" if content else "x")).write_text(content or "")
    with pytest.raises(FileExistsError, match="no|something else"):
        convert(source, out, overwrite=True)
    assert len(list(out.iterdir())) == 1


def test_other_sources(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.ckpt"):
        convert(tmp_path / "nowhere.ckpt", tmp_path / "out")
    folder = tmp_path / "lerobot"
    folder.mkdir()
    with pytest.raises(ValueError, match="got a folder"):
        convert(folder, tmp_path / "out")
    (folder / "config.json").write_text('{"type": "diffusion", "horizon": 16}')
    with pytest.raises(ValueError, match="config.json: input_features: expected an object"):
        convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="dtype"):
        convert(save(tmp_path / "x.ckpt", payload()), tmp_path / "out", dtype="int8")
    assert not (tmp_path / "out").exists()


# --- pruners


def pruner_state(seed: int = 4) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    arrays = cases.random_pruner(cases.TINY_PRUNER, checkpoints.NETWORK, seed)
    return {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}, arrays


def test_published_pruner(tmp_path: Path) -> None:
    state, arrays = pruner_state()
    published = {
        "model_state_dict": state,
        "structure": "cross",
        "hidden_dim": 24,
        "attn_heads": 3,
        "dim_feedforward": 40,
        "block_encoder_type": "sin",
        "valid_loss": np.float64(0.5),
        "epoch": 3,
    }
    torch.save(published, tmp_path / "pruner.pt")
    convert(save(tmp_path / "x.ckpt", payload()), tmp_path / "out")
    model = (tmp_path / "out" / "model.safetensors").read_bytes()
    summary = convert_pruner(tmp_path / "pruner.pt", tmp_path / "out")
    json.dumps(summary)
    config, _, pruner = read_folder(tmp_path / "out")
    assert config.pruner is not None
    assert config.pruner.to_dict() == {"type": "transformer", **cases.TINY_PRUNER}
    assert pruner is not None and set(pruner) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(pruner[name], value)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    with pytest.raises(FileExistsError, match="pruner.safetensors"):
        convert_pruner(tmp_path / "pruner.pt", tmp_path / "out")
    convert_pruner(tmp_path / "pruner.pt", tmp_path / "out", overwrite=True)


def test_bare_pruner_state_dicts(tmp_path: Path) -> None:
    network = NetworkConfig.from_dict(checkpoints.NETWORK)
    state, _ = pruner_state()
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "p.pt")
    config, _ = read_pruner(tmp_path / "p.pt", network, n_head=3)
    assert config.to_dict() == {"type": "transformer", **cases.TINY_PRUNER}
    config, _ = read_pruner(tmp_path / "p.pt", network)  # says nothing of its heads
    assert config.n_head == 8
    with pytest.raises(ValueError, match="pruner.hidden_dim"):
        read_pruner(tmp_path / "p.pt", network, n_head=7)


def test_pruners_are_refused_by_name(tmp_path: Path) -> None:
    network = NetworkConfig.from_dict(checkpoints.NETWORK)
    state, _ = pruner_state()
    del state["head.bias"]
    state["transformer_decoder.layers.1.norm1.bias"] = torch.zeros(24)
    torch.save({"model_state_dict": state, "attn_heads": 3}, tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="head.bias: missing") as error:
        read_pruner(tmp_path / "p.pt", network)
    assert "layers.1.norm1.bias: not expected" in str(error.value)
    with pytest.raises(ValueError, match="n_head: expected 3"):
        read_pruner(tmp_path / "p.pt", network, n_head=8)
    torch.save({"model_state_dict": {}}, tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match="state dict of a pruner"):
        read_pruner(tmp_path / "p.pt", network)
    wide = NetworkConfig.from_dict(checkpoints.NETWORK | {"n_emb": 32})
    torch.save(pruner_state()[0], tmp_path / "p.pt")
    with pytest.raises(CheckpointError, match=r"memory_proj.weight: expected shape \[24, 32\]"):
        read_pruner(tmp_path / "p.pt", wide)
