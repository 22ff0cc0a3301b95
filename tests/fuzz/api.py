"""Random calls, good and bad, on small policies of every family, for hours.

    python tests/fuzz/api.py --minutes 60            print a line a minute; Ctrl-C ends it
    python tests/fuzz/api.py --seed 1234 --worlds 1  one world again, call by call

A world is a policy, a twin on one thread, and some hundred calls. The policy gets all of them, the
twin those that the policy took. A finding is a crash (run it under the sanitizers), a refusal of
an undocumented kind, one that changed something, one that the twin does not share, or a bit by
which the two differ. Signals and threads that interfere with a call are part of it; afterwards
both policies are reset.
"""

from __future__ import annotations

import argparse
import copy
import gc
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lerobot_cases
from cases import random_plan
from policies import make_policy, state

import tsad
from tsad import _core, planners

NETWORKS = ("tiny", "tiny_encoder", "tiny_noncausal", "tiny_long")
FOLDERS = [*lerobot_cases.CASES, *lerobot_cases.DIT_CASES]
SAMPLERS = ("ddpm", "ddim", "dpmsolver++")
CALLS = 120  # of a world


class InterruptError(Exception):
    """Raised by the signal, in the middle of whatever runs."""


class OopsError(Exception):
    """Raised by the caller's own objects."""


# what a call may be refused with
REFUSALS = (TypeError, ValueError, OverflowError, BufferError, AttributeError, OopsError)


class Broken:
    """Raises whatever it is asked."""

    def __index__(self) -> int:
        raise OopsError("index")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise OopsError("array")

    def __dlpack__(self, **_: Any) -> Any:
        raise OopsError("dlpack")

    def __dlpack_device__(self) -> tuple[int, int]:
        raise OopsError("device")

    def __len__(self) -> int:
        raise OopsError("len")

    def __iter__(self) -> Iterator[Any]:
        raise OopsError("iter")


def junk(rng: np.random.Generator) -> Any:
    """Something that hardly any argument expects."""
    things: list[Callable[[], Any]] = [
        lambda: None,
        lambda: bool(rng.integers(2)),
        lambda: int(rng.integers(-3, 6)),
        lambda: int(rng.choice([2**31, 2**63 - 1])) * int(rng.choice([1, -1])) * 2,
        lambda: float(rng.choice([0.0, 0.5, 1.5, -1.0, np.nan, np.inf, 3e38])),
        lambda: str(rng.choice(["", "0", "dense", "ddim", "\0", "ä"])),
        lambda: b"\0",
        lambda: [],
        lambda: {},
        lambda: [junk(rng) for _ in range(rng.integers(4))],
        lambda: (int(rng.integers(3)), "x"),
        lambda: object,
        Broken,
        lambda: array(rng, tuple(rng.integers(0, 5, rng.integers(0, 5)).tolist())),
        lambda: np.float32(rng.standard_normal()),
        lambda: rng.integers(0, 2, rng.integers(1, 5)).astype(bool),
        lambda: np.arange(rng.integers(0, 4)),
        lambda: array(rng, (2, 3)).__dlpack__(),
    ]
    return things[rng.integers(len(things))]()


def array(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Normal numbers of a likely or unlikely type and layout, some of them absurd."""
    x = rng.standard_normal(shape, dtype=np.float32)
    kind = rng.integers(14)
    if x.size and kind in (1, 2):
        x.reshape(-1)[rng.integers(x.size)] = rng.choice([np.nan, np.inf, 3e38, 1e13, -1e30])
    if kind == 3:
        return x.astype(rng.choice([np.float64, np.float16, np.int32, bool]))
    if kind == 4:
        return x.tolist()
    if kind == 5 and x.ndim:
        return np.repeat(x, 2, -1)[..., ::2]  # not contiguous
    if kind == 6 and x.ndim > 1:
        return np.asfortranarray(x)
    if kind == 7:
        return x.byteswap().view(x.dtype.newbyteorder())
    if kind == 8:
        x.flags.writeable = False
    if kind == 9 and x.ndim:
        return x[..., ::-1]
    if kind == 10:
        return np.ma.masked_array(x, x > 1)
    return x


def shape_like(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[int, ...]:
    """That shape, or one that it may be mistaken for."""
    near, kind = list(shape), rng.integers(8)
    if kind == 0 and near:
        near[rng.integers(len(near))] = int(rng.integers(0, 5))
    elif kind == 1:
        near.pop(0)
    elif kind == 2:
        near.insert(0, 1)
    return tuple(near)


class World:
    """A policy and its twin."""

    def __init__(self, seed: int, *, verbose: bool = False) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.verbose, self.calls, self.refused = verbose, 0, 0
        lanes, threads = int(rng.integers(1, 5)), int(rng.integers(1, 4))
        self.kind, self.policy, self.twin = "", None, None
        while self.policy is None:  # not every combination exists
            self.kind, make = self.draw_policy(lanes)
            try:
                self.policy, self.twin = make(threads), make(1)
            except ValueError as error:
                assert "steps" in str(error) or "precision" in str(error), error
        self.say(self.kind)
        self.fresh()

    def draw_policy(self, lanes: int) -> tuple[str, Callable[[int], Any]]:
        rng = self.rng
        precision = str(rng.choice(["float32", "float32", "int16", "int8"]))
        warm = None if rng.integers(2) else int(rng.integers(1, 5))
        options: dict[str, Any] = {"lanes": lanes, "warm_start": warm, "precision": precision}
        if rng.integers(2):
            options |= {"lead": float(rng.uniform(0, 1)), "smoothing": bool(rng.integers(2))}
        if rng.integers(3) == 0:
            name = str(rng.choice(FOLDERS))
            if rng.integers(2):
                options["num_inference_steps"] = int(rng.integers(2, 9))
            path = lerobot_cases.FOLDER / name
            return f"{name} {options}", lambda threads: tsad.load(path, threads=threads, **options)
        name = str(rng.choice(NETWORKS))
        options |= {
            "seed": int(rng.integers(100)),
            "steps": int(rng.integers(4, 9)),
            "sampler": str(rng.choice(SAMPLERS)),
            "pruner": warm is None and bool(rng.integers(2)),
            "backend": rng.choice([None, *_core.backends(), "guarded"]),
        }
        return f"{name} {options}", lambda threads: make_policy(name, threads=threads, **options)

    def say(self, what: str) -> None:
        if self.verbose:
            print(f"{self.calls:5}  {what}", flush=True)

    def run(self, count: int = CALLS) -> None:
        actions = [
            *[self.call] * 8, *[self.bad_call] * 6, *[self.reset] * 3, *[self.assign] * 4,
            *[self.fix_plan] * 4, self.predict, self.read, self.interrupt, self.race, self.replace,
            self.core, self.absurd,
        ]  # fmt: skip
        for _ in range(count):
            action = actions[self.rng.integers(len(actions))]
            self.say(action.__name__)
            action()
            self.calls += 1
        gc.collect()

    def both(self, act: Callable[[Any, np.random.Generator], Any]) -> bool:
        """Whether the policy took it; then the twin must, and answer the same."""
        seed = int(self.rng.integers(2**63))
        before = state(self.policy)
        try:
            got = act(self.policy, np.random.default_rng(seed))
        except REFUSALS as error:
            self.say(f"    {type(error).__name__}: {error}")
            assert str(error), "an error that says nothing"
            assert state(self.policy) == before, "a refused call changed something"
            self.refused += 1
            return False
        same(act(self.twin, np.random.default_rng(seed)), got)
        return True

    def fresh(self) -> None:
        seeds = self.rng.integers(0, 2**63, self.policy.lanes).tolist()
        for policy in (self.policy, self.twin):
            policy.reset(seed=seeds)

    # ---- calls

    def arguments(self, policy: Any, rng: np.random.Generator) -> dict[str, Any]:
        """Of a good call."""
        n, options = policy.lanes, {}
        if rng.integers(3) == 0:
            lanes = rng.permutation(n)[: rng.integers(1, n + 1)]
            n = len(lanes)
            mask = np.isin(np.arange(policy.lanes), lanes)
            options["lanes"] = [lanes, lanes.tolist(), mask, mask.tolist()][rng.integers(4)]
        draw = rng.standard_normal
        options["obs"] = draw((n, policy.n_obs_steps, policy.obs_dim), dtype=np.float32)
        if rng.integers(3) == 0:
            shape = (n, policy.horizon, policy.action_dim)
            steps = (policy.model.n_steps,) * int(rng.integers(2))
            options["noise"] = draw((*steps, *shape), dtype=np.float32)
        if rng.integers(3) == 0:
            options["return_horizon"] = bool(rng.integers(2))
        if (policy.warm_start is not None or policy.lead) and rng.integers(2):
            most = policy.horizon + 1
            one = int(rng.integers(most))
            options["executed"] = one if rng.integers(2) else rng.integers(most, size=n).tolist()
        if rng.integers(4) == 0:
            whole = options.get("return_horizon", False)
            rows = policy.horizon if whole else policy.n_action_steps
            options["out"] = np.full((n, rows, policy.action_dim), np.nan, np.float32)
        return options

    def call(self) -> None:
        def act(policy: Any, rng: np.random.Generator) -> Any:
            options = self.arguments(policy, rng)
            got = policy(options.pop("obs"), **options)
            assert np.isfinite(got).all()
            assert "out" not in options or got is options["out"]
            return np.array(got)

        assert self.both(act), "a good call was refused"

    def bad_call(self) -> None:
        keys = ("obs", "noise", "lanes", "out", "executed", "return_horizon", "speed")
        outs: list[tuple[Any, Any]] = []

        def act(policy: Any, rng: np.random.Generator) -> Any:
            options = self.arguments(policy, rng)
            for key in rng.choice(keys, rng.integers(1, 3)):
                value = options.get(key)
                if isinstance(value, np.ndarray) and value.ndim and rng.integers(3):
                    options[key] = array(rng, shape_like(rng, value.shape))
                else:
                    options[key] = junk(rng)
            out = options.get("out")
            if isinstance(out, np.ndarray):
                outs.append((out, out.copy()))
            got = policy(options.pop("obs"), **options)
            assert np.isfinite(got).all()
            return np.array(got)

        if not self.both(act):
            for out, before in outs:
                np.testing.assert_array_equal(out, before)

    def predict(self) -> None:
        def act(policy: Any, rng: np.random.Generator) -> Any:
            sample: Any = array(rng, shape_like(rng, (policy.horizon, policy.action_dim)))
            obs: Any = array(rng, shape_like(rng, (policy.n_obs_steps, policy.obs_dim)))
            step: Any = int(rng.integers(-2, policy.num_inference_steps + 2))
            if rng.integers(4) == 0:
                sample, step, obs = (
                    junk(rng) if rng.integers(2) else x for x in (sample, step, obs)
                )
            return np.array(policy.predict_noise(sample, step, obs))

        self.both(act)

    def absurd(self) -> None:
        """What the network may or may not represent."""

        def act(policy: Any, rng: np.random.Generator) -> Any:
            options = self.arguments(policy, rng)
            obs = options.pop("obs") * np.float32(10.0 ** rng.integers(0, 12))
            try:
                got = policy(obs, **options)
            except RuntimeError as error:
                assert "overflow" in str(error) or "finite" in str(error), error
                return None
            assert np.isfinite(got).all()
            return np.array(got)

        self.both(act)
        self.fresh()

    def reset(self) -> None:
        def act(policy: Any, rng: np.random.Generator) -> None:
            lanes: Any = None
            if rng.integers(2):
                lanes = rng.permutation(policy.lanes)[: rng.integers(0, policy.lanes + 1)]
            count = policy.lanes if lanes is None else len(lanes)
            seed: Any = rng.integers(0, 2**32, count).tolist()
            if rng.integers(3) == 0:
                lanes = junk(rng)
            if rng.integers(3) == 0:
                seed = junk(rng)
            if seed is None:  # noise that nobody can repeat
                seed = 7
            policy.reset(lanes=lanes, seed=seed)

        self.both(act)

    # ---- plans

    def assign(self) -> None:
        names = ("sparsity", "planner", "plan", "cold_plan", "sparsty", "lanes", "model", "_dial")

        def act(policy: Any, rng: np.random.Generator) -> None:
            name = str(rng.choice(names[:4] if rng.integers(4) else names[:-1]))
            value = junk(rng)
            if rng.integers(3):
                seed = int(rng.integers(1000))
                value = {
                    "sparsity": float(rng.random()),
                    "planner": str(rng.choice(planners.NAMES)),
                    "plan": None,
                    "cold_plan": None,
                }.get(name, value)
                if name == "planner" and rng.integers(4) == 0:
                    value = lambda p, s: planners.random(p, s, seed)  # noqa: E731
                elif name == "planner" and rng.integers(4) == 0:
                    value = lambda p, s: junk(np.random.default_rng(seed))  # noqa: E731
            setattr(policy, name, value)

        self.both(act)

    def fix_plan(self) -> None:
        def plan(policy: Any, rng: np.random.Generator, steps: int) -> Any:
            if rng.integers(3) == 0:
                most = 1 - 1 / steps
                return planners.random(policy, float(rng.uniform(0, most)), int(rng.integers(99)))
            sources = random_plan(rng, steps, len(policy.blocks), filled=bool(rng.integers(2)))
            if rng.integers(6) == 0:
                sources[rng.integers(steps), rng.integers(len(policy.blocks))] = rng.integers(7)
            first = random_plan(rng, steps, len(policy.blocks), filled=False)
            return tsad.Plan(sources, first=first if rng.integers(3) == 0 else None)

        def act(policy: Any, rng: np.random.Generator) -> None:
            name, steps = "plan", policy.num_inference_steps
            if (policy.warm_start is not None or policy.lead) and rng.integers(3) == 0:
                name, steps = "cold_plan", policy.model.n_steps
            count = policy.lanes if rng.integers(2) else int(rng.integers(1, 6))
            value = [plan(policy, rng, steps) for _ in range(count)]
            setattr(policy, name, value if rng.integers(3) else value[0])

        self.both(act)

    # ---- the rest of it

    def read(self) -> None:
        names = ("stats", "plan", "sparsity", "max_sparsity", "timings", "config", "timesteps",
                 "blocks", "block_types", "block_costs", "cold_plan", "device")  # fmt: skip
        for name in names:
            getattr(self.policy, name)
        assert repr(self.policy)
        for name in ("plan", "sparsity", "cold_plan"):
            same(getattr(self.twin, name), getattr(self.policy, name))

    def interrupt(self) -> None:
        """A signal whose handler raises, sometime in a call."""
        if threading.current_thread() is not threading.main_thread():
            return
        armed = True

        def handler(*_: Any) -> None:
            if armed:
                raise InterruptError("now")

        before = signal.signal(signal.SIGALRM, handler)
        options = self.arguments(self.policy, self.rng)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, float(self.rng.uniform(1e-5, 5e-3)))
                for _ in range(3):
                    self.policy(options["obs"], lanes=options.get("lanes"))
            finally:
                armed = False
        except InterruptError:
            self.say("    interrupted")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        self.fresh()

    def race(self) -> None:
        """Threads that all want the policy: one has it, the others are told so."""
        seeds = self.rng.integers(0, 2**63, 3).tolist()
        chosen, faults = self.policy._choice(), []

        def one(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(4):
                try:
                    kind = rng.integers(6)
                    if kind < 3:
                        self.policy(self.arguments(self.policy, rng)["obs"])
                    elif kind == 3:
                        self.policy.reset(lanes=[0])
                    elif kind == 4:
                        self.policy.sparsity = float(rng.random() / 2)
                    else:
                        assert self.policy.stats and repr(self.policy)
                except (RuntimeError, *REFUSALS) as error:
                    assert str(error)
                except BaseException as error:
                    faults.append(error)

        threads = [threading.Thread(target=one, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not faults, faults
        self.fresh()
        self.policy._adopt(chosen)

    def replace(self) -> None:
        """By a copy, which has its plan, and begins anew."""
        way = self.rng.choice(["copy", "deepcopy", "pickle"])
        if way != "pickle":
            self.policy = getattr(copy, way)(self.policy)
        elif not callable(self.policy.planner):
            try:
                self.policy = pickle.loads(pickle.dumps(self.policy))
            except TypeError as error:
                assert "tsad.load" in str(error)
        self.fresh()

    def core(self) -> None:
        """The functions underneath, with anything."""
        rng = self.rng
        sources = rng.integers(0, 6, shape_like(rng, (4, 6))).astype(rng.choice(["u1", "i4"]))
        attempts: list[Callable[[], Any]] = [
            lambda: _core.Policy(self.policy.model, lanes=junk(rng), threads=junk(rng)),
            lambda: _core.resolve(sources, junk(rng)),
            lambda: _core.resolve(sources, np.zeros(6, np.uint8), junk(rng)),
            lambda: _core._plan_fault(sources, np.zeros(6, np.uint8), junk(rng)),
            lambda: _core._borrow(junk(rng)),
            lambda: _core._copy(junk(rng), "x"),
            lambda: self.policy._stats(junk(rng)),
            lambda: self.policy._ages(junk(rng)),
            lambda: tsad.Plan(junk(rng), first=junk(rng)),
            lambda: tsad.load(lerobot_cases.FOLDER / FOLDERS[0], **{
                str(rng.choice(["lanes", "threads", "sampler", "num_inference_steps", "precision",
                                "warm_start", "preset", "lead", "smoothing", "fitted"]))
                : junk(rng)}),
        ]  # fmt: skip
        try:
            attempts[rng.integers(len(attempts))]()
        except (*REFUSALS, IndexError, RuntimeError, OSError, MemoryError) as error:
            assert str(error)


def same(expected: Any, got: Any) -> None:
    """Bit for bit, arrays and what holds them."""
    if isinstance(got, np.ndarray):
        np.testing.assert_array_equal(got, expected)
    else:
        assert got == expected, (got, expected)


def main() -> None:
    """Run worlds until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first world")
    parser.add_argument("--worlds", type=int, default=None, help="at most so many")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # what the folders say when they load
    begun = told = time.monotonic()
    worlds = calls = refused = 0
    while time.monotonic() - begun < 60 * options.minutes and worlds != options.worlds:
        seed = options.seed + worlds
        try:
            world = World(seed, verbose=options.worlds == 1)
            world.run()
        except BaseException:
            print(f"in world --seed {seed} --worlds 1", flush=True)
            raise
        worlds, calls, refused = worlds + 1, calls + world.calls, refused + world.refused
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(f"{(told - begun) / 60:.0f} min: ", end="")
            print(f"{worlds} worlds, {calls} calls, {refused} refused, no finding", flush=True)
    print(f"{worlds} worlds, {calls} calls, {refused} refused, no finding")


if __name__ == "__main__":
    main()
