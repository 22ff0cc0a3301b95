"""MetaWorld's Push-Wall with two ways round the wall: a second simulator, and its demonstrations.

    pip install metaworld==3.1.1
    cd bench
    python metaworld_task.py --out demos.npz --episodes 300
    tsad eval --simulator metaworld_task:PushWall --policy ...

A hand grips a puck and brings it to a goal behind a wall. The wall of `push-wall-v3` ends beside
the puck, and MetaWorld's expert always goes round that end. Here it stands in the middle and the
expert goes round the left or the right, as a coin says: the mean of what it does there runs into
the wall. `frontier/README.md` has the commands of the report.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tsad
from tsad.files import output_file

TASK = "push-wall-v3"
AT_GOAL = 0.07  # metres: MetaWorld's own for this task
WAY = 0.2  # metres to either side: past the wall's ends, which are at 0.12
CARRIED = 0.045  # metres: the hand's height with the puck
NOISE = 0.3  # of the actions that demonstrations execute, beside those they record, of at most 1

Array = NDArray[np.floating[Any]]


class PushWall:
    """A Sawyer arm whose hand is moved by so much (x, y, z, in centimetres) and closed by force.

    The score is the puck's part of the way to the goal, 1 at the goal.
    """

    name = "metaworld push-wall"
    obs_meaning = "the hand's x, y, z and opening, the puck's x, y, z, the goal's x, y"
    obs_dim, action_dim, max_steps = 9, 4, 200
    packages = ("metaworld", "mujoco", "gymnasium", "numpy")

    def __init__(self) -> None:
        try:
            import metaworld
        except ModuleNotFoundError as error:
            raise tsad.sim.SimulatorError(
                f"{error.name} is not installed, which this task needs; pip install "
                "metaworld==3.1.1"
            ) from error
        benchmark = metaworld.MT1(TASK, seed=0)
        self._env: Any = benchmark.train_classes[TASK]()
        self._env.set_task(benchmark.train_tasks[0])
        self._env.model.body("wall").pos[0] = 0  # MetaWorld has it at 0.1
        self._begin = 1.0

    def reset(self, seed: int) -> Array:
        """The puck and the goal where the seed says, anywhere that MetaWorld has them."""
        space = self._env._random_reset_space
        # what set_task sets: there are 50 tasks, and more seeds than that
        self._env._last_rand_vec = np.random.default_rng(seed).uniform(space.low, space.high)
        obs, _ = self._env.reset()
        self._begin = self._away(obs)
        return _seen(obs)

    def step(self, action: Array) -> tsad.sim.Step:
        """Move the hand."""
        obs, *_ = self._env.step(np.clip(action, -1, 1))
        away = self._away(obs)
        score = float(np.clip((self._begin - away) / (self._begin - AT_GOAL), 0, 1))
        success = away <= AT_GOAL
        return tsad.sim.Step(_seen(obs), score, success, done=success)

    def close(self) -> None:
        """Free the simulator."""
        self._env.close()

    def _away(self, obs: Array) -> float:
        return float(np.linalg.norm(obs[4:7] - self._env._target_pos))


def _seen(obs: Array) -> Array:
    # of 39 numbers: those before it, which policies keep themselves, an object that isn't there,
    # orientations and the goal's height say nothing
    return np.concatenate([obs[:7], obs[36:38]])


def expert(seen: Array, side: int) -> Array:
    """The action (4,) at an observation (9,): round the wall to the left (-1) or right (1)."""
    hand, puck, goal = seen[:3], seen[4:7] - [0.005, 0, 0], seen[7:9]
    off, above = np.linalg.norm(hand[:2] - puck[:2]), hand[2] - puck[2]
    around = off <= 0.04 and above <= 0.055  # the fingers, the puck
    if off > 0.04 or (not around and off > 0.015 and above <= 0.08):
        target = puck + [0, 0, 0.2 if off > 0.06 else 0.12]
    elif not around:
        target = puck - [0, 0, 0.1]  # quickly
    elif seen[3] > 0.6:
        target = puck + [0, 0, 0.03]  # they close
    elif puck[1] < 0.72 and abs(puck[0]) < WAY - 0.02:
        target = np.array([side * WAY, 0.65, CARRIED])
    elif puck[1] < 0.82:
        target = np.array([side * WAY, 0.86, CARRIED])
    else:
        target = np.array([*goal, CARRIED])
    return np.array([*np.clip(10 * (target - hand), -1, 1), 0.6 if around else -1.0])


def demonstrate(episodes: int, seed: int) -> dict[str, NDArray[Any]]:
    """The first so many episodes from a seed on in which the expert arrives."""
    world = PushWall()
    obs: list[Array] = []
    actions: list[Array] = []
    ends: list[int] = []
    sides: list[int] = []
    while len(ends) < episodes:
        rng = np.random.default_rng(seed)
        side = int(rng.choice([-1, 1]))
        seen, done, steps = world.reset(seed), False, []
        while not done and len(steps) < world.max_steps:
            action = expert(seen, side)
            steps.append((seen, action))
            noise = np.append(rng.normal(0, NOISE, 3), 0)
            seen, _, _, done = world.step(action + noise)  # what it does off its path too
        seed += 1
        if done:
            obs += [seen for seen, _ in steps]
            actions += [action for _, action in steps]
            ends.append(len(obs))
            sides.append(side)
    world.close()
    return {
        "obs": np.array(obs, np.float32),
        "action": np.array(actions, np.float32),
        "episode_ends": np.array(ends),
        "side": np.array(sides),
        "last_seed": np.array(seed - 1),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="npz to write")
    parser.add_argument("--episodes", type=int, default=300, help="(default: 300)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: 0)")
    args = parser.parse_args()
    out = output_file(args.out, overwrite=True)
    made = demonstrate(args.episodes, args.first_seed)
    np.savez(out, **made)
    steps = np.diff(made["episode_ends"], prepend=0)
    print(
        f"{out}: {args.episodes} of {made['last_seed'] + 1 - args.first_seed} episodes, "
        f"{steps.sum()} steps, {np.median(steps):.0f} each, "
        f"{np.mean(made['side'] > 0):.0%} to the right"
    )


if __name__ == "__main__":
    main()
