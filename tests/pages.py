"""README.md and docs/, and the result files that their figures are held to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
if not (ROOT / "bench").is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def read(name: str) -> str:
    """A page, by its name."""
    return next(page for page in PAGES if page.name == name).read_text()


def code(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page in that language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), flags=re.S | re.M)
    return [text for kind, text in blocks if kind == language]


def results(text: str, ending: str) -> Any:
    """The one result file that a text names by this ending."""
    (found,) = set(re.findall(rf"`bench/results/([\w-]*{ending}\.json)`", text))
    return json.loads((RESULTS / found).read_text())


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head begins so; emphasis taken off."""
    (found,) = re.findall(rf"^\| {re.escape(head)}[^\n]*\n\|[ -:|]*\n((?:\|[^\n]*\n)+)", text, re.M)
    lines = found.replace("**", "").splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]


def same(written: str, value: float) -> None:
    """A figure is the value, in as many digits as are written."""
    digits = len(written.partition(".")[2].partition("e")[0])
    if "e" in written:
        assert f"{value:.{digits}e}".replace("e-0", "e-") == written
        return
    plain = f"{value:.{digits}f}"
    assert written.lstrip("+") == ("0." + "0" * digits if float(plain) == 0 else plain), value


def numbers(text: str) -> list[str]:
    """The figures in a cell."""
    return re.findall(r"[-+]?\d[\d.]*(?:e-\d+)?", text.replace(",", " "))


def said(name: str, pattern: str, *values: float) -> None:
    """A sentence of a page, whose groups are these values; spaces match line breaks."""
    found = re.search(pattern.replace(" ", r"\s+"), read(name))
    assert found, pattern
    assert len(found.groups()) == len(values)
    for written, value in zip(found.groups(), values, strict=True):
        same(written, value)


# ---- what can be run


def bench_case(ending: str, case: str) -> dict[str, Any]:
    """The contenders of a case by name; those of the file with this ending."""
    document = json.loads((RESULTS / f"2026-11-25-amd-epyc-25-17{ending}.json").read_text())
    (found,) = (one for one in document["cases"] if one["name"] == case)
    return {one["name"]: one for one in found["contenders"]}
