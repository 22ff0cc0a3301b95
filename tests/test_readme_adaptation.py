"""The figures of docs/adaptation.md are the committed ones."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
from pages import RESULTS, ROOT, read, results, rows, said


def test_three_trainings_of_a_pruner() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-pruner-three.json").read_text())
    text = read("adaptation.md").partition("| rule | left out | seed 0")[2].partition("\n\n")[0]
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


def test_what_more_episodes_teach_a_pruner() -> None:
    document = results(read("adaptation.md"), "pruner-episodes")
    table = rows(read("adaptation.md"), "learned from | R2 |")
    assert [row[0] for row in table] == list(document["95%"]) == list(document["90%"])

    def found(level: str, episodes: str, rule: str) -> dict[str, Any]:
        name = f"levels, {rule}, {level}"
        (row,) = (row for row in document[level][episodes]["rows"] if row["rule"] == name)
        return row  # type: ignore[no-any-return]

    for episodes, r2, *cells in table:
        assert r2 == f"{document['95%'][episodes]['pruners']['levels']['result']['r2']:.2f}"
        for cell, (level, rule) in zip(
            cells, itertools.product(document, ("own", "another's")), strict=True
        ):
            row = found(level, episodes, rule)
            low, high = (100 * value for value in row["beside_interval"])
            assert (
                cell
                == f"{row['rms']:.4f}, {100 * row['beside']:+.0f} % ({low:+.0f} to {high:+.0f})"
            )
    said(
        "adaptation.md",
        r"what five of them teach costs (\S+) % at 95 %, .* \((\S+) at 95 %, (\S+) at 90 %\) in "
        r".* choices cost (\S+) and (\S+) % \(seed 0\)\. Hindsight would gain (\S+) and (\S+) %\.",
        100 * found("95%", "5 episodes", "own")["beside"],
        *(found(level, "80 episodes", "mean")["rms"] for level in document),
        *(100 * found(level, "80 episodes", "another's")["beside"] for level in document),
        *(-100 * found(level, "80 episodes", "hindsight")["beside"] for level in document),
    )


def test_straight_through_gates() -> None:
    document = results(read("adaptation.md"), "pruner-gates")
    table = rows(
        read("adaptation.md"), "rule | RMS at 95 % | beside mean | RMS at 90 % | beside mean |"
    )
    assert len(table) == 4
    for rule, *cells in table:
        name = rule.partition(":")[0]
        for level, error, gain in (("95%", *cells[:2]), ("90%", *cells[2:])):
            (row,) = (r for r in document[level] if r["rule"] == f"gates-1, {name}, {level}")
            low, high = (100 * value for value in row["beside_interval"])
            beside = f"{100 * row['beside']:+.0f} % ({low:+.0f} to {high:+.0f})"
            assert (error, gain) == (f"{row['rms']:.4f}", "" if name == "mean" else beside)
    slow, fast = (document["curves"][rate] for rate in ("1e-4", "1e-3"))
    said(
        "adaptation.md",
        r"the table's (\S+) to (\S+)\. At ten .* (\S+) after (\d+) steps and (\S+) after (\d+):",
        document["training"]["table"]["val_error"],
        slow[-1]["val_error"],
        *(value for line in fast for value in (line["val_error"], line["step"])),
    )


@pytest.mark.parametrize(
    ("file", "head"),
    [("inputs", "inputs | 5 episodes | 13"), ("inputs-100", "inputs | 5 episodes | 20")],
)
def test_what_further_inputs_foresee(file: str, head: str) -> None:
    document = results(read("adaptation.md"), f"pusht-pruner-{file}")
    sets = list(dict.fromkeys(row["inputs"] for row in document["rows"]))
    table = rows(read("adaptation.md"), head)
    assert len(table) == len(sets) == 6
    for (_, *cells), name in zip(table, sets, strict=True):
        found = [row["r2"] for row in document["rows"] if row["inputs"] == name]
        for cell, r2 in zip(cells, found, strict=True):
            assert cell == f"{np.mean(r2):.2f} ({min(r2):.2f} to {max(r2):.2f})"


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
    text = read("adaptation.md").partition(head)[2].partition("\n\n")[0]
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
        assert row["episodes"] == 500


def test_choosing_chunks_beside_as_many_at_random() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-passes-loop.json").read_text())["summary"]
    found = [document[level]["random"]["pruner_less_this_score"] for level in ("1.33", "2.00")]
    number = r"(\S+) \((\S+) to (\S+)\)"
    said(
        "adaptation.md",
        rf"as many at random it is {number} at 1\.33 passes and {number} at 2,",
        *(value for one in found for value in (one["mean_difference"], *one["simultaneous"])),
    )
    most = document["2.00"]["10001000"]["score"]
    said("adaptation.md", r"two passes for every chunk score most of all, (\S+)\. After", most)


def test_rules_beside_evenly_spaced_steps() -> None:
    """The table is that of the committed results, a row for each pair."""
    document = json.loads((RESULTS / "2026-11-30-pusht-rules.json").read_text())
    rows, pairs = document["rows"], document["pairs"]
    text = read("adaptation.md").partition("**In closed loop** each rule")[2].partition("\n## ")[0]
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
    lost = [pairs[pair]["score"] for pair in pairs if not pair.startswith("warm")]
    worse = sorted(-row["mean_difference"] for row in lost if row["interval95"][1] < 0)
    assert len(worse) == 5 and not any(row["interval95"][0] > 0 for row in lost)
    said("adaptation.md", r"five of seven lose (\S+) to (\S+)\*\*", worse[0], worse[-1])
    one, two, every, share = (
        [row["score"]["mean"], row["success"]["mean"], row["passes"]]
        for row in (rows[f"warm-8-{x}"] for x in ("row-0", "rows-0-4", "every-3", "share-0.33"))
    )
    often = pairs["ddpm-100-fbcache-0.4 to ddpm-100-even-24"]["success"]
    said(
        "adaptation.md",
        r"succeeds more often, (\S+) \((\S+) to (\S+)\); eight steps",
        often["mean_difference"],
        *often["interval95"],
    )
    assert rows["ddim-16-even-8"]["score"]["mean"] > rows["ddpm-100-even-24"]["score"]["mean"]
    turns = pairs["warm-8-every-3 to warm-8-share-0.33"]
    said(
        "adaptation.md",
        r"One warm pass has (\S+) \(success (\S+)\), two (\S+) \((\S+)\), every third .* "
        r"two (\S+) \((\S+)\) at (\S+) passes, a third of them at random (\S+) \((\S+)\) at (\S+): "
        r"every third scores (\S+) less than at random \((\S+) to (\S+)\) and .* often, (\S+) "
        r"\((\S+) to (\S+)\)\.",
        *(one[:2] + two[:2] + every + share),
        -turns["score"]["mean_difference"],
        *turns["score"]["interval95"],
        turns["success"]["mean_difference"],
        *turns["success"]["interval95"],
    )
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

    text = read("adaptation.md").partition("**Does the audit see more?**")[2]
    lines = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [re.sub(" +", " ", line) for line in lines] == [cells(kind) for kind in document["rows"]]
