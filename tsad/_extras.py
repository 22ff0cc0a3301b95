"""Optional packages: imported where they are used, with errors that name the extra."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed; the message says how to get it."""


def require(module: str, *, extra: str, purpose: str) -> Any:
    """Import `module`, or say which extra brings it.

    Args:
        module: dotted name, e.g. "matplotlib.figure".
        extra: the extra of the distribution that brings it, e.g. "sim".
        purpose: what the caller wanted it for; begins the error message.

    Raises:
        MissingExtraError: the module, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{purpose} needs the Python package '{error.name}', which is not installed; "
            f"fix: pip install 'tsad-policy[{extra}]'"
        ) from error


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those distributions that are installed."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def version() -> str:
    """That of tsad."""
    return package_versions(["tsad-policy"]).get("tsad-policy", "0+unknown")  # built in place
