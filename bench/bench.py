"""Our engine and what users could run instead, side by side, in one run.

    python bench/bench.py --plot                      everything, about 12 minutes on two cores
    python bench/bench.py --quick                     two cases, about 4 minutes
    python bench/bench.py --cases lanes8,lanes64      these alone: they take the place of those in
                                                      today's file, the others stay
    python bench/bench.py --peers all --cases ddpm100 every build of every peer; half an hour

Half of the time goes into building peers, most of it into torch.compile. Every contender has a
process of its own; they take turns in rounds (A B C, then C B A, ...), on the same weights,
observations and noise, and each is checked against our dense actions before it is timed. See
README.md for the cases and what the figures mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import measure  # noqa: E402
import report  # noqa: E402
import tasks  # noqa: E402
from roofline import Roofline, floor, work, work16  # noqa: E402
from worker import ENGINE, ENGINES, ONE_BY_ONE, Worker, WorkerError  # noqa: E402

import tsad  # noqa: E402
from tsad.files import write_json  # noqa: E402

# Spelled out, so that importing torch is left to the workers; the tests compare it with peers.py.
PEERS = (
    "eager", "eager-hoisted", "compile", "compile-hoisted", "compile-max-autotune",
    "compile-freezing", "compile-freezing-max-autotune", "onnxruntime", "onnxruntime-hoisted",
    "openvino", "openvino-hoisted",
)  # fmt: skip
EXPORTED = ("onnxruntime", "onnxruntime-hoisted", "openvino", "openvino-hoisted")
MAIN_PEERS = ("eager", "eager-hoisted", "compile", "compile-hoisted", *EXPORTED)
HOISTED = ("onnxruntime-hoisted", "openvino-hoisted")
QUICK_PEERS = ("eager", "compile", *EXPORTED)
SPARSE = ("dense", "uniform-80", "uniform-90", "uniform-95", "sparse95")
CURVE = ("dense", "uniform-50", "uniform-80", "uniform-90", "uniform-95", "uniform-98", "sparse95")
BOTH = ("dense", "sparse95")
BAR = 1e-3  # largest difference of normalised actions from ours before a peer is not timed
INT16_BAR = 1e-2  # ... before our engine in 16 bits is not
TOLERANCE = 0.04  # the two fastest rounds agree this closely, or there is another round
SETTLE = 0.1  # seconds between contenders: thread pools spin for a while after their last work
ROOFLINE_SECONDS = 0.6  # in each round
PEER_ROUNDS = 3  # they are slow, and far from ours
QUIET_SECONDS, CONTENDED_SECONDS = 4.0, 10.0
CONTENDED_BAR = 2.2  # medians, beside a busy process on one of the cores


@dataclass(frozen=True)
class Case:
    """One group of contenders, timed against each other. `int16`: plans that run in 16 bits too."""

    shape: str = "pusht"
    sampler: str | None = None
    steps: int | None = None
    lanes: int = 1
    threads: int = 2
    plans: tuple[str, ...] = BOTH
    int16: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    rounds: int | None = None  # at most, whatever the command says
    pace_hz: float | None = None
    contended: bool = False  # beside a busy process, too


LANES = ("sparse95", f"sparse95{ONE_BY_ONE}")
CASES: dict[str, Case] = {
    "ddpm100": Case(plans=CURVE, int16=BOTH, peers=MAIN_PEERS),
    "ddim16": Case(sampler="ddim", steps=16, plans=("dense",), int16=("dense",), peers=HOISTED),
    "ddim10": Case(sampler="ddim", steps=10, plans=("dense",)),
    "ddim5": Case(sampler="ddim", steps=5, plans=("dense",)),
    "t16": Case(shape="t16", int16=BOTH, peers=("eager", *EXPORTED)),
    "can": Case(shape="can", int16=BOTH),
    "thread1": Case(threads=1, int16=BOTH),
    "lanes8": Case(lanes=8, plans=("dense", *LANES), int16=("sparse95",)),
    "lanes64": Case(lanes=64, plans=LANES, int16=("sparse95",), rounds=4),
    "paced10": Case(int16=BOTH, pace_hz=10, rounds=4),
    "paced50": Case(int16=BOTH, pace_hz=50, rounds=4),
    "contended": Case(contended=True, rounds=2),
}
QUICK_CASES = ("ddpm100", "ddim10")


class Run:
    """The workers and settings of a run; `case` times one case."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self._workers: dict[tuple[str, int], Worker] = {}
        self._rooflines: dict[str, Roofline] = {}

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    def _worker(self, peer: str, threads: int) -> Worker:
        for key in [key for key in self._workers if key[1] != threads]:  # not all at once
            self._workers.pop(key).close()
        if (peer, threads) not in self._workers:
            self._workers[peer, threads] = Worker(peer, threads)
        return self._workers[peer, threads]

    def _build(self, case: Case, peer: str, ours: Any) -> dict[str, Any]:
        """Build and check one contender; its entry so far. `ours`: our dense actions, or None."""
        entry: dict[str, Any] = {"name": peer, "peer": peer, "plan": "dense", "status": "ok"}
        options: dict[str, Any] = {
            name: getattr(case, name) for name in ("shape", "sampler", "steps", "lanes")
        }
        try:
            worker = self._worker(peer, case.threads)
            entry |= worker.call("build", **options)
            actions = worker.call("actions")
        except WorkerError as error:
            known = error.kind == "NotInstalledError"
            self._workers.pop((peer, case.threads)).close()
            status = "not installed" if known else "failed"
            return entry | {"status": status, "reason": str(error) if known else
                            f"{error.kind}: {error}"}  # fmt: skip
        entry["actions"] = actions
        entry["difference"] = 0.0 if ours is None else float(np.abs(actions - ours).max())
        bar = INT16_BAR if peer in ENGINES else BAR
        if not entry["difference"] <= bar:
            entry |= {
                "status": "wrong",
                "reason": f"actions differ from ours by {entry['difference']:.2g}, over {bar:g}",
            }
        return entry

    def _contenders(self, case: Case) -> tuple[list[dict[str, Any]], Any]:
        """Entries of all contenders, built and checked."""
        say(f"  building {ENGINE}")
        base = self._build(case, ENGINE, None)
        if base["status"] != "ok":
            raise WorkerError("Engine", f"our engine could not be built: {base['reason']}")
        ours = base.pop("actions")
        entries = self._planned(case, base, case.plans)
        if case.int16 and "int16" in self.args.precisions:
            entry = self._build(case, "tsad-int16", ours)
            entry.pop("actions", None)
            entries += self._planned(case, entry, case.int16)
        dense = [np.zeros_like(sources) for sources in entries[0]["sources"]]
        for peer in case.peers if self.args.peers is None else self.args.peers:
            say(f"  building {peer}")
            entry = self._build(case, peer, ours)
            entry.pop("actions", None)
            entries.append(entry | {"sparsity": 0.0, "cell_sparsity": 0.0, "sources": dense})
        for entry in entries:
            if entry["status"] != "ok":
                say(f"  {entry['name']}: {entry['status']}: {entry['reason'].splitlines()[0]}")
        return entries, base

    def _planned(
        self, case: Case, base: dict[str, Any], plans: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """An entry of our engine for each plan."""
        if base["status"] != "ok":
            return [base]
        worker, peer = self._worker(base["peer"], case.threads), base["peer"]
        named = [base | {"name": f"{peer} {plan}", "plan": plan} for plan in plans]
        return [entry | worker.call("plan", name=entry["plan"]) for entry in named]

    def _round(self, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
        worker = self._worker(entry["peer"], case.threads)
        time.sleep(SETTLE)
        measure.wait_for_quiet(self.args.patience)
        options = {"plan": entry["plan"], "seconds": self.args.seconds}
        if case.contended:
            options["seconds"] = min(QUIET_SECONDS, 2 * self.args.seconds)
            result: dict[str, Any] = worker.call("sustained", **options)
            options["seconds"] = min(CONTENDED_SECONDS, 5 * self.args.seconds)
            with measure.busy_core():
                result["contended_ms"] = worker.call("sustained", **options)["times_ms"]
        elif case.pace_hz is None:
            least = 1 if case.lanes >= 64 else 2
            result = worker.call("round", least=least, **options)
        else:
            options["seconds"] *= 1 if case.pace_hz > 20 else 2
            result = worker.call("paced", hertz=case.pace_hz, **options)
        return result

    def _roofline(self, case: Case, base: dict[str, Any]) -> dict[str, Any]:
        backend = base["backend"]
        if backend not in self._rooflines:
            self._rooflines[backend] = Roofline(backend)
        program = self._rooflines[backend]
        measure.wait_for_quiet(self.args.patience)
        net = case_task(case).config.network.to_dict()
        _, n_bytes = work(net, [np.zeros((1, 3 * net["n_layer"]), np.uint8)])
        return program.run(case.threads, int(n_bytes), ROOFLINE_SECONDS)

    def case(self, name: str, case: Case) -> dict[str, Any]:
        """Build, check and time all contenders of a case."""
        started, begin = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        say(f"{name}:")
        entries, base = self._contenders(case)
        timed = [entry for entry in entries if entry["status"] == "ok"]
        results: dict[str, list[dict[str, Any]]] = {entry["name"]: [] for entry in timed}
        peaks, load = [], [os.getloadavg()[0]]
        for number in range(2 * self.args.rounds):
            turn = [e for e in timed if self._wants_round(case, e, results[e["name"]], number)]
            if not turn:
                break
            peaks.append(self._roofline(case, base))
            for entry in turn if number % 2 == 0 else turn[::-1]:
                results[entry["name"]].append(self._round(case, entry))
                times = results[entry["name"]][-1]["times_ms"]
                say(f"  round {number + 1}: {entry['name']} {np.median(times):.2f} ms")
            load.append(os.getloadavg()[0])
        task = case_task(case)
        peak = Roofline.best(peaks)
        for entry in timed:
            finish(entry, results[entry["name"]], task, peak)
        for entry in entries:
            entry.pop("sources", None)
        return {
            "name": name,
            "shape": case.shape,
            "network": task.config.network.to_dict(),
            "sampler": task.sampler.name,
            "steps": len(task.sampler.timesteps),
            "lanes": case.lanes,
            "threads": case.threads,
            "pace_hz": case.pace_hz,
            "precision": "float32",
            "commit": measure.commit(),
            "bar": BAR,
            "started": started,
            "wall_s": round(time.monotonic() - begin, 1),
            "load_average": [round(value, 2) for value in load],
            "roofline": peak,
            "contenders": entries,
        }

    def _wants_round(
        self, case: Case, entry: dict[str, Any], results: list[dict[str, Any]], number: int
    ) -> bool:
        least = min(self.args.rounds, case.rounds or self.args.rounds)
        if entry["peer"] not in ENGINES:
            least = min(least, PEER_ROUNDS)
        if number < least:
            return True
        if number >= (case.rounds or 2 * least):
            return False
        return not measure.settled([result["times_ms"] for result in results], TOLERANCE)


def case_task(case: Case) -> tasks.Task:
    """The task of a case."""
    return tasks.make_task(
        case.shape, sampler=case.sampler, steps=case.steps, lanes=case.lanes, threads=case.threads
    )


def finish(
    entry: dict[str, Any], results: list[dict[str, Any]], task: tasks.Task, peak: dict[str, Any]
) -> None:
    """Add what the rounds amount to."""
    rounds = [result["times_ms"] for result in results]
    times = measure.summary(rounds)
    network, precision = task.config.network.to_dict(), ENGINES.get(entry["peer"], "float32")
    macs, n_bytes = work(network, entry["sources"], precision)
    macs16 = work16(network, entry["sources"]) if precision == "int16" else 0.0
    bound = floor(macs, n_bytes, peak, macs16)
    entry |= {
        "passes": (1 - entry["sparsity"]) * len(task.sampler.timesteps),
        "macs": macs,
        "bytes": n_bytes,
        "floor": bound,
        "floor_share": bound["ms"] / times["best_p50"],
        "arithmetic_share": bound["compute_ms"] / times["best_p50"],
        "times": times,
        "settled": measure.settled(rounds, TOLERANCE),
        "rounds_ms": [[round(value, 4) for value in times] for times in rounds],
        "foreign": [result["foreign"] for result in results],
        "steal": [result["steal"] for result in results],
    }
    if stages := [result["stages_ms"] for result in results if result.get("stages_ms")]:
        entry["stages_ms"] = {
            name: float(np.median([values[name] for values in stages])) for name in stages[0]
        }
    if "contended_ms" in results[0]:
        finish_contended(entry, results)
    if results[0].get("first_ms") is not None:
        entry["first_ms"] = float(np.median([result["first_ms"] for result in results]))
        episodes = [result["warm_ms"] + result["times_ms"] for result in results]
        chunks = [value for episode in episodes for value in episode]
        entry["episode"] = {
            "chunks": [len(episode) for episode in episodes],
            "mean": float(np.mean(chunks)),
            "max": float(np.median([max(episode) for episode in episodes])),
        }
    if "late" in results[0]:
        entry["late"] = float(np.mean([result["late"] for result in results]))
        idle = [r["idle_cores"] for r in results if r["idle_cores"] is not None]
        entry["idle_cores"] = float(np.mean(idle)) if idle else None


def finish_contended(entry: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Beside a busy process, as a ratio of the quiet median just before."""
    ratios = [np.median(r["contended_ms"]) / np.median(r["times_ms"]) for r in results]
    times = [value for result in results for value in result["contended_ms"]]
    entry["contended"] = {
        "p50": float(np.median(times)),
        "p99": measure.percentile(times, 99),
        "max": max(times),
        "ratio": float(max(ratios)),  # of the worst round
        "bar": CONTENDED_BAR,
        "chunks": len(times),
    }


def say(text: str) -> None:
    """A line of progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def names(text: str) -> list[str]:
    """An argparse type: a list with commas."""
    return [name for name in text.split(",") if name]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few cases and rounds")
    parser.add_argument("--cases", type=names, metavar="A,B", help=f"of {','.join(CASES)}")
    parser.add_argument(
        "--peers",
        type=names,
        metavar="A,B",
        help=f'in every case, of {",".join(PEERS)}; "all", or "" for ours alone '
        "(default: each case has its own)",
    )
    parser.add_argument(
        "--paced",
        type=float,
        nargs="+",
        default=[],
        metavar="HZ",
        help="also the first case with calls at these rates, e.g. 20 100",
    )
    parser.add_argument(
        "--rounds", type=int, help="at least (default: 5, peers 3); twice as many until they agree"
    )
    parser.add_argument("--seconds", type=float, help="of each contender in each round")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="before a turn, wait up to this long for others to leave the machine (default: 0)",
    )
    parser.add_argument(
        "--precisions", type=names, help="of our engine (default: float32, and int16 where it is)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/DATE-CPU.json")
    parser.add_argument(
        "--fresh", action="store_true", help="drop the cases that are in the file already"
    )
    parser.add_argument("--plot", action="store_true", help="latency against sparsity, beside it")
    args = parser.parse_args(argv)
    quick = args.quick
    args.cases = list(QUICK_CASES if quick else CASES) if args.cases is None else args.cases
    if args.peers is None and quick:
        args.peers = list(QUICK_PEERS)
    elif args.peers == ["all"]:
        args.peers = list(PEERS)
    known_precisions = tasks.precisions()
    args.precisions = known_precisions if args.precisions is None else args.precisions
    args.rounds = (3 if quick else 5) if args.rounds is None else args.rounds
    args.seconds = (0.5 if quick else 2.0) if args.seconds is None else args.seconds
    choices: list[tuple[str, Any]] = [("cases", CASES), ("peers", PEERS)]
    for name, known in [*choices, ("precisions", known_precisions)]:
        unknown = set(getattr(args, name) or ()) - set(known)
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; expected {', '.join(known)}")
    if args.rounds < 1 or args.seconds <= 0 or any(rate <= 0 for rate in args.paced):
        parser.error("--rounds, --seconds, --paced: expected numbers above 0")
    return args


def wanted_cases(args: argparse.Namespace) -> dict[str, Case]:
    """The cases by name, paced ones too."""
    chosen = {name: CASES[name] for name in args.cases}
    first = CASES[args.cases[0]] if args.cases else CASES["ddpm100"]
    for rate in args.paced:
        plans = tuple(plan for plan in SPARSE if plan in first.plans)
        chosen[f"paced{rate:g}"] = replace(first, pace_hz=rate, plans=plans, rounds=4)
    return chosen


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = parse(argv)
    machine, date = measure.machine(), time.strftime("%Y-%m-%d", time.gmtime())
    out = args.out or HERE / "results" / f"{date}-{measure.slug(machine)}.json"
    document: dict[str, Any] = {
        "format": report.FORMAT,
        "format_version": report.FORMAT_VERSION,
        "date": date,
        "tsad": tsad.__version__,
        "machine": machine,
        "cases": [],
    }
    if out.exists() and not args.fresh:
        old = report.read(out)
        if old["machine"]["cpu"] != machine["cpu"]:
            raise SystemExit(
                f"{out} is of another processor, {old['machine']['cpu']}; --fresh overwrites it"
            )
        document["cases"] = old["cases"]
    run = Run(args)
    done = []
    try:
        for name, case in wanted_cases(args).items():
            result = run.case(name, case)
            done.append(result)
            kept = [other for other in document["cases"] if other["name"] != name]
            document["cases"] = [*kept, result]
            report.check(document)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_json(out, document)
    finally:
        run.close()
    if args.plot:
        for case in done:
            if report.has_curve(case):
                report.plot(case, machine, out.with_name(f"{out.stem}-{case['name']}.png"))
    print(report.header({**document, "cases": done}) + "\n\n" + report.table(done))
    print("\n" + "\n".join([*report.lines(done), f"written to {out}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
