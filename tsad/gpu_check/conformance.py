"""Does the GPU say what the CPU says? The same policies, plans, observations and noise on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import tsad
from tsad.config import PolicyConfig, pruner_shapes
from tsad.device import cublas, setting
from tsad.families import block_costs, network_shapes
from tsad.load import make_model, policy_folder
from tsad.precision import TF32_MARGIN
from tsad.presets import find_preset
from tsad.samplers import make_sampler
from tsad.section import Shapes

FEW_STEPS, WHOLE_CHUNK = 1e-5, 1e-4
"""How far they may be apart, as a part of the largest number: over a few steps, and over a
hundred, where float32's own rounding has grown by as much between two orders of the same sums."""

TRANSFORMER = {
    "type": "diffusion_policy_transformer", "horizon": 5, "n_obs_steps": 3, "n_action_steps": 3,
    "obs_dim": 6, "action_dim": 2, "n_layer": 2, "n_head": 2, "n_emb": 16, "n_cond_layers": 0,
    "causal_attn": True, "time_as_cond": True, "obs_as_cond": True,
}  # fmt: skip
UNET = {
    "type": "unet1d", "horizon": 8, "n_obs_steps": 2, "n_action_steps": 4, "obs_dim": 5,
    "action_dim": 3, "down_dims": [16, 24], "kernel_size": 3, "n_groups": 4,
    "diffusion_step_embed_dim": 16, "use_film_scale_modulation": True,
}  # fmt: skip
DIT = {
    "type": "dit", "horizon": 5, "n_obs_steps": 2, "n_action_steps": 4, "obs_dim": 7,
    "action_dim": 3, "hidden_dim": 30, "num_layers": 2, "num_heads": 3, "timestep_embed_dim": 16,
    "use_rope": True, "rope_base": 100.0, "use_positional_encoding": True,
}  # fmt: skip
LARGE_UNET = UNET | {
    "horizon": 16, "n_action_steps": 8, "obs_dim": 20, "action_dim": 2, "kernel_size": 5,
    "down_dims": [512, 1024, 2048], "n_groups": 8, "diffusion_step_embed_dim": 128,
}  # fmt: skip
LARGE_DIT = DIT | {"horizon": 32, "hidden_dim": 512, "num_layers": 6, "num_heads": 8}
PRUNER = {"hidden_dim": 24, "n_head": 3, "dim_feedforward": 40}
SCHEDULER = {
    "type": "ddpm", "num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001, "beta_end": 0.02, "prediction_type": "sample", "clip_sample": False,
    "clip_sample_range": 1.0, "variance_type": "fixed_small", "timestep_spacing": "leading",
    "steps_offset": 0, "set_alpha_to_one": True, "num_inference_steps": 4,
}  # fmt: skip


class NotHereError(Exception):
    """Why something can't be compared here."""


class Pair(NamedTuple):
    """One policy twice: on the CPU and on the GPU."""

    cpu: tsad.SparsePolicy
    gpu: tsad.SparsePolicy


@dataclass(frozen=True)
class Check:
    """One comparison: ``run`` gives how far the two are apart, which may be ``bound``."""

    name: str
    run: Callable[[], float]
    bound: float
    small: bool = True
    """Whether it is worth its time on an emulated GPU and under a sanitizer."""

    def facts(self) -> dict[str, Any]:
        """What came of it; what is raised is a failure, too."""
        try:
            error, problem = self.run(), None
        except NotHereError as absent:
            return {"check": self.name, "skipped": str(absent)}
        except (RuntimeError, ValueError, MemoryError) as raised:
            error, problem = float("nan"), f"{type(raised).__name__}: {raised}"
        return {
            "check": self.name,
            "error": None if np.isnan(error) else error,
            "bound": self.bound,
            "passed": bool(error <= self.bound),
            **({} if problem is None else {"problem": problem}),
        }


# ---- policies of random weights


def random_tensors(shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
    """Weights with which activations are of the order of 1, and every bias and gain counts."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            values = np.float32(0.2) * values + np.float32(name.endswith("weight"))
        elif "pos_emb" in name:
            values *= np.float32(0.5)
        else:
            values *= np.float32(np.prod(shape[1:]) ** -0.5)
        tensors[name] = values
    return tensors


def config_of(network: dict[str, Any], steps: int, pruner: dict[str, Any] | None) -> PolicyConfig:
    """A whole configuration around a network."""
    rng = np.random.default_rng(7)
    affine = {
        key: {
            "scale": rng.uniform(0.5, 2.0, network[dim]).tolist(),
            "offset": rng.uniform(-0.5, 0.5, network[dim]).tolist(),
        }
        for key, dim in (("obs", "obs_dim"), ("action", "action_dim"))
    }
    data: dict[str, Any] = {
        "format": "tsad",
        "format_version": 1,
        "network": network,
        "scheduler": SCHEDULER | {"num_inference_steps": steps},
        "normalizer": affine,
        "cost": {"version": 1, "unit": "MAC", "blocks": list(block_costs(network))},
    }
    if pruner is not None:
        data["pruner"] = pruner
    return PolicyConfig.from_dict(data)


def random_policy(
    network: dict[str, Any],
    device: str,
    *,
    steps: int = 4,
    lanes: int = 1,
    pruner: dict[str, Any] | None = None,
    precision: str = "float32",
) -> tsad.SparsePolicy:
    """A policy of random weights, the same on every device, rounded alike."""
    config = config_of(network, steps, pruner)
    shapes = None if pruner is None else pruner_shapes(pruner, network)
    table = make_sampler(config.scheduler.to_dict())
    model = make_model(
        config,
        random_tensors(network_shapes(network), 1),
        None if shapes is None else random_tensors(shapes, 2),
        table,
        backend=None if device == "cpu" else device,
        precision=precision,
    )
    return tsad.SparsePolicy(
        model, config=config, sampler=table, lanes=lanes, device=device, precision=precision
    )


def random_pair(network: dict[str, Any], **options: Any) -> Pair:
    """`random_policy` on both."""
    return Pair(*(random_policy(network, device, **options) for device in ("cpu", "cuda")))


def loaded_pair(**options: Any) -> Pair:
    """The bundled policy on both, in float32: what a preset has in 16 bits is the CPU's alone."""
    gpu = tsad.load("pusht", device="cuda", **options)
    plan = gpu.plan
    if (name := options.pop("preset", None)) is not None:
        preset = find_preset(policy_folder("pusht"), name, "pusht")
        options = preset.options() | {"precision": "float32"}
    cpu = tsad.load("pusht", **options)
    cpu.plan = plan
    return Pair(cpu, gpu)


# ---- comparisons


def difference(pair: Pair, rollouts: int, seed: int, lanes: list[int] | None = None) -> float:
    """The largest over some chunks of an episode, all of the horizon, of the largest number."""
    rng, worst = np.random.default_rng(seed), 0.0
    cpu = pair.cpu
    rows = cpu.lanes if lanes is None else len(lanes)
    for _ in range(rollouts):
        obs = rng.standard_normal((rows, cpu.n_obs_steps, cpu.obs_dim), np.float32)
        shape = (cpu.model.n_steps, rows, cpu.horizon, cpu.action_dim)
        noise = rng.standard_normal(shape, np.float32)
        got, expected = (
            np.asarray(policy(obs, noise=noise, lanes=lanes, return_horizon=True))
            for policy in (pair.gpu, cpu)
        )
        error = float(np.abs(got - expected).max() / np.abs(expected).max())
        worst = max(worst, error) if np.isfinite(error) else float("inf")
    return worst


def random_plans(policy: tsad.SparsePolicy, seed: int) -> list[tsad.Plan]:
    """One per lane: all five sources, after a first row, and a first rollout, of all computed."""
    rng, plans = np.random.default_rng(seed), []
    for _ in range(policy.lanes):
        share = rng.uniform(0.05, 0.9)
        weights = [share, *[(1 - share) / 4] * 4]
        shape = (policy.num_inference_steps, policy.n_blocks)
        sources = rng.choice(5, size=shape, p=weights).astype(np.uint8)
        sources[0] = tsad.COMPUTE
        plans.append(tsad.Plan(sources, types=policy.block_types))
    return plans


def set_plans(pair: Pair, plans: list[tsad.Plan]) -> None:
    """The same plans and a new episode on both."""
    for policy in pair:
        policy.reset(seed=0)
        policy.plan = plans


def plans_differ(
    network: dict[str, Any], plans: int, lanes: int = 3, seed: int = 0, **options: Any
) -> float:
    """Random plans of several lanes, over three rollouts each."""
    pair, worst = random_pair(network, lanes=lanes, **options), 0.0
    for i in range(plans):
        set_plans(pair, random_plans(pair.cpu, seed + i))
        worst = max(worst, difference(pair, 3, seed + i))
    return worst


def subsets_differ(network: dict[str, Any]) -> float:
    """Some of the lanes, in any order, with the plan of each."""
    pair = random_pair(network, lanes=6)
    set_plans(pair, random_plans(pair.cpu, 11))
    calls = (None, [4, 0, 2], [5], [3, 1, 5, 4, 2], None)
    return max(difference(pair, 1, seed, lanes) for seed, lanes in enumerate(calls))


def alone_differs(network: dict[str, Any]) -> float:
    """The network by itself."""
    pair, rng = random_pair(network), np.random.default_rng(3)
    cpu = pair.cpu
    sample = rng.standard_normal((2, cpu.horizon, cpu.action_dim), np.float32)
    obs = rng.standard_normal((2, cpu.n_obs_steps, cpu.obs_dim), np.float32)
    got, expected = (policy.predict_noise(sample, 1, obs) for policy in (pair.gpu, cpu))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def scores_differ(pruner: dict[str, Any]) -> float:
    """What the pruner says of every cell."""
    pair = random_pair(TRANSFORMER, pruner=pruner)
    obs = np.random.default_rng(4).standard_normal((3, 6), np.float32)
    got, expected = (policy._pruner_scores(obs) for policy in (pair.gpu, pair.cpu))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def pruner_differs() -> float:
    """Chunks along the pruner's own plans. Its scores may be tied on one of the two: the plans
    that the CPU's pruner makes are run on both."""
    pair = random_pair(TRANSFORMER, pruner=PRUNER)
    chooser = random_policy(TRANSFORMER, "cpu", pruner=PRUNER)
    chooser.sparsity = 0.5
    obs = np.random.default_rng(5).standard_normal((1, 3, 6), np.float32)
    for _ in range(2):
        chooser(obs)
    plan = chooser.plan
    assert isinstance(plan, tsad.Plan)
    set_plans(pair, [tsad.Plan(plan.sources)])
    followed = difference(pair, 2, 5)
    pair.gpu.reset(seed=0)
    pair.gpu.sparsity = 0.5
    for _ in range(3):
        pair.gpu(obs)
    own = pair.gpu.plan
    assert isinstance(own, tsad.Plan)
    return followed if own.sparsity >= 0.5 - 1e-9 else float("inf")


def episode(policy: tsad.SparsePolicy, seed: int) -> NDArray[np.float32]:
    """Four chunks along random plans."""
    policy.reset(seed=3)
    policy.plan = random_plans(policy, seed)
    obs = np.ones((policy.lanes, policy.n_obs_steps, policy.obs_dim), np.float32)
    return np.stack([policy(obs) for _ in range(4)])


def repeats() -> float:
    """The same episode twice, and others in between: the same bits, 0 apart."""
    policy = random_policy(TRANSFORMER, "cuda", lanes=2)
    first, _, again = (episode(policy, seed) for seed in (21, 22, 21))
    return float(np.abs(again - first).max())


def graphs_differ() -> float:
    """Chunks of fixed plans as CUDA graphs, and as launches: the same bits."""
    chunks = []
    for used in "01":
        with setting("TSAD_CUDA_GRAPHS", used):
            chunks.append(episode(random_policy(TRANSFORMER, "cuda", lanes=3), 31))
    return float(np.abs(chunks[1] - chunks[0]).max())


def cublas_differs(network: dict[str, Any], plans: int) -> float:
    """Random plans with all products through cuBLAS, and the same bits again."""
    if (absent := cublas().absent) is not None:
        raise NotHereError(absent)
    with setting("TSAD_CUDA_BLAS", "1"):
        policy = random_policy(network, "cuda", lanes=2)
        first, again = (episode(policy, 21) for _ in range(2))
        differ = plans_differ(network, plans)
    return differ if np.array_equal(first, again) else float("inf")


def one_kernel_differs(network: dict[str, Any], blocks: int, plans: int) -> float:
    """Random plans with a chunk as one kernel on so many multiprocessors, and the same bits
    again."""
    try:
        with setting("TSAD_CUDA_ONE_KERNEL", str(blocks)):
            policy = random_policy(network, "cuda", lanes=2)
            first, again = (episode(policy, 21) for _ in range(2))
            differ = plans_differ(network, plans)
    except ValueError as error:
        if "compute capability" in str(error):
            raise NotHereError(str(error)) from None
        raise
    return differ if np.array_equal(first, again) else float("inf")


def tf32_differs(network: dict[str, Any]) -> float:
    """Random plans with all products through cuBLAS in TF32, as a part of what its rounding may
    cost: a multiple of what rounding the weights alone does on the CPU. Float32's products among
    them are not told apart here."""
    if (absent := cublas().absent) is not None:
        raise NotHereError(absent)
    exact, rounded = (
        random_policy(network, "cpu", lanes=3, precision=precision)
        for precision in ("float32", "tf32")
    )
    with setting("TSAD_CUDA_BLAS", "1"):
        gpu = random_policy(network, "cuda", lanes=3, precision="tf32")
    plans, found = random_plans(exact, 41), []
    for other in (gpu, rounded):
        pair = Pair(exact, other)
        set_plans(pair, plans)
        found.append(difference(pair, 3, 41))
    return found[0] / (TF32_MARGIN * found[1] + FEW_STEPS)


def bundled_differs(**options: Any) -> float:
    """The bundled policy, dense."""
    return difference(loaded_pair(**options), 2, 0)


def sparse_differs(sparsity: float) -> float:
    """The bundled policy along the plan of the dial."""
    pair = loaded_pair()
    for policy in pair:
        policy.sparsity = sparsity
        policy.reset(seed=0)
    return difference(pair, 3, 0)


def checks() -> Iterator[Check]:
    """All of them, the small ones first."""
    encoder = TRANSFORMER | {"n_cond_layers": 2}
    small = {"transformer": TRANSFORMER, "encoder": encoder, "unet": UNET, "dit": DIT}
    for name, network in small.items():
        yield Check(f"{name}, the network alone", partial(alone_differs, network), FEW_STEPS)
        yield Check(f"{name}, random plans", partial(plans_differ, network, 2), FEW_STEPS)
    for precision in ("float16", "bfloat16"):
        for name in ("transformer", "unet"):
            rounds = partial(plans_differ, small[name], 1, 1, precision=precision)
            yield Check(f"{name}, {precision}", rounds, FEW_STEPS)
    for name in ("transformer", "unet"):
        yield Check(f"{name}, tf32, of what it may", partial(tf32_differs, small[name]), 1.0)
    yield Check("lanes, some of them", partial(subsets_differ, TRANSFORMER), FEW_STEPS)
    for kind, pruner in (("transformer", PRUNER), ("mlp", {"type": "mlp", "hidden_dim": 19})):
        yield Check(f"pruner {kind}, scores", partial(scores_differ, pruner), FEW_STEPS)
    yield Check("pruner, chunks", pruner_differs, FEW_STEPS)
    yield Check("the same bits again", repeats, 0.0)
    yield Check("graphs, launches", graphs_differ, 0.0)
    for name, network in small.items():
        yield Check(f"{name}, cuBLAS", partial(cublas_differs, network, 1), FEW_STEPS)
        for blocks in (1, 8):
            one = partial(one_kernel_differs, network, blocks, 1)
            yield Check(f"{name}, one kernel on {blocks}", one, FEW_STEPS)
    chunks: dict[str, Callable[[], float]] = {
        "dense": partial(bundled_differs, lanes=2),
        "DDIM of 10 steps": partial(bundled_differs, sampler="ddim", num_inference_steps=10),
        "preset lossless": partial(bundled_differs, preset="lossless"),
        "80 % sparse": partial(sparse_differs, 0.8),
        "95 % sparse": partial(sparse_differs, 0.95),
    }
    for name, run in chunks.items():
        yield Check(f"pusht, {name}", run, WHOLE_CHUNK, small=False)
    for name, network in (("unet", LARGE_UNET), ("dit", LARGE_DIT)):
        one = partial(one_kernel_differs, network, 8, 2)
        yield Check(f"large {name}, one kernel on 8", one, FEW_STEPS, small=False)
        run = partial(plans_differ, network, 2, 2)
        yield Check(f"large {name}, random plans", run, FEW_STEPS, small=False)
        run = partial(cublas_differs, network, 2)
        yield Check(f"large {name}, cuBLAS", run, FEW_STEPS, small=False)
        run = partial(tf32_differs, network)
        yield Check(f"large {name}, tf32, of what it may", run, 1.0, small=False)
    for name, network in small.items():
        run = partial(plans_differ, network, 50, 4, seed=100)
        yield Check(f"{name}, 50 random plans of 4 lanes", run, FEW_STEPS, small=False)
