"""Is it worth choosing which chunks get more passes, at one to two of them? Paired seeds.

    tsad collect pusht --out recorded --first-seed 7000 --episodes 16 --sampler ddim --steps 16
    tsad collect pusht --out recorded --first-seed 6002 --episodes 1 --sampler ddim --steps 16
    python bench/passes_loop.py recorded --first-seed 25000 --seeds 300 --out loop.json

Chunks start from the one before, eight steps of DDIM-16 from the end, with a lead and smoothing;
row 0 of these alone is one pass, rows 0 and 4 are two, rows 0, 2 and 5 three. At "1.33" a third of
the chunks has two passes, at "2.00" half of them three; beside them are one and two passes always.
What tells which chunks, at one average cost:

    every       turns (`tsad.planners.Turns`): every third, every other
    random      the same share, at random
    pruner      where the most is gained of the chunk's error, as foreseen from the observation
    another's   the pruner's choices in an episode of the recording, chunk by chunk

What a chunk gains, the logarithm of what more passes take off the squared error of one, both beside
all eight with the same start and noise, mean of `--draws`, is learned from the recorded chunks
(kernel ridge regression on the tokens of the observation and their change since the chunk before,
width and ridge by folds over episodes); the price is what that share of the recorded chunks
exceeds, each foreseen from other episodes. Differences are the pruner's to each row, the intervals
of a level hold together. FILE is written after every seed, and what the chunks lose beside it,
FILE-errors.npz, before; the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pruner_inputs import RIDGES, WIDTHS, fitted, standardised  # noqa: E402
from pruner_loop import OWN, Arm, document_of, lines_of, play, summary  # noqa: E402

import tsad  # noqa: E402
from tsad import sim  # noqa: E402
from tsad.arrays import read_npz  # noqa: E402
from tsad.commands.common import table  # noqa: E402
from tsad.files import write_atomically, write_json  # noqa: E402
from tsad.load import read_policy  # noqa: E402
from tsad.planners import Turns  # noqa: E402
from tsad.planners.files import from_steps  # noqa: E402
from tsad.samplers import make_sampler  # noqa: E402
from tsad.sim.observations import read_observations  # noqa: E402
from tsad.training.pruner_net import Memory  # noqa: E402
from tsad.training.sensitivity import Twin  # noqa: E402

SETTING = {
    "sampler": "ddim",
    "num_inference_steps": 16,
    "timestep_spacing": "trailing",
    "warm_start": 8,
}
LEVELS = {"1.33": ("10000000", "10001000", 3), "2.00": ("10000000", "10100100", 2)}


class Gains:
    """What chunks gain from more passes; foreseen from an observation and the one before."""

    def __init__(self, memory: Memory, episodes: list[Any]) -> None:
        self.memory = memory
        self.inputs = [self.looked_at(one.obs) for one in episodes]
        self.episode = np.repeat(np.arange(len(episodes)), [len(x) for x in self.inputs])
        self.x = np.concatenate(self.inputs)

    def looked_at(self, obs: Any) -> Any:
        """(C, n): of successive observations; the first has changed by nothing."""
        tokens = self.memory.tokens(np.asarray(obs, np.float32)).flatten(1).numpy()
        change = np.diff(tokens, axis=0, prepend=tokens[:1])
        return np.concatenate([tokens, change], 1).astype(np.float64)

    def foreseen(self, x: Any, gains: Any, train: Any, how: tuple[float, float]) -> Any:
        """Of inputs, learned from the recorded chunks that ``train`` picks."""
        n = int(train.sum())
        z = standardised(np.concatenate([self.x[train], x]), np.arange(n))
        return fitted(z[:n], gains[train], z[n:], *how)

    def held_out(self, gains: Any, how: tuple[float, float]) -> Any:
        """Of every recorded chunk, learned from other episodes; of those not measured as well."""
        said = np.zeros(len(self.x))
        for fold in range(5):
            test = self.episode % 5 == fold
            said[test] = self.foreseen(self.x[test], gains, ~test & np.isfinite(gains), how)
        return said


def errors_of(policy: Any, episodes: list[Any], draws: int, plans: dict[str, Any]) -> Any:
    """(plans, chunks): mean squared errors of executed actions, normalised, beside all steps.

    A chunk's start is the end of the chunk before, which was computed whole, as an episode's first.
    Chunks that begin an episode have none: NaN.
    """
    scale = np.asarray(policy.config["normalizer"]["action"]["scale"], np.float64)
    rng = np.random.default_rng(18)
    found = []
    for episode in episodes:
        found.append([np.nan] * len(plans))
        for before, obs in itertools.pairwise(episode.obs):
            squares = np.zeros(len(plans))
            for _ in range(draws):
                noise = rng.standard_normal((2, 1, policy.horizon, policy.action_dim), np.float32)
                ends = []
                for plan in (tsad.planners.dense(policy), *plans.values()):
                    policy.reset()
                    policy.plan = plan
                    policy(before, noise=noise[0])
                    ends.append(np.asarray(policy(obs, noise=noise[1])) * scale)
                squares += [((end - ends[0]) ** 2).mean() for end in ends[1:]]
            found.append(list(squares / draws))
        print(f"{episode.name}: {rms(found)}", file=sys.stderr, flush=True)
    return np.array(found).T


def rms(squares: Any) -> Any:
    """Of what was measured so far, a number for each plan."""
    return np.round(np.sqrt(np.nanmean(np.array(squares), 0)), 4)


def level_of(policy: Any, gains: Gains, found: Any, cheap: Any, dear: Any, every: int) -> Any:
    """The price, how well gains were foreseen (R2), and the rows of a level."""
    known = np.isfinite(found)

    def missed(how: tuple[float, float]) -> float:
        return float(((found - gains.held_out(found, how))[known] ** 2).mean())

    how = min(((width, ridge) for width in WIDTHS for ridge in RIDGES), key=missed)
    said = gains.held_out(found, how)
    price = float(np.quantile(said[known], 1 - 1 / every))
    r2 = 1 - missed(how) / float(found[known].var())
    recorded = [said[gains.episode == i] for i in range(len(gains.inputs))]

    def own(arm: Arm, obs: Any) -> Any:
        before = obs if arm.chunk == 0 else arm.before
        arm.before = np.array(obs)
        x = gains.looked_at(np.stack([before, obs]))[1:]
        return dear if gains.foreseen(x, found, known, how)[0] >= price else cheap

    def another(arm: Arm, obs: Any) -> Any:
        some = recorded[arm.seed % len(recorded)]
        return dear if some[arm.chunk % len(some)] >= price else cheap

    return (
        {"price": price, "r2": r2, "width, ridge": list(how)},
        {
            "every": Arm(Turns(policy, cheap, dear, every=every), None),
            "random": Arm(Turns(policy, cheap, dear, share=1 / every), None),
            OWN: Arm(policy, own),
            "another's": Arm(policy, another),
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="recorded episodes")
    parser.add_argument("--policy", default="pusht")
    parser.add_argument("--lead", type=float, default=0.2, metavar="G")
    parser.add_argument("--draws", type=int, default=4, metavar="N")
    parser.add_argument("--seeds", type=int, default=300, metavar="N")
    parser.add_argument("--first-seed", type=int, required=True, metavar="S")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    how: dict[str, Any] = {**SETTING, "lead": args.lead, "smoothing": True, "threads": 1}
    policy = tsad.load(args.policy, precision="int16", **how)
    config, tensors, _ = read_policy(args.policy)
    memory = Memory(Twin(config, tensors, make_sampler(policy.config["scheduler"])))
    _, episodes = read_observations(args.data, policy)
    gains = Gains(memory, episodes)
    masks = sorted({mask for cheap, dear, _ in LEVELS.values() for mask in (cheap, dear)})
    plans = {mask: from_steps(policy, mask) for mask in masks}
    measured = args.out.with_name(f"{args.out.stem}-errors.npz")
    if not measured.exists():
        squares = errors_of(policy, episodes, args.draws, plans)
        write_atomically(measured, lambda file: np.savez(file, squares=squares))
    errors = dict(zip(plans, read_npz(measured)["squares"], strict=True))
    facts: dict[str, Any] = {
        "policy": args.policy,
        "sha256": policy.config["provenance"]["sha256"],
        "recorded": [one.name for one in episodes],
        "first_seed": args.first_seed,
        "setting": {**SETTING, "lead": args.lead, "precision": "int16", "draws": args.draws},
        "levels": {},
    }
    alone = {mask: Arm(policy, lambda arm, obs, plan=plan: plan) for mask, plan in plans.items()}
    levels = {}
    for name, (cheap, dear, every) in LEVELS.items():
        gain = np.maximum(errors[cheap] - errors[dear], 1e-3 * errors[cheap])
        said, rows = level_of(policy, gains, np.log(gain), plans[cheap], plans[dear], every)
        facts["levels"][name] = {"plans": [cheap, dear], **said}
        levels[name] = {**rows, **{mask: alone[mask] for mask in ("10000000", "10001000")}}
    print(facts["levels"], file=sys.stderr)
    document = document_of(args.out, facts, levels, parser)
    environment = sim.make("pusht")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        shared: dict[str, Any] = {}
        for level, rows in levels.items():
            for name, arm in rows.items():
                kept = document["episodes"][level][name]
                if str(seed) not in kept:
                    kept[str(seed)] = shared.get(name) or play(arm, environment, seed)
                if name in alone:
                    shared[name] = kept[str(seed)]
        write_json(args.out, document)
    document["summary"] = {level: summary(rows) for level, rows in document["episodes"].items()}
    write_json(args.out, document)
    for level, rows in document["summary"].items():
        print(f"{level} passes\n{table(lines_of(rows))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
