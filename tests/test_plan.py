"""Plans: the core's resolver against three naive dictionaries; validation, numbers, files."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from cases import random_plan
from hypothesis import given, settings
from hypothesis import strategies as st

import tsad
from tsad import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan, _core, reference
from tsad.plan import SOURCE_NAMES

Cell = tuple[int, int]


def read_dictionaries(
    sources: Any, types: Any, rollout: dict[Cell, Any], chunk: int
) -> list[Any] | Cell:
    """What each cell adds, by the reference's rules: three dictionaries, written by compute alone.

    The first cell that reads a missing entry ends it. `rollout` is kept from chunk to chunk.
    """
    by_type: dict[int, Any] = {}
    by_block: dict[int, Any] = {}
    added: list[Any] = []
    for k, row in enumerate(sources):
        for b, source in enumerate(row):
            try:
                if source == COMPUTE:
                    value = (chunk, k, b)
                    by_type[types[b]] = by_block[b] = rollout[k, b] = value
                elif source == REUSE_TYPE:
                    value = by_type[types[b]]
                elif source == REUSE_STEP:
                    value = by_block[b]
                elif source == REUSE_ROLLOUT:
                    value = rollout[k, b]
                else:
                    value = None
            except KeyError:
                return k, b
            added.append(value)
    return added


def read_slots(sources: Any, slots: Any, buffer: dict[int, Any], chunk: int) -> list[Any]:
    """The same from one buffer and the core's slot table."""
    added: list[Any] = []
    n_blocks = sources.shape[1]
    for cell, (source, slot) in enumerate(zip(sources.ravel(), slots.ravel(), strict=True)):
        if source == COMPUTE:
            buffer[slot] = (chunk, *divmod(cell, n_blocks))
        added.append(buffer[slot] if slot >= 0 else None)
    return added


@st.composite
def episodes(draw: Any) -> tuple[Any, list[Any]]:
    steps, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    types = draw(st.lists(st.integers(0, 3), min_size=blocks, max_size=blocks))
    cells = st.lists(
        st.sampled_from([COMPUTE, COMPUTE, REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP]),
        min_size=steps * blocks,
        max_size=steps * blocks,
    )
    plans = draw(st.lists(cells, min_size=1, max_size=4))
    shaped = [np.array(plan, np.uint8).reshape(steps, blocks) for plan in plans]
    return np.array(types, np.uint8), shaped


@settings(max_examples=2000, deadline=None)
@given(episodes())
def test_resolver_equals_three_dictionaries(episode: tuple[Any, list[Any]]) -> None:
    types, plans = episode
    rollout: dict[Cell, Any] = {}
    buffer: dict[int, Any] = {}
    for chunk, sources in enumerate(plans):
        filled = np.zeros_like(sources)
        for cell in rollout:
            filled[cell] = 1
        expected = read_dictionaries(sources, types, dict(rollout), chunk)
        if isinstance(expected, tuple):
            with pytest.raises(ValueError, match=f"step {expected[0]}, block {expected[1]}: reuse"):
                _core.resolve(sources, types, filled)
            return
        slots = _core.resolve(sources, types, filled)
        assert slots.dtype == np.int32 and slots.shape == sources.shape
        assert read_slots(sources, slots, buffer, chunk) == expected
        read_dictionaries(sources, types, rollout, chunk)


def test_resolver_on_plans_of_the_standard_size() -> None:
    rng = np.random.default_rng(0)
    types = np.arange(24, dtype=np.uint8) % 3
    for _ in range(100):
        sources = random_plan(rng, 100, 24)
        every = {(k, b): (-1, k, b) for k in range(100) for b in range(24)}
        buffer = {k * 24 + b: value for (k, b), value in every.items()}
        slots = _core.resolve(sources, types, np.ones_like(sources))
        assert read_slots(sources, slots, buffer, 0) == read_dictionaries(sources, types, every, 0)


def test_resolver_refuses_bad_arrays() -> None:
    types = np.zeros(3, np.uint8)
    with pytest.raises(ValueError, match=r"step 0, block 1: the source is not 0"):
        _core.resolve(np.array([[0, 5, 0]], np.uint8), types)
    with pytest.raises(ValueError, match="right after a reset"):
        _core.resolve(np.array([[0, 3, 0]], np.uint8), types)
    with pytest.raises(ValueError, match=r"block_type: expected shape \(3,\), got \(2,\)"):
        _core.resolve(np.zeros((2, 3), np.uint8), types[:2])
    with pytest.raises(ValueError, match=r"filled: expected shape \(2, 3\), got \(3, 3\)"):
        _core.resolve(np.zeros((2, 3), np.uint8), types, np.ones((3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"block_type\[1\]: expected 0 to 31, got 32"):
        _core.resolve(np.zeros((2, 3), np.uint8), np.array([0, 32, 0], np.uint8))
    with pytest.raises(TypeError, match="sources: expected uint8, got int64"):
        _core.resolve(np.zeros((2, 3), np.int64), types)
    with pytest.raises(ValueError, match="sources: expected 1 to"):
        _core.resolve(np.zeros((0, 3), np.uint8), types)


# ---- Plan


def test_constants_are_the_contract() -> None:
    assert (COMPUTE, REUSE_TYPE, REUSE_STEP, REUSE_ROLLOUT, SKIP) == (0, 1, 2, 3, 4)
    assert (tsad.COMPUTE, tsad.SKIP) == (0, 4)
    assert (reference.COMPUTE, reference.SKIP) == (COMPUTE, SKIP)
    assert len(SOURCE_NAMES) == SKIP + 1


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([[0, 0, 0], [0, 5, 0]], r"step 1, block 1: expected 0 \(compute\) to 4 \(skip\), got 5"),
        ([[0, -1, 0]], "got -1"),
        ([0, 0, 0], r"expected shape \(num_inference_steps, blocks\), got \(3,\)"),
        (np.zeros((0, 3), np.uint8), r"got \(0, 3\)"),
        ([[2, 0, 0]], r"step 0, block 0 \(layers.0.self_attn\): reuse_step, but"),
        ([[0, 0, 1]], r"step 0, block 2 \(layers.0.feed_forward\): reuse_type, but"),
    ],
)
def test_invalid_sources_are_refused_by_cell(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(sources)


@pytest.mark.parametrize("sources", [np.zeros((2, 3)), [[False, True, False]], [["a"]]])
def test_sources_are_integers(sources: Any) -> None:
    with pytest.raises(TypeError, match="sources: expected integers"):
        Plan(sources)


def test_row_0_may_reuse_what_exists() -> None:
    sources = [[0, 0, 0, 1, 1, 1], [2, 2, 2, 1, 1, 1]]
    assert Plan(sources).counts == {
        "compute": 3,
        "reuse_type": 6,
        "reuse_step": 3,
        "reuse_rollout": 0,
        "skip": 0,
    }
    Plan([[3, 3, 3], [3, 4, 3]])  # from the first rollout, which is dense


def test_first_must_run_without_rollouts() -> None:
    steady = [[0, 0, 0], [3, 2, 2]]
    with pytest.raises(ValueError, match=r"first: step 0, block 1 \(layers.0.cross_attn\): reuse"):
        Plan(steady, [[0, 3, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match=r"sources: step 1, block 0 .*`first` does not compute"):
        Plan(steady, [[0, 0, 0], [2, 0, 0]])
    with pytest.raises(ValueError, match=r"first: expected shape \(2, 3\) as `sources` has"):
        Plan(steady, [[0, 0, 0]])
    plan = Plan(steady, [[0, 0, 0], [0, 2, 2]])
    assert plan.first is not None and plan.first.counts["compute"] == 4
    assert Plan(steady, plan.first) == plan
    assert Plan(steady, np.zeros((2, 3), int)).first is None  # dense is the default


def test_types_decide_what_reuse_type_takes() -> None:
    with pytest.raises(ValueError, match="types: expected one type name per block, 2"):
        Plan([[0, 1]])
    Plan([[0, 0], [2, 4]])  # nobody asks for types
    Plan([[0, 1]], types=["conv", "conv"])
    with pytest.raises(ValueError, match=r"step 0, block 1 \(up\): reuse_type"):
        Plan([[0, 1]], blocks=["down", "up"], types=["conv", "attn"])
    with pytest.raises(ValueError, match="types: expected 2 strings, one per block, got 3"):
        Plan([[0, 0]], types=["a", "b", "c"])
    with pytest.raises(ValueError, match="blocks: expected distinct names"):
        Plan([[0, 0]], blocks=["a", "a"])


def test_numbers_are_counted_in_cost() -> None:
    sources = [[0, 0, 0], [2, 0, 2], [4, 0, 1], [2, 2, 0]]
    plan = Plan(sources, cost=[6, 1, 9])
    assert plan.cost == (6 + 3 + 18) / 64
    assert plan.sparsity == 1 - plan.cost
    assert plan.cell_sparsity == 6 / 12
    assert Plan(sources).sparsity == Plan(sources).cell_sparsity
    dense = Plan(np.zeros((4, 3), int), cost=[6, 1, 9])
    assert (dense.sparsity, dense.cell_sparsity, dense.cost) == (0.0, 0.0, 1.0)
    for cost in ([1, 2], [1, -1, 1], [0, 0, 0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="cost: expected"):
            Plan(sources, cost=cost)


def test_plans_do_not_change() -> None:
    sources = np.zeros((2, 3), np.uint8)
    plan = Plan(sources, metadata={"a": [1]})
    sources[1] = 4
    assert plan.sources[1, 0] == 0
    with pytest.raises(ValueError):
        plan.sources[0, 0] = 1
    with pytest.raises(ValueError):
        plan.sources.setflags(write=True)
    with pytest.raises(AttributeError):
        plan.sources = sources  # type: ignore[misc]
    plan.metadata["a"].append(2)
    assert plan.metadata == {"a": [1]}


def test_equality_and_copies() -> None:
    a = Plan([[0, 0, 0], [2, 2, 2]], cost=[1, 2, 3])
    assert a == Plan([[0, 0, 0], [2, 2, 2]]) and hash(a) == hash(Plan(a.sources))
    assert a != Plan([[0, 0, 0], [2, 2, 0]])
    assert a != Plan(a.sources, a.sources)
    assert a != "a plan"
    copy = pickle.loads(pickle.dumps(a))
    assert copy == a and copy.cost == a.cost and not copy.sources.flags.writeable


def test_text_names_what_matters() -> None:
    plan = Plan([[0, 0, 0], [2, 1, 4]], cost=[6, 1, 9])
    assert repr(plan) == (
        "Plan(2 steps x 3 blocks, sparsity 50.0% of the cost, 50.0% of the cells, first dense)"
    )
    for word in ("layer 0 self", "reuse_step", "skip", "50.0%"):
        assert word in str(plan)
    assert "\x1b[" in plan.render(color=True) and "\x1b[" not in str(plan)


def test_plot_draws_into_axes() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = Plan([[0, 0, 0], [2, 1, 4]]).plot()
    assert axes.images[0].get_array().shape == (3, 2)
    matplotlib.pyplot.close("all")


# ---- files


def test_save_and_load(tmp_path: Any) -> None:
    rng = np.random.default_rng(1)
    for i in range(20):
        first = random_plan(rng, 7, 6, filled=False)
        sources = random_plan(rng, 7, 6, filled=first == COMPUTE)
        plan = Plan(
            sources,
            first,
            types=["x", "y", "z"] * 2,
            blocks=list("abcdef"),
            cost=rng.integers(1, 9, 6),
            metadata={"planner": "random", "seed": i},
        )
        path = tmp_path / "plan.npz"
        plan.save(path)
        again = Plan.load(path)
        assert again == plan
        assert (again.blocks, again.types, again.cost) == (plan.blocks, plan.types, plan.cost)
        assert again.metadata == plan.metadata and again.has_block_names
    assert [file.name for file in tmp_path.iterdir()] == ["plan.npz"]
    bare = Plan(np.zeros((3, 4), int))
    bare.save(str(path))
    assert Plan.load(str(path)) == bare and not Plan.load(path).has_block_names


def test_save_writes_the_very_path_and_no_half_file(tmp_path: Any) -> None:
    plan = Plan(np.zeros((2, 3), int))
    plan.save(tmp_path / "plan")  # no suffix appended
    assert Plan.load(tmp_path / "plan") == plan
    with pytest.raises(FileNotFoundError):
        plan.save(tmp_path / "nowhere" / "plan.npz")
    with pytest.raises(TypeError, match="metadata: expected what JSON can hold"):
        Plan([[0, 0, 0]], metadata={"a": object()})
    assert len(list(tmp_path.iterdir())) == 1


def _npz(path: Any, header: Any, **arrays: Any) -> None:
    np.savez(path, header=np.array(json.dumps(header)), **arrays)


HEADER = {"format": "tsad-plan", "version": 1, "blocks": None, "types": None, "metadata": {}}


@pytest.mark.parametrize(
    ("header", "arrays", "message"),
    [
        (HEADER | {"version": 2}, {"sources": np.zeros((2, 3), np.uint8)}, "version 2, expected 1"),
        (HEADER | {"format": "x"}, {"sources": np.zeros((2, 3), np.uint8)}, "not a plan"),
        (HEADER, {}, "not a plan: 'sources'"),
        (HEADER, {"sources": np.full((2, 3), 2, np.uint8)}, "step 0, block 0"),
        ({}, {"sources": np.zeros((2, 3), np.uint8)}, "not a plan"),
    ],
)
def test_foreign_files_are_refused(tmp_path: Any, header: Any, arrays: Any, message: str) -> None:
    path = tmp_path / "plan.npz"
    _npz(path, header, **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)


def test_broken_files_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "plan.npz"
    Plan(np.zeros((50, 24), int)).save(path)
    whole = path.read_bytes()
    garbled = whole[:100] + b"\xff" * 60 + whole[160:]
    for data in (whole[: len(whole) // 2], b"", b"not a zip", garbled):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="not a plan"):
            Plan.load(path)
    with pytest.raises(FileNotFoundError):
        Plan.load(tmp_path / "missing.npz")


def test_a_pickle_in_a_plan_file_does_nothing(tmp_path: Any) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "sprung"), "w"))

    path = tmp_path / "plan.npz"
    sources = np.array([[Trap()]], dtype=object)
    np.savez(path, header=np.array(json.dumps(HEADER)), sources=sources)
    with pytest.raises(ValueError, match="not a plan"):
        Plan.load(path)
    assert not (tmp_path / "sprung").exists()
