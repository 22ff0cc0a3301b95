"""The conformance tests of the method, against every engine in ``ENGINES``.

An engine is an adapter: ``ReferenceEngine`` is the specification, other backends add theirs. Test
names carry the numbers of the method's list of eleven. The eleventh, that reported numbers state
latency with and without vision encoder, MACs with the pruner, and averages that include the first
chunk, is the output of the benchmark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cases
import numpy as np
import pytest
from numpy.typing import NDArray

from tsad import _core
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.reference import REUSE_ROLLOUT, REUSE_STEP, SKIP, ReferencePolicy, encode, plan
from tsad.samplers import make_sampler

torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")

import torch_oracle  # noqa: E402


class ReferenceEngine:
    """``tsad.reference`` in float64."""

    network_tolerance = cases.REFERENCE_TOLERANCE
    chunk_tolerance = cases.CHUNK_TOLERANCE  # diffusers computes its coefficients in float32
    plan_tolerance = cases.REFERENCE_TOLERANCE

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: cases.Tensors,
        pruner: cases.Tensors | None = None,
        *,
        lanes: int = 1,
    ) -> None:
        self.policy = ReferencePolicy(config, tensors, pruner, lanes=lanes)

    def predict_noise(self, sample: Any, step: int, obs: Any) -> NDArray[Any]:
        """Dense network output (N, T, action_dim), normalised sample, raw obs."""
        return self.policy.predict_noise(sample, step, obs)

    def run(
        self,
        plan: Any,
        obs: Any,
        noise: Any,
        *,
        first: Any = None,
        lanes: Sequence[int] | None = None,
    ) -> NDArray[Any]:
        """The whole horizon in raw units (L, T, action_dim).

        ``plan`` (K, B) or one per row is used, or right after a reset ``first`` (None: dense).
        """
        return self.policy(obs, noise, plan, lanes=lanes, return_horizon=True, first=first)

    def reset(self, lanes: Sequence[int] | None = None) -> None:
        self.policy.reset(lanes)

    def pruner_sources(self, obs: Any) -> NDArray[Any]:
        """Sources (K, B) of the likeliest classes for one obs: time-reversed, row 0 forced."""
        return plan(self.policy.prune(obs))


class CoreEngine:
    """The compiled core in float32, on the best instruction set that this machine has."""

    network_tolerance = cases.NETWORK_TOLERANCE
    chunk_tolerance = cases.CHUNK_TOLERANCE
    plan_tolerance = cases.PLAN_TOLERANCE

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: cases.Tensors,
        pruner: cases.Tensors | None = None,
        *,
        lanes: int = 1,
    ) -> None:
        parsed, table = PolicyConfig.from_dict(config), make_sampler(config["scheduler"])
        model = make_model(parsed, tensors, pruner, table)
        self.policy = _core.Policy(model, lanes=lanes, threads=2)

    def predict_noise(self, sample: Any, step: int, obs: Any) -> NDArray[Any]:
        return self.policy.predict_noise(sample, step, obs)

    def run(
        self,
        plan: Any,
        obs: Any,
        noise: Any,
        *,
        first: Any = None,
        lanes: Sequence[int] | None = None,
    ) -> NDArray[Any]:
        rows = list(range(self.policy.lanes)) if lanes is None else list(lanes)
        for i, lane in enumerate(rows):
            dense = np.zeros((self.policy.num_inference_steps, self.policy.n_blocks), np.uint8)
            if self.policy._stats(lane)["chunks"]:
                self.policy._set_plan(lane, self._row(plan, i, dense), dense)
                continue
            # any plan that reuses earlier chunks makes the lane keep them from its first on
            start = self._row(first, i, dense)
            keep = np.where(start == 0, REUSE_ROLLOUT, 0).astype(np.uint8)
            self.policy._set_plan(lane, keep, start)
        noise = np.ascontiguousarray(noise)
        return self.policy(obs, noise=noise, lanes=rows, return_horizon=True)

    @staticmethod
    def _row(given: Any, i: int, default: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if given is None:
            return default
        return np.asarray(given if np.ndim(given) == 2 else given[i], np.uint8)

    def reset(self, lanes: Sequence[int] | None = None) -> None:
        self.policy.reset(lanes=lanes)

    def pruner_sources(self, obs: Any) -> NDArray[np.uint8]:
        sources = self.policy._pruner_scores(obs).argmax(-1).astype(np.uint8)
        sources[0] = 0
        return sources


ENGINES = {"reference": ReferenceEngine, "core": CoreEngine}


@pytest.fixture(params=list(ENGINES.values()), ids=list(ENGINES))
def engine(request: pytest.FixtureRequest) -> Any:
    """An engine's class; calling it makes a policy."""
    return request.param


def tiny(name: str = "tiny", K: int = 6, **scheduler: Any) -> tuple[dict[str, Any], cases.Tensors]:
    """A case whose actions hide little: a random network that predicts noise ends in clipping."""
    keys = {"prediction_type": "sample", "clip_sample_range": 2.0, "num_inference_steps": K}
    config = cases.config(name, **(keys | scheduler))
    return config, cases.random_tensors(config["network"], seed=1)


def shape(config: Mapping[str, Any]) -> tuple[int, int]:
    return config["scheduler"]["num_inference_steps"], 3 * config["network"]["n_layer"]


# 1. Dense parity


@pytest.mark.parametrize("name", cases.NETWORKS)
def test_1_dense_network_equals_pytorch(engine, name):
    config = cases.config(name)
    tensors = cases.random_tensors(config["network"], seed=1)
    policy, oracle = engine(config, tensors), torch_oracle.TorchPolicy(config, tensors)
    rows = 1 if name == "kitchen" else 3
    for timestep in (50,) if name == "kitchen" else (99, 50, 0):
        obs, noise = cases.random_inputs(config, seed=timestep, lanes=rows)
        step = 99 - timestep
        expected = oracle.predict_noise(noise[0], step, obs)
        assert 0.3 < expected.std() < 3
        error = cases.relative_error(policy.predict_noise(noise[0], step, obs), expected)
        assert error <= engine.network_tolerance


# 2. Masks


def changed_rows(policy: Any, config: Mapping[str, Any], change: str) -> list[int]:
    """Rows of the output that move when the newest observation or the last action token does."""
    obs, noise = cases.random_inputs(config, seed=3)
    sample = noise[0].copy()
    before = policy.predict_noise(sample, 2, obs)
    (obs if change == "newest obs" else sample)[:, -1] += 1
    after = policy.predict_noise(sample, 2, obs)
    return np.flatnonzero((before != after).any((0, 2))).tolist()


@pytest.mark.parametrize("name", ["tiny", "tiny_encoder", "tiny_noncausal"])
def test_2_masks(engine, name):
    config, tensors = tiny(name)
    policy = engine(config, tensors)
    T, To = config["network"]["horizon"], config["network"]["n_obs_steps"]
    sees_newest = {
        "tiny": range(To - 1, T),
        # here the encoder itself mixes the observations, with no mask
        "tiny_encoder": range(T),
        "tiny_noncausal": range(T),
    }[name]
    assert changed_rows(policy, config, "newest obs") == list(sees_newest)
    sees_last = range(T) if name == "tiny_noncausal" else [T - 1]
    assert changed_rows(policy, config, "last action") == list(sees_last)


# 3. Encoder identity, which the engines' tables of time tokens rest on


def test_3_memory_splits_into_time_and_observation_tokens():
    config, tensors = tiny()
    obs, _ = cases.random_inputs(config, seed=4, lanes=2)
    one, other = (ReferencePolicy(config, tensors).encode(row) for row in obs)
    assert (one[:, 1:] == one[:1, 1:]).all()
    assert (one[:, 0] == other[:, 0]).all()
    assert (one[:, 1:] != other[:, 1:]).any((0, 2)).all()
    assert len(np.unique(one[:, 0], axis=0)) == len(one)


def test_3_memory_does_not_split_with_encoder_layers():
    config, tensors = tiny("tiny_encoder")
    obs, _ = cases.random_inputs(config, seed=4)
    memory = ReferencePolicy(config, tensors).encode(obs[0])
    assert (memory[0, 1:] != memory[1, 1:]).any(1).all()
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    batch = encode(w, config["network"], [99, 0], np.stack([obs[0], obs[0]]).astype(np.float64))
    alone = encode(w, config["network"], 0, obs[0].astype(np.float64))
    assert cases.relative_error(batch[1], alone) <= cases.REFERENCE_TOLERANCE


# 4. Whole chunks (the coefficient table itself: test_samplers.py)


@pytest.mark.parametrize(
    ("kind", "K", "spacing"),
    [
        ("ddpm", 100, "leading"),
        ("ddim", 16, "leading"),
        ("ddim", 16, "trailing"),
        ("ddim", 16, "linspace"),
        ("dpmsolver++", 10, "leading"),
        ("dpmsolver++", 10, "linspace"),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_4_dense_chunk_equals_pytorch_and_diffusers(engine, kind, K, spacing, prediction):
    keys = {"type": kind, "timestep_spacing": spacing, "prediction_type": prediction}
    config, tensors = tiny(K=K, **keys)
    obs, noise = cases.random_inputs(config, seed=5, lanes=2)
    got = engine(config, tensors, lanes=2).run(None, obs, noise)
    oracle = torch_oracle.TorchPolicy(config, tensors)
    expected = [oracle.chunk(obs[i], noise[:, i], double=False) for i in range(2)]
    affine = config["normalizer"]["action"]
    normalised = np.stack(expected) * affine["scale"] + affine["offset"]
    assert (np.abs(normalised) < 1.999).mean() > 0.1  # not all of it in the clipping
    assert cases.relative_error(got, expected) <= engine.chunk_tolerance


def test_4_dense_chunk_of_a_wider_network(engine):
    config = cases.config("odd", type="ddim", num_inference_steps=8)
    tensors = cases.random_tensors(config["network"], seed=1)
    obs, noise = cases.random_inputs(config, seed=5)
    got = engine(config, tensors).run(None, obs, noise)
    expected = torch_oracle.TorchPolicy(config, tensors).chunk(obs[0], noise[:, 0], double=False)
    assert cases.relative_error(got[0], expected) <= engine.chunk_tolerance


# 5. A plan of all compute is the dense policy


def test_5_all_compute_equals_dense_bit_for_bit(engine):
    config, tensors = tiny()
    obs, noise = cases.random_inputs(config, seed=6)
    policy = engine(config, tensors)
    dense = policy.run(None, obs, noise)
    zeros = np.zeros(shape(config), np.uint8)
    np.testing.assert_array_equal(policy.run(zeros, obs, noise), dense)
    policy.reset()
    np.testing.assert_array_equal(policy.run(zeros, obs, noise, first=zeros), dense)


# 6. Any plan


@pytest.mark.parametrize("name", cases.SMALL)
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_6_random_plans_over_three_rollouts(engine, name, kind):
    config, tensors = tiny(name, type=kind)
    K, B = shape(config)
    rng = np.random.default_rng(7)
    policy = engine(config, tensors)
    for episode in range(10):
        policy.reset()
        oracle = torch_oracle.TorchPolicy(config, tensors)
        filled = np.zeros((K, B), bool)
        for rollout in range(3):
            obs, noise = cases.random_inputs(config, seed=100 * episode + rollout)
            sources = cases.random_plan(rng, K, B, filled=filled)
            if rollout == 0 and episode % 2:
                first, sources = None, np.zeros((K, B), np.uint8)
            else:
                first = sources
            filled |= sources == 0
            got = policy.run(sources, obs, noise, first=first)
            expected = oracle.chunk(obs[0], noise[:, 0], sources)
            assert cases.relative_error(got[0], expected) <= engine.plan_tolerance


def test_6_random_plans_use_every_source():
    plans = [cases.random_plan(np.random.default_rng(i), 6, 6) for i in range(10)]
    assert (np.bincount(np.concatenate(plans).ravel(), minlength=5) > 10).all()


# 7. Time reversal


def test_7_the_last_row_of_logits_drives_the_first_step():
    rng = np.random.default_rng(8)
    logits = rng.standard_normal((5, 6, 4))
    sources = plan(logits)
    assert sources.dtype == np.uint8
    assert (sources[0] == 0).all()  # forced, after the reversal
    for k in range(1, 5):
        np.testing.assert_array_equal(sources[k], logits[4 - k].argmax(-1))
    two = plan(logits[:2])
    np.testing.assert_array_equal(two[1], logits[0].argmax(-1))


def test_7_equal_logits_give_the_lowest_class():
    logits = np.zeros((2, 1, 4))
    logits[0, 0] = [1, 3, 3, 3]
    assert plan(logits).tolist() == [[0], [1]]


@pytest.mark.parametrize("K", [2, 6])
def test_7_pruner_of_the_policy_is_reversed(engine, K):
    config = cases.config("tiny", pruner=True, num_inference_steps=K, type="ddim")
    tensors = cases.random_tensors(config["network"], seed=1)
    weights = cases.random_pruner(config["pruner"], config["network"], seed=1, tensors=tensors)
    policy = engine(config, tensors, weights)
    oracle = torch_oracle.TorchPolicy(config, tensors)
    pruner = torch_oracle.TorchPruner(config["pruner"], weights)
    asymmetric = 0
    for seed in range(8):
        obs, _ = cases.random_inputs(config, seed)
        gates = pruner(oracle.memory(obs[0]), shape(config)[1]).numpy().argmax(-1)
        asymmetric += (gates != gates[::-1]).any()
        sources = policy.pruner_sources(obs[0])
        assert (sources[0] == 0).all()
        np.testing.assert_array_equal(sources[1:], gates[::-1][1:])
    assert asymmetric  # else the test could not see a missing reversal


# 8. Rollouts and resets


def rollout_plan(config: Mapping[str, Any]) -> NDArray[np.uint8]:
    return np.full(shape(config), REUSE_ROLLOUT, np.uint8)


def test_8_first_rollout_is_dense_and_reset_forgets(engine):
    config, tensors = tiny(type="ddim")
    policy, sources = engine(config, tensors), rollout_plan(config)
    one, other = (cases.random_inputs(config, seed=seed) for seed in (10, 11))
    dense_one = policy.run(sources, *one)
    assert cases.relative_error(dense_one, engine(config, tensors).run(None, *one)) == 0
    # every cell as in the first rollout: same noise, so the same chunk whatever the observation
    reused = policy.run(sources, other[0], one[1])
    assert cases.relative_error(reused, dense_one) <= engine.plan_tolerance
    policy.reset()
    dense_other = policy.run(sources, *other)
    np.testing.assert_array_equal(dense_other, engine(config, tensors).run(None, *other))
    policy.reset()
    with pytest.raises(ValueError, match="step 0, block 0 .*reuse_rollout"):
        policy.run(sources, *one, first=sources)


def test_8_a_cell_keeps_its_last_computed_value_over_rollouts(engine):
    config, tensors = tiny(type="ddim")
    policy, sources = engine(config, tensors), rollout_plan(config)
    (obs, noise), (other, _) = (cases.random_inputs(config, seed=seed) for seed in (12, 13))
    first = policy.run(None, obs, noise)
    skipping = np.full(shape(config), SKIP, np.uint8)
    policy.run(skipping, other, noise)  # writes nothing
    policy.run(sources, other, noise)  # neither does reuse
    again = policy.run(sources, other, noise)
    assert cases.relative_error(again, first) <= engine.plan_tolerance


def test_8_reset_of_one_lane_leaves_the_other(engine):
    config, tensors = tiny(type="ddim")
    policy, sources = engine(config, tensors, lanes=2), rollout_plan(config)
    obs, noise = cases.random_inputs(config, seed=14, lanes=2)
    other, _ = cases.random_inputs(config, seed=15, lanes=2)
    first = policy.run(sources, obs, noise)
    policy.reset([1])
    second = policy.run(sources, other, noise)
    assert cases.relative_error(second[0], first[0]) <= engine.plan_tolerance
    fresh = engine(config, tensors).run(sources, other[1:], noise[:, 1:])
    np.testing.assert_array_equal(second[1], fresh[0])


@pytest.mark.parametrize(
    ("cell", "source", "words"),
    [
        ((0, 1), 1, ["step 0", "layers.0.cross_attn", "reuse_type", "compute"]),
        ((0, 3), 2, ["step 0", "layers.1.self_attn", "reuse_step", "compute"]),
        ((0, 0), 3, ["step 0", "layers.0.self_attn", "reuse_rollout", "compute"]),
        ((4, 5), 3, ["step 4", "layers.1.feed_forward", "reuse_rollout", "compute"]),
    ],
)
def test_8_reading_an_empty_cache_is_refused_and_changes_nothing(engine, cell, source, words):
    config, tensors = tiny(type="ddim")
    policy = engine(config, tensors)
    inputs = cases.random_inputs(config, seed=16)
    bad = np.zeros(shape(config), np.uint8)
    bad[cell] = source
    with pytest.raises(ValueError) as error:
        policy.run(bad, *inputs, first=bad)
    for word in words:
        assert word in str(error.value), str(error.value)
    # still before its first rollout, and nothing was written: row 0 computes, the rest is missing
    with pytest.raises(ValueError, match="reuse_rollout"):
        policy.run(None, *inputs, first=rollout_plan(config))
    sources = rollout_plan(config)
    np.testing.assert_array_equal(
        policy.run(sources, *inputs), engine(config, tensors).run(None, *inputs)
    )


def test_8_a_sparse_first_rollout_leaves_rollout_slots_empty(engine):
    config, tensors = tiny(type="ddim")
    policy = engine(config, tensors)
    inputs = cases.random_inputs(config, seed=17)
    first = np.zeros(shape(config), np.uint8)
    first[3, 4] = REUSE_STEP
    policy.run(None, *inputs, first=first)
    with pytest.raises(ValueError, match="step 3, block 4") as error:
        policy.run(rollout_plan(config), *inputs)
    assert "layers.1.cross_attn" in str(error.value)
    sources = rollout_plan(config)
    sources[3, 4] = 0
    policy.run(sources, *inputs)
    policy.run(rollout_plan(config), *inputs)  # now that slot is filled too


# 9. Exact rewrites: the pruner's is in test_reference.py; a folded cross-attention is seen by 1.


# 10. Lanes


def test_10_lanes_equal_policies_of_one(engine):
    config, tensors = tiny(type="ddpm")
    K, B = shape(config)
    rng = np.random.default_rng(18)
    together = engine(config, tensors, lanes=4)
    alone = [engine(config, tensors) for _ in range(4)]
    order = [[0, 1, 2, 3], [3, 1], [2], [2, 0, 1, 3]]
    for seed, lanes in enumerate(order):
        obs, noise = cases.random_inputs(config, seed=seed, lanes=len(lanes))
        plans = [cases.random_plan(rng, K, B) for _ in lanes]
        got = together.run(plans, obs, noise, lanes=lanes)
        for i, lane in enumerate(lanes):
            one = alone[lane].run(plans[i], obs[i : i + 1], noise[:, i : i + 1])
            np.testing.assert_array_equal(got[i], one[0])
