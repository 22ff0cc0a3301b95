"""A preset of a row that was played, from the report of a sweep (`tsad eval --settings`).

    tsad eval pusht --settings bench/frontier/lead.json --out lead --seeds 500 --first-seed 21060
    python bench/preset.py lead/summary.json --settings bench/frontier/lead.json \\
        --row ddim-16-trailing-warm-8-row-0-int16-smooth-lead-0.25 --name one_pass --out presets

`--out` is a folder: ``presets.json`` there gets the preset, others stay (for a policy that comes
along: begin with a copy of its presets, and copy them back); its plan and what is fitted lie beside
it. What was measured are the row's score and success, its differences to dense
and to dense with its best lead (which is what a row with a lead is judged by: it is not "lossless"
by the other), and with ``--times`` the milliseconds of a `tsad bench --settings` or `tsad tune`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tsad.evaluation.loading import setting_of
from tsad.evaluation.sweep import read_settings
from tsad.load import load, policy_folder
from tsad.presets import Preset, model_sha256, read_presets, save_presets


def measured(summary: dict[str, Any], row: str) -> dict[str, Any]:
    """What a report says of a row."""
    played = summary["rows"][row]
    found = {"setting": row, "seeds": summary["seeds"]}
    found |= {name: played[name] for name in ("passes", "score", "success")}
    found |= {"dense": summary["compared"]["baseline"]} | summary["compared"]["rows"].get(row, {})
    beside = summary.get("compared_with_lead")
    if beside is not None:
        found["dense_with_lead"] = beside["baseline"]
        found["to_dense_with_lead"] = beside["rows"].get(row)
    return {key: value for key, value in found.items() if value is not None}


def timed(path: Path, row: str) -> dict[str, Any]:
    """The milliseconds of a row, and where they were taken."""
    document = json.loads(path.read_text())
    if "results" in document:  # of tsad bench
        (found,) = (result for result in document["results"] if result["name"] == row)
        milliseconds = found["call_ms"]["p50"]
    else:
        milliseconds = document["rows"][row]["milliseconds"]
    facts = {name: document[name] for name in ("cpu", "threads") if name in document}
    return {**facts, "milliseconds": milliseconds}


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="summary.json of the sweep")
    parser.add_argument("--settings", required=True, help="the file that was played")
    parser.add_argument("--row", required=True, help="name of a row")
    parser.add_argument("--name", required=True, help="of the preset")
    parser.add_argument("--policy", default="pusht", help="default: pusht")
    parser.add_argument("--times", type=Path, help="result of tsad bench or tsad tune")
    parser.add_argument("--out", type=Path, required=True, help="folder of presets")
    args = parser.parse_args()

    (words,) = (row for row in read_settings(args.settings) if row["name"] == args.row)
    folder = policy_folder(args.policy)
    assert folder is not None, f"{args.policy} is a checkpoint; presets are of folders"
    for key in words.keys() & {"plan", "fitted"}:
        beside = Path(args.settings).parent / words[key]
        words[key] = str(beside) if beside.exists() else words[key]
    setting = setting_of({**words, "preset": words.get("preset")}, args.policy)
    policy = load(args.policy, **setting.options())
    setting.apply(policy)
    scheduler = policy.config["scheduler"]
    facts = measured(json.loads(args.report.read_text()), args.row)
    facts |= {} if args.times is None else timed(args.times, args.row)
    values = vars(setting) | {"plan": None, "fitted": setting.load_fitted()}
    values |= {
        "sampler": scheduler["type"],
        "num_inference_steps": scheduler["num_inference_steps"],
        "timestep_spacing": scheduler["timestep_spacing"],
        "precision": policy.precision,
    }
    preset = Preset(args.name, model_sha256(folder), **values, measured=facts)
    save_presets(args.out, [(preset, setting.load_plan(policy))])
    print(f"{args.out}: {args.name}, {read_presets(args.out)[args.name].words()}")
    for key, value in facts.items():
        print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
