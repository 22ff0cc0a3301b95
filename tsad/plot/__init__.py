"""Pictures of plans: one cell per (step, block), coloured by where its value comes from.

The colours are of Okabe and Ito's palette, which the colour-blind can tell apart; computed cells
are also the darkest, so that the picture survives a black-and-white printer.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsad._extras import require
from tsad.files import write_atomically

if TYPE_CHECKING:
    from tsad.plan import Plan

# By source code: compute, reuse_type, reuse_step, reuse_rollout, skip.
SOURCE_MEANINGS = (
    "computed",
    "reused: same type, other layer",
    "reused: same block, earlier step",
    "reused: same cell, earlier rollout",
    "skipped",
)
COLORS = ("#000000", "#D55E00", "#56B4E9", "#F0E442", "#999999")
INK = "#333333"
SHORT_TYPES = {"self_attn": "self", "cross_attn": "cross", "feed_forward": "ff"}
MOST_ROW_LABELS = 60


def block_labels(blocks: Sequence[str]) -> list[tuple[str, str]]:
    """(group, label) of each block: ("layer 0", "self") of "layers.0.self_attn"."""
    labels = []
    for name in blocks:
        group, _, leaf = name.rpartition(".")
        if group.startswith("layers."):
            group = "layer " + group.removeprefix("layers.")
        labels.append((group, SHORT_TYPES.get(leaf, leaf)))
    return labels


def title(plan: Plan) -> str:
    """Size and sparsity of a plan in one line."""
    steps, blocks = plan.sources.shape
    computed = int((plan.sources == 0).sum())
    return (
        f"{steps} steps x {blocks} blocks, sparsity {plan.sparsity:.1%} of the cost, "
        f"{plan.cell_sparsity:.1%} of the cells; {computed:,} of {plan.sources.size:,} computed"
    )


def _draw_rows(ax: Any, plan: Plan) -> None:
    """Name the rows by block, and part the groups (layers) by lines."""
    n_blocks = plan.sources.shape[1]
    labels = block_labels(plan.blocks)
    every = -(-n_blocks // MOST_ROW_LABELS)
    shown = range(0, n_blocks, every)
    ax.set_yticks(list(shown), [labels[b][1] for b in shown], fontsize=7)
    starts = [b for b in range(n_blocks) if b == 0 or labels[b][0] != labels[b - 1][0]]
    for begin, end in zip(starts, [*starts[1:], n_blocks], strict=True):
        if begin:
            ax.axhline(begin - 0.5, color=INK, linewidth=0.7)
        if labels[begin][0]:
            ax.annotate(
                labels[begin][0],
                (-38, (begin + end - 1) / 2),
                fontsize=8,
                color=INK,
                xycoords=("axes points", "data"),
                ha="center",
                va="center",
                rotation=90,
                annotation_clip=False,
            )


def plot_plan(plan: Plan, ax: Any = None) -> Any:
    """Draw a plan; returns the matplotlib axes.

    Args:
        plan: a `tsad.Plan`; its `first` plan (after a reset) is a plan too and can be drawn alike.
        ax: axes to draw into; None makes a figure of fitting size.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra.
    """
    colors = require("matplotlib.colors", extra="sim", purpose="a picture of a plan")
    patches = require("matplotlib.patches", extra="sim", purpose="a picture of a plan")
    n_steps, n_blocks = plan.sources.shape
    if ax is None:
        pyplot = require("matplotlib.pyplot", extra="sim", purpose="a picture of a plan")
        ax = pyplot.subplots(figsize=_size(n_steps, n_blocks), layout="constrained")[1]
    ax.imshow(
        plan.sources.T,
        cmap=colors.ListedColormap(COLORS),
        vmin=-0.5,
        vmax=4.5,
        aspect="auto",
        interpolation="nearest",
    )
    # White lines tell neighbouring cells of one colour apart, while there is room for them.
    if n_steps <= 150:
        ax.set_xticks(np.arange(-0.5, n_steps), minor=True)
        ax.set_yticks(np.arange(-0.5, n_blocks), minor=True)
        ax.grid(which="minor", color="white", linewidth=0.4)
    ax.tick_params(which="both", length=0, colors=INK)
    ax.tick_params(axis="x", labelsize=9)
    ax.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)  # there are no half steps
    for spine in ax.spines.values():
        spine.set_visible(False)
    _draw_rows(ax, plan)
    ax.set_xlabel("denoising step (0 is the noisiest)", color=INK)
    ax.set_title(title(plan), fontsize=10, color=INK, loc="left")
    counts = np.bincount(plan.sources.ravel(), minlength=5)
    handles = [
        patches.Patch(
            facecolor=COLORS[i],
            edgecolor=INK,
            linewidth=0.5,
            label=f"{SOURCE_MEANINGS[i]} ({counts[i]:,})",
        )
        for i in range(5)
        if counts[i]
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.0),
        borderaxespad=4.2,
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )
    return ax


def _size(n_steps: int, n_blocks: int) -> tuple[float, float]:
    """Figure size in inches: cells a few millimetres wide, the whole within a page or a screen."""
    width = min(max(2.2 + 0.1 * n_steps, 8.5), 16.0)
    height = min(max(1.6 + 0.16 * min(n_blocks, MOST_ROW_LABELS), 2.6), 12.0)
    return width, height


def save_figure(figure: Any, path: str | Path, *, overwrite: bool = True) -> None:
    """Write a figure as an image file, whole or not at all; the format is that of the suffix."""
    kind = Path(path).suffix.lstrip(".") or "png"
    image = io.BytesIO()  # some formats write by other ways than a stream's
    figure.savefig(image, format=kind, dpi=150)
    write_atomically(path, image.getvalue(), overwrite=overwrite)


def save_plan(plan: Plan, path: str | Path, *, overwrite: bool = True) -> None:
    """Draw a plan into an image file, as `save_figure` does."""
    figures = require("matplotlib.figure", extra="sim", purpose="a picture of a plan")
    # A figure of its own, not pyplot's: no window system, nothing left behind.
    figure = figures.Figure(figsize=_size(*plan.sources.shape), layout="constrained")
    plot_plan(plan, figure.subplots())
    save_figure(figure, path, overwrite=overwrite)
