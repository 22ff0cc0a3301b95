"""How much memory a network holds once it runs, beside what else can run it.

    python bench/memory.py                                the UNet in two sizes, an image encoder
    python bench/memory.py --cases unet-small             of unet-large, unet-small, dit, encoder
    pip install onnx onnxscript onnxruntime openvino      for these two
    python bench/memory.py --out bench/results/NAME.json

The networks and contenders of networks.py and vision.py, each in a process of its own: resident
memory after three passes less that after all imports, so libraries are not counted, and weights,
work space and what was compiled are. Weights come from files, which are let go before we look; a
runtime that maps its file keeps it and is charged for it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "tests")]

import networks  # noqa: E402
import torch  # noqa: E402
import vision  # noqa: E402
from measure import machine  # noqa: E402
from torch_encoder import Encoder  # noqa: E402
from torch_unet import Shape  # noqa: E402

from tsad import _core  # noqa: E402

OURS = ("float32", "int16", "int8")
OF_ONNX = ("onnxruntime", "openvino")
PEERS = ("eager", "compile", *OF_ONNX)
CASES: dict[str, Any] = {
    "unet-large": Shape(networks.SIZES[0], horizon=16, n_obs_steps=2, obs_dim=18, n_emb=128),
    "unet-small": Shape(networks.SIZES[1], horizon=16, n_obs_steps=2, obs_dim=18, n_emb=128),
    "dit": networks.DIT,
    "encoder": Encoder(height=96, width=96),
}


def resident() -> int:
    """Bytes that this process holds in memory, after giving back what it can."""
    gc.collect()
    with suppress(AttributeError):  # not every C library has it
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def inputs(case: Any) -> tuple[Any, ...]:
    """What one pass takes."""
    rng = np.random.default_rng(1)
    if isinstance(case, Encoder):
        return (rng.random((1, 3, case.height, case.width), np.float32),)
    sample = rng.standard_normal((1, case.horizon, case.action_dim), np.float32)
    code = rng.uniform(-1, 1, (1, case.n_emb)).astype(np.float32)
    return sample, code, rng.standard_normal((1, case.n_obs_steps, case.obs_dim), np.float32)


def module(case: Any, weights: Any) -> Any:
    kind = vision.Module if isinstance(case, Encoder) else networks.Module
    return kind(case, weights).eval()


def names(case: Any) -> tuple[str, ...]:
    return ("images",) if isinstance(case, Encoder) else networks.INPUTS


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors, mapped."""
    order: list[str] = json.loads((folder / "names.json").read_text())
    return {name: np.load(folder / f"{i}.npy", mmap_mode="r") for i, name in enumerate(order)}


def write(case: Any, folder: Path) -> None:
    """The tensors, one file each."""
    weights = case.weights() if isinstance(case, Encoder) else case.weights(0)
    (folder / "names.json").write_text(json.dumps(list(weights)))
    for i, tensor in enumerate(weights.values()):
        np.save(folder / f"{i}.npy", tensor)


def export(case: Any, folder: Path) -> None:
    """The ONNX file of what was written, which two peers read."""
    weights = {key: np.array(tensor) for key, tensor in weights_of(folder).items()}
    example = tuple(map(torch.from_numpy, inputs(case)))
    path = folder / "network.onnx"
    torch.onnx.export(
        module(case, weights), example, path, input_names=names(case), dynamo=True, verbose=False
    )


def ours(case: Any, folder: Path, precision: str, threads: int) -> Callable[[], Any]:
    weights = weights_of(folder)
    given = inputs(case)
    if isinstance(case, Encoder):
        own = _core.Vision(weights, threads=threads, precision=precision, **case.arguments())
        pixels = np.zeros((1, case.height, case.width, 3), np.uint8)
        return lambda: own.encode(pixels)
    codes = np.tile(given[1], (networks.PASSES, 1))
    run: Callable[[], Any] = networks.ours(case, weights, codes, given[2][0], precision, threads)[0]
    return run


def theirs(case: Any, folder: Path, name: str, threads: int) -> Callable[[], Any]:
    given = inputs(case)
    if name in OF_ONNX:
        make = {"onnxruntime": networks.onnx_runner, "openvino": networks.openvino_runner}[name]
        run = make(folder / "network.onnx", threads, names(case))
        return lambda: run(*given)
    weights = {key: np.array(tensor) for key, tensor in weights_of(folder).items()}
    network = module(case, weights)
    function = torch.compile(network) if name == "compile" else network
    tensors = tuple(map(torch.from_numpy, given))

    def forward() -> Any:
        with torch.inference_mode():
            return function(*tensors)

    return forward


def measure(case: Any, folder: Path, name: str, threads: int) -> int:
    """Bytes that a contender adds to this process."""
    if name in OF_ONNX:
        __import__(name)
    torch.set_num_threads(threads)
    before = resident()
    own = name.removeprefix("tsad ")
    make = ours if own != name else theirs
    run = make(case, folder, own, threads)
    for _ in range(3):
        run()
    return resident() - before


def reason(done: Any) -> str:
    """Why a process failed: the last that it said, if anything."""
    said = done.stderr.strip().splitlines()
    return str(said[-1][:100]) if said else f"ended with {done.returncode}"


def bench(key: str, threads: int) -> dict[str, Any]:
    """All contenders of a case, each in a process."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--cases", key, "--threads", str(threads)]
        command += ["--contender", folder]
        subprocess.run([*command, "write"], check=True, stdout=subprocess.DEVNULL)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.npy"))
        print(f"{key}: {size / 1e6:.0f} MB of float32 weights", flush=True)
        exported = subprocess.run([*command, "export"], capture_output=True, text=True)
        for name in (*PEERS, *(f"tsad {precision}" for precision in OURS)):
            if exported.returncode and name in OF_ONNX:
                print(f"  {name}: left out: no ONNX file: {reason(exported)}", flush=True)
                continue
            done = subprocess.run([*command, name], capture_output=True, text=True)
            if done.returncode:
                print(f"  {name}: left out: {reason(done)}", flush=True)
                continue
            rows[name] = {"bytes": int(done.stdout.split()[-1])}
            print(f"  {name:14} {rows[name]['bytes'] / 1e6:8.0f} MB", flush=True)
    return {"weight_bytes": size, "contenders": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="unet-large,unet-small,encoder", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)  # folder, what to do there
    args = parser.parse_args()
    keys = list(dict.fromkeys(args.cases.split(",")))
    if unknown := set(keys) - set(CASES):
        parser.error(f"argument --cases: got {', '.join(unknown)}, expected of {', '.join(CASES)}")
    if args.threads < 1:
        parser.error(f"argument --threads: expected 1 or more, got {args.threads}")
    if args.out and (args.out.is_dir() or not args.out.parent.is_dir()):
        parser.error(f"argument --out: expected a file in a folder that exists, got {args.out}")
    if args.contender:
        case, folder, name = CASES[keys[0]], Path(args.contender[0]), args.contender[1]
        if name in ("write", "export"):
            (write if name == "write" else export)(case, folder)
        else:
            print(measure(case, folder, name, args.threads))
    else:
        cases = {key: bench(key, args.threads) for key in keys}
        if args.out:
            document = {"format": "tsad-memory", "machine": machine(), "threads": args.threads}
            args.out.write_text(json.dumps(document | {"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
