"""What the core says of a family's settings, against the reference, which knows its own names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import MLP_PRUNER, NETWORKS, TINY_PRUNER

from tsad import _core
from tsad.config import pruner_shapes
from tsad.families import arguments, as_network, structure
from tsad.reference.families import family_of
from tsad.reference.pruner import prune

UNET = {
    "type": "unet1d", "horizon": 8, "n_obs_steps": 2, "n_action_steps": 4, "obs_dim": 3,
    "action_dim": 2, "down_dims": [16, 8, 24], "kernel_size": 3, "n_groups": 4,
    "diffusion_step_embed_dim": 8, "use_film_scale_modulation": True,
}  # fmt: skip
DIT = {
    "type": "dit", "horizon": 5, "n_obs_steps": 2, "n_action_steps": 4, "obs_dim": 3,
    "action_dim": 2, "hidden_dim": 12, "num_layers": 2, "num_heads": 3, "timestep_embed_dim": 8,
    "use_rope": True, "rope_base": 100.0, "use_positional_encoding": False,
}  # fmt: skip
SETTINGS = {name: dict(network) for name, network in NETWORKS.items() if network["n_emb"] <= 64} | {
    "unet": UNET,
    "unet of one level": UNET | {"down_dims": [8], "kernel_size": 1, "horizon": 7},
    "unet, moved alone": UNET | {"use_film_scale_modulation": False, "action_dim": 16},
    "dit": DIT,
    "dit of positions": DIT | {"use_rope": False, "use_positional_encoding": True},
}


class Read(dict[str, Any]):
    """Tensors that note which of them were read."""

    def __init__(self, shapes: Any) -> None:
        super().__init__({name: np.ones(shape) for name, shape in shapes.items()})
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_core_and_the_reference_name_the_same(name: str) -> None:
    network = family_of(SETTINGS[name]).check(SETTINGS[name])
    family, said = family_of(network), structure(as_network(network))
    assert list(said.blocks) == family.block_names(network)
    assert list(said.types) == family.block_types(network)
    assert len(said.costs) == len(said.blocks) and min(said.costs) > 0
    w, T = Read(said.tensors), network["horizon"]
    condition = family.encode(w, network, 3, np.ones((network["n_obs_steps"], network["obs_dim"])))
    out = family.predict(w, network, np.ones((T, network["action_dim"])), condition)
    assert out.shape == (T, network["action_dim"])
    assert w.read == set(w) == set(said.tensors)


@pytest.mark.parametrize("pruner", [TINY_PRUNER, MLP_PRUNER], ids=["transformer", "mlp"])
def test_of_a_pruner_too(pruner: dict[str, Any]) -> None:
    network = NETWORKS["tiny"]
    w = Read(pruner_shapes(pruner, network))
    memory = np.ones((2, 1 + network["n_obs_steps"], network["n_emb"]))
    n_blocks = 3 * network["n_layer"]
    assert prune(w, pruner, memory, n_blocks).shape == (2, n_blocks, 4)
    assert w.read == set(w)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"family": "gru"},
            ValueError,
            "family: expected 'diffusion_policy_transformer', ",
        ),
        ({"family": "nodes"}, ValueError, "family: expected one that knows its own tensors"),
        ({"horizon": 0}, ValueError, "horizon: expected 1 to 4096, got 0"),
        ({"obs_dim": 2**31 - 1}, ValueError, "obs_dim: expected 1 to 65536"),
        ({"n_emb": 2**31 - 2}, ValueError, "n_emb: expected an even multiple of n_head"),
        ({"n_layers": 2**31 - 1}, ValueError, "n_layers, n_cond_layers: expected at most 5461"),
        ({"n_heads": None}, TypeError, "describe: expected the keyword n_heads, got none"),
        ({"family": "unet1d"}, TypeError, "describe: expected the keyword down_dims, got none"),
        ({"sampler": 1}, TypeError, "describe: unknown key 'sampler'"),
        ({"pruner": 3}, TypeError, "pruner: expected a dict or None"),
        ({"pruner": {"hidden": 2**31 - 1}}, ValueError, "hidden: expected 0 to 1048576"),
        pytest.param(
            {"family": "dit", "hidden_dim": 65536, "n_layers": 8192, "n_heads": 1},
            ValueError,
            "more terms than 2147483647",
            marks=pytest.mark.slow,  # a minute with the sanitizers
        ),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], error: Any, says: str) -> None:
    settings = arguments(as_network(NETWORKS["tiny"])) | changes
    with pytest.raises(error, match=says.replace("(", r"\(")):
        _core.describe(**settings)
