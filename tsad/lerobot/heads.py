"""What of LeRobot's policies denoises, as ``network`` and ``scheduler`` of a ``config.json``.

``owner`` is what has ``conditional_sample``: the ``DiffusionModel`` of a diffusion policy, the
objective of a multi_task_dit. ``net`` is the network that it calls.
"""

from __future__ import annotations

from typing import Any

from tsad.config import FLOWS, STAGES, VELOCITY
from tsad.scope import scope

COMPILED = "_orig_mod."  # in the names of what torch.compile wraps


def parameters(net: Any) -> dict[str, Any]:
    """The network's parameters by their own names."""
    return {name.replace(COMPILED, ""): p for name, p in net.named_parameters()}


def describe(owner: Any, net: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """``network`` and ``scheduler``; ``ValueError`` names what tsad does not sample."""
    return _unet1d(owner, net) if hasattr(owner, "unet") else _dit(owner, net)


def drops_out(owner: Any) -> bool:
    """Whether the network is another one in training mode: the transformer is."""
    return not hasattr(owner, "unet")


def _network(config: Any, condition: int, kind: str, keys: tuple[str, ...]) -> dict[str, Any]:
    return {
        "type": kind,
        "n_action_steps": 1,  # LeRobot takes its own
        "obs_dim": condition // config.n_obs_steps,
        "action_dim": config.action_feature.shape[0],
        **{key: getattr(config, key) for key in ("horizon", "n_obs_steps", *keys)},
    }


def _scheduler(config: Any, steps: int) -> dict[str, Any]:
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    return {
        "type": config.noise_scheduler_type.lower(),
        "num_inference_steps": steps,
        **{key: getattr(config, key) for key in (*keys, "clip_sample", "clip_sample_range")},
    }


def _unet1d(model: Any, net: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    c = model.config
    film = parameters(net)["down_modules.0.0.cond_encoder.1.weight"].shape[1]
    keys = ("kernel_size", "n_groups", "diffusion_step_embed_dim", "use_film_scale_modulation")
    network = _network(c, film - c.diffusion_step_embed_dim, "unet1d", keys)
    return network | {"down_dims": list(c.down_dims)}, _scheduler(c, model.num_inference_steps)


def _dit(objective: Any, net: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    c = objective.config
    columns = parameters(net)["transformer_blocks.0.adaLN_modulation.1.weight"].shape[1]
    sizes = ("hidden_dim", "num_layers", "num_heads", "timestep_embed_dim")
    positions = ("use_rope", "rope_base", "use_positional_encoding")
    network = _network(c, columns - c.timestep_embed_dim, "dit", (*sizes, *positions))
    if c.objective == "diffusion":
        return network, _scheduler(c, objective.num_inference_steps)
    method = c.integration_method
    if method not in FLOWS:
        raise ValueError(
            f"policy.config.integration_method: expected one of {', '.join(FLOWS)}, got "
            f"{method!r}; set it to one of these ({scope('samplers')})"
        )
    steps = c.num_integration_steps * STAGES.get(method, 1)
    return network, {"type": method, "num_inference_steps": steps, "prediction_type": VELOCITY}
