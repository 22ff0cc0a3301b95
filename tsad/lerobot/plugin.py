"""Acceleration without a line of code: what a checkpoint's ``tsad.json`` or ``TSAD`` asks for.

``lerobot_policy_tsad``, which LeRobot's commands import at their start, calls `activate`. From then
on a diffusion policy is looked at before its first chunk: its folder is ``config.pretrained_path``.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from tsad.lerobot import patch
from tsad.lerobot.engine import Engine, Settings

SIDECAR = "tsad.json"
VARIABLE = "TSAD"
_log = logging.getLogger("tsad")


def activate() -> None:
    """Look at every policy that tsad can sample from now on; a second time changes nothing.

    Raises ``ValueError`` for a ``TSAD`` that says nothing known. LeRobot's commands log that and go
    on, and so the first chunk raises it, too.
    """
    patch.install()
    patch.on_first_chunk = engine_for
    wanted(None)


def engine_for(owner: Any, net: Any) -> Engine | None:
    """The engine that a policy asks for; None: it runs as it is.

    Raises ``ValueError`` naming the file or the variable.
    """
    settings, source = wanted(getattr(owner.config, "pretrained_path", None))
    if settings is None:
        return None
    engine = Engine(settings)
    try:
        engine.check(owner, net)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    exact = "the same actions" if settings.is_exact else "other actions than LeRobot's"
    _log.info("tsad samples this policy, as %s asks: %s (%s)", source, engine, exact)
    return engine


def wanted(folder: str | os.PathLike[str] | None) -> tuple[Settings | None, str]:
    """What is asked for a policy of this folder, and by whom.

    The environment comes before the file. Raises ``ValueError`` naming the file or the variable.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text == "off":
        return None, VARIABLE
    if text:
        return _settings(_read_variable(text), f"{VARIABLE}={text}"), VARIABLE
    file = None if folder is None else Path(folder) / SIDECAR
    if file is None or not os.path.lexists(file):
        return None, ""
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: expected a file with a JSON object of settings, got {error}; write one, or "
            "remove it"
        ) from error
    return _settings(given, str(file)), str(file)


def _read_variable(text: str) -> dict[str, Any]:
    """``exact``, or ``key=value,...`` with numbers where they look like one."""
    if text == "exact":
        return {}
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(
                f'{VARIABLE}: expected "exact", "off" or key=value,..., got {part!r} in {text!r}; '
                'write for example TSAD="sampler=ddim,num_inference_steps=8"'
            )
        try:
            given[key.strip()] = json.loads(value)
        except ValueError:
            given[key.strip()] = value.strip()
    return given


def _settings(given: Any, source: str) -> Settings:
    known = [name for name in Settings.__dataclass_fields__ if name != "plan"]
    if not isinstance(given, dict):
        raise ValueError(f"{source}: expected a JSON object of settings, got {given!r}")
    for key in given:
        if key not in known:
            raise ValueError(
                f"{source}: unknown setting {key!r}: expected only {', '.join(known)}; remove it"
            )
    try:
        return Settings(**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
