"""The floors of tsad/: a module imports from its own floor and from those below, in no circle.

Counted are all imports of modules, at the top and inside functions, but those for type checkers.
That a package runs before what is in it is not counted: ``tsad`` itself would be below everything.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# from the ground up; a package stands for what is in it, but for what is named itself
FLOORS = (
    "_extras _program arrays attributes busy device files scope section statistics",  # files, words
    "families config checkpoint samplers fitted plan plot",  # what a policy and a plan are
    "planners reference",  # the method
    "setting rule presets policy image_policy cameras precision trust convert guard",  # what runs
    "load",
    "sim training recorder plot.frontier",  # episodes and data
    "tsad lerobot evaluation",  # what users import, and what commands do
    "commands cli __main__ gpu_check",
)
FLOOR = {
    name if name == "tsad" else f"tsad.{name}": number
    for number, names in enumerate(FLOORS)
    for name in names.split()
}


def modules(root: Path) -> dict[str, Path]:
    """The files of tsad/ by the names that they are imported by."""
    found = {}
    for path in sorted((root / "tsad").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(node: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The modules of tsad/ that are imported in a piece of source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in known)
        elif isinstance(child, ast.ImportFrom) and child.module in known:
            for alias in child.names:
                inner = f"{child.module}.{alias.name}"
                if alias.name != "_core":
                    yield inner if inner in known else child.module
        elif isinstance(child, ast.Call) and child.args:  # import_module("tsad.sim")
            first = child.args[0]
            named = isinstance(first, ast.Constant) and isinstance(first.value, str)
            if named and "import_module" in ast.dump(child.func) and first.value in known:
                yield first.value
        yield from imported(child, known)


def graph(root: Path) -> dict[str, set[str]]:
    """What each module imports."""
    known = modules(root)
    found = {
        name: set(imported(ast.parse(path.read_text()), known)) for name, path in known.items()
    }
    return {name: others - {name} for name, others in found.items()}


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of a circle; [] if there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def floor(name: str) -> int:
    """That of a module: the longest name in `FLOORS` that it begins with."""
    while name not in FLOOR:
        name, dot, _ = name.rpartition(".")
        assert dot and name != "tsad", "a module without a floor"
    return FLOOR[name]


def upward(found: dict[str, set[str]]) -> list[str]:
    """Imports from a higher floor, as "module imports module"."""
    return [
        f"{name} imports {other}"
        for name, others in found.items()
        for other in sorted(others)
        if floor(other) > floor(name)
    ]


def test_nothing_imports_in_circles_or_upwards() -> None:
    found = graph(ROOT)
    assert len(found) > 90 and len(FLOORS) <= 8
    assert found["tsad.plan"] >= {"tsad.plot", "tsad.plot.text", "tsad.files"}  # some are lazy
    assert circle(found) == [] and upward(found) == []


@pytest.mark.parametrize(
    ("file", "line", "says"),
    [
        ("plan", "from tsad.commands.show import run", "tsad.plan imports tsad.commands.show"),
        ("policy", "from tsad.load import load", "tsad.policy imports tsad.load"),
        ("sim/parallel", "import tsad", "tsad.sim.parallel imports tsad"),
        ("files", "from tsad import config", "tsad.files imports tsad.config"),
        ("load", "importlib.import_module('tsad.sim')", "tsad.load imports tsad.sim"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, line: str, says: str) -> None:
    ignore = shutil.ignore_patterns("assets", "*.so", "__pycache__")
    shutil.copytree(ROOT / "tsad", tmp_path / "tsad", ignore=ignore)
    planted = tmp_path / "tsad" / f"{file}.py"
    planted.write_text(planted.read_text() + f"\n\ndef _planted():\n    {line}\n")
    assert upward(graph(tmp_path)) == [says]


def test_a_planted_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "tsad").mkdir()
    (tmp_path / "tsad" / "__init__.py").write_text("")
    (tmp_path / "tsad" / "a.py").write_text("from tsad import b\n")
    (tmp_path / "tsad" / "b.py").write_text("def f():\n    from tsad.a import g\n")
    assert {"tsad.a", "tsad.b"} <= set(circle(graph(tmp_path)))


def test_importing_tsad_imports_numpy_alone() -> None:
    """Beside Python's own modules; not even where the others are installed."""
    code = (
        "import sys, tsad\n"
        "there = {name.partition('.')[0] for name in sys.modules}\n"
        "there -= set(sys.stdlib_module_names) | {'__main__', '__mp_main__'}\n"
        "print(*sorted(name for name in there if not name.startswith('_')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) - {"cython_runtime"} == {"numpy", "tsad"}  # that is NumPy's
