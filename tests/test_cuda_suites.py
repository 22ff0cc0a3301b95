"""Suites of the engine, of its edge, of plans and of policies, with all their policies on the
emulated GPU. tests/cuda_everywhere.py says how, and what of them is skipped there.

Always those that take seconds; `pytest -m long tests/test_cuda_suites.py` runs all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_library import SANITIZED, need_compiler

FOLDER = Path(__file__).parent
OFTEN = (
    *("test_sums.py", "test_engine.py", "test_edge.py", "test_bad_input.py", "test_warm.py"),
    *("test_overflow.py", "test_setting.py", "test_rewrites.py", "test_bad_settings.py"),
    *("test_audit.py", "test_row_rules.py"),  # which are refused there
)
LONG = (
    *("threads_share_the_pruners_steps", "several_threads", "gangs_of_lanes", "or_lanes and odd"),
    *("thousand_random_plans", "another_thread", "second_thread", "one_model_run_in_threads"),
    *("long_episodes and 2-cuda", "good_calls", "test_load", "tail_is_what_diffusers"),
    *("bundled_policy", "call_that_overflows", "large_numbers"),
)
WHOLE = {  # how many pass at least
    "test_sums.py": 6,
    "test_engine.py": 40,
    "test_edge.py": 50,
    "test_bad_input.py": 101,
    "test_warm.py": 66,
    "test_overflow.py": 31,
    "test_plan.py": 30,
    "test_plans_of_families.py": 5,
    "test_setting.py": 3,
    "test_settings.py": 116,
    "test_lanes.py": 181,
    "test_lead.py": 42,
    "test_samplers.py": 200,
    "test_dit.py": 28,
    "test_dit_policy.py": 36,
    "test_unet1d.py": 25,
    "test_unet1d_policy.py": 6,
    "test_nodes.py": 6,
    "test_planners.py": 42,
    "test_rewrites.py": 44,
    "test_bad_settings.py": 31,
    "test_audit.py": 2,
    "test_row_rules.py": 1,
    "test_observations.py": 30,
    "test_interrupts.py": 11,
    "test_plan_errors.py": 2,
}


def run_there(library: str, *arguments: str) -> tuple[int, str]:
    """pytest's arguments; how many passed, where none failed, and what it said."""
    need_compiler()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-p", "cuda_everywhere", *arguments],
        env={**os.environ, "TSAD_CPU": "cuda", "TSAD_CUDA_LIBRARY": library, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    return int(passed[1]) if passed else 0, done.stdout


def test_what_takes_seconds_runs_on_it(emulated_cuda: str) -> None:
    if SANITIZED:
        names = "finish_at_different_times or know_their_age or mid_episode"
        passed, said = run_there(emulated_cuda, "tests/test_engine.py", "-k", names)
        assert passed >= 3, said[-500:]
        return
    files = [f"tests/{name}" for name in OFTEN]
    passed, said = run_there(emulated_cuda, *files, "-k", f"not ({' or '.join(LONG)})")
    assert passed >= 270, said[-500:]


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_suite_runs_on_it(name: str, emulated_cuda: str) -> None:
    passed, said = run_there(emulated_cuda, f"tests/{name}", "--durations=5")
    print(said)
    assert passed >= WHOLE[name], said[-2000:]
