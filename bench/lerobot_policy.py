"""A LeRobot diffusion policy for Push-T: its dataset and its training, by LeRobot's own classes.

    python bench/lerobot_policy.py dataset pusht.npz pusht_dataset
    python bench/lerobot_policy.py train pusht_dataset --out run --steps 50000
    python bench/lerobot_policy.py train pusht_dataset --out run --resume      # after a stop
    python bench/lerobot_policy.py train pusht_dataset --out small --down-dims 64,128,256 \\
        --steps 9000 --lr 5e-4                        a quarter of the work for each step
    python bench/lerobot_policy.py train pusht_dataset --out large --steps 2500 --lr 2e-4 \\
        --grow small/checkpoints/009000/pretrained_model     begins with a narrower one's function
    python bench/lerobot_policy.py halve small/checkpoints/009000/pretrained_model out

Runs under LeRobot 0.6 (``pip install "lerobot[diffusion,pusht]" accelerate``, Python 3.12) with
tsad importable. The demonstrations are those of `tsad train-policy`: an npz or a zarr v2 folder
with Push-T's ``state``, ``action`` and ``episode_ends``. The dataset is a LeRobotDataset with
``observation.state`` (2, the agent) and ``observation.environment_state`` (16, the block's corners
as gym-pusht's ``environment_state_agent_pos`` reports them).

The policy is LeRobot's ``DiffusionPolicy``, 17 million parameters by default, with its own loss;
AdamW, cosine learning rate and averaged weights (EMA) are those of Diffusion Policy. All windows
are put into tensors first: LeRobot's own loader takes most of a step. A stop (SIGTERM, Ctrl-C)
saves; ``run/checkpoints/NNNNNN/pretrained_model`` is what `lerobot-eval --policy.path=` takes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lerobot_widen import widen
from torch import Tensor, nn

from tsad.training.data import load_demonstrations, windows
from tsad.training.running import STATE_FILE, STATE_VERSION, caught_signals, load_state, save_state

STATE, ENV, ACTION = "observation.state", "observation.environment_state", "action"
WEIGHTS = "model.safetensors"
REPO_ID, TASK = "local/pusht", "push the T"
DOWN_DIMS = (128, 256, 512)
HORIZON, N_OBS_STEPS, N_ACTION_STEPS = 16, 2, 8
STEPS = 50_000
LATER = ("pretrained_revision", "gradient_checkpointing")
WARMUP, EMA_POWER, EMA_MOST = 500, 0.75, 0.9999


def make_dataset(source: Path, out: Path) -> None:
    """Write a LeRobotDataset of Push-T demonstrations; ``out`` must be new."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    if out.exists():
        raise SystemExit(f"{out}: expected a folder that does not exist yet; choose another")
    corners = block_corners()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"local_keypoints_block_frame_px": corners.tolist()}, file)
        file.flush()
        episodes = load_demonstrations(source, keypoints=file.name)  # corners, then the agent
    names = {STATE: ["x", "y"], ENV: [f"{axis}{i}" for i in range(len(corners)) for axis in "xy"]}
    names[ACTION] = ["x", "y"]
    features = {
        key: {"dtype": "float32", "shape": (len(parts),), "names": parts}
        for key, parts in names.items()
    }
    dataset = LeRobotDataset.create(REPO_ID, fps=10, features=features, root=out, use_videos=False)
    start = 0
    for end in episodes.ends.tolist():
        for i in range(start, end):
            obs, action = episodes.obs[i], episodes.action[i]
            dataset.add_frame({STATE: obs[-2:], ENV: obs[:-2], ACTION: action, "task": TASK})
        dataset.save_episode()
        start = end
    dataset.finalize()
    print(f"{out}: {dataset.meta.total_episodes} episodes, {dataset.meta.total_frames} frames")


def halve(source: Path, out: Path) -> None:
    """A folder like ``source`` with the weights in float16, which LeRobot and tsad read as well.

    Without the fields that LeRobot 0.4.4 does not know, which are at their defaults.
    """
    from safetensors.torch import load_file, save_file

    if out.exists():
        raise SystemExit(f"{out}: expected a folder that does not exist yet; choose another")
    shutil.copytree(source, out, copy_function=shutil.copyfile)
    weights = {name: tensor.half() for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(weights, out / WEIGHTS)
    config = json.loads((out / "config.json").read_text())
    assert not any(config.pop(name, None) for name in LATER)
    (out / "config.json").write_text(json.dumps(config, indent=4))


def block_corners() -> np.ndarray[Any, Any]:
    """The block's corners in its own frame, (8, 2) pixels, as gym-pusht lists them."""
    import gym_pusht  # noqa: F401  (registers the environment)
    import gymnasium

    table: Any = gymnasium.make(
        "gym_pusht/PushT-v0", obs_type="environment_state_agent_pos"
    ).unwrapped
    table.reset(seed=0)
    table.block.angle, table.block.position = 0.0, (0.0, 0.0)
    return np.asarray(table.get_keypoints(table._block_shapes), np.float64)


class Training:
    """Network, average, optimiser, random state and data of a training in a folder."""

    def __init__(self, data: Path, out: Path, settings: dict[str, Any]) -> None:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
        from lerobot.policies.factory import make_pre_post_processors

        self.out, self.settings = out, settings
        torch.manual_seed(settings["seed"])
        self.dataset = dataset = LeRobotDataset(REPO_ID, root=data)
        config = policy_config(dataset.meta.features, settings["down_dims"])
        self.processors = make_pre_post_processors(config, dataset_stats=dataset.meta.stats)
        self.policy = self.make_policy(config).train()
        self.ema = copy.deepcopy(self.policy).eval()
        for module in self.policy.modules():
            if isinstance(module, nn.Conv1d):
                module.forward = functools.partial(convolve, module)
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            lr=settings["lr"],
            betas=config.optimizer_betas,
            eps=config.optimizer_eps,
            weight_decay=config.optimizer_weight_decay,
            fused=True,
        )
        self._load()
        self.step, self.seconds, self.loss = 0, 0.0, math.nan

    def make_policy(self, config: Any) -> Any:
        """What is trained, before it is."""
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        policy = DiffusionPolicy(config)
        if self.settings.get("grow"):
            narrow = DiffusionPolicy.from_pretrained(self.settings["grow"])
            random = torch.Generator().manual_seed(self.settings["seed"])
            widen(narrow.diffusion.unet, policy.diffusion.unet, random)
        return policy

    def _load(self) -> None:
        """All frames, normalised by LeRobot's preprocessor, and the windows into them."""
        table = self.dataset.hf_dataset.with_format("numpy")
        columns = {k: torch.from_numpy(np.asarray(table[k][:])) for k in (STATE, ENV, ACTION)}
        frames = self.processors[0](columns)
        self.frames = {key: frames[key].contiguous() for key in columns}
        episode = np.asarray(table["episode_index"][:])
        ends = np.append(np.flatnonzero(np.diff(episode)) + 1, len(episode))
        # LeRobot's own windows: the last n_action_steps - 1 frames of an episode begin none
        steps, inside = windows(ends, HORIZON, N_OBS_STEPS, N_ACTION_STEPS)
        self.steps, self.padded = torch.from_numpy(steps), torch.from_numpy(~inside)

    def chosen(self) -> Tensor:
        """The windows of this step: a pure function of the step, so that resuming is simple."""
        n, size = len(self.steps), self.settings["batch"]
        chosen, at, end = [], self.step * size, (self.step + 1) * size
        while at < end:
            order = np.random.default_rng([self.settings["seed"], at // n]).permutation(n)
            chosen.append(order[at % n :][: end - at])
            at += len(chosen[-1])
        return torch.from_numpy(np.concatenate(chosen))

    def batch(self) -> dict[str, Tensor]:
        """What LeRobot's loss takes, of this step's windows."""
        index = self.chosen()
        steps = self.steps[index]
        seen = steps[:, :N_OBS_STEPS]
        batch = {key: self.frames[key][seen] for key in (STATE, ENV)}
        return batch | {ACTION: self.frames[ACTION][steps], "action_is_pad": self.padded[index]}

    def train_step(self) -> None:
        """One optimiser step."""
        lr = learning_rate(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)  # a part may learn at a rate of its own
        loss, _ = self.policy.forward(self.batch())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        keep = min(EMA_MOST, 1 - (1 + self.step) ** -EMA_POWER)
        with torch.no_grad():
            average = list(self.ema.parameters())
            torch._foreach_lerp_(average, list(self.policy.parameters()), 1 - keep)
        self.step += 1
        value = float(loss.detach())
        if not math.isfinite(value):
            raise SystemExit(f"the loss is {value} at step {self.step}; lower --lr and --resume")
        self.loss = value if math.isnan(self.loss) else 0.99 * self.loss + 0.01 * value

    def save(self) -> None:
        """Everything that a training goes on from, whole or not at all."""
        state = {
            "version": STATE_VERSION,
            "settings": self.settings,
            "policy": self.policy.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        save_state(self.out / STATE_FILE, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.policy.load_state_dict(state["policy"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]

    def parts(self) -> Sequence[Any]:
        """What makes up the policy's folder."""
        return self.ema, *self.processors

    def write(self) -> Path:
        """The averaged weights and the processors as LeRobot saves them, in a numbered folder."""
        name = self.out / "checkpoints" / f"{self.step:06d}" / "pretrained_model"
        temporary = self.out / ".unfinished"
        shutil.rmtree(temporary, ignore_errors=True)
        for part in self.parts():
            part.save_pretrained(temporary)
        shutil.rmtree(name, ignore_errors=True)
        name.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary, name)
        return name

    def fit(self, save_minutes: float, keep_every: int) -> None:
        """Train to the last step; a signal saves and ends."""
        saved, reported, since = time.monotonic(), time.monotonic(), self.step
        with caught_signals() as received:
            while self.step < self.settings["steps"] and not received:
                self.train_step()
                now = time.monotonic()
                if now - reported > 60:
                    rate = (self.step - since) / (now - reported)
                    self.seconds += now - reported
                    reported, since = now, self.step
                    print(self.progress(rate), flush=True)
                if self.step % keep_every == 0:
                    print(self.write(), flush=True)
                if now - saved > 60 * save_minutes:
                    self.save()
                    saved = now
            self.save()
        if self.step < self.settings["steps"]:
            raise SystemExit(f"stopped and saved at step {self.step}; --resume goes on")
        print(self.write(), flush=True)

    def progress(self, rate: float) -> str:
        """A line for the log."""
        steps = self.settings["steps"]
        lr, left = learning_rate(self.settings, self.step), (steps - self.step) / rate / 3600
        return (
            f"{time.strftime('%d %H:%M')}  step {self.step} of {steps}  loss {self.loss:.5f}  "
            f"lr {lr:.2e}  {rate:.2f} steps/s  {left:.1f} hours to go"
        )


def convolve(layer: nn.Conv1d, x: Tensor) -> Tensor:
    """``Conv1d.forward`` as one matrix product: with few time steps twice as fast on a CPU."""
    (kernel,), (stride,), (padding,) = layer.kernel_size, layer.stride, layer.padding
    columns = F.pad(x, (padding, padding)).unfold(2, kernel, stride)  # (B, C, T, kernel)
    n, channels, length, _ = columns.shape
    rows = columns.transpose(1, 2).reshape(n * length, channels * kernel)
    y = torch.addmm(layer.bias, rows, layer.weight.flatten(1).T)
    return y.reshape(n, length, -1).transpose(1, 2)


def policy_config(features: dict[str, Any], down_dims: Sequence[int]) -> Any:
    """LeRobot's configuration: Push-T's sizes, every feature normalised to [-1, 1]."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig

    kinds = {STATE: FeatureType.STATE, ENV: FeatureType.ENV, ACTION: FeatureType.ACTION}
    shaped = {
        key: PolicyFeature(type=kind, shape=tuple(features[key]["shape"]))
        for key, kind in kinds.items()
    }
    return DiffusionConfig(
        input_features={key: shaped[key] for key in (STATE, ENV)},
        output_features={ACTION: shaped[ACTION]},
        device="cpu",
        push_to_hub=False,
        n_obs_steps=N_OBS_STEPS,
        horizon=HORIZON,
        n_action_steps=N_ACTION_STEPS,
        down_dims=tuple(down_dims),
        # without an entry for ENV, LeRobot would leave the corners in pixels
        normalization_mapping={
            kind: NormalizationMode.MIN_MAX for kind in ("STATE", "ENV", "ACTION")
        },
    )


def learning_rate(settings: dict[str, Any], step: int) -> float:
    """Linear warm-up, then half a cosine to 0 at the last step."""
    warmup = settings.get("warmup", WARMUP)  # states of before it could be chosen have none
    if step < warmup:
        return float(settings["lr"] * (step + 1) / warmup)
    done = (step - warmup) / max(1, settings["steps"] - warmup)
    return float(settings["lr"] * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def train(args: argparse.Namespace, kind: type[Training] = Training, **more: Any) -> None:
    """Start or resume a training; ``more`` settings are of its kind."""
    if args.resume:
        state = load_state(args.out)
        settings = state["settings"] | ({"steps": args.steps} if args.steps else {})
        training = kind(args.data, args.out, settings)
        training.restore(state)
        print(f"going on at step {training.step}", flush=True)
    else:
        if (args.out / STATE_FILE).exists():
            raise SystemExit(f"{args.out}: has a training; --resume goes on with it")
        args.out.mkdir(parents=True, exist_ok=True)
        settings = {"steps": args.steps or STEPS, "lr": args.lr, "batch": args.batch}
        settings |= {"warmup": args.warmup, "seed": args.seed}
        settings |= {"down_dims": list(args.down_dims), **more}
        training = kind(args.data, args.out, settings)
    training.fit(args.save_minutes, args.keep_every)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("dataset", help="demonstrations to a LeRobotDataset")
    make.add_argument("source", type=Path, help="npz file or zarr folder with Push-T's states")
    make.add_argument("out", type=Path)
    make.set_defaults(run=lambda args: make_dataset(args.source, args.out))
    small = commands.add_parser("halve", help="a policy's weights in float16, half the bytes")
    small.add_argument("source", type=Path, help="folder of a policy")
    small.add_argument("out", type=Path)
    small.set_defaults(run=lambda args: halve(args.source, args.out))
    fit = commands.add_parser("train", help="a LeRobotDataset to a policy")
    add_training(fit)
    fit.add_argument("--grow", type=Path, help="folder of a narrower policy to begin with")
    fit.set_defaults(run=lambda args: train(args, grow=args.grow and str(args.grow)))
    args = parser.parse_args(argv)
    args.run(args)


def add_training(fit: argparse.ArgumentParser) -> None:
    """The arguments of `train`."""
    fit.add_argument("data", type=Path, help="folder of the LeRobotDataset")
    fit.add_argument("--out", type=Path, required=True)
    fit.add_argument("--resume", action="store_true", help="go on with the training in --out")
    fit.add_argument("--steps", type=int, help=f"default {STEPS}; may grow with --resume")
    fit.add_argument("--batch", type=int, default=64)
    fit.add_argument("--lr", type=float, default=1e-4)
    fit.add_argument("--warmup", type=int, default=WARMUP, help="steps in which the rate rises")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument(
        "--down-dims",
        type=lambda text: tuple(map(int, text.split(","))),
        default=DOWN_DIMS,
        help="widths of the UNet's levels (default: " + ",".join(map(str, DOWN_DIMS)) + ")",
    )
    fit.add_argument("--save-minutes", type=float, default=5, help="between saved states")
    fit.add_argument("--keep-every", type=int, default=5000, help="steps between kept policies")


if __name__ == "__main__":
    main()
