"""Tests of the engine and of its edge that name no backend, with all their policies on the
emulated GPU: those that take seconds there. tests/cuda_everywhere.py runs any others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from cuda_library import SANITIZED, need_compiler

TESTS = {
    "test_engine.py": (
        "test_lanes_that_finish_at_different_times",
        "test_rollout_slots_know_their_age",
        "test_a_rollout_plan_set_in_mid_episode_is_refused",
        "test_memory_is_a_short_ring_until_a_plan_reuses_rollouts",
        "test_the_pruner_plans_every_chunk_as_the_reference",
    ),
    "test_edge.py": (
        "test_out_is_written_in_place_and_returned",
        "test_shapes_of_the_contract",
        "test_a_seed_per_lane",
        "test_lanes_that_are_not_listed_stay_untouched",
        "test_reset_without_a_seed_continues_the_stream",
        "test_the_initial_sample_alone",
        "test_predict_noise_touches_no_state",
    ),
    "test_lanes.py": ("test_a_call_of_nobody_takes_and_gives_empty_arrays",),
    "test_bad_input.py": tuple(
        f"test_a_bad_call_is_refused_and_changes_nothing[{name}]"
        for name in ("float64", "rank 4", "misaligned", "noise of other steps", "out read-only",
                     "out over noise", "a failing producer", "unknown keyword")
    ),
}  # fmt: skip


def test_policies_that_name_no_backend_run_on_it(emulated_cuda: str) -> None:
    need_compiler()
    folder = Path(__file__).parent
    nodes = [f"{folder / file}::{name}" for file, names in TESTS.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-p", "cuda_everywhere", *(nodes if not SANITIZED else nodes[1:4])],
        env={**os.environ, "TSAD_CPU": "cuda", "TSAD_CUDA_LIBRARY": emulated_cuda,
             "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= (3 if SANITIZED else 25), done.stdout[-500:]
