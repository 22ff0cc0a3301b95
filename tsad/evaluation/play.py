"""Playing the episodes of one trial, kept one by one, so that a run can be gone on with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsad._extras import MissingExtraError, package_versions
from tsad.evaluation import jobs, realtime
from tsad.evaluation.loading import configure, load_policy, setting_of
from tsad.evaluation.progress import EpisodeProgress
from tsad.evaluation.timing import cpu_name
from tsad.evaluation.usage import InterruptedRunError, UsageError, argument
from tsad.load import files_sha256
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy
    from tsad.sim import Disturbance
    from tsad.sim.results import Journal
    from tsad.sim.rollout import Episode


@dataclass(frozen=True)
class Experiment:
    """Which policy is played where: what is the same for all settings.

    Args:
        source: the policy.
        simulator: its name; None where settings are compared on observations alone.
        own: it is one of the user's.
        seeds, first_seed: how many, from which; None is the simulator's first.
        lanes: environments stepped together.
        jobs, ray: who plays, `tsad.evaluation.jobs`.
        device, threads: as of `tsad.load`.
        overwrite, resume: what becomes of earlier results.
    """

    source: str
    simulator: Any
    own: bool = False
    seeds: int = 1
    first_seed: int | None = None
    lanes: int = 1
    jobs: int | None = None
    ray: bool = False
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Trial:
    """What is played: a setting, and the conditions of the experiment.

    Args:
        setting: how the policy runs.
        noise: other noise in the same scenes, a number.
        realtime, latency: hertz and milliseconds, as of `tsad.evaluation.realtime`.
        disturb: what is done to images.
    """

    setting: Setting
    noise: int = 0
    realtime: float | None = None
    latency: float | None = None
    disturb: Disturbance | None = None

    @classmethod
    def of(cls, words: Mapping[str, Any], source: str) -> Trial:
        """From arguments, or from a row of a settings file over them."""
        from tsad.sim import Disturbance

        facts = {name: words[name] for name in ("noise", "realtime", "latency")}
        text = words["disturb"]
        disturb = None if text is None else Disturbance.parse(text)
        return cls(setting_of(words, source), disturb=disturb, **facts)

    def load(self, experiment: Experiment, *, name: str, lanes: int) -> SparsePolicy:
        """A policy that does as the setting says."""
        policy = load_policy(
            experiment.source, experiment, name=name, lanes=lanes, setting=self.setting
        )
        configure(policy, self.setting)
        with argument("--guard"):
            return self.setting.wrapped(policy)


def check_policy(
    simulator: str,
    policy: SparsePolicy,
    *,
    own: bool = False,
    realtime: bool = False,
    disturb: Disturbance | None = None,
) -> int:
    """UsageError if the simulator can't be made, or the policy doesn't fit.

    ``own``: it is the user's; ``realtime``: it shall not wait for the policy; ``disturb``: what is
    done to its images. Returns its longest episode, in steps.
    """
    from tsad import sim

    with argument("--simulator" if own else "SIMULATOR"):
        environment = sim.make(simulator)
    try:
        with argument("--policy"):
            sim.check(policy, environment, disturb=disturb)
        if realtime and not hasattr(environment, "rest_action"):
            raise UsageError(
                f"argument --realtime: the simulator {simulator!r} has no rest_action, and "
                "with a delay nothing else is known to do at first; give it one "
                "(tsad.sim.Environment)"
            )
        return int(environment.max_steps)
    finally:
        environment.close()


def simulator_settings(name: str) -> dict[str, Any]:
    """What decides the results of a simulator: its name, versions, and the hash of your own."""
    from tsad import sim

    found = sim.facts(name)
    settings = {"simulator": name, "packages": package_versions(found.packages)}
    return settings | ({"simulator_sha256": found.source_sha256} if found.source_sha256 else {})


@contextlib.contextmanager
def playing(kept: Callable[[], str]) -> Iterator[None]:
    """However playing inside ends, the error says what was kept."""
    from tsad.sim.parallel import WorkerError
    from tsad.sim.simulators import describe

    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError(kept()) from None
    except WorkerError as error:
        raise WorkerError(f"{error}; {kept()}") from None
    except (UsageError, MissingExtraError, MemoryError):
        raise
    except Exception as error:  # a simulator may be anybody's
        raise RuntimeError(f"{describe(error)}; {kept()}") from error


def _settings(policy: SparsePolicy, experiment: Experiment, trial: Trial) -> dict[str, Any]:
    """All that decides an episode's result; a run resumes only where these are equal."""
    import tsad

    return {
        "tsad": tsad.__version__,
        **simulator_settings(experiment.simulator),
        "files_sha256": files_sha256(experiment.source),
        **trial.setting.key(policy),
        # only where it differs from the default, so that older results can be gone on with
        **({"noise": trial.noise} if trial.noise else {}),
        **({} if trial.disturb is None else {"disturb": str(trial.disturb)}),
    }


def _here(
    policy: SparsePolicy, simulator: str, lanes: int, todo: list[int], options: Mapping[str, Any]
) -> Generator[Episode, None, None]:
    """The episodes of `todo`, played by this process."""
    from tsad import sim

    environments = [sim.make(simulator) for _ in range(min(lanes, len(todo)))]
    try:
        yield from sim.rollouts(policy, environments, todo, **options)
    finally:
        for environment in environments:
            environment.close()


def _kept(journal: Journal) -> str:
    if journal.out is None:
        return "nothing was kept; --out FILE keeps episodes"
    if not journal.episodes:
        return "no episode was finished"
    return f"{len(journal.episodes)} episodes are kept; the same command with --resume goes on"


def _play(
    policy: SparsePolicy,
    experiment: Experiment,
    trial: Trial,
    todo: list[int],
    journal: Journal,
    workers: jobs.Workers | None,
    max_steps: int,
    label: str | None,
) -> None:
    """Play the seeds that are left, keeping each episode as it ends."""
    delay = journal.settings.get("realtime", {}).get("ticks", 0)
    options = {
        "n_action_steps": trial.setting.n_action_steps,
        "noise_stream": trial.noise,
        "delay": delay,
        "disturb": trial.disturb,
    }
    longest = -(-max_steps // max(trial.setting.n_action_steps or policy.n_action_steps, delay))
    done = experiment.seeds - len(todo)
    dense = policy.sparsity == 0
    plan = "dense" if dense else f"sparsity {percent(policy.sparsity)}"
    label = label or f"{experiment.simulator}, {plan}"
    progress = EpisodeProgress(experiment.seeds, label, longest=longest, done=done)
    if workers is None:
        options["on_chunk"] = lambda chunk: progress.chunks(len(chunk.seeds))
        played = _here(policy, experiment.simulator, experiment.lanes, todo, options)
    else:
        played = jobs.play(
            workers, policy, experiment, trial.setting, todo, options, progress.chunks
        )
    with playing(lambda: _kept(journal)), contextlib.closing(played), progress:
        for episode in played:
            journal.append(episode)
            scores = [kept.score for kept in journal.episodes.values()]
            progress.episode(episode.chunks, f"score {sum(scores) / len(scores):.3f}")


def _document(
    policy: SparsePolicy,
    experiment: Experiment,
    setting: Setting,
    journal: Journal,
    seeds: list[int],
    workers: jobs.Workers | None,
) -> dict[str, Any]:
    """The whole result, as it is written and printed."""
    from tsad.sim import results

    asked = [journal.episodes[seed] for seed in seeds]
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    look = {"finished": finished, "first_seed": seeds[0], "last_seed": seeds[-1]}
    return {
        "format": results.FORMAT,
        "format_version": results.FORMAT_VERSION,
        "settings": journal.settings,
        # What may differ between runs of the same settings.
        "run": {
            "policy": experiment.source,
            "plan": None if setting.plan is None else str(setting.plan),
            "lanes": policy.lanes,
            "threads": policy.threads,
            **({} if workers is None else workers._asdict()),
            "cpu": cpu_name(),
            "finished": finished,
        },
        # Every time that somebody was told: test seeds are to be looked at once.
        "looks": [*journal.looks, look],
        "summary": {"first_seed": seeds[0], "last_seed": seeds[-1], **results.summarise(asked)},
        "episodes": [results.fields_of(e) for _, e in sorted(journal.episodes.items())],
    }


def percent(sparsity: float | None) -> str:
    """A sparsity in words."""
    return "of its own choice" if sparsity is None else f"{sparsity:.1%}"


def seeds_of(experiment: Experiment) -> list[int]:
    """The seeds that are asked for."""
    from tsad import sim

    first = (
        sim.facts(experiment.simulator).first_seed
        if experiment.first_seed is None
        else experiment.first_seed
    )
    return list(range(first, first + experiment.seeds))


def evaluate(
    experiment: Experiment,
    trial: Trial,
    out: Path | None,
    *,
    resume: bool,
    baseline: tuple[str, list[Any]] | None = None,
    label: str | None = None,
) -> tuple[dict[str, Any], SparsePolicy]:
    """Play what is missing of one trial; the whole result, written to `out`, and the policy."""
    from tsad import sim
    from tsad.sim.results import Journal, compare

    seeds = seeds_of(experiment)
    # Everything that can be refused is refused here, before a file is touched or time is spent.
    policy = trial.load(experiment, name="--policy", lanes=min(experiment.lanes, experiment.seeds))
    max_steps = check_policy(
        experiment.simulator,
        policy,
        own=experiment.own,
        realtime=trial.realtime is not None,
        disturb=trial.disturb,
    )
    with argument("--policy"):
        sim.check_executed(policy, trial.setting.n_action_steps)
    workers = jobs.workers_of(experiment, policy)
    settings = _settings(policy, experiment, trial) | realtime.settings(
        trial.realtime,
        trial.latency,
        None if experiment.overwrite else out,
        lambda: trial.load(experiment, name="--policy", lanes=1),
    )
    with argument("--out"):
        journal = Journal(out, settings, resume=resume, overwrite=experiment.overwrite)
    try:
        todo = [seed for seed in seeds if seed not in journal.episodes]
        if todo:
            _play(policy, experiment, trial, todo, journal, workers, max_steps, label)
        document = _document(policy, experiment, trial.setting, journal, seeds, workers)
        if baseline is not None:
            asked = [journal.episodes[seed] for seed in seeds]
            name, episodes = baseline
            document["paired"] = {"baseline": name, **compare(asked, episodes)}
        journal.finish(document)
    finally:
        journal.close()
    return document, policy
