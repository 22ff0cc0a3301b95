"""bench/closed_loop_fit.py: what its four numbers do to a setting."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tsad
from tsad.setting import Setting

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import closed_loop_fit  # noqa: E402

NOTHING = dict.fromkeys(closed_loop_fit.NAMES, 0.0)
WARM = Setting(
    sampler="ddim", num_inference_steps=16, timestep_spacing="trailing", warm_start=8,
    plan="10000000",
)  # fmt: skip


def horizons(setting: Setting) -> Any:
    """(2, horizon, action_dim): a cold chunk and a warm one after it, normalised."""
    policy = closed_loop_fit.loaded("pusht", setting)
    policy.reset(seed=[3] * policy.lanes)
    obs = np.random.default_rng(0).uniform(100, 400, (policy.lanes, 2, 20)).astype(np.float32)
    scheme = policy.config["normalizer"]["action"]
    found = [policy(obs, return_horizon=True)[0].copy() for _ in range(2)]
    return [x * np.array(scheme["scale"]) + np.array(scheme["offset"]) for x in found]


def test_nothing_moved_changes_nothing() -> None:
    plain = horizons(WARM)
    fitted = horizons(closed_loop_fit.moved("pusht", WARM, NOTHING))
    for one, other in zip(plain, fitted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_a_gain_is_a_line_over_the_executed_actions() -> None:
    x = {**NOTHING, "first": 0.1, "last": 0.38}
    cold, plain = horizons(WARM)
    _, moved = horizons(closed_loop_fit.moved("pusht", WARM, x))
    start = np.concatenate([cold[8:], np.repeat(cold[-1:], 8, 0)])  # eight were executed
    share = (np.arange(10) - 1) / 7
    gain = (0.1 + 0.28 * share)[:, None]
    np.testing.assert_allclose(moved, plain + gain * (plain - start), rtol=0, atol=5e-6)


def test_the_output_s_factor_is_one_of_every_row() -> None:
    changed = closed_loop_fit.moved("pusht", WARM, {**NOTHING, "eps": 0.5}).fitted
    same = closed_loop_fit.moved("pusht", WARM, NOTHING).fitted
    ratio = np.array(changed.coefficients) - np.array(same.coefficients)
    expected = np.zeros_like(ratio)
    expected[:, [1, 4]] = 0.5 * np.array(same.coefficients)[:, [1, 4]]  # b and f
    np.testing.assert_allclose(ratio, expected, rtol=0, atol=1e-6)


def test_a_lead_is_not_negative() -> None:
    assert closed_loop_fit.moved("pusht", WARM, {**NOTHING, "lead": -0.2}).lead == 0
    assert closed_loop_fit.moved("pusht", WARM, {**NOTHING, "lead": 0.2}).lead == 0.2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("nothing", "argument --row: expected one of ddim-8"),
        ("ddim-8", "argument --row: expected one that starts warm"),
        ("ddim-16-trailing-warm-8-row-0-closed-loop-int16-smooth-lead-0.26", "not fitted yet"),
    ],
)
def test_rows_that_it_can_not_begin_with(
    row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Path(tsad.__file__).parents[1] / "bench" / "frontier" / "closed_loop_fit.json"
    words = ["pusht", "--settings", str(settings), "--row", row, "--out", str(tmp_path / "x")]
    with pytest.raises(SystemExit):
        closed_loop_fit.main(words)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
