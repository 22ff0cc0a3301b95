"""`tsad certify`: what tsad does to a policy on this machine, a page for its model card."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad.commands.common import (
    NOT_ASKED,
    OBSERVATIONS,
    OBSERVATIONS_HELP,
    Formatter,
    UsageError,
    add_overwrite,
    add_workers,
    argument,
    check_result,
    check_simulator,
    check_source,
    experiment_of,
    files_sha256,
    natural,
    number,
    positive_int,
    span,
)
from tsad.evaluation.errors import SINGLE
from tsad.evaluation.progress import Progress
from tsad.evaluation.sweep import CHUNKS_PER_ROUND, Sweep, times
from tsad.evaluation.timing import cpu_name, sampler_name
from tsad.files import make_folder, output_folder, write_json, write_together

if TYPE_CHECKING:
    from tsad import SparsePolicy

FORMAT, FORMAT_VERSION = "tsad-certificate", 1
RESULT, PAGE = "certificate.json", "certificate.md"
EXIT_DIFFERS = 1
DENSE, THEIRS = "dense", "LeRobot"
CHUNKS = 8  # of parity: NumPy takes seconds for one, minutes of a large network

DESCRIPTION = f"""\
Measures what tsad does to a policy on this machine: certificate.md, a page for its model card, and
certificate.json with all numbers.

parity  how far dense float32 actions are from the policy's own, same noise: from LeRobot's, in
        PyTorch, if LeRobot is installed and it is a diffusion policy of its own, else from the
        float64 reference in NumPy. On recorded observations (--data), or made up within the range
        of the training data. If they are too far, the exit code is 1.
times   of a chunk: dense float32, dense int8 and the policy's presets, in turns; LeRobot, too.
losses  of int8 and the presets, compared with dense: of score with --simulator, over the same
        seeds; of --data as distributions of actions (energy distance, relative to the dense
        policy's own spread). Without either there are none.

Episodes and distances are kept in --out: run the same command again to go on where it was
interrupted, or to take parity and times anew on a quiet machine.

{OBSERVATIONS}"""

EPILOG = """\
examples:
  tsad certify mine/ --out certificate                                   parity and times
  tsad certify mine/ --out certificate --data recorded                   losses on recordings
  tsad certify pusht --out certificate --simulator pusht --seeds 500     losses in closed loop"""


def add_parser(subparsers: Any) -> None:
    """Add the command to `subparsers`."""
    parser = subparsers.add_parser(
        "certify",
        help="a page for a policy's model card: parity, times, losses",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "policy", metavar="SRC", help="bundled name, tsad or LeRobot folder, checkpoint"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the results")
    parser.add_argument(
        "--data", "--observations", dest="observations", metavar="DATA", help=OBSERVATIONS_HELP
    )
    parser.add_argument(
        "--simulator",
        dest="own_simulator",
        metavar="NAME",
        help="pusht, or one of your own, MODULE:FACTORY (docs/own_robot.md)",
    )
    parser.add_argument(
        "--chunks", type=positive_int, metavar="N", help=f"of parity (default: at most {CHUNKS})"
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=100, metavar="N", help="episodes (default: 100)"
    )
    parser.add_argument(
        "--first-seed", type=natural, metavar="S", help="default: the simulator's test seeds"
    )
    parser.add_argument(
        "--lanes", type=positive_int, default=8, metavar="L", help="environments (default: 8)"
    )
    parser.add_argument(
        "--draws",
        type=positive_int,
        default=16,
        metavar="M",
        help="of noise per recorded observation, 2 or more (default: 16)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=5, metavar="N", help="of times (default: 5)"
    )
    add_overwrite(parser, "results of another policy in --out")
    add_workers(parser)
    parser.add_argument("--threads", type=positive_int, metavar="T", help="the engine's choice")
    parser.add_argument("--device", default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    # what a row may say, and this command leaves to the rows
    parser.set_defaults(run=run, simulator=None, baseline=None, **NOT_ASKED)


def _check(args: argparse.Namespace) -> Path:
    if args.own_simulator is not None:
        check_simulator(args)
        if args.seeds < 2:
            raise UsageError("argument --seeds: got 1, expected 2 or more: settings are compared")
    if args.draws < 2:
        raise UsageError("argument --draws: got 1, expected 2 or more: distributions are compared")
    with argument("--out"):
        return output_folder(args.out)


def _rows(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Dense, int8, the presets that belong to the weights; and what should be said."""
    from tsad.load import policy_folder
    from tsad.presets import known_presets, model_sha256

    rows: list[dict[str, Any]] = [{"name": DENSE}, {"name": "int8", "precision": "int8"}]
    folder = policy_folder(args.policy)
    if folder is None:
        return rows, ["a checkpoint has no presets: tsad convert makes a folder, which can have"]
    with argument("SRC"):
        presets, wrong = known_presets(folder)
        own = model_sha256(folder)
    usable = [name for name, preset in presets.items() if preset.model_sha256 == own]
    rows += [{"name": f"preset-{name}", "preset": name} for name in usable]
    notes = [str(error) for error in wrong]
    notes += [f"the preset {n} was made for other weights" for n in presets if n not in usable]
    return rows, notes if usable else [*notes, "it has no presets yet: tsad tune --save makes some"]


# ---- parity


class _Reference:
    """The policy in plain NumPy, float64."""

    name = "tsad's reference in NumPy (float64)"

    def __init__(self, source: str, config: dict[str, Any]) -> None:
        from tsad.load import read_policy
        from tsad.reference import ReferencePolicy

        self._policy = ReferencePolicy(config, read_policy(source)[1])

    def chunk(self, policy: SparsePolicy, obs: NDArray[np.float32], seed: int) -> tuple[Any, Any]:
        """Noise, and the actions with it."""
        from tsad.sim import offline

        drawn = offline.noise(policy, seed)[:, None]
        return drawn, self._policy(obs, drawn, np.zeros((len(drawn), policy.n_blocks), np.uint8))


def _theirs(source: str, policy: SparsePolicy, notes: list[str]) -> Any:
    """LeRobot's policy, if it can be had; None for any other. ``notes`` gets why it fails."""
    from tsad.checkpoint import folder_kind
    from tsad.families import unet1d
    from tsad.lerobot import parity
    from tsad.load import policy_folder

    folder = policy_folder(source)
    if folder is None or folder_kind(folder) != "lerobot" or not parity.available():
        return None
    if policy.config["network"]["type"] != unet1d.TYPE:
        return None  # its encoder is fetched from the Hub
    if "vision" in policy.config:
        return None  # what is compared are actions of features
    try:
        return parity.LerobotPolicy(folder, policy.config["features"])
    except Exception as error:  # LeRobot's own: an old one does not know a new one's fields
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        words = "does not load it, so parity is with the reference"
        notes.append(f"{parity.name()} {words}: {said}")
        return None


def _parity(
    policy: SparsePolicy, reference: Any, obs: NDArray[np.float32], recorded: bool
) -> dict[str, Any]:
    """How far the actions of a dense policy are from the reference's, same noise."""
    from tsad.precision import FLOAT32_BOUND

    scale = np.abs(np.array(policy.config["normalizer"]["action"]["scale"], np.float64))
    raw = []
    with Progress(len(obs), "parity", unit="chunks") as progress:
        for i, window in enumerate(obs):
            noise, expected = reference.chunk(policy, window[None], i)
            policy.reset()
            found = policy(window[None], noise=np.ascontiguousarray(noise, np.float32))
            raw.append(np.abs(found - expected)[0])
            progress.update()
    errors = np.array(raw, np.float64)
    # two float32 computations may be off, each by as much
    bound = FLOAT32_BOUND * (1 if isinstance(reference, _Reference) else 2)
    worst = float((errors * scale).max())
    return {
        "reference": reference.name,
        "observations": len(obs),
        "recorded": recorded,
        "worst": worst,
        "mean": float((errors * scale).mean()),
        "worst_raw": errors.max(axis=(0, 1)).tolist(),
        "bound": bound,
        "holds": worst <= bound,
    }


# ---- losses


def _losses(sweep: Sweep, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By row: score and success, paired differences, distances; {} where nothing tells them."""
    from tsad.sim.results import compare_all

    if args.simulator is None:
        if sweep.windows is None:
            return {}
        return {name: sweep.error(name) for name in sweep.trials()}
    sweep.play()
    rows = {name: dict(row) for name, row in sweep.rows.items()}
    for name, facts in compare_all(sweep.episodes, DENSE)["rows"].items():
        rows[name] |= facts
    return rows


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    import tsad
    from tsad.precision import affordable_chunks, made_up_observations

    out = _check(args)
    check_source(args, "SRC")
    source = args.policy
    run_of = {"format": FORMAT, "files_sha256": files_sha256(source)}
    with argument("--out"):
        check_result(out, (RESULT, PAGE), run_of, overwrite=args.overwrite)
    rows, notes = _rows(args)
    experiment = experiment_of(args, resume=args.resume)
    sweep = Sweep(experiment, rows, Path(), out, words=vars(args))
    sweep.measure(args.observations, args.draws, "--data")
    policy = sweep.load(DENSE)
    n = args.chunks or min(CHUNKS, affordable_chunks(policy))
    recorded = sweep.windows is not None
    obs = made_up_observations(policy, n) if sweep.windows is None else sweep.windows[:n, -1]
    theirs = _theirs(source, policy, notes)
    found = _parity(policy, theirs or _Reference(source, policy.config), obs, recorded)
    losses = _losses(sweep, args)
    notes += [f"no losses of {name}: its {SINGLE}" for name in sweep.unmeasured()]
    beside: dict[str, Callable[..., Any]] = {} if theirs is None else {THEIRS: theirs}
    chunks = min(CHUNKS_PER_ROUND, max(3, affordable_chunks(policy)))
    measured, others = times(sweep, args.rounds, chunks, beside)
    policy = sweep.load(DENSE)
    document = {
        **run_of,
        "format_version": FORMAT_VERSION,
        "tsad": tsad.__version__,
        "policy": str(source),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "network": policy.config["network"],
        "sampler": sampler_name(policy),
        "machine": {"cpu": cpu_name(), "backend": policy.backend, "threads": policy.threads},
        "parity": found,
        "chunks_per_round": chunks,
        "beside": others,
        "simulator": args.simulator,
        "seeds": None if args.simulator is None else sweep.seeds,
        "draws": args.draws if recorded else None,
        "rows": {
            name: {
                "words": _words(sweep, name),
                **measured[name],
                **{k: v for k, v in losses.get(name, {}).items() if k != "settings"},
            }
            for name in sweep.trials()
        },
        "notes": notes,
    }
    page = _page(document)
    write_json(make_folder(out) / RESULT, document)
    write_together({out / PAGE: page.encode()})
    print(json.dumps(document, indent=1) if args.json else f"{page}\nwritten to {out / PAGE}")
    return 0 if found["holds"] else EXIT_DIFFERS


# ---- the page


def _words(sweep: Sweep, name: str) -> str:
    """A row's setting in a few words."""
    from tsad.presets import Preset

    policy, setting = sweep.load(name), sweep.trials()[name].setting
    if isinstance(setting, Preset):
        spacing = policy.config["scheduler"]["timestep_spacing"]
        return replace(setting, timestep_spacing=spacing).words()
    return f"{sampler_name(policy)}, dense, {policy.precision}"


def _markdown(rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return [f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]]


def _times(document: dict[str, Any]) -> list[str]:
    ours = {name: row["round_medians"] for name, row in document["rows"].items()}
    medians = {**document["beside"], **ours}
    executed = {name: row["n_action_steps"] for name, row in document["rows"].items()}
    first = next(iter(medians))  # what the policy was before
    before = float(np.median(medians[first])) / executed.get(first, executed[DENSE])
    lines = [["", "ms a chunk", "least to most", "actions a chunk", f"times as fast as {first}"]]
    for name, found in medians.items():
        middle, actions = float(np.median(found)), executed.get(name, executed[DENSE])
        spread = f"{min(found):.3g} to {max(found):.3g}"
        faster = before / middle * actions
        lines.append([name, f"{middle:.3g}", spread, str(actions), f"{faster:.3g}"])
    return _markdown(lines)


def _loss_lines(document: dict[str, Any]) -> list[str]:
    rows, played = document["rows"], document["simulator"] is not None
    drawn = document["draws"] is not None
    if not played and not drawn:
        return ["Not measured: that takes a simulator, or recorded observations."]
    head = [""] + ["score", "success", "difference", "95 % of all together"] * played
    lines = [[*head, *["distance", "spread"] * drawn]]
    for name, row in rows.items():
        line = [name]
        if played:
            line += [number(row["score"]["mean"], 3), number(row["success"]["mean"], 3)]
            other = row.get("mean_difference")
            line += ["" if other is None else f"{other:+.3f}", span(row.get("simultaneous"))]
        if drawn:
            line += [number(row.get("distance"), 3), number(row.get("spread"), 2)]
        lines.append(line)
    text = []
    if played:
        first, last = document["seeds"]
        text += [f"{document['simulator']}, seeds {first} to {last}, the same for all.", ""]
    if drawn:
        text += [
            "Distance: of the actions drawn, from the dense policy's, relative to their spread; 0 "
            "is the same distribution. Spread: below 1, some of what the policy does is lost.",
            "",
        ]
    return [*text, *_markdown(lines)]


def _page(document: dict[str, Any]) -> str:
    found, machine = document["parity"], document["machine"]
    kind = "recorded" if found["recorded"] else "made-up"
    raw = ", ".join(f"{value:.2g}" for value in found["worst_raw"])
    verdict = "within" if found["holds"] else "NOT within"
    hashes = [f"- `{name}`: {digest}" for name, digest in document["files_sha256"].items()]
    lines = [
        f"# {Path(document['policy']).name} in tsad {document['tsad']}",
        "",
        f"Measured {document['made'][:10]} on {machine['cpu']}, {machine['backend']}, threads "
        f"{machine['threads']}, with `tsad certify`. As trained: {document['sampler']}. SHA-256 of "
        "the files:",
        "",
        *hashes,
        "",
        "## Dense actions are the policy's own",
        "",
        f"Over {found['observations']} {kind} observations and the same noise, dense float32 "
        f"actions differ from those of {found['reference']} by at most {found['worst']:.2g} of a "
        f"normalised action ({found['mean']:.2g} on average), which is {verdict} the bound of "
        f"{found['bound']:.2g}. In raw units, by dimension: {raw}.",
        "",
        "## Times",
        "",
        f"The median of the medians of {len(document['rows'][DENSE]['round_medians'])} rounds of "
        f"{document['chunks_per_round']} chunks, back to back, all settings in turns. "
        "How much faster counts the actions executed.",
        "",
        *_times(document),
        "",
        *[f"- {name}: {row['words']}" for name, row in document["rows"].items()],
        "",
        "## What they lose",
        "",
        *_loss_lines(document),
        "",
        *[f"- {note}" for note in document["notes"]],
    ]
    return "\n".join(lines).rstrip() + "\n"
