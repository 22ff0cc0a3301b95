"""A LeRobot image policy for Push-T: its encoder, and its head, by LeRobot's own classes.

    python bench/lerobot_policy.py dataset pusht.npz pusht_dataset
    python bench/image_policy.py encoder pusht.npz --out encoder --minutes 45
    python bench/image_policy.py head pusht_dataset pusht.npz --encoder encoder \\
        --start corners/pretrained_model --out head --steps 3000
    python bench/lerobot_policy.py halve head/checkpoints/003000/pretrained_model out

Runs under LeRobot 0.6, as `bench/lerobot_policy.py` does, whose trainings these are. ``--resume``
goes on with either after a stop (SIGTERM, Ctrl-C).

The encoder, LeRobot's ResNet-18 with GroupNorm from random weights, is taught where the block's
corners are: images of gym-pusht's own renderer, of the demonstrations' poses and around them, as
many as there is time for. From half of the time on, half of them are disturbed (brightness, noise,
something in front). Where a corner is, is hard to learn through the last map of 3 x 3 alone: two
maps before it are taught the same by a spatial softmax of their own, which is thrown away. The
encoder has to end in LeRobot's Linear and ReLU. So each corner's coordinate v, -1
to 1, is two features, max(v, 0) and max(-v, 0): nothing is cut, and as the UNet's conditioning
begins with Mish, the weights of a policy that sees the corners themselves (`--start`) all but fit.

The head, that UNet, is then trained further on the features of the demonstrations' images.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lerobot_policy as lowdim
import numpy as np
import torch
import torch.nn.functional as F
from lerobot_policy import ACTION, ENV, STATE, WEIGHTS
from numpy.typing import NDArray
from torch import Tensor, nn

import tsad
from tsad.arrays import read_any_json
from tsad.sim.disturbance import Disturbance, Disturbed
from tsad.sim.pusht import PushTPixels
from tsad.training import running
from tsad.training.data import limits, read_arrays, state_observations
from tsad.training.running import load_state, move_average

IMAGE = "observation.image"
COORDINATES = 16  # of the block's corners
FEATURES = 2 * COORDINATES  # their positive and their negative parts
KEYPOINTS = COORDINATES  # LeRobot makes two features of each
TIME = 128  # numbers of the UNet's embedding of the time step, before the observation
STATE_DIM = 2
DISTURBANCE = Disturbance(brightness=0.3, noise=0.04, occlusion=0.2)

# of poses: agent x, y, block x, y, angle
SPREAD = (30.0, 30.0, 15.0, 15.0, 0.2)
LOW, HIGH = (10.0, 10.0, 60.0, 60.0, -math.pi), (502.0, 502.0, 450.0, 450.0, math.pi)
ANYWHERE = 0.3  # of the images
SIDE = 512  # of the table
AVERAGED = 4  # the weights are averaged every so many steps: it takes time


class Scenes:
    """Images of the table with block and agent where they may be, and where the corners are."""

    def __init__(self, demonstrations: Path) -> None:
        arrays = read_arrays(demonstrations)
        self.states, self.ends = arrays["state"].astype(np.float32), arrays["episode_ends"]
        self._local = lowdim.block_corners()
        self._table = PushTPixels()
        self._table.reset(0)
        self._unit = limits(self._corners(self.states))  # the demonstrations' range, -1 to 1

    def _corners(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        return state_observations(states, self._local)[:, :COORDINATES]

    def corners(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N, 16), normalised as MIN_MAX of the demonstrations does."""
        return self._unit.normalise(self._corners(states), np.float32)

    def from_ends(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(16,) twice: scale and offset to normalised corners from -1, 1, the image's ends."""
        scale, offset = np.float32(self._unit.scale), np.float32(self._unit.offset)
        return SIDE / 2 * scale, SIDE / 2 * scale + offset

    @property
    def pixels(self) -> NDArray[np.float32]:
        """(16,): how many pixels of 512 one of the normalised corners is."""
        return (1 / np.asarray(self._unit.scale)).astype(np.float32)

    def image(self, state: NDArray[np.float32]) -> NDArray[np.uint8]:
        """(96, 96, 3), as the policy will see it."""
        x, y, block_x, block_y, angle = map(float, state)
        still = ((x, y), (0, 0), (block_x, block_y), angle, (0, 0), 0.0)
        seen = self._table.restore(still)
        assert isinstance(seen, dict)
        return seen[IMAGE]

    def draw(
        self, seed: Sequence[int], n: int, disturbed: float
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """n images and their corners, a function of the seed; a share of them is disturbed."""
        rng = np.random.default_rng(seed)
        states = self.states[rng.integers(len(self.states), size=n)]
        states = states + rng.normal(0, SPREAD, states.shape)
        anywhere = rng.random(n) < ANYWHERE
        states[anywhere] = rng.uniform(LOW, HIGH, (int(anywhere.sum()), len(LOW)))
        images = np.stack([self.image(state) for state in states])
        for i in np.flatnonzero(rng.random(n) < disturbed):
            images[i] = Disturbed(DISTURBANCE, [*seed, i])({IMAGE: images[i]})[IMAGE]
        return images, self.corners(states.astype(np.float32))


def image_config(down_dims: Sequence[int]) -> Any:
    """LeRobot's configuration of the policy: `lerobot_policy`'s, with an image for the corners."""
    from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature

    shapes = {STATE: {"shape": (STATE_DIM,)}, ACTION: {"shape": (2,)}, ENV: {"shape": (1,)}}
    config = lowdim.policy_config(shapes, down_dims)
    del config.input_features[ENV], config.normalization_mapping["ENV"]
    config.input_features[IMAGE] = PolicyFeature(FeatureType.VISUAL, (3, 96, 96))
    config.normalization_mapping["VISUAL"] = NormalizationMode.MEAN_STD
    config.use_group_norm, config.pretrained_backbone_weights = True, None
    config.use_separate_rgb_encoder_per_camera = False
    config.spatial_softmax_num_keypoints = KEYPOINTS
    config.crop_shape = config.resize_shape = None
    return config


# ---- the encoder


@dataclass(frozen=True)
class Settings:
    """Of an encoder's training; as of `tsad.training.running.Budget`."""

    minutes: float | None
    steps: int | None = None
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.6
    batch: int = 8
    weight_decay: float = 1e-4
    ema: float = 0.998
    seed: int = 0


@dataclass(frozen=True)
class Report:
    """A line of the curve; errors are RMS of a coordinate, in pixels of 512, of unseen poses.

    The encoder's comes first, then those of the maps.
    """

    step: int
    minutes: float
    loss: float
    error_px: list[float]
    disturbed_px: list[float]


class Teacher(nn.Module):
    """LeRobot's encoder, and what teaches its maps of 12 x 12 and 6 x 6 where the corners are.

    Args:
        scale, offset: (16,), to normalised corners from -1, 1, the ends of the image.
    """

    MAPS = {5: (128, 12), 6: (256, 6)}  # child of the trunk: channels, height and width

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        from lerobot.policies.diffusion.modeling_diffusion import (
            DiffusionRgbEncoder,
            SpatialSoftmax,
        )

        super().__init__()
        self.encoder = DiffusionRgbEncoder(image_config(lowdim.DOWN_DIMS))
        self.pools = nn.ModuleDict(
            {
                str(child): SpatialSoftmax((channels, size, size), COORDINATES // 2)
                for child, (channels, size) in self.MAPS.items()
            }
        )
        self.outs = nn.ModuleDict(
            {str(child): nn.Linear(*2 * [COORDINATES]) for child in self.MAPS}
        )
        with torch.no_grad():  # a keypoint is taken for a corner, or two for one
            for out, parts in [(self.encoder.out, 2), *((out, 1) for out in self.outs.values())]:
                out.weight[:COORDINATES] = torch.cat(parts * [torch.diag(scale / parts)], 1)
                out.bias[:COORDINATES] = offset

    def forward(self, images: Tensor) -> list[Tensor]:
        """The corners (N, 16), -1 to 1: the encoder's, and of each map before."""
        x, found = images, []
        for child, layer in enumerate(self.encoder.backbone):
            x = layer(x)
            if child in self.MAPS:
                points = self.pools[str(child)](x).flatten(1)
                found.append(self.outs[str(child)](points))
        points = self.encoder.pool(x).flatten(1)
        return [self.encoder.out(points)[:, :COORDINATES], *found]


class EncoderTraining(running.Training[Report]):
    """Images to corners."""

    def __init__(self, demonstrations: Path, out: Path, settings: Settings) -> None:
        super().__init__(out, settings)
        self.settings, self.scenes = settings, Scenes(demonstrations)
        torch.manual_seed(settings.seed)
        teacher = Teacher(*map(torch.from_numpy, self.scenes.from_ends()))
        self.teacher = teacher.to(memory_format=torch.channels_last).train()
        self.ema = copy.deepcopy(self.teacher).eval()
        self.optimizer = torch.optim.AdamW(
            self.teacher.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        # seeds of three numbers: no step's, which have two
        self.held_out = [self.scenes.draw([settings.seed, 0, i], 128, i) for i in range(2)]
        pixels = self.scenes.draw([settings.seed, 1, 0], 256, 0)[0].reshape(-1, 3) / 255.0
        self.mean, self.std = pixels.mean(0), pixels.std(0)

    def train_step(self) -> float:
        s = self.settings
        lr = running.learning_rate(s, self.step, self.fraction)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        disturbed = 0.5 if self.fraction > 0.5 else 0.0
        images, corners = self.scenes.draw([s.seed, self.step], s.batch, disturbed)
        loss, *others = (
            F.smooth_l1_loss(found, torch.from_numpy(corners), beta=0.05)
            for found in self.teacher(normalised(images, self.mean, self.std))
        )
        self.optimizer.zero_grad(set_to_none=True)
        sum(others, loss).backward()
        self.optimizer.step()
        if self.step % AVERAGED == 0:
            keep = min(s.ema**AVERAGED, (1 + self.step) / (10 + self.step))
            move_average(self.ema.parameters(), self.teacher.parameters(), keep)
        return self.note_loss(loss)

    @torch.no_grad()
    def evaluate(self) -> Report:
        errors = []
        for images, corners in self.held_out:
            found = [
                torch.stack(self.ema(normalised(part, self.mean, self.std)))
                for part in np.split(images, 4)
            ]
            error = (torch.cat(found, 1).numpy() - corners) * self.scenes.pixels
            errors.append([round(float(e), 2) for e in np.sqrt(np.square(error).mean((1, 2)))])
        return Report(self.step, self.seconds / 60, self.average_loss, *errors)

    def state(self) -> dict[str, Any]:
        return self.progress_state() | {
            "settings": asdict(self.settings),
            "teacher": self.teacher.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.restore_progress(state, Report)
        for part in ("teacher", "ema", "optimizer"):
            getattr(self, part).load_state_dict(state[part])

    def write(self, folder: Path | None = None) -> Path:
        """The averaged weights, by LeRobot's names, and the statistics of the pixels."""
        from safetensors.torch import save_file

        encoder = copy.deepcopy(self.ema.encoder)
        with torch.no_grad():
            for tensor in (encoder.out.weight, encoder.out.bias):
                tensor[COORDINATES:] = -tensor[:COORDINATES]
        tensors = {f"encoder.{k}": v.contiguous() for k, v in encoder.state_dict().items()}
        tensors |= {"mean": torch.from_numpy(self.mean), "std": torch.from_numpy(self.std)}
        out = folder or self.out
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / WEIGHTS)
        return out / WEIGHTS


def normalised(images: NDArray[np.uint8], mean: Any, std: Any) -> Tensor:
    """(N, 3, 96, 96) of uint8 (N, 96, 96, 3), as LeRobot's preprocessor makes it."""
    pixels = (images / np.float32(255) - np.float32(mean)) / np.float32(std)
    # of channels_last memory, which is how the images came
    return torch.from_numpy(pixels.astype(np.float32)).permute(0, 3, 1, 2)


def train_encoder(args: argparse.Namespace) -> None:
    """Start or resume the encoder's training."""
    if args.resume:
        state = load_state(args.out)
        settings = Settings(**state["settings"] | {"minutes": args.minutes})
        training = EncoderTraining(args.demonstrations, args.out, settings)
        training.restore(state)
    else:
        settings = Settings(args.minutes, lr=args.lr, batch=args.batch, seed=args.seed)
        training = EncoderTraining(args.demonstrations, args.out, settings)

    def tell(report: Report) -> None:
        print(time.strftime("%H:%M:%S"), report, f"{training.fraction:.1%}", flush=True)

    try:
        print(training.fit(report_every=200, save_every=200, keep_every=1000, on_report=tell))
    except running.InterruptedTrainingError:
        raise SystemExit(f"stopped and saved at step {training.step}; --resume goes on") from None


# ---- the head


class HeadTraining(lowdim.Training):
    """`lerobot_policy`'s training, with an encoder's features in place of the corners."""

    def __init__(self, data: Path, out: Path, settings: dict[str, Any]) -> None:
        self.scenes = Scenes(Path(settings["demonstrations"]))
        super().__init__(data, out, settings)

    def make_policy(self, config: Any) -> Any:
        config = copy.deepcopy(config)
        config.input_features[ENV].shape = (FEATURES,)
        policy = super().make_policy(config)
        if self.settings["start"] is not None:
            weights = start_weights(Path(self.settings["start"]), policy.config.n_obs_steps)
            policy.load_state_dict(weights)
        return policy

    def _load(self) -> None:
        super()._load()
        states = self.scenes.states
        if len(states) != len(self.frames[ENV]):
            raise SystemExit(
                f"{self.settings['demonstrations']}: has {len(states)} steps, the dataset "
                f"{len(self.frames[ENV])}; expected what the dataset was made of"
            )
        if self.settings["episodes"] is not None:  # of which nothing but windows is needed
            cut = int(self.scenes.ends[self.settings["episodes"] - 1])
            inside = self.steps[:, -1] < cut
            self.steps, self.padded, states = self.steps[inside], self.padded[inside], states[:cut]
        self.frames[ENV] = self._features(states)

    def _features(self, states: NDArray[np.float32]) -> Tensor:
        """(N, 32) of the demonstrations' images, as tsad makes them; kept beside the encoder."""
        kept = Path(self.settings["encoder"]) / "features.pt"
        if kept.exists() and len(features := torch.load(kept, weights_only=True)) == len(states):
            return features
        with tempfile.TemporaryDirectory() as folder:
            for part in whole(self.policy, Path(self.settings["encoder"]), self.dataset.meta.stats):
                part.save_pretrained(folder)
            eye = tsad.load(folder, lanes=32, threads=1)
        assert isinstance(eye, tsad.ImagePolicy)
        found, size = [], eye.lanes * eye.n_obs_steps
        for begin in range(0, len(states), size):
            part = states[begin : begin + size]
            shape = (eye.lanes, eye.n_obs_steps)
            padded = part[np.arange(size).clip(max=len(part) - 1)]
            images = np.stack([self.scenes.image(state) for state in padded])
            seen = {IMAGE: images.reshape(*shape, *images.shape[1:])}
            seen[STATE] = np.zeros((*shape, STATE_DIM), np.float32)
            found.append(eye.encode(seen)[..., -FEATURES:].reshape(size, -1)[: len(part)])
        features = torch.from_numpy(np.concatenate(found))
        error = features[:, :COORDINATES] - features[:, COORDINATES:]
        error = (error.numpy() - self.scenes.corners(states)) * self.scenes.pixels
        print(f"error on the demonstrations: {np.sqrt(np.square(error).mean()):.2f} px", flush=True)
        torch.save(features, kept)
        return features

    def parts(self) -> Sequence[Any]:
        """The policy with its encoder, and the processors."""
        return whole(self.ema, Path(self.settings["encoder"]), self.dataset.meta.stats)


def start_weights(folder: Path, n_obs_steps: int) -> dict[str, Tensor]:
    """Weights of the head, of a policy that sees the corners, or of another head."""
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    weights = {k: v.float() for k, v in weights.items() if ".rgb_encoder." not in k}
    each = STATE_DIM + FEATURES
    for name, weight in weights.items():
        if not name.endswith("cond_encoder.1.weight"):
            continue
        steps = weight[:, TIME:].unflatten(1, (n_obs_steps, -1))
        if steps.shape[2] == each:
            continue
        state, corners = steps.split([STATE_DIM, COORDINATES], 2)
        # Mish comes first: mish(v) is mish(max(v, 0)), and nearly c mish(max(-v, 0))
        v = torch.linspace(0, 1, 101)
        c = (F.mish(-v) @ F.mish(v)) / (F.mish(v) @ F.mish(v))
        steps = torch.cat([state, corners, c * corners], 2).flatten(1)
        weights[name] = torch.cat([weight[:, :TIME], steps], 1)
    return weights


def read_encoder(folder: Path) -> tuple[Any, NDArray[Any], NDArray[Any]]:
    """The encoder of a training, and the mean and standard deviation of the pixels, (3,)."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionRgbEncoder
    from safetensors.torch import load_file

    tensors = load_file(folder / WEIGHTS)
    mean, std = tensors.pop("mean").numpy(), tensors.pop("std").numpy()
    encoder = DiffusionRgbEncoder(image_config(lowdim.DOWN_DIMS)).eval()
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in tensors.items()})
    return encoder, mean, std


def whole(head: Any, folder: Path, stats: dict[str, Any]) -> Sequence[Any]:
    """LeRobot's image policy of a head and an encoder, and its processors."""
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy
    from lerobot.policies.factory import make_pre_post_processors

    encoder, mean, std = read_encoder(folder)
    config = image_config(head.config.down_dims)
    policy = DiffusionPolicy(config).eval()
    policy.diffusion.unet.load_state_dict(head.diffusion.unet.state_dict())
    policy.diffusion.rgb_encoder.load_state_dict(encoder.state_dict())
    pixels = {"min": np.zeros(3), "max": np.ones(3), "mean": mean, "std": std}
    stats = {key: stats[key] for key in (STATE, ACTION)}
    stats[IMAGE] = {key: np.float32(value).reshape(3, 1, 1) for key, value in pixels.items()}
    return policy, *make_pre_post_processors(config, dataset_stats=stats)


def train_head(args: argparse.Namespace) -> None:
    """Start or resume the head's training."""
    more: dict[str, Any] = {
        "demonstrations": str(args.demonstrations),
        "encoder": str(args.encoder),
        "episodes": args.episodes,
        "start": args.start and str(args.start),
    }
    if args.start is not None:
        args.down_dims = read_any_json(args.start / "config.json")["down_dims"]
    lowdim.train(args, HeadTraining, **more)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    eye = commands.add_parser("encoder", help="poses of demonstrations to an encoder")
    eye.add_argument(
        "demonstrations", type=Path, help="npz file or zarr folder with Push-T's states"
    )
    eye.add_argument("--out", type=Path, required=True)
    eye.add_argument(
        "--minutes", type=float, default=45, help="of training; may change with --resume"
    )
    eye.add_argument("--resume", action="store_true", help="go on with the training in --out")
    eye.add_argument("--batch", type=int, default=Settings.batch)
    eye.add_argument("--lr", type=float, default=Settings.lr)
    eye.add_argument("--seed", type=int, default=0)
    eye.set_defaults(run=train_encoder)
    head = commands.add_parser("head", help="an encoder and a LeRobotDataset to a policy")
    lowdim.add_training(head)
    head.add_argument("demonstrations", type=Path, help="what the dataset was made of")
    head.add_argument("--encoder", type=Path, required=True, help="folder of its training")
    head.add_argument("--episodes", type=int, help="the first so many alone (default: all)")
    head.add_argument("--start", type=Path, help="folder of a policy to begin with")
    head.set_defaults(run=train_head)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
