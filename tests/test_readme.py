"""README.md and docs/: their Python runs, their commands parse, their figures are the committed
ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import (
    RESULTS,
    ROOT,
    bench_case,
    code,
    each_page,
    numbers,
    read,
    results,
    rows,
    said,
    same,
)

import tsad
from tsad.scope import table as scope_table

sys.path.append(str(ROOT / "bench"))


@each_page
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tests" / "fixtures" / "lerobot" / "ddpm_three_levels", "FOLDER")
    if page.name == "own_robot.md":
        return  # its blocks need what its commands made: tests/test_own_robot.py
    for block in code(page, "python"):
        needs = ("gym_pusht", "lerobot.policies", 'device="cuda"')
        if not any(name in block for name in needs):
            exec(compile(block, page.name, "exec"), {})


def test_the_first_block_has_fifteen_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = code(ROOT / "README.md", "python")[0]
    assert len([line for line in block.splitlines() if line.strip() and line[0] != "#"]) <= 15
    assert 'preset="lossless"' in block.splitlines()[3]  # what we recommend comes first
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    assert abs(tsad.Plan.load(tmp_path / "plan.npz").sparsity - 0.8) < 0.01


def test_the_closed_loop_sees_what_the_evaluation_sees(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gym_pusht")
    from tsad.sim import make

    (block,) = (text for text in code(ROOT / "README.md", "python") if "gym_pusht" in text)
    ran: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), ran)
    policy, world = tsad.load("pusht", preset="lossless"), make("pusht")
    seen = [world.reset(100_000)] * policy.n_obs_steps
    policy.reset(seed=0)
    done = False
    while not done and len(seen) < 302:
        for action in policy(np.stack(seen[-policy.n_obs_steps :])):
            if not done and len(seen) < 302:
                step = world.step(action)
                seen.append(step.obs)
                done = step.done
    assert len(ran["seen"]) == len(seen) > 50 and ran["success"] == done
    np.testing.assert_array_equal(ran["seen"], seen)
    assert (
        f"{len(seen) - 2} steps, {ran['info']['coverage']:.0%} covered" in capsys.readouterr().out
    )


@each_page
def test_commands_parse(page: Path) -> None:
    from tsad.cli import build_parser

    text = "\n".join(code(page)).replace("\\\n", " ")
    commands = [line for line in text.splitlines() if line.startswith("tsad ")]
    commands += re.findall(r"`(tsad [a-z-]+ [^`]* [^`]*)`", page.read_text())
    assert commands or page.name == "architecture.md"
    for command in commands:
        try:
            build_parser().parse_args(shlex.split(command, comments=True)[1:])
        except SystemExit as stop:
            pytest.fail(f"{command}: {stop.code}")


@each_page
def test_files_and_links_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"`((?:tsad|csrc|cuda|plugins|bench|docs|notebooks|tests)/[\w./-]*)`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert named
    for path in [*(ROOT / name for name in named), *(page.parent / name for name in linked)]:
        assert path.exists(), path
    for ending in re.findall(r"`(-[\w-]+\.json)`", text):  # "beside" the file named before
        assert list(RESULTS.glob(f"*{ending}")), ending


# ---- README


def test_the_scope_is_on_the_first_screen() -> None:
    text = read("README.md")
    assert scope_table() in text
    assert text[: text.index(scope_table())].count("\n") < 14 and text.count("\n") <= 130


def test_what_it_gains_and_loses() -> None:
    bench, played = (
        json.loads((RESULTS / name).read_text())
        for name in ("2026-11-25-amd-epyc-25-17.json", "2026-11-25-amd-epyc-25-17-frontier.json")
    )
    (case,) = (case for case in bench["cases"] if case["name"] == "ddpm100")
    times = {c["name"]: c["times"]["best_p50"] for c in case["contenders"]}
    dense = played["rows"]["ddpm-100"]
    found = rows(read("README.md"), "gain of")
    same(found[0][2], times["eager"])
    same(found[1][2], times["tsad dense"])
    (path,) = RESULTS.glob("*closed-loop.json")
    engine = json.loads(path.read_text())["paired"]["score"]
    low, high = engine["interval95"]
    for written, value in zip(
        numbers(found[1][3]), (-engine["mean_difference"], -high, -low), strict=True
    ):
        same(written, value)
    presets = tsad.presets.read_presets(ROOT / "tsad" / "assets" / "pusht")
    names = ["ddim-8", "ddpm-100-search-95"]
    names += [presets[name].measured["setting"] for name in ("fast", "lossless")]
    assert ['`preset="fast"`', '`preset="lossless"`'] == [row[1] for row in found[4:]]
    (path,) = RESULTS.glob("*-headline.json")
    compared = json.loads(path.read_text())["compared"]["rows"]
    assert len(found) == 6
    for row, name in zip(found[2:], names, strict=True):
        chunks = dense["n_action_steps"] / played["rows"][name]["n_action_steps"]
        same(row[2], played["rows"][name]["milliseconds"] * chunks)
        mean, away = (compared[name][k] for k in ("mean_difference", "standard_error"))
        values = (-mean, -mean - 1.959964 * away, -mean + 1.959964 * away)
        for written, value in zip(numbers(row[3]), values, strict=True):
            same(written, value)


def test_its_sentences() -> None:
    headline = json.loads((RESULTS / "2026-11-25-amd-epyc-25-17-headline.json").read_text())
    assert headline["seeds"] == [100_000, 101_499]
    said("README.md", r"where DDPM-100 has (\S+)\.", headline["rows"]["ddpm-100"]["score"]["mean"])
    paced = [paced_preset(name)["p50"] for name in ("fast", "lossless")]
    said("README.md", r"`fast` takes (\S+) ms a chunk and `lossless` (\S+):", *paced)


# ---- docs/speed.md

NAMES = {
    "tsad, dense": "tsad dense",
    'tsad, dense, `precision="int16"`': "tsad-int16 dense",
    "OpenVINO, memory hoisted out of the loop": "openvino-hoisted",
    "OpenVINO, as exported": "openvino",
    "ONNX Runtime, as exported": "onnxruntime",
    "torch.compile": "compile",
    "PyTorch eager": "eager",
    "tsad, 80 % sparse (uniform)": "tsad uniform-80",
    "tsad, 95 % sparse (uniform)": "tsad uniform-95",
    "tsad, 95 % sparse (mixed reuse, `bench/plans/sparse95.npz`)": "tsad sparse95",
    'the same, `precision="int16"`': "tsad-int16 sparse95",
}


def paced_preset(name: str) -> dict[str, float]:
    document = json.loads((RESULTS / f"2026-11-25-amd-epyc-25-17-paced-{name}.json").read_text())
    assert document["paced_hz"] == 10 and document["results"][1]["name"] == name
    return dict(document["results"][1]["call_ms"])


def test_speeds_back_to_back() -> None:
    found = rows(read("speed.md"), "| DDPM-100 |")
    assert [row[0] for row in found] == list(NAMES)
    for place, case in ((1, "ddpm100"), (3, "ddim16")):
        contenders = bench_case("", case)
        dense = contenders["tsad dense"]["times"]["best_p50"]
        for row in found:
            times = contenders.get(NAMES[row[0]], {}).get("times")
            if not row[place]:
                continue
            best, median = numbers(row[place])
            same(best, times["best_p50"])
            same(median, times["p50"])
            if row[place + 1]:
                same(row[place + 1].rstrip("x"), times["best_p50"] / dense)


def test_sentences_about_speed() -> None:
    share = {
        name: one.get("floor_share", 0) * 100 for name, one in bench_case("", "ddpm100").items()
    }
    twelve, avx2 = bench_case("-rounds12", "ddpm100"), bench_case("-avx2", "ddpm100")
    said(
        "speed.md",
        r"Dense runs at (\d+) % .* the 95 % plan at (\d+) %, or (\d+) % \((\S+) ms\)",
        share["tsad dense"],
        share["tsad sparse95"],
        100 * twelve["tsad sparse95"]["floor_share"],
        twelve["tsad sparse95"]["times"]["best_p50"],
    )
    outside = bench_case("", "ddpm100")["tsad dense"]["stages_ms"]["outside"]
    said("speed.md", r"(\S+) ms of a chunk are outside", outside)
    lanes = bench_case("", "lanes64")
    together, alone = (
        lanes[f"tsad sparse95{end}"]["times"]["best_p50"] for end in ("", "/one-by-one")
    )
    said(
        "speed.md",
        r"take (\S+) ms each, (\d+) % of the floor and (\S+) times as fast",
        together / 64,
        100 * lanes["tsad sparse95"]["floor_share"],
        alone / together,
    )
    ours = [
        avx2[name]["times"]["best_p50"]
        for name in ("tsad dense", "tsad sparse95", "tsad-int16 dense", "tsad-int16 sparse95")
    ]
    said(
        "speed.md",
        r"dense (\S+) ms, (\d+) % of its floor, the 95 % plan (\S+) ms, `int16` (\S+) and (\S+)\.",
        ours[0],
        100 * avx2["tsad dense"]["floor_share"],
        *ours[1:],
    )
    others = bench_case("-compile", "ddpm100")
    names = ("tsad dense", "eager", "compile", "compile-max-autotune", "compile-freezing")
    said(
        "speed.md",
        r"our dense (\S+), eager (\d+)\): default (\d+), `max-autotune` (\d+), with "
        r"freezing (\d+);",
        *(others[name]["times"]["best_p50"] for name in names),
    )
    wrong = others["compile-freezing-max-autotune"]
    assert wrong["status"] == "wrong" and "differ from ours by 1.2," in wrong["reason"]
    taken = bench_case("-paced", "contended")
    said(
        "speed.md",
        r"a dense chunk takes (\d+) ms, the 95 % plan (\S+) ms\.",
        *(taken[name]["contended"]["p50"] for name in ("tsad dense", "tsad sparse95")),
    )


def test_speeds_at_a_robots_pace() -> None:
    contenders = bench_case("-paced", "paced10")
    names = ("tsad dense", "tsad sparse95", "tsad-int16 sparse95")
    measured = [contenders[name]["times"] for name in names]
    measured += [paced_preset(name) for name in ("fast", "lossless")]
    found = rows(read("speed.md"), "at 10 Hz")
    for row, times in zip(found, measured, strict=True):
        for written, key in zip(row[1:], ("p50", "p90", "p99"), strict=True):
            same(written, times[key])


def test_what_conditioning_costs() -> None:
    rungs = results(read("speed.md"), "ladder")["rungs"]
    found = rows(read("speed.md"), "pruner |")
    for row, pruner in zip(found, dict.fromkeys(rung["pruner"] for rung in rungs), strict=True):
        ladder = [rung for rung in rungs if rung["pruner"] == pruner]
        for cell, rung in zip(row[1:], ladder[:5], strict=True):
            outside, total = numbers(cell)
            same(outside, rung["outside"])
            same(total, rung["total"])


# ---- docs/plans.md


def test_errors_of_plans() -> None:
    document = results(read("plans.md"), "plan-errors")
    plans = document["plans"]
    random = [plans[name] for name in plans if name.startswith("random")]
    assert len(random) == 3
    kinds = [plans["effects"], plans["searched"], plans["bac"], plans["uniform"]]
    found = rows(read("plans.md"), "plan |")
    for row, kind in zip(found, [*kinds, None], strict=True):
        for written, asked in zip(row[1:], document["asked"], strict=True):
            made = [kind] if kind else random
            same(written, float(np.mean([plan[str(asked)]["error"]["rms"] for plan in made])))
    ranked = document["whole_plans"], document["single_cells"]
    said(
        "plans.md",
        r"ranks (\d+) such plans .* of (\S+), single cells with (\S+)\.",
        ranked[0]["plans"],
        ranked[0]["rank_correlation"],
        ranked[1]["rank_correlation"]["all"],
    )
