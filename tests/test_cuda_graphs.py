"""Chunks of fixed plans as CUDA graphs, on the emulated GPU: launches say what is right."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from cases import config, random_inputs, random_plan
from engine import make
from test_engine import OPEN

import tsad
from tsad import _core, device

K = 3


@pytest.fixture(autouse=True)
def cuda(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    assert device.cuda().absent is None
    return emulated_cuda


def live_graphs(library: str) -> int:
    read = ctypes.CDLL(library).tsad_emulate_graphs
    read.restype = ctypes.c_long
    return int(read())


def policy(monkeypatch: pytest.MonkeyPatch, *, graphs: bool, **options: Any) -> _core.Policy:
    monkeypatch.setenv("TSAD_CUDA_GRAPHS", str(int(graphs)))
    return make("tiny", backend="cuda", steps=K, **OPEN, **options)


def pair(monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[_core.Policy]:
    return [policy(monkeypatch, graphs=graphs, **options) for graphs in (True, False)]


def plans(seed: int, lanes: int) -> list[tuple[Any, Any]]:
    """(later, first) of each lane."""
    rng = np.random.default_rng(seed)
    first = [random_plan(rng, K, 6, filled=False) for _ in range(lanes)]
    return [(random_plan(rng, K, 6, filled=sources == 0), sources) for sources in first]


def check(policies: list[_core.Policy], seed: int, lanes: list[int] | None = None) -> None:
    rows = 5 if lanes is None else len(lanes)
    obs, noise = random_inputs(config("tiny"), seed, lanes=rows, steps=K)
    graph, launched = (p(obs, noise=noise, lanes=lanes, return_horizon=True) for p in policies)
    np.testing.assert_array_equal(graph, launched)


def test_graphs_equal_launches_bit_for_bit(monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    """First and later plans, other plans, other lanes, an episode after another."""
    policies = pair(monkeypatch, lanes=5)
    for turn in range(2):
        for p in policies:
            p.reset()
            for lane, (later, first) in enumerate(plans(turn, 5)):
                p._set_plan(lane, later, first)
        for seed, lanes in enumerate((None, None, [4, 1], None, [4, 1], [1, 4])):
            check(policies, 10 * turn + seed, lanes)
    assert live_graphs(cuda) > 0
    del policies[0]
    assert live_graphs(cuda) == 0


def test_a_chunk_of_a_fixed_plan_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, launched = pair(monkeypatch, lanes=4)
    found = []
    for p in (graph, launched):
        for lane, (later, first) in enumerate(plans(3, 4)):
            p._set_plan(lane, later, first)
        for seed in range(4):
            obs, noise = random_inputs(config("tiny"), seed, lanes=4, steps=K)
            before = device.counts()
            p(obs, noise=noise)
        found.append(device.counts().since(before))
    once, each = found
    assert (once.launches, once.graphs) == (0, 1) and each.graphs == 0
    assert once.kernels == each.kernels == each.launches > 0
    assert once.waits == each.waits == 1 and once.uploads == once.downloads == 1


def test_steps_take_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six for a computed layer of a transformer, one for a step that reuses, lanes included."""
    p = policy(monkeypatch, graphs=False, lanes=3)
    computed = np.full((K, 6), tsad.COMPUTE, np.uint8)
    one = computed.copy()
    one[1] = tsad.REUSE_STEP
    two = one.copy()
    two[2] = tsad.REUSE_STEP
    found = []
    for plan in (computed, one, two):
        p.reset()
        for lane in range(3):
            p._set_plan(lane, plan, plan)
        obs, noise = random_inputs(config("tiny"), 0, lanes=3, steps=K)
        before = device.counts()
        p(obs, noise=noise)
        found.append(device.counts().since(before).kernels)
    dense, less, least = found
    layers = 2
    assert dense - less == less - least == 6 * layers


def test_a_plan_that_changes_each_chunk_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    p = policy(monkeypatch, graphs=True, pruner=True)
    p._set_pruner(0.5)
    before = device.counts()
    for seed in range(3):
        obs, noise = random_inputs(config("tiny"), seed, steps=K)
        p(obs, noise=noise)
    assert device.counts().since(before).graphs == 0


def test_slots_that_move_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plan that reads rollouts moves all slots; graphs of before have the old place."""
    policies = pair(monkeypatch, lanes=5)
    still = np.full((K, 6), tsad.REUSE_STEP, np.uint8)
    still[0] = tsad.COMPUTE
    for p in policies:
        for lane in range(5):
            p._set_plan(lane, still, still)
    for seed in range(3):
        check(policies, seed)
    for p in policies:
        p.reset()
        p._set_plan(4, *plans(7, 1)[0])
    for seed in range(3):
        check(policies, seed)


def test_graphs_are_few(monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    """Every choice of lanes would have its own; the oldest go."""
    p = make("tiny", backend="cuda", steps=1, lanes=5, sampler="ddim")
    chosen = [[i, j] for i in range(5) for j in range(5) if i != j]
    found = []
    for lanes in [*chosen, chosen[0]]:
        obs, noise = random_inputs(config("tiny"), 0, lanes=2, steps=1)
        found.append(p(obs, noise=noise, lanes=lanes))
    assert live_graphs(cuda) == 16 < len(chosen)
    np.testing.assert_array_equal(found[-1], found[0])
