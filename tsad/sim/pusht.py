"""Push-T in gym-pusht: push the T onto its goal; the low-dimensional task of Diffusion Policy.

Observation (20 numbers): nine keypoints of the T (x, y each), then the agent's x and y, in pixels
of the 512 x 512 table. The keypoints are recomputed from the state, as they were for training:
gym-pusht's own keypoint observation has eight other points, which are what policies of LeRobot are
trained on (`PushTCorners`). Action: where the agent shall go.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad._extras import require
from tsad.sim import FloatArray, Observations, Step

SUCCESS_COVERAGE = 0.95  # of the goal's area; the score is the coverage relative to this
STEP_SECONDS = 0.1  # of the robot, per step


@functools.cache
def _local_keypoints() -> NDArray[np.float64]:
    """The nine keypoints in the block's frame, (9, 2) pixels."""
    text = resources.files("tsad").joinpath("assets/pusht/keypoints.json").read_text()
    local = np.array(json.loads(text)["local_keypoints_block_frame_px"], np.float64)
    local.setflags(write=False)
    return local


def keypoints(block_x: float, block_y: float, angle: float) -> NDArray[np.float64]:
    """The nine keypoints of a T at a pose, (9, 2) pixels: R(angle) @ local + position."""
    c, s = np.cos(angle), np.sin(angle)
    # Points are rows here, so the rotation stands transposed on the right.
    turned = _local_keypoints() @ np.array([[c, s], [-s, c]])
    return np.asarray(turned + np.array([block_x, block_y]), np.float64)


def observation(state: FloatArray) -> NDArray[np.float32]:
    """The policy's observation, float32 (20,), of a state: agent x, y, block x, y, angle."""
    agent_x, agent_y, block_x, block_y, angle = (float(value) for value in state)
    points = keypoints(block_x, block_y, angle).ravel()
    return np.concatenate([points, [agent_x, agent_y]]).astype(np.float32)


def score(coverage: float) -> float:
    """The score of a moment: how much of the goal is covered, 1 from 95 % on."""
    return min(max(coverage / SUCCESS_COVERAGE, 0.0), 1.0)


def coverage(states: FloatArray) -> NDArray[np.float32]:
    """Share of the goal that the block covers in each state, float32 (N,); states (N, 5)."""
    shapely: Any = require("shapely", extra="sim", purpose="the coverage of the goal")
    simulator = _make_simulator()
    simulator.reset()
    corners = np.array([[tuple(v) for v in s.get_vertices()] for s in simulator._block_shapes])
    goal = shapely.polygons(_placed(corners, simulator.goal_pose[None])[0])
    block = shapely.polygons(_placed(corners, np.asarray(states, np.float64)[:, 2:]))
    # A T is two rectangles without common points inside, so the parts' overlaps add up.
    common = shapely.area(shapely.intersection(block[:, :, None], goal)).sum((1, 2))
    return np.asarray(common / shapely.area(goal).sum(), np.float32)


def _placed(corners: FloatArray, poses: FloatArray) -> NDArray[np.float64]:
    """Corners (parts, 4, 2) at poses (N, 3): x, y, angle; (N, parts, 4, 2)."""
    c, s = np.cos(poses[:, 2]), np.sin(poses[:, 2])
    turn = np.stack([np.stack([c, s], -1), np.stack([-s, c], -1)], -2)  # points are rows
    return np.asarray(corners @ turn[:, None] + poses[:, None, None, :2], np.float64)


def _make_simulator() -> Any:
    """gym-pusht's environment itself, without gymnasium's wrappers: no checks at each step."""
    # Read by SDL and pygame when imported: no window, no greeting on standard output.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    module = require("gym_pusht.envs.pusht", extra="sim", purpose="the simulator 'pusht'")
    return module.PushTEnv(obs_type="state", render_mode="rgb_array")


@contextmanager
def _interrupt_waits() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block.

    At every contact pymunk calls gym-pusht back from C, and an exception raised there, as Ctrl-C's
    is, would be printed and dropped: the run would go on.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # ignored, the system's default, or another thread's to hear
        return
    received: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *details: received.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])


class _Table(ABC):
    """One table with a T; see `tsad.sim.Environment`.

    An episode ends when more than 95 % of the goal is covered, or after 300 steps of 0.1 s.
    """

    action_dim = 2
    max_steps = 300

    def __init__(self) -> None:
        self._simulator = _make_simulator()

    def reset(self, seed: int) -> Observations:
        # The cross that marks the last action would outlive the episode in pictures.
        self._simulator._last_action = None
        with _interrupt_waits():
            state, _ = self._simulator.reset(seed=seed)
        return self.observation(state)

    @abstractmethod
    def observation(self, state: FloatArray) -> Observations:
        """What the policy sees of the state that the table is in: agent x, y, block x, y, angle."""

    def step(self, action: FloatArray) -> Step:
        with _interrupt_waits():
            state, _, _, _, info = self._simulator.step(np.asarray(action, np.float64))
        # gym-pusht adds the areas of a set of shapes, in the order of their addresses in memory:
        # the last bits would differ from run to run.
        coverage = round(float(info["coverage"]), 12)
        success = coverage > SUCCESS_COVERAGE
        return Step(self.observation(state), score(coverage), success, success)

    def state(self) -> NDArray[np.float32]:
        """Agent x, y, block x, y, angle: float32 (5,), as demonstrations record it."""
        return np.asarray(self._simulator.get_obs(), np.float32)

    def rest_action(self) -> NDArray[np.float32]:
        """Go to where the agent is: its x and y."""
        return self.state()[:2]

    def snapshot(self) -> tuple[Any, ...]:
        """All that the coming steps depend on, for `restore` of this or of another table."""
        agent, block = self._simulator.agent, self._simulator.block
        moving = (tuple(agent.position), tuple(agent.velocity))
        pose = (tuple(block.position), block.angle)
        return (*moving, *pose, tuple(block.velocity), block.angular_velocity)

    def restore(self, snapshot: tuple[Any, ...]) -> Observations:
        """Set the table to a snapshot; returns the observation. After at least one `reset`."""
        agent, block, space = self._simulator.agent, self._simulator.block, self._simulator.space
        # The angle first: it turns the block about its centre of gravity, which moves its position.
        agent.position, agent.velocity, position, block.angle, velocity, turning = snapshot
        block.position, block.velocity, block.angular_velocity = position, velocity, turning
        space.reindex_shapes_for_body(agent)
        space.reindex_shapes_for_body(block)
        return self.observation(self.state())

    def render(self, size: int) -> NDArray[np.uint8]:
        self._simulator.visualization_width = self._simulator.visualization_height = size
        frame: NDArray[np.uint8] = self._simulator.render()
        return frame

    def close(self) -> None:
        self._simulator.close()


class PushT(_Table):
    """The table as Diffusion Policy's low-dimensional policies see it."""

    name = "pusht"
    obs_dim = 20
    obs_meaning = "9 keypoints x 2, then the agent's x and y, in pixels"

    def observation(self, state: FloatArray) -> NDArray[np.float32]:
        return observation(state)


class PushTCorners(_Table):
    """As LeRobot's policies without cameras see it: gym-pusht's ``environment_state_agent_pos``.

    ``observation.state`` (2) and ``observation.environment_state`` (16) side by side, in the order
    of LeRobot's features.
    """

    name = "pusht_corners"
    obs_dim = 18
    obs_meaning = "the agent's x and y, then the block's 8 corners x 2, in pixels"

    def observation(self, state: FloatArray) -> NDArray[np.float32]:
        shapes = np.array(
            [[tuple(v) for v in s.get_vertices()] for s in self._simulator._block_shapes]
        )
        corners = _placed(shapes, np.asarray(state, np.float64)[None, 2:])
        return np.concatenate([state[:2], corners.ravel()]).astype(np.float32)


class PushTPixels(_Table):
    """As policies with a camera see it: gym-pusht's ``pixels_agent_pos``.

    Every array by two names, LeRobot's and Diffusion Policy's; a policy takes those that it has.
    """

    name = "pusht_pixels"
    obs_shapes = {
        "observation.image": (96, 96, 3),
        "observation.state": (2,),
        "image": (96, 96, 3),
        "agent_pos": (2,),
    }
    obs_meaning = "an image of the table, and the agent's x and y in pixels of the 512 x 512 table"

    def observation(self, state: FloatArray) -> dict[str, NDArray[Any]]:
        # not render(), which marks the last action with a cross
        image: NDArray[np.uint8] = self._simulator._render()
        agent = state[:2].astype(np.float32)
        return dict(zip(self.obs_shapes, (image, agent, image, agent), strict=True))
