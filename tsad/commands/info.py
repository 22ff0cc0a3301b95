"""`tsad info`: this build, this machine, and what is in a policy."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from pathlib import Path
from typing import Any

from tsad.commands.common import (
    Formatter,
    add_policy_options,
    files_sha256,
    load_policy,
    planner_name,
    timed_on,
)
from tsad.config import FLOWS
from tsad.evaluation.timing import cpu_name
from tsad.families import as_network, describe

DESCRIPTION = "Say what this build and machine can do, and what is in a policy."

EPILOG = """\
examples:
  tsad info                     the build and the machine
  tsad info pusht               the bundled policy
  tsad info runs/mine --json"""

CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd")


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "info",
        help="this build, this machine, a policy",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("policy", metavar="SRC", nargs="?", help="bundled name, folder, checkpoint")
    add_policy_options(parser)
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.set_defaults(run=run)


def _cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that the system reports (Linux; elsewhere none is known)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    words: set[str] = set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            words.update(line.partition(":")[2].split())
    return [feature for feature in CPU_FEATURES if feature in words]


def build_facts() -> dict[str, Any]:
    """This build and this machine."""
    import numpy

    import tsad
    from tsad import _core, device
    from tsad.load import usable_cpus
    from tsad.presets import home

    return {
        "tsad": tsad.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "backends": list(_core.backends()),
        "cuda": device.cuda().words(),
        "cublas": device.cublas().words(),
        "extension": str(_core.__file__),
        "cpu": cpu_name(),
        "cpu_features": _cpu_features(),
        "cores": usable_cpus(),
        "presets of yours": str(home() / "presets"),
    }


def policy_facts(source: str, args: argparse.Namespace) -> dict[str, Any]:
    """What is in a policy; the checks of loading it are made."""
    policy = load_policy(source, args, name="SRC", lanes=1)
    presets, problems = _presets(source)
    config = policy.config
    types: dict[str, dict[str, int]] = {}
    for name, cost in zip(policy.block_types, policy.block_costs.tolist(), strict=True):
        entry = types.setdefault(name, {"blocks": 0, "mac": 0})
        entry["blocks"] += 1
        entry["mac"] += cost
    cost = int(policy.block_costs.sum())
    return {
        "source": source,
        "files_sha256": files_sha256(source),
        "network": config["network"],
        "vision": config.get("vision"),
        "vision_precision": getattr(policy, "vision_precision", None),
        "sampler": {**config["scheduler"], "num_inference_steps": policy.num_inference_steps},
        "planner": planner_name(policy),
        "pruner": config.get("pruner") if policy.has_pruner else None,
        "max_sparsity": policy.max_sparsity,
        "block_types": types,
        "mac_per_step": cost,
        "mac_per_dense_chunk": cost * policy.num_inference_steps,
        "backend": policy.backend,
        "threads": policy.threads,
        "device": str(policy.device),
        "precision": policy.precision,
        "weight_bytes": policy.stats["weight_bytes"],
        "bytes_per_lane": policy.stats["bytes"],
        "error_bound": policy.stats["error_bound"],
        "provenance": config.get("provenance", {}),
        "presets": presets,
        "preset_problems": problems,
    }


def _presets(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The presets of a policy in all their places, and what is wrong with the files.

    Of each, "file", "words", "usable" and "hidden" are said, too: an earlier place has its name.
    """
    from tsad.load import policy_folder
    from tsad.presets import PRESETS_FILE, known_presets, places, read_presets, stale

    folder = policy_folder(source)
    if folder is None:
        return [], []
    first, wrong = known_presets(folder)
    rows = []
    for place in places(folder):
        with contextlib.suppress(ValueError, OSError):  # said by `wrong`
            others = stale(folder, place)
            rows += [
                {
                    **preset.to_dict(),
                    "file": str(place / PRESETS_FILE),
                    "words": preset.words(),
                    "usable": preset.name not in others,
                    "hidden": first[preset.name] != preset,
                }
                for preset in read_presets(place).values()
            ]
    return rows, list(map(str, wrong))


def _preset_lines(presets: list[dict[str, Any]]) -> list[str]:
    """A line per preset, by file: what it is and what was measured, or why it isn't used."""
    files: dict[str, dict[str, str]] = {}
    for preset in presets:
        text, measured = preset["words"], preset.get("measured", {})
        if preset["hidden"]:
            text += "; not used, there is another of this name above"
        elif not preset["usable"]:
            text += f"; refused: made for other weights, {preset['model_sha256'][:8]}"
        else:
            time, other = timed_on(measured), measured.get("mean_difference")
            text += f"; {time}" if time else ""
            if isinstance(other, int | float):
                of = f" {measured['dense']}" if isinstance(measured.get("dense"), str) else ""
                text += f"; score {other:+.3f} to dense{of}"
            known = measured.get("success_difference")
            success = known.get("mean_difference") if isinstance(known, dict) else None
            if isinstance(success, int | float):
                text += f", success {success:+.3f}"
            led = measured.get("to_dense_with_lead")  # of a preset with a lead
            beside = led.get("mean_difference") if isinstance(led, dict) else None
            known = preset.get("lead") and isinstance(beside, int | float)
            text += f", {beside:+.3f} to dense with its best lead" if known else ""
        files.setdefault(preset["file"], {})[preset["name"]] = text
    return [line for file, rows in files.items() for line in _lines(f"presets in {file}", rows)]


def _lines(title: str, rows: dict[str, Any]) -> list[str]:
    width = max(map(len, rows))
    return [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""]


def _steps(sampler: dict[str, Any]) -> str:
    if sampler["type"] in FLOWS:
        return f"{sampler['num_inference_steps']} steps"
    of = f"{sampler['num_inference_steps']} of {sampler['num_train_timesteps']} steps"
    return f"{of}, {sampler['beta_schedule']}"


def _camera_rows(vision: dict[str, Any] | None, precision: str | None) -> dict[str, str]:
    """A row for each camera."""
    rows: dict[str, str] = {}
    if vision is None:
        return rows
    for camera in vision["cameras"]:
        encoder = vision["encoders"][camera["encoder"]]
        words = [f"{camera['width']} x {camera['height']}"]
        for key in ("resize", "crop"):
            words += [f"{key} {camera[key][1]} x {camera[key][0]}"] if key in camera else []
        norm = "GroupNorm" if encoder["norm"] == "group" else "BatchNorm, folded"
        words.append(f"encoder {camera['encoder']}: {encoder['type']}, {norm}, {precision}")
        rows[f"  {camera['name']}"] = f"{', '.join(words)}, {encoder['feature_dim']} numbers"
    return rows


def _pruner_row(facts: dict[str, Any]) -> dict[str, str]:
    """A row, where there is a pruner."""
    pruner = facts["pruner"]
    if pruner is None:
        return {}
    asked = "decides unless another planner is set"
    if facts["planner"] != "pruner":
        asked = "waits to be asked: planner='pruner' (--planner pruner) runs it"
    return {"pruner": f"{pruner['type']}, {asked}"}


def _policy_rows(facts: dict[str, Any]) -> dict[str, Any]:
    net, sampler = facts["network"], facts["sampler"]
    shares = facts["mac_per_step"] or 1
    rows = {
        **{f"sha256 {name}": value for name, value in facts["files_sha256"].items()},
        "network": f"{net['type']}, {describe(as_network(net))}",
        "observation": f"{net['n_obs_steps']} steps x {net['obs_dim']}",
        **_camera_rows(facts["vision"], facts["vision_precision"]),
        "action": f"{net['n_action_steps']} of {net['horizon']} steps x {net['action_dim']}",
        "sampler": f"{sampler['type']}, {_steps(sampler)}, predicts {sampler['prediction_type']}",
        "planner": f"{facts['planner']}, up to sparsity {facts['max_sparsity']:.4g}",
        **_pruner_row(facts),
        "cost": f"{facts['mac_per_step'] / 1e6:.2f} M MAC a step, "
        f"{facts['mac_per_dense_chunk'] / 1e9:.3f} G a dense chunk",
    }
    for name, entry in facts["block_types"].items():
        rows[f"  {name}"] = f"{entry['blocks']} blocks, {entry['mac'] / shares:.1%} of the cost"
    rows["runs on"] = (
        f"{facts['device']}, {facts['backend']}, {facts['precision']}, {facts['threads']} threads"
    )
    rows["memory"] = (
        f"{facts['weight_bytes'] / 1e6:.1f} MB of weights, shared; "
        f"{facts['bytes_per_lane'] / 1e6:.1f} MB for one lane"
    )
    bound = facts["error_bound"]
    said = (
        "not known" if bound is None else f"{bound:.2g} of a normalised action, dense, to float64"
    )
    rows["error bound"] = said + ("" if facts["precision"] == "float32" else ", measured")
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    facts: dict[str, Any] = {"build": build_facts()}
    if args.policy is not None:
        facts["policy"] = policy_facts(args.policy, args)
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    build = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in facts["build"].items()
    }
    lines = _lines("build and machine", build)
    if "policy" in facts:
        lines += _lines(f"policy {args.policy}", _policy_rows(facts["policy"]))
        lines += _preset_lines(facts["policy"]["presets"])
        for problem in facts["policy"]["preset_problems"]:
            lines += ["presets that can't be read", f"  {problem}", ""]
    print("\n".join(lines).rstrip())
    return 0
