"""Trainings of pruners that stop and go on, and their command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import config as case_config
from cases import random_tensors
from command_line import run

from tsad.checkpoint import read_folder, write_folder
from tsad.config import PolicyConfig

torch = pytest.importorskip("torch")

from pruner_cases import SETTINGS, STEPS, make, write_data, write_policy  # noqa: E402

from tsad.training import pruner, pruner_net  # noqa: E402
from tsad.training.pruner import PrunerTrainer  # noqa: E402
from tsad.training.running import InterruptedTrainingError, load_state  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def any_width(monkeypatch):
    """A pruner for a network of a few thousand numbers can't be small beside it."""
    monkeypatch.setattr(pruner_net, "MOST", 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return write_policy(tmp_path_factory.mktemp("policy") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: Any) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "obs.npz")


# Stopping and going on


@pytest.mark.parametrize(
    ("method", "at"),
    [
        ("effects", "measuring"),
        ("effects", "training"),
        ("levels", "measuring"),
        ("gates", "training"),
    ],
)
def test_resuming_equals_not_stopping_to_the_bit(folder, tmp_path, monkeypatch, method, at):
    settings = replace(SETTINGS, method=method, batch=4)
    whole = make(folder, tmp_path / "whole", settings)
    whole.prepare()
    whole.fit(report_every=4)
    first = make(folder, tmp_path / "parts", settings)
    if at == "measuring":
        ran: list[int] = []

        def stop(done: int) -> None:
            ran.append(done)
            if len(ran) == 5:  # three windows of effects, then gains
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(InterruptedTrainingError):
            first.prepare(stop)
    else:
        first.prepare()
        for _ in range(7):
            first.train_step()
            if first.step == 4:
                first._report(None)
        first.save()
    torch.manual_seed(99)
    second = make(folder, tmp_path / "parts", settings)
    again: list[int] = []
    second.prepare(again.append)
    second.restore(load_state(tmp_path / "parts"))
    second.fit(report_every=4)
    assert second.step == whole.step == 20
    assert [replace(r, seconds=0.0) for r in second.curve] == [
        replace(r, seconds=0.0) for r in whole.curve
    ]
    files = [(tmp_path / d / "pruner.safetensors").read_bytes() for d in ("whole", "parts")]
    assert files[0] == files[1]


OPTIONS = (
    "--steps 8 --hidden 16 --sparsity 0.6 --chunks 24 --projections 1 --batch 8 --val-episodes 1 "
    "--device cpu --report-every 4"
).split()


def test_the_command_and_its_interruptions(folder, data, tmp_path, monkeypatch, capsys):
    words = ["train-pruner", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
    window, step = PrunerTrainer._window, PrunerTrainer.train_step
    count = [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return window(self, *args)

    monkeypatch.setattr(PrunerTrainer, "_window", interrupted)
    code, _, err = run(capsys, *words, *OPTIONS)
    assert code == 130 and "measured 30 of 42 chunks; go on with: tsad train-pruner" in err, err
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pruner_net, "MOST", 0.5)

    def stopped(self):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(PrunerTrainer, "train_step", stopped)
    command = re.split("go on with: tsad ", err)[1].split()
    code, _, err = run(capsys, *command)
    assert code == 130 and "saved at step 5" in err
    monkeypatch.undo()
    monkeypatch.setattr(pruner_net, "MOST", 0.5)
    code, _, err = run(capsys, *command, "--lr", "0.5")
    assert code == 2 and "argument --lr: got 0.5, but the training in" in err
    code, out, err = run(capsys, *command, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["steps"] == 8 and 0 < summary["share_of_dense_macs"] < 0.5
    config, _, _ = read_folder(tmp_path / "out")
    assert config.provenance["sha256"]["pruner.safetensors"] == summary["sha256"]
    assert config.provenance["pruner"]["of"]["held_out"]
    whole = [*words[:-1], str(tmp_path / "whole"), *OPTIONS]
    assert run(capsys, *whole)[0] == 0
    files = [(tmp_path / d / "pruner.safetensors").read_bytes() for d in ("out", "whole")]
    assert files[0] == files[1]
    code, _, err = run(capsys, *words, *OPTIONS)
    assert code == 2 and "argument --out: " in err and "isn't empty" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--steps 5 --hidden 5000", "argument --hidden: got 5000, expected 1 to "),
        ("--steps 5 --sparsity 0.99", "argument --sparsity: expected up to 0.833333"),
        ("--steps 5 --sparsity 1", "argument --sparsity: expected a number in (0, 1), got 1.0"),
        ("--steps 5 --method magic", "argument --method: expected one of effects, levels, gates"),
        ("--steps 5 --plans nothing.npz", "argument --plans: got 'nothing.npz'"),
        ("--steps 5 --lr 2", "argument --lr: expected a number in (0, 1)"),
        ("", "argument --minutes, --steps: expected one of them"),
        ("--steps 5 --val-episodes 4", "argument --val-episodes: got 4, expected 0 to 3"),
        ("--steps 5 --effects nothing.npz", "argument --effects: "),
        ("--steps 5 --device nowhere", "argument --device: got 'nowhere'"),
        ("--resume", "argument --resume: "),
    ],
)
def test_the_command_names_what_is_wrong(folder, data, tmp_path, capsys, words, message):
    command = ["train-pruner", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
    code, _, err = run(capsys, *command, *words.split())
    assert code == 2 and message in err, err
    assert list(tmp_path.iterdir()) == []


def test_other_data_and_other_trainings_are_not_resumed(folder, data, tmp_path, capsys):
    words = ["train-pruner", str(folder), "--data", str(data), "--out", str(tmp_path / "out")]
    assert run(capsys, *words, *OPTIONS)[0] == 0
    arrays = dict(np.load(data))
    np.savez(tmp_path / "other.npz", obs=arrays["obs"] + 1, episode_ends=arrays["episode_ends"])
    words[3] = str(tmp_path / "other.npz")
    code, _, err = run(capsys, *words, "--resume")
    assert code == 2 and "of another policy or other data; held_out: " in err, err
    state = {"version": 1, "settings": {}, "data": []}
    torch.save(state, tmp_path / "out" / "training.pt")
    code, _, err = run(capsys, *words, "--resume")
    assert code == 2 and "holds the training of a policy" in err, err


def test_an_encoder_with_attention_is_refused(tmp_path, data, capsys):
    case = case_config("tiny_encoder", num_inference_steps=STEPS)
    tensors = random_tensors(case["network"], 0)
    write_folder(tmp_path / "p", PolicyConfig.from_dict(case), tensors)
    words = ["train-pruner", str(tmp_path / "p"), "--data", str(data), "--out"]
    code, _, err = run(capsys, *words, str(tmp_path / "out"), "--steps", "5")
    assert code == 2 and "argument POLICY: " in err and "n_cond_layers 0" in err, err


@pytest.mark.parametrize(
    ("method", "file"), [("effects", pruner.GAINS_FILE), ("levels", pruner.ERRORS_FILE)]
)
@pytest.mark.parametrize("other", ["seed", "chunks"])
def test_what_another_training_measured_is_not_taken(folder, tmp_path, method, file, other):
    settings = replace(SETTINGS, method=method)
    first = make(folder, tmp_path / "first", settings)
    first.prepare()
    if other == "seed":
        second = make(folder, tmp_path / "second", replace(settings, seed=1))
    else:
        second = make(folder, tmp_path / "second", settings, order=(1, 0, 2, 3))
    second.out.mkdir()
    for name in (pruner.EFFECTS_FILE, file):  # the same order of cells
        shutil.copy(first.out / name, second.out / name)
    with pytest.raises(ValueError, match=f"{file}: expected what was measured of the cells' order"):
        second.prepare()
    before = np.load(first.out / file)
    np.savez(second.out / file, values=before["values"], lengths=before["lengths"], order="older")
    with pytest.raises(ValueError, match="delete it, or train in another folder"):
        second.prepare()
