"""What `tsad tune` found, or a sweep of `tsad eval`, as a table for a page.

    tsad tune pusht --settings bench/frontier/settings.json --out frontier \
        --seeds 500 --first-seed 100000 --observations others --draws 64
    python bench/frontier.py frontier/tune.json
    tsad eval pusht --settings bench/frontier/headline.json --out headline --seeds 1500
    python bench/frontier.py headline/summary.json

    python bench/frontier.py bench/results/2026-11-25-amd-epyc-25-17-frontier.json \
        --plot bench/results/2026-11-25-amd-epyc-25-17-frontier.png

`bench/frontier/README.md` says how the plans among the settings were made. `--only` names rows.
`--plot` draws the picture of `tsad tune` anew, with the presets that the policy has today.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tsad.commands.common import difference, span
from tsad.files import write_json
from tsad.load import policy_folder
from tsad.plot.frontier import FAMILIES, family, save_frontier
from tsad.presets import read_presets
from tsad.sim.frontier import busy
from tsad.sim.results import compare, read_results


def line(document: dict[str, Any], name: str) -> str:
    """One row of the table."""
    row, setting = document["rows"][name], document["settings"][name]
    kind = "dense" if name == document["baseline"] else FAMILIES[family(setting)][2]
    if setting.get("precision") == "int16":
        kind += ", 16 bits"
    if setting.get("lead") or setting.get("smoothing"):
        kind += ", lead"
    label = f"**{name}**" if name in document["frontier"] else name
    cells = [label, kind, f"{row['milliseconds']:.2f}", str(row["n_action_steps"])]
    cells += [f"{row['passes']:.2f}"]
    cells += [f"{row['cell_sparsity']:.0%}", f"{row['score']['mean']:.3f}"]
    cells += [f"{row['success']['mean']:.3f}"]
    cells += difference(row) if "mean_difference" in row else ["", ""]
    if document.get("dense_with_lead") is not None:
        beside = row.get("to_dense_with_lead")
        cells += ["", ""] if beside is None else difference(beside)
    if document["drawn"]:
        cells += [f"{row['distance']:.3f}", f"{row['spread']:.2f}"]
    return "| " + " | ".join(cells) + " |"


def page(document: dict[str, Any], only: list[str] | None = None) -> str:
    """The table, the slowest for as many actions first; names of the frontier in bold."""
    rows = document["rows"]
    names = [name for name in rows if only is None or name in only]
    names.sort(key=lambda name: -busy(rows, name))
    head = ["setting", "what", "ms", "actions", "passes", "cells reused", "score", "success"]
    head += ["difference", "95 %, all together"]
    led = document.get("dense_with_lead") is not None
    head += ["to dense with lead", "95 %, all together"] * led
    head += ["distance", "spread"] * document["drawn"]
    rule = "| --- | --- |" + " ---: |" * (len(head) - 2)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *(line(document, n) for n in names)])


COMPARED = {
    "compared": "difference",
    "compared_with_lead": "to dense with lead",
    "compared_success": "difference of success",
}


def differences(found: dict[str, Any] | None) -> list[str]:
    """Cells of a row's difference to another, its interval alone (normal) and of all together."""
    if found is None:
        return ["", "", ""]
    mean, away = found["mean_difference"], 1.959964 * found["standard_error"]
    alone = [mean - away, mean + away] if found["simultaneous"] else None
    return [f"{mean:+.3f}", span(alone), span(found["simultaneous"])]


def sweep(document: dict[str, Any], *, success: bool = False) -> str:
    """The table of a sweep: differences to its first row, and to that with a lead; of success."""
    head = ["setting", "passes", "score", "success"]
    compared = []
    for key, what in COMPARED.items():
        if document.get(key) is not None and (success or key != "compared_success"):
            compared.append(document[key])
            head += [what, "95 %", "95 %, all together"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for name, row in document["rows"].items():
        digits = 1 if "most_passes" in row else 0  # an average, where a rule decides
        cells = [name, f"{row['passes']:.{digits}f}", f"{row['score']['mean']:.3f}"]
        cells += [f"{row['success']['mean']:.3f}"]
        for found in compared:
            cells += differences(found["rows"].get(name))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_pairs(document: dict[str, Any], file: Path, pairs: list[list[str]]) -> None:
    """Two rows compared, from the files of their episodes: beside a sweep, or ../OTHER/ROW."""
    for one, other in pairs:
        episodes, baseline = (read_results(file.parent / f"{x}.json")[1] for x in (one, other))
        found = compare(episodes, baseline)
        document.setdefault("pairs", {})[f"{one} to {other}"] = found
        for what in ("score", "success"):
            mean, (low, high) = found[what]["mean_difference"], found[what]["interval95"]
            print(f"{what} of {one} to {other}: {mean:+.3f} ({low:+.3f} to {high:+.3f})")
    write_json(file, document)


def with_presets(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the presets in the policy's folder, by the settings they were made of."""
    folder = policy_folder(document["policy"])
    presets = {} if folder is None else read_presets(folder)
    return document | {"presets": {name: p.measured["setting"] for name, p in presets.items()}}


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="tune.json or summary.json")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows")
    parser.add_argument("--success", action="store_true", help="of a sweep: compare it as well")
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        metavar="ROW",
        help="of a sweep: compare the first row with the second, which may be of another "
        "(../OTHER/ROW), and write it into the file",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture instead")
    args = parser.parse_args(argv)
    document = json.loads(args.file.read_text())
    if document["format"] == "tsad-sweep":
        if args.only:
            parser.error("--only: of a tune.json alone; a sweep's table is short")
        if args.pair:
            add_pairs(document, args.file, args.pair)
        print(sweep(document, success=args.success))
        return 0
    if args.plot is not None:
        save_frontier(with_presets(document), args.plot)
        return 0
    unknown = set(args.only or ()) - set(document["rows"])
    if unknown:
        parser.error(f"--only: no such rows: {', '.join(sorted(unknown))}")
    print(page(document, args.only))
    for error, found in document["rank_correlation"].items():
        print(f"\nrank correlation of {error} and loss: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
