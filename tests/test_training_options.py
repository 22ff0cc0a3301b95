"""What a training may be told: windows, precision, policies kept on the way, a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from demonstrations import TINY, standing_demonstrations  # noqa: E402

from tsad.checkpoint import read_folder  # noqa: E402
from tsad.training.data import DataError  # noqa: E402
from tsad.training.train import Trainer  # noqa: E402


@pytest.fixture
def demos(tmp_path):
    return standing_demonstrations(tmp_path)


def test_policies_of_intermediate_steps_are_kept(demos, tmp_path):
    trainer = Trainer([demos], tmp_path / "out", TINY)
    trainer.fit(keep_every=10)
    kept = [p.parent.name for p in sorted((tmp_path / "out").glob("step-*/model.safetensors"))]
    assert kept == ["step-000010"]  # the last one is the folder itself
    config, tensors, _ = read_folder(tmp_path / "out" / kept[0])
    assert config.provenance["training"]["step"] == 10
    other = Trainer([demos], tmp_path / "again", TINY)
    for _ in range(10):
        other.train_step()
    for name, value in other.ema.state_dict().items():
        np.testing.assert_allclose(tensors[name], value.numpy(), rtol=6e-4, atol=1e-6)


def test_coverage_picks_windows(tmp_path):
    pytest.importorskip("gym_pusht")
    n = 40
    state = np.zeros((2 * n, 5), np.float32)
    state[:, 2:4], state[:, 4] = 256, np.pi / 4
    state[:, 2] += np.tile(np.linspace(60, 0, n), 2)
    path = tmp_path / "t.npz"
    np.savez(path, state=state, action=state[:, :2], episode_ends=[n, 2 * n])
    sizes = replace(TINY, val_episodes=0)
    every = Trainer([path], tmp_path / "x", sizes)
    assert every.sources[0].coverage is None
    near = Trainer([path], tmp_path / "x", replace(sizes, coverage=((0.5, 0.9),)))
    covered = near.sources[0].coverage
    assert covered[0] < 0.4 and covered[n - 1] == pytest.approx(1)
    now = near.data.steps[:, 1].numpy()
    wanted = [s for s in every.data.steps[:, 1].tolist() if 0.5 <= covered[s] <= 0.9]
    assert now.tolist() == wanted and 5 < len(wanted) < n
    both = replace(sizes, coverage=((0.0, 1.0), (0.5, 0.9)), shares=(0.25, 0.75))
    mixed = Trainer([path, path], tmp_path / "x", both)
    assert len(mixed.data.steps) == len(every.data.steps) + len(wanted)
    assert mixed.data.edges[len(every.data.steps) - 1] == pytest.approx(0.25)
    assert len(mixed.probe.steps) == len(every.data.steps)  # errors are those of all windows
    with pytest.raises(DataError, match="no window's coverage"):
        Trainer([path], tmp_path / "x", replace(sizes, coverage=((0.41, 0.411),)))
    with pytest.raises(ValueError, match="coverage: expected one for each of 2 files"):
        Trainer([path, path], tmp_path / "x", replace(sizes, coverage=((0.5, 0.9),)))


def test_bfloat16_trains_float32_weights_to_the_same_loss(demos, tmp_path):
    exact = Trainer([demos], tmp_path / "a", TINY)
    short = Trainer([demos], tmp_path / "b", replace(TINY, precision="bfloat16"))
    losses = [[t.train_step() for _ in range(60)] for t in (exact, short)]
    assert losses[0] != losses[1]
    assert np.mean(losses[0][-10:]) == pytest.approx(np.mean(losses[1][-10:]), rel=0.05)
    assert all(p.dtype == torch.float32 for p in short.net.parameters())


def test_on_a_gpu_the_network_is_compiled_and_runs_in_bfloat16(demos, tmp_path, monkeypatch):
    """What can be said without one: torch is asked for it. That it works there isn't shown."""
    compiled, casts = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    for kind in (torch.nn.Module, torch.Tensor):
        monkeypatch.setattr(kind, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch, "tensor", lambda value, device=None: torch.as_tensor(value))
    real = torch.autocast

    def autocast(device, dtype):
        casts.append((device, dtype))
        return real("cpu", dtype)

    monkeypatch.setattr(torch, "autocast", autocast)
    trainer = Trainer([demos], tmp_path / "out", replace(TINY, steps=2))
    assert (trainer.device.type, trainer.precision) == ("cuda", "bfloat16")
    trainer.train_step()
    assert compiled == [trainer.net] and casts == [("cuda", torch.bfloat16)]
    plain = Trainer([demos], tmp_path / "o", replace(TINY, precision="float32"), compile=False)
    plain.train_step()
    assert len(compiled) == len(casts) == 1
