"""A network that no family describes: a toy UNet as a node list, through plan and program.

One skip, one concatenation, one 1x1 residual, two slot shapes, one branch cached before its gate:
everything a UNet or a DiT needs from `plan.c` and the program that it does not get from the
transformer. The oracle below is plain NumPy with three dictionaries as caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from tsad import _core

FEED_FORWARD, CONV_BRANCH, LINEAR, CONV, UPSAMPLE, CONCAT = 2, 3, 4, 5, 6, 7  # net/net.h
IDENTITY, GELU, RELU, MISH = 0, 1, 2, 3
COMPUTE, TYPE, STEP, ROLLOUT, SKIP = range(5)
T, A, K = 8, 2, 7
Array = npt.NDArray[np.float64]

# kind, in, in2, out, residual, type, cache_point, activation, stride, kernel
NODES = np.array(
    [
        [LINEAR, 0, -1, 1, -1, 0, 0, IDENTITY, 1, 1],
        [CONV_BRANCH, 1, -1, 1, -1, 0, 0, MISH, 1, 3],  # slot (8, 6)
        [FEED_FORWARD, 1, -1, 1, -1, 1, 0, GELU, 1, 1],
        [CONV, 1, -1, 2, -1, 0, 0, IDENTITY, 2, 3],  # down: (8, 6) -> (4, 10)
        [CONV_BRANCH, 2, -1, 2, -1, 2, 0, RELU, 1, 3],  # slot (4, 10)
        [CONV_BRANCH, 2, -1, 2, -1, 2, 0, MISH, 1, 5],
        [UPSAMPLE, 2, -1, 3, -1, 0, 0, IDENTITY, 2, 1],
        [CONCAT, 3, 1, 4, -1, 0, 0, IDENTITY, 1, 1],  # the skip: register 1 is still alive
        [LINEAR, 4, -1, 5, -1, 0, 0, IDENTITY, 1, 1],  # the 1x1 residual of the next branch
        [CONV_BRANCH, 4, -1, 5, 8, 0, 0, MISH, 1, 3],
        [FEED_FORWARD, 5, -1, 5, -1, 3, 1, GELU, 1, 1],  # cached before its gate
        [FEED_FORWARD, 5, -1, 5, -1, 1, 0, RELU, 1, 1],
        [LINEAR, 5, -1, 6, -1, 0, 0, IDENTITY, 1, 1],
    ],
    np.int32,
)
REGISTERS = np.array([[8, 2], [8, 6], [4, 10], [8, 10], [8, 16], [8, 6], [8, 2]], np.int32)
HIDDEN = {1: 5, 2: 24, 4: 12, 5: 7, 9: 9, 10: 40, 11: 33}
NORMED = {2, 10, 12}
BLOCKS = [i for i, row in enumerate(NODES) if row[0] in (FEED_FORWARD, CONV_BRANCH)]
TYPES = np.array([NODES[i][5] for i in BLOCKS], np.uint8)
B = len(BLOCKS)


def make_tensors(seed: int) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    tensors: dict[str, npt.NDArray[np.float32]] = {}

    def matrix(name: str, n_in: int, n_out: int) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, n_in**-0.5, (n_out, n_in)).astype(np.float32)
        tensors[f"{name}.bias"] = rng.normal(0, 0.2, n_out).astype(np.float32)

    for i, (kind, source, _, to, _, _, gated, _, _, kernel) in enumerate(NODES):
        c_in, c_out = REGISTERS[source][1], REGISTERS[to][1]
        if i in HIDDEN:
            matrix(f"nodes.{i}.0", c_in * kernel, HIDDEN[i])
            matrix(f"nodes.{i}.1", HIDDEN[i] * kernel, c_out)
        elif kind in (LINEAR, CONV):
            matrix(f"nodes.{i}.0", c_in * kernel, c_out)
        if i in NORMED:
            tensors[f"nodes.{i}.norm.weight"] = rng.normal(1, 0.2, c_in).astype(np.float32)
            tensors[f"nodes.{i}.norm.bias"] = rng.normal(0, 0.2, c_in).astype(np.float32)
        if gated:
            tensors[f"nodes.{i}.gate"] = rng.normal(0, 1, (K, c_out)).astype(np.float32)
    tensors["nodes.0.table"] = rng.normal(0, 0.3, (8, 6)).astype(np.float32)
    return tensors


def make_sampler() -> npt.NDArray[np.float32]:
    """x0 = clip(1.1 x - 0.5 e, -1, 1); x = 0.4 x0 + 0.6 x + 0.1 e + 0.05 x0' - 0.1 x0''."""
    return np.tile(np.array([1.1, -0.5, 1, 0.4, 0.6, 0.1, 0.05, 0, -0.1], np.float32), (K, 1))


def make_policy(tensors: dict[str, npt.NDArray[np.float32]], **kwargs: object) -> _core.Policy:
    one, zero = np.ones(A, np.float32), np.zeros(A, np.float32)
    arguments: dict[str, object] = dict(
        family="nodes", horizon=T, n_obs_steps=1, n_action_steps=T, obs_dim=A, action_dim=A,
        n_layers=0, n_heads=1, n_emb=2, sampler=make_sampler(),
        time_emb=np.zeros((K, 2), np.float32), obs_scale=one, obs_offset=zero, action_scale=one,
        action_offset=zero, block_cost=np.arange(1, B + 1, dtype=np.int64), tensors=tensors,
        nodes=NODES, registers=REGISTERS,
    )  # fmt: skip
    arguments.update(kwargs)
    return _core.Policy(_core.Model(**arguments), lanes=1, threads=1)  # type: ignore[arg-type]


# ---- the oracle --------------------------------------------------------------------------------


def activate(x: Array, kind: int) -> Array:
    if kind == GELU:
        from math import erf

        return 0.5 * x * (1 + np.vectorize(erf)(x / 2**0.5))
    if kind == RELU:
        return np.maximum(x, 0)
    return x * np.tanh(np.log1p(np.exp(x))) if kind == MISH else x


def taps(x: Array, kernel: int, stride: int) -> Array:
    padded = np.pad(x, ((kernel // 2, kernel // 2), (0, 0)))
    rows = range(0, len(x), stride)
    return np.stack([padded[t : t + kernel].reshape(-1) for t in rows])


@dataclass
class Oracle:
    tensors: dict[str, npt.NDArray[np.float32]]
    by_rollout: dict[tuple[int, int], Array] = field(default_factory=dict)

    def linear(self, name: str, x: Array) -> Array:
        weight = self.tensors[f"{name}.weight"].astype(float)
        return x @ weight.T + self.tensors[f"{name}.bias"].astype(float)

    def branch(self, i: int, x: Array) -> Array:
        _, _, _, _, _, _, _, activation, stride, kernel = NODES[i]
        if i in NORMED:
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * self.tensors[f"nodes.{i}.norm.weight"] + self.tensors[f"nodes.{i}.norm.bias"]
        y = activate(self.linear(f"nodes.{i}.0", taps(x, kernel, stride)), activation)
        return self.linear(f"nodes.{i}.1", taps(y, kernel, 1)) if i in HIDDEN else y

    def fixed(self, i: int, reg: list[Array]) -> None:
        kind, source, source2, to = NODES[i][:4]
        if kind == UPSAMPLE:
            reg[to] = np.repeat(reg[source], NODES[i][8], axis=0)
        elif kind == CONCAT:
            reg[to] = np.concatenate([reg[source], reg[source2]], axis=1)
        else:
            reg[to] = self.branch(i, reg[source])
            if i == 0:
                reg[to] = reg[to] + self.tensors["nodes.0.table"]

    def network(self, k: int, x: Array, sources: Array, by_type: dict, by_block: dict) -> Array:
        reg: list[Array] = [x] + [np.zeros(tuple(r)) for r in REGISTERS[1:]]
        for i, (_, source, _, to, _, kind, gated, *_) in enumerate(NODES):
            if i not in BLOCKS:
                self.fixed(i, reg)
                continue
            b = BLOCKS.index(i)
            if sources[b] == SKIP:
                continue
            if sources[b] == COMPUTE:
                value = self.branch(i, reg[source])
                by_type[kind] = by_block[b] = self.by_rollout[k, b] = value
            else:
                value = {TYPE: by_type.get(kind), STEP: by_block.get(b),
                         ROLLOUT: self.by_rollout.get((k, b))}[int(sources[b])]  # fmt: skip
            gate = self.tensors[f"nodes.{i}.gate"][k] if gated else 1.0
            reg[to] = reg[to] + value * gate
        return reg[-1]

    def chunk(self, noise: Array, plan: npt.NDArray[np.uint8]) -> Array:
        by_type: dict[int, Array] = {}
        by_block: dict[int, Array] = {}
        x, last, older = noise, np.zeros_like(noise), np.zeros_like(noise)
        for k in range(K):
            e = self.network(k, x, plan[k], by_type, by_block)
            x0 = np.clip(1.1 * x - 0.5 * e, -1, 1)
            x = 0.4 * x0 + 0.6 * x + 0.1 * e + 0.05 * last - 0.1 * older
            last, older = x0, last
        return x


def random_plans(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """A valid (first, steady) pair with every source; row 0 may reuse a lower layer's branch."""
    first = rng.choice([COMPUTE, STEP, SKIP], (K, B), p=[0.5, 0.3, 0.2]).astype(np.uint8)
    first[0] = COMPUTE
    steady = rng.integers(0, 5, (K, B)).astype(np.uint8)
    steady[(steady == ROLLOUT) & (first != COMPUTE)] = SKIP
    steady[0] = COMPUTE
    steady[0, 4] = TYPE  # node 9 has node 1's type and slot shape
    first[0, 4] = TYPE
    for plan in (first, steady):
        for k in range(1, K):
            for b in range(B):
                if plan[k, b] == STEP and not (plan[:k, b] == COMPUTE).any():
                    plan[k, b] = TYPE
    return first, steady


OBS = np.zeros((1, A), np.float32)


def check_toy_unet(backend: str, seeds: int) -> None:
    """Random plans over three rollouts with the weights of each seed, against the oracle."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for seed in range(seeds):
        tensors = make_tensors(seed)
        policy = make_policy(tensors, backend=backend)
        oracle = Oracle(tensors)
        first, steady = random_plans(rng)
        policy.reset()
        policy._set_plan(0, steady, first)
        for rollout in range(3):
            noise = rng.normal(size=(1, T, A)).astype(np.float32)
            got = policy(OBS[None], noise=noise, return_horizon=True)[0]
            expected = oracle.chunk(noise[0].astype(float), first if rollout == 0 else steady)
            worst = max(worst, float(np.abs(got - expected).max()))
    assert worst < 1e-5


@pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])
def test_toy_unet_equals_the_oracle(backend: str) -> None:
    check_toy_unet(backend, seeds=20)


def test_all_compute_equals_dense_bit_for_bit() -> None:
    tensors = make_tensors(3)
    noise = np.random.default_rng(1).normal(size=(1, T, A)).astype(np.float32)
    dense = make_policy(tensors)(OBS[None], noise=noise)
    policy = make_policy(tensors)
    plan = np.zeros((K, B), np.uint8)
    policy._set_plan(0, plan, plan)
    np.testing.assert_array_equal(policy(OBS[None], noise=noise), dense)


def test_types_with_two_shapes_are_refused() -> None:
    nodes = NODES.copy()
    nodes[4][5] = 0  # a (4, 10) branch under the type of the (8, 6) ones
    with pytest.raises(ValueError, match="different shapes"):
        make_policy(make_tensors(0), nodes=nodes)


def test_a_branch_needs_a_residual_map_to_change_shape() -> None:
    nodes = NODES.copy()
    nodes[9][4] = -1
    with pytest.raises(ValueError, match="node 9"):
        make_policy(make_tensors(0), nodes=nodes)


def test_a_missing_tensor_is_named() -> None:
    tensors = make_tensors(0)
    del tensors["nodes.5.1.weight"]
    with pytest.raises(ValueError, match=r"nodes\.5\.1\.weight"):
        make_policy(tensors)


def test_a_list_longer_than_an_op_can_name_is_refused() -> None:
    """An op names its node in 16 bits; 33,000 nodes ran, and gave wrong actions."""
    many = 33_000
    nodes = np.tile(np.array([[8, 0, -1, 0, -1, 0, 0, IDENTITY, 1, 1]], np.int32), (many, 1))
    with pytest.raises(ValueError, match="nodes: expected at most 32767, got 33000"):
        make_policy(
            {},
            nodes=nodes,
            registers=np.array([[T, A], [T, A]], np.int32),
            block_cost=np.ones(1, np.int64),
        )
