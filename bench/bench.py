"""Our engine and what users could run instead, side by side, in one run.

    python bench/bench.py --quick                     a few minutes
    python bench/bench.py                             everything; hours with torch.compile
    python bench/bench.py --cases ddpm100 --peers eager,onnxruntime --paced 10

Every contender has a process of its own; they take turns in rounds (A B C, then C B A, ...), on the
same weights, observations and noise, and each is checked against our dense actions before it is
timed. See README.md for the cases and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
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
from roofline import Roofline, floor, work  # noqa: E402
from worker import ENGINE, Worker, WorkerError  # noqa: E402

import tsad  # noqa: E402
from tsad.checkpoint import write_atomically  # noqa: E402

# Spelled out, so that importing torch is left to the workers; the tests compare it with peers.py.
PEERS = (
    "eager", "eager-hoisted", "compile", "compile-hoisted", "compile-max-autotune",
    "compile-freezing", "compile-freezing-max-autotune", "onnxruntime", "onnxruntime-hoisted",
    "openvino", "openvino-hoisted",
)  # fmt: skip
QUICK_PEERS = (
    "eager", "compile", "onnxruntime", "onnxruntime-hoisted", "openvino", "openvino-hoisted"
)  # fmt: skip
SPARSE = ("dense", "uniform-80", "uniform-90", "uniform-95", "sparse95")
CURVE = ("dense", "uniform-50", "uniform-80", "uniform-90", "uniform-95", "uniform-98", "sparse95")
BAR = 1e-3  # largest difference of normalised actions from ours before a peer is not timed
TOLERANCE = 0.04  # the two fastest rounds agree this closely, or there is another round
SETTLE = 0.1  # seconds between contenders: thread pools spin for a while after their last work
ROOFLINE_SECONDS = 0.6  # in each round


@dataclass(frozen=True)
class Case:
    """One group of contenders, timed against each other."""

    shape: str = "pusht"
    sampler: str | None = None
    steps: int | None = None
    lanes: int = 1
    threads: int = 2
    plans: tuple[str, ...] = ("dense",)
    pace_hz: float | None = None


CASES: dict[str, Case] = {
    "ddpm100": Case(plans=CURVE),
    "ddim16": Case(sampler="ddim", steps=16),
    "ddim10": Case(sampler="ddim", steps=10),
    "ddim5": Case(sampler="ddim", steps=5),
    "thread1": Case(threads=1, plans=SPARSE),
    "lanes8": Case(lanes=8, plans=SPARSE),
    "lanes64": Case(lanes=64, plans=SPARSE),
    "t16": Case(shape="t16", plans=SPARSE),
    "can": Case(shape="can", plans=SPARSE),
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
            entry |= worker.call("build", precision=self.args.precision, **options)
            actions = worker.call("actions")
        except WorkerError as error:
            known = error.kind == "NotInstalledError"
            self._workers.pop((peer, case.threads)).close()
            status = "not installed" if known else "failed"
            return entry | {"status": status, "reason": str(error) if known else
                            f"{error.kind}: {error}"}  # fmt: skip
        entry["actions"] = actions
        entry["difference"] = 0.0 if ours is None else float(np.abs(actions - ours).max())
        if not entry["difference"] <= BAR:
            entry |= {
                "status": "wrong",
                "reason": f"actions differ from ours by {entry['difference']:.2g}, over {BAR:g}",
            }
        return entry

    def _contenders(self, case: Case) -> tuple[list[dict[str, Any]], Any]:
        """Entries of all contenders, built and checked."""
        say(f"  building {ENGINE}")
        base = self._build(case, ENGINE, None)
        if base["status"] != "ok":
            raise WorkerError("Engine", f"our engine could not be built: {base['reason']}")
        ours = base.pop("actions")
        worker = self._worker(ENGINE, case.threads)
        entries = []
        for plan in case.plans:
            facts = worker.call("plan", name=plan)
            entries.append(base | {"name": f"{ENGINE} {plan}", "plan": plan} | facts)
        dense = [np.zeros_like(sources) for sources in entries[0]["sources"]]
        for peer in self.args.peers:
            say(f"  building {peer}")
            entry = self._build(case, peer, ours)
            entry.pop("actions", None)
            if entry["status"] != "ok":
                say(f"    {entry['status']}: {entry['reason'].splitlines()[0]}")
            entries.append(entry | {"sparsity": 0.0, "cell_sparsity": 0.0, "sources": dense})
        return entries, base

    def _round(self, case: Case, entry: dict[str, Any]) -> dict[str, Any]:
        worker = self._worker(entry["peer"], case.threads)
        time.sleep(SETTLE)
        measure.wait_for_quiet(self.args.patience)
        options = {"plan": entry["plan"], "seconds": self.args.seconds}
        if case.pace_hz is None:
            least = 1 if case.lanes >= 64 else 2
            result: dict[str, Any] = worker.call("round", least=least, **options)
        else:
            options["seconds"] = max(self.args.seconds, 10 / case.pace_hz)
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
            turn = [entry for entry in timed if self._wants_round(results[entry["name"]], number)]
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
            "precision": self.args.precision,
            "bar": BAR,
            "started": started,
            "wall_s": round(time.monotonic() - begin, 1),
            "load_average": [round(value, 2) for value in load],
            "roofline": peak,
            "contenders": entries,
        }

    def _wants_round(self, results: list[dict[str, Any]], number: int) -> bool:
        if number < self.args.rounds:
            return True
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
    network = task.config.network.to_dict()
    macs, n_bytes = work(network, entry["sources"])
    bound = floor(macs, n_bytes, peak)
    entry |= {
        "passes": (1 - entry["sparsity"]) * len(task.sampler.timesteps),
        "macs": macs,
        "bytes": n_bytes,
        "floor": bound,
        "floor_share": bound["ms"] / times["best_p50"],
        "times": times,
        "settled": measure.settled(rounds, TOLERANCE),
        "rounds_ms": [[round(value, 4) for value in times] for times in rounds],
        "foreign": [result["foreign"] for result in results],
        "steal": [result["steal"] for result in results],
    }
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
        "--peers", type=names, metavar="A,B", help=f'of {",".join(PEERS)}; "" is ours alone'
    )
    parser.add_argument(
        "--paced",
        type=float,
        nargs="+",
        default=[],
        metavar="HZ",
        help="also the first case with calls at these rates, e.g. 10 50",
    )
    parser.add_argument("--rounds", type=int, help="at least; twice as many until they agree")
    parser.add_argument("--seconds", type=float, help="of each contender in each round")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="before a turn, wait up to this long for others to leave the machine (default: 0)",
    )
    parser.add_argument("--precision", default="float32", help="of our engine")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: results/DATE-CPU.json")
    parser.add_argument(
        "--add", action="store_true", help="add the cases to those in the file, or replace them"
    )
    parser.add_argument("--plot", action="store_true", help="latency against sparsity, beside it")
    args = parser.parse_args(argv)
    quick = args.quick
    args.cases = list(QUICK_CASES if quick else CASES) if args.cases is None else args.cases
    args.peers = list(QUICK_PEERS if quick else PEERS) if args.peers is None else args.peers
    args.rounds = (3 if quick else 5) if args.rounds is None else args.rounds
    args.seconds = (0.5 if quick else 2.0) if args.seconds is None else args.seconds
    for name, known in (("cases", CASES), ("peers", PEERS)):
        unknown = set(getattr(args, name)) - set(known)
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
        chosen[f"paced{rate:g}"] = replace(first, pace_hz=rate, plans=plans)
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
    if args.add and out.exists():
        old = report.read(out)
        if old["machine"]["cpu"] != machine["cpu"]:
            raise SystemExit(f"--add: {out} is of another processor, {old['machine']['cpu']}")
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
            write_atomically(out, (json.dumps(document, indent=1) + "\n").encode())
    finally:
        run.close()
    if args.plot:
        for case in done:
            if len(case["contenders"]) > 1 and not case["pace_hz"]:
                report.plot(case, machine, out.with_name(f"{out.stem}-{case['name']}.png"))
    print(report.header({**document, "cases": done}) + "\n\n" + report.table(done))
    lines = [*report.episode_lines(done), *report.paced_lines(done), f"written to {out}"]
    print("\n" + "\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
