"""The network of Diffusion Policy's UNet policies, as their settings and weights describe it.

Tensors of ``ConditionalUnet1D`` have LeRobot's names here, which differ in two places: the
convolutions of a residual block, ``blocks.0`` and ``blocks.1`` in the file, are ``conv1`` and
``conv2``, and what changes the length, ``down_modules.0.2.conv``, is ``down_modules.0.2``. Its
``cond_predict_scale`` is ``use_film_scale_modulation``; ``obs_dim`` of an image policy, whose
observations are what its encoder makes of images, is read off the width of the condition.

Observations condition the whole of the network (``obs_as_global_cond``). The other two ways,
``obs_as_local_cond`` and, with neither, inpainting, are refused, and so is the window of actions
that begins after the last observation (``oa_step_convention: False``).
"""

from __future__ import annotations

import re
from typing import Any

from tsad.checkpoint import CheckpointError
from tsad.convert.settings import Settings
from tsad.convert.torch_file import TensorRef
from tsad.families import network_shapes, unet1d
from tsad.families.unet1d import Unet1dConfig
from tsad.scope import scope

NETWORK = "ConditionalUnet1D"
# settings of the policies that are read here, or that only training or the encoder needs
POLICY_KEYS = frozenset(
    "obs_as_local_cond obs_as_global_cond oa_step_convention diffusion_step_embed_dim down_dims "
    "kernel_size n_groups cond_predict_scale obs_encoder".split()
)
_CONDITION = "mid_modules.0.cond_encoder.1.weight"


def names(network: Unet1dConfig) -> dict[str, str]:
    """The name in the file of every tensor, to the name here."""
    return {_their_name(name): name for name in network_shapes(network)}


def _their_name(name: str) -> str:
    for ours, theirs in ((".conv1.", ".blocks.0."), (".conv2.", ".blocks.1.")):
        name = name.replace(ours, theirs)
    return re.sub(r"^((?:down|up)_modules\.\d+\.2)\.", r"\1.conv.", name)


def read_network(settings: Settings, state: dict[str, Any], *, lowdim: bool) -> Unet1dConfig:
    """The network of a low-dimensional policy, which is given one, or of one that makes its own."""
    get, file = settings.get, settings.file
    _check_ways(settings, lowdim)
    if any(name.startswith("model.local_cond_encoder.") for name in state):
        raise _refused(file, "model.local_cond_dim", "null", "a local condition")
    at = "policy.model" if lowdim else "policy"
    dims = get(f"{at}.down_dims", [256, 512, 1024])
    if isinstance(dims, list):  # each may be an interpolation
        dims = [get(f"{at}.down_dims.{i}", dim) for i, dim in enumerate(dims)]
    values: dict[str, Any] = {
        "type": unet1d.TYPE,
        "down_dims": dims,
        "kernel_size": get(f"{at}.kernel_size", 3 if lowdim else 5),
        "n_groups": get(f"{at}.n_groups", 8),
        "diffusion_step_embed_dim": get(f"{at}.diffusion_step_embed_dim", 256),
        "use_film_scale_modulation": get(f"{at}.cond_predict_scale", not lowdim),
    }
    for key in ("horizon", "n_obs_steps", "n_action_steps"):
        value = get(f"policy.{key}")
        values[key] = get(key) if value is None else value
    action_dim = _size(state, "final_conv.1.weight", 0, file)
    columns = _size(state, _CONDITION, 1, file)
    values["action_dim"] = get("policy.action_dim", action_dim) if lowdim else action_dim
    values["obs_dim"] = get("policy.obs_dim", 1) if lowdim else 1
    network = Unet1dConfig.from_dict(values, name="policy", file=f"{file}: cfg")
    if not lowdim:
        obs = columns - network.diffusion_step_embed_dim
        values["obs_dim"], rest = divmod(obs, network.n_obs_steps)
        if rest or obs <= 0:
            raise CheckpointError(
                f"{file}: model.{_CONDITION}: expected {network.diffusion_step_embed_dim} columns "
                f"of the time's embedding and as many of each of {network.n_obs_steps} "
                f"observations, got {columns}; weights and cfg are not of one policy"
            )
        network = Unet1dConfig.from_dict(values, name="policy", file=f"{file}: cfg")
    last = network.n_obs_steps - 1 + network.n_action_steps
    if network.horizon < last:
        raise CheckpointError(
            f"{file}: cfg.policy.horizon: expected at least n_obs_steps - 1 + n_action_steps = "
            f"{last}, the last action executed, got {network.horizon}; lower n_action_steps"
        )
    return network


def _check_ways(settings: Settings, lowdim: bool) -> None:
    """How observations reach the network, and where the actions begin."""
    get, file = settings.get, settings.file
    if get("policy.obs_as_local_cond", False):
        raise _refused(file, "obs_as_local_cond", "false", "true, a local condition")
    if not get("policy.obs_as_global_cond", not lowdim):
        raise _refused(file, "obs_as_global_cond", "true", "false, which is inpainting")
    if lowdim and not get("policy.oa_step_convention", False):
        raise _refused(
            file,
            "oa_step_convention",
            "true",
            "false, actions that begin after the last observation",
        )


def _refused(file: str, key: str, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: cfg.policy.{key}: expected {expected}, got {got}; train a policy whose "
        f"observations are a global condition ({scope('networks')})"
    )


def _size(state: dict[str, Any], name: str, axis: int, file: str) -> int:
    ref = state.get(f"model.{name}")
    if not isinstance(ref, TensorRef) or len(ref.shape) <= axis:
        raise CheckpointError(
            f"{file}: model.{name}: expected this tensor, found none; the file is damaged or holds "
            "another network"
        )
    return ref.shape[axis]
