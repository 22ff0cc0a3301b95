"""bench/directions.py on the bundled policy with a short sampler."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from policies import make_policy

from tsad import COMPUTE, REUSE_TYPE, Plan, planners
from tsad.commands.common import files_sha256
from tsad.planners.base import budget
from tsad.sim.recording import open_collection, save_episode

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import directions  # noqa: E402

STEPS = 8  # of DDIM


def made_up(K: int, B: int, seed: int = 0) -> planners.Effects:
    """Tables of random effects, of blocks of three types in turn."""
    rng = np.random.default_rng(seed)

    def table(*shape: int) -> Any:
        return rng.random(shape, np.float32)

    kind = table(K, B, B)
    kind[:, np.arange(B)[:, None] % 3 != np.arange(B) % 3] = np.nan
    pair, rollout = table(B, K, K), table(3, K, B)
    vectors = [table(B), table(K, K), table(K), table(K)]
    return planners.Effects(
        pair, table(B, K, K + 1), kind, table(K, B), rollout, pair, *vectors, metadata={}
    )


def test_the_type_planner_finds_the_least_foreseen_loss() -> None:
    """Against every plan of one type that computes as many cells."""
    policy = make_policy(steps=3)
    K, B, types = 3, len(policy.blocks), policy.block_types
    effects = made_up(K, B)
    planner = directions.TypePlanner(effects, types, coherent=False)
    loss = planner._losses(types[0])
    members = [b for b in range(B) if types[b] == types[0]]
    cells = [(k, b) for k in range(K) for b in members]
    rest = np.full((K, B), COMPUTE, np.uint8)
    for mask in range(1 << (len(cells) - 1)):
        computed = [0, *(i for i in range(1, len(cells)) if mask >> (i - 1) & 1)]
        sources = rest.copy()
        for i, (k, b) in enumerate(cells):
            sources[k, b] = COMPUTE if i in computed else REUSE_TYPE
        segments = zip(computed, [*computed[1:], len(cells)], strict=True)
        total = sum(loss[i, j] for i, j in segments)
        plan = Plan(sources, sources, types=types)
        alone = effects.predict(plan) - sum(
            float(effects.segment[b, k, k + 1]) for k, b in np.argwhere(sources == COMPUTE)
        )
        assert total == pytest.approx(alone, rel=1e-5, abs=1e-6)
        for fee in (0.0, 0.1, 0.7):
            best = directions.least_segments(loss, fee)
            lost = sum(loss[i, j] for i, j in zip(best, [*best[1:], len(cells)], strict=True))
            assert lost + fee * len(best) <= total + fee * len(computed) + 1e-9
    for coherent in (False, True):
        plan = directions.TypePlanner(effects, types, coherent=coherent)(policy, 0.5)
        assert 0.5 <= plan.sparsity < 0.75 and set(np.unique(plan.sources)) == {COMPUTE, REUSE_TYPE}


def test_cycles_of_rollouts_keep_their_budget_and_their_age() -> None:
    policy = make_policy(steps=40)
    effects = made_up(40, len(policy.blocks))
    for sparsity, turns in ((0.9, 20), (0.75, 8)):
        plans = directions.rollout_cycle(policy, effects, sparsity, turns)
        computed = np.array([plan.sources == COMPUTE for plan in plans])
        times = computed.sum(axis=0)
        assert len(plans) == turns and set(np.unique(times)) == {1, turns}
        costs = computed.sum(axis=1) @ policy.block_costs
        assert costs.max() <= budget(policy, sparsity) and costs.min() > 0.8 * costs.max()
        assert directions.ages(plans, 3 * turns)["oldest"] == turns - 1
        loss = effects.rollout.mean(axis=0) / policy.block_costs
        assert loss[times == turns].mean() > loss[times == 1].mean()
    turn = directions.rollouts_in_turn(policy, 0.75)
    assert len(turn) == 4 and all(plan.sparsity == pytest.approx(0.75) for plan in turn)
    assert directions.ages(turn, 40)["oldest"] == 3
    unbounded = directions.rollout_cycle(policy, effects, 0.9, None)
    assert unbounded[0].sparsity >= 0.9
    assert directions.ages(unbounded, 10) == {"oldest": 9, "mean": pytest.approx(5)}
    with pytest.raises(ValueError, match="turns: expected more than 10"):
        directions.rollout_cycle(policy, effects, 0.9, 10)


def record(folder: Path, first: int, settings: dict[str, Any]) -> None:
    """Two made-up episodes of four chunks."""
    rng = np.random.default_rng(first)
    open_collection(folder, settings)
    for seed in (first, first + 1):
        obs = rng.uniform(50, 450, (4, 2, 20)).astype(np.float32)
        save_episode(folder, seed, obs, np.zeros((4, 8, 2), np.float32))


@pytest.mark.slow
def test_the_table(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(directions, "LEAST_EPISODES", 2)
    facts = {
        "files_sha256": files_sha256("pusht"),
        "sampler": "ddim",
        "num_inference_steps": STEPS,
    }
    seen, others, effects = (str(tmp_path / name) for name in ("seen", "others", "effects.npz"))
    record(Path(seen), 0, {"simulator": "pusht", **facts})
    record(Path(others), 5000, {"simulator": "pusht", **facts})
    tables = made_up(STEPS, 24)
    replace(tables, metadata={**facts, "seeds": [0, 1]}).save(effects)
    out, state = tmp_path / "directions.json", tmp_path / "state.json"
    argv = [effects, seen, others, "--out", str(out), "--state", str(state), "--sparsity", "0.5"]
    argv += ["--tries", "5", "--round", "3", "--windows", "2", "--length", "3", "--lanes", "1"]
    assert directions.main(argv) == 0
    document = json.loads(out.read_text())
    rows = document["directions"]["0.5"]
    assert list(rows) == [*directions.DIRECTIONS, "rollout, in turn"]
    assert document["report"] == {"seeds": [5000, 5001], "chunks": 6}
    assert document["search"]["windows"] == 2
    used = {name: {s for s, n in row["cells"].items() if n} for name, row in rows.items()}
    assert used["type"] == {"compute", "reuse_type"} and used["step"] == {"compute", "reuse_step"}
    assert used["rollout"] == used["rollout, unbounded"] == {"compute", "reuse_rollout"}
    assert [row["plans"] for row in rows.values()] == [1, 1, 4, 1, 2, 2]
    for name, row in rows.items():
        assert row["least_sparsity"] >= 0.5 - 1e-9
        assert row["error"]["interval"][0] <= row["error"]["rms"] <= row["error"]["interval"][1]
        if name in directions.DIRECTIONS:
            assert row["tried"] == 5 and row["searched_rms"] <= row["begun_rms"]
    assert rows["rollout"]["age"]["oldest"] == 3 and rows["step"]["age"]["oldest"] == 0
    assert rows["rollout, in turn"]["age"] == {"oldest": 1, "mean": 1.0}
    kept = state.read_bytes()
    assert directions.main([*argv, "--episodes", "1"]) == 0  # has nothing to search for any more
    assert state.read_bytes() == kept
    one = json.loads(out.read_text())
    assert one["report"]["chunks"] == 3
    assert all(row["error"]["interval"] is None for row in one["directions"]["0.5"].values())
    with pytest.raises(ValueError, match="--state: .* is of other settings"):
        directions.main([*argv, "--seed", "1"])
    argv[argv.index("--tries") + 1] = "6"
    assert directions.main(argv) == 0
    again = json.loads(out.read_text())["directions"]["0.5"]
    for name in directions.DIRECTIONS:
        assert again[name]["tried"] == 6
        assert again[name]["begun_rms"] == rows[name]["begun_rms"]
        assert again[name]["searched_rms"] <= rows[name]["searched_rms"]
    assert "rollout, unbounded" in capsys.readouterr().out
    with pytest.raises(ValueError, match="that are to test it"):
        directions.main([effects, seen, seen])
