"""How long a LeRobot folder of a gigabyte takes to load, and how much memory at most.

    python bench/loading.py                               LeRobot's widths, 250 million parameters
    python bench/loading.py --widths 128,256,512 --precision float32
    python bench/loading.py --out bench/results/NAME.json
    python bench/loading.py --make big                    only makes the folder, for `tsad bench`

The folder is made with random weights in a temporary place and removed afterwards; it is in the
page cache then. Each load is a process of its own, in turns: seconds of ``tsad.load`` after
``import tsad``, and the peaks of its memory over what the import took: all of it, with the pages of
the mapped file, which the system takes back when it needs them, and what the process owns. Both are
shown beside the packed weights that remain.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE)]

import tasks  # noqa: E402, F401  (finds the tree's own tsad)
from measure import machine  # noqa: E402

from tsad.checkpoint import CONFIG_FILE, MODEL_FILE  # noqa: E402
from tsad.families import network_shapes, unet1d  # noqa: E402
from tsad.files import write_json  # noqa: E402

CONFIG = HERE.parent / "tests" / "fixtures" / "lerobot" / "ddpm_three_levels" / CONFIG_FILE
WIDTHS, ROUNDS = "512,1024,2048", 3
PRECISIONS = ("float32", "int16", "int8")

# The peak of owned memory is not kept by the system: a thread looks, a thousand times a second.
LOAD = """
import json, sys, threading, time
import tsad

def kilobytes(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name + ":"))

def look():
    global most
    while not done:
        most = max(most, kilobytes("RssAnon"))
        time.sleep(0.001)

before, own, done = kilobytes("VmRSS"), kilobytes("RssAnon"), False
most = own
watch = threading.Thread(target=look)
watch.start()
begin = time.perf_counter()
policy = tsad.load(sys.argv[1], precision=sys.argv[2])
seconds = time.perf_counter() - begin
done = True
watch.join()
print(json.dumps({
    "seconds": seconds,
    "peak_bytes": 1024 * (kilobytes("VmHWM") - before),
    "peak_own_bytes": 1024 * (most - own),
    "packed_bytes": policy.model.weight_bytes,
}))
"""


def make_folder(folder: Path, widths: list[int]) -> int:
    """A LeRobot folder with random weights, written piece by piece; bytes of its tensors."""
    config = json.loads(CONFIG.read_text())
    config |= {"down_dims": widths, "diffusion_step_embed_dim": 128}
    config["normalization_mapping"] = {kind: "IDENTITY" for kind in ("STATE", "ENV", "ACTION")}
    write_json(folder / CONFIG_FILE, config)
    keys = ("horizon", "n_obs_steps", "n_action_steps", "down_dims", "kernel_size", "n_groups")
    keys += ("diffusion_step_embed_dim", "use_film_scale_modulation")
    sizes = {name: f["shape"][0] for name, f in config["input_features"].items()}
    network = {key: config[key] for key in keys} | {"type": unet1d.TYPE}
    network |= {"obs_dim": sum(sizes.values()), "action_dim": 2}
    shapes = {f"diffusion.unet.{name}": s for name, s in network_shapes(network).items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(folder / MODEL_FILE, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            scale = np.float32(np.prod(shape[1:]) ** -0.5)
            file.write((scale * rng.standard_normal(shape, np.float32)).tobytes())
    return end


def load(folder: Path, precision: str) -> dict[str, Any]:
    """Seconds and bytes of one load, in a new process."""
    command = [sys.executable, "-c", LOAD, str(folder), precision]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default=WIDTHS, help=f"of the UNet (default: {WIDTHS})")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write it there, load nothing")
    args = parser.parse_args(argv)
    widths = [int(width) for width in args.widths.split(",")]
    if args.make is not None:
        if args.make.exists():
            parser.error(f"argument --make: {args.make} is there already; name a new folder")
        args.make.mkdir(parents=True)
        print(f"{args.make}: {make_folder(args.make, widths) / 1e6:.0f} MB of tensors")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder goes then, too
    folder = Path(tempfile.mkdtemp(prefix="tsad-loading-"))
    try:
        file_bytes = make_folder(folder, widths)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in args.precision}
        for _ in range(args.rounds):
            for name in args.precision:
                runs[name].append(load(folder, name))
    finally:
        shutil.rmtree(folder)
    print(f"{file_bytes / 1e6:.0f} MB of tensors, widths {args.widths}, {args.rounds} loads each")
    for name, found in runs.items():
        seconds = [run["seconds"] for run in found]
        packed = found[0]["packed_bytes"]
        owned, peak = (max(run[key] for run in found) for key in ("peak_own_bytes", "peak_bytes"))
        print(
            f"{name}: {statistics.median(seconds):.2f} s ({min(seconds):.2f} to "
            f"{max(seconds):.2f}), packed {packed / 1e6:.0f} MB, owned at most "
            f"{owned / packed:.2f} times that, with the mapped file {peak / packed:.2f}"
        )
    if args.out:
        document = {"machine": machine(), "widths": widths, "file_bytes": file_bytes, "runs": runs}
        write_json(args.out, document)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
