"""Rules of settings: words, files, the command line, and what results say of their cost."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from policies import make_policy, noises, observations, save_policy

import tsad
from tsad import planners, sim
from tsad.planners import RowRule, Turns
from tsad.rule import Alternate, rule_dict, rule_of, rule_words
from tsad.setting import Setting
from tsad.sim.results import summarise
from tsad.sim.rollout import Episode


@pytest.mark.parametrize(
    ("words", "text", "rule"),
    [
        ({"fbcache": 0.2, "most": 20}, "fbcache=0.2,most=20", RowRule("fbcache", 0.2, 20)),
        ({"teacache": 1}, "teacache=1", RowRule("teacache", 1.0)),
        ({"every": 3, "plan": "10", "other": "a.npz"}, "every=3,plan=10,other=a.npz",
         Alternate("10", "a.npz", every=3)),
        ({"share": 0.3, "plan": "10", "other": "11"}, " share=0.3, plan=10, other=11",
         Alternate("10", "11", share=0.3)),
    ],
)  # fmt: skip
def test_words_and_text_are_the_same_rule(words: Any, text: str, rule: Any) -> None:
    assert rule_of(words) == rule_of(text) == rule == rule_of(rule)
    assert rule_of(rule_dict(rule)) == rule and json.loads(json.dumps(rule_dict(rule))) == words
    assert pickle.loads(pickle.dumps(rule)) == rule and rule_words(rule)


def test_a_polynomial_goes_along() -> None:
    rule = RowRule("teacache", 0.5, None, (0.1, 2.0))
    assert rule_of(rule_dict(rule)) == rule
    assert rule_dict(rule) == {"teacache": 0.5, "polynomial": [0.1, 2.0]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "rule: expected an object or text, got 3"),
        ({}, "rule: expected one of fbcache, teacache, every, share, got none"),
        ("fbcache=1,teacache=1", "got 'fbcache' and 'teacache'"),
        ({"kind": "fbcache"}, "expected one of fbcache"),
        ("fbcache=0.2,mst=3", "rule: unknown word 'mst' beside 'fbcache'"),
        ("fbcache", "rule: expected words NAME=VALUE"),
        ("fbcache=1,fbcache=2", "each once"),
        ("fbcache=much", "rule: threshold: expected a number"),
        ("fbcache=-1", "rule: threshold: expected a number from 0"),
        ("fbcache=0.1,most=0", "rule: most: expected an integer from 1"),
        ("fbcache=0.1,most=2.5", "rule: most: expected an integer"),
        ({"teacache": 1, "polynomial": 3}, "rule: polynomial: expected a list"),
        ("every=3,plan=10", "rule: other: expected a plan file or a step mask"),
        ("every=0,plan=10,other=11", "rule: every: expected an integer from 1"),
        ("share=2,plan=10,other=11", "rule: share: expected a number from 0 to 1"),
        ("share=0.2,plan=10,other=11,most=2", "unknown word 'most' beside 'share'"),
    ],
)
def test_what_is_no_rule_is_refused(given: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        rule_of(given)


def test_a_setting_with_a_rule_is_the_policy_made_by_hand() -> None:
    for words in ("fbcache=0.05,most=5", "every=2,plan=10001000,other=10101010"):
        setting = Setting.of({"rule": words})
        policy, by_hand = make_policy(), make_policy()
        setting.apply(policy)
        whole = setting.wrapped(policy)
        twin = make_policy()
        alone = pickle.loads(pickle.dumps(setting.alone(twin)))
        alone.apply(twin)
        twin = alone.wrapped(twin)
        hand: Any = by_hand
        if setting.rule == RowRule("fbcache", 0.05, 5):
            by_hand.planner = setting.rule
        else:
            masks = [planners.from_steps(by_hand, m) for m in ("10001000", "10101010")]
            hand = Turns(by_hand, *masks, every=2)
        for each in (whole, hand, twin):
            each.reset(seed=0)
        for chunk in range(4):
            obs, noise = observations(policy, chunk), noises(policy, chunk)
            wanted = hand(obs, noise=noise)
            np.testing.assert_array_equal(whole(obs, noise=noise), wanted)
            np.testing.assert_array_equal(twin(obs, noise=noise), wanted)
        assert setting.key(whole) == alone.key(twin)
        assert setting.to_dict()["rule"] == rule_dict(rule_of(words))  # type: ignore[arg-type]


def test_turns_pass_on_what_is_set() -> None:
    """They used to keep it for themselves, so that it did nothing."""
    turns = Setting.of({"rule": "every=2,plan=10001000,other=10101010"}).wrapped(make_policy())
    turns.sparsity = 0.5
    assert turns.policy.sparsity == 0.5 and isinstance(turns, Turns)  # type: ignore[unreachable]
    with pytest.raises(AttributeError):
        turns.speed = 3


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"plan": "10"}, "leaves nothing to others"),
        ({"planner": "uniform"}, "leaves nothing to others"),
        ({"sparsity": 0.5}, "leaves nothing to others"),
        ({"guard": "g.npz"}, "no plan that a guard could set aside"),
        ({"fitted": "f.json"}, "no one plan that a sampler"),
    ],
)
def test_what_does_not_go_with_a_rule(beside: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"rule: has {message}|rule: {message}"):
        Setting.of({"rule": "fbcache=1", **beside})


def test_what_chunks_cost_on_average_and_at_most() -> None:
    def episode(chunks: int, **cost: float) -> Episode:
        return Episode(0, 0.0, False, 1, chunks, 0.0, 0.0, None, **cost)

    rows = [episode(5, passes=2.0, most_passes=3.0), episode(2, passes=4.0, most_passes=4.0)]
    found = summarise(rows)
    assert found["passes"] == pytest.approx((4 * 2 + 1 * 4) / 5) and found["most_passes"] == 4
    assert "passes" not in summarise([*rows, episode(3)])


@pytest.fixture
def table(monkeypatch: Any) -> str:
    monkeypatch.setattr(sim.simulators, "_REGISTRY", dict(sim.simulators._REGISTRY))
    sim.register("table", "fakes:Table")
    return "table"


def test_eval_plays_rules_and_says_what_they_cost(capsys: Any, tmp_path: Path, table: str) -> None:
    folder = save_policy(tmp_path / "p")
    words = ["eval", table, "--policy", folder, "--sampler", "ddim", "--steps", "8", "--seeds", "4"]
    found = {}
    for rule in ("fbcache=0.0", "teacache=99,most=3", "every=2,plan=10000000,other=10001000"):
        results = []
        for more in (["--lanes", "3"], ["--jobs", "2"]):
            code, out, err = run(capsys, *words, "--rule", rule, *more, "--json")
            assert code == 0, err
            results.append(json.loads(out))
        one, other = ([{k: v for k, v in e.items() if "ms" not in k} for e in r["episodes"]]
                      for r in results)  # fmt: skip
        assert one == other
        found[rule] = results[0]["summary"]
    costs = [(round(s["passes"], 4), s["most_passes"]) for s in found.values()]
    assert costs[0] == (8, 8) and costs[1] == (2, 2)  # the first step and the last
    assert 1 < costs[2][0] < 2 and costs[2][1] == 2
    code, out, err = run(capsys, *words, "--rule", "teacache=99")
    assert code == 0 and "passes   2.00 a chunk on average, 2.00 at most" in out, err
    code, out, err = run(capsys, *words, "--json")
    assert code == 0 and "passes" not in json.loads(out)["summary"], err


def test_rules_in_a_settings_file(capsys: Any, tmp_path: Path, table: str) -> None:
    folder = save_policy(tmp_path / "p")
    policy = tsad.load(folder, sampler="ddim", num_inference_steps=8)
    for name, n in (("cheap.npz", 1), ("dear.npz", 4)):
        planners.uniform(policy, n).save(tmp_path / name)
    ddim = {"sampler": "ddim", "steps": 8}
    rows: list[Any] = [
        {"name": "dense", **ddim},
        {"name": "tea", **ddim, "rule": {"teacache": 99.0}},
        {"name": "turns", **ddim, "rule": {"share": 1.0, "plan": "cheap.npz", "other": "dear.npz"}},
    ]
    file, out = tmp_path / "s.json", tmp_path / "out"
    words = ["eval", table, "--policy", folder, "--seeds", "2", "--settings", str(file), "--out"]
    file.write_text(json.dumps(rows))
    code, text, err = run(capsys, *words, str(out), "--json")
    assert code == 0, err
    found = json.loads(text)["rows"]
    assert [(r["passes"], r.get("most_passes")) for r in found.values()] == [
        (8, None), (2, 2), (4, 4)]  # fmt: skip
    assert found["turns"]["settings"]["planner"] == "turns, share 1"
    code, text, err = run(capsys, *words, str(out))
    assert code == 0 and "most" in text and "episodes" not in err, err
    for wrong, message in (
        ({"rule": {"teacache": -1}}, "setting 0: rule: threshold: expected"),
        ({"rule": [1]}, "rule: expected dict, got"),
        ({"rule": "fbcache=1", "planner": "uniform"}, "a rule leaves nothing to others"),
        ({"rule": "fbcache=1", "warm_start": 2, **ddim}, "expects a warm start of None"),
        ({"rule": "every=2,plan=x.npz,other=10", **ddim}, "x.npz"),
    ):
        file.write_text(json.dumps([{"name": "a", **wrong}]))
        code, _, err = run(capsys, *words, str(tmp_path / "none"))
        assert code == 2 and message in err, err
    code, _, err = run(capsys, *words, str(out), "--rule", "fbcache=1")
    assert code == 2 and "argument --rule: not together with --settings" in err
    alone = ["eval", table, "--policy", folder, "--rule", "fbcache=1"]
    for more, message in (
        (["--sparsity", "0.5"], "leave out --sparsity, or the rule"),
        (["--preset", "x"], "preset"),
        (["--warm-start", "2"], "argument --rule: RowRule"),
    ):
        code, _, err = run(capsys, *alone, *more)
        assert code == 2 and message in err, err
