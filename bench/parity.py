"""Our engine beside PyTorch's own modules on recorded observations.

    python bench/parity.py DATA.npz --observations 500
    python bench/parity.py DATA.npz --observations 500 --float64
    python bench/parity.py DATA.npz --precision int16
    python bench/parity.py DATA.npz --precision float16     # weights of a GPU's, or bfloat16

DATA.npz holds Push-T demonstrations (`state` (N, 5) and `episode_ends`, as `tsad train` takes
them). The bundled policy runs one dense DDPM-100 chunk for each of the observations, spread evenly
over the episodes, with the same float16-rounded weights and the same noise as PyTorch; actions are
compared in the network's units, where their range is -1 to 1. A few go through tsad.reference, the
specification, in float64 too. Another precision than float32 is held against our own float32,
which takes a minute instead of PyTorch's many (--float64 adds that). Those of a GPU are run by the
CPU core, which rounds the same weights.

Exit status 1 if the largest difference is over the bar: 1e-4, or what the policy's
`stats["error_bound"]` states for the precision.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
# Nothing is timed here, and threads that spin for each other crawl on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import measure  # noqa: E402
import tasks  # noqa: E402

import tsad  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.precision import measured_bound  # noqa: E402
from tsad.reference import ReferencePolicy  # noqa: E402
from tsad.statistics import percentile  # noqa: E402
from tsad.training.data import load_demonstrations  # noqa: E402

BAR = 1e-4
SEED = 0
HALVES = ("float16", "bfloat16")


def spread(ends: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n steps, one from each n-th of every episode in turn, drawn with a seed: (n,) sorted.

    Every episode gives n / episodes of them, or one more; within an episode they are stratified.
    """
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], ends[:-1]])
    share = np.full(len(ends), n // len(ends))
    share[rng.permutation(len(ends))[: n % len(ends)]] += 1
    steps = [
        start + ((np.arange(count) + rng.uniform(0, 1, count)) / count * (end - start)).astype(int)
        for start, end, count in zip(starts, ends, share, strict=True)
        if count
    ]
    return np.concatenate(steps)


def windows(obs: np.ndarray, ends: np.ndarray, steps: np.ndarray, n_obs_steps: int) -> np.ndarray:
    """The last n_obs_steps observations at each step, (n, n_obs_steps, obs_dim).

    Before an episode's start its first observation stands in.
    """
    starts = np.concatenate([[0], ends[:-1]])
    first = starts[np.searchsorted(ends, steps, side="right")]
    index = steps[:, None] + np.arange(1 - n_obs_steps, 1)
    return obs[np.maximum(index, first[:, None])]


def differences(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Largest, p99 and mean difference of normalised actions, and of chunks' largest ones."""
    gap = np.abs(a - b)
    return {
        "largest": float(gap.max()),
        "p99": float(np.percentile(gap, 99)),
        "mean": float(gap.mean()),
        "chunks": len(gap),
        "p99_of_chunks": percentile(gap.max((1, 2)), 99),
    }


def bar_of(precision: str) -> float:
    """What a policy of this precision says of itself."""
    if precision == "float32":
        return BAR
    if precision not in HALVES:
        return float(tsad.load("pusht", precision=precision).stats["error_bound"])
    task = tasks.make_task()  # `tsad.load` has them on a GPU alone
    return measured_bound(tasks.engine(task, precision), tasks.engine(task))


class Runs:
    """Chunks of the same observations and noise by each implementation, normalised, float64."""

    def __init__(self, obs: np.ndarray, threads: int, batch: int) -> None:
        self.obs, self.threads, self.batch = obs, threads, batch
        self.task = tasks.make_task(threads=threads)
        net, steps = self.task.config.network, len(self.task.sampler.timesteps)
        shape = (steps, len(obs), net.horizon, net.action_dim)
        self.noise = np.random.default_rng(SEED).standard_normal(shape, np.float32)
        self.seconds: dict[str, float] = {}

    def engine(self, precision: str) -> np.ndarray:
        """Ours, dense; 8 lanes at a time."""
        lanes = min(8, len(self.obs))
        task = tasks.make_task(threads=self.threads, lanes=lanes)
        policy = tasks.engine(task, precision)
        assert policy.precision == precision
        return self._batches(f"engine {precision}", policy, lanes)

    def torch(self, dtype: Any) -> np.ndarray:
        """PyTorch eager in `dtype`."""
        import peers

        task = tasks.make_task(threads=self.threads, lanes=self.batch, dtype=dtype)
        name = f"torch {np.dtype(dtype).name}"
        return self._batches(name, peers.build("eager", task), self.batch)

    def _batches(self, name: str, policy: Any, size: int) -> np.ndarray:
        begin, parts = time.perf_counter(), []
        for first in range(0, len(self.obs), size):
            rows = slice(first, first + size)
            obs, noise = self.obs[rows], np.ascontiguousarray(self.noise[:, rows])
            lanes = list(range(len(obs)))
            actions = policy(obs, noise=noise, lanes=lanes, return_horizon=True)
            parts.append(tasks.normalise(np.asarray(actions), self.task))
            done = min(first + size, len(self.obs))
            print(f"{name}: {done} of {len(self.obs)}", end="\r", file=sys.stderr, flush=True)
        self.seconds[name] = round(time.perf_counter() - begin, 1)
        print(file=sys.stderr)
        return np.concatenate(parts)

    def reference(self, rows: np.ndarray) -> np.ndarray:
        """The specification in float64, for some of the observations."""
        begin = time.perf_counter()
        policy = ReferencePolicy(
            self.task.config.to_dict(), dict(self.task.tensors), lanes=len(rows)
        )
        actions = policy(self.obs[rows], self.noise[:, rows], return_horizon=True)
        self.seconds["reference"] = round(time.perf_counter() - begin, 1)
        return tasks.normalise(actions, self.task)


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, metavar="DATA.npz")
    parser.add_argument("--observations", type=int, default=500, metavar="N")
    parser.add_argument("--reference", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument("--float64", action="store_true", help="PyTorch in float64 as well")
    parser.add_argument("--precision", choices=[*tasks.precisions(), *HALVES], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=125, help="PyTorch's (default: 125)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.observations < 1 or args.reference < 0 or args.threads < 1 or args.batch < 1:
        parser.error("--observations, --reference, --threads, --batch: expected positive numbers")
    data = load_demonstrations(args.data)
    n_obs = tasks.make_task().config.network.n_obs_steps
    steps = spread(data.ends, args.observations, SEED)
    runs = Runs(windows(data.obs, data.ends, steps, n_obs), args.threads, args.batch)
    plain = args.precision == "float32"
    ours = "engine" if plain else f"engine {args.precision}"
    bar = bar_of(args.precision)
    actions = {ours: runs.engine(args.precision)}
    if not plain:
        actions["engine float32"] = runs.engine("float32")
    if plain or args.float64:
        actions["torch float32"] = runs.torch(np.float32)
    if args.float64:
        actions["torch float64"] = runs.torch(np.float64)
    few = np.linspace(0, len(steps) - 1, min(args.reference, len(steps))).astype(int)
    pairs = {
        f"{ours} - {name}": differences(actions[ours], other)
        for name, other in actions.items() if name != ours
    }  # fmt: skip
    if args.float64:
        pairs["torch float32 - torch float64"] = differences(
            actions["torch float32"], actions["torch float64"]
        )
    if len(few):
        reference = runs.reference(few)
        for name, values in actions.items():
            pairs[f"{name} - reference float64"] = differences(values[few], reference)
    passed = all(pair["largest"] <= bar for name, pair in pairs.items() if name.startswith(ours))
    document = {
        "format": "tsad-parity", "format_version": 1,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "tsad": tsad.__version__,
        "machine": measure.machine(), "backend": tasks.engine(runs.task).backend,
        "data": {"name": data.name, "sha256": data.sha256}, "observations": len(steps),
        "seed": SEED, "sampler": runs.task.sampler.name, "steps": len(runs.task.sampler.timesteps),
        "bar": bar, "precision": args.precision, "passed": passed, "differences": pairs,
        "seconds": runs.seconds,
    }  # fmt: skip
    slug = measure.slug(document["machine"])
    kind = "parity" if plain else f"parity-{args.precision}"
    out = args.out or HERE / "results" / f"{document['date']}-{slug}-{kind}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, document)
    print("| normalised actions | largest | p99 | mean | chunks |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, pair in pairs.items():
        print(f"| {name} | {pair['largest']:.2e} | {pair['p99']:.2e} | {pair['mean']:.2e} | "
              f"{pair['chunks']} |")  # fmt: skip
    print(f"\n{'passed' if passed else 'FAILED'}: bar {bar:g}; written to {out}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
