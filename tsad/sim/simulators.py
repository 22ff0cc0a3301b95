"""Simulators by name, and what is asked of one: `Environment`.

Everything that comes from a simulator is checked here, for most are somebody's own: which members
it has, what its observations look like, what a step gives.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tsad._extras import MissingExtraError
from tsad.families.resnet import COLOURS
from tsad.files import sha256

FloatArray = NDArray[np.floating[Any]]
Observation = NDArray[Any]
Observations = Observation | dict[str, Observation]
"""What a simulator gives: one row of numbers, or arrays by the names that the policy has them."""


class SimulatorError(ValueError):
    """A simulator that isn't one; the message says what it lacks, or what came of it."""


class Step(NamedTuple):
    """What one environment step gives.

    `obs` is the observation of the policy in its own raw units, as `Environment.reset` returns it.
    `score` is in [0, 1]; the score of an episode is the largest of its steps. `done` ends the
    episode early.
    """

    obs: Observations
    score: float
    success: bool
    done: bool


class Environment(Protocol):
    """One simulated world, stepped by one lane. A seed fixes it completely.

    `obs_dim` and `action_dim` are those of the policies that fit; an episode ends after `max_steps`
    steps, if none of them was `done`. `name` and `obs_meaning` are for messages.

    A simulator with cameras has `obs_shapes` in the place of `obs_dim`, and so may others whose
    policies have names for what they see (``policy.config["features"]``): the shape of each array
    by its name, (dim,) of numbers, (H, W, 3) of uint8 images, (3, H, W) of float32 images from 0 to
    1. An observation is a dict of them. There may be more than a policy sees.
    """

    name: str
    action_dim: int
    max_steps: int
    obs_meaning: str

    def reset(self, seed: int) -> Observations:
        """Start the episode of `seed`; returns the first observation, raw units.

        That is (obs_dim,), or a dict of arrays if there is `obs_shapes`.
        """

    def step(self, action: FloatArray) -> Step:
        """Execute one action, float32 (action_dim,), raw units."""

    def close(self) -> None:
        """Free what the simulator holds."""

    def rest_action(self) -> FloatArray:
        """The action (action_dim,), raw units, that keeps the robot where it is now.

        Needed with a delay alone: ``tsad eval --realtime``.
        """

    def render(self, size: int) -> NDArray[np.uint8]:
        """The scene as it is now, uint8 (size, size, 3). Needed for films alone."""


class Facts(NamedTuple):
    """What is known of a simulator without importing it: see `register`."""

    location: str
    first_seed: int
    packages: tuple[str, ...]
    folder: str = ""
    source_sha256: str = ""


# The modules are imported when an environment is made: their packages are an optional extra.
_REGISTRY: dict[str, Facts] = {
    # Seeds from 100000 are Diffusion Policy's test seeds for this task.
    "pusht": Facts("tsad.sim.pusht:PushT", 100_000, ("gym-pusht", "pymunk")),
    "pusht_corners": Facts("tsad.sim.pusht:PushTCorners", 100_000, ("gym-pusht", "pymunk")),
    "pusht_pixels": Facts(
        "tsad.sim.pusht:PushTPixels", 100_000, ("gym-pusht", "pymunk", "pygame", "opencv-python")
    ),
}


def names() -> list[str]:
    """The simulators that `make` knows, sorted."""
    return sorted(_REGISTRY)


def facts(name: str) -> Facts:
    """What was registered as `name`; ValueError if nothing was."""
    if name not in _REGISTRY:
        raise ValueError(
            f"name: unknown simulator {name!r}; expected one of {', '.join(names())}; "
            "tsad.sim.register adds one"
        )
    return _REGISTRY[name]


def register(
    name: str,
    location: str,
    *,
    first_seed: int = 0,
    packages: tuple[str, ...] = (),
    folder: str = "",
    source_sha256: str = "",
) -> None:
    """Add a simulator.

    Args:
        name: for `make`, and in the commands' place of SIMULATOR.
        location: "module:factory"; the factory is called without arguments, makes an `Environment`,
            and may be its class.
        first_seed: of the episodes that ``tsad eval`` plays; 100000, say: seeds below 10000 are to
            collect on, those below 20000 to choose settings on.
        packages: the distributions whose versions decide its results; they are kept with them.
        folder: where the module lies, if it is not installed.
        source_sha256: of the module, which is kept with its results too.
    """
    _REGISTRY[name] = Facts(location, first_seed, packages, folder, source_sha256)


def register_own(location: str, folder: str | os.PathLike[str]) -> None:
    """`register` "module:factory" of a folder, or of what is installed, under that name.

    It is imported to see that it is there, and the source hashed; the factory's attributes
    `packages` and `first_seed`, if it has them, are those of `register`.

    Raises:
        SimulatorError: it can't be imported, or has no such factory.
    """
    found = Facts(location, 100_000, (), str(folder))
    factory = _factory(found)
    source = getattr(sys.modules[location.partition(":")[0]], "__file__", None)
    packages = tuple(getattr(factory, "packages", ()))
    first_seed = int(getattr(factory, "first_seed", found.first_seed))
    register(
        location,
        location,
        first_seed=first_seed,
        packages=packages,
        folder=found.folder,
        source_sha256="" if source is None else sha256(source),
    )


def make(name: str) -> Environment:
    """Build the simulator `name`.

    Raises:
        ValueError: the name is unknown.
        SimulatorError: a ValueError: it can't be imported or made, or lacks what `Environment` has.
        MissingExtraError: it comes with tsad, and its extra is not installed.
    """
    found = facts(name)
    factory = _factory(found)
    try:
        environment: Environment = factory()
    except (MissingExtraError, SimulatorError):  # in its own words
        raise
    except Exception as error:
        raise SimulatorError(
            f"{found.location}() failed: {describe(error)}; it is called without arguments, and "
            "makes a tsad.sim.Environment"
        ) from error
    _check_members(environment, found.location)
    return environment


def describe(error: BaseException) -> str:
    """An exception in words, with the line that raised it; a simulator's own are enough."""
    if isinstance(error, SimulatorError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


# ---- what is checked


def _factory(found: Facts) -> Any:
    name, colon, attribute = found.location.partition(":")
    if not (name and colon and attribute):
        raise SimulatorError(
            f"got {found.location!r}, expected MODULE:FACTORY, e.g. my_robot:make for the function "
            "make of my_robot.py"
        )
    if found.folder and found.folder not in sys.path:
        sys.path.insert(0, found.folder)
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not f"{name}.".startswith(f"{absent}."):
            said = f"the module {name!r} can't be imported: {describe(error)}"
            raise SimulatorError(said) from error
        hint = "; without .py" if name.endswith(".py") else ""
        folder, _, last = name.removesuffix(".py").rpartition("/")
        if folder:
            hint = f"; a module, not a path: {last}:{attribute}, called in {folder}"
        raise SimulatorError(
            f"got {found.location!r}, but no module {absent!r} is in {found.folder or 'sys.path'} "
            f"or installed; expected MODULE:FACTORY{hint}"
        ) from None
    factory = getattr(module, attribute, None)
    if not callable(factory):
        choices = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        near = difflib.get_close_matches(attribute, choices, 1)
        what = "which is not callable" if factory is not None else "which it does not have"
        file = getattr(module, "__file__", None) or name
        raise SimulatorError(
            f"got {attribute!r} of {file}, {what}; expected a function or class that makes a "
            f"tsad.sim.Environment{f': {near[0]}?' if near else ''}"
        )
    return factory


_SIZES = ("obs_dim", "action_dim", "max_steps")  # no obs_dim where there is obs_shapes
_TEXTS = ("name", "obs_meaning")
_METHODS = ("reset(seed)", "step(action)", "close()")


def _check_members(environment: Any, location: str) -> None:
    """SimulatorError naming every member that an `Environment` has and this lacks."""
    kind = type(environment).__name__
    shapes = getattr(environment, "obs_shapes", None)
    sizes = _SIZES if shapes is None else _SIZES[1:]
    missing = [name for name in (*_TEXTS, *sizes) if getattr(environment, name, None) is None]
    missing += [
        method
        for method in _METHODS
        if not callable(getattr(environment, method.partition("(")[0], None))
    ]
    if missing:
        gym = hasattr(environment, "observation_space")
        hint = "; wrap the gymnasium environment in a class that has them" if gym else "; add them"
        raise SimulatorError(
            f"{location}() gives a {kind} without {', '.join(missing)}, expected all that "
            f"tsad.sim.Environment says{hint}"
        )
    if shapes is not None and not _are_shapes(shapes):
        raise SimulatorError(
            f"{location}() gives a {kind} whose obs_shapes is {shapes!r}, expected a dict of "
            'names, each with (dim,), (H, W, 3) or (3, H, W); e.g. {"observation.state": (2,)}'
        )
    for name in sizes:
        value = getattr(environment, name)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise SimulatorError(
                f"{location}() gives a {kind} whose {name} is {value!r}, expected an int of at "
                "least 1; set it in the class"
            )


def _are_shapes(shapes: Any) -> bool:
    return (
        isinstance(shapes, dict)
        and bool(shapes)
        and all(
            isinstance(name, str)
            and isinstance(shape, tuple)
            and (len(shape) == 1 or (len(shape) == 3 and COLOURS in (shape[0], shape[-1])))
            and all(isinstance(n, int | np.integer) and n >= 1 for n in shape)
            for name, shape in shapes.items()
        )
    )


def obs_shapes(environment: Environment) -> dict[str, tuple[int, ...]] | None:
    """Shapes of its observations by name; None if they are one row of numbers."""
    return getattr(environment, "obs_shapes", None)


def first_observation(environment: Environment, seed: int) -> Observations:
    """`reset`, checked."""
    return _observed(environment, environment.reset(seed), f"reset({seed})", "the observation")


def rest(environment: Environment) -> NDArray[np.float32]:
    """`rest_action`, checked: float32 (action_dim,)."""
    action = getattr(environment, "rest_action", None)
    if action is None:
        raise SimulatorError(
            f"simulator '{environment.name}' has no rest_action, and with a delay nothing else is "
            "known to do at first; give it one (tsad.sim.Environment)"
        )
    return vector(environment, action(), environment.action_dim, "rest_action()", "the action")


def stepped(environment: Environment, action: FloatArray) -> Step:
    """`step`, checked: its observation, a score in [0, 1]."""
    step: Any = environment.step(action)
    if not isinstance(step, Step):
        size = f" of {len(step)}" if isinstance(step, tuple) else ""
        raise SimulatorError(
            f"simulator '{environment.name}': step(action) gave a {type(step).__name__}{size}, "
            "expected a tsad.sim.Step; return tsad.sim.Step(obs, score, success, done)"
        )
    obs = _observed(environment, step.obs, "step(action)", "its obs")
    if not 0 <= step.score <= 1:
        raise SimulatorError(
            f"simulator '{environment.name}': step(action) gave the score {step.score}, expected 0 "
            "to 1; divide by the largest that there can be, or clip it"
        )
    return Step(obs, float(step.score), bool(step.success), bool(step.done))


def _observed(environment: Environment, value: Any, call: str, what: str) -> Observations:
    """What a simulator gave as observation: float32 (obs_dim,), or arrays of its `obs_shapes`."""
    shapes = obs_shapes(environment)
    if shapes is None:
        return vector(environment, value, environment.obs_dim, call, what)  # type: ignore[attr-defined]
    if not isinstance(value, dict) or set(value) != set(shapes):
        got = sorted(map(str, value)) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise SimulatorError(
            f"simulator '{environment.name}': {what} of {call}: expected a dict with the keys "
            f"{list(shapes)}, as its obs_shapes says, got {got}"
        )
    return {
        name: vector(environment, value[name], shape[0], call, f"{what}[{name!r}]")
        if len(shape) == 1
        else _image(environment, value[name], shape, call, f"{what}[{name!r}]")
        for name, shape in shapes.items()
    }


def _image(
    environment: Environment, value: Any, shape: tuple[int, ...], call: str, what: str
) -> Observation:
    # a copy: a renderer may draw the next one over it
    image = np.array(value)
    dtype = np.dtype(np.uint8 if shape[-1] == COLOURS else np.float32)
    if image.shape != shape or image.dtype != dtype:
        raise SimulatorError(
            f"simulator '{environment.name}': {what} of {call}: expected {dtype} {shape}, as its "
            f"obs_shapes says, got {image.dtype} {image.shape}; uint8 images are (H, W, "
            f"{COLOURS}), float32 ones ({COLOURS}, H, W) from 0 to 1"
        )
    return image


def vector(
    environment: Environment, value: Any, size: int, call: str, what: str
) -> NDArray[np.float32]:
    """Numbers that a simulator gave, as float32 (size,); SimulatorError if they are none."""
    array = np.asarray(value) if not isinstance(value, tuple) else np.empty(0, object)
    fix = ""
    if array.dtype.kind not in "fiu":
        got = f"{type(value).__name__} of {len(value)}" if isinstance(value, tuple) else array.dtype
        fix = f"{got}; return a NumPy array, float32"
    elif array.shape != (size,):
        fix = f"shape {array.shape}; return one row of {size} numbers, as its sizes say"
    elif not np.isfinite(array).all():
        where = int(np.flatnonzero(~np.isfinite(array))[0])
        fix = f"{array[where]} in element {where}; find where it is from"
    if fix:
        raise SimulatorError(
            f"simulator '{environment.name}': {what} of {call}: expected {size} finite numbers, "
            f"got {fix}"
        )
    return array.astype(np.float32, copy=False)
