"""LeRobot's diffusion policies, sampled by tsad: ``accelerate(policy)`` and ``restore(policy)``.

The policy stays LeRobot's: its class, parameters, queues, processors and encoders. Only
``conditional_sample``, the denoising loop over the UNet of a ``diffusion`` policy or the DiT of a
``multi_task_dit``, runs in tsad's core. Two methods of each are patched, once per process, and look
at the instance: ``conditional_sample`` of what samples and ``reset`` of the policy. A policy that
was not accelerated runs LeRobot's own code.

    from tsad.lerobot import accelerate

    accelerate(policy)                                     # exact: the same actions, sooner
    accelerate(policy, sampler="ddim", num_inference_steps=8, precision="int8")

Exact means: the random numbers are LeRobot's own, drawn from the same generator in the same order,
and the actions equal LeRobot's up to float32 rounding. Needs LeRobot 0.4 or later.
"""

from __future__ import annotations

from typing import Any

from tsad.lerobot.engine import Engine, Settings
from tsad.lerobot.patch import attached, install, parts_of

__all__ = ["Settings", "accelerate", "is_accelerated", "refresh", "restore"]


def accelerate(policy: Any, **settings: Any) -> Any:
    """Let tsad sample the actions of ``policy``; returns it.

    It is a LeRobot ``DiffusionPolicy`` or ``MultiTaskDiTPolicy``.

    Keywords are those of `Settings`: ``sampler``, ``num_inference_steps``, ``timestep_spacing``,
    ``precision``, ``threads``, ``sparsity``, ``plan``. Without any, actions are LeRobot's own. The
    core takes the weights at the next chunk, and again when they have changed. While gradients are
    on, away from the CPU and, of a ``MultiTaskDiTPolicy``, in training mode (it has dropout),
    LeRobot's own code runs.

    Raises ``TypeError`` for another policy, another keyword or a value of another type, and
    ``ValueError`` for settings that do not fit.
    """
    owner, net = _parts(policy)
    known = tuple(Settings.__dataclass_fields__)
    for name in settings:
        if name not in known:
            raise TypeError(
                f"accelerate: unknown keyword {name!r}; known are {', '.join(known)}; leave it out"
            )
    install()
    engine = Engine(Settings(**settings))
    engine.check(owner, net)
    attached(owner, engine)
    return policy


def restore(policy: Any) -> Any:
    """LeRobot's own sampling again; returns ``policy``. One that is not accelerated stays so."""
    attached(_parts(policy)[0], None)
    return policy


def is_accelerated(policy: Any) -> bool:
    """Whether tsad samples the actions of ``policy``."""
    return isinstance(_parts(policy)[0].__dict__.get("_tsad"), Engine)


def refresh(policy: Any) -> None:
    """Take the weights anew at the next chunk.

    Changes through ``.data`` (an EMA that swaps weights in place) cannot be seen before the next
    ``reset``; call this after one in mid-episode.
    """
    engine = _parts(policy)[0].__dict__.get("_tsad")
    if isinstance(engine, Engine):
        engine.forget()


def _parts(policy: Any) -> tuple[Any, Any]:
    """What samples in a policy, and its network, in whatever wraps it (torch.compile, PEFT)."""
    found = parts_of(policy)
    if found is not None:
        return found
    raise TypeError(
        "policy: expected a LeRobot DiffusionPolicy or MultiTaskDiTPolicy, got "
        f"{type(policy).__module__}.{type(policy).__qualname__}; tsad samples LeRobot's "
        '"diffusion" and "multi_task_dit" policies'
    )
