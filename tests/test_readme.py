"""The README's Python runs as it stands, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the source tree")


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.S)
    code_lines = [line for line in code.splitlines() if line.strip() and line[0] != "#"]
    assert len(code_lines) <= 15  # as promised
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    import tsad

    kept = tsad.Plan.load(tmp_path / "plan.npz")  # the one it set last, not the one it ran
    assert abs(kept.sparsity - 0.9) < 0.01


def test_the_frontier_is_the_committed_one() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    import frontier

    (file,) = re.findall(r"`(bench/results/[^`]*-frontier\.json)`", README.read_text())
    document = json.loads((ROOT / file).read_text())
    section = README.read_text().partition("## Which setting")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 10
    assert set(rows) <= set(frontier.page(document).splitlines())


def test_the_paced_latencies_are_the_committed_ones() -> None:
    import json

    text = README.read_text()
    (stem,) = re.findall(r"`(bench/results/[^`]*)\.json`\.\n\n\| \| DDPM-100", text)
    table = text.partition("| at 10 Hz |")[2].partition("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    cases = json.loads((ROOT / f"{stem}-paced.json").read_text())["cases"]
    (paced,) = (case for case in cases if case["name"] == "paced10")
    times = {entry["name"]: entry["times"] for entry in paced["contenders"]}
    measured = [times[name] for name in ("tsad dense", "tsad sparse95", "tsad-int16 sparse95")]
    for preset in ("fast", "lossless"):
        document = json.loads((ROOT / f"{stem}-paced-{preset}.json").read_text())
        assert document["paced_hz"] == 10 and document["results"][1]["name"] == preset
        measured.append(document["results"][1]["call_ms"])
    assert len(rows) == len(measured)
    for row, found in zip(rows, measured, strict=True):
        for got, key in zip(row[1:], ("p50", "p90", "p99"), strict=True):
            digits = len(got.partition(".")[2])
            assert got == f"{found[key]:.{digits}f}", (row, key)


def test_the_sweeps_are_the_committed_ones() -> None:
    import json
    import sys

    sys.path.insert(0, str(ROOT / "bench"))
    import frontier

    section = README.read_text().partition("## More seeds")[2].partition("\n## ")[0]
    lines: set[str] = set()
    for kind in ("headline", "actions"):
        (file,) = re.findall(rf"`(bench/results/[^`]*-{kind}\.json)`", section)
        document = json.loads((ROOT / file).read_text())
        lines |= set(frontier.sweep(document).splitlines())
        settings = json.loads((ROOT / "bench" / "frontier" / f"{kind}.json").read_text())
        assert [row["name"] for row in settings] == list(document["rows"])
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 15 and set(rows) <= lines


@pytest.mark.parametrize("name", ["settings", "choose", "headline", "actions"])
def test_the_settings_of_the_frontier_can_be_played(name: str) -> None:
    import tsad
    from tsad.commands.sweep import read_settings

    folder = ROOT / "bench" / "frontier"
    for row in read_settings(str(folder / f"{name}.json")):
        plan = row.get("plan", "1")
        assert set(plan) <= {"0", "1"} or tsad.Plan.load(folder / plan).sparsity > 0


def test_the_files_it_lists_exist() -> None:
    for name in re.findall(r"`((?:tsad|csrc|bench)/[\w./]+)`", README.read_text()):
        assert (ROOT / name).exists(), name


def test_the_commands_it_names_exist() -> None:
    from tsad.cli import main

    commands = set(
        re.findall(
            r"`?tsad (demo|eval|collect|plan|tune|bench|show|info|convert|generate|train-policy)\b",
            README.read_text(),
        )
    )
    assert "demo" in commands
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
