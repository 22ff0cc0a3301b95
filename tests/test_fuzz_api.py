"""Some seconds of the random calls of `tests/fuzz/api.py`, and what they would find."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FUZZ = Path(__file__).parent / "fuzz"

pytestmark = pytest.mark.filterwarnings("ignore")  # what the folders say when they load


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    sys.path.insert(0, str(FUZZ))
    yield
    sys.path.remove(str(FUZZ))


@pytest.mark.parametrize("seed", range(8))
def test_a_world_of_random_calls(seed: int) -> None:
    from api import World

    world = World(seed)
    world.run()
    assert 20 < world.refused < world.calls  # both kinds happen


def run_until_found(world: Any) -> None:
    with pytest.raises(AssertionError):
        world.run(400)


def test_a_bit_that_differs_is_found() -> None:
    from api import World

    class Other:
        """The twin, but for the last bit of an action in twenty chunks."""

        def __init__(self, policy: Any) -> None:
            vars(self).update(policy=policy, chunks=0)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.policy, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.policy, name, value)

        def __call__(self, obs: Any, **options: Any) -> Any:
            got = self.policy(obs, **options)
            vars(self)["chunks"] += 1
            if self.chunks % 20 == 0:
                got.flat[0] = np.nextafter(got.flat[0], np.float32(np.inf))
            return got

    world = World(0)
    world.twin = Other(world.twin)
    run_until_found(world)


def test_a_refused_call_that_changes_something_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from api import World

    from tsad import SparsePolicy

    call = SparsePolicy.__call__

    def hasty(self: Any, obs: Any, **options: Any) -> Any:
        try:
            return call(self, obs, **options)
        except ValueError:
            self.reset(lanes=[0], seed=[0])  # what it should not
            raise

    monkeypatch.setattr(SparsePolicy, "__call__", hasty)
    run_until_found(World(0))
