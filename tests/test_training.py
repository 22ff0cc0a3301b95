"""tsad.training: the torch network, the data, and a trainer that can be stopped anywhere."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from demonstrations import TINY, standing_demonstrations  # noqa: E402

from tsad._extras import MissingExtraError  # noqa: E402
from tsad.checkpoint import STATE_FILE, read_folder  # noqa: E402
from tsad.commands import train_policy  # noqa: E402
from tsad.commands.common import InterruptedRunError, UsageError  # noqa: E402
from tsad.config import network_shapes  # noqa: E402
from tsad.training import running  # noqa: E402
from tsad.training.data import (  # noqa: E402
    DataError,
    limits,
    load_demonstrations,
    state_observations,
    windows,
)
from tsad.training.network import TransformerForDiffusion, from_config  # noqa: E402
from tsad.training.running import Clock, load_state, save_state  # noqa: E402
from tsad.training.train import (  # noqa: E402
    InterruptedTrainingError,
    Trainer,
    learning_rate,
    signal_shares,
    step_weights,
)

NETWORK = {
    "horizon": 5, "n_obs_steps": 3, "n_action_steps": 2, "obs_dim": 4, "action_dim": 2,
    "n_layer": 2, "n_head": 2, "n_emb": 16, "n_cond_layers": 0,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    return standing_demonstrations(tmp_path)


def equal_states(a, b) -> bool:
    return all(torch.equal(x, b[name]) for name, x in a.items())


# The network


def random_inputs(n: int = 3):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((n, 5, 2), generator=generator, dtype=torch.float64)
    cond = torch.randn((n, 3, 4), generator=generator, dtype=torch.float64)
    return sample, torch.tensor([0, 50, 99])[:n], cond


@pytest.mark.parametrize("n_cond_layers", [0, 1])
def test_network_has_the_tensors_of_the_format(n_cond_layers):
    config = NETWORK | {"n_cond_layers": n_cond_layers}
    state = from_config(config).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == network_shapes(config)


def test_tokens_see_what_came_before_them_and_no_more():
    net = from_config(NETWORK).double().eval()
    sample, t, cond = random_inputs()
    plain = net(sample, t, cond)
    for observation in range(3):
        other = cond.clone()
        other[:, observation] += 1
        changed = (net(sample, t, other) - plain).abs().amax((0, 2)) > 0
        assert changed.tolist() == [row >= observation for row in range(5)]
    for action in range(5):
        other = sample.clone()
        other[:, action] += 1
        changed = (net(other, t, cond) - plain).abs().amax((0, 2)) > 0
        assert changed.tolist() == [row >= action for row in range(5)]
    free = from_config(NETWORK | {"causal_attn": False}).double().eval()
    free.load_state_dict(net.state_dict())
    other = sample.clone()
    other[:, 4] += 1
    assert ((free(other, t, cond) - free(sample, t, cond)).abs().amax((0, 2)) > 0).all()


def attention(tensors, name, x, memory, heads, mask):
    """Multi-head attention by hand."""
    q, k, v = (
        source @ w.T + b
        for source, w, b in zip(
            (x, memory, memory),
            tensors[f"{name}.in_proj_weight"].chunk(3),
            tensors[f"{name}.in_proj_bias"].chunk(3),
            strict=True,
        )
    )
    size = x.shape[1] // heads
    parts = []
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        scores = q[:, at] @ k[:, at].T / size**0.5
        parts.append(torch.softmax(scores.masked_fill(~mask, -torch.inf), 1) @ v[:, at])
    out = torch.cat(parts, 1)
    return out @ tensors[f"{name}.out_proj.weight"].T + tensors[f"{name}.out_proj.bias"]


def test_network_equals_its_description():
    """One sample through matrices, without torch's layers: method, not implementation."""
    torch.manual_seed(1)
    net = from_config(NETWORK).double().eval()
    w = {name: torch.randn_like(t) * 0.3 for name, t in net.state_dict().items()}
    net.load_state_dict(w)
    sample, t, cond = (value[1] for value in random_inputs())

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        centred = x - x.mean(1, keepdim=True)
        unit = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        return unit * w[f"{name}.weight"] + w[f"{name}.bias"]

    angle = float(t) * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 7)
    time = torch.cat([angle.sin(), angle.cos()])[None]
    tokens = torch.cat([time, linear("cond_obs_emb", cond)]) + w["cond_pos_emb"][0]
    hidden = linear("encoder.0", tokens)
    memory = linear("encoder.2", hidden * torch.tanh(torch.log1p(hidden.exp())))
    x = linear("input_emb", sample) + w["pos_emb"][0]
    rows = torch.arange(5)[:, None]
    for i in range(2):
        name = f"decoder.layers.{i}"
        y = norm(f"{name}.norm1", x)
        x = x + attention(w, f"{name}.self_attn", y, y, 2, torch.arange(5) <= rows)
        y = norm(f"{name}.norm2", x)
        seen = torch.arange(4) <= rows + 1
        x = x + attention(w, f"{name}.multihead_attn", y, memory, 2, seen)
        y = linear(f"{name}.linear1", norm(f"{name}.norm3", x))
        x = x + linear(f"{name}.linear2", y * 0.5 * (1 + torch.erf(y / 2**0.5)))
    by_hand = linear("head", norm("ln_f", x))
    got = net(sample[None], t, cond[None])[0]
    torch.testing.assert_close(got, by_hand, rtol=1e-10, atol=1e-10)


def test_network_refuses_an_impossible_width():
    with pytest.raises(ValueError, match="n_emb=10 .* n_head=4"):
        TransformerForDiffusion(
            horizon=4, n_obs_steps=1, obs_dim=2, action_dim=1, n_head=4, n_emb=10
        )


# The objective


def test_schedule_matches_published_values():
    shares = signal_shares(TINY.scheduler()).double()
    for step, value in ((99, 2.428572e-7), (78, 0.10333939), (50, 0.47826463), (1, 0.99825249)):
        assert float(shares[step]) == pytest.approx(value, rel=2e-4)


def test_sample_and_noise_prediction_have_the_same_objective():
    shares = signal_shares(TINY.scheduler()).double()
    noise = step_weights(shares, TINY)
    sample = step_weights(shares, replace(TINY, prediction_type="sample"))
    # x = sqrt(A) x0 + sqrt(1 - A) z: an error d of x0 is one of sqrt(A / (1 - A)) d in z
    torch.testing.assert_close(sample, noise * shares / (1 - shares))


def test_learning_rate_rises_holds_and_falls_to_zero():
    settings = replace(TINY, lr=1.0 - 1e-9, warmup=10, decay=0.5)
    rates = [learning_rate(settings, s, f) for s, f in ((0, 0), (50, 0.4), (50, 0.75), (99, 1.0))]
    assert rates == pytest.approx([0.1, 1, 0.5, 0])


# The data


def test_windows_pad_at_both_ends_of_an_episode():
    steps, inside = windows([6, 10], horizon=5, n_obs_steps=2, n_action_steps=3)
    expected = [
        [0, 0, 1, 2, 3], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [2, 3, 4, 5, 5], [3, 4, 5, 5, 5],
        [6, 6, 7, 8, 9], [6, 7, 8, 9, 9], [7, 8, 9, 9, 9],
    ]  # fmt: skip
    assert steps.tolist() == expected
    assert inside.sum(1).tolist() == [5, 5, 5, 4, 3, 5, 4, 3]
    with pytest.raises(DataError, match="horizon 50"):
        windows([6, 10], 50, 1, 1)


def test_normaliser_maps_the_range_onto_one_and_centres_constants():
    values = np.array([[2, 7, -1], [6, 7, 1], [4, 7, 0]], np.float32)
    assert limits(values).normalise(values).tolist() == [[-1, 0, -1], [1, 0, 1], [0, 0, 0]]


def test_states_become_keypoints_and_the_agent():
    state = np.array([[1, 2, 10, 20, np.pi / 2]], np.float32)
    obs = state_observations(state, np.array([[3.0, 0.0], [0.0, 5.0]]))
    np.testing.assert_allclose(obs, [[10, 23, 5, 20, 1, 2]], atol=1e-5)


def test_bundled_keypoints_agree_with_the_simulator_side(tmp_path):
    from tsad.sim.pusht import observation

    state = np.random.default_rng(0).uniform(0, 400, (4, 5)).astype(np.float32)
    np.savez(tmp_path / "d.npz", state=state, action=np.zeros((4, 2)), episode_ends=[4])
    got = load_demonstrations(tmp_path / "d.npz").obs
    np.testing.assert_allclose(got, [observation(s) for s in state], atol=1e-3)


GOOD = {"obs": np.zeros((6, 3)), "action": np.zeros((6, 2)), "episode_ends": np.array([2, 6])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, r"'action' .* got only 'obs', 'episode_ends'"),
        ({"obs": None}, r"'obs' \(N, obs_dim\), or 'state'"),
        ({"episode_ends": None}, r"'episode_ends'.*\[6\]"),
        ({"obs": np.zeros(6)}, r"obs: expected numbers of shape \(N, obs_dim\).*\(6,\)"),
        ({"action": np.zeros((5, 2))}, "as many actions as observations, 6, got 5"),
        ({"action": np.full((6, 2), np.nan)}, "action: expected finite .* row 0"),
        ({"action": np.array([["a"]] * 6)}, "action: expected numbers"),
        ({"episode_ends": np.array([2, 5])}, "end at 6, the number of steps, got 2 .. 5"),
        ({"episode_ends": np.array([4, 2, 6])}, "episode_ends: expected increasing"),
        ({"episode_ends": np.array([2.0, 6.0])}, "episode_ends: expected integers"),
        ({"obs": None, "state": np.zeros((6, 4))}, r"state: expected shape \(N, 5\).*\(6, 4\)"),
        ({"obs": np.array([[None]] * 6)}, "pickled"),
    ],
)
def test_bad_data_is_refused_by_name(tmp_path, change, message):
    arrays = {k: v for k, v in (GOOD | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_demonstrations(tmp_path / "bad.npz")


def test_files_that_are_no_data_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "one.npy", np.zeros(3))
    for name in ("text.npz", "one.npy"):
        with pytest.raises(DataError, match="expected an npz file"):
            load_demonstrations(tmp_path / name)


def test_zarr_folder_gives_the_same_data(tmp_path, demos):
    zarr = pytest.importorskip("zarr")
    arrays = dict(np.load(demos))
    version = {} if zarr.__version__.startswith("2.") else {"zarr_format": 2}
    root = zarr.open_group(str(tmp_path / "demos.zarr"), mode="w", **version)
    for name, value in arrays.items():
        group = "meta" if name == "episode_ends" else "data"
        root[f"{group}/{name}"] = value
    a, b = load_demonstrations(demos), load_demonstrations(tmp_path / "demos.zarr")
    assert np.array_equal(a.obs, b.obs) and np.array_equal(a.ends, b.ends)


def test_missing_zarr_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zarr", None)
    (tmp_path / "demos.zarr").mkdir()
    with pytest.raises(MissingExtraError, match="pip install zarr, or save the arrays"):
        load_demonstrations(tmp_path / "demos.zarr")


# The trainer


def test_training_learns_what_the_data_show(demos, tmp_path):
    settings = replace(TINY, steps=300, batch=32, lr=2e-2, val_episodes=0)
    trainer = Trainer([demos], tmp_path / "out", settings)
    before = trainer.evaluate()
    trainer.fit(report_every=300)
    after = trainer.evaluate()
    # the action is a function of the observation, so the error falls at every noise level
    assert all(a < 0.7 * b for a, b in zip(after.x0_error, before.x0_error, strict=True))
    assert after.val_loss < 0.7 * before.val_loss and after.lr == 0


def test_x0_error_is_in_units_of_the_action(demos, tmp_path):
    trainer = Trainer([demos], tmp_path / "out", TINY)
    errors = trainer.evaluate().x0_error
    np.savez(demos, **{k: v * (7 if k == "action" else 1) for k, v in np.load(demos).items()})
    scaled = Trainer([demos], tmp_path / "out", TINY).evaluate().x0_error
    assert scaled == pytest.approx([7 * e for e in errors], rel=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resuming_equals_not_stopping_to_the_bit(demos, tmp_path, dropout):
    settings = replace(TINY, steps=12, dropout=dropout)
    whole = Trainer([demos], tmp_path / "whole", settings)
    whole.fit(report_every=4)

    first = Trainer([demos], tmp_path / "parts", settings)
    first.out.mkdir()
    for _ in range(7):  # in mid-epoch and between reports
        first.train_step()
        if first.step == 4:
            first._report(None)
    first.save()
    torch.manual_seed(99)  # another process has another state
    second = Trainer([demos], tmp_path / "parts", settings)
    second.restore(load_state(tmp_path / "parts"))
    second.fit(report_every=4)

    assert second.step == whole.step == 12
    for key in ("net", "ema"):
        assert equal_states(getattr(whole, key).state_dict(), getattr(second, key).state_dict())
    assert whole.average_loss == second.average_loss
    no_time = [[replace(r, seconds=0.0) for r in t.curve] for t in (whole, second)]
    assert no_time[0] == no_time[1]
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("whole", "parts")]
    assert files[0] == files[1]


def test_shares_set_how_often_a_file_is_seen(demos, tmp_path):
    arrays = dict(np.load(demos))
    np.savez(tmp_path / "few.npz", **{k: v[:30] for k, v in arrays.items() if k != "episode_ends"},
             episode_ends=[30])  # fmt: skip
    files = [demos, tmp_path / "few.npz"]
    trainer = Trainer(files, tmp_path / "out", replace(TINY, shares=(0.25, 0.75)))
    own = len(trainer.data.edges) - len(windows([30], 5, 2, 3)[0])
    drawn = np.concatenate([trainer.data.order(0, epoch).numpy() for epoch in range(8)])
    assert (drawn < own).mean() == pytest.approx(0.25, abs=0.02)
    equal = Trainer(files, tmp_path / "out", TINY).data
    assert sorted(equal.order(0, 3).tolist()) == list(range(len(equal.edges)))


def test_actions_past_the_end_do_not_count_unless_asked(demos, tmp_path):
    for flag in (False, True):
        trainer = Trainer([demos], tmp_path / "out", replace(TINY, count_padding=flag))
        counts = trainer.data.counts
        assert bool((counts == 1).all()) is flag


def test_broken_write_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path / STATE_FILE, {"version": 1, "step": 5})

    def half(state, stream):
        stream.write(b"PK half of it")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        save_state(tmp_path / STATE_FILE, {"version": 1, "step": 6})
    monkeypatch.undo()
    assert load_state(tmp_path)["step"] == 5
    assert os.listdir(tmp_path) == [STATE_FILE]


def test_damaged_state_is_refused(tmp_path):
    (tmp_path / STATE_FILE).write_bytes(b"PK half of it")
    with pytest.raises(ValueError, match="expected a training state"):
        load_state(tmp_path)
    with pytest.raises(FileNotFoundError, match="start one first"):
        load_state(tmp_path / "nowhere")


def test_state_of_other_data_is_refused(demos, tmp_path):
    trainer = Trainer([demos], tmp_path / "out", TINY)
    state = trainer.state()
    np.savez(demos, **{k: v * (2 if k == "action" else 1) for k, v in np.load(demos).items()})
    with pytest.raises(DataError, match="same files"):
        Trainer([demos], tmp_path / "out", TINY).restore(state)


def test_clock_leaves_out_the_time_in_which_it_was_stopped(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    clock = Clock()
    total = 0.0
    for step in range(20):
        now[0] += 1000.0 if step == 10 else 0.5
        total += clock.lap()
    assert 9.5 < total < 25


def test_folder_continues_as_init(demos, tmp_path):
    trainer = Trainer([demos], tmp_path / "old", TINY)
    trainer.fit()
    config, tensors, pruner = read_folder(tmp_path / "old")
    assert pruner is None and config.normalizer == trainer.config.normalizer
    assert config.scheduler.num_inference_steps == 100
    assert config.provenance["training"]["step"] == 20
    new = Trainer([demos], tmp_path / "new", replace(TINY, init=str(tmp_path / "old")))
    for name, value in new.net.state_dict().items():
        assert np.array_equal(value.numpy(), tensors[name])
    with pytest.raises(ValueError, match="init: expected a network like"):
        Trainer([demos], tmp_path / "x", replace(TINY, init=str(tmp_path / "old"), n_layer=2))


def test_a_longer_horizon_begins_as_the_old_network(demos, tmp_path):
    """Under the causal mask later tokens change nothing for the first ones."""
    Trainer([demos], tmp_path / "old", TINY).fit()
    longer = replace(TINY, init=str(tmp_path / "old"), horizon=8, n_action_steps=4)
    new = Trainer([demos], tmp_path / "new", longer)
    old = Trainer([demos], tmp_path / "x", replace(TINY, init=str(tmp_path / "old")))
    x, cond, t = torch.randn(3, 8, 2), torch.randn(3, 2, 3), torch.tensor([0, 50, 99])
    with torch.no_grad():
        outputs = new.net(x, t, cond), old.net(x[:, :5], t, cond)
    torch.testing.assert_close(outputs[0][:, :5], outputs[1])
    new.fit()
    assert read_folder(tmp_path / "new")[0].network.horizon == 8
    with pytest.raises(ValueError, match="the horizon may grow"):
        Trainer([demos], tmp_path / "y", replace(TINY, init=str(tmp_path / "new")))


@pytest.mark.parametrize(
    "bad",
    [
        {"batch": 0},
        {"coverage": ((0.5, 0.4),)},
        {"precision": "int8"},
        {"lr": float("nan")},
        {"decay": 2.0},
        {"steps": None},
        {"shares": (0.0,)},
    ],
)
def test_impossible_settings_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        replace(TINY, **bad)


# The command

OPTIONS = (
    "--steps 20 --horizon 5 --n-action-steps 3 --n-layer 1 --n-head 2 --n-emb 16 --batch 8 "
    "--val-episodes 1 --device cpu --report-every 10"
).split()


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    train_policy.add_parser(parser.add_subparsers())
    args = parser.parse_args(["train-policy", *words])
    return args.run(args)


def test_command_makes_a_folder_with_card_and_curve(demos, tmp_path, capsys):
    out = tmp_path / "policy"
    assert call(str(demos), "--out", str(out), "--json", "--licence", "CC0", *OPTIONS) == 0
    summary = json.loads(capsys.readouterr().out)
    config, _, _ = read_folder(out)
    digest = config.provenance["sha256"]["model.safetensors"]
    card = (out / "README.md").read_text()
    assert summary["sha256"] == digest and digest in card
    assert "CC0" in card and "demos.npz" in card and "20 steps" in card
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [10, 20] and len(curve[0]["x0_error"]) == 5
    with pytest.raises(UsageError, match="--out: .* isn't empty"):
        call(str(demos), "--out", str(out), *OPTIONS)


def test_interrupt_saves_and_names_the_command_that_goes_on(demos, tmp_path, monkeypatch, capsys):
    out = tmp_path / "policy"
    step = Trainer.train_step

    def interrupted(self):
        if self.step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(InterruptedRunError, match="saved at step 7") as caught:
        call(str(demos), "--out", str(out), *OPTIONS)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    words = re.split(r"go on with: tsad train-policy ", str(caught.value))[1].split()
    with pytest.raises(UsageError, match="argument --lr: got 0.5, but"):
        call(*words, "--lr", "0.5")
    assert call(*words) == 0
    assert "from step 7" in capsys.readouterr().out
    call(str(demos), "--out", str(tmp_path / "whole"), *OPTIONS)
    files = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("policy", "whole")]
    assert files[0] == files[1]


def test_library_interrupt_is_an_exception_of_its_own(demos, tmp_path):
    def stop(trainer):
        os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer([demos], tmp_path / "out", TINY)
    with pytest.raises(InterruptedTrainingError):
        trainer.fit(on_step=stop)
    assert load_state(tmp_path / "out")["step"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.npz", "--steps", "5"], "DATA: 'nothing.npz' does not exist"),
        (["DEMOS"], "argument --minutes, --steps: expected one of them"),
        (["DEMOS", "--steps", "5", "--val-episodes", "9"], "expected 0 to 8"),
        (["DEMOS", "--steps", "5", "--n-emb", "10"], "argument --n-emb: "),
        (["DEMOS", "--steps", "5", "--shares", "1", "2"], "shares: expected one for each"),
        (["DEMOS", "--steps", "5", "--coverage", "0:1"], "expected an array 'state' (N, 5)"),
        (["DEMOS", "--resume"], "expected the state of a training to resume"),
        (["DEMOS", "--steps", "5", "--keypoints", "k.json"], "argument --keypoints: "),
    ],
)
def test_command_names_what_is_wrong(demos, tmp_path, words, message):
    words = [str(demos) if word == "DEMOS" else word for word in words]
    with pytest.raises(UsageError, match=re.escape(message)):
        call(*words, "--out", str(tmp_path / "out"))


def test_missing_torch_names_the_extra(demos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"tsad-policy\[train\]"):
        call(str(demos), "--out", str(tmp_path / "out"), "--steps", "5")
