"""The figures of docs/results.md, adaptation.md and fitting.md are the committed ones."""

from __future__ import annotations

import itertools
import json
import re
import sys
from typing import Any

import numpy as np
import pytest
from pages import RESULTS, ROOT, bench_case, read, results, rows, said, same

import tsad

sys.path.append(str(ROOT / "bench"))

import frontier  # noqa: E402


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
    ("results.md", "More seeds", "headline"),
    ("results.md", "Fewer", "actions"),
    ("results.md", "One and two passes", "lead"),
    ("results.md", "With a lead, on 1,500", "lead_1500"),
    ("results.md", "With a tail", "pusht_corners_lead"),
    ("results.md", "Another task", "metaworld"),
    ("fitting.md", "The sampler", "fitted"),
    ("fitting.md", "Fitted by what", "closed_loop_fit"),
]


@pytest.mark.parametrize(("page", "section", "kind"), SWEEPS)
def test_the_sweeps_are_the_committed_ones(page: str, section: str, kind: str) -> None:
    text = read(page).partition(f"## {section}")[2].partition("\n## ")[0]
    document = results(text, kind.replace("_", "-"))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines == frontier.sweep(document, success="of success" in lines[0]).splitlines()
    settings = json.loads((ROOT / "bench" / "frontier" / f"{kind}.json").read_text())
    assert [row["name"] for row in settings] == list(document["rows"])


def test_what_fitting_in_closed_loop_gains() -> None:
    text = read("fitting.md")
    ended = results(text, "closed-loop-search")["generations"][-1]["mean"]
    first, last, eps, lead = ended
    said(
        "fitting.md",
        r"gains of (\S+) and (\S+), a factor of (\S+), a lead of (\S+)\. 500",
        *(first, last, 1 + eps, lead),
    )
    document = results(text, "closed-loop-fit")
    (pair,) = document["pairs"].values()
    number = r"(\S+) \((\S+) to (\S+)"
    said(
        "fitting.md",
        rf"over a lead alone\*\*: {number}, that pair alone\), success {number}\)\.",
        *(x for one in pair.values() if isinstance(one, dict)
          for x in (one["mean_difference"], *one["interval95"])),
    )  # fmt: skip
    beside = document["compared_with_lead"]["rows"]
    losses = [-beside[name]["mean_difference"] for name in list(document["rows"])[:1:-1]]
    said("fitting.md", r"with its own lead, (\S+) here and (\S+) unfitted", *losses)


def test_what_a_tail_makes_up_for() -> None:
    document = results(read("results.md"), "pusht-corners-lead")
    two, one = "ddim-4-trailing-warm-2", "ddim-2-trailing-warm-1"
    values: list[float] = []
    for key, name in (
        ("compared", two), ("compared", one), ("compared", f"{one}-smooth-lead-0.25"),
        ("compared_success", two),
    ):  # fmt: skip
        row = document[key]["rows"][name]
        values += [row["mean_difference"] if values == [] else -row["mean_difference"]]
        values += row["simultaneous"]
    said(
        "results.md",
        r"lose no score without it, (\S+) \((\S+) to (\S+), all rows together\), .* one loses "
        r"(\S+) \((\S+) to (\S+)\), or (\S+) with a lead of 0.25 \((\S+) to (\S+)\)\.[\s\S]*"
        r"at two passes by (\S+) \((\S+) to (\S+)\), though",
        *values,
    )


def test_a_fine_tune_on_warm_starts() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-warm-tuned-200.json").read_text())
    text = read("fitting.md").partition("| fine-tuned | passes")[2].partition("\n\n")[0]
    for line, (name, row) in zip(text.splitlines()[2:], document["rows"].items(), strict=True):
        pair = document["pairs"][f"{name} to ../played-pusht/{name}"]
        cells = [f"{row['passes']:.0f}"]
        cells += [f"{row[of]['mean']:.3f}" for of in ("score", "success")]
        for of in ("score", "success"):
            low, high = pair[of]["interval95"]
            cells.append(f"{pair[of]['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        assert [cell.strip() for cell in line.strip("|").split("|")][1:] == cells


BESIDE = [("pusht", "lead-1500"), ("pusht-corners", "corners-lead")]


@pytest.mark.parametrize(("of", "beside"), BESIDE)
def test_fitted_weights_beside_those_they_came_from(of: str, beside: str) -> None:
    """A line for each pair; what it is compared with was played before, on the same seeds."""
    text = read("fitting.md")
    document = results(text, f"{of}-fitted-weights")
    (other,) = RESULTS.glob(f"*-pusht-{beside}.json")
    others = json.loads(other.read_text())
    assert others["seeds"] == document["seeds"]
    table = rows(text, f"`{of.replace('-', '_')}`, by fitted weights")
    assert len(table) == len(document["pairs"])
    for (name, pair), line in zip(document["pairs"].items(), table, strict=True):
        one, _, two = name.partition(" to ")
        both = document["rows"][one], others["rows"][two.rpartition("/")[2]]
        assert both[0]["settings"]["files_sha256"] != both[1]["settings"]["files_sha256"]
        assert pair["pairs"] == document["seeds"][1] - document["seeds"][0] + 1
        cells = []
        for row in both:
            cells += [f"{row[what]['mean']:.3f}" for what in ("score", "success")]
        for what in ("score", "success"):
            low, high = pair[what]["interval95"]
            cells.append(f"{pair[what]['mean_difference']:+.3f} ({low:+.3f} to {high:+.3f})")
        assert [*line[1:3], *line[4:]] == cells, name


def test_what_fitted_weights_lose() -> None:
    """The sentences of three pages, and what was fitted."""
    text, n = read("fitting.md"), r"(\S+) \((\S+) to (\S+)\)"

    def pairs(of: str) -> list[Any]:
        found = results(text, f"{of}-fitted-weights")["pairs"].values()
        return [
            [pair[what]["mean_difference"], *pair[what]["interval95"]]
            for pair in found
            for what in ("score", "success")
        ]

    config = RESULTS / "2026-12-01-pusht-fitted-weights-config.json"
    fitted = json.loads(config.read_text())["provenance"]["fitted"]
    said("fitting.md", r"from (\S+) to (\S+) \(the sampler's", *fitted["mean_rms"])
    assert f"{fitted['chunks'][0]:,} chunks" in text and round(fitted["seconds"] / 60) == 17
    found = pairs("pusht")
    loss, *interval = found[0]
    said("fitting.md", r"own best lead it loses (\S+) \((\S+) to (\S+)\),", -loss, *interval)
    said("results.md", r"and loses (\S+) \((\S+) to (\S+)\): \[fitting", -loss, *interval)
    said("fitting.md", rf"success: {n} beside one pass", *found[7])
    said("fitting.md", r"Two passes still have (\S+) more", -found[8][0])
    lead = results(read("results.md"), "pusht-lead-1500")
    name = "ddim-16-trailing-warm-8-row-0-int16-smooth-lead-0.25"
    before = lead["compared_with_lead"]["rows"][name]["mean_difference"]
    said("fitting.md", r"about a third of the (\S+) that one pass lost", -before)
    assert 0.3 < loss / before < 0.4
    lost = lead["rows"]["ddim-8-smooth-lead-0.1"]["success"]["mean"]
    assert 0.6 < found[7][0] / (lost - lead["rows"][name]["success"]["mean"]) < 0.75
    found = pairs("pusht-corners")
    said("fitting.md", r"scores (\S+) more than before \((\S+) to (\S+)\)", *found[4])
    said("fitting.md", r"eight steps \((\S+), (\S+) to (\S+)\)", *found[0])
    said("fitting.md", r"two passes \((\S+), (\S+) to (\S+)\)", *found[10])
    assert found[11][1] > 0  # succeeds more often than these
    said("plans.md", r"scores (\S+) and (\S+) more, and", pairs("pusht")[6][0], found[4][0])
    said("fitting.md", rf"than eight steps, {n}, with leads for both {n}\.", *found[1], *found[7])
    corners = results(text, "pusht-corners-fitted-weights")["rows"]["ddim-2-trailing-warm-1"]
    others = results(read("results.md"), "pusht-corners-lead")["rows"]["ddim-8"]
    means = corners["score"]["mean"], others["score"]["mean"]
    said("lerobot.md", r"then has (\S+) at one pass, (\S+) at eight\.", *means)


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
        (r"success is not kept\*\*: (\S+) ", one_pass, 1),
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


def test_what_a_lead_keeps_on_more_seeds() -> None:
    document = json.loads((RESULTS / "2026-11-30-pusht-lead-1500.json").read_text())
    alone, led = (document[key]["rows"] for key in ("compared", "compared_with_lead"))
    success = document["compared_success"]["rows"]
    warm = "ddim-16-trailing-warm-8-row"
    cold, two = "dpm-8-rows-0-6-int16-smooth-lead-0.1", f"{warm}s-0-4-int16-smooth-lead-0.2"
    one = f"{warm}-0-int16-smooth-lead-0.25"
    for before, found, sign in (
        ("from the chunk before ", led[two], 1),
        ("`fast` with a lead ", led[cold], 1),
        ("than dense as it is as well, ", success[cold], 1),
        (r"One pass does lose\*\*: ", led[one], -1),
        (r"beside dense as it is \(", alone[one], 1),
        ("and success falls by ", success[one], -1),
    ):
        values = [sign * found["mean_difference"], *found["simultaneous"]]
        said("results.md", before + r"(\S+?),?[^(\d]*\(?([+-]\S+) to (\S+?)[,)]", *values)
    before = json.loads((RESULTS / "2026-11-29-pusht-lead.json").read_text())
    (path,) = RESULTS.glob("*-lead-times.json")
    timed = {row["name"]: row["call_ms"] for row in json.loads(path.read_text())["results"]}
    assert list(document["rows"]) == ["ddim-8", "ddim-8-smooth-lead-0.1", cold, one, two]
    said(
        "results.md",
        r"dense (\S+) and (\S+) ms, with its lead (\S+) and (\S+), `fast` with a lead (\S+) and "
        r"(\S+), one pass (\S+) and (\S+), two (\S+) and (\S+)\.",
        *(timed[name][key] for name in document["rows"] for key in ("p50", "p99")),
    )
    means = [swept["rows"][one]["score"]["mean"] for swept in (before, document)]
    said("results.md", r"seeds above it had been (\S+) better than here", means[0] - means[1])


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
