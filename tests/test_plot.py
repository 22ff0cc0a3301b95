"""tsad/plot/: pictures say what the data say, and can be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tsad
from tsad import plot
from tsad.plot import frontier as plot_frontier

pytest.importorskip("matplotlib")
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.legend import Legend  # noqa: E402
from matplotlib.text import Text  # noqa: E402

TYPES = ["self_attn", "cross_attn", "feed_forward"] * 2
BLOCKS = [f"layers.{b // 3}.{name}" for b, name in enumerate(TYPES)]
COST = np.array([6, 1, 9] * 2, np.int64)


def make_plan() -> tsad.Plan:
    sources = np.full((8, 6), tsad.REUSE_STEP, np.uint8)
    sources[0] = tsad.COMPUTE
    sources[3, 2] = tsad.COMPUTE
    sources[4, 3] = tsad.REUSE_TYPE
    sources[5, :2] = tsad.REUSE_ROLLOUT
    sources[6, 5] = tsad.SKIP
    return tsad.Plan(sources, blocks=BLOCKS, types=TYPES, cost=COST)


def draw(plan: tsad.Plan):
    return plot.plot_plan(plan, Figure(figsize=(10, 5)).subplots())


def test_every_cell_has_the_colour_of_its_source() -> None:
    plan = make_plan()
    (image,) = draw(plan).get_images()
    shown = image.to_rgba(image.get_array())[..., :3]  # (blocks, steps, rgb)
    expected = np.array([to_rgb(color) for color in plot.COLORS])[plan.sources.T]
    np.testing.assert_allclose(shown, expected)


def test_legend_counts_and_title() -> None:
    ax = draw(make_plan())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert [text.rsplit(" ", 1)[1] for text in texts] == ["(7)", "(1)", "(37)", "(2)", "(1)"]
    # 41 of 48 cells are not computed; in cost 32 + 9 of 8 x 32 are.
    title = ax.get_title(loc="left")
    assert "85.4% of the cells" in title and f"{1 - 41 / 256:.1%} of the cost" in title
    assert "8 steps x 6 blocks" in title and "7 of 48 computed" in title


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 100])
def test_steps_have_whole_numbers(steps: int) -> None:
    ax = draw(tsad.Plan(np.zeros((steps, 6), np.uint8), blocks=BLOCKS, types=TYPES, cost=COST))
    low, high = ax.get_xlim()
    shown = [place for place in ax.get_xticks() if low <= place <= high]
    assert shown and all(place == round(place) for place in shown)


def test_sources_that_do_not_occur_are_not_in_the_legend() -> None:
    plan = tsad.Plan(np.zeros((3, 6), np.uint8), blocks=BLOCKS, types=TYPES, cost=COST)
    assert len(draw(plan).get_legend().get_texts()) == 1


def test_rows_are_named_by_layer_and_type() -> None:
    ax = draw(make_plan())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["self", "cross", "ff"] * 2
    assert [text.get_text() for text in ax.texts] == ["layer 0", "layer 1"]


@pytest.mark.parametrize("names", [None, [f"down.{i}" for i in range(6)], list("abcdef")])
def test_other_block_names_and_none(names) -> None:
    draw(tsad.Plan(np.zeros((3, 6), np.uint8), blocks=names))


def test_many_blocks_keep_readable_labels() -> None:
    ax = draw(tsad.Plan(np.zeros((4, 300), np.uint8)))
    assert 0 < len(ax.get_yticklabels()) <= plot.MOST_ROW_LABELS


def test_the_palette_is_told_apart_by_all() -> None:
    """Every two colours differ for the three kinds of colour blindness, and computed is darkest."""
    colors = np.array([to_rgb(color) for color in plot.COLORS])
    linear = np.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    # Full protanopia, deuteranopia, tritanopia in linear RGB (Machado et al. 2009).
    kinds = [
        [0.1523, 1.0526, -0.2049, 0.1145, 0.7863, 0.0992, -0.0039, -0.0481, 1.0520],
        [0.3673, 0.8606, -0.2280, 0.2801, 0.6725, 0.0474, -0.0118, 0.0429, 0.9689],
        [1.2555, -0.0767, -0.1788, -0.0784, 0.9308, 0.1476, 0.0047, 0.6914, 0.3039],
        [1, 0, 0, 0, 1, 0, 0, 0, 1],
    ]  # fmt: skip
    for kind in kinds:
        seen = np.clip(linear @ np.reshape(kind, (3, 3)).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
        assert apart[~np.eye(len(seen), dtype=bool)].min() > 0.3
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert luminance.argmin() == tsad.COMPUTE and np.sort(luminance)[1] > 0.2


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_file(tmp_path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    plot.save_plan(make_plan(), path)
    magic = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert path.read_bytes().startswith(magic) and list(tmp_path.iterdir()) == [path]


def test_picture_has_all_five_colours(tmp_path) -> None:
    image = pytest.importorskip("PIL.Image")
    plot.save_plan(make_plan(), tmp_path / "plan.png")
    pixels = np.asarray(image.open(tmp_path / "plan.png").convert("RGB")).reshape(-1, 3)
    for color in plot.COLORS:
        rgb = np.round(np.array(to_rgb(color)) * 255)
        assert (np.abs(pixels - rgb).max(axis=1) <= 1).sum() > 500, color


def test_plan_plots_itself() -> None:
    import matplotlib

    matplotlib.use("agg")
    assert make_plan().plot().get_legend() is not None


def test_without_matplotlib_the_extra_is_named(monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ImportError, match=r"pip install 'tsad-policy\[sim\]'"):
        plot.plot_plan(make_plan())


# ---- the frontier


def frontier_document() -> dict[str, Any]:
    path = Path(__file__).resolve().parents[1] / "bench" / "results"
    (found,) = path.glob("*-frontier.json")
    return json.loads(found.read_text())


def test_places_are_moved_apart_and_no_further() -> None:
    assert plot_frontier.apart([0.1, 0.2, 0.9], 0.05) == [0.1, 0.2, 0.9]
    np.testing.assert_allclose(plot_frontier.apart([0.5, 0.5, 0.52], 0.1), [0.5, 0.6, 0.7])
    np.testing.assert_allclose(plot_frontier.apart([0.2, 0.97, 0.99], 0.1), [0.2, 0.9, 1.0])
    assert plot_frontier.apart([], 0.1) == []


@pytest.mark.parametrize(("closer", "height"), [(1, 6), (1e-3, 6), (1, 4)])
def test_labels_of_the_frontier_lie_apart_and_inside(closer: float, height: float) -> None:
    document = frontier_document()
    for name in document["frontier"]:  # as near to each other as times can be
        row = document["rows"][name]
        row["milliseconds"] = 2 + closer * (row["milliseconds"] - 2)
    figure = Figure(figsize=(8.5, height), layout="constrained")
    ax = plot_frontier.plot_frontier(document, figure.subplots())
    figure.draw_without_rendering()
    legends = [child for child in ax.get_children() if isinstance(child, Legend)]
    labels = [*ax.texts, ax.xaxis.label, ax.yaxis.label]
    labels += [text for legend in legends for text in legend.get_texts()]
    boxes = [Text.get_window_extent(text) for text in labels]  # an annotation's has its line in it
    assert len(boxes) == 2 * len(document["frontier"]) + len(plot_frontier.FAMILIES) + 1 + 2
    for i, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1)
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1)
        assert not any(box.overlaps(other) for other in boxes[:i]), labels[i]


def test_names_of_the_frontier_can_be_read() -> None:
    document = frontier_document() | {"presets": {"fast": "dpm-8-rows-0-6-int16"}}
    names = {name: plot_frontier.words(document, name) for name in document["rows"]}
    assert names["dpm-8-rows-0-6-int16"] == (
        'preset "fast": DPM-Solver++, 8 steps, 2 passes, 16 bits'
    )
    assert names["ddpm-100"] == "DDPM, 100 steps"
    assert names["ddim-16-trailing-warm-8-row-0"] == (
        "DDIM, the last 8 of 16 steps, 1 pass, trailing spacing"
    )
    assert names["ddim-8-warm-4-4-actions"] == "DDIM, the last 4 of 8 steps, 4 of 8 actions"
    document["settings"]["ddpm-100"] |= {"precision": "int8", "vision_precision": "int8"}
    assert plot_frontier.words(document, "ddpm-100") == (
        "DDPM, 100 steps, 8 bits, images in 8 bits"
    )
