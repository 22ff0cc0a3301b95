"""LeRobot's server of asynchronous inference, with tsad: ``python -m tsad.lerobot.policy_server``.

    python -m tsad.lerobot.policy_server --host=127.0.0.1 --port=8080

Options and protocol are LeRobot's (``lerobot.async_inference.policy_server``; its robot client
connects as ever). Diffusion policies are sampled by tsad: as their folder's ``tsad.json`` or
``TSAD`` asks, and without either exactly; ``TSAD=off`` leaves all to LeRobot.

LeRobot's server hands a policy one frame, and a diffusion policy, which sees ``n_obs_steps``, stops
at an assertion (LeRobot issue 3861), before 0.6 at its empty queues. Here the frame stands for
those before it, as at the start of an episode. Needs ``pip install "lerobot[async,diffusion]"``.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any

from tsad.lerobot import patch, plugin
from tsad.lerobot.engine import Engine, Settings


def activate() -> None:
    """From now on LeRobot's server makes a `server_class` instead of its own.

    Raises ``ImportError`` without LeRobot, and ``ValueError`` for a ``TSAD`` of no known setting.
    """
    try:
        from lerobot.async_inference import policy_server as theirs
    except ImportError as error:
        raise patch.missing(error, "async,diffusion") from error

    plugin.activate()
    patch.on_first_chunk = _engine_for
    theirs.PolicyServer = server_class()


def _engine_for(owner: Any, net: Any) -> Engine | None:
    """What is asked for, or exact."""
    asked = plugin.engine_for(owner, net)
    if asked is not None or os.environ.get(plugin.VARIABLE, "").strip() == "off":
        return asked
    engine = Engine(Settings())
    engine.check(owner, net)
    return engine


def server_class() -> Any:
    """LeRobot's ``PolicyServer``, for policies that see several frames, too."""
    from lerobot.async_inference import policy_server as theirs

    base: Any = theirs.PolicyServer
    if "_tsad" in base.__dict__:
        return base

    class PolicyServer(base):  # type: ignore[misc]
        _tsad = True
        policy: Any

        def SendPolicyInstructions(self, request: Any, context: Any) -> Any:  # noqa: N802
            """As LeRobot's; the policy knows its folder then, where a tsad.json may be.

            What does not fit is the client's error: one that the first chunk raised would only be
            logged here, and the robot would wait.
            """
            answer = super().SendPolicyInstructions(request, context)
            config = getattr(self.policy, "config", None)
            if config is not None and getattr(config, "pretrained_path", None) is None:
                specs = pickle.loads(request.data)  # which LeRobot's own method has just done
                config.pretrained_path = specs.pretrained_name_or_path
            try:
                make_ready(self.policy)
            except Exception:
                self.policy = None  # nothing runs what was refused
                raise
            return answer

        def _get_action_chunk(self, observation: dict[str, Any]) -> Any:
            frames = repeated(observation, self.policy.config)
            if getattr(self.policy.config, "type", None) == "diffusion":
                frames = queued(frames, self.policy)
            return super()._get_action_chunk(frames)

    return PolicyServer


def make_ready(policy: Any) -> None:
    """Have the policy's engine, and on the CPU its weights, before the first chunk.

    Policies that tsad does not sample stay as they are. Raises what a first chunk would.
    """
    parts = None if policy is None else patch.parts_of(policy)
    if parts is None:
        return
    engine = patch.asked(*parts)
    if engine is not None and next(parts[1].parameters()).device.type == "cpu":
        engine.prepare(*parts)


def repeated(observation: dict[str, Any], config: Any) -> dict[str, Any]:
    """A batch of single frames as one of ``n_obs_steps`` equal ones, of a diffusion policy.

    ``observation``: (B, ...) by name; what comes with a frame's axis stays as it is.
    """
    if getattr(config, "type", None) != "diffusion":
        return observation
    frames = dict(observation)
    for name, feature in config.input_features.items():
        value = frames.get(name)
        if value is not None and value.ndim == 1 + len(feature.shape):
            frames[name] = value.unsqueeze(1).expand(-1, config.n_obs_steps, *value.shape[1:])
    return frames


def queued(frames: dict[str, Any], policy: Any) -> dict[str, Any]:
    """Frames (B, n_obs_steps, ...) by name, in the queues of a diffusion policy, too.

    Before LeRobot 0.6 its chunk is of the queues, which only ``select_action`` fills; from then on
    of what is in them, or, while they are empty, of the batch.
    """
    import torch

    frames = {name: value for name, value in frames.items() if name in policy.config.input_features}
    if policy.config.image_features:
        cameras = [frames[name] for name in policy.config.image_features]
        frames["observation.images"] = torch.stack(cameras, dim=-4)
    for name, queue in policy._queues.items():
        queue.clear()
        if name in frames:
            queue.extend(frames[name].unbind(1))
    return frames


def main() -> None:
    """Serve, with LeRobot's options."""
    try:
        activate()
    except (ImportError, ValueError) as error:
        sys.exit(f"tsad.lerobot.policy_server: error: {error}")
    from lerobot.async_inference.policy_server import serve

    serve()


if __name__ == "__main__":
    main()
