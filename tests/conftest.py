"""One thread for NumPy's and PyTorch's own matrix products: the tests multiply small matrices, and
two thread pools on two cores spend their time waiting for each other (20x slower, measured). And
Ctrl-C at its default: a shell that starts the tests in the background has it ignored, in every
process that a test starts too. Presets of whoever runs the tests are not theirs."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`long` tests run where `-m` names them."""
    if "long" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the user's own for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("TSAD_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """PyTorch's generator at one seed: no test's weights depend on the tests before it."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, whatever the environment says."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The library of the CUDA backend for the emulated GPU."""
    from cuda_library import build_emulated

    return build_emulated(tmp_path_factory.mktemp("cuda") / "emulated.so")


@pytest.fixture
def blas(emulated_cuda: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, with its stand-in for cuBLAS in place."""
    from tsad import _core, device

    monkeypatch.setenv("TSAD_CUDA_LIBRARY", emulated_cuda)
    monkeypatch.delenv("TSAD_CUDA_BLAS", raising=False)
    _core._load_backend(emulated_cuda)  # the last one loaded is the one that runs
    assert device.cublas().absent is None
    return emulated_cuda
