"""The figures of docs/fitting.md are the committed ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pages import RESULTS, read, results, rows, said


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
    means = [row[what]["mean"] for row in (corners, others) for what in ("score", "success")]
    pattern = r"then has (\S+) at one pass \(success (\S+)\), and (\S+) \((\S+)\) at eight"
    said("lerobot.md", pattern, *means)
