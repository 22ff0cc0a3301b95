"""The two methods of LeRobot that look whether tsad samples for an instance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from tsad.lerobot.engine import Engine

_MARK = "_tsad_original"

# asked once for every policy that has no engine; see plugin.py
on_first_chunk: Callable[[Any], Engine | None] | None = None


def diffusion_classes() -> tuple[Any, Any]:
    """LeRobot's ``DiffusionModel`` and ``DiffusionPolicy``; ``ImportError`` names the fix."""
    try:
        from lerobot.policies.diffusion import modeling_diffusion as module
    except ImportError as error:
        raise ImportError(
            f"tsad.lerobot needs LeRobot 0.4 or later, which could not be imported ({error}); "
            'install it with: pip install "lerobot[diffusion]"'
        ) from error
    return module.DiffusionModel, module.DiffusionPolicy


def attached(model: Any, engine: Engine | None) -> None:
    """Give the instance an engine, or none; it is no part of the module's state."""
    model.__dict__["_tsad"] = engine


def install() -> None:
    """Patch both methods; a second time changes nothing."""
    model_class, policy_class = diffusion_classes()
    if not hasattr(model_class.conditional_sample, _MARK):
        model_class.conditional_sample = _sampling(model_class.conditional_sample)
    if not hasattr(policy_class.reset, _MARK):
        policy_class.reset = _resetting(policy_class.reset)


def uninstall() -> None:
    """LeRobot's own methods again, for every policy."""
    model_class, policy_class = diffusion_classes()
    for owner, name in ((model_class, "conditional_sample"), (policy_class, "reset")):
        original = getattr(getattr(owner, name), _MARK, None)
        if original is not None:
            setattr(owner, name, original)


def _sampling(original: Any) -> Any:
    @functools.wraps(original)
    def conditional_sample(
        self: Any,
        batch_size: int,
        global_cond: Any = None,
        generator: Any = None,
        noise: Any = None,
    ) -> Any:
        if "_tsad" not in self.__dict__ and on_first_chunk is not None:
            self.__dict__["_tsad"] = on_first_chunk(self)
        engine = self.__dict__.get("_tsad")
        if engine is not None and engine.runs(self, global_cond):
            return engine.sample(self, batch_size, global_cond, generator, noise)
        given = {} if noise is None else {"noise": noise}  # unknown to old versions
        return original(self, batch_size, global_cond=global_cond, generator=generator, **given)

    setattr(conditional_sample, _MARK, original)
    return conditional_sample


def _resetting(original: Any) -> Any:
    @functools.wraps(original)
    def reset(self: Any) -> Any:
        engine = getattr(self, "diffusion", None)
        engine = None if engine is None else engine.__dict__.get("_tsad")
        if engine is not None:
            engine.reset(self.diffusion)
        return original(self)

    setattr(reset, _MARK, original)
    return reset
