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
from pages import RESULTS, ROOT, code, each_page, numbers, read, results, rows, said, same

import tsad
from tsad.scope import table as scope_table

sys.path.append(str(ROOT / "bench"))

import frontier  # noqa: E402


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


def bench_case(ending: str, case: str) -> dict[str, Any]:
    """The contenders of a case by name; those of the file with this ending."""
    document = json.loads((RESULTS / f"2026-11-25-amd-epyc-25-17{ending}.json").read_text())
    (found,) = (one for one in document["cases"] if one["name"] == case)
    return {one["name"]: one for one in found["contenders"]}


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


# ---- docs/results.md


def test_the_engine_is_right() -> None:
    text = read("results.md")
    loop = results(text, "closed-loop")
    assert (loop["seeds"], loop["first_seed"]) == (50, 100_000)
    for row, name in zip(rows(text, "50 seeds"), ("tsad dense", "eager"), strict=True):
        summary = loop[name]["summary"]
        mean, error = row[1].split(" +- ")
        same(mean, summary["score"]["mean"])
        same(error, summary["score"]["standard_error"])
        same(row[2], summary["success"]["mean"])
    paired = loop["paired"]["score"]
    said(
        "results.md",
        r"PyTorch is (\S+) in score \(95 % interval (\S+) to (\S+)\)",
        paired["mean_difference"],
        *paired["interval95"],
    )
    parity = results(text, "17-parity")
    assert parity["observations"] == 500
    said(
        "results.md",
        r"normalised action is (\S+) ",
        parity["differences"]["engine - torch float32"]["largest"],
    )
    small = results(text, "parity-int16")["differences"]["engine int16 - engine float32"]
    scale = min(tsad.load("pusht").config["normalizer"]["action"]["scale"])
    said(
        "results.md",
        r"at most (\S+) \((\S+) pixels\), (\S+) on average",
        small["largest"],
        small["largest"] / scale,
        small["mean"],
    )


def test_the_frontier_is_the_committed_one() -> None:
    document = results(read("results.md"), "frontier")
    section = read("results.md").partition("## The frontier")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert len(lines) > 30
    assert set(lines) <= set(frontier.page(document).splitlines())


def test_sentences_about_the_frontier() -> None:
    document = results(read("results.md"), "frontier")
    played, eager = document["rows"], bench_case("", "ddpm100")["eager"]["times"]["best_p50"]
    ms = {name: row["milliseconds"] for name, row in played.items()}
    score = {name: row["score"]["mean"] for name, row in played.items()}
    fast, lossless = "dpm-8-rows-0-6-int16", "ddim-8-trailing-warm-4-rows-0-2-int16-4-actions"
    said(
        "results.md",
        r"DDPM-100 from (\d+) ms .* to (\d+)\. Few steps take it to (\S+) ms",
        eager,
        ms["ddpm-100"],
        ms["ddim-8"],
    )
    said(
        "results.md",
        r"two passes and scores (\S+), where two dense steps score (\S+) \(leading\) and (\S+) \(",
        score["dpm-8-rows-0-6"],
        score["ddim-2"],
        score["ddim-2-trailing"],
    )
    said(
        "results.md",
        r"it takes \*\*(\S+) ms, (\d+) times faster",
        ms[fast],
        ms["ddpm-100"] / ms[fast],
    )
    row = played[fast]
    said(
        "results.md",
        r"seeds: (\S+), between (\S+) and (\S+) with all",
        -row["mean_difference"],
        *row["simultaneous"],
    )
    row = played["ddim-8-trailing-warm-4-rows-0-2-4-actions"]
    said(
        "results.md",
        r"scores (\S+) \((\S+) to (\S+)\); in 16",
        row["score"]["mean"],
        *row["simultaneous"],
    )
    said(
        "results.md",
        r"`preset=\"lossless\"`, (\S+) in (\S+) ms, \*\*(\S+) ms for as many actions, (\d+) times",
        score[lossless],
        ms[lossless],
        2 * ms[lossless],
        ms["ddpm-100"] / (2 * ms[lossless]),
    )
    name = "ddim-16-trailing-warm-8-row-0"
    said(
        "results.md",
        r"16 steps: (\S+) \(in 16 bits (\S+), (\S+) ms\) where a cold chunk reaches (\S+),",
        score[name],
        score[f"{name}-int16"],
        ms[f"{name}-int16"],
        score["ddim-51-row-0"],
    )
    name = "ddpm-100-search-95"
    said(
        "results.md",
        r"plan found loses (\S+) and costs (\S+) ms,",
        -played[name]["mean_difference"],
        ms[name],
    )
    said("results.md", r"by a third and scores (\S+)\. ", score["ddim-16-search-1.5"])
    ranked = document["rank_correlation"]
    said(
        "results.md",
        r"over (\d+) settings is (\S+) for the distance \((\S+) for",
        ranked["distance"]["rows"],
        ranked["distance"]["rank_correlation"],
        ranked["action_rms"]["rank_correlation"],
    )
    said("results.md", r"two passes keep (\S+) of it", played[fast]["spread"])


SWEEPS = [
    ("More seeds", "headline"),
    ("Fewer", "actions"),
    ("One and two passes", "lead"),
    ("Another task", "metaworld"),
]


@pytest.mark.parametrize(("section", "kind"), SWEEPS)
def test_the_sweeps_are_the_committed_ones(section: str, kind: str) -> None:
    text = read("results.md").partition(f"## {section}")[2].partition("\n## ")[0]
    document = results(text, kind)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == frontier.sweep(document, success=kind == "metaworld").splitlines()
    settings = json.loads((ROOT / "bench" / "frontier" / f"{kind}.json").read_text())
    assert [row["name"] for row in settings] == list(document["rows"])


def test_a_fine_tune_on_warm_starts() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-warm-tuned-200.json").read_text())
    text = read("results.md").partition("| fine-tuned | passes")[2].partition("\n\n")[0]
    for line, (name, row) in zip(text.splitlines()[2:], document["rows"].items(), strict=True):
        pair = document["pairs"][f"{name} to ../played-pusht/{name}"]
        cells = [f"{row['passes']:.0f}"]
        cells += [f"{row[of]['mean']:.3f}" for of in ("score", "success")]
        for of in ("score", "success"):
            low, high = pair[of]["interval95"]
            cells.append(f"{pair[of]['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == cells


def test_three_trainings_of_a_pruner() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-pruner-three.json").read_text())
    text = read("results.md").partition("| rule | left out | seed 0")[2].partition("\n\n")[0]
    lines = text.splitlines()[2:]
    assert len(lines) == 8
    for line in lines:
        rule, level, *found = (cell.strip() for cell in line.strip("|").split("|"))
        name = rule.strip("*").partition(":")[0]
        for seed, cell in enumerate(found):
            rows = document[level.replace(" ", "")][f"seed {seed}"]["rows"]
            (row,) = (row for row in rows if row["rule"].startswith(f"levels-{seed}, {name}, "))
            low, high = (100 * value for value in row["beside_interval"])
            beside = f", {100 * row['beside']:+.0f} % ({low:+.0f} to {high:+.0f})"
            assert cell == f"{row['rms']:.4f}" + ("" if name == "mean" else beside)


@pytest.mark.parametrize(
    ("kind", "level", "head", "times"),
    [
        ("pruner", "95%", "| 95 % left out", None),
        ("pruner", "90%", "| 90 % left out", None),
        ("passes", "1.33", "| 1.33 passes", 8),
        ("passes", "2.00", "| 2.00 passes", 8),
    ],
)
def test_what_looking_gains_in_closed_loop(
    kind: str, level: str, head: str, times: int | None
) -> None:
    """The tables are those of the committed results."""
    rows = json.loads((RESULTS / f"2026-11-30-pusht-{kind}-loop.json").read_text())["summary"]
    text = read("results.md").partition(head)[2].partition("\n\n")[0]
    lines = text.splitlines()[2:]
    for line, row in zip(lines, rows[level].values(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        between = []
        for of in ("score", "success"):
            found = row.get(f"pruner_less_this_{of}")
            if found is None:
                between.append("")
                continue
            low, high = found["simultaneous"]
            between.append(f"{found['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        cost, most = f"{row['cost'] * 100:.2f} %", f"{row['most'] * 100:.1f} %"
        if times is not None:  # passes of so many
            cost, most = f"{row['cost'] * times:.2f}", f"{row['most'] * times:.0f}"
        said = [cost, most, f"{row['score']:.3f}", f"{row['success']:.3f}"]
        assert cells[1:] == [*said, *between]
        assert kind != "pruner" or row["episodes"] == 500


def test_rules_beside_evenly_spaced_steps() -> None:
    """The table is that of the committed results, a row for each pair."""
    document = json.loads((RESULTS / "2026-11-30-pusht-rules.json").read_text())
    rows, pairs = document["rows"], document["pairs"]
    text = read("results.md").partition("**In closed loop** each rule")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| DD")]
    names = {"first-block cache": "fbcache", "TeaCache": "teacache"}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        steps, rule, threshold = re.match(r"(\S+), (.+) (\S+)$", cells[0]).groups()  # type: ignore[union-attr]
        one = f"{steps.lower()}-{names[rule]}-{threshold}"
        (pair,) = (name for name in pairs if name.startswith(f"{one} to "))
        other = pair.partition(" to ")[2]
        row, even, found = rows[one], rows[other], pairs[pair]["score"]
        low, high = found["interval95"]
        assert cells[1:] == [
            *(f"{row[key]:.1f}" for key in ("passes", "most_passes")),
            *(f"{row[key]['mean']:.{n}f}" for key, n in (("score", 3), ("success", 2))),
            f"{even['passes']:.0f}",
            *(f"{even[key]['mean']:.{n}f}" for key, n in (("score", 3), ("success", 2))),
            f"{found['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})",
        ]
    assert len(lines) == 7
    settings = json.loads((ROOT / "bench" / "frontier" / "rules.json").read_text())
    assert [row["name"] for row in settings] == list(rows)


def test_what_the_audit_of_a_guard_sees() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-guard-audit.json").read_text())

    def cells(kind: str) -> str:
        found = document["rows"][kind]
        parts = [kind]
        for name in ("observation", "audit", "either"):
            row = found[name]
            parts.append("" if row["detected"] is None else f"{row['detected']:.0%}")
            if name != "either":
                parts.append("" if row["delay"] is None else f"{row['delay']:.1f}")
            parts.append(f"{row['false']:.1%}")
        return re.sub(" +", " ", "| " + " | ".join(parts) + " |")

    text = read("results.md").partition("**Does the audit see more?**")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [re.sub(" +", " ", line) for line in lines] == [cells(kind) for kind in document["rows"]]


def test_what_a_lead_keeps() -> None:
    document = json.loads((RESULTS / "2026-11-29-pusht-lead.json").read_text())
    led = document["compared_with_lead"]["rows"]
    warm = "ddim-16-trailing-warm-8-row"
    rows = "dpm-8-rows-0-6-int16-smooth-lead-0.1", f"{warm}s-0-4-int16-smooth-lead-0.2"
    one = f"{warm}-0-int16-smooth-lead-0.25"
    cold, two, one_pass = (led[name] for name in (*rows, one))
    success = document["compared_success"]["rows"][one]
    span = r"\((\S+) to (\S+?)[,)]"
    for pattern, found, sign in (
        (r"scores (\S+) more than dense with its own lead ", cold, 1),
        (r"`warm-8-rows-0-4` (\S+) less ", two, -1),
        (r"success is not\*\*: (\S+) ", one_pass, 1),
        (r"success falls by (\S+) ", success, -1),
    ):
        mean = sign * found["mean_difference"]
        said("results.md", pattern + span, mean, *found["simultaneous"])
    (path,) = RESULTS.glob("*-lead-times.json")
    timed = {row["name"]: row["call_ms"] for row in json.loads(path.read_text())["results"]}
    said(
        "results.md",
        r'`"one_pass"`: (\S+) and (\S+) ms a chunk on .*, where DDIM-8 takes (\S+) ',
        *(timed[name]["p50"] for name in (rows[0], one, "ddim-8")),
    )
    alone = document["compared"]["rows"]
    said(
        "results.md",
        r"Without a lead one pass loses (\S+) and two warm passes (\S+)\. ",
        *(-alone[f"{name}-int16"]["mean_difference"] for name in (f"{warm}-0", f"{warm}s-0-4")),
    )


def test_what_holds_on_another_task() -> None:
    document = json.loads((RESULTS / "2026-11-29-metaworld.json").read_text())
    rows, success = document["rows"], document["compared_success"]["rows"]
    one, two = (f"ddim-16-trailing-warm-8-row{ending}" for ending in ("-0", "s-0-4"))
    for before, name in (
        (r"as on Push-T: DDIM-8 ", "ddim-8"),
        (r"in 16 bits ", "ddim-8-int16"),
        (r"which do on Push-T: DDIM-4 ", "ddim-4"),
        (r"and much more: ", "ddpm-100-effects-95"),
        (r"and none excluded\*\*: ", two),
        (r"and none excluded\*\*: .* and ", one),
    ):
        found = success[name]
        span = r"([+-][.\d]+) \((\S+) to (\S+?)\)"
        said("results.md", before + span, found["mean_difference"], *found["simultaneous"])
    said(
        "results.md",
        r"longer: (\d+) steps to success, two passes (\d+), DDIM-8 (\d+), DDPM-100 (\d+)\.",
        *(rows[name]["steps_to_success"] for name in (one, two, "ddim-8", "ddpm-100")),
    )
    led = (("ddim-8", "-smooth-lead-0.1"), (two, "-smooth-lead-0.2"))
    said(
        "results.md",
        r"DDIM-8 has (\S+) \(without (\S+)\), two passes (\S+) \(without (\S+)\)\.",
        *(rows[name + end]["success"]["mean"] for name, lead in led for end in (lead, "")),
    )
    pusht = json.loads((RESULTS / "2026-11-25-amd-epyc-25-17-frontier.json").read_text())["rows"]
    fall = pusht["ddpm-100"]["success"]["mean"] - pusht[one]["success"]["mean"]
    lost = -pusht["ddpm-100-search-95"]["mean_difference"]
    said("results.md", r"from such a one, and loses (\S+) of score", lost)
    said("results.md", r"Push-T, where success falls by (\S+), it", fall)
    assert success[one]["simultaneous"][0] > -fall
    said("results.md", r"succeeds in (\S+) of the episodes", rows["ddpm-100"]["success"]["mean"])
    sides = json.loads((RESULTS / "2026-11-29-metaworld-sides.json").read_text())
    assert sides["seeds"] == [10_000, 10_059]
    of = r"in (\d+) of (\d+)"
    shares = [sides["rows"][name] for name in ("ddpm-100", "ddim-8", two, one)]
    said(
        "results.md",
        rf"right {of} that succeed, DDIM-8 {of}, two warm passes {of}, one {of} \(",
        *(60 * share[what]["mean"] for share in shares for what in ("score", "success")),
    )


PLAYED = sorted(file.stem for file in (ROOT / "bench" / "frontier").glob("*.json"))


@pytest.mark.parametrize("name", PLAYED)
def test_the_settings_of_the_frontier_can_be_played(name: str) -> None:
    from tsad.evaluation.sweep import read_settings

    folder = ROOT / "bench" / "frontier"
    for row in read_settings(str(folder / f"{name}.json")):
        plan = row.get("plan", "1")
        assert set(plan) <= {"0", "1"} or tsad.Plan.load(folder / plan).sparsity > 0


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
