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


def test_one_place_writes_files() -> None:
    """tsad/files.py, but for what grows line by line."""
    growing = {"tsad/sim/results.py": '"ab"', "tsad/recorder.py": '"xb"'}
    writes = (
        r"""write_(text|bytes)\(|os\.replace|tempfile|\.mkdir\(|open\([^)]*["'][rwax]b?\+?["']\)"""
    )
    found = []
    for file in PYTHON:
        name = file.relative_to(ROOT).as_posix()
        for line in file.read_text().splitlines():
            reads = re.search(r"""["']rb?["']""", line) or growing.get(name, "\n") in line
            if name != "tsad/files.py" and re.search(writes, line) and not reads:
                found.append(f"{name}: {line.strip()}")
    assert found == []


def test_python_stays_at_the_edge() -> None:
    assert [hit for hit in where(r"Python\.h|\bPy[A-Z_]") if not hit.startswith("python/")] == []
    assert where(r"numpy/", allowed=("python/array.c", "python/noise.c")) == []


# what a file of each folder may include, besides its own folder; nothing points upwards
ANYBODY = {"tsad.h", "base.h"}
MAY_INCLUDE = {
    "net": ANYBODY | {"model.h", "vision.h", "plan/plan_core.h"},
    "plan": ANYBODY | {"model.h", "net/net.h"},
    "stage": ANYBODY | {"policy.h", "plan/plan_core.h"},
    "cpu": ANYBODY | {"activate.h", "backend.h", "clock.h", "half.h", "vision.h"},
    "python": {"tsad.h"},
    "": {"net/net.h", "plan/program.h", "plan/plan_core.h", "stage/stage.h"},
}


def upward_includes(root: Path) -> list[str]:
    """Includes that the table above does not allow, as "file includes header"."""
    found = []
    for file in sorted((root / "csrc").rglob("*.[ch]")):
        name = file.relative_to(root / "csrc")
        folder = "" if len(name.parts) == 1 else name.parts[0]
        for header in re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.M):
            beside = file.parent / header
            where = beside if beside.exists() else root / "csrc" / header
            to = where.resolve().relative_to((root / "csrc").resolve())
            own = to.parts[0] == folder if folder else len(to.parts) == 1
            if not own and to.as_posix() not in MAY_INCLUDE[folder]:
                found.append(f"{name.as_posix()} includes {to.as_posix()}")
    return found


def test_nothing_points_upwards() -> None:
    assert upward_includes(ROOT) == []
    for folder in ("stage/", "net/", "plan/"):
        assert where(r"immintrin|__AVX|pthread|atomic_(load|store|fetch)", folder=folder) == []
    assert where(r"tsad_(encode|prune|plan|denoise)\(|SeedSequence|diffusion", folder="cpu/") == []


@pytest.mark.parametrize(
    ("file", "header"),
    [
        ("cpu/run.c", "../policy.h"),
        ("cpu/run.c", "../stage/stage.h"),
        ("stage/encode.c", "../cpu/cpu.h"),
        ("net/dpt.c", "../backend.h"),
        ("plan/program.c", "../backend.h"),
        ("python/array.c", "../policy.h"),
        ("chunk.c", "cpu/worker.h"),
    ],
)
def test_a_planted_upward_include_is_found(tmp_path: Path, file: str, header: str) -> None:
    import shutil

    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    planted = tmp_path / "csrc" / file
    planted.write_text(f'#include "{header}"\n' + planted.read_text())
    to = (planted.parent / header).resolve().relative_to(tmp_path / "csrc").as_posix()
    assert upward_includes(tmp_path) == [f"{file} includes {to}"]


def test_the_page_on_architecture_names_what_is_there() -> None:
    page = ROOT / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("needs docs/")
    paths = r"`((?:csrc|cuda|tsad|tests|bench|notebooks)/[\w./]*)`"
    named = {ROOT / name for name in re.findall(paths, page.read_text())}
    assert len(named) > 50 and [path for path in named if not path.exists()] == []
    folders = {path.parent for path in [*CORE, *PYTHON]} - {ROOT / "csrc", ROOT / "tsad"}
    assert folders - {path if path.is_dir() else path.parent for path in named} == set()


def test_the_core_allocates_in_one_file_and_never_leaves_the_process() -> None:
    allowed = ("arena.c",)
    hits = where(r"\b(malloc|calloc|realloc|free|aligned_alloc)\(", allowed=allowed)
    assert [hit for hit in hits if not hit.startswith("python/")] == []
    assert where(r"\b(exit|abort|printf|fprintf|puts|perror)\(") == []


def test_files_and_functions_keep_their_size() -> None:
    for file in [*CORE, *PYTHON]:
        most = 700 if file.name == "simd.h" else 600  # kernels, in one file for every vector
        assert len(file.read_text().splitlines()) <= most, file
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
    unit.write_text('#include "tsad.h"\n#include "plan/plan_core.h"\n')
    for compiler, language in (("gcc", "c"), ("g++", "c++")):
        command = [compiler, "-x", language, "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(unit)], check=True)
