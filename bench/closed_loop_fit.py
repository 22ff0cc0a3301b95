"""Fitting a warm start's bias and the lead by what episodes score, not by recorded chunks.

    pip install cma
    python bench/closed_loop_fit.py pusht --settings bench/frontier/lead_1500.json \\
        --row ddim-16-trailing-warm-8-row-0-int16-smooth-lead-0.25 --out loop

`tsad fit` makes a sparse warm chunk like many dense steps, and knows no score. This plays: CMA-ES
(`cma`) over four numbers of a row of a settings file that starts warm,

    first, last   the gain of an action's move from the start, of the first and the last executed
                  action, a line between and beyond; what is predicted changes, as with `tsad fit`
    eps           a factor of the network's output, less one
    lead          of the executed actions alone, as the row's own

so as to raise the mean score of `--seeds` episodes, other ones in every generation and the same for
all its candidates. It begins at the row as it is. The mean after the last generation is the result:
no candidate is picked, which would pick luck. DIR/fitted.json and DIR/settings.json have it and the
row that it came from, for `tsad eval --settings` on seeds that were never played here; DIR/fit.json
has every candidate and its scores, is written after every generation, and the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

import tsad
from tsad import sim
from tsad.arrays import read_any_json
from tsad.evaluation.loading import setting_of
from tsad.evaluation.sweep import read_settings
from tsad.evaluation.usage import UsageError
from tsad.files import write_atomically, write_json
from tsad.fitted import FITTED, Fitted, coefficients_of, rows_of
from tsad.load import weights_sha256
from tsad.samplers import make_sampler, tail
from tsad.setting import Setting, steady_sha256

NAMES = ("first", "last", "eps", "lead")
SCALES = (1.0, 1.0, 0.2, 1.5)  # of the search's steps: a score falls fast with a wrong output
LANES = 10


def loaded(source: str, setting: Setting) -> Any:
    """The policy as a worker plays it."""
    policy = tsad.load(source, lanes=LANES, threads=1, **setting.options())
    setting.apply(policy)
    return policy


def moved(source: str, setting: Setting, x: dict[str, float]) -> Setting:
    """The setting with these four numbers."""
    policy = loaded(source, replace(setting, fitted=None))
    warm = policy.warm_start
    assert warm is not None
    sampler = tail(make_sampler(policy.config["scheduler"]), warm)
    table = coefficients_of(sampler)
    # a step makes c (a x + b e) + d x + f e + g of what came before: b and f are of the output
    for name in ("b", "f"):
        table[:, FITTED.index(name)] *= 1 + x["eps"]
    begins, n = policy.n_obs_steps - 1, policy.n_action_steps
    share = (np.arange(policy.horizon) - begins) / max(n - 1, 1)
    gain = x["first"] + share * (x["last"] - x["first"])
    gain = np.repeat(gain[:, None], policy.action_dim, 1)
    scheduler = policy.config["scheduler"]
    sha256 = steady_sha256(policy)
    assert sha256 is not None
    fitted = Fitted(
        model_sha256=weights_sha256(source),
        sampler=scheduler["type"],
        num_inference_steps=scheduler["num_inference_steps"],
        timestep_spacing=scheduler["timestep_spacing"],
        warm_start=warm,
        plan_sha256=sha256,
        n_action_steps=n,
        coefficients=rows_of(table),
        gain=rows_of(gain),
        shift=rows_of(np.zeros_like(gain)),
        measured={"closed loop": x},
    )
    return replace(setting, fitted=fitted, lead=max(x["lead"], 0.0))


def scores(
    source: str, setting: Setting, simulator: str, x: dict[str, float], seeds: list[int]
) -> list[list[float]]:
    """Score and success of each seed."""
    policy = loaded(source, moved(source, setting, x))
    environments = [sim.make(simulator) for _ in range(min(LANES, len(seeds)))]
    try:
        played = list(sim.rollouts(policy, environments, seeds))
    finally:
        for environment in environments:
            environment.close()
    return [[e.score, float(e.success)] for e in sorted(played, key=lambda e: e.seed)]


class Search:
    """CMA-ES whose generations are kept; what was asked before is asked again, and known."""

    def __init__(self, facts: dict[str, Any], out: Path) -> None:
        self.file = out / "fit.json"
        self.document: dict[str, Any] = {"facts": facts, "generations": []}
        if self.file.exists():
            before = read_any_json(self.file)
            if before["facts"] != facts:
                raise UsageError(
                    f"argument --out: {self.file} is of another search; name another folder"
                )
            self.document = before
        options = {
            **{"popsize": facts["population"], "seed": facts["seed"], "verbose": -9},
            "CMA_stds": facts["scales"],
        }
        import cma  # which nothing else here needs

        self.strategy = cma.CMAEvolutionStrategy(facts["begin"], facts["sigma"], options)
        for generation in self.document["generations"]:
            asked = np.array(self.strategy.ask())
            if not np.allclose(asked, generation["candidates"], rtol=0, atol=1e-9):
                raise UsageError(
                    f"argument --out: this version of cma asks otherwise than that of {self.file}; "
                    "name another folder"
                )
            self._tell(asked, generation["scores"])

    def _tell(self, asked: Any, found: list[list[list[float]]]) -> None:
        self.strategy.tell(list(asked), [-float(np.mean(one, 0)[0]) for one in found])

    @property
    def mean(self) -> dict[str, float]:
        """What is found so far."""
        return dict(zip(NAMES, map(float, self.strategy.mean), strict=True))

    def generation(self, play: Any) -> str:
        """Ask, play, tell, keep; in words."""
        began, number = time.monotonic(), len(self.document["generations"])
        asked = np.array(self.strategy.ask())
        found = play(number, [dict(zip(NAMES, map(float, x), strict=True)) for x in asked])
        self._tell(asked, found)
        kept = {"candidates": asked.tolist(), "scores": found, "mean": list(self.mean.values())}
        self.document["generations"].append(
            {**kept, "sigma": float(self.strategy.sigma), "seconds": time.monotonic() - began}
        )
        write_json(self.file, self.document)
        score, success = np.mean(found, (0, 1))
        means = ", ".join(f"{name} {value:+.3f}" for name, value in self.mean.items())
        took = time.monotonic() - began
        return (
            f"generation {number}: score {score:.3f}, success {success:.3f}; {means}; {took:.0f} s"
        )


def row_of(file: str, name: str) -> dict[str, Any]:
    """A row of a settings file; UsageError says what is wrong with it."""
    rows = {row["name"]: row for row in read_settings(file)}
    if name not in rows:
        raise UsageError(f"argument --row: expected one of {', '.join(rows)}, got {name!r}")
    row = rows[name]
    if row.get("warm_start") is None:
        raise UsageError(f"argument --row: expected one that starts warm, got {name!r}")
    if row.get("fitted") is not None:
        raise UsageError(f"argument --row: expected one that is not fitted yet, got {name!r}")
    return row


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="POLICY")
    parser.add_argument("--settings", required=True, metavar="FILE")
    parser.add_argument("--row", required=True, metavar="NAME")
    parser.add_argument("--simulator", default="pusht")
    parser.add_argument("--generations", type=int, default=25, metavar="N")
    parser.add_argument("--population", type=int, default=8, metavar="N")
    parser.add_argument("--seeds", type=int, default=100, metavar="N")
    parser.add_argument("--first-seed", type=int, default=30000, metavar="S")
    parser.add_argument("--sigma", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=18)
    parser.add_argument("--jobs", type=int, default=2, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args(argv)
    try:
        return fit(args)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last generation", file=sys.stderr)
        return 130


def fit(args: argparse.Namespace) -> int:
    """The search, and its result written."""
    row = row_of(args.settings, args.row)
    setting = setting_of(row, args.source)
    begin = [0.0, 0.0, 0.0, setting.lead or 0.0]
    facts = {
        **{"policy": args.source, "sha256": weights_sha256(args.source), "row": row},
        **{name: getattr(args, name) for name in ("simulator", "population", "seeds")},
        **{"first_seed": args.first_seed, "sigma": args.sigma, "seed": args.seed, "begin": begin},
        "scales": SCALES,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    search = Search(json.loads(json.dumps(facts)), args.out)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as workers:

        def play(number: int, candidates: list[dict[str, float]]) -> list[Any]:
            first = args.first_seed + number * args.seeds
            seeds = list(range(first, first + args.seeds))
            common = (args.source, setting, args.simulator)
            asked = [workers.submit(scores, *common, x, seeds) for x in candidates]
            return [one.result() for one in asked]

        while len(search.document["generations"]) < args.generations:
            print(search.generation(play), file=sys.stderr, flush=True)
    found = moved(args.source, setting, search.mean)
    assert isinstance(found.fitted, Fitted)
    write_atomically(args.out / "fitted.json", found.fitted.to_bytes())
    name = f"{args.row}-closed-loop"
    rows = [
        row,
        {**row, "name": name, "lead": round(found.lead or 0.0, 4), "fitted": "fitted.json"},
    ]
    write_json(args.out / "settings.json", rows)
    print(json.dumps(search.mean))
    return 0


if __name__ == "__main__":
    sys.exit(main())
