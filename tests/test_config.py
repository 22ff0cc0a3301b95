"""config.json: what is accepted, what is refused and how it is said, shapes and costs."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import numpy as np
import pytest

from tsad.config import (
    NetworkConfig,
    PolicyConfig,
    block_costs,
    block_names,
    block_types,
    network_shapes,
    pruner_shapes,
)

CONFIG: dict[str, Any] = {
    "format": "tsad",
    "format_version": 1,
    "network": {
        "horizon": 10,
        "n_obs_steps": 2,
        "n_action_steps": 8,
        "obs_dim": 3,
        "action_dim": 2,
        "n_layer": 2,
        "n_head": 4,
        "n_emb": 32,
    },
    "scheduler": {"type": "ddpm"},
    "normalizer": {
        "obs": {"scale": [1, 2.5, -3], "offset": [0, 0.5, 1]},
        "action": {"scale": [1, 2], "offset": [0, -1]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """CONFIG with one dotted key set."""
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return config


def removed(path: str) -> dict[str, Any]:
    """CONFIG without one dotted key."""
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    del section[last]
    return config


def test_defaults_and_round_trip() -> None:
    config = PolicyConfig.from_dict(CONFIG)
    assert config.network.n_cond_layers == 0 and config.network.causal_attn
    assert config.scheduler.beta_schedule == "squaredcos_cap_v2"
    assert config.scheduler.num_train_timesteps == config.scheduler.num_inference_steps == 100
    assert config.costs == block_costs(CONFIG["network"])
    assert config.pruner is None and config.provenance == {}
    written = json.loads(json.dumps(config.to_dict()))
    assert PolicyConfig.from_dict(written) == config
    assert set(written["scheduler"]) >= {"steps_offset", "set_alpha_to_one", "clip_sample_range"}


def test_round_trip_keeps_every_value() -> None:
    sizes = {"type": "transformer", "hidden_dim": 64, "n_head": 2, "dim_feedforward": 96}
    full = changed("pruner", sizes)
    full["network"] |= {"n_cond_layers": 3, "causal_attn": False}
    full["scheduler"] = {
        "type": "ddim",
        "num_train_timesteps": 50,
        "beta_schedule": "linear",
        "beta_start": 0.001,
        "beta_end": 0.1,
        "prediction_type": "sample",
        "clip_sample": False,
        "clip_sample_range": 2.0,
        "variance_type": "fixed_large",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "num_inference_steps": 7,
    }
    full["cost"] = {"version": 1, "unit": "MAC", "blocks": [1, 2, 3, 4, 5, 6]}
    full["provenance"] = {"scores": {"a": [1, None]}}
    written = PolicyConfig.from_dict(full).to_dict()
    for section in ("scheduler", "normalizer", "cost", "pruner", "provenance"):
        assert written[section] == full[section]
    assert written["network"] == {"type": "diffusion_policy_transformer"} | full["network"] | {
        "time_as_cond": True,
        "obs_as_cond": True,
    }


def test_dpmsolver_does_not_clip_unless_told() -> None:
    assert not PolicyConfig.from_dict(
        changed("scheduler.type", "dpmsolver++")
    ).scheduler.clip_sample


def test_provenance_is_copied() -> None:
    source = changed("provenance", {"a": {"b": 1}})
    config = PolicyConfig.from_dict(source)
    source["provenance"]["a"]["b"] = 2
    config.to_dict()["provenance"]["a"]["b"] = 3
    assert config.provenance == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("format", "other", "'other'"),
        ("format_version", 2, "format_version: expected 1, got 2"),
        ("format_version", True, "format_version"),
        ("format_version", "1", "format_version"),
        ("network.type", "unet", "network.type: expected one of"),
        ("network.horizon", 0, "network.horizon: expected an integer from 1"),
        ("network.horizon", 10.0, "network.horizon"),
        ("network.horizon", True, "network.horizon"),
        ("network.horizon", None, "network.horizon"),
        ("network.horizon", 8, "n_obs_steps - 1 + n_action_steps = 9"),
        ("network.n_layer", 10**9, "network.n_layer"),
        pytest.param("network.n_layer", 10**5000, "network.n_layer", id="huge"),
        ("network.n_head", 3, "divisible by n_head"),
        ("network.n_emb", 2, "network.n_emb"),
        ("network.n_cond_layers", -1, "network.n_cond_layers"),
        ("network.causal_attn", 1, "network.causal_attn: expected true or false"),
        ("network.time_as_cond", False, "network.time_as_cond: expected true"),
        ("network.obs_as_cond", False, "network.obs_as_cond: expected true"),
        ("network.n_heads", 4, 'did you mean "n_head"'),
        ("scheduler.type", "heun", '"dpmsolver++", "euler", "rk4", got \'heun\''),
        ("scheduler.beta_schedule", "sigmoid", "scheduler.beta_schedule"),
        ("scheduler.beta_start", 0, "scheduler.beta_start"),
        ("scheduler.beta_end", float("nan"), "scheduler.beta_end"),
        ("scheduler.beta_end", "0.02", "scheduler.beta_end"),
        ("scheduler.prediction_type", "score", "scheduler.prediction_type"),
        ("scheduler.clip_sample_range", float("inf"), "scheduler.clip_sample_range"),
        ("scheduler.num_inference_steps", 101, "from 1 to 100, got 101"),
        ("scheduler.eta", 1.0, "unknown key 'eta' in scheduler"),
        ("normalizer.obs.scale", [1, 2], "normalizer.obs.scale: expected a list of 3 numbers"),
        ("normalizer.obs.scale", [1, 2, "3"], "normalizer.obs.scale[2]"),
        ("normalizer.obs.offset", [1, 2, float("nan")], "normalizer.obs.offset[2]"),
        ("normalizer.obs.offset", [1, 2, 1e39], "normalizer.obs.offset[2]"),
        ("normalizer.obs.offset", [1, 2, 10**400], "normalizer.obs.offset[2]"),
        ("normalizer.action.scale", [1, 0], "normalizer.action.scale[1]"),
        ("normalizer.images", {}, "'images'"),
        ("cost", {"version": 2, "unit": "MAC", "blocks": [1] * 6}, "cost.version"),
        ("cost", {"version": 1, "unit": "ms", "blocks": [1] * 6}, "cost.unit"),
        ("cost", {"version": 1, "unit": "MAC", "blocks": [1] * 5}, "cost.blocks: expected a list"),
        ("cost", {"version": 1, "unit": "MAC", "blocks": [1] * 5 + [-1]}, "cost.blocks[5]"),
        ("cost", {"version": 1, "unit": "MAC", "blocks": [1] * 5 + [0.5]}, "cost.blocks[5]"),
        ("cost", {"version": 1, "unit": "MAC", "blocks": [0] * 6}, "only zeros"),
        ("pruner", None, "pruner: expected a JSON object"),
        ("pruner.n_head", 7, "pruner.hidden_dim"),
        ("pruner", {"type": "cnn"}, 'pruner.type: expected one of "transformer", "mlp"'),
        ("pruner", {"type": "mlp", "n_head": 4}, "unknown key 'n_head' in pruner"),
        ("pruner", {"default": 1}, "pruner.default: expected true or false"),
        ("provenance", [], "provenance: expected a JSON object"),
        ("network", [], "network: expected a JSON object"),
        ("extra", 1, "unknown key 'extra'"),
    ],
)
def test_refused_by_name(path: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as error:
        PolicyConfig.from_dict(changed(path, value), file="a/config.json")
    message = str(error.value)
    assert says in message and message.startswith("a/config.json: ")
    assert "expected" in message and ";" in message  # and the fix
    assert len(message) < 600


@pytest.mark.parametrize(
    "path",
    ["format", "format_version", "network", "scheduler", "normalizer", "network.n_emb"]
    + ["scheduler.type", "normalizer.obs", "normalizer.action.offset"],
)
def test_missing_keys_are_named(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: expected this key, got nothing"):
        PolicyConfig.from_dict(removed(path))


@pytest.mark.parametrize("kind", ["transformer", "mlp"])
def test_a_pruner_is_the_default_unless_it_says_otherwise(kind: str) -> None:
    for default in (True, False):
        config = PolicyConfig.from_dict(changed("pruner", {"type": kind, "default": default}))
        assert config.pruner is not None and config.pruner.default is default
        assert config.to_dict()["pruner"].get("default", True) is default
        assert PolicyConfig.from_dict(config.to_dict()) == config


def test_every_key_is_described() -> None:
    import tsad.config
    import tsad.families.dpt

    def keys(section: dict[str, Any]) -> set[str]:
        nested = [keys(value) for value in section.values() if isinstance(value, dict)]
        return set(section).union(*nested)

    written = PolicyConfig.from_dict(changed("pruner", {})).to_dict()
    described = f"{tsad.config.__doc__} {tsad.families.dpt.__doc__}"
    quoted = set(re.findall(r'``(\w+)``|"(\w+)"', described))
    assert keys(written) <= {word for pair in quoted for word in pair}


@pytest.mark.parametrize("n_cond_layers", [0, 2])
def test_network_shapes_are_those_of_torch(n_cond_layers: int) -> None:
    torch = pytest.importorskip("torch")
    network = CONFIG["network"] | {"n_cond_layers": n_cond_layers}
    d, heads = network["n_emb"], network["n_head"]
    args = {"nhead": heads, "dim_feedforward": 4 * d, "batch_first": True, "norm_first": True}
    encoder = torch.nn.Sequential(
        torch.nn.Linear(d, 4 * d), torch.nn.Mish(), torch.nn.Linear(4 * d, d)
    )
    if n_cond_layers:
        layer = torch.nn.TransformerEncoderLayer(d, **args)
        encoder = torch.nn.TransformerEncoder(layer, n_cond_layers, enable_nested_tensor=False)
    modules = torch.nn.ModuleDict(
        {
            "input_emb": torch.nn.Linear(network["action_dim"], d),
            "cond_obs_emb": torch.nn.Linear(network["obs_dim"], d),
            "encoder": encoder,
            "decoder": torch.nn.TransformerDecoder(
                torch.nn.TransformerDecoderLayer(d, **args), network["n_layer"]
            ),
            "ln_f": torch.nn.LayerNorm(d),
            "head": torch.nn.Linear(d, network["action_dim"]),
        }
    )
    expected = {name: tuple(value.shape) for name, value in modules.state_dict().items()}
    expected |= {"pos_emb": (1, network["horizon"], d)}
    expected |= {"cond_pos_emb": (1, 1 + network["n_obs_steps"], d)}
    assert network_shapes(network) == expected
    assert network_shapes(NetworkConfig.from_dict(network)) == expected


def test_pruner_shapes_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch")
    pruner = {"hidden_dim": 24, "n_head": 3, "dim_feedforward": 40}
    layer = torch.nn.TransformerDecoderLayer(24, 3, 40, batch_first=True, norm_first=True)
    modules = torch.nn.ModuleDict(
        {
            "memory_proj": torch.nn.Linear(CONFIG["network"]["n_emb"], 24),
            "transformer_decoder": torch.nn.TransformerDecoder(layer, 1),
            "head": torch.nn.Linear(24, 4),
        }
    )
    expected = {name: tuple(value.shape) for name, value in modules.state_dict().items()}
    assert pruner_shapes(pruner, CONFIG["network"]) == expected


def test_published_sizes() -> None:
    """Parameter counts of the published policies and pruner, by arithmetic of their authors."""

    def count(shapes: dict[str, tuple[int, ...]]) -> int:
        return int(sum(np.prod(shape) for shape in shapes.values()))

    can = {"horizon": 10, "n_obs_steps": 2, "n_action_steps": 8, "obs_dim": 137, "action_dim": 10}
    can |= {"n_layer": 8, "n_head": 4, "n_emb": 256}
    kitchen = can | {"horizon": 16, "n_obs_steps": 4, "obs_dim": 60, "action_dim": 9, "n_emb": 768}
    assert count(network_shapes(can)) == 8_997_642
    assert count(network_shapes(kitchen)) == 80_415_753
    assert count(pruner_shapes({}, can)) == 3_288_068
    assert count(pruner_shapes({}, kitchen)) == 3_550_212


def test_blocks_and_costs() -> None:
    network = CONFIG["network"]
    assert block_names(network)[:4] == [
        "layers.0.self_attn",
        "layers.0.cross_attn",
        "layers.0.feed_forward",
        "layers.1.self_attn",
    ]
    assert block_types(network) == ["self_attn", "cross_attn", "feed_forward"] * 2
    tokens, dim, heads, memory = 10, 32, 4, 3
    projections = 4 * tokens * dim * dim  # q, k, v, out
    scores_and_mix = 2 * tokens * tokens * dim
    folded = tokens * dim * memory * heads * 2  # scores, then values
    feed_forward = 2 * tokens * dim * 4 * dim
    assert block_costs(network) == (projections + scores_and_mix, folded, feed_forward) * 2
