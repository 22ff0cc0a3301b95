"""A plugin of pytest: policies of the tests run on the emulated GPU unless they name a backend, and
tests of every backend are tests of this one.

TSAD_CUDA_LIBRARY=$PWD/emulated.so TSAD_CPU=cuda python -m pytest -p cuda_everywhere tests/...

A thread of the emulated GPU is slow: the widest networks are narrower here, with the same blocks,
some suites find a small policy where the bundled one is, and what only a CPU can do is skipped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator, Iterator

import cases
import pytest

from tsad import _core
from tsad.checkpoint import read_folder, write_folder
from tsad.config import PolicyConfig
from tsad.load import policy_folder

NARROWER = {"odd": 48, "blockpush": 32}
SMALLER = {"n_layer": 2, "n_head": 2, "n_emb": 16}
"""The bundled policy, with random weights, and its shape, in these suites, which ask of it that
chunks take a while."""
SUITES = ("test_interrupts", "test_observations", "test_plan_errors")
SOON = 60
"""Seconds: what is under way of a call ends before the call does, and takes its time here."""
REFUSED = ("got a CPU's integers", "planner: expected a CPU", "audit: expected a CPU")
"""What a GPU does not do, and says."""
NOT_HERE = {
    "test_a_hundred_thousand_chunks_do_not_grow": "hours",
    "test_no_allocation_while_a_chunk_runs": "a process of its own, of a CPU",
    "test_workers_keep_off_the_callers_core": "a process of its own, of a CPU",
    "test_the_same_observations_give_the_same_plans": "searches and sweeps thousands of chunks",
    "test_images": "image encoders are a CPU's",
    "test_a_command_that_has_just_begun": "a process of its own, of a CPU",
    "test_the_script_that_has_just_begun": "a process of its own, of a CPU",
    "test_facts": "asks which CPU it is",
    "test_registers_that_are_not_alive_together_share_memory": "asks what a thread takes",
    "test_every_command_takes_the_policy": "tsad tune tries a CPU's integers",
    "test_a_bad_call_is_refused_and_changes_nothing[cuda]": "no bad call",
    "test_a_bad_call_is_refused_and_changes_nothing[out on another device]": "no bad call",
}

LAUNCHED = ("test_one_long_chunk",)
"""Without graphs, which nobody stops."""

_core._load_backend(os.environ["TSAD_CUDA_LIBRARY"])
for name, width in NARROWER.items():
    cases.NETWORKS[name]["n_emb"] = width


@pytest.fixture(autouse=True, scope="module")
def bundled_policy_is_small(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """In `SUITES`."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ in SUITES:
            folder = tmp_path_factory.mktemp("bundled")
            policy = policy_folder("pusht")
            assert policy is not None
            config = read_folder(policy)[0].to_dict()
            network = config["network"] | SMALLER
            config = {key: config[key] for key in ("format", "format_version", "normalizer")} | {
                "network": network,
                "scheduler": config["scheduler"] | {"prediction_type": "sample"},
                "cost": config["cost"] | {"blocks": list(cases.block_costs(network))},
            }
            weights = cases.random_tensors(network, 0)
            write_folder(folder / "pusht", PolicyConfig.from_dict(config), weights)
            patch.setattr(sys.modules["tsad.load"], "_ASSETS", folder)
            patch.setitem(cases.NETWORKS, "pusht", cases.NETWORKS["pusht"] | SMALLER)
        if hasattr(request.module, "SOON"):
            patch.setattr(request.module, "SOON", SOON)
        yield


@pytest.fixture(autouse=True)
def long_chunks_are_launched(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of `LAUNCHED`."""
    if request.node.name.partition("[")[0] in LAUNCHED:
        monkeypatch.setenv("TSAD_CUDA_GRAPHS", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Before pytest reads the marks."""
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] == "backend":
            marks[i] = pytest.mark.parametrize("backend", ["cuda"]).mark


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that say nothing of a GPU."""
    for item in items:
        reason = NOT_HERE.get(item.name.partition("[")[0]) or NOT_HERE.get(item.name)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """A test of what is refused on a GPU is none of the GPU."""
    try:
        return (yield)
    except ValueError as error:
        if any(text in str(error) for text in REFUSED):
            pytest.skip(str(error))
        raise
