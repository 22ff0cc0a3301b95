"""Our engine and PyTorch in the simulator, on the same seeds with the same noise.

    python bench/closed_loop.py --seeds 50

Both play Push-T densely (DDPM-100 of the bundled policy) through tsad.sim's own evaluation: seeds
from 100000, the score and success of `tsad eval`. Rounding differs in the last digits, and contact
amplifies it, so episodes drift apart; what must agree is the mean, within the paired interval.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]
# Nothing is timed here, and threads that spin for each other crawl on a machine that is busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import measure  # noqa: E402
import tasks  # noqa: E402

import tsad  # noqa: E402
from tsad import sim  # noqa: E402
from tsad.files import write_json  # noqa: E402
from tsad.sim.results import compare, summarise  # noqa: E402
from tsad.statistics import LEAST_EPISODES  # noqa: E402


def play(name: str, policy: Any, seeds: list[int]) -> list[sim.Episode]:
    """The episodes of the seeds, in their order."""
    worlds = [sim.make("pusht") for _ in range(policy.lanes)]
    episodes: list[sim.Episode] = []
    begin = time.monotonic()
    try:
        for episode in sim.rollouts(policy, worlds, seeds):
            episodes.append(episode)
            mean = sum(e.score for e in episodes) / len(episodes)
            text = f"{name}: {len(episodes)} of {len(seeds)}, score {mean:.3f}, "
            print(text + f"{time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    finally:
        for world in worlds:
            world.close()
    return sorted(episodes, key=lambda episode: episode.seed)


def describe(episodes: list[sim.Episode]) -> dict[str, Any]:
    """Summary and episodes as JSON; times are left out, as lanes share the machine with others."""
    summary = summarise(episodes)
    del summary["chunk_ms"]
    rows = [asdict(episode) for episode in episodes]
    for row in rows:
        del row["chunk_ms_mean"], row["chunk_ms_max"]
    return {"summary": summary, "episodes": rows}


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lanes", type=int, help="PyTorch's batch (default: all seeds)")
    parser.add_argument("--peer", default="eager", help="of bench/peers.py (default: eager)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    least = LEAST_EPISODES  # or there is no interval
    if args.seeds < least or args.threads < 1 or (args.lanes is not None and args.lanes < 1):
        parser.error(
            f"--seeds, --threads, --lanes: expected at least {least} seeds, 1 thread, 1 lane"
        )
    import peers

    first = sim.facts("pusht").first_seed
    seeds = list(range(first, first + args.seeds))
    batch = min(args.lanes or args.seeds, args.seeds)
    engine = tasks.engine(tasks.make_task(threads=args.threads, lanes=min(8, args.seeds)))
    ours = play("tsad", engine, seeds)
    peer = peers.build(args.peer, tasks.make_task(threads=args.threads, lanes=batch))
    theirs = play(args.peer, peer, seeds)
    gaps = {a.seed: a.score - b.score for a, b in zip(ours, theirs, strict=True)}
    document = {
        "format": "tsad-closed-loop", "format_version": 1,
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "tsad": tsad.__version__,
        "machine": measure.machine(), "backend": engine.backend, "simulator": "pusht",
        "first_seed": first, "seeds": len(seeds), "sampler": peer.sampler.name,
        "steps": peer.num_inference_steps, "tsad dense": describe(ours),
        args.peer: describe(theirs),
        "paired": compare(ours, theirs), "score_differences": gaps,
    }  # fmt: skip
    slug = measure.slug(document["machine"])
    out = args.out or HERE / "results" / f"{document['date']}-{slug}-closed-loop.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, document)
    print("| policy | score | 95 % interval | success |\n| --- | ---: | --- | ---: |")
    for name in ("tsad dense", args.peer):
        summary = document[name]["summary"]
        score, success = summary["score"], summary["success"]
        low, high = score["interval95"]
        won = round(success["mean"] * summary["episodes"])
        print(f"| {name} | {score['mean']:.4f} | {low:.3f} to {high:.3f} | {won} of {len(seeds)} |")
    gap = document["paired"]["score"]
    same = sum(abs(value) < 1e-3 for value in gaps.values())
    print(
        f"\nscore, ours - theirs: {gap['mean_difference']:+.4f}, 95 % interval "
        f"{gap['interval95'][0]:+.4f} to {gap['interval95'][1]:+.4f}; equal to 0.001 in {same} of "
        f"{len(seeds)} seeds, largest {max(map(abs, gaps.values())):.3f}\nwritten to {out}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
