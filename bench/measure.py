"""Percentiles of rounds, the machine in words, and who else was on it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tsad.statistics import percentile

PACKAGES = ("numpy", "torch", "onnx", "onnxruntime", "openvino", "onnxscript", "tsad-policy")


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """What rounds of times, in milliseconds, amount to.

    `best_p50`: the median of the fastest round, what the machine can do. `p50`: the median of the
    rounds' medians, what a user sees. `spread`: the fastest and the slowest round's median. `p90`
    and `p99` are over all chunks, None if they are too few. `min`, `mean`, `max` over all.
    """
    medians = [float(np.median(times)) for times in rounds]
    pooled = [value for times in rounds for value in times]
    return {
        "best_p50": min(medians),
        "p50": float(np.median(medians)),
        "p90": percentile(pooled, 90),
        "p99": percentile(pooled, 99),
        "spread": [min(medians), max(medians)],
        "min": min(pooled),
        "mean": float(np.mean(pooled)),
        "max": max(pooled),
        "rounds": len(rounds),
        "chunks": len(pooled),
    }


def settled(rounds: Sequence[Sequence[float]], tolerance: float) -> bool:
    """Do the two fastest rounds agree? If not, the fastest may be luck, or the rest disturbed."""
    medians = sorted(float(np.median(times)) for times in rounds)
    return len(medians) > 1 and medians[1] <= medians[0] * (1 + tolerance)


class Load:
    """CPU time that others took while this process ran, from /proc/stat.

    After `stop`: `foreign` is the mean number of cores taken by other processes, `steal` that taken
    by other guests of the host (which is often not reported), both None where there is no /proc.
    """

    def __init__(self) -> None:
        self._begin = self._read()
        self.foreign: float | None = None
        self.steal: float | None = None

    @staticmethod
    def _read() -> tuple[float, float, float, float] | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            user, nice, system, _, _, irq, soft, steal = (int(value) for value in fields)
            tick = os.sysconf("SC_CLK_TCK")
            busy = (user + nice + system + irq + soft) / tick
            return busy, steal / tick, time.process_time(), time.monotonic()
        return None

    def stop(self) -> Load:
        end = self._read()
        if self._begin is not None and end is not None:
            busy, steal, own, wall = (b - a for a, b in zip(self._begin, end, strict=True))
            if wall > 0:
                self.foreign = max(0.0, (busy - own) / wall)
                self.steal = max(0.0, steal / wall)
        return self


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """A process that never rests, on the last of this process's cores, while the block runs."""
    core = max(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it is there
        yield
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_quiet(seconds: float, cores: float = 0.15) -> None:
    """Wait until others use less than `cores` cores, but not longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        load = Load()
        time.sleep(0.2)
        load.stop()
        if load.foreign is None or load.foreign < cores:
            return


def _lscpu() -> dict[str, str]:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        text = subprocess.run(
            ["lscpu"], check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
        ).stdout
        pairs = (line.partition(":")[::2] for line in text.splitlines())
        return {key.strip(): value.strip() for key, value in pairs}
    return {}


def _compiler() -> str | None:
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = [os.environ.get("CC", "cc"), "--version"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(
            "\n", 1
        )[0]
    return None


def commit() -> str | None:
    """The tree's commit, with "+" where files differ from it."""
    root = Path(__file__).parents[1]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return None


def machine() -> dict[str, Any]:
    """Processor, memory, system and versions, as far as this system tells them."""
    facts = _lscpu()
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    memory = None
    with contextlib.suppress(OSError, ValueError):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return {
        "cpu": facts.get("Model name") or platform.processor() or platform.machine(),
        "family": facts.get("CPU family"),
        "model": facts.get("Model"),
        "stepping": facts.get("Stepping"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads_per_core": facts.get("Thread(s) per core"),
        "hypervisor": facts.get("Hypervisor vendor"),
        "caches": {key: facts[f"{key} cache"] for key in ("L1d", "L2", "L3") if
                   f"{key} cache" in facts},
        "flags": sorted(facts.get("Flags", "").split()),
        "memory_gib": memory,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": _compiler(),
        "versions": versions,
        "commit": commit(),
    }  # fmt: skip


def slug(facts: dict[str, Any]) -> str:
    """A processor's name for a file: "amd-epyc-25-17" (names alone are vague in guests)."""
    words = [facts["cpu"], facts.get("family") or "", facts.get("model") or ""]
    name = re.sub(r"\((r|tm)\)|\b(cpu|processor|core)\b|@.*", " ", " ".join(words[:1]).lower())
    return re.sub(r"[^a-z0-9]+", "-", " ".join([name, *words[1:]])).strip("-")
