"""How well a chunk's error can be foreseen, by what is looked at: offline, with the controls.

    python bench/pruner_inputs.py recorded --plan bench/frontier/plans/ddpm-100-search-95.npz

Every chunk is run along the plan and with all computed, the noise the same; what is foreseen is the
logarithm of its squared error, of episodes that were not learned from (R2, folds over episodes), by
kernel ridge regression, whose width and ridge are chosen within the folds. Sets of inputs:
``tokens`` the policy's memory tokens of the observation, which a pruner sees; ``change`` those less
the chunk before's; ``tail`` the actions that the chunk before gave (of the first, its own);
``chunk`` its number in the episode. ``shuffled`` are the tokens of another chunk: the control.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tsad  # noqa: E402
from tsad import Plan  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.load import read_policy  # noqa: E402
from tsad.samplers import make_sampler  # noqa: E402
from tsad.sim.recording import read_collection, read_episode  # noqa: E402
from tsad.training.pruner_net import Memory  # noqa: E402
from tsad.training.sensitivity import Twin  # noqa: E402
from tsad.training.true_errors import TrueErrors  # noqa: E402

WIDTHS, RIDGES = (0.3, 1.0, 3.0), (0.1, 1.0, 10.0)
SETS = {
    "tokens": ("tokens",),
    "tokens, change": ("tokens", "change"),
    "tokens, tail": ("tokens", "tail"),
    "tokens, chunk": ("tokens", "chunk"),
    "all": ("tokens", "change", "tail", "chunk"),
    "shuffled": ("shuffled",),
}


def inputs_of(policy: Any, memory: Memory, folder: Path, episodes: Any) -> dict[str, Any]:
    """Of every chunk (N, ...), flat."""
    parts: dict[str, list[Any]] = {name: [] for name in ("tokens", "change", "tail", "chunk")}
    for episode in episodes:
        tokens = memory.tokens(episode.obs).flatten(1).numpy()
        actions = read_episode(folder, episode.number, "actions")
        said = actions.reshape(len(tokens), -1)
        parts["tokens"].append(tokens)
        parts["change"].append(np.diff(tokens, axis=0, prepend=tokens[:1]))
        parts["tail"].append(np.concatenate([said[:1], said[:-1]]))
        parts["chunk"].append(np.arange(len(tokens), dtype=np.float64)[:, None])
    found = {name: np.concatenate(some).astype(np.float64) for name, some in parts.items()}
    found["shuffled"] = found["tokens"][np.random.default_rng(0).permutation(len(found["tokens"]))]
    return found


def kernel(x: Any, others: Any, width: float) -> Any:
    """Gaussian, of standardised inputs, the distance per number."""
    squares = (x**2).sum(1)[:, None] + (others**2).sum(1) - 2 * x @ others.T
    return np.exp(-squares.clip(min=0) / (2 * width**2 * x.shape[1]))


def fitted(x: Any, y: Any, others: Any, width: float, ridge: float) -> Any:
    """What kernel ridge regression on (x, y) says of others."""
    mean = y.mean()
    weights = np.linalg.solve(kernel(x, x, width) + ridge * np.eye(len(x)), y - mean)
    return mean + kernel(others, x, width) @ weights


def standardised(x: Any, train: Any) -> Any:
    """Mean 0, standard deviation 1 on the training."""
    return (x - x[train].mean(0)) / np.maximum(x[train].std(0), 1e-9)


def foreseen(x: Any, y: Any, episode: Any, count: int, seed: int) -> Any:
    """(N,) predictions, five folds over episodes, ``count`` episodes to learn from in each."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(np.unique(episode))
    said = np.full(len(y), np.nan)
    for fold in range(5):
        held = names[fold::5]
        rest = rng.permutation(np.setdiff1d(names, held))[:count]
        test, train = np.isin(episode, held), np.isin(episode, rest)
        z = standardised(x, train)
        inner = rest[: max(len(rest) // 4, 1)]
        one, other = train & ~np.isin(episode, inner), train & np.isin(episode, inner)
        if not one.any():
            one = other
        best = min(
            ((w, r) for w in WIDTHS for r in RIDGES),
            key=lambda pair: float(
                ((fitted(z[one], y[one], z[other], *pair) - y[other]) ** 2).mean()
            ),
        )
        said[test] = fitted(z[train], y[train], z[test], *best)
    return said


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="a folder of tsad collect")
    parser.add_argument("--plan", required=True, metavar="FILE")
    parser.add_argument("--policy", default="pusht")
    parser.add_argument("--episodes", type=int, default=10**6, metavar="N", help="the first N")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th chunk")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 20, 60])
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    policy = tsad.load(args.policy, threads=1, precision="float32")
    config, tensors, _ = read_policy(args.policy)
    memory = Memory(Twin(config, tensors, make_sampler(policy.config["scheduler"])))
    episodes = read_collection(args.data)[1][: args.episodes]
    inputs = inputs_of(policy, memory, args.data, episodes)
    errors = TrueErrors(policy, [(e, slice(0, len(e.obs))) for e in episodes])
    plan, kept = Plan.load(args.plan), np.arange(0, len(errors), args.every)
    y = np.log(np.array([errors(i, plan) for i in kept]))
    episode = np.concatenate([np.full(len(e.obs), e.number) for e in episodes])[kept]
    rows = []
    counts = sorted({min(count, len(episodes) * 4 // 5) for count in args.counts})
    for name, parts in SETS.items():
        x = np.concatenate([inputs[part][kept] for part in parts], 1)
        for count in counts:
            found = []
            for seed in range(3):
                said = foreseen(x, y, episode, count, seed)
                found.append(float(1 - ((y - said) ** 2).sum() / ((y - y.mean()) ** 2).sum()))
            rows.append({"inputs": name, "episodes": count, "r2": found})
            print(rows[-1], file=sys.stderr, flush=True)
    lines = [["inputs", *(f"{count} episodes" for count in counts)]]
    for name in SETS:
        some = [row["r2"] for row in rows if row["inputs"] == name]
        lines.append(
            [name, *(f"{np.mean(r2):.2f} ({min(r2):.2f} to {max(r2):.2f})" for r2 in some)]
        )
    print(table(lines))
    if args.out is not None:
        facts = {"chunks": len(y), "episodes": len(episodes), "plan": Path(args.plan).name}
        write_json(args.out, facts | {"variance": float(y.var()), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
