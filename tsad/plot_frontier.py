"""The picture of `tsad tune`: loss against milliseconds, and what brought each setting there."""

from __future__ import annotations

from collections.abc import Mapping
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


def family(setting: Mapping[str, Any]) -> str:
    """What makes a setting of a settings file cheap; a key of `FAMILIES`."""
    if setting.get("warm_start") is not None:
        return "warm"
    fewer = setting.get("steps") is not None
    sparse = bool(setting.get("plan") or setting.get("planner") or setting.get("sparsity"))
    return {(False, False): "dense", (True, False): "steps", (False, True): "plan"}.get(
        (fewer, sparse), "both"
    )


def plot_frontier(document: Mapping[str, Any], ax: Any) -> Any:
    """Draw what `tsad tune` wrote (``tune.json``) into matplotlib axes; returns them.

    Times are those of as many actions as the baseline executes of a chunk. Hollow marks are 16
    bits. The line is the frontier; grey is what may be lost.
    """
    rows, played = document["rows"], document["simulator"] is not None
    baseline = document["baseline"]

    def loss(name: str) -> float:
        if not played:
            return float(rows[name]["distance"])
        return float(rows[baseline]["score"]["mean"] - rows[name]["score"]["mean"])

    seen = set()
    for name, row in rows.items():
        setting = document["settings"][name]
        kind = "dense" if name == baseline else family(setting)
        mark, color, label = FAMILIES[kind]
        small = setting.get("precision") == "int16"
        if played and name != baseline:
            low, high = (-value for value in row["simultaneous"])
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
    ax.step(x, [loss(name) for name in best], where="post", color=INK, linewidth=1, zorder=0)
    bottom = ax.get_ylim()[0]
    ax.axhspan(bottom, document["within"], color="#DDDDDD", alpha=0.5, zorder=-1, linewidth=0)
    ax.set_ylim(bottom=bottom)
    for name in best:
        ax.annotate(
            name,
            (busy(rows, name), loss(name)),
            xytext=(3, 6),
            textcoords="offset points",
            rotation=40,  # neighbours would lie on each other
            rotation_mode="anchor",
            fontsize=7,
            color=INK,
        )
    _axes(ax, document, played)
    return ax


def _axes(ax: Any, document: Mapping[str, Any], played: bool) -> None:
    ax.set_xscale("log")
    ticker = require("matplotlib.ticker", extra="sim", purpose="a picture of the frontier")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(ticker.NullLocator())
    left, right = ax.get_xlim()
    ax.set_xlim(left, right * 1.25)  # room for the slowest one's name
    rows = document["rows"]
    alike = all(busy(rows, name) == row["milliseconds"] for name, row in rows.items())
    more = "" if alike else ", two where half of its actions are executed"
    ax.set_xlabel(f"milliseconds per chunk{more}", color=INK)
    what = "loss of score" if played else "distance of actions"
    ax.set_ylabel(f"{what} to {document['baseline']}", color=INK)
    ax.grid(color="#EEEEEE", zorder=-2)
    ax.legend(frameon=False, fontsize=8, labelcolor=INK)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def save_frontier(document: Mapping[str, Any], path: str | Path, *, overwrite: bool = True) -> None:
    """Draw it into an image file, whole or not at all; the format is that of the suffix."""
    figures = require("matplotlib.figure", extra="sim", purpose="a picture of the frontier")
    figure = figures.Figure(figsize=(8.5, 5), layout="constrained")
    plot_frontier(document, figure.subplots())
    save_figure(figure, path, overwrite=overwrite)
