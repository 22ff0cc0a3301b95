"""N environments stepped together, one per lane of a policy.

What an episode does depends on its seed alone: the seed fixes the world and, through `noise_seed`,
the noise that its lane draws. So lanes may end at different times and take the next seed, and the
results are those of one lane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tsad.families.resnet import COLOURS
from tsad.image_policy import ImagePolicy
from tsad.sim.disturbance import Disturbance, Disturbed
from tsad.sim.realtime import Delay
from tsad.sim.simulators import (
    Environment,
    Observations,
    first_observation,
    obs_shapes,
    stepped,
)


class Policy(Protocol):
    """What `rollouts` asks of a policy; `tsad.SparsePolicy` has it, and so may your own."""

    @property
    def lanes(self) -> int: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...
    @property
    def obs_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...

    def __call__(self, obs: Any, *, lanes: Sequence[int]) -> Any: ...

    def reset(self, lanes: Sequence[int], seed: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Episode:
    """The result of one seed. Times are wall milliseconds per chunk, the lanes' share of a call.

    `guarded`: chunks before which a `tsad.Guard` let it start anew; None without one. `passes`,
    `most_passes`: evaluations of the whole network that a chunk took on average, and at most, where
    something decides while the episode runs; else None, as plans say it. An episode's first chunk,
    which may be dense or cold whatever is decided, counts if it is the only one.
    """

    seed: int
    score: float
    success: bool
    steps: int
    chunks: int
    chunk_ms_mean: float
    chunk_ms_max: float
    guarded: int | None = None
    passes: float | None = None
    most_passes: float | None = None


class Chunk(NamedTuple):
    """One call of the policy: the seeds of its rows, what it saw, what it said, how long it took.

    `obs` (n, n_obs_steps, obs_dim), or a dict of (n, n_obs_steps, ...), and `actions` (n,
    n_action_steps, action_dim) are copies.
    """

    seeds: list[int]
    obs: Observations
    actions: NDArray[np.float32]
    milliseconds: float


OnStep = Callable[["Environment", int, float], None]
OnChunk = Callable[[Chunk], None]
OnStart = Callable[[int, int], None]


def noise_seed(seed: int, stream: int = 0) -> int:
    """The seed of the policy's noise in the episode `seed`, 63 bits; another for every `stream`.

    It is not `seed` itself: the simulator draws its start from that very stream, and noise that
    repeats the start's bits would be tied to the scene.
    """
    state = np.random.SeedSequence(seed, spawn_key=(1 + stream,)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class _Lane:
    """The episode that one lane plays at the moment."""

    def __init__(
        self, policy: Policy, environment: Environment, delay: Delay, disturb: Disturbance | None
    ) -> None:
        self.environment, self.delay, self.disturb = environment, delay, disturb
        self.n_obs_steps, self.seed = policy.n_obs_steps, -1
        shapes = obs_shapes(environment)
        self.names = [] if shapes is None else _names(policy, environment, shapes)

    def start(self, seed: int) -> None:
        self.seed, self.score, self.success, self.steps, self.asked = seed, 0.0, False, 0, 0
        self.chunk_ms: list[float] = []
        self.disturbed = None if self.disturb is None else Disturbed(self.disturb, seed)
        self.guarded: int | None = None
        self.passes: list[float] = []
        # Before the start nothing was seen: the first observation stands in, as in training.
        first = self.see(first_observation(self.environment, seed))
        self.window = (first,) * self.n_obs_steps
        self.delay.start(self.environment)

    def see(self, obs: Observations) -> Observations:
        if self.disturbed is None or not isinstance(obs, dict):
            return obs
        return self.disturbed({name: x for name, x in obs.items() if name in self.names})

    def act(self, chunk: NDArray[np.float32], on_step: OnStep | None) -> bool:
        """Go on to the next chunk with this one; True when the episode is over."""
        self.asked = self.steps
        for action in self.delay.ask(chunk):
            step = stepped(self.environment, action)
            self.window = (*self.window[1:], self.see(step.obs))
            self.steps += 1
            self.score = max(self.score, step.score)
            self.success = self.success or step.success
            if on_step is not None:
                on_step(self.environment, self.steps, self.score)
            if step.done or self.steps >= self.environment.max_steps:
                return True
        return False

    def episode(self) -> Episode:
        mean, largest = float(np.mean(self.chunk_ms)), max(self.chunk_ms)
        passes = self.passes[1:] or self.passes
        return Episode(
            self.seed,
            self.score,
            self.success,
            self.steps,
            len(self.chunk_ms),
            mean,
            largest,
            self.guarded,
            float(np.mean(passes)) if passes else None,
            max(passes, default=None),
        )


def check(policy: Policy, environment: Environment, *, disturb: Disturbance | None = None) -> None:
    """Does the policy fit the simulator? ValueError saying what differs if it does not.

    ``disturb``: as of `rollouts`, which has to find an image.
    """
    shapes = obs_shapes(environment)
    if isinstance(policy, ImagePolicy) and shapes is None:
        cameras = ", ".join(camera["name"] for camera in policy.config["vision"]["cameras"])
        raise ValueError(
            f"policy: it sees images ({cameras}), but the simulator '{environment.name}' gives "
            f"numbers ({environment.obs_meaning}); play it in one that gives images, as "
            "'pusht_pixels' does, or call it in a loop of your own, with tsad.Recorder around it"
        )
    if shapes is not None:
        names = _names(policy, environment, shapes)
    if disturb is not None and (shapes is None or all(len(shapes[name]) == 1 for name in names)):
        raise ValueError(
            f"disturb: images are disturbed, but of the simulator '{environment.name}' the policy "
            "sees none; leave it out"
        )
    for name in ("obs_dim", "action_dim") if shapes is None else ("action_dim",):
        wanted, got = getattr(environment, name), getattr(policy, name)
        if wanted != got:
            raise ValueError(
                f"policy: {name} is {got}, but the simulator '{environment.name}' has {wanted} "
                f"(observation: {environment.obs_meaning}); load a policy trained for this task"
            )


def _names(
    policy: Policy, environment: Environment, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """What the policy sees of a simulator with `obs_shapes`; ValueError if that is not there."""
    config = getattr(policy, "config", None)
    if config is None:  # a policy of the user's own, who knows
        return list(shapes)
    features = {feature["name"]: feature["dim"] for feature in config.get("features", [])}
    cameras = {camera["name"]: camera for camera in config.get("vision", {}).get("cameras", [])}
    there = f"the simulator '{environment.name}' gives {', '.join(map(repr, shapes))}"
    if not features:
        raise ValueError(
            f"policy: it sees {policy.obs_dim} numbers without names, but {there}; load a policy "
            "with names for what it sees, such as LeRobot's"
        )
    for name, dim in features.items():
        if name not in shapes:
            raise ValueError(
                f"policy: it sees {name!r}, but {there}; load a policy trained for this task, or "
                "add it to the simulator's obs_shapes"
            )
        camera = cameras.get(name)
        wanted: list[tuple[int, ...]] = [(dim,)]
        if camera is not None:
            height, width = camera["height"], camera["width"]
            wanted = [(height, width, COLOURS), (COLOURS, height, width)]
        if shapes[name] not in wanted:
            raise ValueError(
                f"policy: its {name!r} is {' or '.join(map(str, wanted))}, but the simulator "
                f"'{environment.name}' gives {shapes[name]}; load a policy trained for this task"
            )
    return list(features)


def stacked(policy: Policy, environment: Environment, windows: Sequence[Sequence[Any]]) -> Any:
    """What a policy that fits is called with, of the last observations of n lanes.

    (n, n_obs_steps, obs_dim), or a dict of (n, n_obs_steps, ...) of what it sees.
    """
    shapes = obs_shapes(environment)
    if shapes is None:
        return np.stack([np.stack(window) for window in windows])
    return {
        name: np.stack([np.stack([seen[name] for seen in window]) for window in windows])
        for name in _names(policy, environment, shapes)
    }


def check_executed(policy: Policy, n_action_steps: int | None) -> int:
    """How many actions of a chunk are executed; ValueError if the policy returns fewer."""
    executed = policy.n_action_steps if n_action_steps is None else n_action_steps
    if not 1 <= executed <= policy.n_action_steps:
        raise ValueError(
            f"n_action_steps: expected 1 to {policy.n_action_steps}, what the policy returns, got "
            f"{n_action_steps}; choose one of these"
        )
    return executed


def varies(policy: Any) -> bool:
    """Whether something decides as it runs, so that chunks may differ in cost."""
    # a pruner or a rule of rows where there are no plans; a policy around a policy says so
    return bool(getattr(policy, "_varies", getattr(policy, "_plans", False) is None))


def rollouts(
    policy: Policy,
    environments: Sequence[Environment],
    seeds: Iterable[int],
    *,
    on_step: OnStep | None = None,
    on_chunk: OnChunk | None = None,
    on_start: OnStart | None = None,
    n_action_steps: int | None = None,
    noise_stream: int = 0,
    delay: int = 0,
    disturb: Disturbance | None = None,
) -> Iterator[Episode]:
    """Play the episodes of `seeds`; yields each as it ends, in an order that depends on the lanes.

    Args:
        policy: any `Policy`; lane i steps environments[i]. One with a warm start or a lead is
            told how many steps went by since each lane's previous chunk.
        environments: at most policy.lanes of them.
        seeds: one episode each.
        on_step: called with (environment, steps, score so far) at the start and after each step.
        on_chunk: called with a `Chunk` after each call of the policy.
        on_start: called with (seed, lane) when a lane takes an episode.
        n_action_steps: how many of a chunk's actions are executed before the next chunk; default:
            all that the policy returns.
        noise_stream: of `noise_seed`: other noise in the same scenes.
        delay: ticks, steps of the simulator, that go by while a chunk is made: `tsad.sim.realtime`.
        disturb: what is done to the images that the policy sees: `tsad.sim.Disturbance`.

    Raises:
        ValueError: the policy does not fit the simulator, has too few lanes, or returns fewer than
            `n_action_steps`; `delay` is negative, or the simulator has no `rest_action` for it.
        SimulatorError: a ValueError: of what the simulator gives.
        RuntimeError: an action is not finite.
    """
    if not 1 <= len(environments) <= policy.lanes:
        raise ValueError(
            f"environments: got {len(environments)}, expected 1 to {policy.lanes}, "
            "one per lane; load the policy with lanes=N"
        )
    check(policy, environments[0], disturb=disturb)
    executed = check_executed(policy, n_action_steps)
    queue = iter(seeds)
    lanes = [
        _Lane(policy, environment, Delay(executed, delay), disturb) for environment in environments
    ]
    running: list[int] = []

    def take_next(index: int) -> bool:
        seed = next(queue, None)
        if seed is None:
            return False
        if on_start is not None:
            on_start(seed, index)
        lanes[index].start(seed)
        policy.reset(lanes=[index], seed=[noise_seed(seed, noise_stream)])
        if on_step is not None:
            on_step(lanes[index].environment, 0, 0.0)
        return True

    running = [index for index in range(len(lanes)) if take_next(index)]
    while running:
        obs = stacked(policy, environments[0], [lanes[index].window for index in running])
        options: dict[str, Any] = {}
        inner: Any = getattr(policy, "policy", policy)  # of a tsad.Recorder
        if getattr(inner, "warm_start", None) is not None or getattr(inner, "lead", None):
            since = [lanes[index].steps - lanes[index].asked for index in running]
            options["executed"] = np.minimum(since, inner.horizon)
        begin = time.perf_counter()
        actions = np.asarray(policy(obs, lanes=running, **options))
        milliseconds = (time.perf_counter() - begin) * 1e3
        seeds_now = [lanes[index].seed for index in running]
        if not np.isfinite(actions).all():
            raise RuntimeError(f"the policy's actions are not finite in the episodes {seeds_now}")
        if on_chunk is not None:
            on_chunk(Chunk(seeds_now, obs, actions.copy(), milliseconds))
        alarms = getattr(policy, "alarms", None)  # of a tsad.Guard
        still: list[int] = []
        for row, index in enumerate(running):
            lane = lanes[index]
            lane.chunk_ms.append(milliseconds / len(running))
            if alarms is not None:
                lane.guarded = (lane.guarded or 0) + alarms[row]
            if varies(policy):
                spent: Any = policy
                lane.passes.append(spent._stats(index)["cost"] / float(spent.block_costs.sum()))
            if not lane.act(actions[row], on_step):
                still.append(index)
                continue
            yield lane.episode()
            if take_next(index):
                still.append(index)
        running = still
