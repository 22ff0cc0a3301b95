"""The picture of `tsad tune`: loss against milliseconds, and what brought each setting there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tsad._extras import require
from tsad.plot import COLORS, INK, save_figure
from tsad.sim.frontier import busy

# What makes a setting cheap, in the order of the legend: its mark and colour.
FAMILIES = {
    "dense": ("D", COLORS[0], "dense"),
    "steps": ("o", COLORS[2], "fewer steps"),
    "plan": ("s", COLORS[1], "sparse plan"),
    "both": ("^", "#009E73", "fewer steps and sparse plan"),
    "warm": ("v", "#CC79A7", "warm start"),
}
BITS = {"int16": "16 bits", "int8": "8 bits"}
SAMPLERS = {"ddpm": "DDPM", "ddim": "DDIM", "dpmsolver++": "DPM-Solver++"}
LOSSES = (-0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # marks of the axis
LINEAR = 0.1  # losses up to here are drawn to scale, those beyond by their logarithm
AXIS_HEIGHT = 40  # points: the marks and the name of the lower axis
NUMBER_GAP = 0.026  # of the axes' width, between the numbers of neighbours


def family(setting: Mapping[str, Any]) -> str:
    """What makes a setting of a settings file cheap; a key of `FAMILIES`."""
    if setting.get("warm_start") is not None:
        return "warm"
    fewer = setting.get("steps") is not None
    sparse = any(setting.get(name) for name in ("plan", "planner", "sparsity", "rule"))
    return {(False, False): "dense", (True, False): "steps", (False, True): "plan"}.get(
        (fewer, sparse), "both"
    )


def words(document: Mapping[str, Any], name: str) -> str:
    """A setting for whoever did not write it: "DPM-Solver++, 8 steps, 2 passes, 16 bits"."""
    row, setting = document["rows"][name], document["settings"][name]
    sampler, _, steps = row["sampler"].partition(", ")
    parts = [SAMPLERS.get(sampler, sampler), steps]
    if row["cell_sparsity"]:
        parts.append(f"{row['passes']:.2g} pass{'' if row['passes'] == 1 else 'es'}")
    if setting.get("spacing"):
        parts.append(f"{setting['spacing']} spacing")
    if setting.get("precision") in BITS:
        parts.append(BITS[setting["precision"]])
    if setting.get("smoothing"):
        parts.append("smoothed")
    if setting.get("lead"):
        parts.append(f"lead {setting['lead']:g}")
    if setting.get("reuse_images"):
        parts.append(f"images within {setting['reuse_images']:g} reused")
    if setting.get("vision_precision") in BITS:
        parts.append(f"images in {BITS[setting['vision_precision']]}")
    executed, all_ = (
        document["rows"][n].get("n_action_steps") for n in (name, document["baseline"])
    )
    if executed != all_:
        parts.append(f"{executed} of {all_} actions")
    presets = [preset for preset, made_of in document["presets"].items() if made_of == name]
    return "".join(f'preset "{preset}": ' for preset in presets) + ", ".join(parts)


def apart(places: Sequence[float], gap: float, end: float = 1.0) -> list[float]:
    """Rising places moved as little as it takes to lie `gap` apart, none past `end`."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], moved[i + 1] - gap if i + 1 < len(moved) else end)
    return moved


def plot_frontier(document: Mapping[str, Any], ax: Any) -> Any:
    """Draw what `tsad tune` wrote (``tune.json``) into matplotlib axes; returns them.

    Times are those of as many actions as the baseline executes of a chunk. Hollow marks are 16
    bits. Rows with a lead are judged by the baseline with its best lead. The line is the frontier,
    and its settings have numbers, which the key under the axes
    explains; grey is what may be lost.
    """
    rows, played = document["rows"], document["simulator"] is not None
    baseline = document["baseline"]

    def judge(name: str) -> str | None:
        """Dense with its best lead, of rows with a lead."""
        setting = document["settings"][name]
        led = setting.get("lead") or setting.get("smoothing")
        return document.get("dense_with_lead") if led else None

    def loss(name: str) -> float:
        if not played:
            return float(rows[name]["distance"])
        return float(rows[judge(name) or baseline]["score"]["mean"] - rows[name]["score"]["mean"])

    seen = set()
    for name, row in rows.items():
        setting = document["settings"][name]
        kind = "dense" if name == baseline else family(setting)
        mark, color, label = FAMILIES[kind]
        small = setting.get("precision") == "int16"
        found = row.get("to_dense_with_lead", {}) if judge(name) else row
        if found.get("simultaneous"):  # of enough seeds, and not the baseline
            low, high = (-value for value in found["simultaneous"])
            ax.plot([busy(rows, name)] * 2, [low, high], color=color, linewidth=0.7, alpha=0.4)
        ax.plot(
            busy(rows, name),
            loss(name),
            mark,
            color=color,
            markerfacecolor="white" if small else color,
            markersize=6,
            label=None if kind in seen or small else label,
        )
        seen |= set() if small else {kind}
    if any(setting.get("precision") == "int16" for setting in document["settings"].values()):
        ax.plot([], [], "o", color=INK, markerfacecolor="white", label="hollow: 16 bits")
    best = document["frontier"]
    x = [busy(rows, name) for name in best]
    ax.step(x, [loss(name) for name in best], where="post", color=INK, linewidth=1, zorder=1)
    _axes(ax, document, played)
    y, lost = [loss(name) for name in best], "lost" if played else "away"
    meanings = [
        f"{ms:.2f} ms, {round(away, 3) + 0:.3f} {lost}: {words(document, name)}"
        for name, ms, away in zip(best, x, y, strict=True)
    ]
    _key(ax, x, y, meanings)
    return ax


def _key(ax: Any, x: Sequence[float], y: Sequence[float], meanings: Sequence[str]) -> None:
    """Numbers at the foot of the axes, each with a line to its mark; their meanings below."""
    lines = require("matplotlib.lines", extra="sim", purpose="a picture of the frontier")
    transforms = require("matplotlib.transforms", extra="sim", purpose="a picture of the frontier")
    ax.get_xlim()  # settles the axes that the next line measures in
    to_axes = ax.transData + ax.transAxes.inverted()
    places = apart([to_axes.transform((value, 0.0))[0] for value in x], NUMBER_GAP)
    handles = []
    for number, (mark, meaning) in enumerate(zip(zip(x, y, strict=True), meanings, strict=True), 1):
        ax.annotate(
            number,
            mark,
            (places[number - 1], 0.015),
            textcoords="axes fraction",
            ha="center",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkB": 4},
        )
        style = {"color": INK, "linestyle": "", "markeredgewidth": 0}
        handles.append(lines.Line2D([], [], marker=f"${number}$", label=meaning, **style))
    kinds = ax.get_legend()
    below = transforms.ScaledTranslation(0, -AXIS_HEIGHT / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.02, 0),
        bbox_transform=ax.transAxes + below,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    ax.add_artist(kinds)


def _axes(ax: Any, document: Mapping[str, Any], played: bool) -> None:
    ticker = require("matplotlib.ticker", extra="sim", purpose="a picture of the frontier")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.5)
    ax.yaxis.set_major_locator(ticker.FixedLocator(LOSSES))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    bottom = ax.dataLim.ymin - LINEAR / 4  # room for the numbers
    ax.axhspan(bottom, document["within"], color="#DDDDDD", alpha=0.5, zorder=-1, linewidth=0)
    ax.set_ylim(bottom=bottom)
    rows = document["rows"]
    alike = all(busy(rows, name) == row["milliseconds"] for name, row in rows.items())
    more = "" if alike else ", two where half of its actions are executed"
    ax.set_xlabel(f"milliseconds per chunk{more}", color=INK)
    what = "score lost" if played else "distance of actions"
    ax.set_ylabel(f"{what}\nagainst {words(document, document['baseline'])}", color=INK)
    ax.set_axisbelow(True)
    ax.grid(color="#EEEEEE")
    ax.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def save_frontier(document: Mapping[str, Any], path: str | Path, *, overwrite: bool = True) -> None:
    """Draw it into an image file, whole or not at all; the format is that of the suffix."""
    figures = require("matplotlib.figure", extra="sim", purpose="a picture of the frontier")
    figure = figures.Figure(figsize=(8.5, 6), layout="constrained")
    plot_frontier(document, figure.subplots())
    save_figure(figure, path, overwrite=overwrite)
