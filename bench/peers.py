"""What a user could run instead of tsad, behind tsad's own call contract.

A peer is a `Network` (one forward pass, however it is made fast) in a `Loop`, which is the same for
all: NumPy applies the sampler's table, and noise comes from the streams that tsad would use.
`build` makes one by name. Networks as exported compute everything at every step, as the published
code does. Hoisted ones encode the observations, and project them to the keys and values of the
cross-attentions, once per chunk; those of the time tokens are a table made at load.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tasks import Task
from torch import Tensor, nn
from torch.nn import functional as F

from tsad.training.network import TransformerForDiffusion, from_config


class NotInstalledError(RuntimeError):
    """A peer's package is missing; the message says which."""


class Network(Protocol):
    """One forward pass. All arrays are normalised; `note` says how it was built."""

    note: str

    def begin(self, obs: np.ndarray) -> None:
        """A chunk starts: obs (lanes, n_obs_steps, obs_dim)."""

    def step(self, k: int, sample: np.ndarray) -> np.ndarray:
        """The network's output at loop step k for `sample` (lanes, horizon, action_dim)."""


def module(task: Task) -> TransformerForDiffusion:
    """PyTorch's own modules with the task's weights."""
    net = from_config(task.config.network.to_dict()).eval()
    net.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in task.tensors.items()})
    dtype = torch.float64 if task.dtype == np.float64 else torch.float32
    return net.to(dtype).requires_grad_(False)


def example(task: Task) -> tuple[Tensor, Tensor]:
    """A normalised sample and observation, to trace and to try with."""
    net, rng = task.config.network, np.random.default_rng(0)
    sample = rng.standard_normal((task.lanes, net.horizon, net.action_dim))
    obs = rng.uniform(-1, 1, (task.lanes, net.n_obs_steps, net.obs_dim))
    return torch.from_numpy(sample.astype(task.dtype)), torch.from_numpy(obs.astype(task.dtype))


class Loop:
    """A dense policy with the call contract of `tsad.SparsePolicy` around any `Network`."""

    def __init__(self, network: Network, task: Task) -> None:
        net = task.config.network
        self.network, self.sampler, self.lanes = network, task.sampler, task.lanes
        self.horizon, self.action_dim = net.horizon, net.action_dim
        self.n_obs_steps, self.obs_dim = net.n_obs_steps, net.obs_dim
        self.n_action_steps = net.n_action_steps
        self.num_inference_steps = len(task.sampler.timesteps)
        self._dtype = np.dtype(task.dtype)
        self._rows = task.sampler.table.tolist()
        normalizer = task.config.normalizer
        self._obs_affine, self._action_affine = (
            (np.array(affine.scale, self._dtype), np.array(affine.offset, self._dtype))
            for affine in (normalizer.obs, normalizer.action)
        )
        self._streams: dict[int, np.random.Generator] = {}
        self.reset(seed=0)

    def reset(self, lanes: Sequence[int] | None = None, seed: Any = None) -> None:
        """Seed the lanes' noise as tsad does; nothing else is remembered from chunk to chunk."""
        for row, lane in enumerate(range(self.lanes) if lanes is None else lanes):
            if seed is None:
                continue
            if isinstance(seed, int):
                sequence = np.random.SeedSequence(seed, spawn_key=(lane,))
            else:
                sequence = np.random.SeedSequence(int(seed[row]))
            self._streams[lane] = np.random.Generator(np.random.PCG64(sequence))

    def __call__(
        self,
        obs: np.ndarray,
        *,
        noise: np.ndarray | None = None,
        lanes: Sequence[int] | None = None,
        return_horizon: bool = False,
    ) -> np.ndarray:
        """Actions in raw units of `obs` (rows, n_obs_steps, obs_dim), raw."""
        if noise is None:
            noise = self._draw(range(self.lanes) if lanes is None else lanes)
        scale, offset = self._obs_affine
        self.network.begin(obs.astype(self._dtype) * scale + offset)
        sample = self._denoise(noise.astype(self._dtype, copy=False))
        scale, offset = self._action_affine
        actions = (sample - offset) / scale
        start = self.n_obs_steps - 1
        return actions if return_horizon else actions[:, start : start + self.n_action_steps]

    def _draw(self, lanes: Sequence[int]) -> np.ndarray:
        steps = self.num_inference_steps if self.sampler.adds_noise else 1
        shape = (steps, self.horizon, self.action_dim)
        drawn = [self._streams[lane].standard_normal(shape, np.float32) for lane in lanes]
        return np.stack(drawn, 1)

    def _denoise(self, noise: np.ndarray) -> np.ndarray:
        x, x0_before = noise[0], None
        for k, (a, b, r, c, d, f, g, h, _) in enumerate(self._rows):
            e = self.network.step(k, x)
            x0 = a * x + b * e
            np.clip(x0, -r, r, out=x0)
            x = c * x0 + d * x
            if f:
                x += f * e
            if g:
                x += g * x0_before
            if h:
                x += h * noise[k + 1]
            x0_before = x0
        return x


# ---- PyTorch


class TorchNetwork:
    """A module called as it is, or a compiled one."""

    def __init__(self, module: Callable[..., Tensor], task: Task, note: str) -> None:
        self.note = note
        self._module = module
        self._times = [torch.tensor([int(t)]) for t in task.sampler.timesteps]
        self._obs = torch.empty(0)

    def begin(self, obs: np.ndarray) -> None:
        self._obs = torch.from_numpy(obs)

    def step(self, k: int, sample: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._module(torch.from_numpy(sample), self._times[k], self._obs).numpy()


def _keys_values(net: TransformerForDiffusion, memory: Tensor) -> Tensor:
    """Keys and values of memory tokens (lanes, S, d): (layers, 2, lanes, heads, S, d / heads)."""
    out = []
    for layer in net.decoder.layers:
        attn = layer.multihead_attn
        d, heads = attn.embed_dim, attn.num_heads
        both = F.linear(memory, attn.in_proj_weight[d:], attn.in_proj_bias[d:])
        lanes, tokens, _ = both.shape
        out.append(both.reshape(lanes, tokens, 2, heads, d // heads).permute(2, 0, 3, 1, 4))
    return torch.stack(out)


class Prologue(nn.Module):
    """Normalised observations to their keys and values; needs the token-wise encoder."""

    def __init__(self, net: TransformerForDiffusion) -> None:
        super().__init__()
        self.net = net

    def forward(self, obs: Tensor) -> Tensor:
        tokens = self.net.cond_obs_emb(obs) + self.net.cond_pos_emb[:, 1:]
        return _keys_values(self.net, self.net.encoder(tokens))


class HoistedStep(nn.Module):
    """The decoder with keys and values of the memory given; equal to the network to rounding."""

    def __init__(self, net: TransformerForDiffusion) -> None:
        super().__init__()
        self.net = net

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        lanes, tokens, d = q.shape
        q = q.reshape(lanes, tokens, k.shape[1], -1).transpose(1, 2)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores + mask
        mixed = torch.softmax(scores, -1) @ v
        return mixed.transpose(1, 2).reshape(lanes, tokens, d)

    def forward(self, sample: Tensor, time: Tensor, obs: Tensor) -> Tensor:
        """`time` (layers, 2, 1, heads, 1, d / heads), `obs` from `Prologue`."""
        net = self.net
        h = net.input_emb(sample) + net.pos_emb
        lanes, tokens, d = h.shape
        for i, layer in enumerate(net.decoder.layers):
            attn = layer.self_attn
            qkv = F.linear(layer.norm1(h), attn.in_proj_weight, attn.in_proj_bias)
            q, k, v = qkv.chunk(3, -1)
            shape = (lanes, tokens, attn.num_heads, d // attn.num_heads)
            k, v = k.reshape(shape).transpose(1, 2), v.reshape(shape).transpose(1, 2)
            h = h + attn.out_proj(self._attend(q, k, v, net.mask))
            attn = layer.multihead_attn
            q = F.linear(layer.norm2(h), attn.in_proj_weight[:d], attn.in_proj_bias[:d])
            k = torch.cat([time[i, 0].expand(lanes, -1, -1, -1), obs[i, 0]], -2)
            v = torch.cat([time[i, 1].expand(lanes, -1, -1, -1), obs[i, 1]], -2)
            h = h + attn.out_proj(self._attend(q, k, v, net.memory_mask))
            h = h + layer.linear2(F.gelu(layer.linear1(layer.norm3(h))))
        output: Tensor = net.head(net.ln_f(h))
        return output


def time_table(net: TransformerForDiffusion, task: Task) -> list[Tensor]:
    """Keys and values of the time token at each loop step, as `HoistedStep` takes them."""
    if task.config.network.n_cond_layers:
        raise ValueError("n_cond_layers: an encoder with attention cannot be hoisted, its "
                         "observation tokens depend on the step")  # fmt: skip
    obs = example(task)[1][:1]
    return [
        _keys_values(net, net.encode(torch.tensor([int(t)]), obs)[:, :1])
        for t in task.sampler.timesteps
    ]


class HoistedTorchNetwork:
    """`Prologue` once per chunk, then a `HoistedStep` (or a compiled one)."""

    def __init__(
        self, prologue: Callable[..., Tensor], step: Callable[..., Tensor], times: list[Tensor],
        note: str,
    ) -> None:  # fmt: skip
        self.note = note
        self._prologue, self._step, self._times = prologue, step, times
        self._obs = torch.empty(0)

    def begin(self, obs: np.ndarray) -> None:
        with torch.no_grad():
            self._obs = self._prologue(torch.from_numpy(obs))

    def step(self, k: int, sample: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._step(torch.from_numpy(sample), self._times[k], self._obs).numpy()


def _eager(task: Task, *, hoisted: bool) -> Network:
    net = module(task)
    if not hoisted:
        return TorchNetwork(net, task, "torch.nn modules")
    note = "torch.nn modules, hoisted"
    return HoistedTorchNetwork(Prologue(net), HoistedStep(net), time_table(net, task), note)


def _compiled(task: Task, *, hoisted: bool = False, freezing: bool = False, **mode: Any) -> Network:
    import torch._dynamo
    import torch._inductor.config

    # Dynamo falls back to eager in silence after a few compilations of the same code.
    torch._dynamo.reset()
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    net = module(task)
    step: nn.Module = HoistedStep(net) if hoisted else net
    compiled = torch.compile(step, dynamic=False, fullgraph=True, **mode)
    note = f"inductor, {mode or 'default'}{', freezing' if freezing else ''}"
    if hoisted:
        network: Network = HoistedTorchNetwork(
            torch.compile(Prologue(net), dynamic=False), compiled, time_table(net, task), note
        )
    else:
        network = TorchNetwork(compiled, task, note)
    sample, obs = (tensor.numpy() for tensor in example(task))
    with _quiet(), torch._inductor.config.patch(freezing=freezing):
        network.begin(obs)
        for k in (0, 1):  # compiles
            network.step(k, sample)
    return network


# ---- exported graphs


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters and compilers are talkative; what goes wrong is raised anyhow."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _onnx_files(
    module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, name: str
) -> dict[str, Path]:
    """The graph by both of PyTorch's exporters; the names are the exporters'."""
    files, errors = {}, []
    for exporter, options in (
        ("torch.export", {"dynamo": True, "external_data": False}),
        ("TorchScript", {"dynamo": False, "opset_version": 17}),
    ):
        path = folder / f"{name}-{exporter}.onnx"
        try:
            with _quiet(), contextlib.redirect_stderr(io.StringIO()):
                torch.onnx.export(module, inputs, str(path), **options)  # type: ignore[arg-type]
            files[exporter] = path
        except Exception as error:  # either may be missing its package, or not know an operator
            errors.append(f"{exporter}: {error}")
    if not files:
        raise NotInstalledError(f"no ONNX export: {'; '.join(errors)}")
    return files


Runner = Callable[[Sequence[np.ndarray]], np.ndarray]


def _ort_runners(
    module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, name: str, threads: int
) -> dict[str, Runner]:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{error.name} is not installed") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3

    def runner(path: Path) -> Runner:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]

        def run(arrays: Sequence[np.ndarray]) -> np.ndarray:
            return session.run(None, dict(zip(names, arrays, strict=True)))[0]

        return run

    files = _onnx_files(module, inputs, folder, name)
    return {exporter: runner(path) for exporter, path in files.items()}


def _openvino_runners(
    module: nn.Module, inputs: tuple[Tensor, ...], folder: Path, name: str, threads: int
) -> dict[str, Runner]:
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{error.name} is not installed") from None
    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # where the processor has bf16 it would be the default
        "INFERENCE_PRECISION_HINT": "f32",
    }

    def runner(model: Any) -> Runner:
        request = core.compile_model(model, "CPU", options).create_infer_request()

        def run(arrays: Sequence[np.ndarray]) -> np.ndarray:
            # the arrays outlive the call, and the output is used before the next one
            request.infer(list(arrays), share_inputs=True)
            return request.get_output_tensor(0).data

        return run

    runners = {"openvino's own converter": runner(_openvino_model(openvino, module, inputs))}
    with contextlib.suppress(NotInstalledError):
        for exporter, path in _onnx_files(module, inputs, folder, name).items():
            runners[f"ONNX of {exporter}"] = runner(str(path))
    return runners


def _openvino_model(openvino: Any, module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    shapes = [tuple(tensor.shape) for tensor in inputs]
    with _quiet():
        return openvino.convert_model(module, example_input=inputs, input=shapes)


class GraphNetwork:
    """An exported graph; with `prologue`, the hoisted one."""

    def __init__(
        self, run: Runner, times: list[np.ndarray], prologue: Runner | None, note: str
    ) -> None:
        self.note = note
        self._run, self._times, self._prologue = run, times, prologue
        self._obs = np.empty(0)

    def begin(self, obs: np.ndarray) -> None:
        self._obs = obs if self._prologue is None else self._prologue([obs]).copy()

    def step(self, k: int, sample: np.ndarray) -> np.ndarray:
        return self._run([sample, self._times[k], self._obs])


def _exported(task: Task, *, runners: Callable[..., dict[str, Runner]], hoisted: bool) -> Network:
    net = module(task)
    sample, obs = example(task)
    prologues: dict[str, Runner] = {}
    with tempfile.TemporaryDirectory(prefix="tsad-bench-") as name, torch.no_grad():
        folder = Path(name)
        if hoisted:
            prologue = Prologue(net)
            prologues = runners(prologue, (obs,), folder, "prologue", task.threads)
            times = time_table(net, task)
            step: nn.Module = HoistedStep(net)
            inputs: tuple[Tensor, ...] = (sample, times[0], prologue(obs))
        else:
            times = [torch.full((task.lanes,), int(t)) for t in task.sampler.timesteps]
            step, inputs = net, (sample, times[0], obs)
        steps = runners(step, inputs, folder, "step", task.threads)
    arrays = [time.contiguous().numpy() for time in times]
    networks = {
        note: GraphNetwork(run, arrays, prologues.get(note), note) for note, run in steps.items()
    }
    return fastest(networks, sample.numpy(), obs.numpy())


def fastest(networks: Mapping[str, Network], sample: np.ndarray, obs: np.ndarray) -> Network:
    """The quickest of several builds of one network, tried in turns, the best of five."""
    best = dict.fromkeys(networks, float("inf"))
    for _ in range(5):
        for name, network in networks.items():
            network.begin(obs)
            network.step(0, sample)
            begin = time.perf_counter()
            for _ in range(5):
                network.step(0, sample)
            best[name] = min(best[name], time.perf_counter() - begin)
    return networks[min(best, key=lambda name: best[name])]


# ---- by name

PEERS: dict[str, Callable[[Task], Network]] = {
    "eager": lambda task: _eager(task, hoisted=False),
    "eager-hoisted": lambda task: _eager(task, hoisted=True),
    "compile": lambda task: _compiled(task),
    "compile-hoisted": lambda task: _compiled(task, hoisted=True),
    "compile-max-autotune": lambda task: _compiled(task, mode="max-autotune"),
    "compile-freezing": lambda task: _compiled(task, freezing=True),
    "compile-freezing-max-autotune": lambda task: _compiled(
        task, freezing=True, mode="max-autotune"
    ),
    "onnxruntime": lambda task: _exported(task, runners=_ort_runners, hoisted=False),
    "onnxruntime-hoisted": lambda task: _exported(task, runners=_ort_runners, hoisted=True),
    "openvino": lambda task: _exported(task, runners=_openvino_runners, hoisted=False),
    "openvino-hoisted": lambda task: _exported(task, runners=_openvino_runners, hoisted=True),
}


def build(name: str, task: Task) -> Loop:
    """The peer `name` on a task.

    Raises:
        NotInstalledError: its package is missing.
        ValueError: there is no such peer.
    """
    if name not in PEERS:
        raise ValueError(f"peer: expected one of {', '.join(PEERS)}, got {name!r}")
    torch.set_num_threads(task.threads)
    return Loop(PEERS[name](task), task)


__all__ = ["PEERS", "Loop", "Network", "NotInstalledError", "build", "fastest", "module"]
