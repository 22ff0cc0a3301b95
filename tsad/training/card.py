"""The model card of a trained policy: what made it, how well it fits, what it can't do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tsad.checkpoint import MODEL_FILE
from tsad.config import PolicyConfig
from tsad.families import describe

CARD_FILE = "README.md"

_SETTINGS = {
    "batch": "batch",
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "decay": "share of the training in which the rate falls to 0",
    "ema": "largest decay of the averaged weights",
    "snr_power": "loss weight: SNR to the power of minus",
    "dropout": "dropout",
    "val_episodes": "episodes held out",
    "seed": "seed",
    "init": "started from",
    "warm_start": "fine-tuned for a warm start, steps of 16 from the end",
}


def model_card(name: str, config: PolicyConfig, *, held_out: bool) -> str:
    """README.md of a folder of ``tsad train-policy``; facts are in ``config.provenance``."""
    facts, network = config.provenance, config.network
    training: Mapping[str, Any] = facts["training"]
    probe = "held-out episodes" if held_out else "training windows"
    lines = [
        f"# {name}",
        "",
        "A policy for tsad, made by `tsad train-policy`. Use it with `tsad.load(folder)`.",
        "",
        *_table(
            [
                ("file", "content"),
                ("`config.json`", "network, sampler, normaliser, cost table, provenance"),
                (f"`{MODEL_FILE}`", "averaged weights, float16"),
                (f"SHA-256 of `{MODEL_FILE}`", f"`{facts['sha256'][MODEL_FILE]}`"),
            ]
        ),
        "",
        "## Inputs and outputs",
        "",
        *_table(
            [
                ("", ""),
                ("observation", f"{network.n_obs_steps} steps of {network.obs_dim} numbers"),
                (
                    "action",
                    f"{network.n_action_steps} executed of {network.horizon} predicted, "
                    f"{network.action_dim} numbers each",
                ),
                ("network", describe(network)),
                (
                    "sampler",
                    f"{config.scheduler.type}, {config.scheduler.num_inference_steps} steps, "
                    f"{config.scheduler.prediction_type} prediction",
                ),
            ]
        ),
        "",
        "## Data",
        "",
        *_data(facts),
        "",
        "## Training",
        "",
        f"{training['step']:,} steps ({training['epochs']:g} epochs) in "
        f"{training['seconds'] / 60:.0f} minutes on {training['hardware']}, "
        f"PyTorch {training['torch']}.",
        "",
        *_table(
            [("", ""), *((v, str(training[k])) for k, v in _SETTINGS.items() if training.get(k))]
        ),
        "",
        f"Loss and root-mean-square error of the clean actions (units of the action) on {probe}, "
        "by noise level, fifths of the time steps from clean to noisy:",
        "",
        *_curve(facts["curve"]),
        "",
        *_warm(training, facts["curve"]),
        "## What it can't do",
        "",
        "- The error above isn't success in closed loop, which isn't measured here (`tsad eval`).",
        "- Outside the situations that the data show, what it does is undefined.",
        "",
    ]
    return "\n".join(lines)


def fitted_card(name: str, config: PolicyConfig) -> str:
    """README.md of a folder of ``tsad fit --weights``; facts are in ``config.provenance``."""
    fitted: Mapping[str, Any] = config.provenance["fitted"]
    setting = {k: v for k, v in fitted["setting"].items() if v is not None}
    words = ", ".join(f"{key}={value!r}" for key, value in setting.items())
    before, after = fitted["mean_rms"]
    probe = "held out" if fitted["held_out"] else "of those that were fitted on"
    return "\n".join(
        [
            f"# {name}",
            "",
            "A policy for tsad, made by `tsad fit --weights`: weights of another, SHA-256 "
            f"`{fitted['from']}`, fitted to end where many steps of that policy end, run by "
            f"`tsad.load(folder, {words})` as `settings.json` has it.",
            "",
            *_table(
                [
                    ("", ""),
                    ("network", describe(config.network)),
                    (f"SHA-256 of `{MODEL_FILE}`", f"`{config.provenance['sha256'][MODEL_FILE]}`"),
                    ("many steps", str(fitted["against"])),
                    ("chunks with their noise", f"{fitted['chunks'][0]}"),
                    (
                        f"error of executed actions, {fitted['chunks'][1]} chunks {probe}, of "
                        "their normalised range -1 to 1",
                        f"{before:.4f} before, {after:.4f} after",
                    ),
                    ("step", f"{fitted['step']:,}"),
                    ("fitted in", f"{fitted['seconds'] / 60:.0f} minutes on {fitted['hardware']}"),
                ]
            ),
            "",
            "## What it can't do",
            "",
            "- What is known of the policy that it was made from is not known of this one, and by",
            "  any other setting, many steps included, it may do something else.",
            "- The error above isn't success in closed loop, which isn't measured here "
            "(`tsad eval`).",
            "",
        ]
    )


def _warm(training: Mapping[str, Any], curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a fine-tune on warm starts is, if it is one."""
    if not training.get("warm_start"):
        return []
    first, last = curve[0], curve[-1]
    return [
        f"{training['warm_share']:.0%} of the windows began with its own chunk before, as chunks "
        f"of `warm_start={training['warm_start']}` of 16 steps of DDIM do (trailing spacing); one "
        f"pass from there erred by {first['warm_error']:.3g} at step {first['step']}, by "
        f"{last['warm_error']:.3g} at step {last['step']}. The weights are others than those it "
        "started from, so what is known of that policy is not known of this one.",
        "",
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _data(facts: Mapping[str, Any]) -> list[str]:
    head = ("file", "episodes", "steps", "sha256")
    rows = [
        (part["file"], f"{part['episodes']:,}", f"{part['steps']:,}", f"`{part['sha256']}`")
        for part in facts["data"]
    ]
    licence = facts["licence"] or "not stated (`--licence` states it)"
    return [*_table([head, *rows]), "", f"Licence of the data: {licence}."]


def _curve(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [("step", "minutes", "training loss", "loss", "error, clean to noisy")]
    for point in curve:
        errors = ", ".join(f"{error:.3g}" for error in point["x0_error"])
        rows.append(
            (
                f"{point['step']:,}",
                f"{point['seconds'] / 60:.1f}",
                f"{point['train_loss']:.4g}",
                f"{point['val_loss']:.4g}",
                errors,
            )
        )
    return _table(rows)
