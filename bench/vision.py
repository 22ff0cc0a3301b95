"""How long an image encoder takes for an image, beside what else can run it.

    python bench/vision.py                                84 x 84, 96 x 96, 480 x 640; one and two
    python bench/vision.py --sizes 96x96 --images 1
    pip install onnx onnxscript onnxruntime openvino      for these two
    python bench/vision.py --out bench/results/NAME.json

LeRobot's ResNet-18 with random weights, BatchNorm folded for everybody, all contenders with the
same ones; before anything is timed each one's features are compared with float64's. They take
turns, some passes each, in rounds; reported are the fastest round and the median of rounds. The
peers get float32 planes, ours uint8 as a camera gives them. The floor in the same run: the larger
of the multiply-adds at the rate that all threads reach from registers, and the weights read once;
of our 16 bits, at the rate of products of 16-bit integers, and of half the bytes, or, with weights
of 8 bits, a quarter.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

import torch  # noqa: E402
from measure import machine  # noqa: E402
from networks import onnx_runner, openvino_runner  # noqa: E402
from roofline import Roofline, floor  # noqa: E402
from torch import nn  # noqa: E402
from torch_encoder import BLOCKS, Encoder, Weights, encode, forward  # noqa: E402

from tsad import _core  # noqa: E402

Forward = Callable[[], Any]
SIZES = "84x84,96x96,480x640"
TURN_MS = 200  # about what a turn lasts


class Module(nn.Module):
    """The encoder in PyTorch's operators, in float32."""

    def __init__(self, encoder: Encoder, weights: Weights) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = list(weights)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.from_numpy(w), requires_grad=False) for w in weights.values()
        )

    def forward(self, images: Any) -> Any:
        return forward(self.encoder, dict(zip(self.names, self.weights, strict=True)), images)


def multiply_adds(encoder: Encoder) -> int:
    """Of one image, without the border's zeros left out."""

    def after(size: tuple[int, int], stride: int) -> tuple[int, int]:
        return (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1

    size = after((encoder.height, encoder.width), 2)
    total = size[0] * size[1] * 64 * 49 * encoder.channels
    size, c = after(size, 2), 64
    for i, blocks in enumerate(BLOCKS[encoder.depth]):
        c_out = 64 << i
        size = after(size, 2 if i else 1)
        area = size[0] * size[1]
        total += area * c_out * 9 * (c + (2 * blocks - 1) * c_out)
        total += area * c_out * c if i else 0
        c = c_out
    return total + size[0] * size[1] * 512 * encoder.keypoints


def peers(encoder: Encoder, weights: Weights, images: np.ndarray, wanted: list[str],
          threads: int) -> dict[str, Forward]:  # fmt: skip
    """Other ways to run it, by name; those that cannot be built are said and left out."""
    built: dict[str, Forward] = {}

    def in_torch(function: Any, example: Any) -> Forward:
        def run() -> Any:
            with torch.inference_mode():
                return function(example).numpy()

        return run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.onnx"
        for name in wanted:
            try:
                module, example = Module(encoder, weights).eval(), torch.from_numpy(images)
                if name == "eager":
                    built[name] = in_torch(module, example)
                elif name == "channels last":
                    module = module.to(memory_format=torch.channels_last)
                    example = example.contiguous(memory_format=torch.channels_last)
                    built[name] = in_torch(module, example)
                elif name == "compile":
                    built[name] = in_torch(torch.compile(module), example)
                else:
                    if not path.exists():
                        torch.onnx.export(
                            module, (example,), path, input_names=["images"], dynamo=True,
                            verbose=False,
                        )  # fmt: skip
                    make = {"onnxruntime": onnx_runner, "openvino": openvino_runner}[name]
                    run = make(path, threads, ("images",))
                    built[name] = lambda run=run: run(images)
                built[name]()
            except Exception as error:  # a peer that does not run here is no failure of ours
                built.pop(name, None)
                print(f"  {name}: left out: {type(error).__name__}: {str(error)[:100]}", flush=True)
    return built


def timed(run: Forward, passes: int) -> float:
    """Milliseconds of a pass."""
    start = time.perf_counter()
    for _ in range(passes):
        run()
    return (time.perf_counter() - start) * 1000 / passes


def bench(size: tuple[int, int], n: int, args: argparse.Namespace) -> dict[str, Any]:
    encoder = Encoder(depth=args.depth, norm=args.norm, height=size[0], width=size[1])
    weights = encoder.weights()
    pixels = np.random.default_rng(1).integers(0, 256, (n, *size, 3), np.uint8)
    planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)
    expected = encode(encoder, weights, planes).numpy()
    print(f"{size[0]} x {size[1]}, {n} image{'s' * (n > 1)}", flush=True)

    contenders = peers(encoder, weights, planes, args.peers, args.threads)
    visions = {
        name: _core.Vision(weights, threads=args.threads, precision=name, **encoder.arguments())
        for name in ("float32", "int16", "int8")
    }
    vision = visions["float32"]
    out = np.empty((n, vision.features), np.float32)
    for name, own in visions.items():
        contenders[f"tsad {name}"] = lambda own=own: own.encode(pixels, out=out)
    errors = {
        name: float(np.abs(np.asarray(run()) - expected).max()) for name, run in contenders.items()
    }
    passes = {name: max(1, round(TURN_MS / timed(run, 2))) for name, run in contenders.items()}
    roofline, peaks = Roofline(vision.backend), []
    parameters = sum(w.size for w in weights.values())
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, run in contenders.items():
            times[name].append(timed(run, passes[name]))
        peaks.append(roofline.run(args.threads, 4 * parameters, 0.1))
    peak = Roofline.best(peaks)
    work = n * multiply_adds(encoder)
    least = floor(work, 4 * parameters, peak)
    floors = {
        f"tsad {name}": floor(work, size * parameters, peak, work)
        for name, size in (("int16", 2), ("int8", 1))
    }
    rows = {}
    for name, values in times.items():
        share = floors.get(name, least)["ms"] / min(values)
        rows[name] = {
            "ms": {"best": min(values), "median": statistics.median(values), "rounds": values},
            "error": errors[name],
            "of_floor": share,
        }
        print(
            f"  {name:14} {min(values):8.2f} ms best, {statistics.median(values):8.2f} median; "
            f"error {errors[name]:.1e}; {100 * share:.0f} % of the floor",
            flush=True,
        )
    print(
        f"  floor: {least['compute_ms']:.2f} ms of arithmetic, {least['memory_ms']:.2f} of "
        f"weights; of integers {floors['tsad int16']['compute_ms']:.2f} of arithmetic"
    )
    for name, own in visions.items():
        print(f"  ours keeps {(own.weight_bytes + own._bytes) / 1e6:.0f} MB in {name}")
    return {
        "size": list(size),
        "images": n,
        "parameters": parameters,
        "multiply_adds": n * multiply_adds(encoder),
        "largest_feature": float(np.abs(expected).max()),
        **{
            "bytes" if name == "float32" else f"bytes_{name}": {
                "weights": own.weight_bytes,
                "rest": own._bytes,
            }
            for name, own in visions.items()
        },
        "peak": peak,
        "floor": least,
        "floor_int16": floors["tsad int16"],
        "floor_int8": floors["tsad int8"],
        "contenders": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default=SIZES, help=f"height x width (default: {SIZES})")
    parser.add_argument("--images", default="1,2", help="at once (default: 1,2)")
    parser.add_argument("--depth", type=int, default=18, help="18 or 34 (default: 18)")
    parser.add_argument("--norm", default="folded", help="folded or group (default: folded)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--peers",
        type=lambda text: [name for name in text.split(",") if name],
        default=["eager", "channels last", "compile", "onnxruntime", "openvino"],
        help="what else to run, of eager, channels last, compile, onnxruntime, openvino "
        "(default: all)",
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [(int(h), int(w)) for h, w in (size.split("x") for size in args.sizes.split(","))]
    cases = [bench(size, n, args) for size in sizes for n in map(int, args.images.split(","))]
    if args.out:
        document = {"format": "tsad-vision", "machine": machine(), "threads": args.threads}
        document |= {"rounds": args.rounds, "depth": args.depth, "norm": args.norm, "cases": cases}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
