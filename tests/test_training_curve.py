"""bench/training_curve.py: results stand at the age of the weights that they are of."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1] / "bench"))

import training_curve  # noqa: E402
from demonstrations import TINY, standing_demonstrations  # noqa: E402

from tsad.sim.results import Journal  # noqa: E402
from tsad.sim.rollout import Episode  # noqa: E402
from tsad.training.train import Trainer  # noqa: E402


def results(path: Path, digest: str, seeds: range, score: float) -> Path:
    settings: dict[str, Any] = {"files_sha256": {"model.safetensors": digest}}
    settings |= {"sampler": "ddim", "num_inference_steps": 8, "sparsity": 0.0}
    journal = Journal(path, settings)
    for seed in seeds:
        journal.append(Episode(seed, score, score >= 1, 10, 2, 1.0, 1.0))
    episodes = [vars(e) for e in journal.episodes.values()]
    header = {"format": "tsad-eval", "format_version": 1, "settings": settings}
    journal.finish({**header, "episodes": episodes})
    return path


def test_points_are_of_their_weights_and_minutes_add_up(tmp_path, capsys) -> None:
    demos = standing_demonstrations(tmp_path)
    for name in ("a", "b"):
        Trainer([demos], tmp_path / name, TINY).fit(keep_every=10)
        for config in sorted((tmp_path / name).rglob("config.json")):
            facts = json.loads(config.read_text())
            facts["provenance"]["training"]["seconds"] = (
                60.0 * facts["provenance"]["training"]["step"]
            )
            facts["provenance"]["sha256"]["model.safetensors"] = f"{name}/{config.parent.name}"
            config.write_text(json.dumps(facts))
    evals = [
        results(tmp_path / "1.json", "b/step-000010", range(5), 0.8),
        results(tmp_path / "2.json", "b/step-000010", range(5, 10), 1.0),
        results(tmp_path / "3.json", "another", range(5), 0.1),
        results(tmp_path / "4.json", "a/a", range(5), 0.5),
    ]
    words = [str(tmp_path / "a"), str(tmp_path / "b"), "--evals", *map(str, evals)]
    training_curve.main([*words, "--json", str(tmp_path / "c.json")])
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [row["minutes"] for row in rows] == [0, 20, 30]
    assert [row["steps"] for row in rows] == [0, 20, 30]
    assert rows[2]["score"]["mean"] == pytest.approx(0.9) and rows[2]["success"]["mean"] == 0.5
    assert "score 0.900  success 0.500  (10)" in capsys.readouterr().out
    again = results(tmp_path / "5.json", "a/a", range(4, 6), 0.5)
    with pytest.raises(SystemExit, match="has a seed in two results"):
        training_curve.main([*words, str(again)])
    pytest.importorskip("matplotlib")
    training_curve.main([*words, "--out", str(tmp_path / "c.png")])
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
