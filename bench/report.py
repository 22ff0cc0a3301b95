"""The results: their JSON and what it must hold, the Markdown table, the plot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsad.plot import save_figure
from tsad.plot.frontier import apart

FORMAT = "tsad-bench"
FORMAT_VERSION = 1
STATUSES = ("ok", "not installed", "failed", "wrong")

_NUMBER = (int, float)
_OPTIONAL = (int, float, type(None))
_DOCUMENT: dict[str, Any] = {
    "format": str, "format_version": int, "date": str, "tsad": str, "machine": dict, "cases": list,
}  # fmt: skip
_CASE: dict[str, Any] = {
    "name": str, "shape": str, "network": dict, "sampler": str, "steps": int, "lanes": int,
    "threads": int, "pace_hz": _OPTIONAL, "precision": str, "bar": _NUMBER, "started": str,
    "wall_s": _NUMBER, "load_average": list, "roofline": dict, "contenders": list,
}  # fmt: skip
_CONTENDER: dict[str, Any] = {"name": str, "peer": str, "plan": str, "status": str}
_TIMED: dict[str, Any] = {
    "note": str, "build_s": _NUMBER, "difference": _NUMBER, "sparsity": _NUMBER, "passes": _NUMBER,
    "cell_sparsity": _NUMBER, "macs": _NUMBER, "bytes": _NUMBER, "floor": dict, "times": dict,
    "floor_share": _NUMBER, "settled": bool, "rounds_ms": list, "foreign": list, "steal": list,
}  # fmt: skip
_TIMES: dict[str, Any] = {
    "best_p50": _NUMBER, "p50": _NUMBER, "p90": _OPTIONAL, "p99": _OPTIONAL, "spread": list,
    "min": _NUMBER, "mean": _NUMBER, "max": _NUMBER, "rounds": int, "chunks": int,
}  # fmt: skip


class DocumentError(ValueError):
    """A results file that lacks something; the message says what and where."""


def _check(value: Any, fields: Mapping[str, Any], where: str) -> None:
    if not isinstance(value, Mapping):
        raise DocumentError(f"{where}: expected an object, got {type(value).__name__}")
    for name, kind in fields.items():
        if name not in value:
            raise DocumentError(f"{where}: expected '{name}', got {', '.join(value)}")
        got = value[name]
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise DocumentError(f"{where}.{name}: got {got!r}, a {type(got).__name__}")


def check(document: Any) -> None:
    """DocumentError if `document` is not what `bench.py` writes; see README.md for the meaning."""
    _check(document, _DOCUMENT, "document")
    if (document["format"], document["format_version"]) != (FORMAT, FORMAT_VERSION):
        raise DocumentError(f"format: expected {FORMAT} {FORMAT_VERSION}")
    for case in document["cases"]:
        where = f"cases[{case.get('name')}]"
        _check(case, _CASE, where)
        _check(case["roofline"], {"gflops": _NUMBER, "read_gbs": _NUMBER}, f"{where}.roofline")
        for contender in case["contenders"]:
            inner = f"{where}.contenders[{contender.get('name')}]"
            _check(contender, _CONTENDER, inner)
            if contender["status"] not in STATUSES:
                raise DocumentError(f"{inner}.status: got {contender['status']!r}")
            if contender["status"] == "ok":
                _check(contender, _TIMED, inner)
                _check(contender["times"], _TIMES, f"{inner}.times")
            elif not contender.get("reason"):
                raise DocumentError(f"{inner}: expected 'reason', as its status is not ok")


def read(path: Path) -> dict[str, Any]:
    """A results file, checked."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DocumentError(f"{path}: not JSON ({error})") from error
    check(document)
    return document


# ---- table

HEAD = (
    "case", "contender", "p50 best round, ms", "p50", "p90", "p99", "rounds' p50 from - to",
    "ms per lane", "eager / it", "it / our dense", "share of floor", "largest difference",
)  # fmt: skip


def milliseconds(value: float | None) -> str:
    """Three digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _ratio(a: float | None, b: float | None) -> str:
    if a is None or b is None:
        return "-"
    ratio = a / b
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _best(case: Mapping[str, Any], name: str) -> float | None:
    for contender in case["contenders"]:
        if contender["name"] == name and contender["status"] == "ok":
            return float(contender["times"]["best_p50"])
    return None


def _row(case: Mapping[str, Any], contender: Mapping[str, Any]) -> list[str]:
    if contender["status"] != "ok":
        reason = " ".join(str(contender["reason"]).split())
        reason = reason if len(reason) < 120 else reason[:117] + "..."
        return [contender["name"], f"{contender['status']}: {reason}", *["-"] * (len(HEAD) - 3)]
    times = contender["times"]
    best = times["best_p50"]
    spread = " - ".join(milliseconds(value) for value in times["spread"])
    unsettled = "" if contender["settled"] else " (unsettled)"
    return [
        contender["name"],
        milliseconds(best) + unsettled,
        milliseconds(times["p50"]),
        milliseconds(times["p90"]),
        milliseconds(times["p99"]),
        spread,
        milliseconds(best / case["lanes"]),
        _ratio(_best(case, "eager"), best),
        _ratio(best, _best(case, "tsad dense")),
        f"{contender['floor_share']:.0%}",
        f"{contender['difference']:.1e}" if contender["plan"] == "dense" else "-",
    ]


def title(case: Mapping[str, Any]) -> str:
    """A case in few words."""
    net = case["network"]
    words = [f"{case['sampler'].upper()}-{case['steps']}"]
    words += [f"T {net['horizon']}, d {net['n_emb']}"]
    words += [f"{case['lanes']} lane{'s' if case['lanes'] > 1 else ''}"]
    words += [f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}"]
    if case["pace_hz"]:
        words.append(f"at {case['pace_hz']:g} Hz")
    return ", ".join(words)


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """One Markdown table of all cases."""
    rows = [HEAD, ["---", "---", *["---:"] * (len(HEAD) - 2)]]
    for case in cases:
        for i, contender in enumerate(case["contenders"]):
            rows.append([title(case) if i == 0 else "", *_row(case, contender)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paced_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What only paced cases have: late ticks, and what the process used in between."""
    lines = []
    for case in cases:
        for contender in case["contenders"]:
            if case["pace_hz"] and contender["status"] == "ok":
                idle = contender["idle_cores"]
                lines.append(
                    f"{case['pace_hz']:g} Hz, {contender['name']}: {contender['late']:.0%} of the "
                    f"ticks late, between chunks {'-' if idle is None else f'{idle:.2%}'} of a core"
                )
    return lines


def episode_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What an episode of ours costs, its first chunk included, which is dense where it must be."""
    lines = []
    for case in cases:
        for contender in case["contenders"]:
            if contender["status"] == "ok" and "episode" in contender and contender["sparsity"]:
                first, episode = contender["first_ms"], contender["episode"]
                lines.append(
                    f"{title(case)}, {contender['name']}: first chunk {milliseconds(first)} ms, an "
                    f"episode's mean {milliseconds(episode['mean'])} and largest "
                    f"{milliseconds(episode['max'])}"
                )
    return lines


def _timed(cases: Sequence[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Any]]:
    """Pairs of case and contender, those that ran."""
    return [(case, c) for case in cases for c in case["contenders"] if c["status"] == "ok"]


def stage_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a chunk of ours is not denoising: encode, prune, plan, noise, checks."""
    lines = []
    for case, contender in _timed(cases):
        stages = contender.get("stages_ms")
        if stages and case["lanes"] == 1 and not case["pace_hz"]:
            outside, inside = stages["outside"], stages["denoise"]
            lines.append(
                f"{title(case)}, {contender['name']}: {milliseconds(outside)} ms outside the "
                f"denoising, {outside / (outside + inside):.1%}; denoising {milliseconds(inside)} "
                f"ms, {contender['floor']['ms'] / inside:.0%} of its floor"
            )
    return lines


def lane_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lanes together against the same lanes one after another, and against the arithmetic."""
    lines = []
    for case, contender in _timed(cases):
        if case["lanes"] > 1 and "memory_bytes" in contender and "/" not in contender["plan"]:
            apart = _best(case, f"{contender['name']}/one-by-one")
            ratio = _ratio(apart, contender["times"]["best_p50"])
            against = f"one after another takes {ratio} as long, " if apart else ""
            megabytes = contender["memory_bytes"] / case["lanes"] / 1e6
            lines.append(
                f"{title(case)}, {contender['name']}: {contender['arithmetic_share']:.0%} of the "
                f"arithmetic floor, {against}{megabytes:.1f} MB a lane"
            )
    return lines


def contended_lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a busy process on one core costs."""
    lines = []
    for case, contender in _timed(cases):
        if other := contender.get("contended"):
            verdict = "" if other["ratio"] <= other["bar"] else f", OVER {other['bar']:g}"
            lines.append(
                f"{title(case)}, {contender['name']}, one core taken: median "
                f"{milliseconds(other['p50'])} ms, {other['ratio']:.2f}x the quiet one{verdict}; "
                f"largest {milliseconds(other['max'])}, {other['chunks']} chunks"
            )
    return lines


def lines(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """All that the table has no column for."""
    made: list[str] = []
    for part in (stage_lines, episode_lines, lane_lines, paced_lines, contended_lines):
        made += part(cases)
    return made


def header(document: Mapping[str, Any]) -> str:
    """The machine and the conditions, for above the table."""
    machine = document["machine"]
    lines = [
        f"{machine['cpu']} (family {machine['family']}, model {machine['model']}), "
        f"{machine['cores']} cores, {machine['system']}; "
        + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    ]
    for case in document["cases"]:
        peak = case["roofline"]
        foreign = [v for c in case["contenders"] for v in c.get("foreign", []) if v is not None]
        busy = f", others used {max(foreign):.2f} cores at most" if foreign else ""
        lines.append(
            f"{title(case)}: {peak['backend']}, {peak['gflops']:.0f} GFLOP/s, reads "
            f"{peak['read_gbs']:.0f} GB/s of {peak['bytes'] / 1e6:.0f} MB{busy}"
        )
    return "\n".join(lines)


# ---- plot

PEERS = {
    "eager": "PyTorch eager", "compile": "torch.compile", "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}  # fmt: skip
PEER_GAP = 0.036  # of the axes' height, between the names of neighbours


def has_curve(case: Mapping[str, Any]) -> bool:
    """Whether there is a curve to plot: dense, and more than one sparsity beside it."""
    ours = [c for _, c in _timed([case]) if c["peer"] == "tsad"]
    known = {round(c["sparsity"], 3) for c in ours}
    return not case["pace_hz"] and _best(case, "tsad dense") is not None and len(known) > 2


def plot(case: Mapping[str, Any], machine: Mapping[str, Any], path: Path) -> None:
    """Latency against sparsity: our plans, the line of ideal saving, the floor, dense peers."""
    from matplotlib.figure import Figure

    timed = [c for c in case["contenders"] if c["status"] == "ok"]
    ours = sorted((c for c in timed if c["peer"] == "tsad"), key=lambda c: c["sparsity"])
    dense = _best(case, "tsad dense")
    if dense is None:
        raise DocumentError(f"cases[{case['name']}]: no 'tsad dense' to compare with")
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()

    def draw(points: list[Mapping[str, Any]], color: str, style: str, label: str) -> None:
        x = [100 * c["sparsity"] for c in points]
        y = [c["times"]["best_p50"] for c in points]
        low = [max(0.0, v - c["times"]["spread"][0]) for v, c in zip(y, points, strict=True)]
        high = [c["times"]["spread"][1] - v for v, c in zip(y, points, strict=True)]
        ax.errorbar(x, y, [low, high], color=color, fmt=style, label=label, capsize=3)

    lines = [c for c in ours if c["plan"] != "sparse95"]
    draw(lines, "#0072B2", "o-", "tsad, uniform plans")
    mixed = [c for c in ours if c["plan"] == "sparse95"]
    if mixed:
        draw(mixed, "#D55E00", "s", "tsad, the 95 % plan")
    halves = [c for c in timed if c["peer"] == "tsad-int16"]
    if halves:
        draw(halves, "#CC79A7", "^", "tsad, int16: dense, the 95 % plan")
    grid = [i / 10 for i in range(0, 996)]
    ax.plot(grid, [dense * (1 - s / 100) for s in grid], "--", color="#555555", label="ideal")
    floors = [c["floor"]["ms"] for c in lines]
    ax.plot([100 * c["sparsity"] for c in lines], floors, ":", color="#009E73", label="floor")
    ax.set(
        yscale="log", xlabel="sparsity, % of the cost", ylabel="ms per chunk, p50 of the best round"
    )
    ax.set_title(f"{title(case)}, {machine['cpu']}, {case['roofline']['backend']}", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, loc="lower left")
    _peers(ax, [c for c in timed if not c["peer"].startswith("tsad")])
    save_figure(figure, path)


def _peers(ax: Any, peers: Sequence[Mapping[str, Any]]) -> None:
    """A line for each, named at the right: neighbours' names are moved apart."""
    peers = sorted(peers, key=lambda c: float(c["times"]["best_p50"]))
    times = [c["times"]["best_p50"] for c in peers]
    for time in times:
        ax.axhline(time, color="#BBBBBB", linewidth=0.8)
    ax.get_ylim()  # settles the axes that the next line measures in
    to_axes = ax.transData + ax.transAxes.inverted()
    places = apart([to_axes.transform((1, time))[1] for time in times], PEER_GAP)
    for contender, time, place in zip(peers, times, places, strict=True):
        library, _, hoisted = contender["name"].partition("-")
        ax.annotate(
            f"{PEERS.get(library, library)}{', hoisted' if hoisted else ''}, {time:.0f} ms",
            (1, time),
            (1.03, place),
            ("axes fraction", "data"),
            textcoords="axes fraction",
            fontsize=8,
            va="center",
            color="#555555",
            arrowprops={
                "arrowstyle": "-",
                "color": "#BBBBBB",
                "linewidth": 0.8,
                "relpos": (0, 0.5),
            },
        )


def main(argv: list[str] | None = None) -> int:
    """Draw the pictures of a results file again, beside it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("file", type=Path, help="what bench.py wrote")
    path = parser.parse_args(argv).file
    document = read(path)
    for case in filter(has_curve, document["cases"]):
        plot(case, document["machine"], path.with_name(f"{path.stem}-{case['name']}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
