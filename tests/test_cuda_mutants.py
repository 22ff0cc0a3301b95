"""Does a planted fault fail on the emulated GPU? `python tests/cuda_mutants.py` tries them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import config, random_inputs
from cuda_library import SANITIZED, need_compiler
from cuda_mutants import MUTANTS, Mutant, Workshop, barriers, survives
from engine import make
from policies import save_policy

import tsad

# two that are quick to build, of what the host does, and two of the kernels
FEW = [
    mutant
    for mutant in [*barriers()[:1], *MUTANTS]
    if mutant.name
    in (
        "barrier 0 removed",
        "engine: actions before they are there",
        "run: the first row reads x0 before",
        "delivery: the slot is not written",
    )
]

ORDER = [m for m in MUTANTS if m.name.startswith("stream: ") or m.queue is not None]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    if SANITIZED:
        pytest.skip("each fault is compiled: minutes, with a sanitizer; the plain build shows them")
    need_compiler()
    shop = Workshop(tmp_path_factory.mktemp("mutants") / "shop")
    assert survives(shop.true), "the sources as they are fail"
    return shop


@pytest.mark.parametrize("mutant", FEW, ids=[mutant.name for mutant in FEW])
def test_a_planted_fault_is_seen(mutant: Mutant, workshop: Workshop) -> None:
    assert not survives(workshop.build(mutant))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ORDER, ids=[mutant.name for mutant in ORDER])
def test_a_fault_of_order_is_seen_where_work_begins_at_once(
    mutant: Mutant, workshop: Workshop
) -> None:
    """One piece of work of a stream waits at most. What the host writes after it has asked for the
    copy is right as long as all work waits for a wait, and wrong here."""
    assert not survives(workshop.build(mutant), most=1)
    if mutant.queue is not None:
        assert survives(workshop.build(mutant), most=0)


def test_a_failure_of_the_device_is_said(workshop: Workshop) -> None:
    """In mid-chunk: its lanes start anew, the others go on."""

    def check() -> None:
        policy = make("tiny", lanes=2, backend="cuda", steps=2)
        obs, noise = random_inputs(config("tiny"), 0, lanes=1, steps=2)
        said = "cuda: .*past the end of an array; nothing is returned, and the lanes of this call"
        with pytest.raises(RuntimeError, match=said):
            policy(obs, noise=noise, lanes=[1])
        assert policy._stats(1)["chunks"] == 0

    fault = next(m for m in MUTANTS if m.name == "product: rows beyond the last")
    assert survives(workshop.build(fault), check)


def test_a_gpu_that_forgets_what_it_computed_is_refused(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dense chunk is right: what was computed is reused in the next one (tsad/trust.py)."""
    fault = next(m for m in MUTANTS if m.name == "delivery: the slot is not written")
    library, folder = workshop.build(fault), save_policy(tmp_path / "policy")
    monkeypatch.setenv("TSAD_CUDA_LIBRARY", str(library))
    monkeypatch.delenv("TSAD_TRUST", raising=False)

    def check() -> None:
        said = r"first cell that differs is step \d, block '.*' \(reuse_\w+\) of the sparse chunk"
        with pytest.raises(RuntimeError, match=said):
            tsad.load(folder, device="cuda", sampler="ddim", num_inference_steps=3)

    assert survives(library, check)


def test_every_fault_can_be_planted() -> None:
    """A change of the sources must not leave the list behind."""
    assert (len(FEW), len(ORDER)) == (4, 5) and len(barriers()) > 0
    for mutant in [*barriers(), *MUTANTS]:
        assert mutant.text() != (Path(__file__).parents[1] / "cuda" / mutant.file).read_text()
