"""Planners, the dial, and what `SparsePolicy` says of itself."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from policies import make_policy, noises, observations

import tsad
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, SKIP, Plan, planners


def rows_computed(plan: Plan) -> list[int]:
    computed = plan.sources == COMPUTE
    assert (computed.all(axis=1) == computed.any(axis=1)).all()
    return np.flatnonzero(computed.all(axis=1)).tolist()


# ---- plans


def test_dense() -> None:
    plan = planners.dense(make_policy())
    assert (plan.sparsity, plan.cost) == (0.0, 1.0) and plan.first is None


@pytest.mark.parametrize("steps", [1, 7, 8, 100])
def test_uniform_rows_are_evenly_spaced(steps: int) -> None:
    policy = make_policy(steps=steps)
    for n in range(1, steps + 1):
        plan = planners.uniform(policy, n)
        rows = rows_computed(plan)
        assert rows[0] == 0 and len(rows) == n
        gaps = np.diff([*rows, steps])
        assert gaps.max() - gaps.min() <= 1
        assert set(np.unique(plan.sources)) <= {COMPUTE, REUSE_STEP}
        assert plan.sparsity == pytest.approx(1 - n / steps, abs=1e-12)
        # it runs right after a reset, too
        assert (plan.first or planners.dense(policy)) == Plan(plan.sources)
    for n in (0, steps + 1, 2.0, True, None):
        with pytest.raises(
            (ValueError, TypeError), match=f"n: expected an integer from 1 to {steps}"
        ):
            planners.uniform(policy, n)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [1, 3, 16, 49, 100])
def test_uniform_meets_every_budget(steps: int) -> None:
    policy = make_policy(steps=steps)
    most = policy.max_sparsity
    assert most == 1 - 1 / steps
    some = np.random.default_rng(0).uniform(0, most, 50)
    for sparsity in (0.0, most, *(i / steps for i in range(steps)), *some):
        plan = planners.uniform_sparse(policy, sparsity)
        assert sparsity - 1e-9 <= plan.sparsity < sparsity + 1 / steps
    assert rows_computed(planners.uniform_sparse(policy, most)) == [0]
    assert planners.uniform_sparse(policy, 0.0).sparsity == 0
    for sparsity in (-0.1, most + 0.01, 1.0, float("nan")):
        with pytest.raises(ValueError, match="sparsity: expected 0 to"):
            planners.uniform_sparse(policy, sparsity)


def test_random_plans_meet_their_budget_and_use_every_source() -> None:
    policy = make_policy(steps=16)
    finest = policy.block_costs.max() / (policy.block_costs.sum() * 16)
    for seed in range(100):
        sparsity = float(np.random.default_rng(seed).uniform(0, policy.max_sparsity))
        plan = planners.random(policy, sparsity, seed)
        assert sparsity - 1e-9 <= plan.sparsity < sparsity + finest
        assert (plan.sources[0] == COMPUTE).all()
        assert planners.random(policy, sparsity, seed) == plan
        assert planners.random(policy, sparsity, seed + 1) != plan or sparsity < 0.05
    assert all(planners.random(policy, 0.6, 0).counts.values())
    assert planners.random(policy, 0.0, 0).sparsity == 0
    assert rows_computed(planners.random(policy, policy.max_sparsity, 0)) == [0]
    with pytest.raises(ValueError, match="sparsity: expected 0 to 0.9375"):
        planners.random(policy, 0.99, 0)


def test_plans_carry_names_and_costs(tmp_path: Any) -> None:
    policy = make_policy()
    plan = planners.random(policy, 0.5, 1)
    assert list(plan.blocks) == policy.blocks and list(plan.types or ()) == policy.block_types
    assert np.array_equal(plan.block_costs, policy.block_costs)
    assert plan.metadata == {"planner": "random", "sparsity": 0.5, "seed": 1}
    plan.save(tmp_path / "plan.npz")
    assert planners.from_file(tmp_path / "plan.npz") == plan


# ---- the dial


def test_a_new_policy_is_dense() -> None:
    for policy in (make_policy(), make_policy(pruner=True)):
        assert policy.sparsity == 0.0
        assert policy.plan == planners.dense(policy)  # what will run
        policy(observations(policy, 0))
        assert policy.plan == planners.dense(policy)
    assert make_policy().planner == "uniform"
    assert make_policy(pruner=True).planner == "pruner"


def test_the_dial_turns_plans() -> None:
    policy = make_policy(steps=16)
    obs = observations(policy, 0)
    for sparsity in (0.5, 0.9, 0.0, 0.9375, 0.25):
        policy.sparsity = sparsity
        policy.reset()
        policy(obs)
        assert policy.sparsity == sparsity
        assert policy.plan == planners.uniform_sparse(policy, sparsity)
        assert policy.stats["sparsity"] == pytest.approx(policy.plan.sparsity, abs=1e-12)


def test_the_actions_follow_the_plan() -> None:
    policy = make_policy(steps=16)
    obs, noise = observations(policy, 0), noises(policy, 1)
    dense = policy(obs, noise=noise)
    policy.sparsity = 0.75
    policy.reset()
    sparse = policy(obs, noise=noise)
    assert not np.array_equal(sparse, dense)
    policy.sparsity = 0
    policy.reset()
    assert np.array_equal(policy(obs, noise=noise), dense)
    policy.plan = Plan(np.zeros((16, policy.n_blocks), int))
    policy.reset()
    assert np.array_equal(policy(obs, noise=noise), dense)


def test_a_fixed_plan_and_back() -> None:
    policy = make_policy(lanes=2)
    obs = observations(policy, 0)
    policy.sparsity = 0.5
    plans = [planners.random(policy, 0.5, seed) for seed in (0, 1)]
    policy.plan = plans
    assert policy.sparsity == pytest.approx(np.mean([p.sparsity for p in plans]))
    assert "fixed plan" in repr(policy)
    policy.reset()
    policy(obs)
    dense = planners.dense(policy)
    assert policy.plan == [dense, dense]  # the first chunk
    policy(obs[:1], lanes=1)
    assert policy.plan == [dense, plans[1]]
    policy(obs)
    assert policy.plan == plans
    policy.plan = None
    assert policy.sparsity == 0.5 and policy.planner == "uniform"
    policy(obs)
    assert policy.plan == [planners.uniform_sparse(policy, 0.5)] * 2
    for give_back in ("sparsity", "planner"):
        policy.plan = Plan(np.zeros((8, policy.n_blocks), int))
        setattr(policy, give_back, {"sparsity": 0.25, "planner": "uniform"}[give_back])
        policy(obs)
        assert policy.plan[0].metadata["planner"] == "uniform"


def test_what_ran_first_is_what_first_says() -> None:
    policy = make_policy()
    steady = planners.random(policy, 0.7, 3)
    first = np.where(steady.sources == REUSE_ROLLOUT, COMPUTE, steady.sources)
    policy.plan = Plan(steady.sources, first)
    policy.reset()
    obs = observations(policy, 0)
    policy(obs)
    assert np.array_equal(policy.plan.sources, first)
    policy(obs)
    assert policy.plan == Plan(steady.sources, first)
    assert policy.stats["max_age"] == 1
    policy(obs)
    assert policy.stats["max_age"] == 2
    ages = policy._ages(0)
    assert (ages[steady.sources == COMPUTE] == 1).all()
    assert (ages[steady.sources == REUSE_ROLLOUT] == 3).all()


def test_the_planner_may_be_yours() -> None:
    policy = make_policy(lanes=2)
    asked: list[float] = []

    def planner(facts: planners.PolicyFacts, sparsity: float) -> list[Plan]:
        asked.append(sparsity)
        return [planners.random(facts, sparsity, seed) for seed in (1, 2)]

    policy.sparsity = 0.5
    policy.planner = planner
    assert policy.planner is planner and policy.sparsity == 0.5 and asked == [0.5]
    policy.reset()
    for _ in range(2):
        policy(observations(policy, 0))
    assert policy.plan == planner(policy, 0.5)
    policy.sparsity = 0.25
    assert asked == [0.5, 0.5, 0.25]
    policy.planner = "dense"
    assert (policy.sparsity, policy.max_sparsity) == (0.0, 0.0)
    with pytest.raises(ValueError, match="max_sparsity, 0 with the planner 'dense'"):
        policy.sparsity = 0.1
    policy.planner = "uniform"
    policy.sparsity = 0.5
    with pytest.raises(ValueError, match="expected one plan per lane, 2, got 1"):
        policy.planner = lambda facts, sparsity: [planners.dense(facts)]
    assert policy.planner == "uniform" and policy.sparsity == 0.5


def test_the_pruner_at_the_dial() -> None:
    policy = make_policy(pruner=True, steps=16)
    obs = observations(policy, 0)
    for sparsity in (0.5, 0.9, policy.max_sparsity):
        policy.sparsity = sparsity
        policy.reset()
        policy(obs)
        assert policy.plan.sparsity == 0  # nothing to reuse yet
        policy(obs)
        assert policy.plan.sparsity >= sparsity - 1e-9
        assert (policy.plan.sources[0] == COMPUTE).all()
        assert policy.stats["forced"] == 0
    policy.sparsity = None
    assert policy.sparsity is None and "its own sparsity" in repr(policy)
    policy.reset()
    policy(obs)
    policy(obs)
    scores = policy._pruner_scores(obs[0])
    assert scores.shape == (16, policy.n_blocks, 4)
    assert np.array_equal(policy.plan.sources[1:], scores.argmax(-1)[1:])
    policy.planner = "uniform"
    assert policy.sparsity == 0.0
    policy.planner = "pruner"
    policy.sparsity = 0
    policy(obs)
    assert policy.plan.sparsity == 0 and policy.timings["prune"] < 0.05


# ---- facts


def test_facts() -> None:
    policy = make_policy(lanes=2, threads=2, sampler="ddim")
    assert policy.blocks[:3] == [
        "layers.0.self_attn",
        "layers.0.cross_attn",
        "layers.0.feed_forward",
    ]
    assert policy.block_types == ["self_attn", "cross_attn", "feed_forward"] * 2
    assert (policy.horizon, policy.n_obs_steps, policy.n_action_steps) == (5, 3, 3)
    assert (policy.obs_dim, policy.action_dim, policy.num_inference_steps) == (6, 2, 8)
    assert (policy.lanes, policy.threads) == (2, 2)
    assert (policy.device, policy.precision) == ("cpu", "float32")
    assert policy.backend in tsad._core.backends()
    assert policy.timesteps.shape == (8,) and (np.diff(policy.timesteps) < 0).all()
    assert policy.config["scheduler"]["type"] == "ddim"
    assert policy.config["scheduler"]["num_inference_steps"] == 8
    policy.config["network"]["horizon"] = 3
    assert policy.config["network"]["horizon"] == 5
    for name in ("lanes", "blocks", "stats", "timings", "max_sparsity", "device"):
        with pytest.raises(AttributeError):
            setattr(policy, name, 1)
    assert repr(policy).startswith(
        "SparsePolicy(ddim 8 steps x 6 blocks, obs 3 x 6 -> actions 3 x 2 of 5, 2 lanes, cpu "
    )


def test_timings_add_up() -> None:
    policy = make_policy(steps=100)
    policy(observations(policy, 0))
    timings = policy.timings
    assert list(timings) == ["encode", "prune", "plan", "denoise", "total"]
    parts = sum(timings[stage] for stage in ("encode", "prune", "plan", "denoise"))
    assert 0 < parts <= timings["total"]
    timings["total"] = -1
    assert policy.timings["total"] > 0


def test_stats_count() -> None:
    policy = make_policy(lanes=2)
    assert policy.stats["cells"] == dict.fromkeys(policy.stats["cells"], 0)
    assert (policy.stats["chunks"], policy.stats["sparsity"]) == (0, 0.0)
    small = policy.stats["bytes"]
    plan = planners.random(policy, 0.5, 0)
    policy.plan = [plan, planners.dense(policy)]
    obs = observations(policy, 0)
    for _ in range(3):
        policy(obs)
    stats = policy.stats
    assert stats["chunks"] == 6 and [lane["chunks"] for lane in stats["lanes"]] == [3, 3]
    assert stats["lanes"][0]["cells"] == plan.counts
    assert stats["lanes"][0]["sparsity"] == pytest.approx(plan.sparsity)
    assert stats["lanes"][1]["sparsity"] == 0
    assert stats["sparsity"] == pytest.approx(plan.sparsity / 2)
    assert stats["cell_sparsity"] == pytest.approx(plan.cell_sparsity / 2)
    assert (stats["precision"], stats["error_bound"]) == ("float32", 1e-4)
    assert stats["bytes"] > small > 0 and stats["weight_bytes"] > 0  # rollouts need memory
    policy.reset(lanes=0)
    assert [lane["chunks"] for lane in policy.stats["lanes"]] == [0, 3]


def test_skipped_cells_add_nothing() -> None:
    """A plan that skips every branch after step 0 gives what the embeddings alone give."""
    policy = make_policy(sampler="ddim")
    sources = np.full((8, policy.n_blocks), SKIP, np.uint8)
    sources[0] = COMPUTE
    policy.plan = Plan(sources, sources)
    policy.reset()
    obs, noise = observations(policy, 0), noises(policy, 1)
    a = policy(obs, noise=noise)
    assert np.isfinite(a).all()
    policy.plan = planners.dense(policy)
    policy.reset()
    assert not np.array_equal(policy(obs, noise=noise), a)


# ---- the package


def test_import_needs_numpy_only() -> None:
    program = """
import sys
import tsad
optional = {"torch", "matplotlib", "rich", "gymnasium", "safetensors", "PIL", "pymunk", "diffusers"}
loaded = optional & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
assert callable(tsad.load) and tsad.__version__
import tsad.load
assert callable(tsad.load)
"""
    path = [p for p in sys.path if p]
    code = f"import sys; sys.path[:0] = {path!r}\n{program}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names() -> None:
    for name in tsad.__all__:
        assert getattr(tsad, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tsad.nothing


# ---- what is no policy, number or path


OF_POLICY = {  # the arguments after the policy
    "dense": (),
    "uniform": (1,),
    "uniform_sparse": (0.5,),
    "random": (0.5, 0),
    "c3ache": (0, 0),
    "delta_dit": (0, 1, 1),
    "deepcache": (1,),
    "deepcache_sparse": (0.5,),
    "teacache": (np.zeros(8), 0.1),
    "fbcache": (np.zeros((8, 8)), 0.1),
    "l2c": (np.zeros((4, 24)),),
    "from_pairs": ([],),
    "from_steps": ("1",),
    "import_plan": ("plan.npz",),
}


def test_every_planner_names_what_is_no_policy() -> None:
    taking = {
        name
        for name in planners.__all__
        if "policy" in getattr(inspect.unwrap(getattr(planners, name)), "__annotations__", {})
    }
    assert taking == set(OF_POLICY)
    for name, arguments in OF_POLICY.items():
        for wrong in ("pusht", None):
            with pytest.raises(TypeError, match=r"^policy: expected one of tsad\.load, got "):
                getattr(planners, name)(wrong, *arguments)


WRONG: list[tuple[str, str, tuple[Any, ...]]] = [
    ("n", "uniform", (2.5,)),
    ("n", "uniform", (True,)),
    ("sparsity", "uniform_sparse", (None,)),
    ("sparsity", "random", ("0.5", 0)),
    ("seed", "random", (0.5, None)),
    ("start", "c3ache", (None, 1)),
    ("end", "c3ache", (0, 1.5)),
    ("boundary", "delta_dit", ("1", 1, 1)),
    ("n_layers", "delta_dit", (0, None, 1)),
    ("interval", "delta_dit", (0, 1, None)),
    ("threshold", "teacache", (np.zeros(4), None)),
    ("threshold", "fbcache", (np.zeros((4, 4)), "much")),
    ("pairs", "from_pairs", (None,)),
    ("mask", "from_steps", (3,)),
    ("path", "import_plan", (3,)),
]


@pytest.mark.parametrize(("argument", "name", "arguments"), WRONG)
def test_a_planner_names_the_argument(argument: str, name: str, arguments: tuple[Any, ...]) -> None:
    policy = make_policy(steps=4)
    with pytest.raises(TypeError, match=rf"^{argument}: expected .*, got "):
        getattr(planners, name)(policy, *arguments)


def test_a_number_is_no_path() -> None:  # open(1) is the standard output
    policy = make_policy(steps=4)
    plan = planners.dense(policy)
    for wrong in (1, None, []):
        for what in (Plan.load, planners.from_file, planners.Effects.load, plan.save):
            with pytest.raises(TypeError, match="^path: expected a path, as str or Path, got "):
                what(wrong)  # type: ignore[operator]


def test_turns_name_the_argument() -> None:
    policy = make_policy(steps=4)
    plan = planners.dense(policy)
    for wrong, name in [(("pusht", plan, plan), "policy"), ((policy, "plan", plan), "plan"),
                        ((policy, plan, None), "other")]:  # fmt: skip
        with pytest.raises(TypeError, match=f"^{name}: expected .*, got "):
            planners.Turns(*wrong, every=2)  # type: ignore[arg-type]
    for wrong_number in (True, 2.5, "2"):
        with pytest.raises(TypeError, match="^every: expected an integer from 1, got "):
            planners.Turns(policy, plan, plan, every=wrong_number)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^share: expected a number, got "):
        planners.Turns(policy, plan, plan, share="half")  # type: ignore[arg-type]
