"""The loaders on the fuzzer's corpus and on files made of it; `tests/fuzz` has the fuzzer."""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
CORPUS = FUZZ / "corpus"
SECONDS, MEGABYTES, FILES = 20, 400, 60


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    sys.path.insert(0, str(FUZZ))
    yield
    sys.path.remove(str(FUZZ))


NAMES = sorted(path.name for path in CORPUS.iterdir())


def corpus(name: str) -> list[Path]:
    return sorted((CORPUS / name).iterdir())


def test_every_target_has_a_corpus_and_it_is_small() -> None:
    from targets import TARGETS

    assert set(NAMES) == set(TARGETS)
    assert sum(path.stat().st_size for name in NAMES for path in corpus(name)) < 150_000


@pytest.mark.parametrize("name", NAMES)
def test_good_files_load_and_others_are_refused(tmp_path: Path, name: str) -> None:
    from targets import check

    for path in corpus(name):
        said = check(name, path.read_bytes(), tmp_path)
        assert not path.name.startswith("good") or said == "", path.name


@pytest.mark.parametrize("name", NAMES)
def test_files_made_of_the_corpus(tmp_path: Path, name: str) -> None:
    """The same ones every time, in bounded time and memory."""
    from mutate import mutate, noise
    from targets import check

    draw = random.Random(name)
    seeds = [path.read_bytes() for path in corpus(name)]
    refused = 0
    tracemalloc.start()
    try:
        for _ in range(FILES):
            content = draw.choice(seeds)
            for _ in range(draw.choice((1, 1, 2, 3))):
                content = mutate(content, 1 << 16, draw, noise(draw))
            (tmp_path / "last").write_bytes(content)  # for whoever looks into a failure
            started = time.process_time()
            refused += check(name, content, tmp_path) != ""
            assert time.process_time() - started < SECONDS
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()
    assert refused > FILES // 4
