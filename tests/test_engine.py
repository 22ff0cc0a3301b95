"""The C engine against the specification and against itself.

Every instruction set that this machine has equals ``tsad/reference/``; plans equal the
reference's three dictionaries; bits do not depend on threads or lanes.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import (
    CHUNK_TOLERANCE,
    NETWORK_TOLERANCE,
    PLAN_TOLERANCE,
    SMALL,
    config,
    random_inputs,
    random_plan,
    relative_error,
)
from engine import make, make_reference

from tsad import _core
from tsad.reference import plan as argmax_plan

BACKENDS = [*_core.backends(), "guarded"]  # csrc/cpu/guarded.c
COMPUTE, TYPE, STEP, ROLLOUT, SKIP = range(5)
# a random network that predicts noise ends in clipping, which hides errors; this does not
OPEN = {"sampler": "ddim", "prediction_type": "sample", "clip_sample_range": 2.0}


def test_ref_is_always_there() -> None:
    assert _core.backends()[-1] == "ref"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*SMALL, "odd", "blockpush"])
def test_noise_prediction_equals_the_reference(name: str, backend: str) -> None:
    reference, engine = make_reference(name), make(name, backend=backend)
    obs, noise = random_inputs(config(name), 1, lanes=3, steps=1)
    for step in (0, 50, 99):
        got = engine.predict_noise(noise[0], step, obs)
        assert relative_error(got, reference.predict_noise(noise[0], step, obs)) < NETWORK_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SMALL)
def test_a_dense_chunk_equals_the_reference(name: str, backend: str) -> None:
    options = OPEN | {"sampler": "ddpm"}
    reference = make_reference(name, lanes=2, **options)
    engine = make(name, lanes=2, backend=backend, **options)
    obs, noise = random_inputs(config(name), 2, lanes=2)
    got = engine(obs, noise=noise, return_horizon=True)
    assert relative_error(got, reference(obs, noise, return_horizon=True)) < CHUNK_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_random_plans_equal_the_reference(backend: str) -> None:
    """1,000 pairs of a first and a later plan, 4 lanes with plans of their own, 3 rollouts."""
    K, lanes, rounds = 6, 4, 250 if backend == BACKENDS[0] else 25
    name = "tiny"
    engine = make(name, lanes=lanes, backend=backend, steps=K, **OPEN)
    reference = make_reference(name, lanes=lanes, steps=K, **OPEN)
    B = len(reference.blocks)
    rng, worst = np.random.default_rng(7), 0.0
    for _ in range(rounds):
        first = [random_plan(rng, K, B, filled=False) for _ in range(lanes)]
        later = [random_plan(rng, K, B, filled=plan == COMPUTE) for plan in first]
        engine.reset()
        reference.reset()
        for lane in range(lanes):
            engine._set_plan(lane, later[lane], first[lane])
        for _rollout in range(3):
            seed = int(rng.integers(1 << 30))
            obs, noise = random_inputs(config(name), seed, lanes=lanes, steps=K)
            got = engine(obs, noise=noise, return_horizon=True)
            expected = reference(obs, noise, later, return_horizon=True, first=first)
            worst = max(worst, relative_error(got, expected))
    assert worst < PLAN_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_of_all_compute_is_dense_bit_for_bit(backend: str) -> None:
    K = 5
    dense, planned = (make("odd", backend=backend, steps=K, **OPEN) for _ in range(2))
    plan = np.zeros((K, 9), np.uint8)
    planned._set_plan(0, plan, plan)
    for seed in range(3):
        obs, noise = random_inputs(config("odd"), seed, steps=K)
        np.testing.assert_array_equal(planned(obs, noise=noise), dense(obs, noise=noise))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "odd"])  # 2 heads: 2 parts; 3 heads: 3 parts
def test_bits_do_not_depend_on_threads_or_lanes(name: str, backend: str) -> None:
    K, lanes = 4, 8
    B = len(make_reference(name).blocks)
    rng = np.random.default_rng(3)
    first = [random_plan(rng, K, B, filled=False) for _ in range(lanes)]
    later = [random_plan(rng, K, B, filled=plan == COMPUTE) for plan in first]
    inputs = [random_inputs(config(name), seed, lanes=lanes, steps=K) for seed in range(3)]

    def run(threads: int, together: bool) -> np.ndarray:
        policy = make(name, lanes=lanes, threads=threads, backend=backend, steps=K, **OPEN)
        for lane in range(lanes):
            policy._set_plan(lane, later[lane], first[lane])
        results = []
        for obs, noise in inputs:
            if together:
                results.append(policy(obs, noise=noise))
            else:
                alone = np.ascontiguousarray(noise.swapaxes(0, 1))[:, :, None]  # (lanes, K, 1, ...)
                rows = [
                    policy(obs[i : i + 1], noise=alone[i], lanes=[i])
                    for i in reversed(range(lanes))
                ]
                results.append(np.concatenate(rows[::-1]))
        return np.stack(results)

    expected = run(1, True)
    for threads in (1, 2, 4):
        for together in (True, False):
            np.testing.assert_array_equal(run(threads, together), expected)


def test_lanes_that_finish_at_different_times() -> None:
    """Resetting one lane, and running a subset, leaves the others' caches and plans alone."""
    K, lanes = 5, 3
    engine = make("tiny", lanes=lanes, steps=K, **OPEN)
    reference = make_reference("tiny", lanes=lanes, steps=K, **OPEN)
    rng = np.random.default_rng(5)
    first = [random_plan(rng, K, 6, filled=False) for _ in range(lanes)]
    later = [random_plan(rng, K, 6, filled=plan == COMPUTE) for plan in first]
    for lane in range(lanes):
        engine._set_plan(lane, later[lane], first[lane])
    for turn in range(12):
        chosen = [lane for lane in range(lanes) if (turn + lane) % 3 or turn < 2]
        if turn in (3, 4, 8):
            engine.reset(lanes=[turn % 3])
            reference.reset([turn % 3])
        obs, noise = random_inputs(config("tiny"), turn, lanes=len(chosen), steps=K)
        plans, firsts = [later[i] for i in chosen], [first[i] for i in chosen]
        got = engine(obs, noise=noise, lanes=chosen)
        expected = reference(obs, noise, plans, chosen, first=firsts)
        assert relative_error(got, expected) < PLAN_TOLERANCE


def test_rollout_slots_know_their_age() -> None:
    K, B = 3, 6
    engine = make("tiny", steps=K, **OPEN)
    later = np.full((K, B), COMPUTE, np.uint8)
    later[2] = ROLLOUT
    engine._set_plan(0, later, np.zeros_like(later))
    obs, noise = random_inputs(config("tiny"), 0, steps=K)
    for chunk in range(1, 5):
        engine(obs, noise=noise)
        ages = engine._ages(0)
        assert (ages[:2] == 1).all() and (ages[2] == chunk).all()
    assert engine._stats(0)["max_age"] == 3  # read in chunk 4, computed in chunk 1
    engine.reset()
    assert (engine._ages(0) == 0).all()


def test_a_rollout_plan_set_in_mid_episode_is_refused() -> None:
    K, B = 3, 6
    engine = make("tiny", steps=K, **OPEN)
    obs, noise = random_inputs(config("tiny"), 0, steps=K)
    dense = np.zeros((K, B), np.uint8)
    later = dense.copy()
    later[1, 4] = ROLLOUT
    before = engine(obs, noise=noise)
    with pytest.raises(ValueError, match=r"step 1, block 4.*reset"):
        engine._set_plan(0, later, dense)
    np.testing.assert_array_equal(engine(obs, noise=noise), before)
    engine.reset()
    engine._set_plan(0, later, dense)
    engine(obs, noise=noise)


def test_memory_is_a_short_ring_until_a_plan_reuses_rollouts() -> None:
    K, B = 100, 6
    engine = make("tiny")
    small = engine._bytes
    later = np.zeros((K, B), np.uint8)
    later[1:] = STEP
    engine._set_plan(0, later, np.zeros_like(later))
    assert engine._bytes == small
    later[50] = ROLLOUT
    engine._set_plan(0, later, np.zeros_like(later))
    assert engine._bytes - small >= (K - 1) * B * 5 * 16 * 4  # (T, D) float32 per slot


# ---- the pruner --------------------------------------------------------------------------------


PRUNERS = pytest.mark.parametrize("pruner", ["transformer", "mlp"])


@PRUNERS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_pruner_scores_equal_the_reference(name: str, backend: str, pruner: str) -> None:
    engine = make(name, pruner=pruner, backend=backend, steps=20)
    reference = make_reference(name, pruner=pruner, steps=20)
    obs, _ = random_inputs(config(name), 4)
    expected = reference.prune(obs[0])[::-1]  # the time flip: loop index i from memory row K-1-i
    assert relative_error(engine._pruner_scores(obs[0]), expected) < NETWORK_TOLERANCE


@PRUNERS
def test_the_pruner_of_the_published_shape(pruner: str) -> None:
    engine = make("odd", pruner=pruner, steps=10)
    reference = make_reference("odd", pruner=pruner, steps=10)
    obs, _ = random_inputs(config("odd"), 4)
    got, expected = engine._pruner_scores(obs[0]), reference.prune(obs[0])[::-1]
    assert relative_error(got, expected) < NETWORK_TOLERANCE


@PRUNERS
def test_the_pruner_plans_every_chunk_as_the_reference(pruner: str) -> None:
    K = 12
    engine = make("tiny", seed=3, pruner=pruner, steps=K, **OPEN)
    reference = make_reference("tiny", seed=3, pruner=pruner, steps=K, **OPEN)
    engine._set_pruner(-1)
    kinds = set()
    for chunk in range(4):
        obs, noise = random_inputs(config("tiny"), chunk, steps=K)
        got = engine(obs, noise=noise)
        assert relative_error(got, reference(obs, noise)) < PLAN_TOLERANCE
        plan = engine._get_plan(0)
        if chunk == 0:
            assert (plan == COMPUTE).all()
        else:
            np.testing.assert_array_equal(plan, argmax_plan(reference.prune(obs[0])))
        kinds |= set(np.unique(plan).tolist())
    assert kinds == {COMPUTE, TYPE, STEP, ROLLOUT}  # else the test shows little


@PRUNERS
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_threads_share_the_pruners_steps(name: str, pruner: str) -> None:
    policies = [make(name, pruner=pruner, threads=n, steps=30, **OPEN) for n in (1, 2, 3, 4)]
    for policy in policies:
        policy._set_pruner(0.5)
    for chunk in range(20):
        obs, noise = random_inputs(config(name), chunk, steps=30)
        outputs = [policy(obs, noise=noise) for policy in policies]
        for policy, actions in zip(policies[1:], outputs[1:], strict=True):
            np.testing.assert_array_equal(policy._get_plan(0), policies[0]._get_plan(0))
            np.testing.assert_array_equal(actions, outputs[0])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9])
def test_the_budget_is_met_in_cost_and_takes_the_best_scores(sparsity: float) -> None:
    K = 12
    engine = make("tiny", pruner=True, steps=K, **OPEN)
    engine._set_pruner(sparsity)
    obs, noise = random_inputs(config("tiny"), 0, steps=K)
    engine(obs, noise=noise)
    engine(obs, noise=noise)
    plan, scores = engine._get_plan(0), engine._pruner_scores(obs[0])
    cost = np.asarray(config("tiny")["cost"]["blocks"])
    spent = (cost * (plan == COMPUTE)).sum() / (cost.sum() * K)
    assert spent <= 1 - sparsity + 1e-9
    assert spent > 1 - sparsity - 1.01 * cost.max() / (cost.sum() * K) or spent == 1
    margin = scores[..., 0] - scores[..., 1:].max(-1)
    later, computed = margin[1:], plan[1:] == COMPUTE
    if computed.any() and not computed.all():
        assert later[computed].min() >= later[~computed].max()
    np.testing.assert_array_equal(plan[1:][~computed], 1 + scores[1:, :, 1:].argmax(-1)[~computed])


# ---- the floating-point environment ----------------------------------------------------------


def test_the_callers_denormals_survive_a_chunk() -> None:
    tiny = np.float32(1e-40)
    engine = make("tiny", steps=3, **OPEN)
    obs, noise = random_inputs(config("tiny"), 0, steps=3)
    engine(obs, noise=noise)
    assert np.float32(tiny * np.float32(1.0)) == tiny != 0


def test_denormal_observations_are_accepted() -> None:
    engine, reference = (f("tiny", steps=3, **OPEN) for f in (make, make_reference))
    obs, noise = random_inputs(config("tiny"), 0, steps=3)
    obs = np.full_like(obs, 1e-41)
    assert relative_error(engine(obs, noise=noise), reference(obs, noise)) < CHUNK_TOLERANCE


# ---- threads and processes ---------------------------------------------------------------------


def test_a_forked_child_makes_its_own_team() -> None:
    engine = make("odd", threads=2, steps=3, **OPEN)
    inputs = random_inputs(config("odd"), 0, steps=3)
    expected = engine(inputs[0], noise=inputs[1])
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            same = np.array_equal(engine(inputs[0], noise=inputs[1]), expected)
            os.write(write, b"same" if same else b"other")
        finally:
            os._exit(0)
    ready, _, _ = select.select([read], [], [], 30)
    assert ready, "the child hangs"
    assert os.read(read, 8) == b"same"
    os.waitpid(child, 0)
    np.testing.assert_array_equal(engine(inputs[0], noise=inputs[1]), expected)


def test_an_idle_policy_uses_no_cpu() -> None:
    engine = make("odd", threads=2, steps=3, **OPEN)
    obs, noise = random_inputs(config("odd"), 0, steps=3)
    for _ in range(3):
        engine(obs, noise=noise)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.02


CORES = """
import os, sys
from cases import config, random_inputs
from engine import make

def threads():
    return {int(name) for name in os.listdir("/proc/self/task")}

engine = make("odd", threads=2, steps=3)
inputs = random_inputs(config("odd"), 0, steps=3)
engine(inputs[0], noise=inputs[1])
before = threads()
second = make("odd", threads=3, steps=3)
(worker,) = threads() - before
a, b, *_ = sorted(os.sched_getaffinity(0))
everywhere = os.sched_getaffinity(worker)
for core in (a, b, a):
    os.sched_setaffinity(0, {core})
    for _ in range(500):  # after stalls some chunks run on one thread, and ask nobody
        second(inputs[0], noise=inputs[1])
        if os.sched_getaffinity(worker) == everywhere - {core}:
            break
    assert os.sched_getaffinity(worker) == everywhere - {core}, core
assert os.sched_getaffinity(0) == {a}
os.sched_setaffinity(worker, {a})  # whoever owns the process may move it
for core in (b, a, b):
    os.sched_setaffinity(0, {core})
    for _ in range(100):
        second(inputs[0], noise=inputs[1])
    assert os.sched_getaffinity(worker) == {a}, core
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="Linux, two cores",
)
def test_workers_keep_off_the_callers_core() -> None:
    """Else one that wakes there takes it from the caller until the scheduler's next tick."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", CORES], check=True, timeout=60, env=environment)


def test_policies_in_several_threads_share_a_model() -> None:
    """The second caller of the team runs alone, with the same bits; nobody waits for ever."""
    engines = [make("odd", threads=2, steps=3, **OPEN) for _ in range(4)]
    obs, noise = random_inputs(config("odd"), 0, steps=3)
    expected = engines[0](obs, noise=noise)
    with ThreadPoolExecutor(4) as pool:
        runs = pool.map(lambda engine: [engine(obs, noise=noise) for _ in range(50)], engines)
        for results in runs:
            for got in results:
                np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("precision", ["float32", "int16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gangs_of_lanes_have_the_bits_of_lanes_alone(backend: str, precision: str) -> None:
    """Lanes that one thread takes through the steps together share passes over the weights: the
    same plan, plans of their own, a lane at its first chunk beside lanes at their fifth, and more
    lanes than one gang has room for."""
    K, lanes = 4, 19
    B = len(make_reference("odd").blocks)
    rng = np.random.default_rng(11)
    first = [random_plan(rng, K, B, filled=False) for _ in range(lanes)]
    later = [random_plan(rng, K, B, filled=plan == COMPUTE) for plan in first]
    for lane in range(5):  # these five compute the same cells
        first[lane], later[lane] = first[0], later[0]
    together = make("odd", lanes=lanes, backend=backend, steps=K, precision=precision, **OPEN)
    alone = make("odd", lanes=lanes, backend=backend, steps=K, precision=precision, **OPEN)
    for policy in (together, alone):
        for lane in range(lanes):
            policy._set_plan(lane, later[lane], first[lane])
    for chunk in range(5):
        obs, noise = random_inputs(config("odd"), chunk, lanes=lanes, steps=K)
        got = together(obs, noise=noise)
        for i in range(lanes):
            row = np.ascontiguousarray(noise[:, i : i + 1])
            np.testing.assert_array_equal(
                alone(obs[i : i + 1], noise=row, lanes=[i]), got[i : i + 1]
            )
        if chunk == 2:
            for policy in (together, alone):
                policy.reset(lanes=[3])
