"""The rules of CONTRIBUTING.md that a search can check."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = sorted((ROOT / "csrc").rglob("*.[ch]"))
PYTHON = sorted((ROOT / "tsad").rglob("*.py"))

pytestmark = pytest.mark.skipif(not CORE, reason="needs the source tree")


def where(pattern: str, *, allowed: tuple[str, ...] = (), folder: str = "") -> list[str]:
    """Lines of C that match outside comments, as "file:line", but for the allowed files."""
    found = []
    for file in CORE:
        name = file.relative_to(ROOT / "csrc").as_posix()
        if name in allowed or not name.startswith(folder):
            continue
        text = re.sub(
            r"/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), file.read_text(), flags=re.S
        )
        found += [
            f"{name}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(pattern, line)
        ]
    return found


def test_python_stays_at_the_edge() -> None:
    assert [hit for hit in where(r"Python\.h|\bPy[A-Z_]") if not hit.startswith("python/")] == []
    assert where(r"numpy/", allowed=("python/array.c", "python/noise.c")) == []


def test_nothing_points_upwards() -> None:
    for folder in ("cpu/", "stage/", "net/"):
        assert where(r'#include ".*python/', folder=folder) == []
    for folder in ("stage/", "net/"):
        assert where(r'#include ".*cpu/|immintrin|__AVX', folder=folder) == []
    assert where(r'#include ".*stage/|tsad_(encode|prune|plan|denoise)\(', folder="cpu/") == []


def test_the_core_allocates_in_one_file_and_never_leaves_the_process() -> None:
    allowed = ("arena.c",)
    hits = where(r"\b(malloc|calloc|realloc|free|aligned_alloc)\(", allowed=allowed)
    assert [hit for hit in hits if not hit.startswith("python/")] == []
    assert where(r"\b(exit|abort|printf|fprintf|puts|perror)\(") == []


def test_files_and_functions_keep_their_size() -> None:
    for file in [*CORE, *PYTHON]:
        assert len(file.read_text().splitlines()) <= 600, file
    for file in CORE:
        start = 0
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if line == "{":
                start = number
            elif line == "}" and start:
                assert number - start <= 80, f"{file}:{start}"
                start = 0


def test_every_header_compiles_alone_as_c_and_cpp(tmp_path: Path) -> None:
    import shutil
    import subprocess

    if not shutil.which("gcc") or not shutil.which("g++"):
        pytest.skip("needs gcc and g++")
    unit = tmp_path / "unit.c"
    unit.write_text('#include "tsad.h"\n#include "plan_core.h"\n')
    for compiler, language in (("gcc", "c"), ("g++", "c++")):
        command = [compiler, "-x", language, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(unit)], check=True)
