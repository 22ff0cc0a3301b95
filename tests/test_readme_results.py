"""The figures of docs/results.md, and the sweeps of fitting.md, are the committed ones."""

from __future__ import annotations

import json
import sys

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
