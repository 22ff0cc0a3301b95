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
    assert (tmp_path / "plan.npz").exists()


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
