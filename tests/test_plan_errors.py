"""bench/plan_errors.py on the bundled policy with a short sampler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsad import cli
from tsad.sim.recording import read_collection

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not BENCH.is_dir():
    pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(BENCH))

import plan_errors  # noqa: E402

SAMPLER = ["--sampler", "ddim", "--steps", "8", "--threads", "1"]


def test_rank_correlation_and_quantiles() -> None:
    assert plan_errors.rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert plan_errors.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    found = plan_errors.describe(np.array([1.0, 4.0, 4.0, 16.0]))
    assert found["rms"] == pytest.approx(2.5) and found["median"] == 2 and found["max"] == 4
    with pytest.raises(ValueError, match="made with the episodes"):
        plan_errors.check_apart({"effects": [1, 2]}, [2, 3])


def test_the_table(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("gym_pusht")
    pytest.importorskip("torch")
    from tsad.sim.pusht import PushT

    monkeypatch.setattr(PushT, "max_steps", 40)
    seen, others, effects = (str(tmp_path / name) for name in ("seen", "others", "effects.npz"))
    for folder, first in ((seen, "0"), (others, "5000")):
        command = ["collect", "pusht", "--out", folder, "--episodes", "2", "--first-seed", first]
        assert cli.main([*command, *SAMPLER]) == 0
    command = ["plan", "measure", "pusht", "--data", seen, "--out", effects, "--chunks", "10"]
    assert cli.main([*command, *SAMPLER]) == 0
    made = str(tmp_path / "made.npz")
    command = ["plan", "make", "uniform", "pusht", "--sparsity", "0.75", "--out", made]
    assert cli.main([*command, *SAMPLER]) == 0
    out = tmp_path / "errors.json"
    argv = [effects, others, "--out", str(out), "--lanes", "5", "--cells", "12"]
    assert plan_errors.main([*argv, "--sparsity", "0.5", "0.75", "--plan", f"mine={made}"]) == 0
    document = json.loads(out.read_text())
    plans = document["plans"]
    assert document["observations"] == 10 and document["seeds"] == [5000, 5001]
    assert len(document["files_sha256"]["model.safetensors"]) == 64
    assert plans["mine"]["0.75"]["error"] == plans["uniform"]["0.75"]["error"]
    for by_sparsity in plans.values():
        for asked, row in by_sparsity.items():
            assert row["sparsity"] >= float(asked) - 1e-9
    dial = document["dial"]
    assert all(list(made) == ["0", "0.5", "0.8"] for made in dial.values())  # of eight steps
    assert all(b >= float(a) - 1e-9 for made in dial.values() for a, b in made.items())
    assert dial["bac"]["0.5"] == pytest.approx(0.5, abs=0.02)
    assert document["whole_plans"]["plans"] == 2 * len(plans) - 1
    assert set(document["single_cells"]["rank_correlation"]) == {*plan_errors.SINGLE, "all"}
    assert "random cells 2" in capsys.readouterr().out
    with pytest.raises(ValueError, match="that are to test it"):
        plan_errors.main([effects, seen])

    # plain arrays: whoever made effects of them is told apart by what was seen
    arrays = {}
    for folder in (seen, others):
        _, episodes = read_collection(Path(folder))
        ends = np.cumsum([len(episode.obs) for episode in episodes])
        arrays[folder] = f"{folder}.npz"
        np.savez(arrays[folder], obs=np.concatenate([e.obs for e in episodes]), episode_ends=ends)
    command = ["plan", "measure", "pusht", "--data", arrays[seen], "--out", f"{effects}.npz"]
    assert cli.main([*command, "--chunks", "10", *SAMPLER]) == 0
    argv = [f"{effects}.npz", arrays[others], "--lanes", "5", "--cells", "0", "--sparsity", "0.5"]
    assert plan_errors.main([*argv, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["observations"] == 10 and all(isinstance(s, str) for s in found["seeds"])
    assert found["plans"]["uniform"]["0.5"]["error"]["rms"] > 0
    argv[1] = arrays[seen]
    with pytest.raises(ValueError, match="that are to test it"):
        plan_errors.main(argv)
