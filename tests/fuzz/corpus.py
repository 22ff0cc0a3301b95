"""Makes the seeds of the corpus: a small good file or two for every target.

    PYTHONPATH=tests python tests/fuzz/corpus.py        needs torch

What fuzzing found worth keeping lies beside them.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cases
import checkpoints
import numpy as np
import torch
from targets import BLOCKS, COLLECTION, LEROBOT, NETWORK, POLICY, RUN, STATISTICS, STEPS

from tsad import Plan
from tsad.checkpoint import safetensors_bytes
from tsad.config import PolicyConfig
from tsad.planners.effects import Effects
from tsad.sim import recording
from tsad.sim.rollout import Episode

CORPUS = Path(__file__).parent / "corpus"


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def text(value: Any) -> bytes:
    return json.dumps(value).encode()


def checkpoint(**options: Any) -> bytes:
    """One of the smallest networks there is, in one storage, its settings a plain dict."""
    config = checkpoints.lowdim_config(**NETWORK, n_cond_layers=0, causal_attn=False)
    for key in ("logging", "optimizer", "name"):
        del config[key]
    config["scheduler"] = config["policy"]["noise_scheduler"]
    config["policy"]["noise_scheduler"] = "${scheduler}"
    state, _ = checkpoints.state_dict(1, **NETWORK, n_cond_layers=0, causal_attn=False)
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()]).half()
    parts = flat.split([tensor.numel() for tensor in state.values()])
    views = {name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}
    value = {"cfg": config, "state_dicts": {"ema_model": views}, "step": np.int64(3)}
    return saved(value, **options)


def files() -> dict[str, dict[str, bytes]]:
    network = NETWORK | {"n_cond_layers": 0}
    config = cases.config("tiny") | {"network": network, "provenance": {}}
    config["normalizer"] = {key: {"scale": [1.0], "offset": [0.0]} for key in ("obs", "action")}
    del config["cost"]
    parsed = PolicyConfig.from_dict(config)
    pruner = {"hidden_dim": 4, "n_head": 1, "dim_feedforward": 1}
    pruner_state = {
        name: torch.from_numpy(value)
        for name, value in cases.random_pruner(pruner, network, 1).items()
    }
    sizes = {"attn_heads": 1, "hidden_dim": 4, "dim_feedforward": 1}
    sources = np.zeros((STEPS, BLOCKS), np.uint8)
    sources[1:] = 2
    plan = io.BytesIO()
    Plan(sources, np.zeros_like(sources), blocks=POLICY.blocks, metadata={"a": 1}).write(plan)
    K, B = STEPS, BLOCKS
    shapes = {
        "pair": (B, K, K),
        "segment": (B, K, K + 1),
        "kind": (K, B, B),
        "skip": (K, B),
        "rollout": (1, K, B),
        "alike": (B, K, K),
        "changes": (B,),
        "first_layer": (K, K),
        "inputs": (K,),
        "outputs": (K,),
    }
    effects = io.BytesIO()
    tables = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()}
    Effects(**tables, metadata={}).write(effects)
    row = asdict(Episode(1, 0.5, False, 8, 1, 1.0, 0.5))
    header = {"format": "tsad-eval", "format_version": 1, "settings": {"a": {"b": 1}}}
    chunk = np.zeros(2, [("obs", "f4", (1, 1)), ("actions", "f4", (2, 1))])
    preset = {
        "name": "fast",
        "model_sha256": "0" * 64,
        "sampler": "ddim",
        "num_inference_steps": 4,
        "timestep_spacing": "leading",
        "precision": "int16",
        "n_action_steps": 1,
        "measured": {"milliseconds": 1.0},
    }
    planned = preset | {"name": "p", "plan": "plan.npz", "plan_sha256": "0" * 64}
    dialled = preset | {"name": "d", "planner": "uniform", "sparsity": 0.5, "warm_start": 2}
    presets = {"format": "tsad-presets", "format_version": 1, "presets": [preset, planned, dialled]}
    tree = {
        "a": {"b": "${.c}", "c": [1, "${a.d}"], "d": "${eval:'${n} + 1 if ${on} else 2'}"},
        "n": 3,
        "on": True,
        "s": "${a}",
        "t": "x${n}${..n}\\${n}",
        "u": "${oc.select:s.c[0],5}",
    }
    demonstrations = {"action": np.zeros((3, 2), "f4"), "episode_ends": np.array([2, 3])}
    state = np.zeros((3, 5), "f4")
    return {
        "checkpoint": {
            "good-zip": checkpoint(),
            "good-old": checkpoint(_use_new_zipfile_serialization=False),
            "good-protocol5": checkpoint(pickle_protocol=5),
        },
        "pruner": {
            "good": saved({"model_state_dict": pruner_state, **sizes}),
            "good-old": saved(
                {"model_state_dict": pruner_state, **sizes}, _use_new_zipfile_serialization=False
            ),
        },
        "settings": {"good": text(tree), "good-run": text(checkpoints.lowdim_config())},
        "config": {"good": text(parsed.to_dict())},
        "safetensors": {
            "good": safetensors_bytes({"a": np.ones((2, 3)), "b": np.zeros(0), "c": np.ones(())}),
        },
        "plan": {"good": plan.getvalue()},
        "schedule-json": {"good": text([[0, 0], [1, 2]]), "good-dict": text({"pairs": [[0, 1]]})},
        "schedule-text": {"good": b"1, 0, 1, 0\n", "good-list": b"[1 0 0 0]"},
        "schedule-npy": {"good": npy(sources), "good-mask": npy(sources == 0)},
        "presets": {"good": text(presets)},
        "sweep": {
            "good": text(
                [
                    {"name": "a", "sampler": "ddim", "steps": 4, "sparsity": 0.5},
                    {"name": "b", "realtime": 10, "latency": 5.0, "plan": "1010", "noise": 1},
                ]
            )
        },
        "effects": {"good": effects.getvalue()},
        "results": {"good": text(header | {"episodes": [row, row | {"seed": 2}]})},
        "partial": {"good": b"\n".join([text(header), text(row), b"torn"])},
        "collection": {"good": COLLECTION},
        "episode": {"good": npz(obs=np.zeros((2, 1, 1), "f4"), actions=np.zeros((2, 2, 1), "f4"))},
        "part": {"good": recording.part_header(chunk.dtype) + chunk.tobytes() + b"torn"},
        "generated": {
            "good": npz(
                state=state,
                **demonstrations,
                seed=np.array([0, 1]),
                next_seed=np.array(2),
                settings=np.array(json.dumps(RUN)),
            )
        },
        "demonstrations": {
            "good": npz(obs=np.ones((3, 2)), **demonstrations),
            "good-state": npz(state=state, **demonstrations),
        },
        "lerobot": {"good": LEROBOT["config.json"]},
        "lerobot-processor": {"good": LEROBOT["policy_preprocessor.json"]},
        "lerobot-statistics": {"good": LEROBOT[STATISTICS]},
        "keypoints": {"good": text({"local_keypoints_block_frame_px": [[1, 2], [3, 4.5]]})},
    }


if __name__ == "__main__":
    for name, contents in files().items():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            (folder / file).write_bytes(content)
