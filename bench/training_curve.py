"""Score and success against training time: what `tsad train-policy --keep-every` kept, scored.

    for p in run/step-* run; do tsad eval pusht --policy $p --seeds 100 --first-seed 10000 \\
        --sampler ddim --steps 8 --out evals/$(basename $p).json; done
    python bench/training_curve.py run [run2 ...] --evals evals/*.json --out curve.png --json c.json

Trainings that continue each other are given in order; minutes add up. A policy is told from its
weights' hash, so that a result can't be put at another's place; one of weights that none of the
trainings kept (what the first began with) stands at minute 0.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
Point = dict[str, Any]


def ages(trainings: Sequence[Path]) -> dict[str, tuple[float, int]]:
    """(minutes, steps) of training behind each policy, by the hash of its weights."""
    found: dict[str, tuple[float, int]] = {}
    minutes, steps = 0.0, 0
    for training in trainings:
        folders = [*sorted(training.glob("step-*")), training]
        for folder in folders:
            facts = json.loads((folder / "config.json").read_text())["provenance"]
            run = facts["training"]
            found[facts["sha256"][WEIGHTS]] = (minutes + run["seconds"] / 60, steps + run["step"])
        minutes, steps = found[facts["sha256"][WEIGHTS]]
    return found


def points(trainings: Sequence[Path], evals: Sequence[Path]) -> list[Point]:
    """One point per policy, by age; results of other seeds of one policy are pooled."""
    from tsad.sim.results import read_results, summarise

    known = ages(trainings)
    episodes: dict[str, list[Any]] = {}
    settings: dict[str, Any] = {}
    for path in evals:
        asked, played = read_results(path)
        episodes.setdefault(asked["files_sha256"][WEIGHTS], []).extend(played)
        settings = {k: asked[k] for k in ("sampler", "num_inference_steps", "sparsity")}
    rows = []
    for digest, played in episodes.items():
        minutes, steps = known.get(digest, (0.0, 0))
        seeds = sorted(episode.seed for episode in played)
        if len(set(seeds)) != len(seeds):
            raise SystemExit(f"the policy {digest[:8]} has a seed in two results; give one of them")
        rows.append(
            {"minutes": round(minutes, 1), "steps": steps, "sha256": digest}
            | {"first_seed": seeds[0], "last_seed": seeds[-1], **settings}
            | {k: v for k, v in summarise(played).items() if k in ("episodes", "score", "success")}
        )
    return sorted(rows, key=lambda row: (row["minutes"], row["sha256"]))


def plot(rows: Sequence[Point], out: Path) -> None:
    """Score and success with 95 % intervals against minutes of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from tsad.plot import save_figure

    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    minutes = [row["minutes"] for row in rows]
    for name, color, marker in (("score", "#0072B2", "o"), ("success", "#D55E00", "s")):
        means = [row[name]["mean"] for row in rows]
        nothing = (math.nan, math.nan)  # of too few episodes
        low, high = zip(*(row[name]["interval95"] or nothing for row in rows), strict=True)
        ax.plot(minutes, means, color=color, marker=marker, label=name)
        ax.fill_between(minutes, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set(ylim=(0, 1), xlabel="minutes of training", ylabel="mean of the episodes")
    ax.legend(loc="center right", frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    save_figure(figure, out)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trainings", nargs="+", type=Path, help="folders of tsad train-policy")
    parser.add_argument("--evals", nargs="+", type=Path, required=True, help="of tsad eval --out")
    parser.add_argument("--out", type=Path, help="the picture to make")
    parser.add_argument("--json", type=Path, help="the points as JSON")
    args = parser.parse_args(argv)
    rows = points(args.trainings, args.evals)
    for row in rows:
        score, success = row["score"], row["success"]
        print(
            f"{row['minutes']:6.1f} min {row['steps']:6} steps  {row['sha256'][:8]}  "
            f"score {score['mean']:.3f}  success {success['mean']:.3f}  ({row['episodes']})"
        )
    if args.out:
        plot(rows, args.out)
    if args.json:
        from tsad.files import write_json

        write_json(args.json, rows)


if __name__ == "__main__":
    main()
