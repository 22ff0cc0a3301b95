"""Many settings over the same seeds, resumable."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad.arrays import read_any_json
from tsad.config import EULER, FLOWS, SAMPLERS, TIMESTEP_SPACINGS
from tsad.evaluation import realtime
from tsad.evaluation.errors import ERRORS_FILE, Errors, most_windows, recorded_windows
from tsad.evaluation.loading import configure
from tsad.evaluation.play import Experiment, Trial, check_policy, evaluate, seeds_of
from tsad.evaluation.progress import Progress
from tsad.evaluation.timing import Clock, milliseconds, observations, sampler_name
from tsad.evaluation.usage import InterruptedRunError, argument, disturbance, lead, reuse_images
from tsad.files import make_folder
from tsad.planners import Turns
from tsad.planners.files import is_mask
from tsad.rule import Alternate, rule_of
from tsad.setting import RULED, VISION_PRECISIONS, Setting

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tsad import SparsePolicy
    from tsad.sim.rollout import Episode

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
    "realtime": (int, float),
    "latency": (int, float),
    "warm_start": (int,),
    "lead": (int, float),
    "smoothing": (bool,),
    "reuse_images": (int, float),
    "vision_precision": (str,),
    "disturb": (str,),
    "fitted": (str,),
    "guard": (str,),
    "rule": (str, dict),
}
CHOICES = {
    "sampler": SAMPLERS,
    "spacing": TIMESTEP_SPACINGS,
    "vision_precision": VISION_PRECISIONS,
}
RANGES: dict[str, Callable[[Any], object]] = {
    "realtime": realtime.hertz,
    "latency": realtime.milliseconds,
    "lead": lead,
    "reuse_images": reuse_images,
    "disturb": disturbance,
}
CHUNKS_PER_ROUND = 30
HELD = 10**9  # bytes of weights: dozens of a UNet's would fill the memory
RESERVED = ("errors", "summary", "tune")  # files of these names lie beside the rows'


def read_settings(path: str) -> list[dict[str, Any]]:
    """The rows of a settings file, checked; UsageError says which is wrong."""
    with argument("--settings"):
        try:
            rows = read_any_json(path)
        except ValueError as error:
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
                if not isinstance(value, KEYS[key]) or (
                    isinstance(value, bool) and bool not in KEYS[key]
                ):
                    kind = KEYS[key][-1].__name__
                    raise ValueError(f"{where}: {key}: expected {kind}, got {value!r}")
                if value not in CHOICES.get(key, (value,)):
                    raise ValueError(
                        f"{where}: {key}: expected one of {', '.join(CHOICES[key])}, got {value!r}"
                    )
                if key == "rule":
                    try:
                        rule_of(value)
                    except (ValueError, TypeError) as error:
                        raise ValueError(f"{where}: {error}") from None
                if key in RANGES:
                    try:
                        RANGES[key](value)
                    except argparse.ArgumentTypeError as error:
                        raise ValueError(f"{where}: {key}: {error}") from None
            name = row["name"]
            if name in names or not name.replace("-", "").replace(".", "").isalnum():
                raise ValueError(
                    f"{where}: name: expected letters, digits, dots and dashes, each name once, "
                    f"got {name!r}: it names a file"
                )
            if name in RESERVED:
                raise ValueError(f"{where}: name: got {name!r}, which is taken; choose another")
            if "plan" in row and ("sparsity" in row or "planner" in row):
                raise ValueError(f"{where}: a plan leaves nothing to sparsity or planner")
            beside = RULED.keys() & row.keys() if "rule" in row else ()
            for key in sorted(beside):
                raise ValueError(f"{where}: a rule {RULED[key]}; leave out {key}, or the rule")
            names.add(name)
    return rows


def passes(policy: SparsePolicy) -> float | None:
    """Dense passes of a chunk, of `Turns` on average; None where it is decided as it runs."""
    if isinstance(policy, Turns):
        return policy.cost * policy.num_inference_steps
    if policy.sparsity is None:
        return None
    return float(policy.num_inference_steps * (1 - policy.sparsity))


def _row(document: Mapping[str, Any], policy: SparsePolicy, errors: Mapping[str, Any]) -> Any:
    summary = document["summary"]
    return {
        "settings": document["settings"],
        "passes": summary.get("passes", passes(policy)),
        **({"most_passes": summary["most_passes"]} if "most_passes" in summary else {}),
        "score": summary["score"],
        "success": summary["success"],
        "steps_to_success": summary["steps_to_success"],
        "action_rms": None,
        **errors,
    }


class Sweep:
    """The rows of a settings file, checked: each is loaded once, before hours go into others.

    ``words`` are what rows leave unsaid; ``folder`` is where their plans lie; ``out`` gets a file
    per row.
    """

    def __init__(
        self,
        experiment: Experiment,
        settings: list[dict[str, Any]],
        folder: Path,
        out: Path,
        *,
        words: Mapping[str, Any],
    ) -> None:
        self._experiment, self._words, self._folder, self._out = experiment, words, folder, out
        self._trials: dict[str, Trial] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        self._errors: Errors | None = None
        self.windows: NDArray[np.float32] | None = None
        self.rows: dict[str, Any] = {}
        self.episodes: dict[str, list[Episode]] = {}
        self._held: dict[str, SparsePolicy] = {}
        self._needs_past: dict[str, bool] = {}  # of all that were loaded
        self.add(settings)
        if experiment.simulator is not None:
            trials = self._trials.values()
            check_policy(
                experiment.simulator,
                self.load(self.first),
                own=experiment.own,
                realtime=any(trial.realtime is not None for trial in trials),
                disturb=next((trial.disturb for trial in trials if trial.disturb), None),
            )

    def add(self, settings: list[dict[str, Any]]) -> None:
        """Further rows."""
        from tsad import sim

        # a second for each of a large policy
        with Progress(len(settings), "loading", unit="settings", brief=True) as progress:
            for row in settings:
                name, own = row["name"], self._trial(row)
                realtime.check(own.realtime, own.latency, f"--settings: {name}: latency")
                self._trials[name], self._settings[name] = own, row
                with argument(f"--settings: {name}"):
                    sim.check_executed(self.load(name), own.setting.n_action_steps)
                progress.update(name)

    def _trial(self, row: Mapping[str, Any]) -> Trial:
        """What a row says, and what it leaves to the words."""
        row = dict(row)
        if "plan" in row and not is_mask(row["plan"]):  # relative to the settings file
            row["plan"] = str(self._folder / row["plan"])
        for name in row.keys() & {"fitted", "guard"}:
            row[name] = str(self._folder / row[name])
        if isinstance(rule := rule_of(row.get("rule")), Alternate):
            row["rule"] = rule.within(self._folder)
        return Trial.of({**self._words, **row}, self._experiment.source)

    @property
    def first(self) -> str:
        """The name of the row that the others are compared with."""
        return next(iter(self._trials))

    def load(self, name: str) -> SparsePolicy:
        """One lane of a row's policy, set. Those before it are kept if they are small."""
        if name not in self._held:
            held = sum(policy.model.weight_bytes for policy in self._held.values())
            if held > HELD:
                self._held.clear()
            own = self._trials[name]
            from tsad.sim.offline import needs_past

            policy = own.load(self._experiment, name=f"--settings: {name}", lanes=1)
            self._held[name], self._needs_past[name] = policy, needs_past(policy)
        return self._held[name]

    @property
    def seeds(self) -> list[int]:
        """The first and the last."""
        played = seeds_of(self._experiment)
        return [played[0], played[-1]]

    def trials(self) -> dict[str, Trial]:
        """That of every row."""
        return self._trials

    def clocks(self) -> list[Clock]:
        """One for every row."""

        def clock(name: str, setting: Setting) -> Clock:
            setup = partial(configure, setting=setting)
            return Clock(name, partial(self.load, name), setup, setting.n_action_steps)

        return [clock(name, trial.setting) for name, trial in self._trials.items()]

    def setting(self, name: str) -> dict[str, Any]:
        """A row as it was given."""
        return self._settings[name]

    def measure(self, observations: str | None, draws: int, name: str = "--observations") -> None:
        """From now on `play` and `error` report errors of actions on these, the argument `name`."""
        if observations is None:
            return
        policy = self.load(self.first)
        self.windows = recorded_windows(observations, policy, most_windows(draws), name)
        make_folder(self._out)
        file = self._out / ERRORS_FILE
        self._errors = Errors(
            self._experiment.source,
            self.windows,
            machine=self._experiment,
            draws=draws,
            reference=self._trials[self.first].setting,
            file=file,
        )

    def unmeasured(self) -> list[str]:
        """The rows whose errors single observations don't tell."""
        if self.windows is None or self.windows.shape[1] > 1:
            return []
        return [name for name in self._trials if self._needs_past[name]]  # all were loaded once

    def moved(self, name: str) -> bool:
        """Whether a row's executed actions have a lead, or are smoothed."""
        setting = self._trials[name].setting
        return bool(setting.lead or setting.smoothing)

    def alike(self, name: str) -> list[str]:
        """The rows that are this one but for lead and smoothing; it is one of them."""

        def bare(trial: Trial) -> Trial:
            return replace(trial, setting=replace(trial.setting, lead=None, smoothing=None))

        own = bare(self._trials[name])
        return [other for other, trial in self._trials.items() if bare(trial) == own]

    def dense_with_lead(self) -> str | None:
        """Of the rows that are the first but for a lead, the one that scored best; None of none."""
        led = [name for name in self.alike(self.first) if self.moved(name) and name in self.rows]
        return max(led, key=lambda name: float(self.rows[name]["score"]["mean"]), default=None)

    def leave_out(self, name: str) -> None:
        """Without this row."""
        del self._trials[name], self._settings[name]

    def error(self, name: str) -> dict[str, float | None]:
        """Errors of a row's actions; {} where nothing is recorded to measure them on."""
        return {} if self._errors is None else self._errors.of(self._trials[name].setting, name)

    def play(self) -> None:
        """Play what is missing of every row that has not been."""
        from tsad.sim.results import read_results

        make_folder(self._out)
        for number, (name, own) in enumerate(self._trials.items(), 1):
            if name in self.rows:
                continue
            path = self._out / f"{name}.json"
            label = f"{number} of {len(self._trials)}, {name}"
            resume = self._experiment.resume or not self._experiment.overwrite
            try:
                document, policy = evaluate(self._experiment, own, path, resume=resume, label=label)
            except (InterruptedRunError, RuntimeError) as stop:
                text = str(stop).replace("command with --resume", "command")  # a sweep always does
                raise type(stop)(f"setting {name}: {text}") from None
            self.rows[name] = _row(document, policy, self.error(name))
            wanted = set(seeds_of(self._experiment))
            self.episodes[name] = [e for e in read_results(path)[1] if e.seed in wanted]


def compare_success(sweep: Sweep) -> dict[str, Any]:
    """The played rows against the first by success, as of `tsad.sim.results.compare_all`."""
    from tsad.sim.results import compare_all

    return compare_all(sweep.episodes, sweep.first, of="success")


def compare_rows(sweep: Sweep) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The played rows against the first, and against that with its best lead, if there is one.

    Both by score, as of `tsad.sim.results.compare_all`.
    """
    from tsad.sim.results import compare_all

    led = sweep.dense_with_lead()
    to_lead = None if led is None else compare_all(sweep.episodes, led)
    return compare_all(sweep.episodes, sweep.first), to_lead


def times(
    sweep: Sweep,
    rounds: int,
    chunks: int = CHUNKS_PER_ROUND,
    beside: Mapping[str, Callable[[NDArray[np.float32]], Any]] | None = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Milliseconds per chunk of every row, in turns: the fastest round's median, and all's.

    ``beside``: what else takes part, called with (1, n_obs_steps, obs_dim); its rounds' medians are
    the second result.
    """
    import numpy as np

    clocks = sweep.clocks()
    obs = observations(sweep.load(sweep.first), chunks)
    if sweep.windows is not None:
        obs = sweep.windows[:chunks, -1][:, None]
    others = beside or {}
    medians: dict[str, list[float]] = {name: [] for name in others}
    with Progress(rounds * (len(clocks) + len(others)), "times", unit="rounds") as progress:
        for _ in range(rounds):
            for clock in clocks:
                clock.round(obs)
                progress.update(clock.name)
            for name, call in others.items():
                call(obs[0])  # does not count, as in a clock's round
                medians[name].append(float(np.median([milliseconds(call, row) for row in obs])))
                progress.update(name)
    found = {}
    for clock in clocks:
        policy = sweep.load(clock.name)
        executed = sweep.trials()[clock.name].setting.n_action_steps
        found[clock.name] = {
            "milliseconds": min(clock.medians),
            "n_action_steps": executed or policy.n_action_steps,
            "round_medians": clock.medians,
            "cell_sparsity": float(clock.plan.cell_sparsity),
            "passes": float(clock.plan.cost) * policy.num_inference_steps,
            "sampler": sampler_name(policy),
        }
        if "most_passes" in sweep.rows.get(clock.name, {}):  # of the chunks that were played
            del found[clock.name]["passes"]
    return found, medians


def fitting(policy: SparsePolicy, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The settings; for a flow those of other samplers with Euler's steps, evenly spaced."""
    if policy.config["scheduler"]["type"] not in FLOWS:
        return rows
    return [
        row | {"name": row["name"].replace("ddim", EULER)} | ({"sampler": EULER} if few else {})
        for row in rows
        if (few := row.get("sampler")) != "dpmsolver++" and row.get("spacing") != "trailing"
    ]
