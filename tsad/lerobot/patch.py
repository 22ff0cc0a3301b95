"""The methods of LeRobot that look whether tsad samples for an instance, two of each policy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tsad.lerobot.engine import Engine

_MARK = "_tsad_original"

# asked once for every policy that has no engine, what samples and its network; see plugin.py
on_first_chunk: Callable[[Any, Any], Engine | None] | None = None


@dataclass(frozen=True)
class Kind:
    """Of LeRobot's policies: its class, the attribute that samples, and that one's classes."""

    module: str
    policy: str
    owner: str
    owners: tuple[str, ...]
    wrap: Callable[[Any], Any]

    def classes(self) -> tuple[type, tuple[type, ...]]:
        """LeRobot's classes of the policy and of what samples; ``ImportError`` without them."""
        module = importlib.import_module(self.module)
        return getattr(module, self.policy), tuple(getattr(module, name) for name in self.owners)

    def parts(self, policy: Any) -> tuple[Any, Any]:
        """What samples for a policy, and its network."""
        owner = getattr(policy, self.owner)
        return owner, owner.unet if hasattr(owner, "unet") else policy.noise_predictor


def kinds() -> list[Kind]:
    """Those that this LeRobot has; ``ImportError`` names the fix where it has none."""
    found = []
    error: ImportError | None = None
    for kind in _KINDS:
        try:
            kind.classes()
            found.append(kind)
        except ImportError as e:
            error = error or e
    if not found:
        raise missing(error) from error
    return found


def missing(error: ImportError | None, extras: str = "diffusion") -> ImportError:
    """What to raise where LeRobot, or these extras of it, could not be imported."""
    return ImportError(
        f"tsad.lerobot needs LeRobot 0.4 or later, which could not be imported ({error}); "
        f'install it with: pip install "lerobot[{extras}]"'
    )


def parts_of(policy: Any) -> tuple[Any, Any] | None:
    """What samples in a policy, and its network, in whatever wraps it (torch.compile, PEFT); None
    for a policy that tsad does not sample.
    """
    for kind in kinds():
        policy_class, owner_classes = kind.classes()
        inner = policy
        for name in ("_orig_mod", "base_model", "model"):
            if not isinstance(inner, policy_class):
                inner = getattr(inner, name, inner)
        if isinstance(inner, policy_class) and isinstance(
            getattr(inner, kind.owner), owner_classes
        ):
            return kind.parts(inner)
    return None


def attached(owner: Any, engine: Engine | None) -> None:
    """Give the instance an engine, or none; it is no part of the module's state."""
    owner.__dict__["_tsad"] = engine


def install() -> None:
    """Patch the methods; a second time changes nothing."""
    for kind in kinds():
        policy_class, owner_classes = kind.classes()
        for owner_class in owner_classes:
            _replace(owner_class, "conditional_sample", kind.wrap)
        _replace(policy_class, "reset", functools.partial(_resetting, kind))


def uninstall() -> None:
    """LeRobot's own methods again, for every policy."""
    for kind in kinds():
        policy_class, owner_classes = kind.classes()
        for owner, name in (*((c, "conditional_sample") for c in owner_classes),
                            (policy_class, "reset")):  # fmt: skip
            original = getattr(getattr(owner, name), _MARK, None)
            if original is not None:
                setattr(owner, name, original)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        method = functools.wraps(original)(wrap(original))
        setattr(method, _MARK, original)
        setattr(owner, name, method)


def asked(owner: Any, net: Any) -> Engine | None:
    """The instance's engine; what has not been looked at yet is, and raises what does not fit."""
    if "_tsad" not in owner.__dict__ and on_first_chunk is not None:
        owner.__dict__["_tsad"] = on_first_chunk(owner, net)
    engine: Engine | None = owner.__dict__.get("_tsad")
    return engine


def _engine_of(owner: Any, net: Any, condition: Any) -> Engine | None:
    """The engine that samples now."""
    engine = asked(owner, net)
    return engine if engine is not None and engine.runs(owner, condition) else None


def _sampling_unet(original: Any) -> Any:
    def conditional_sample(
        self: Any,
        batch_size: int,
        global_cond: Any = None,
        generator: Any = None,
        noise: Any = None,
    ) -> Any:
        engine = _engine_of(self, self.unet, global_cond)
        if engine is not None:
            return engine.sample(self, self.unet, batch_size, global_cond, generator, noise)
        given = {} if noise is None else {"noise": noise}  # unknown to old versions
        return original(self, batch_size, global_cond=global_cond, generator=generator, **given)

    return conditional_sample


def _sampling_dit(original: Any) -> Any:
    def conditional_sample(self: Any, model: Any, batch_size: int, conditioning_vec: Any) -> Any:
        engine = _engine_of(self, model, conditioning_vec)
        if engine is not None:
            return engine.sample(self, model, batch_size, conditioning_vec)
        return original(self, model, batch_size, conditioning_vec)

    return conditional_sample


def _resetting(kind: Kind, original: Any) -> Any:
    def reset(self: Any) -> Any:
        owner = getattr(self, kind.owner, None)
        engine = None if owner is None else owner.__dict__.get("_tsad")
        if engine is not None:
            engine.reset(kind.parts(self)[1])
        return original(self)

    return reset


_KINDS = (
    Kind(
        module="lerobot.policies.diffusion.modeling_diffusion",
        policy="DiffusionPolicy",
        owner="diffusion",
        owners=("DiffusionModel",),
        wrap=_sampling_unet,
    ),
    Kind(  # since 0.5.1
        module="lerobot.policies.multi_task_dit.modeling_multi_task_dit",
        policy="MultiTaskDiTPolicy",
        owner="objective",
        owners=("DiffusionObjective", "FlowMatchingObjective"),
        wrap=_sampling_dit,
    ),
)
