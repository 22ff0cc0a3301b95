"""The specification itself: its parts against PyTorch's own modules, and its interface.

Whole networks, chunks, plans and lanes against PyTorch are in test_conformance.py, which runs the
reference as one engine among others.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import cases
import numpy as np
import pytest

from tsad import reference
from tsad.reference import SKIP, HoistedPruner, ReferencePolicy

torch = pytest.importorskip("torch", reason="pip install 'tsad-policy[test]'")
pytest.importorskip("diffusers", reason="pip install 'tsad-policy[test]'")

import torch_oracle  # noqa: E402

TINY = {"prediction_type": "sample", "clip_sample_range": 2.0, "num_inference_steps": 5}


def tiny(lanes: int = 1, **keys: Any) -> tuple[dict[str, Any], ReferencePolicy]:
    config = cases.config("tiny", **(TINY | keys))
    return config, ReferencePolicy(config, cases.random_tensors(config["network"], 1), lanes=lanes)


# Parts


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (reference.gelu, torch.nn.GELU()),
        (reference.mish, torch.nn.Mish()),
        (reference.relu, torch.nn.ReLU()),
        (reference.softmax, torch.nn.Softmax(-1)),
    ],
    ids=["gelu", "mish", "relu", "softmax"],
)
def test_activations_equal_pytorch(ours, theirs):
    x = np.concatenate([np.linspace(-40, 40, 4001), [0.0, 1e-9, -1e-300]])
    np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)), rtol=1e-12, atol=1e-14)


def test_sinusoid_has_all_sines_first():
    code = reference.sinusoid([0, 3], 8, np.float64)
    frequency = 10000.0 ** -(np.arange(4) / 3)
    np.testing.assert_allclose(code[1], [*np.sin(3 * frequency), *np.cos(3 * frequency)])
    assert code[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", [*cases.SMALL, "odd", "can"])
def test_memory_equals_pytorch(name):
    config = cases.config(name, num_inference_steps=4)
    tensors = cases.random_tensors(config["network"], seed=1)
    obs, _ = cases.random_inputs(config, seed=2)
    expected = torch_oracle.TorchPolicy(config, tensors).memory(obs[0])
    memory = ReferencePolicy(config, tensors).encode(obs[0])
    assert cases.relative_error(memory, expected) <= cases.REFERENCE_TOLERANCE


# The pruner


@pytest.mark.parametrize(
    ("name", "K"), [("tiny", 100), ("tiny", 1), ("odd", 10), ("can", 10), ("kitchen", 4)]
)
def test_pruner_equals_pytorch_plain_and_hoisted(name, K):
    config = cases.config(name, pruner=True)
    network, sizes = config["network"], config["pruner"]
    B = 3 * network["n_layer"]
    rng = np.random.default_rng(3)
    # obs tokens do not depend on the step, as those of a token-wise encoder
    shape = (network["n_obs_steps"], network["n_emb"])
    time, obs = rng.standard_normal((K, network["n_emb"])), rng.standard_normal(shape)
    memory = np.concatenate([time[:, None], np.broadcast_to(obs, (K, *obs.shape))], 1)
    weights = cases.random_pruner(sizes, network, seed=4)
    expected = torch_oracle.TorchPruner(sizes, weights)(torch.from_numpy(memory), B).numpy()
    assert expected.shape == (K, B, 4)
    assert expected.std((0, 1)).min() > 0.01
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    plain = reference.prune(w, sizes, memory, B)
    assert cases.relative_error(plain, expected) <= cases.REFERENCE_TOLERANCE
    hoisted = HoistedPruner(w, sizes, time, B)(obs)
    assert cases.relative_error(hoisted, expected) <= cases.REFERENCE_TOLERANCE


@pytest.mark.parametrize("name", ["tiny", "kitchen"])
def test_mlp_pruner_equals_pytorch(name):
    config = cases.config(name, pruner="mlp")
    network, sizes = config["network"], config["pruner"]
    B, K, S = 3 * network["n_layer"], 7, 1 + network["n_obs_steps"]
    memory = np.random.default_rng(3).standard_normal((K, S, network["n_emb"]))
    weights = cases.random_pruner(sizes, network, seed=4)
    model = torch.nn.Sequential(
        torch.nn.Linear(S * network["n_emb"], sizes["hidden_dim"]),
        torch.nn.ReLU(),
        torch.nn.Linear(sizes["hidden_dim"], 4 * B),
    ).double()
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    with torch.no_grad():
        expected = model(torch.from_numpy(memory).flatten(1)).reshape(K, B, 4).numpy()
    w = {key: value.astype(np.float64) for key, value in weights.items()}
    got = reference.prune(w, sizes, memory, B)
    assert cases.relative_error(got, expected) <= cases.REFERENCE_TOLERANCE


def test_hoisted_pruner_in_float32_is_an_exact_rewrite():
    config = cases.config("tiny", pruner=True, num_inference_steps=20)
    tensors = cases.random_tensors(config["network"], seed=1)
    weights = cases.random_pruner(config["pruner"], config["network"], seed=1, tensors=tensors)
    policy = ReferencePolicy(config, tensors, weights, dtype=np.float32)
    obs, _ = cases.random_inputs(config, seed=5)
    memory = policy.encode(obs[0])
    hoisted = HoistedPruner(weights, config["pruner"], memory[:, 0], len(policy.blocks))
    error = cases.relative_error(hoisted(memory[0, 1:]), policy.prune(obs[0]))
    assert error <= cases.REWRITE_TOLERANCE


def test_without_a_plan_the_pruner_decides():
    config = cases.config("tiny", pruner=True, **TINY)
    tensors = cases.random_tensors(config["network"], seed=1)
    weights = cases.random_pruner(config["pruner"], config["network"], seed=1, tensors=tensors)
    (obs, noise), (other, _) = (cases.random_inputs(config, seed=seed) for seed in (6, 7))
    policies = [ReferencePolicy(config, tensors, weights) for _ in range(2)]
    dense = [policy(obs, noise) for policy in policies]
    np.testing.assert_array_equal(*dense)
    sources = reference.plan(policies[0].prune(other[0]))
    assert 0 < (sources == 0).mean() < 1
    got = policies[0](other, noise)
    np.testing.assert_array_equal(got, policies[1](other, noise, sources))
    assert (got != ReferencePolicy(config, tensors)(other, noise)).all()


def test_no_pruner_and_no_plan_is_an_error():
    config, policy = tiny()
    inputs = cases.random_inputs(config, seed=6)
    policy(*inputs)
    with pytest.raises(ValueError, match="pruner: .* pass pruner tensors, or a plan"):
        policy(*inputs)


# Plans


def test_skip_adds_nothing():
    config, policy = tiny()
    obs, noise = cases.random_inputs(config, seed=8)
    skipping = np.full((5, 6), SKIP, np.uint8)
    got = policy(obs, noise, skipping, return_horizon=True, first=skipping)
    w = policy._w
    x = noise[:, 0].astype(np.float64)
    # predicts the sample: the last step's output is the action, from that step's sample alone
    a, b, r, c, d, *_ = policy.sampler.table.T
    h = policy.sampler.table[:, 7]
    sample = x[0]
    for k in range(5):
        e = reference.head(w, reference.embed(w, sample))
        sample = c[k] * np.clip(e, -2, 2) + d[k] * sample + (h[k] * x[k + 1] if k < 4 else 0)
    scale, offset = (config["normalizer"]["action"][key] for key in ("scale", "offset"))
    np.testing.assert_allclose(got[0], (sample - offset) / np.array(scale), rtol=1e-12)
    np.testing.assert_array_equal(policy(obs + 1, noise, skipping, return_horizon=True), got)


def test_only_computing_writes():
    """One layer's branch at step 0; then reuse of type must give it, not what reuse passed on."""
    config, policy = tiny(type="ddim")
    memory = policy.encode(cases.random_inputs(config, seed=9)[0][0])
    noise = np.random.default_rng(9).standard_normal((5, 5, 2))
    sources = np.full((5, 6), SKIP, np.uint8)
    sources[0, 0] = 0
    sources[1:, 3] = 1  # layer 1 takes layer 0's self-attention of step 0
    rollout: dict[tuple[int, int], Any] = {}
    arguments = (policy._w, policy.network, policy.sampler, memory, noise)
    by_type = reference.denoise(*arguments, sources, rollout)
    assert list(rollout) == [(0, 0)]
    sources[1:, 3], sources[1:, 0] = SKIP, 2
    by_step = reference.denoise(*arguments, sources, rollout)
    np.testing.assert_array_equal(by_type, by_step)
    sources[0, 3], sources[1:, 0] = 0, 1  # now layer 1 is the last that computed
    assert (reference.denoise(*arguments, sources, rollout) != by_step).any()
    assert list(rollout) == [(0, 0), (0, 3)]


@pytest.mark.parametrize("source", [5, 255])
def test_an_unknown_source_is_refused(source):
    config, policy = tiny()
    bad = np.zeros((5, 6), np.uint8)
    bad[2, 1] = source
    with pytest.raises(ValueError, match=rf"step 2, block 1 \(layers.0.cross_attn\).*{source}"):
        policy(*cases.random_inputs(config, seed=1), bad, first=bad)


# Interface


def test_executed_actions_are_those_from_now_on():
    config = cases.config("odd", type="ddim", num_inference_steps=2)
    tensors = cases.random_tensors(config["network"], 1)
    inputs = cases.random_inputs(config, seed=10)
    horizon = ReferencePolicy(config, tensors)(*inputs, return_horizon=True)
    actions = ReferencePolicy(config, tensors)(*inputs)
    assert actions.shape == (1, 4, 5)
    np.testing.assert_array_equal(actions, horizon[:, 2:6])  # n_obs_steps 3, n_action_steps 4


def test_sampler_arguments_override_the_checkpoint():
    config = cases.config("tiny")
    tensors = cases.random_tensors(config["network"], 1)
    policy = ReferencePolicy(config, tensors, sampler="ddim", num_inference_steps=4)
    same = ReferencePolicy(cases.config("tiny", type="ddim", num_inference_steps=4), tensors)
    assert policy.timesteps.tolist() == [75, 50, 25, 0]
    inputs = cases.random_inputs(config, seed=11, steps=4)
    np.testing.assert_array_equal(policy(*inputs), same(*inputs))


def test_float32_stays_float32_and_agrees():
    config, policy = tiny()
    tensors = cases.random_tensors(config["network"], 1)
    single = ReferencePolicy(config, tensors, dtype=np.float32)
    inputs = cases.random_inputs(config, seed=12)
    got = single(*inputs)
    assert got.dtype == np.float32
    assert cases.relative_error(got, policy(*inputs)) <= cases.NETWORK_TOLERANCE


def test_wrong_shapes_are_named_and_a_refused_call_changes_nothing():
    config, policy = tiny(lanes=2)
    obs, noise = cases.random_inputs(config, seed=13, lanes=2)
    zeros = np.zeros((5, 6), np.uint8)
    bad = np.full((5, 6), 3, np.uint8)
    for arguments, keys, words in [
        ((obs[:1], noise), {}, r"obs: expected shape \(2, 3, 6\), got \(1, 3, 6\)"),
        ((obs, noise[:4]), {}, r"noise: expected shape \(5, 2, 5, 2\)"),
        ((obs, noise), {"first": zeros[:4]}, r"first: expected shape \(5, 6\), got \(4, 6\)"),
        ((obs, noise), {"first": [zeros, bad]}, "step 0, block 0 .*reuse_rollout"),
    ]:
        with pytest.raises(ValueError, match=words):
            policy(*arguments, **keys)
    assert policy._first == [True, True]
    assert policy._rollouts == [{}, {}]
    policy(obs, noise)
    with pytest.raises(ValueError, match=r"plan_sources: expected shape \(5, 6\)"):
        policy(obs, noise, zeros[:, :5])


def test_predict_noise_touches_no_state():
    config, policy = tiny()
    obs, noise = cases.random_inputs(config, seed=14, lanes=3)
    policy.predict_noise(noise[0], 2, obs)
    assert policy._first == [True]
    assert policy._rollouts == [{}]


def test_the_reference_needs_numpy_only():
    code = (
        "import sys; import tsad.reference; "
        "print([m for m in ('torch', 'diffusers', 'scipy', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
