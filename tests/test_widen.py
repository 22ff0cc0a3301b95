"""bench/lerobot_widen.py: a wider network computes what the narrower one does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from lerobot_widen import shares, widen  # noqa: E402
from torch import Tensor, nn  # noqa: E402


class Network(nn.Module):
    """The kinds of layers of LeRobot's UNet, and its skip connection, over ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, width, 5, padding=2)
        self.norm = nn.GroupNorm(8, width)
        self.film = nn.Linear(6, 2 * width)
        self.down = nn.Conv1d(width, 2 * width, 3, 2, 1)
        self.up = nn.ConvTranspose1d(2 * width, width, 4, 2, 1)
        self.joined = nn.Conv1d(2 * width, width, 3, padding=1)
        self.last = nn.Conv1d(width, 2, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = nn.functional.mish(self.norm(self.first(x)))
        scale, bias = self.film(condition)[..., None].chunk(2, 1)
        x = scale * x + bias
        y = self.up(nn.functional.mish(self.down(x)))
        return self.last(nn.functional.mish(self.joined(torch.cat([x, y], 1))))


@pytest.mark.parametrize("times", [2, 3])
def test_the_wider_network_computes_the_same(times: int) -> None:
    torch.manual_seed(0)
    narrow, wide = Network(16).double(), Network(16 * times).double()
    x, condition = torch.randn(3, 2, 16).double(), torch.randn(3, 6).double()
    assert (narrow(x, condition) - wide(x, condition)).abs().max() > 0.1
    widen(narrow, wide, torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(x, condition), narrow(x, condition), rtol=1e-12, atol=1e-12)


def test_the_copies_part_in_training() -> None:
    torch.manual_seed(0)
    wide = Network(32)
    widen(Network(16), wide, torch.Generator().manual_seed(1))
    wide(torch.randn(3, 2, 16), torch.randn(3, 6)).square().mean().backward()
    gradient = wide.first.weight.grad
    assert gradient is not None
    assert (gradient[0::2] - gradient[1::2]).abs().max() > 1e-3 * gradient.abs().max()


def test_shares_are_one_together() -> None:
    found = shares(torch.Size([4, 6, 5]), 1, 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.unflatten(1, (2, 3)).sum(2), torch.ones(4, 2, 5).double())
    assert found.std() > 0.1


def test_what_is_no_multiple_is_refused() -> None:
    random = torch.Generator()
    with pytest.raises(ValueError, match="first.weight: 24 is no multiple of 16"):
        widen(Network(16), Network(24), random)
    other = Network(16)
    other.norm = nn.BatchNorm1d(16)
    with pytest.raises(ValueError, match="norm: expected GroupNorm, got BatchNorm1d"):
        widen(Network(16), other, random)
