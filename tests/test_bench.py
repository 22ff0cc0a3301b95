"""bench/: the plans that are timed, the arithmetic of the results, the peers' equality."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
sys.path.append(str(BENCH))

import instructions  # noqa: E402
import measure  # noqa: E402
import metaworld_task  # noqa: E402
import parity  # noqa: E402
import plans  # noqa: E402
import report  # noqa: E402
import roofline  # noqa: E402
import tasks  # noqa: E402
from cases import NETWORKS  # noqa: E402
from worker import EPISODE, Server, WorkerError  # noqa: E402

import bench  # noqa: E402
import tsad  # noqa: E402
from tsad.config import block_costs, block_types  # noqa: E402

# ---- plans


def counts(sources: np.ndarray, types: list[str], source: int) -> dict[str, int]:
    """Cells of a source by type of block."""
    per_block = (sources == source).sum(0)
    return {
        kind: int(sum(n for n, other in zip(per_block, types, strict=True) if other == kind))
        for kind in types
    }


def test_the_plan_file_is_what_the_function_makes() -> None:
    assert tsad.Plan.load(plans.SPARSE95) == plans.sparse95()
    assert plans.sparse95(1) != plans.sparse95()


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_the_95_percent_plan_has_the_promised_shares(seed: int) -> None:
    plan = plans.sparse95(seed)  # Plan's constructor says whether it is valid
    sources, types = plan.sources, list(plan.types or ())
    assert plan.cost == pytest.approx(0.05, abs=1e-12)
    assert plan.first is None  # dense, so that every rollout slot is filled
    assert (sources[0] == tsad.COMPUTE).all()
    computed = counts(sources, types, tsad.COMPUTE)
    assert computed == {"self_attn": 40, "cross_attn": 40, "feed_forward": 40}
    reused = [plan.counts[name] for name in ("reuse_type", "reuse_step", "reuse_rollout")]
    assert reused == [760, 760, 760]
    for source in (tsad.REUSE_TYPE, tsad.REUSE_STEP, tsad.REUSE_ROLLOUT):
        assert set(counts(sources, types, source).values()) <= {253, 254}
    # spread over the steps, not all at the start
    later = np.flatnonzero((sources[1:] == tsad.COMPUTE).any(1))
    assert len(later) > 30 and later.max() > 80


@pytest.mark.parametrize(("steps", "layers", "cost"), [(16, 8, 0.2), (7, 3, 0.5), (50, 1, 0.05)])
def test_shares_of_other_shapes(steps: int, layers: int, cost: float) -> None:
    types = block_types({**NETWORKS["tiny"], "n_layer": layers})
    sources = plans.equal_shares(steps, types, cost, 3)
    tsad.Plan(sources, types=types)
    computed = set(counts(sources, types, tsad.COMPUTE).values())
    assert computed == {round(cost * steps * layers)}
    reused = np.bincount(sources.ravel(), minlength=5)[1:4]
    assert reused.max() - reused.min() <= 1
    assert not (sources == tsad.SKIP).any()


def test_a_budget_below_step_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cost: expected at least 0.0625"):
        plans.equal_shares(16, list(block_types(NETWORKS["tiny"])), 0.05, 0)


def test_the_worker_gives_every_lane_its_own_plan() -> None:
    server = Server("tsad", 1)
    server.build(shape="tiny", lanes=3)
    facts = server.plan("sparse95")
    assert len({sources.tobytes() for sources in facts["sources"]}) == 3
    assert facts["sparsity"] == pytest.approx(0.95)
    assert server.plan("uniform-90")["sparsity"] == pytest.approx(0.9)
    with pytest.raises(ValueError, match="plan: expected dense"):
        server.plan("other")


# ---- statistics


def test_percentiles_need_enough_values() -> None:
    values = [float(i) for i in range(100)]
    assert measure.percentile(values, 99) == pytest.approx(98.01)
    assert measure.percentile(values[:99], 99) is None
    assert measure.percentile(values[:10], 90) == pytest.approx(8.1)
    assert measure.percentile(values[:9], 90) is None


def test_summary_of_rounds() -> None:
    got = measure.summary([[5.0, 7.0, 9.0], [2.0, 3.0, 40.0], [4.0, 4.0]])
    assert (got["best_p50"], got["p50"], got["spread"]) == (3.0, 4.0, [3.0, 7.0])
    assert (got["min"], got["max"], got["rounds"], got["chunks"]) == (2.0, 40.0, 3, 8)
    assert got["mean"] == pytest.approx(74 / 8)
    assert got["p90"] is None and got["p99"] is None


def test_settled_compares_the_two_fastest_rounds() -> None:
    assert measure.settled([[10.0], [30.0], [10.3]], 0.04)
    assert not measure.settled([[10.0], [30.0], [10.5]], 0.04)
    assert not measure.settled([[10.0]], 0.04)


def test_a_busy_core_is_busy_and_then_free() -> None:
    with measure.busy_core():
        load = measure.Load()
        time.sleep(0.3)
        taken = load.stop().foreign
    assert taken is None or taken > 0.3


def test_slug_names_the_processor() -> None:
    facts = {"cpu": "Intel(R) Xeon(R) CPU @ 2.30GHz", "family": "6", "model": "207"}
    assert measure.slug(facts) == "intel-xeon-6-207"


def test_load_sees_others_not_us(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = iter([(10.0, 1.0, 2.0, 100.0), (13.0, 1.5, 3.0, 104.0)])  # busy, steal, own, wall
    monkeypatch.setattr(measure.Load, "_read", staticmethod(lambda: next(reads)))
    load = measure.Load().stop()
    assert (load.foreign, load.steal) == (0.5, 0.125)


# ---- the floor


def test_work_counts_macs_of_all_lanes_and_bytes_once() -> None:
    net = NETWORKS["tiny"]
    dense = np.zeros((4, 6), np.uint8)
    half = dense.copy()
    half[1:, 3:] = tsad.SKIP
    ends = 2 * 16 * 2  # action_dim x n_emb, in and out
    macs, n_bytes = roofline.work(net, [dense])
    assert macs == 4 * (sum(block_costs(net)) + ends * net["horizon"])
    assert n_bytes == 4 * (sum(roofline.block_bytes(net)) + 4 * ends)
    more, same = roofline.work(net, [dense, half])
    assert same == n_bytes  # what `half` computes, `dense` does too
    lower = sum(block_costs(net)[:3])
    assert more == macs + 4 * lower + sum(block_costs(net)[3:]) + 4 * ends * net["horizon"]
    # in 16 bits: those weights' bytes halve; all but the ends, attention and folds are integers
    assert roofline.work(net, [dense], "int16")[1] == n_bytes - 4 * 2 * 2 * 12 * 16 * 16
    attention, folds = 2 * 5 * 5 * 16, 2 * 5 * 4 * 2 * 16
    other = 4 * (2 * (attention + folds) + ends * net["horizon"])
    assert roofline.work16(net, [dense]) == macs - other
    # 12 d^2 weights a layer in float32, and the folded keys and values of 4 memory tokens
    assert sum(roofline.block_bytes(net)) == 2 * 4 * (12 * 16 * 16 + 2 * 4 * 2 * 16)


def test_floor_is_the_larger_of_arithmetic_and_bytes() -> None:
    peak = {"gflops": 100.0, "read_gbs": 50.0}
    assert roofline.floor(5e9, 1e9, peak) == {"compute_ms": 100.0, "memory_ms": 20.0, "ms": 100.0}
    assert roofline.floor(5e8, 1e9, peak)["ms"] == 20.0
    # 16-bit products at their own rate: 2e9 of the multiply-adds at 400, the rest at 100
    mixed = roofline.floor(5e9, 0, peak | {"int16_gops": 400.0}, macs16=2e9)
    assert mixed["compute_ms"] == pytest.approx(60 + 10)
    runs = [{"gflops": 3.0, "read_gbs": 9.0, "bytes": 1}, {"gflops": 4.0, "read_gbs": 8.0}]
    best = roofline.Roofline.best(runs)
    assert (best["gflops"], best["read_gbs"]) == (4.0, 9.0)
    assert best["gflops_spread"] == [3.0, 4.0]


# ---- instruction counts


def test_a_case_may_exceed_its_count_by_the_margin_only() -> None:
    expected = {"margin": 0.03, "instructions": {"a": 1000, "b": 1000}}
    assert instructions.compare({"a": 1029, "b": 500}, expected)[1]
    lines, good = instructions.compare({"a": 1031, "b": 1000}, expected)
    assert not good and "a: 1,031, +3.10% of 1,000: more" in lines[0]
    lines, good = instructions.compare({"c": 5}, expected)
    assert not good and "--update" in lines[0]


def test_the_committed_counts_have_every_case_and_its_plans_are_valid() -> None:
    expected = json.loads(instructions.EXPECTED.read_text())
    assert list(expected["instructions"]) == list(instructions.plans())
    for lanes in instructions.plans().values():
        for sources in lanes:
            tsad.Plan(sources, types=instructions.TYPES)
    shares = [(p == tsad.COMPUTE).mean() for p in instructions.plans()["lanes8"]]
    assert shares == pytest.approx([0.05] * 8, abs=0.01)


# ---- parity's observations


def test_observations_are_spread_over_the_episodes() -> None:
    ends = np.array([7, 30, 31, 100])
    steps = parity.spread(ends, 10, 0)
    assert len(steps) == 10
    per_episode = np.bincount(np.searchsorted(ends, steps, side="right"), minlength=4)
    assert sorted(per_episode) == [2, 2, 3, 3]
    np.testing.assert_array_equal(steps, parity.spread(ends, 10, 0))
    assert len(parity.spread(ends, 2, 0)) == 2


def test_windows_repeat_an_episodes_first_observation() -> None:
    obs = np.arange(10, dtype=np.float32)[:, None] * 10
    got = parity.windows(obs, np.array([4, 10]), np.array([0, 3, 4, 5]), 3)[..., 0] / 10
    np.testing.assert_array_equal(got, [[0, 0, 0], [1, 2, 3], [4, 4, 4], [4, 4, 5]])


def test_differences() -> None:
    a = np.zeros((4, 5, 2))
    b = a.copy()
    b[2, 1, 0] = 0.5
    got = parity.differences(a, b)
    assert (got["largest"], got["chunks"]) == (0.5, 4)
    assert got["mean"] == pytest.approx(0.5 / 40)


# ---- peers


def dense_actions(policy: Any, task: tasks.Task, chunks: int = 2) -> np.ndarray:
    """Some chunks with the policy's own noise."""
    policy.reset(seed=[5, 6][: task.lanes])
    obs = tasks.observations(task, chunks)
    made = [np.array(policy(rows, return_horizon=True)) for rows in obs]
    return np.stack([tasks.normalise(actions, task) for actions in made])


@pytest.mark.parametrize("peer", ["eager", "eager-hoisted"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_peers_equal_the_engine(peer: str, sampler: str) -> None:
    peers = pytest.importorskip("peers", reason="needs torch")
    task = tasks.make_task("tiny", sampler=sampler, steps=10, lanes=2, threads=1)
    ours = dense_actions(tasks.engine(task), task)
    theirs = dense_actions(peers.build(peer, task), task)
    assert theirs.shape == (2, 2, 5, 2)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    assert np.abs(ours[0] - ours[1]).max() > 0.1  # it depends on observation and noise


def test_a_peer_runs_a_subset_of_its_lanes() -> None:
    peers = pytest.importorskip("peers", reason="needs torch")
    task = tasks.make_task("tiny", steps=10, lanes=3, threads=1)
    policy, alone = (peers.build("eager", task) for _ in range(2))
    obs = tasks.observations(task, 1)[0]
    policy.reset(seed=[7, 8, 9])
    alone.reset(lanes=[2], seed=[9])
    np.testing.assert_allclose(policy(obs)[2:], alone(obs[2:], lanes=[2]), rtol=1e-4, atol=1e-5)


def test_an_encoder_with_attention_cannot_be_hoisted() -> None:
    peers = pytest.importorskip("peers", reason="needs torch")
    task = tasks.make_task("tiny", steps=10, threads=1)
    with pytest.raises(ValueError, match="peer: expected one of eager"):
        peers.build("nobody", task)
    net = copy.copy(task.config.network)
    object.__setattr__(net, "n_cond_layers", 2)
    config = copy.copy(task.config)
    object.__setattr__(config, "network", net)
    with pytest.raises(ValueError, match="n_cond_layers"):
        peers.time_table(peers.module(task), tasks.Task("tiny", config, task.tensors, task.sampler))


def test_the_harness_knows_all_peers() -> None:
    peers = pytest.importorskip("peers", reason="needs torch")
    assert tuple(peers.PEERS) == bench.PEERS
    assert set(bench.QUICK_PEERS) <= set(bench.PEERS)
    assert set(bench.QUICK_CASES) <= set(bench.CASES)


def test_scenes_do_not_drive_the_bundled_policy_to_its_limits() -> None:
    """Clipped actions agree whatever the rounding: a check on them would check nothing."""
    task = tasks.make_task("pusht", sampler="ddim", steps=5, threads=1)
    made = dense_actions(tasks.engine(task), task, chunks=4)
    assert np.abs(made).max() <= 1 + 1e-6
    assert (np.abs(made) < 0.99).mean() > 0.8


# ---- rounds


class SlowPolicy:
    """Takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, obs: Any) -> None:
        self.calls += 1
        time.sleep(self.seconds)

    def reset(self, seed: int) -> None:
        pass


def server(seconds: float) -> Server:
    made = Server("eager", 1)
    made._policy = SlowPolicy(seconds)
    made._obs = np.zeros((EPISODE, 1))
    return made


def test_a_round_is_at_most_an_episode_and_at_least_what_was_asked() -> None:
    fast = server(0.0).round("dense", seconds=60, least=2)
    assert len(fast["times_ms"]) + len(fast["warm_ms"]) == EPISODE
    slow = server(0.02).round("dense", seconds=0.001, least=3)
    assert len(slow["times_ms"]) == 3 and min(slow["times_ms"]) >= 20


def test_pace_counts_late_ticks() -> None:
    slow = server(0.03).paced("dense", hertz=50, seconds=0.3)
    assert slow["late"] >= (len(slow["times_ms"]) - 1) / len(slow["times_ms"]) - 1e-9
    fast = server(0.001).paced("dense", hertz=10, seconds=0.3)
    assert len(fast["times_ms"]) <= 5 and fast["idle_cores"] < 0.5


# ---- documents


class FakeWorker:
    """Stands for a worker process."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.closed = answer, False

    def call(self, method: str, **_: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return {"build_s": 0.1, "note": ""} if method == "build" else self.answer

    def close(self) -> None:
        self.closed = True


def arguments(**other: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"precisions": ["float32"], "peers": ["eager"], "rounds": 1,
                                 "seconds": 0.01} | other)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (WorkerError("NotInstalledError", "onnxruntime is not installed"), "not installed", "onnx"),
        (WorkerError("RuntimeError", "no compiler"), "failed", "RuntimeError: no compiler"),
        (np.full((1, 5, 2), 0.5), "wrong", "differ from ours by 0.5"),
        (np.full((1, 5, 2), np.nan), "wrong", "nan"),
    ],
)
def test_a_peer_that_cannot_be_timed_is_reported(answer: Any, status: str, reason: str) -> None:
    run = bench.Run(arguments())
    run._workers["eager", 2] = FakeWorker(answer)  # type: ignore[assignment]
    entry = run._build(bench.Case(shape="tiny"), "eager", np.zeros((1, 5, 2)))
    assert entry["status"] == status and reason in entry["reason"]
    row = report._row({"contenders": [], "lanes": 1}, entry)
    assert len(row) == len(report.HEAD) - 1 and status in row[1]


def test_a_run_writes_a_complete_document(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    tiny = bench.Case(shape="tiny", threads=1, plans=("dense", "uniform-90", "sparse95"))
    monkeypatch.setattr(bench, "CASES", {"tiny": tiny})
    monkeypatch.setattr(bench, "ROOFLINE_SECONDS", 0.03)
    monkeypatch.setattr(bench, "SETTLE", 0.0)
    out = tmp_path / "o.json"
    command = ["--cases", "tiny", "--peers", "eager", "--rounds", "1", "--seconds", "0.02"]
    assert bench.main([*command, "--out", str(out), "--plot"]) == 0
    document = report.read(out)
    (case,) = document["cases"]
    assert [c["name"] for c in case["contenders"]] == [
        "tsad dense", "tsad uniform-90", "tsad sparse95", "eager",
    ]  # fmt: skip
    for contender in case["contenders"]:
        assert contender["status"] == "ok" and contender["difference"] < 1e-5
        assert 0 < contender["floor_share"] < 1.5
    dense, _, sparse, eager = case["contenders"]
    assert sparse["passes"] == pytest.approx(5) and sparse["macs"] < 0.06 * dense["macs"]
    assert dense["floor"] == eager["floor"]
    assert (tmp_path / "o-tiny.png").stat().st_size > 10_000
    assert "outside the denoising" in report.stage_lines(document["cases"])[2]
    lines = report.table(document["cases"]).splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1
    for path in (["machine"], ["cases", 0, "roofline"], ["cases", 0, "contenders", 1, "times"]):
        broken = json.loads(out.read_text())
        inner = broken
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        with pytest.raises(report.DocumentError, match=str(path[-1])):
            report.check(broken)


def test_cases_are_added_to_a_file_and_replaced_in_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench, "ROOFLINE_SECONDS", 0.03)
    monkeypatch.setattr(bench, "SETTLE", 0.0)
    tiny = {"shape": "tiny", "threads": 1}
    made = {
        "lanes": bench.Case(**tiny, lanes=2, plans=bench.LANES),
        "paced": bench.Case(**tiny, pace_hz=100),
        "contended": bench.Case(**tiny, contended=True),
    }
    monkeypatch.setattr(bench, "CASES", made)
    monkeypatch.setattr(bench.Run, "_wants_round", lambda *arguments: arguments[-1] < 1)
    out = tmp_path / "o.json"
    command = ["--rounds", "1", "--seconds", "0.04", "--out", str(out), "--cases"]
    assert bench.main([*command, "lanes,contended", "--plot"]) == 0
    assert not list(tmp_path.glob("*.png"))  # there is no curve among these
    assert bench.main([*command, "paced,lanes"]) == 0
    cases = {case["name"]: case for case in report.read(out)["cases"]}
    assert list(cases) == ["contended", "paced", "lanes"]
    together, apart = cases["lanes"]["contenders"]
    assert apart["name"] == f"{together['name']}/one-by-one"
    assert apart["macs"] == together["macs"] and "stages_ms" not in apart
    assert 0 < together["arithmetic_share"] <= together["floor_share"] < 1.5
    for contender in cases["contended"]["contenders"]:
        assert contender["contended"]["ratio"] > 0 and contender["contended"]["chunks"] > 1
    text = "\n".join(report.lines(list(cases.values())))
    for words in ("MB a lane", "one core taken: median", "of the ticks late"):
        assert words in text
    assert bench.main([*command, "paced", "--fresh"]) == 0
    assert [case["name"] for case in report.read(out)["cases"]] == ["paced"]


def test_arguments_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--peers", "nobody"], ["--cases", "x"], ["--paced", "0"], ["--rounds", "0"]):
        with pytest.raises(SystemExit):
            bench.parse(wrong)
        assert wrong[0] in capsys.readouterr().err
    assert bench.parse(["--peers", "all"]).peers == list(bench.PEERS)
    assert bench.parse([]).peers is None and "float32" in bench.parse([]).precisions
    quick = bench.parse(["--quick"])
    assert quick.cases == list(bench.QUICK_CASES) and quick.peers == list(bench.QUICK_PEERS)
    paced = bench.wanted_cases(bench.parse(["--cases", "ddpm100", "--paced", "10", "50"]))
    assert [case.pace_hz for case in paced.values()] == [None, 10, 50]


# ---- another task


def test_without_metaworld_its_task_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(tsad.sim.SimulatorError, match="metaworld is not .*pip install metaworld=="):
        metaworld_task.PushWall()


def test_its_expert_goes_either_way_and_the_mean_of_both_into_the_wall() -> None:
    hand, puck, goal = (0.0, 0.6, 0.045), (0.005, 0.6, 0.015), (0.03, 0.87)
    held = np.array([*hand, 0.5, *puck, *goal])
    left, right = (metaworld_task.expert(held, side) for side in (-1, 1))
    assert left[0] == -1 and right[0] == 1
    np.testing.assert_allclose((left + right) / 2, [0, 0.5, 0, 0.6], atol=1e-12)
    beyond = np.array([*hand, 0.5, *puck, *goal])
    beyond[[1, 5]] = 0.83  # past the wall nobody asks for the side
    np.testing.assert_array_equal(*(metaworld_task.expert(beyond, side) for side in (-1, 1)))
