"""An image policy's encoder and head, trained further together, by LeRobot's own loss.

    python bench/image_together.py pusht_dataset pusht.npz --start pusht_pixels --out together \\
        --steps 500 --batch 16
    python bench/image_together.py pusht_dataset pusht.npz --out together --resume
    python bench/lerobot_policy.py halve together/checkpoints/000500/pretrained_model out

Runs under LeRobot 0.6, as `bench/image_policy.py` does, which makes the policy to begin with; the
bundled one is `tsad/assets/pusht_pixels`. Images are gym-pusht's own, of the demonstrations' poses,
rendered as they are needed; half of the windows are disturbed as there. The encoder learns at a
tenth of the head's rate: it knows where the corners are, and must not forget that for the few
demonstrations' sake.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lerobot_policy as lowdim
import numpy as np
import torch
from image_policy import DISTURBANCE, IMAGE, Scenes
from lerobot_policy import ACTION, ENV, N_OBS_STEPS, STATE
from torch import Tensor

from tsad.arrays import read_any_json
from tsad.sim.disturbance import Disturbed

DISTURBED = 0.5  # of the windows
ENCODER_RATE = 0.1  # of the head's learning rate


class Together(lowdim.Training):
    """`lerobot_policy`'s training of a whole image policy."""

    def __init__(self, data: Path, out: Path, settings: dict[str, Any]) -> None:
        from lerobot.policies.factory import make_pre_post_processors

        self.scenes = Scenes(Path(settings["demonstrations"]))
        super().__init__(data, out, settings)
        self.processors = make_pre_post_processors(self.policy.config, settings["start"])
        encoder = list(self.policy.diffusion.rgb_encoder.parameters())
        mine = set(map(id, encoder))
        (group,) = self.optimizer.param_groups
        head = [weight for weight in group["params"] if id(weight) not in mine]
        group["params"], group["rate"] = head, 1.0
        self.optimizer.add_param_group({"params": encoder, "rate": ENCODER_RATE})

    def make_policy(self, config: Any) -> Any:
        from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

        policy = DiffusionPolicy.from_pretrained(self.settings["start"]).float()
        policy.diffusion.rgb_encoder.to(memory_format=torch.channels_last)
        return policy

    def _load(self) -> None:
        super()._load()
        if len(self.scenes.states) != len(self.frames[ENV]):
            raise SystemExit(
                f"{self.settings['demonstrations']}: has {len(self.scenes.states)} steps, the "
                f"dataset {len(self.frames[ENV])}; expected what the dataset was made of"
            )
        del self.frames[ENV]

    def batch(self) -> dict[str, Tensor]:
        seed, step = self.settings["seed"], self.step
        index = self.chosen()
        steps = self.steps[index]
        seen = steps[:, :N_OBS_STEPS]
        rng = np.random.default_rng([seed, step])
        images = np.stack([[self.scenes.image(self.scenes.states[i]) for i in w] for w in seen])
        for i in np.flatnonzero(rng.random(len(images)) < DISTURBED):
            disturbed = Disturbed(DISTURBANCE, [seed, step, i])  # one light for both moments
            images[i] = np.stack([disturbed({IMAGE: image})[IMAGE] for image in images[i]])
        pixels = torch.from_numpy(images.astype(np.float32) / np.float32(255))
        prepared = self.processors[0]({IMAGE: pixels.movedim(-1, 2)})[IMAGE]
        return {
            IMAGE: prepared,
            STATE: self.frames[STATE][seen],
            ACTION: self.frames[ACTION][steps],
            "action_is_pad": self.padded[index],
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    lowdim.add_training(parser)
    parser.add_argument("demonstrations", type=Path, help="what the dataset was made of")
    parser.add_argument("--start", type=Path, help="folder of the image policy to begin with")
    args = parser.parse_args(argv)
    if args.start is None and not args.resume:
        raise SystemExit("--start: expected the folder of an image policy to begin with")
    if args.start is not None:
        args.down_dims = read_any_json(args.start / "config.json")["down_dims"]
    more = {"demonstrations": str(args.demonstrations), "start": str(args.start)}
    lowdim.train(args, Together, **more)


if __name__ == "__main__":
    main()
