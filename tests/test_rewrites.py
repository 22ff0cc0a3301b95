"""Every exact rewrite of the core against the plain form, with weights that would show a wrong one.

`tsad.reference` has no rewrites: it normalises with scale and shift, projects queries, keys and
values of every memory token, and encodes all of them at every step. Each test makes the weights
that one rewrite moves around large, equals the core with the reference, and then takes them away
from the reference: what it said must have depended on them by far more than the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from cases import (
    REWRITE_TOLERANCE,
    Tensors,
    config,
    random_inputs,
    random_pruner,
    random_tensors,
    relative_error,
)
from numpy.typing import NDArray

from tsad import _core
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.reference import ReferencePolicy
from tsad.samplers import make_sampler

K = 6
SEEN = 1e-2  # relative change of the output by which a weight must count
Change = Callable[[Tensors], None]
backends = pytest.mark.parametrize("backend", [*_core.backends(), "guarded"])


def make(
    name: str, tensors: Tensors, backend: str, pruner: Tensors | None = None, **scheduler: Any
) -> tuple[_core.Policy, dict[str, Any]]:
    """The core with these weights, and the configuration for the reference."""
    case = config(name, pruner=pruner is not None, num_inference_steps=K, **scheduler)
    parsed, table = PolicyConfig.from_dict(case), make_sampler(case["scheduler"])
    model = make_model(parsed, tensors, pruner, table, backend=backend)
    return _core.Policy(model), case


def predictions(policy: Any, case: Mapping[str, Any]) -> NDArray[Any]:
    """Outputs of the network at every step, for two samples and observations each."""
    made = []
    for step in range(K):
        obs, noise = random_inputs(case, step, lanes=2, steps=1)
        made.append(np.array(policy.predict_noise(noise[0], step, obs)))
    return np.stack(made)


def check(name: str, backend: str, change: Change, neutral: Change, **scheduler: Any) -> None:
    """Core equals reference after `change`, and the reference is another after `neutral`."""
    tensors = random_tensors(config(name)["network"], 3)
    change(tensors)
    core, case = make(name, tensors, backend, **scheduler)
    expected = predictions(ReferencePolicy(case, tensors), case)
    assert relative_error(predictions(core, case), expected) < REWRITE_TOLERANCE
    without = {key: value.copy() for key, value in tensors.items()}
    neutral(without)
    assert relative_error(predictions(ReferencePolicy(case, without), case), expected) > SEEN


def setter(words: str, value: Callable[[np.random.Generator, tuple[int, ...]], Any]) -> Change:
    """Replaces the tensors whose names end in `words`; every layer's own numbers."""

    def change(tensors: Tensors) -> None:
        rng, found = np.random.default_rng(11), 0
        for key, old in tensors.items():
            if key.endswith(words):
                tensors[key] = np.asarray(value(rng, old.shape), np.float32)
                found += 1
        assert found, words

    return change


def far_gains(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Far from 1, of both signs, and some 0."""
    return rng.uniform(-3, 3, shape) * (rng.uniform(0, 1, shape) > 0.1)


def far_shifts(rng: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return rng.uniform(-2, 2, shape)


def ones(_: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.ones(shape)


def zeros(_: np.random.Generator, shape: tuple[int, ...]) -> Any:
    return np.zeros(shape)


def part(words: str, index: int, scale: float) -> Change:
    """Scales the queries' (0), keys' (1) or values' (2) third of an input projection."""

    def change(tensors: Tensors) -> None:
        for key, value in tensors.items():
            if key.endswith(words):
                np.split(value, 3)[index][...] *= np.float32(scale)

    return change


def both(*changes: Change) -> Change:
    def change(tensors: Tensors) -> None:
        for one in changes:
            one(tensors)

    return change


# ---- LayerNorm's scale and shift in the next matrix


@backends
@pytest.mark.parametrize("norm", ["norm1", "norm2", "norm3", "ln_f"])
def test_layernorms_fold_into_the_next_matrix(norm: str, backend: str) -> None:
    """norm1: queries, keys and values; norm2: folded cross-attention; norm3; the head."""
    gains, shifts = setter(f"{norm}.weight", far_gains), setter(f"{norm}.bias", far_shifts)
    check("tiny", backend, both(gains, shifts), setter(f"{norm}.weight", ones))
    check("tiny", backend, both(gains, shifts), setter(f"{norm}.bias", zeros))


@backends
@pytest.mark.parametrize("norm", ["norm1", "norm2"])
def test_layernorms_of_an_encoder_with_attention(norm: str, backend: str) -> None:
    def far(tensors: Tensors) -> None:
        rng = np.random.default_rng(4)
        for i in range(2):
            name = f"encoder.layers.{i}.{norm}"
            tensors[f"{name}.weight"] = far_gains(rng, (16,)).astype(np.float32)
            tensors[f"{name}.bias"] = far_shifts(rng, (16,)).astype(np.float32)

    def plain(tensors: Tensors) -> None:
        for i in range(2):
            tensors[f"encoder.layers.{i}.{norm}.weight"][:] = 1
            tensors[f"encoder.layers.{i}.{norm}.bias"][:] = 0

    check("tiny_encoder", backend, far, plain)


# ---- cross-attention as score and value vectors


@backends
@pytest.mark.parametrize("name", ["tiny", "tiny_noncausal", "odd"])
@pytest.mark.parametrize(("third", "what"), [(0, "queries"), (1, "keys"), (2, "values")])
def test_cross_attention_folds(third: int, what: str, name: str, backend: str) -> None:
    """Weights and biases of queries, keys and values in turn; a norm that is not 1 and 0 before."""
    layer = "multihead_attn"
    large = both(
        setter("norm2.weight", far_gains),
        setter("norm2.bias", far_shifts),
        setter(f"{layer}.in_proj_bias", far_shifts),
        setter(f"{layer}.out_proj.bias", far_shifts),
    )
    check(name, backend, large, part(f"{layer}.in_proj_weight", third, 0))
    # a key's bias alone adds the same to every token's score, which softmax takes away again
    if what != "keys":
        check(name, backend, large, part(f"{layer}.in_proj_bias", third, 0))


@backends
def test_the_folded_output_bias_and_the_mask_count(backend: str) -> None:
    bias = setter("multihead_attn.out_proj.bias", far_shifts)
    check("tiny", backend, bias, setter("multihead_attn.out_proj.bias", zeros))
    # without its mask the oldest action tokens see newer observations
    tensors = random_tensors(config("tiny")["network"], 3)
    masked = predictions(make("tiny", tensors, backend)[0], config("tiny"))
    open_ = predictions(make("tiny_noncausal", tensors, backend)[0], config("tiny"))
    assert relative_error(open_[:, :, 0], masked[:, :, 0]) > SEEN


# ---- observation tokens once per chunk, tables of the steps


@backends
@pytest.mark.parametrize(
    "scheduler",
    [{}, {"type": "ddim"}, {"type": "dpmsolver++"}, {"timestep_spacing": "trailing"}],
    ids=["ddpm", "ddim", "dpm", "trailing"],
)
def test_time_tokens_are_tables_of_the_samplers_timesteps(
    scheduler: dict[str, Any], backend: str
) -> None:
    """A table of the wrong step, or of the step's number instead of its timestep, is seen."""
    tensors = random_tensors(config("tiny")["network"], 3)
    core, case = make("tiny", tensors, backend, **scheduler)
    reference = ReferencePolicy(case, tensors)
    obs, noise = random_inputs(case, 0, lanes=1, steps=1)
    made = [np.array(core.predict_noise(noise[0], k, obs)) for k in range(K)]
    plain = [reference.predict_noise(noise[0], k, obs) for k in range(K)]
    assert relative_error(made, plain) < REWRITE_TOLERANCE
    for k in range(1, K):
        assert relative_error(plain[k], plain[k - 1]) > SEEN


@backends
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
def test_observation_tokens_are_encoded_for_each_chunk(name: str, backend: str) -> None:
    """Positions tell the tokens apart; a chunk must not see an earlier chunk's observations."""
    positions = setter("cond_pos_emb", lambda rng, shape: rng.uniform(-2, 2, shape))
    swap = setter("cond_pos_emb", lambda rng, shape: rng.uniform(-2, 2, shape)[:, ::-1])
    check(name, backend, positions, swap)
    tensors = random_tensors(config(name)["network"], 3)
    open_ = {"type": "ddim", "prediction_type": "sample", "clip_sample_range": 2.0}
    core, case = make(name, tensors, backend, **open_)
    reference = ReferencePolicy(case, tensors)
    dense = np.zeros((K, 6), np.uint8)
    _, noise = random_inputs(case, 0, steps=K)
    chunks = []
    for seed in (1, 2, 1):
        obs, _ = random_inputs(case, seed, steps=K)
        chunks.append(np.array(core(obs, noise=noise, return_horizon=True)))
        expected = reference(obs, noise, dense, return_horizon=True)
        assert relative_error(chunks[-1], expected) < REWRITE_TOLERANCE
    assert relative_error(chunks[1], chunks[0]) > SEEN
    np.testing.assert_array_equal(chunks[2], chunks[0])


# ---- the pruner's constants


@backends
@pytest.mark.parametrize("name", ["tiny", "tiny_encoder"])
@pytest.mark.parametrize(
    ("change", "neutral"),
    [
        (("norm1.weight", far_gains), ones),
        (("norm1.bias", far_shifts), zeros),
        (("norm2.weight", far_gains), ones),
        (("norm2.bias", far_shifts), zeros),
        (("norm3.weight", far_gains), ones),
        (("norm3.bias", far_shifts), zeros),
        (("self_attn.in_proj_bias", far_shifts), zeros),
        (("self_attn.out_proj.bias", far_shifts), zeros),
        (("multihead_attn.in_proj_bias", far_shifts), zeros),
        (("multihead_attn.out_proj.bias", far_shifts), zeros),
        (("memory_proj.bias", far_shifts), zeros),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_pruners_constants_are_hoisted(
    change: tuple[str, Any], neutral: Any, name: str, backend: str
) -> None:
    """Block tokens after self-attention, their queries, composed projections, the time's scores."""
    words, value = change
    network = config(name)["network"]
    tensors = random_tensors(network, 3)
    pruner = random_pruner(config(name, pruner=True)["pruner"], network, 3, tensors=tensors)
    setter(words, value)(pruner)
    core, case = make(name, tensors, backend, pruner)
    obs, _ = random_inputs(case, 4)

    def plain(weights: Tensors) -> NDArray[Any]:
        return ReferencePolicy(case, tensors, weights).prune(obs[0])[::-1]  # the time flip

    expected = plain(pruner)
    assert relative_error(core._pruner_scores(obs[0]), expected) < REWRITE_TOLERANCE
    without = {key: array.copy() for key, array in pruner.items()}
    setter(words, neutral)(without)
    assert relative_error(plain(without), expected) > SEEN
