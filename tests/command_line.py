"""A command line run in this process, for tests."""

from __future__ import annotations

from typing import Any

from tsad import cli


def run(capsys: Any, *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    try:
        code = cli.main(list(argv))
    except SystemExit as leave:
        code = int(leave.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err
