"""Fine-tuning for a warm start: chunks that begin with the one before."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from demonstrations import TINY, standing_demonstrations  # noqa: E402
from test_training import call, equal_states  # noqa: E402

from tsad.checkpoint import read_folder  # noqa: E402
from tsad.commands.common import UsageError  # noqa: E402
from tsad.reference import ReferencePolicy  # noqa: E402
from tsad.samplers import make_sampler, tail  # noqa: E402
from tsad.training.running import load_state  # noqa: E402
from tsad.training.train import Trainer  # noqa: E402
from tsad.training.warm import WarmStarts, before_windows, spread  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    return standing_demonstrations(tmp_path)


@pytest.fixture
def old(demos: Path, tmp_path: Path) -> str:
    """A policy to begin from."""
    Trainer([demos], tmp_path / "old", replace(TINY, steps=40, lr=2e-2)).fit()
    return str(tmp_path / "old")


def test_it_begins_with_what_the_chunk_before_said_moved_by_what_was_executed(old):
    config, tensors, _ = read_folder(old)
    trainer = Trainer([Path(old).parent / "demos.npz"], "unused", replace(TINY, init=old))
    starts = WarmStarts(config.scheduler, 8, 3)
    ddim = {**config.to_dict()["scheduler"], "type": "ddim", "timestep_spacing": "trailing"}
    data = config.to_dict()
    data["scheduler"] = {**ddim, "num_inference_steps": 4}
    reference = ReferencePolicy(data, tensors, lanes=6)
    rng = np.random.default_rng(0)
    obs, noise = rng.uniform(-3, 3, (6, 2, 3)), rng.standard_normal((4, 6, 5, 2))
    chunk = reference(obs, noise, return_horizon=True)
    chunk = config.normalizer.action.normalise(chunk, np.float64)
    moved = np.concatenate([chunk[:, 3:], chunk[:, -1:], chunk[:, -1:], chunk[:, -1:]], 1)
    seen = torch.from_numpy(config.normalizer.obs.normalise(obs))
    found = starts(trainer.ema, seen, torch.from_numpy(noise[0]).float())
    np.testing.assert_allclose(found.numpy(), moved, atol=2e-5)
    rows = tail(make_sampler({**ddim, "num_inference_steps": 16}), 8)
    assert starts.timestep == rows.timesteps[0]
    signal, level = rows.mixture(0)  # what the engine begins a warm chunk with
    share = float(trainer.signal[starts.timestep])
    assert (share**0.5, (1 - share) ** 0.5) == pytest.approx((signal, level), abs=1e-6)


def test_windows_know_the_chunk_before():
    steps, there = before_windows(np.array([0, 2, 3, 4, 5, 7, 8, 11]), np.array([5, 12]), 2, 3)
    assert there.tolist() == [False, False, True, True, False, False, True, True]
    assert steps[there].tolist() == [[0, 0], [0, 1], [5, 5], [7, 8]]


def test_rows_are_spread_over_the_time_steps():
    assert spread(6, 0.5).tolist() == [False, True] * 3
    assert spread(64, 0.25).sum() == 16 and spread(10, 0.3).sum() == 3
    assert spread(64, 0.25)[:32].sum() == 8


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_one_pass_from_the_chunk_before_learns_what_was_demonstrated(demos, tmp_path, kind):
    """From noise, a plain training of as many steps learns less of it."""
    own = replace(TINY, batch=32, lr=2e-2, prediction_type=kind)
    Trainer([demos], tmp_path / "begun", replace(own, steps=60)).fit()
    init, errors = replace(own, init=str(tmp_path / "begun"), steps=150), []
    for name, share in (("little", 0.05), ("half", 0.5)):
        settings = replace(init, warm_start=8, warm_share=share)
        trainer = Trainer([demos], tmp_path / name, settings)
        errors.append(trainer.evaluate().warm_error)
        trainer.fit()
        errors.append(trainer.evaluate().warm_error)
    assert errors[0] == errors[2] > 0  # of the same weights
    # of samples most of the loss is at the last, almost clean steps
    assert errors[3] < (0.5 if kind == "epsilon" else 0.9) * errors[0]
    if kind == "epsilon":
        assert errors[3] < 0.8 * errors[1]


def test_a_plain_training_has_no_such_error(old, demos, tmp_path):
    errors = []
    for settings in (replace(TINY, init=old, warm_start=8), replace(TINY, init=old)):
        errors.append(Trainer([demos], tmp_path / "x", settings).evaluate().warm_error)
    assert errors[0] is not None and 0 < errors[0] < 30 and errors[1] is None


def test_resuming_equals_not_stopping_to_the_bit(old, demos, tmp_path):
    settings = replace(TINY, init=old, warm_start=8, steps=12)
    whole = Trainer([demos], tmp_path / "whole", settings)
    whole.fit(report_every=4)
    first = Trainer([demos], tmp_path / "parts", settings)
    first.out.mkdir()
    for _ in range(7):
        first.train_step()
    first.save()
    second = Trainer([demos], tmp_path / "parts", settings)
    second.restore(load_state(tmp_path / "parts"))
    second.fit(report_every=4)
    for key in ("net", "ema"):
        assert equal_states(getattr(whole, key).state_dict(), getattr(second, key).state_dict())
    assert whole.curve[-1].warm_error == second.curve[-1].warm_error is not None


def test_the_card_says_what_it_is(old, demos, tmp_path, capsys):
    out = tmp_path / "warm"
    sizes = "--horizon 5 --n-action-steps 3 --n-layer 1 --n-head 2 --n-emb 16 --batch 8".split()
    words = [str(demos), "--init", old, "--warm-start", "8", "--warm-share", "0.25", *sizes]
    words += ["--val-episodes", "1", "--device", "cpu", "--steps", "4", "--out", str(out)]
    assert call(*words) == 0
    card = (out / "README.md").read_text()
    assert "25% of the windows began with its own chunk before" in card and "`warm_start=8`" in card
    assert read_folder(out)[0].provenance["training"]["warm_start"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--warm-start", "8"], "argument --warm-start: got 8 without init"),
        (["--warm-share", "0.3"], "argument --warm-share: got 0.3 without warm_start"),
        (
            ["--init", "OLD", "--warm-start", "17"],
            "argument --warm-start: expected an integer from",
        ),
        (["--init", "OLD", "--warm-start", "8", "--warm-share", "1"], "argument --warm-share: "),
    ],
)
def test_what_is_wrong_is_named(old, demos, tmp_path, words, message):
    words = [old if word == "OLD" else word for word in words]
    with pytest.raises(UsageError, match=re.escape(message)):
        call(str(demos), *words, "--steps", "5", "--out", str(tmp_path / "out"))


def test_episodes_of_a_chunk_have_none_before(old, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "short.npz", obs=rng.random((9, 3)), action=rng.random((9, 2)),
             episode_ends=[3, 6, 9])  # fmt: skip
    with pytest.raises(ValueError, match="warm_start: no episode of short.npz goes on for the 3"):
        Trainer([tmp_path / "short.npz"], tmp_path / "z", replace(TINY, init=old, warm_start=8))
