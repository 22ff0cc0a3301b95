"""`tsad eval --settings`: many settings over the same seeds, resumable, one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.commands.common import (
    InterruptedRunError,
    UsageError,
    argument,
    check_simulator,
    load_policy,
    seed_range,
    table,
    use_preset,
)
from tsad.commands.errors import ERRORS_FILE, Errors, recorded_windows
from tsad.commands.eval import configure, evaluate, policy_source, seeds_of
from tsad.config import SAMPLERS, TIMESTEP_SPACINGS

if TYPE_CHECKING:
    from tsad import SparsePolicy

KEYS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "sampler": (str,),
    "steps": (int,),
    "spacing": (str,),
    "sparsity": (int, float),
    "planner": (str,),
    "plan": (str,),
    "precision": (str,),
    "n_action_steps": (int,),
    "noise": (int,),
    "preset": (str,),
}
CHOICES = {"sampler": SAMPLERS, "spacing": TIMESTEP_SPACINGS}
SUMMARY = "summary.json"
MOST_WINDOWS = 250  # of recorded observations, to compare actions on


def read_settings(path: str) -> list[dict[str, Any]]:
    """The rows of a settings file, checked; UsageError says which is wrong."""
    with argument("--settings"):
        try:
            rows = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not JSON ({error})") from error
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{path}: expected a list of objects, one per setting")
        names = set()
        for number, row in enumerate(rows):
            where = f"{path}: setting {number}"
            if not isinstance(row, dict) or not row.get("name"):
                raise ValueError(f'{where}: expected an object with a "name"')
            for key, value in row.items():
                if key not in KEYS:
                    raise ValueError(f"{where}: unknown key {key!r}; known are {', '.join(KEYS)}")
                if not isinstance(value, KEYS[key]) or isinstance(value, bool):
                    kind = KEYS[key][-1].__name__
                    raise ValueError(f"{where}: {key}: expected {kind}, got {value!r}")
                if value not in CHOICES.get(key, (value,)):
                    raise ValueError(
                        f"{where}: {key}: expected one of {', '.join(CHOICES[key])}, got {value!r}"
                    )
            name = row["name"]
            if name in names or not name.replace("-", "").replace(".", "").isalnum():
                raise ValueError(
                    f"{where}: name: expected letters, digits, dots and dashes, each name once, "
                    f"got {name!r}: it names a file"
                )
            if "plan" in row and ("sparsity" in row or "planner" in row):
                raise ValueError(f"{where}: a plan leaves nothing to sparsity or planner")
            names.add(name)
    return rows


def _arguments(args: argparse.Namespace, row: Mapping[str, Any], folder: Path) -> Any:
    """The arguments of one row: those of the command, but for what the row says."""
    row = {key: value for key, value in row.items() if key != "name"}
    if "plan" in row:  # relative to the settings file
        row["plan"] = str(folder / row["plan"])
    own = argparse.Namespace(**{**vars(args), **row, "resume": not args.overwrite})
    use_preset(own, policy_source(args), row.get("preset"))
    return own


def _passes(policy: SparsePolicy) -> float | None:
    """Dense passes of a chunk; None where the policy has not run and its pruner decides."""
    if policy.sparsity is None:
        return None
    return float(policy.num_inference_steps * (1 - policy.sparsity))


def _row(document: Mapping[str, Any], policy: SparsePolicy, error: float | None) -> dict[str, Any]:
    summary, settings = document["summary"], document["settings"]
    return {
        "settings": settings,
        "passes": _passes(policy),
        "score": summary["score"],
        "success": summary["success"],
        "steps_to_success": summary["steps_to_success"],
        "action_rms": error,
    }


def _table(rows: Mapping[str, Any], compared: Mapping[str, Any]) -> str:
    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    lines = [["setting", "passes", "score", "success", "action rms", "difference", "95 % together"]]
    for name, row in rows.items():
        other = compared["rows"].get(name)
        interval = "" if other is None else "{:+.3f} to {:+.3f}".format(*other["simultaneous"])
        lines.append(
            [
                name,
                number(row["passes"], 2),
                number(row["score"]["mean"], 3),
                number(row["success"]["mean"], 3),
                number(row["action_rms"], 4),
                "" if other is None else f"{other['mean_difference']:+.3f}",
                interval,
            ]
        )
    return table(lines)


def _check(args: argparse.Namespace) -> Path:

    check_simulator(args.simulator)
    if args.out is None:
        raise UsageError("argument --settings: needs --out DIR, a file per setting goes there")
    if args.seeds < 2:
        raise UsageError("argument --seeds: expected 2 or more with --settings: rows are compared")
    for name in ("plan", "planner", "preset", "sparsity", "baseline"):
        if getattr(args, name) is not None:
            raise UsageError(f"argument --{name}: not together with --settings; put it in the file")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise UsageError(f"argument --out: {args.out!r} is a file, expected a folder")
    return out


def run(args: argparse.Namespace) -> int:
    """Play every setting's missing seeds; print and write the comparison."""
    from tsad import sim
    from tsad.checkpoint import write_atomically
    from tsad.sim.results import compare_all, read_results

    out = _check(args)
    settings = read_settings(args.settings)
    windows = None
    if args.observations is not None:
        windows = recorded_windows(args.observations, MOST_WINDOWS)
    source = policy_source(args)
    folder = Path(args.settings).resolve().parent
    rows, episodes = {}, {}
    for row in settings:  # a row that can't be loaded fails before hours are spent on others
        own = _arguments(args, row, folder)
        with argument(f"--settings: {row['name']}"):
            policy = load_policy(source, own, name=f"--settings: {row['name']}", lanes=1)
            sim.check_executed(policy, own.n_action_steps)
            configure(policy, own)
    out.mkdir(parents=True, exist_ok=True)
    errors = None
    if windows is not None:
        baseline = _arguments(args, settings[0], folder)
        file = out / ERRORS_FILE
        errors = Errors(source, windows, draws=1, reference=baseline, file=file)
    for row in settings:
        own, name = _arguments(args, row, folder), row["name"]
        path = out / f"{name}.json"
        try:
            document, policy = evaluate(own, path)
        except InterruptedRunError as stop:
            raise InterruptedRunError(
                f"setting {name}: {str(stop).partition(';')[0]}; the same command goes on"
            ) from None
        error = None if errors is None else errors.of(own, name)["action_rms"]
        rows[name] = _row(document, policy, error)
        wanted = set(seeds_of(args))
        episodes[name] = [e for e in read_results(path)[1] if e.seed in wanted]
    seeds = seeds_of(args)
    compared = compare_all(episodes, settings[0]["name"]) if len(settings) > 1 else None
    summary = {
        "format": "tsad-sweep",
        "format_version": 1,
        "seeds": [seeds[0], seeds[-1]],
        "rows": rows,
        "compared": compared,
    }
    text = json.dumps(summary, indent=1)
    write_atomically(out / SUMMARY, (text + "\n").encode())
    if args.json:
        print(text)
    else:
        print(f"{args.simulator}, {seed_range([seeds[0], seeds[-1]])}, policy {source}")
        print(_table(rows, compared or {"rows": {}}))
        print(f"written to {out}")
    return 0
