"""What else runs the same network on the same GPU: PyTorch as it is, compiled, ONNX Runtime.

Each runs the bundled policy's dense loop, all of its steps, from observations on the host to
actions on the host, with the sampler's rows on the GPU as well.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tsad.config import PolicyConfig
from tsad.evaluation.timing import percentiles
from tsad.load import read_policy
from tsad.samplers import Sampler, make_sampler

if TYPE_CHECKING:
    from torch import Tensor

PEERS = ("torch eager", "torch.compile reduce-overhead", "ONNX Runtime")
SECONDS = 15.0

Step = Callable[["Tensor", int, "Tensor"], "Tensor"]


class NotHereError(Exception):
    """Why a peer can't run here."""


class Loop:
    """The dense policy around a step: ``step(sample, k, obs)`` is the network's output."""

    def __init__(self, step: Step, config: PolicyConfig, sampler: Sampler, device: str) -> None:
        self._step, self._device = step, device
        self._rows = sampler.table.tolist()
        self._obs, self._action = config.normalizer.obs, config.normalizer.action

    def __call__(self, obs: Any, noise: Any) -> NDArray[np.float32]:
        """All of the horizon of ``obs`` (n_obs_steps, obs_dim), both raw; ``noise`` (K, T, A)."""
        import torch

        given = torch.from_numpy(self._obs.normalise(obs))[None].to(self._device)
        z = torch.from_numpy(noise).to(self._device)
        x, before = z[:1].clone(), None
        with torch.no_grad():
            for k, (a, b, r, c, d, f, g, h, _) in enumerate(self._rows):
                e = self._step(x, k, given)
                x0 = (a * x + b * e).clamp(-r, r)
                x = c * x0 + d * x
                x = x + f * e if f else x
                x = x + g * before if g else x
                x = x + h * z[k + 1] if h else x
                before = x0
        raw = x[0].cpu().numpy()
        scale, offset = np.array(self._action.scale), np.array(self._action.offset)
        return np.asarray((raw - offset) / scale, np.float32)


def _step(name: str, config: PolicyConfig, sampler: Sampler, tensors: Any, device: str) -> Step:
    """The network of a peer; `NotHereError` says what is missing."""
    if importlib.util.find_spec("torch") is None:
        raise NotHereError("PyTorch is not installed")
    import torch

    from tsad.training.network import from_config

    if device == "cuda" and not torch.cuda.is_available():
        raise NotHereError("this PyTorch has no CUDA, or sees no GPU")
    net = from_config(config.network.to_dict()).eval().requires_grad_(False)
    net.load_state_dict({key: torch.from_numpy(np.array(w)) for key, w in tensors.items()})
    times = [torch.tensor([int(t)], device=device) for t in sampler.timesteps]
    if name == "ONNX Runtime":
        return _onnx(net, config, times, device)
    net = net.to(device)
    if name == "torch eager":
        return lambda x, k, obs: net(x, times[k], obs)
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True, dynamic=False)

    def step(x: Tensor, k: int, obs: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return cast("Tensor", compiled(x, times[k], obs).clone())

    return step


def _onnx(net: Any, config: PolicyConfig, times: list[Tensor], device: str) -> Step:
    if importlib.util.find_spec("onnxruntime") is None:
        raise NotHereError("ONNX Runtime is not installed")
    import onnxruntime
    import torch

    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if provider not in onnxruntime.get_available_providers():
        raise NotHereError(f"this ONNX Runtime has no {provider}")
    network, file = config.network, io.BytesIO()
    inputs = (
        torch.zeros(1, network.horizon, network.action_dim),
        times[0].cpu(),
        torch.zeros(1, network.n_obs_steps, network.obs_dim),
    )
    try:
        torch.onnx.export(net, inputs, cast(Any, file), dynamo=False, opset_version=17)
    except Exception as error:  # its packages, its operators: whatever it is, there is no graph
        raise NotHereError(f"PyTorch can't export the network: {error}") from error
    session = onnxruntime.InferenceSession(file.getvalue(), providers=[provider])
    names = [value.name for value in session.get_inputs()]
    out = session.get_outputs()[0].name
    result = torch.empty_like(inputs[0], device=device)

    def step(x: Tensor, k: int, obs: Tensor) -> Tensor:
        binding = session.io_binding()
        tensors = dict(zip(names, (x.contiguous(), times[k], obs), strict=True))
        for name, tensor in tensors.items():
            kind = np.int64 if tensor.dtype == torch.int64 else np.float32
            shape = tuple(tensor.shape)
            binding.bind_input(name, device, 0, kind, shape, tensor.data_ptr())
        shape = tuple(result.shape)
        binding.bind_output(out, device, 0, np.float32, shape, result.data_ptr())
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        session.run_with_iobinding(binding)
        return result.clone()

    return step


def make(name: str, device: str = "cuda", **sampling: Any) -> tuple[Loop, PolicyConfig, Sampler]:
    """A peer on the bundled policy. ``sampling``: arguments of `make_sampler`."""
    config, tensors, _ = read_policy("pusht")
    sampler = make_sampler(config.scheduler.to_dict(), **sampling)
    step = _step(name, config, sampler, tensors, device)
    return Loop(step, config, sampler, device), config, sampler


def run(name: str, device: str = "cuda", seconds: float = SECONDS) -> dict[str, Any]:
    """Times of a peer, or why there are none."""
    try:
        loop, config, sampler = make(name, device)
        network, rng = config.network, np.random.default_rng(0)
        shape = (len(sampler.timesteps), network.horizon, network.action_dim)
        noise = rng.standard_normal(shape, np.float32)
        obs = np.full((network.n_obs_steps, network.obs_dim), 256, np.float32)
        for _ in range(3):
            loop(obs, noise)
    except NotHereError as error:
        return {"peer": name, "skipped": str(error)}
    except RuntimeError as error:  # a compiler that is missing, memory, a driver
        return {"peer": name, "skipped": f"{type(error).__name__}: {error}"[:500]}
    wall: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds and len(wall) < 1000:
        tick = time.perf_counter()
        loop(obs, noise)
        wall.append((time.perf_counter() - tick) * 1e3)
    return {"peer": name, "chunks": len(wall), "wall_ms": percentiles(wall)}
