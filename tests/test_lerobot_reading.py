"""Folders of LeRobot: what is read of them, and what the message says where one does not fit."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import lerobot_cases as lerobot
import numpy as np
import pytest

from tsad.checkpoint import CheckpointError, map_safetensors
from tsad.convert.lerobot import read_lerobot
from tsad.convert.lerobot_processors import POSTPROCESSOR_FILE, PREPROCESSOR_FILE
from tsad.reference import ReferencePolicy

THREE, HALF, COMPILED, FOUR = (
    "ddpm_three_levels",
    "ddim_sample_bias_k3_half",
    "ddpm_linear_noclip_k7_compiled",
    "ddim_four_levels_range",
)
STATE, ENV = "observation.state", "observation.environment_state"
WEIGHT = "diffusion.unet.mid_modules.0.conv1.block.0.weight"
STATISTICS = "policy_preprocessor_step_3_normalizer_processor.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lerobot.copy(THREE, tmp_path / "policy")


def refused(folder: Path, message: str) -> str:
    with pytest.raises(ValueError, match=message) as error:
        read_lerobot(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def edit_step(folder: Path, file: str, name: str, **changes: Any) -> None:
    """Changes keys of a processor's step or of its configuration."""
    data = json.loads((folder / file).read_text())
    step = next(step for step in data["steps"] if step["registry_name"] == name)
    for key, value in changes.items():
        (step if key in step else step["config"])[key] = value
    (folder / file).write_text(json.dumps(data))


def edit_statistics(folder: Path, **changes: Any) -> None:
    """Sets statistics; ... takes one out."""
    values = lerobot.tensors(folder, STATISTICS)
    for key, value in changes.items():
        values.pop(key) if value is ... else values.update({key: value})
    lerobot.save(folder, values, STATISTICS)


# What is read


def test_a_folder_is_described(folder):
    lerobot.edit_json(folder / "config.json", of_a_later_version={"a": [1]})
    found = read_lerobot(folder)
    assert found.family == "unet1d"
    assert found.policy["network"] == {
        "type": "unet1d",
        "horizon": 16,
        "n_obs_steps": 2,
        "n_action_steps": 8,
        "obs_dim": 7,
        "action_dim": 2,
        "down_dims": [8, 16, 24],
        "kernel_size": 5,
        "n_groups": 8,
        "diffusion_step_embed_dim": 16,
        "use_film_scale_modulation": True,
    }
    assert found.policy["scheduler"]["type"] == "ddpm"
    assert found.policy["scheduler"]["num_inference_steps"] == 10
    # config.json has the environment's state first
    assert [(f.name, f.kind, f.dim) for f in found.features] == [
        (STATE, "STATE", 3),
        (ENV, "ENV", 4),
    ]
    assert found.config["of_a_later_version"] == {"a": [1]}
    assert (found.cameras, found.renamed, found.notes) == ((), {}, [])
    original = lerobot.tensors(folder)
    assert {f"diffusion.unet.{k}" for k in found.tensors} == set(original)
    for name, value in found.tensors.items():
        np.testing.assert_array_equal(value, original[f"diffusion.unet.{name}"])


def test_weights_are_the_mapped_file(folder):
    for value in read_lerobot(folder).tensors.values():
        base: Any = value
        while isinstance(base, np.ndarray):
            base = base.base
        assert isinstance(getattr(base, "obj", base), mmap.mmap)
        assert not value.flags.writeable


def test_half_weights_stay_half_and_a_range_of_0_is_lerobots_epsilon():
    found = read_lerobot(lerobot.FOLDER / HALF)
    assert {value.dtype for value in found.tensors.values()} == {np.dtype(np.float16)}
    assert found.policy["normalizer"]["obs"]["scale"][0] == 2 / np.float64(np.float32(1e-8))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_a_number_is_refused_in_half_weights_too(value, tmp_path):
    folder = lerobot.copy(HALF, tmp_path / "policy")
    values = lerobot.tensors(folder)
    name = next(name for name in values if name.endswith("mid_modules.0.conv1.block.0.bias"))
    assert values[name].dtype == np.float16
    values[name][3] = value
    lerobot.save(folder, values)
    refused(folder, rf"mid_modules.0.conv1.block.0.bias: expected finite .* got {value} at \[3\]")


def test_more_actions_than_there_are_become_what_lerobot_executes():
    found = read_lerobot(lerobot.FOLDER / COMPILED)
    assert found.config["n_action_steps"] == 8
    assert found.policy["network"]["n_action_steps"] == 6  # 8 - 3 + 1
    assert any("n_action_steps: 8 reach beyond the horizon; 6" in note for note in found.notes)


def test_a_compiled_model_is_read_and_lerobots_trap_named():
    assert all("_orig_mod" in name for name in lerobot.tensors(lerobot.FOLDER / COMPILED))
    found = read_lerobot(lerobot.FOLDER / COMPILED)
    assert not any("_orig_mod" in name for name in found.tensors)
    assert any("'_orig_mod.'" in note and "random network" in note for note in found.notes)


def test_a_checkpoint_of_a_training_is_found(folder, tmp_path):
    (tmp_path / "010000").mkdir()
    folder.rename(tmp_path / "010000" / "pretrained_model")
    assert read_lerobot(tmp_path / "010000").family == "unet1d"


def test_statistics_in_the_model_of_lerobot_before_0_4(folder, tmp_path):
    """The same policy with its statistics where they were until 0.3.3 computes the same."""
    e = lerobot.expected(THREE)
    statistics = lerobot.tensors(folder, STATISTICS)
    values = lerobot.tensors(folder)
    for module, feature in (
        ("normalize_inputs", STATE),
        ("normalize_inputs", ENV),
        ("normalize_targets", "action"),
        ("unnormalize_outputs", "action"),
    ):
        for key in ("min", "max"):
            name = f"{module}.buffer_{feature.replace('.', '_')}.{key}"
            values[name] = statistics[f"{feature}.{key}"].copy()
    lerobot.save(folder, values)
    for file in folder.glob("policy_*"):
        file.unlink()
    lerobot.edit_json(folder / "config.json", compile_model=..., resize_shape=..., crop_ratio=...)
    found = read_lerobot(folder)
    assert len(found.tensors) == len(values) - 8
    policy = ReferencePolicy(found.policy, found.tensors, lanes=2)
    raw = {f.name: e[f"offline/raw/{f.name}"] for f in found.features}
    noise = lerobot.all_noise(e, "offline", policy.num_inference_steps)
    got = policy(lerobot.side_by_side(found, raw), noise)
    bound = lerobot.TOLERANCE * lerobot.float32_error(THREE, "offline/action")
    assert np.abs(got - e["offline/action_f64"]).max() <= bound
    # a range of 0 became 1e-8 by addition, before; and infinity said that there were none
    values["normalize_inputs.buffer_observation_state.max"][0] = values[
        "normalize_inputs.buffer_observation_state.min"
    ][0]
    lerobot.save(folder, values)
    assert read_lerobot(folder).policy["normalizer"]["obs"]["scale"][0] == pytest.approx(2e8)
    values["normalize_inputs.buffer_observation_state.max"][0] = np.inf
    lerobot.save(folder, values)
    refused(folder, "observation.state.max: expected finite float32 numbers, got inf")


# Weights that do not fit


def test_a_renamed_tensor(folder):
    values = lerobot.tensors(folder)
    values["diffusion.unet.mid_modules.0.first.weight"] = values.pop(WEIGHT)
    lerobot.save(folder, values)
    text = refused(folder, r"2 tensor\(s\) do not fit")
    assert f"{WEIGHT}: missing, expected shape [24, 24, 5]" in text
    assert "mid_modules.0.first.weight: not expected, got shape [24, 24, 5]" in text
    assert "LeRobot would load this file without an error and leave what is missing" in text


def test_a_missing_a_misshapen_and_a_tensor_too_many(folder):
    values = lerobot.tensors(folder)
    whole = values.pop(WEIGHT)
    lerobot.save(folder, values)
    refused(folder, "mid_modules.0.conv1.block.0.weight: missing")
    lerobot.save(folder, values | {WEIGHT: whole[:, :, :3].copy()})
    refused(folder, r"expected shape \[24, 24, 5\], got \[24, 24, 3\]")
    lerobot.save(folder, values | {WEIGHT: whole, "diffusion.ema.step": np.ones(1, np.float32)})
    refused(folder, r"diffusion.ema.step: not expected, got shape \[1\]")
    lerobot.save(folder, values | {WEIGHT: whole, "diffusion.rgb_encoder.x": np.ones(1)})
    refused(folder, "diffusion.rgb_encoder.x: not expected")  # no camera


def test_other_sizes_in_the_configuration(folder):
    lerobot.edit_json(folder / "config.json", down_dims=[8, 16, 32])
    refused(folder, r"expected shape \[32, 24, 5\]|expected shape \[32, 16, 5\], got \[24, 16, 5\]")


def test_a_truncated_file(folder):
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-5])
    refused(folder, r"expected data_offsets within \d+ data bytes, got .*is it truncated")
    model.write_bytes(b"")
    refused(folder, "it is empty or truncated")
    model.unlink()
    refused(folder, "model.safetensors: expected this file, found nothing")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.bool_])
def test_a_tensor_of_a_foreign_type(folder, dtype):
    values = lerobot.tensors(folder)
    lerobot.save(folder, values | {WEIGHT: values[WEIGHT].astype(dtype)})
    refused(
        folder, f"{WEIGHT}: expected numbers of type F16, BF16, F32 or F64, got {dtype(0).dtype}"
    )


def test_a_type_that_numpy_lacks(folder):
    model = folder / "model.safetensors"
    model.write_bytes(model.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"F8X"', 1))
    refused(folder, "expected a dtype of F16, .*, got 'F8X'")


def test_weights_that_are_no_numbers(folder):
    values = lerobot.tensors(folder)
    values[WEIGHT][1, 2, 3] = np.nan
    lerobot.save(folder, values)
    refused(folder, r"mid_modules.0.conv1.block.0.weight: expected finite .* nan at \[1, 2, 3\]")


def test_names_with_and_without_what_compiling_adds(folder):
    values = lerobot.tensors(folder)
    values[WEIGHT.replace("unet.", "unet._orig_mod.")] = values[WEIGHT]
    lerobot.save(folder, values)
    refused(folder, "expected each tensor once, got it with and without '_orig_mod.'")


# Configurations


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "act"}, 'type: expected .* "diffusion" or "multi_task_dit", got \'act\''),
        ({"type": ...}, "type: expected this key"),
        ({"use_peft": True}, "use_peft: expected a policy without adapters"),
        ({"noise_scheduler_type": "EDM"}, '"DDPM", "DDIM", got \'EDM\''),
        ({"prediction_type": "v_prediction"}, 'prediction_type: expected one of "epsilon"'),
        ({"beta_schedule": "sigmoid"}, "beta_schedule: expected one of .*, got 'sigmoid'"),
        ({"num_inference_steps": 101}, "num_inference_steps: expected an integer from 1 to 100"),
        ({"num_inference_steps": True}, "num_inference_steps: expected an integer"),
        ({"clip_sample_range": "wide"}, "clip_sample_range: expected a number"),
        ({"horizon": 18}, "horizon: expected a multiple of 4"),
        ({"down_dims": [8, 16, 20]}, "down_dims: expected numbers divisible by n_groups"),
        ({"input_features": None}, "input_features: expected an object of features"),
        ({"input_features": {}}, "expected observation.state of type STATE"),
        ({"output_features": {}}, "expected action of type ACTION"),
        ({"input_features": {STATE: {"type": "STATE", "shape": [3]}}}, "expected images or an ENV"),
        ({"input_features": {STATE: {"type": "STATE"}}}, "expected a type and a shape"),
        ({"input_features": {STATE: 3}}, "expected a type and a shape"),
    ],
)
def test_a_configuration_that_does_not_fit(folder, changes, message):
    lerobot.edit_json(folder / "config.json", **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    "key",
    "horizon n_obs_steps n_action_steps down_dims kernel_size n_groups diffusion_step_embed_dim "
    "use_film_scale_modulation noise_scheduler_type num_train_timesteps beta_schedule beta_start "
    "beta_end prediction_type clip_sample clip_sample_range".split(),
)
def test_a_missing_key(folder, key):
    lerobot.edit_json(folder / "config.json", **{key: ...})
    refused(folder, f"{key}: expected this key, as LeRobot 0.3 to 0.6 write it, got nothing")


def test_a_feature_that_lerobot_does_not_read_is_said(folder):
    config = json.loads((folder / "config.json").read_text())
    inputs = config["input_features"] | {"observation.effort": {"type": "STATE", "shape": [2]}}
    lerobot.edit_json(folder / "config.json", input_features=inputs)
    found = read_lerobot(folder)
    assert found.policy["network"]["obs_dim"] == 7
    assert found.notes == ["observation.effort: not read, as LeRobot's diffusion policy does not"]


def test_what_is_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a LeRobot folder, found no folder"):
        read_lerobot(tmp_path / "nothing")
    refused(tmp_path, "config.json: expected this file, found nothing")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "expected a JSON object")


# Processors


def test_processors_are_needed(folder):
    for file in folder.glob("policy_*"):
        file.unlink()
    refused(folder, "expected the processors' files, .*, found neither")


@pytest.mark.parametrize("file", [PREPROCESSOR_FILE, POSTPROCESSOR_FILE, STATISTICS])
def test_one_file_of_the_processors_is_missing(folder, file):
    (folder / file).unlink()
    refused(folder, f"{file}: expected this file, found nothing; a LeRobot folder has config")


def test_a_step_that_does_something_else(folder):
    edit_step(folder, PREPROCESSOR_FILE, "device_processor", registry_name="delta_actions")
    refused(folder, r"steps\[2\]: expected normalizer_processor once and .*, got 'delta_actions'")


def test_no_normalising_step(folder):
    data = json.loads((folder / POSTPROCESSOR_FILE).read_text())
    data["steps"] = data["steps"][1:]
    (folder / POSTPROCESSOR_FILE).write_text(json.dumps(data))
    refused(folder, "steps: expected unnormalizer_processor, got device_processor")
    (folder / POSTPROCESSOR_FILE).write_text('{"steps": 3}')
    refused(folder, "steps: expected a list of processing steps")


def test_a_mode_of_a_later_version(folder):
    modes = {"STATE": "MEDIAN", "ACTION": "MIN_MAX"}
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", norm_map=modes)
    refused(folder, "normalisation of STATE: expected one of MIN_MAX, .*, got 'MEDIAN'")


@pytest.mark.parametrize("state_file", ["../x.safetensors", "/etc/passwd", 3])
def test_statistics_lie_beside_the_processor(folder, state_file):
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", state_file=state_file)
    refused(folder, "state_file: expected the name of a file beside it")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"observation.state.max": ...}, "observation.state.max: expected this statistic"),
        ({"observation.state.max": np.ones(4, np.float32)}, r"expected shape \[3\], .*got \[4\]"),
        ({"observation.state.max": np.full(3, np.inf)}, "expected finite float32 numbers, got inf"),
        ({"observation.state.max": np.full(3, 1e300)}, "expected finite float32 numbers, got inf"),
    ],
)
def test_statistics_that_do_not_fit(folder, changes, message):
    edit_statistics(folder, **changes)
    refused(folder, message)


def test_a_feature_without_statistics_passes_as_in_lerobot_and_is_said(folder):
    keys = [key for key in lerobot.tensors(folder, STATISTICS) if key.startswith(ENV)]
    edit_statistics(folder, **dict.fromkeys(keys, ...))
    found = read_lerobot(folder)
    assert found.policy["normalizer"]["obs"]["scale"][3:] == [1.0] * 4
    assert len(found.notes) == 1 and "has no statistics of it" in found.notes[0]


def test_a_feature_that_the_preprocessor_leaves_out(folder):
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", features={})
    found = read_lerobot(folder)
    assert found.policy["normalizer"]["obs"]["scale"] == [1.0] * 7
    assert [note.split(":")[0] for note in found.notes] == [STATE, ENV]


def test_only_the_listed_observations_are_normalised(folder):
    step = {"normalize_observation_keys": [ENV]}
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", **step)
    scale = read_lerobot(folder).policy["normalizer"]["obs"]["scale"]
    assert scale[:3] == [1.0] * 3 and 1.0 not in scale[3:]


@pytest.mark.parametrize("eps", [-1, "small", None, True, 10**400])
def test_a_step_whose_settings_do_not_fit(folder, eps):
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", eps=eps)
    refused(folder, r"steps\[3\].config.eps: expected a small number")
    edit_step(folder, PREPROCESSOR_FILE, "normalizer_processor", eps=1e-8, features=[])
    refused(folder, r"steps\[3\].config: expected norm_map and features")


def test_observations_with_other_names(folder):
    names = {"observation.pose": STATE}
    edit_step(folder, PREPROCESSOR_FILE, "rename_observations_processor", rename_map=names)
    assert read_lerobot(folder).renamed == names


# Mapped files


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    save = pytest.importorskip("safetensors.torch").save_file
    values = {
        str(dtype).removeprefix("torch."): (torch.arange(-3, 3) * 0.75).reshape(2, 3).to(dtype)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64)
        + (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    }
    values |= {"empty": torch.zeros(0, 4), "number": torch.tensor(2.5)}
    save(values, tmp_path / "x.safetensors")
    found = map_safetensors(tmp_path / "x.safetensors")
    assert set(found) == set(values)
    for name, value in values.items():
        theirs = value.float() if name == "bfloat16" else value
        np.testing.assert_array_equal(found[name], theirs.numpy())
        assert found[name].dtype == theirs.numpy().dtype and not found[name].flags.writeable


def test_a_mapped_file_that_is_damaged_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="x.safetensors: expected a safetensors header"):
        map_safetensors(tmp_path / "x.safetensors")
