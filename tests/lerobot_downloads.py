"""What LeRobot's tests download, made here: ``python tests/lerobot_downloads.py FOLDER``.

    CLIP and its tokenizer (multi_task_dit)    FOLDER/hub, a cache of Hugging Face's
    ResNet-18 and 34 of torchvision            FOLDER/torch/hub/checkpoints
    lerobot/pusht, an episode of 24 frames     FOLDER/lerobot, a folder of LeRobot's datasets

LeRobot finds them where its own downloads lie, with ``HF_HOME=FOLDER``, ``TORCH_HOME=FOLDER/torch``
and ``HF_HUB_OFFLINE=1``: nothing of its code is replaced. Weights and frames are random and CLIP is
small, so what is tested is everything but what they hold.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

CLIP = "openai/clip-vit-base-patch16"
WIDTH = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "projection_dim": 16,
}  # fmt: skip
ALOHA = [f"lerobot/aloha_sim_{task}" for task in ("insertion_human", "insertion_scripted",
         "transfer_cube_human", "transfer_cube_scripted")]  # fmt: skip
REVISION = "0" * 40


def make_clip(folder: Path) -> None:
    """A CLIP of two layers and a tokenizer of letters, as a snapshot in a cache of the Hub."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    words = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), *words]
    ids = {word: i for i, word in enumerate(vocabulary)}
    text = {"vocab_size": len(ids), "bos_token_id": ids[words[0]], "eos_token_id": ids[words[1]]}
    text |= {"pad_token_id": ids[words[1]], "max_position_embeddings": 77}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config=WIDTH | text,
            vision_config=WIDTH | {"image_size": 224, "patch_size": 16},
            projection_dim=WIDTH["projection_dim"],
        )
    )
    cache = folder / "hub" / ("models--" + CLIP.replace("/", "--"))
    snapshot = cache / "snapshots" / REVISION
    model.save_pretrained(snapshot)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(REVISION)
    (snapshot / "vocab.json").write_text(json.dumps(ids))
    (snapshot / "merges.txt").write_text("#version: 0.2\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
        "bos_token": words[0], "eos_token": words[1], "unk_token": words[1], "pad_token": words[1],
    }  # fmt: skip
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))


def make_resnets(folder: Path) -> None:
    """Under the names that torchvision downloads to."""
    import torch
    import torchvision

    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    for name in ("resnet18", "resnet34"):
        torch.manual_seed(0)
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        weights = getattr(torchvision.models, name)().state_dict()
        torch.save(weights, checkpoints / os.path.basename(url))


def make_dataset(folder: Path, name: str, image: str, shape: tuple[int, ...], dim: int) -> None:
    """One episode of random frames and smooth actions."""
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    numbers = {"dtype": "float32", "shape": (dim,), "names": [f"joint{i}" for i in range(dim)]}
    features: dict[str, Any] = {
        image: {"dtype": "image", "shape": shape, "names": ["height", "width", "channels"]},
        "observation.state": numbers,
        "action": numbers,
    }
    root = folder / "lerobot" / name
    dataset = LeRobotDataset.create(name, fps=10, features=features, root=root, use_videos=False)
    rng = np.random.default_rng(0)
    for i in range(24):
        action = np.sin(np.arange(dim) + i / 6).astype(np.float32)
        state = np.cos(np.arange(dim) + i / 6).astype(np.float32)
        frame = rng.integers(0, 256, shape, np.uint8)
        dataset.add_frame(
            {image: frame, "observation.state": state, "action": action, "task": "push"}
        )
    dataset.save_episode()
    dataset.finalize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.resolve()
    done = folder / "done"
    if done.exists():
        return
    if folder.exists():
        raise SystemExit(f"{folder}: expected a folder that was finished, or a new one; remove it")
    folder.mkdir(parents=True)
    os.environ.update(HF_HOME=str(folder), HF_HUB_OFFLINE="1")
    if importlib.util.find_spec("transformers"):  # without it no multi_task_dit
        make_clip(folder)
    make_resnets(folder)
    make_dataset(folder, "lerobot/pusht", "observation.image", (96, 96, 3), 2)
    for name in ALOHA:
        make_dataset(folder, name, "observation.images.top", (480, 640, 3), 14)
    done.touch()


if __name__ == "__main__":
    main()
