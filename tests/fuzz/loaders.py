"""Feeds tsad's loaders with broken files, guided by what they execute.

    python tests/fuzz/loaders.py checkpoint                    until a finding or Ctrl-C
    python tests/fuzz/loaders.py plan -max_total_time=60       as libFuzzer's other options
    python tests/fuzz/loaders.py plan crash-0123               one file again

needs atheris (pip install atheris). `targets.py` says what a finding is.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import atheris
from mutate import mutate


def main(argv: list[str]) -> None:
    """Fuzz one target with atheris; further arguments are libFuzzer's."""
    with atheris.instrument_imports(include=["tsad", "pickletools"]):
        import targets

    name, options = argv[1], argv[2:]
    if name not in targets.TARGETS:
        sys.exit(f"expected one of {', '.join(targets.TARGETS)}, got {name!r}")
    here = Path(__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="tsad-fuzz-", dir=_memory()))
    counts = {"target": name, "executions": 0, "bytes": 0, "loaded": 0, "seconds": 0.0}
    begun = time.monotonic()
    statistics = os.environ.get("TSAD_FUZZ_STATISTICS")

    def one(content: bytes) -> None:
        counts["executions"] += 1
        counts["bytes"] += len(content)
        counts["loaded"] += not targets.check(name, content, folder)
        if statistics and counts["executions"] % 500 == 0:
            counts["seconds"] = round(time.monotonic() - begun, 1)
            Path(statistics).write_text(json.dumps(counts) + "\n")

    corpus = here / "corpus" / name
    seeds = [path.read_bytes() for path in sorted(corpus.iterdir())]

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        draw = random.Random(seed)
        if draw.random() < 0.3:  # what is broken in many places says little of any
            content = draw.choice(seeds)
        return mutate(content, most, draw, atheris.Mutate)

    if not any(not option.startswith("-") for option in options):
        options = [*options, str(corpus)]
    limits = ["-timeout=30", "-rss_limit_mb=2500", "-max_len=65536"]
    atheris.Setup([argv[0], *limits, *options], one, custom_mutator=mutated)
    atheris.Fuzz()


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    main(sys.argv)
