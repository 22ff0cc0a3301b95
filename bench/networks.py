"""How long one forward pass of LeRobot's networks takes, beside what else can run it.

    python bench/networks.py                              the UNet in two sizes, horizons 16 and 64
    python bench/networks.py --widths 128,256,512 --horizon 16
    python bench/networks.py --family dit                 the transformer of multi_task_dit
    pip install onnx onnxscript onnxruntime openvino      for these two
    python bench/networks.py --out bench/results/NAME.json

Random weights, one lane, all contenders with the same ones; before anything is timed each one's
output is compared with float64's. They take turns, a chunk of ten passes each, in rounds; reported
is the median over the passes of the fastest round, and over rounds. The floor in the same run: the
time to read the weights once, with all threads, from memory as large.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

import torch  # noqa: E402
import torch_dit  # noqa: E402
import torch_unet  # noqa: E402
from measure import machine  # noqa: E402
from torch import nn  # noqa: E402
from torch_dit import Shape as DitShape  # noqa: E402
from torch_unet import Shape  # noqa: E402

from tsad import _core  # noqa: E402
from tsad.reference.layers import rotation  # noqa: E402

PASSES = 10
INPUTS = ("sample", "time_emb", "obs")
SIZES = ((512, 1024, 2048), (128, 256, 512))
# LeRobot's defaults; a moment has 7 joints, 768 features of an image and 512 of the task
DIT = DitShape(
    hidden_dim=512, num_layers=6, num_heads=8, horizon=32, obs_dim=1287, action_dim=7, n_emb=256
)
Forward = Callable[[], Any]


class Module(nn.Module):
    """The network in PyTorch's operators, in float32, as LeRobot runs it at every step."""

    def __init__(self, shape: Shape | DitShape, weights: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.shape = shape
        self.names = list(weights)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(weights[name]), requires_grad=False)
            for name in self.names
        )

    def forward(self, sample: Any, time_emb: Any, obs: Any) -> Any:
        w = dict(zip(self.names, self.weights, strict=True))
        return twin(self.shape).forward(self.shape, w, sample, time_emb, obs)


def twin(shape: Shape | DitShape) -> Any:
    """The module that has the network in PyTorch."""
    return torch_dit if isinstance(shape, DitShape) else torch_unet


def family(shape: Shape | DitShape) -> dict[str, Any]:
    """What only one of the networks takes."""
    if isinstance(shape, DitShape):
        turns = rotation(shape.horizon, shape.hidden_dim // shape.num_heads, shape.rope_base)
        return {
            "family": "dit", "n_layers": shape.num_layers, "n_heads": shape.num_heads,
            "hidden_dim": shape.hidden_dim, "rotation": turns,
            "block_cost": np.ones(2 * shape.num_layers, np.int64),
        }  # fmt: skip
    return {
        "family": "unet1d", "down_dims": np.array(shape.down_dims, np.int32),
        "kernel_size": shape.kernel_size, "n_groups": shape.n_groups,
        "use_film_scale_modulation": True,
        "block_cost": np.ones(4 * len(shape.down_dims), np.int64),
    }  # fmt: skip


def ours(shape: Shape | DitShape, weights: Any, codes: np.ndarray, obs: np.ndarray, precision: str,
         threads: int) -> tuple[Forward, Callable[[np.ndarray, int], np.ndarray]]:  # fmt: skip
    """A chunk of the core, and its network alone for the comparison."""
    O, A = shape.obs_dim, shape.action_dim  # noqa: E741
    table = np.tile(np.array([1, 0, 1, 0.5, 0.5, 0.1, 0, 0, 0], np.float32), (len(codes), 1))
    model = _core.Model(
        horizon=shape.horizon, n_obs_steps=shape.n_obs_steps, n_action_steps=1,
        obs_dim=O, action_dim=A, n_emb=shape.n_emb, sampler=table, time_emb=codes,
        obs_scale=np.ones(O, np.float32), obs_offset=np.zeros(O, np.float32),
        action_scale=np.ones(A, np.float32), action_offset=np.zeros(A, np.float32),
        tensors=weights, precision=precision, **family(shape),
    )  # fmt: skip
    policy = _core.Policy(model, lanes=1, threads=threads)
    return lambda: policy(obs), lambda x, k: policy.predict_noise(x, k, obs[None])


def export(module: Module, example: tuple[Any, ...], folder: str) -> Path:
    """The network as ONNX, which both runtimes read (OpenVINO refuses the module itself)."""
    path = Path(folder) / "network.onnx"
    if not path.exists():
        torch.onnx.export(module, example, path, input_names=INPUTS, dynamo=True, verbose=False)
    return path


def onnx_runner(path: Path, threads: int, names: Sequence[str] = INPUTS) -> Callable[..., Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))[0]


def openvino_runner(path: Path, threads: int, names: Sequence[str] = INPUTS) -> Callable[..., Any]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    inputs_of = [port.get_any_name() for port in compiled.inputs]

    def run(*inputs: Any) -> Any:
        given = dict(zip(names, inputs, strict=True))
        return request.infer([given[name] for name in inputs_of])[compiled.output(0)]

    return run


def peers(
    shape: Shape | DitShape,
    weights: Any,
    codes: np.ndarray,
    obs: np.ndarray,
    wanted: list[str],
    threads: int,
) -> dict[str, Callable[[np.ndarray, int], Any]]:
    """Other ways to run one pass, by name; those that cannot be built are said and left out."""
    module = Module(shape, weights).eval()
    rng = np.random.default_rng(0)
    sample = rng.standard_normal((1, shape.horizon, shape.action_dim), np.float32)
    example = tuple(torch.from_numpy(a) for a in (sample, codes[:1], obs[None]))
    built: dict[str, Callable[[np.ndarray, int], Any]] = {}

    def in_torch(function: Any) -> Callable[[np.ndarray, int], Any]:
        def run(x: np.ndarray, k: int) -> Any:
            inputs = (torch.from_numpy(a) for a in (x, codes[k : k + 1], obs[None]))
            with torch.inference_mode():
                return function(*inputs).numpy()

        return run

    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            try:
                if name == "eager":
                    built[name] = in_torch(module)
                elif name == "compile":
                    built[name] = in_torch(torch.compile(module))
                else:
                    make = {"onnxruntime": onnx_runner, "openvino": openvino_runner}[name]
                    run = make(export(module, example, folder), threads)
                    built[name] = lambda x, k, run=run: run(x, codes[k : k + 1], obs[None])
                built[name](sample, 0)
            except Exception as error:  # a peer that does not run here is no failure of ours
                built.pop(name, None)
                print(f"  {name}: left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
    return built


def bandwidth(size: int, threads: int) -> float:
    """Bytes a second that `threads` read from memory of `size` bytes, best of five."""
    data = np.ones(max(size // 4, 1 << 20), np.float32)
    parts = np.array_split(data, threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.max, parts))  # NumPy's fastest pass over memory; it frees the GIL
            best = max(best, data.nbytes / (time.perf_counter() - start))
    return best


def bench(shape: Shape | DitShape, args: argparse.Namespace) -> dict[str, Any]:
    weights = shape.weights(0)
    rng = np.random.default_rng(1)
    codes = rng.uniform(-1, 1, (PASSES, shape.n_emb)).astype(np.float32)
    obs = rng.standard_normal((shape.n_obs_steps, shape.obs_dim), np.float32)
    sample = rng.standard_normal((1, shape.horizon, shape.action_dim), np.float32)
    expected = twin(shape).predict(shape, weights, sample, codes[:1], obs[None]).numpy()
    size = sum(w.nbytes for w in weights.values())
    widths = [shape.hidden_dim] if isinstance(shape, DitShape) else list(shape.down_dims)
    print(f"{widths}, horizon {shape.horizon}, {size / 4e6:.0f} million parameters", flush=True)

    contenders: dict[str, Forward] = {}
    errors: dict[str, float] = {}
    for name, run in peers(shape, weights, codes, obs, args.peers, args.threads).items():
        errors[name] = float(np.abs(np.asarray(run(sample, 0)) - expected).max())

        def chunk(run: Any = run) -> None:
            for k in range(PASSES):
                run(sample, k)

        contenders[name] = chunk
    for precision in ("float32", "int16", "int8"):
        forward, network = ours(shape, weights, codes, obs, precision, args.threads)
        errors[f"tsad {precision}"] = float(np.abs(network(sample, 0) - expected).max())
        contenders[f"tsad {precision}"] = forward

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(args.rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if round_number:  # the first warms up
                times[name].append((time.perf_counter() - start) * 1000 / PASSES)
    rate = bandwidth(size, args.threads)
    rows = {}
    for name, values in times.items():
        share = {"tsad int16": 2, "tsad int8": 4}.get(name, 1)
        rows[name] = {
            "ms": {"best": min(values), "median": statistics.median(values), "rounds": values},
            "error": errors[name],
            "floor_ms": size / share / rate * 1000,
        }
        print(
            f"  {name:14} {min(values):8.2f} ms best, {statistics.median(values):8.2f} median; "
            f"error {errors[name]:.1e}; reading the weights {size / share / rate * 1000:.2f}",
            flush=True,
        )
    largest = float(np.abs(expected).max())
    return {
        "widths": widths,
        "horizon": shape.horizon,
        "parameters": size // 4,
        "largest_output": largest,
        "bytes_per_second": rate,
        "contenders": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("unet", "dit"), default="unet", help="default: unet")
    parser.add_argument("--widths", help="e.g. 512,1024,2048 (default: LeRobot's two sizes)")
    parser.add_argument("--horizon", type=int, help="e.g. 16 (default: 16 and 64)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peers",
        type=lambda text: [name for name in text.split(",") if name],
        default=["eager", "compile", "onnxruntime", "openvino"],
        help="what else to run, of eager, compile, onnxruntime, openvino (default: all)",
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [tuple(map(int, args.widths.split(",")))] if args.widths else SIZES
    if args.family == "dit" and args.widths:
        parser.error("argument --widths: only the UNet has them")
    horizons = [args.horizon] if args.horizon else [16, 64]
    shapes: list[Shape | DitShape] = [
        Shape(down_dims=dims, horizon=horizon, n_obs_steps=2, obs_dim=18, n_emb=128)
        for dims in sizes
        for horizon in horizons
    ]
    if args.family == "dit":
        shapes = [replace(DIT, horizon=args.horizon or DIT.horizon)]
    cases = [bench(shape, args) for shape in shapes]
    if args.out:
        document = {"format": f"tsad-{args.family}", "machine": machine(), "threads": args.threads}
        document |= {"rounds": args.rounds, "passes": PASSES, "cases": cases}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
