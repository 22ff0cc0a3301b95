"""``tsad.load``: from a name, a folder or a checkpoint to a policy that runs."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tsad import policy as policies
from tsad import trust
from tsad.cameras import Cameras
from tsad.checkpoint import (
    CONFIG_FILE,
    MODEL_FILE,
    PRUNER_FILE,
    CheckpointError,
    Tensors,
    folder_kind,
    network_tensors,
    of_training,
    read_folder,
    unfinished,
)
from tsad.config import FLOWS, TIMESTEP_SPACINGS, PolicyConfig
from tsad.device import check_device
from tsad.families import Network, arguments
from tsad.families.dit import DitConfig
from tsad.families.dpt import NetworkConfig
from tsad.files import sha256
from tsad.fitted import Fitted
from tsad.image_policy import ImagePolicy
from tsad.presets import Preset, check_clash, find_preset
from tsad.reference.families import family_of
from tsad.reference.layers import rotation, sinusoid
from tsad.samplers import Sampler, make_sampler, tail
from tsad.scope import scope
from tsad.setting import MAX_LEAD, MAX_REUSE, VISION_PRECISIONS, Setting

if TYPE_CHECKING:
    from tsad import _core
    from tsad.convert import Converted
    from tsad.planners import Planner

PRECISIONS = {
    "cpu": ("auto", "float32", "int16", "int8"),
    "cuda": ("auto", "float32", "tf32", "float16", "bfloat16"),
}
MAX_THREADS = 64  # the team's size in csrc/cpu/team.c
THREADS_PER_LANE = 4  # a lane is shared by at most so many: TSAD_PARTS in csrc/cpu/worker.h

_ASSETS = Path(__file__).parent / "assets"


def load(
    source: str | os.PathLike[str],
    *,
    lanes: int = 1,
    device: str = "cpu",
    precision: str = "auto",
    threads: int | None = None,
    sampler: str | None = None,
    num_inference_steps: int | None = None,
    timestep_spacing: str | None = None,
    preset: str | None = None,
    planner: str | Planner | None = None,
    sparsity: float | None = None,
    warm_start: int | None = None,
    lead: float | None = None,
    smoothing: bool | None = None,
    fitted: Fitted | str | os.PathLike[str] | None = None,
    reuse_images: float | None = None,
    vision_precision: str | None = None,
    weights: str = "auto",
) -> policies.SparsePolicy:
    """A policy, ready to run.

    ``source`` is the name of a bundled policy (``"pusht"``; a folder of that name is
    ``"./pusht"``), a tsad folder, the folder of a LeRobot diffusion policy (an observation is a
    dict by the names in ``config["features"]``, or without cameras these side by side), or
    a Diffusion Policy ``.ckpt``, which is converted in memory
    without running anything in it: its EMA weights, or the raw ones if the run had no others
    (``use_ema: False``); ``weights="ema"`` or ``"raw"`` says which. What should be known of the
    file is said as a warning. A policy that sees images is an `ImagePolicy`.

    ``lanes`` environments are stepped together. ``device`` is ``"cpu"``, or ``"cuda"`` where this
    build has that backend and there is a GPU (``tsad info`` says). ``precision`` ``"auto"``
    is float32; ``"int16"`` keeps the large matrices in 16 bits and rounds the activations
    that meet them: faster, and ``stats["error_bound"]`` says what it costs; ``"int8"`` keeps the
    weights of large matrices in 8 bits: half the bytes again, for networks larger than the caches,
    and a loss that you should measure on your policy. These are a CPU's; on a GPU ``"float16"`` and
    ``"bfloat16"`` keep the weights of the large matrices in 16 bits, and all else, activations and
    sums included, in float32; ``"tf32"`` keeps all in float32 and lets cuBLAS, which has the
    products of 64 rows and more, round what it multiplies to 10 bits. ``threads`` defaults to
    the CPUs that this process may use, at most four per lane. ``sampler`` (``"ddpm"``,
    ``"ddim"``, ``"dpmsolver++"``; of flow matching ``"euler"``, ``"rk4"``),
    ``num_inference_steps``, which counts passes of the network (``"rk4"`` has four a step), and
    ``timestep_spacing`` (``"leading"``, ``"trailing"``, ``"linspace"``) override the checkpoint's.

    ``preset`` is the name of a measured setting of these weights, from the policy's folder or from
    one of yours (``tsad.presets``; ``tsad info`` lists them). It says sampler, steps, spacing,
    precision (on a GPU always float32, which rounds less), plan, and maybe warm start and how many
    actions a chunk returns. An argument that says otherwise is refused, as nobody measured the
    mixture; afterwards the policy's plan and dial are yours.

    ``planner`` and ``sparsity`` set the attributes of that name: who turns the dial, a name or a
    `Planner` of your own, and how far. The planner "pruner" without a number decides by its own
    scores, a `tsad.planners.RowRule` by its threshold.

    ``warm_start=N`` denoises a chunk from the one before it, in the last N steps alone; the first
    one after a reset runs all. Tell the policy how many actions you execute (`SparsePolicy`).

    ``smoothing=True`` and ``lead`` change the actions that a call returns, and nothing else: what
    is predicted, what a warm start goes on from and ``return_horizon`` stay. Smoothing weighs each
    action with its neighbours in the horizon, 1/4, 1/2, 1/4. A lead, 0 to 10, moves it further away
    from what the chunk before has for the same time, as a + lead (a - last), within the sampler's
    clip range. Whether that helps is a matter of the robot and its controller, not of the policy: a
    dense policy may gain as much (docs/results.md).

    ``reuse_images``, of policies that see images, is a bound in levels of 255, 0 (none) to 255:
    within it an image takes the features of one that was encoded (`ImagePolicy`). Fewer are encoded
    then, and actions are others; docs/images.md has what that saves and costs.

    ``vision_precision``, of these, is ``"float32"``, the default, ``"int16"`` or ``"int8"``: their
    encoders multiply 16-bit integers, faster and with half the weights' memory, and features are
    others by some thousandths; or, with a quarter of it, weights of 8 bits, and by some hundredths
    (docs/images.md). ``precision``, and ``error_bound``, are the network's alone.

    ``fitted`` is what `tsad fit` found for these weights, sampler, steps and warm start, a file or
    a `tsad.fitted.Fitted`. It is of one plan, to be set afterwards; a preset has both.

    Raises ``ValueError`` or ``TypeError`` naming the argument, what came, what was expected and the
    fix; ``FileNotFoundError`` if ``source`` is a path to nothing; ``CheckpointError``, a
    ``ValueError``, for files that are truncated, foreign or do not fit; ``RuntimeError`` if the GPU
    does not compute what the CPU does, which is asked once for a model (`tsad.trust`).
    """
    options = {name: value for name, value in locals().items() if name != "source"}
    options |= {"planner": None, "sparsity": None}  # a policy that is loaded again has its own
    lanes = _integer("lanes", lanes, 1, 2**20)
    threads = default_threads(threads, lanes)
    device = check_device(device)
    if precision not in PRECISIONS[device]:
        raise ValueError(
            f"precision: expected one of {', '.join(map(repr, PRECISIONS[device]))} on device "
            f"{device!r}, got {precision!r}; choose one of these ({scope('precisions')})"
        )
    config, tensors, pruner = read_policy(source, weights)
    setting = Setting(
        sampler=sampler,
        num_inference_steps=num_inference_steps,
        timestep_spacing=timestep_spacing,
        precision=None if precision == "auto" else precision,
        planner=planner,
        sparsity=sparsity,
        warm_start=warm_start,
        lead=_within("lead", lead, MAX_LEAD, "0.1 to 0.3 is usual, and tsad tune chooses one"),
        smoothing=_flag("smoothing", smoothing),
        fitted=_fitted(fitted),
        reuse_images=_within("reuse_images", reuse_images, MAX_REUSE, "start with 2 levels of 255"),
        vision_precision=_vision_precision(vision_precision),
    )
    options["fitted"] = setting.fitted  # for whoever loads it again, wherever that is
    if preset is not None:
        chosen = find_preset(policy_folder(source), preset, str(source))
        check_clash(chosen, setting)
        # its integers are a CPU's; what they round is not lost
        setting = replace(chosen, precision="float32") if device == "cuda" else chosen
    config = _configured(config, setting)
    if setting.reuse_images and config.vision is None:
        raise ValueError(
            f"reuse_images: expected None, as this policy sees no images, got "
            f"{setting.reuse_images:g}; leave it out"
        )
    if setting.vision_precision is not None and config.vision is None:
        raise ValueError(
            f"vision_precision: expected None, as this policy sees no images, got "
            f"{setting.vision_precision!r}; leave it out"
        )
    table = make_sampler(
        config.scheduler.to_dict(),
        sampler=setting.sampler,
        num_inference_steps=setting.num_inference_steps,
        coefficients=family_of(config.network.to_dict()).COEFFICIENTS,
    )
    last = None
    if setting.warm_start is not None:
        last = tail(table, setting.warm_start)  # refuses what does not fit, before packing weights
    own = setting.load_fitted()
    if own is not None:
        shape = (config.network.horizon, config.network.action_dim)
        own.check(_of(source, config, setting, table), shape)
        table = own.applied(table) if last is None else table
    precision = setting.precision or "float32"
    backend = None if device == "cpu" else device
    model = make_model(config, tensors, pruner, table, backend=backend, precision=precision)
    if backend is not None:

        def alone(where: str, precision: str) -> policies.SparsePolicy:
            same = model
            if where == "cpu":
                same = make_model(config, tensors, pruner, table, precision=precision)
            return policies.SparsePolicy(
                same, config=config, sampler=table, threads=threads, device=where
            )

        trust.check(alone, config, table, [tensors, pruner or {}], precision)
    parts: dict[str, Any] = {
        "config": config,
        "sampler": table,
        "lanes": lanes,
        "threads": threads,
        "device": device,
        "precision": precision,
        "warm_start": setting.warm_start,
        "lead": setting.lead or 0.0,
        "smoothing": bool(setting.smoothing),
        "fitted": own,
    }
    if config.vision is None:
        policy = policies.SparsePolicy(model, **parts)
    else:
        cameras = Cameras(
            config.vision,
            tensors,
            threads=threads,
            precision=setting.vision_precision or "float32",
        )
        bound = setting.reuse_images or 0.0
        policy = ImagePolicy(model, cameras=cameras, reuse_images=bound, **parts)
    if isinstance(setting, Preset):
        try:
            setting.apply(policy)
        except CheckpointError:
            raise
        except ValueError as error:
            raise ValueError(f"preset: {preset!r} does not fit this policy: {error}") from error
    elif planner is not None or sparsity is not None:
        replace(setting, fitted=None).apply(policy)  # whose plan is to be set afterwards
    place = str(source) if source in bundled() else os.path.abspath(source)
    policy._loaded = place, {**options, "device": device}
    return policy


policies.load = load


def _fitted(given: Any) -> Fitted | None:
    if given is None or isinstance(given, Fitted):
        return given
    if not isinstance(given, str | os.PathLike):
        raise TypeError(
            f"fitted: expected a file of tsad fit, got {type(given).__name__}; give its path"
        )
    return Fitted.read(given)


def _of(
    source: str | os.PathLike[str], config: PolicyConfig, setting: Setting, sampler: Sampler
) -> dict[str, Any]:
    """What anything fitted must be of, for `Fitted.check`."""
    return {
        "model_sha256": weights_sha256(source),
        "sampler": sampler.name,
        "num_inference_steps": len(sampler.timesteps),
        "timestep_spacing": config.scheduler.timestep_spacing,
        "warm_start": setting.warm_start,
    }


def weights_sha256(source: str | os.PathLike[str]) -> str:
    """That of the file that the weights are in."""
    files = files_sha256(source)
    return files.get(MODEL_FILE) or files["checkpoint"]


def _configured(config: PolicyConfig, setting: Setting) -> PolicyConfig:
    """With the setting's spacing and number of actions."""
    spacing, n = setting.timestep_spacing, setting.n_action_steps
    if n is not None:
        most = config.network.n_action_steps
        if n > most:
            raise ValueError(
                f"preset: expected at most {most} n_action_steps, what the policy executes of a "
                f"chunk, got {n}; make the preset anew"
            )
        config = replace(config, network=replace(config.network, n_action_steps=n))
    if spacing is None:
        return config
    check_spacing(spacing, config.scheduler.type)
    return replace(config, scheduler=replace(config.scheduler, timestep_spacing=spacing))


def make_model(
    config: PolicyConfig,
    tensors: Tensors,
    pruner: Tensors | None,
    sampler: Sampler,
    *,
    backend: str | None = None,
    precision: str = "float32",
) -> _core.Model:
    """The core's immutable model of checked tensors; it packs them into memory of its own.

    ``backend`` pins the instruction set, one of ``_core.backends()``, or is ``"cuda"``; ``None`` is
    the best one of the CPU.
    ``precision``: ``"float32"``, ``"int16"``, ``"int8"``, or a GPU's ``"float16"``,
    ``"bfloat16"`` or ``"tf32"``: a CPU rounds the same weights and keeps them in float32, to say
    what is right, or, of ``"tf32"``, what their rounding alone costs.
    """
    from tsad import _core

    net = config.network

    def vector(values: tuple[float, ...]) -> Any:
        return np.array(values, dtype=np.float32)

    obs_shift, action_shift = config.normalizer.obs.shift, config.normalizer.action.shift
    packed_pruner: dict[str, Any] | None = None
    if pruner is not None and config.pruner is not None:
        packed_pruner = {"tensors": pruner, **config.pruner.arguments()}
        if config.pruner.type == "transformer":
            blocks = np.arange(len(config.costs))
            packed_pruner["block_emb"] = sinusoid(blocks, config.pruner.hidden_dim, np.float32)
    return _core.Model(
        **arguments(net),
        **_tables(net, sampler),
        obs_scale=vector(config.normalizer.obs.scale),
        obs_offset=vector(config.normalizer.obs.offset),
        action_scale=vector(config.normalizer.action.scale),
        action_offset=vector(config.normalizer.action.offset),
        obs_shift=None if obs_shift is None else vector(obs_shift),
        action_shift=None if action_shift is None else vector(action_shift),
        block_cost=np.array(config.costs, dtype=np.int64),
        tensors=network_tensors(tensors),
        pruner=packed_pruner,
        backend=backend,
        precision=precision,
    )


def _tables(net: Network, sampler: Sampler) -> dict[str, Any]:
    """Of the steps and positions."""
    dpt = isinstance(net, NetworkConfig)
    # LeRobot's modules meet times and frequencies in float32
    codes = {} if dpt else {"angles": np.float32}
    time_emb = sinusoid(sampler.timesteps, net.arguments()["n_emb"], np.float32, **codes)
    tables = {"sampler": np.ascontiguousarray(sampler.table, np.float32), "time_emb": time_emb}
    if isinstance(net, DitConfig) and net.use_rope:
        tables["rotation"] = rotation(net.horizon, net.head_dim, net.rope_base)
    return tables


def bundled() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(path.parent.name for path in _ASSETS.glob(f"*/{CONFIG_FILE}"))


def check_spacing(spacing: Any, sampler: str) -> None:
    """``ValueError`` for a ``timestep_spacing`` that a checkpoint's sampler has not."""
    choices = ("leading",) if sampler in FLOWS else TIMESTEP_SPACINGS
    if spacing not in choices:
        raise ValueError(
            f"timestep_spacing: expected one of {', '.join(map(repr, choices))}, got "
            f"{spacing!r}; choose one of these, or None for that of the checkpoint"
        )


def default_threads(threads: int | None, lanes: int) -> int:
    """``threads``, checked, or as many as this process may use and the lanes can."""
    if threads is None:
        return min(usable_cpus(), MAX_THREADS, THREADS_PER_LANE * lanes)
    return _integer("threads", threads, 1, MAX_THREADS)


def usable_cpus() -> int:
    """CPUs that this process may use: its affinity, and the quota of its container (cgroup v2)."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):  # no quota ("max"), or no such system
        pass
    return max(count, 1)


def policy_folder(source: str | os.PathLike[str]) -> Path | None:
    """The folder that a bundled name or a path stands for; None if it is not one."""
    path = _ASSETS / source if isinstance(source, str) and source in bundled() else Path(source)
    return of_training(path) if path.is_dir() else None


def files_sha256(source: str | os.PathLike[str]) -> dict[str, str]:
    """SHA-256 of each file that a policy is read from: those of a folder, or a checkpoint."""
    folder = policy_folder(source)
    if folder is None:
        return {"checkpoint": sha256(source)}
    processors = [path.name for path in folder.glob("policy_*processor*") if path.is_file()]
    names = (CONFIG_FILE, MODEL_FILE, PRUNER_FILE, *sorted(processors))  # LeRobot's statistics
    return {name: sha256(folder / name) for name in names if (folder / name).is_file()}


def read_policy(
    source: str | os.PathLike[str], weights: str = "auto"
) -> tuple[PolicyConfig, Tensors, Tensors | None]:
    """Configuration, tensors and the pruner's tensors of what `load` takes; errors as there."""
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"source: expected a name, a folder or a file as str or Path, got "
            f'{type(source).__name__}; tsad.load("pusht") loads the bundled policy'
        )
    folder = policy_folder(source)
    if folder is not None and weights != "auto":
        raise ValueError(
            f"weights: expected it left out, as {str(source)!r} has one set of weights, got "
            f"{weights!r}; it is for the .ckpt files of Diffusion Policy"
        )
    path = folder or Path(source)
    if path.is_dir():
        kind = folder_kind(path)
        if kind == "tsad":
            return read_folder(path)
        if kind == "lerobot":
            from tsad.convert import read_lerobot_folder  # a third of the time of import tsad

            return _with_notes(path, read_lerobot_folder(path))
        fix = "make one with: tsad convert CHECKPOINT FOLDER"
        if unfinished(path):
            fix = (
                "a training in it has not ended: wait, or go on with it by --resume; with "
                "--keep-every N, tsad train-policy keeps policies on the way"
            )
        raise ValueError(
            f"source: expected a tsad folder, got {str(path)!r}, which has no {CONFIG_FILE}; {fix}"
        )
    if not path.exists():
        names = ", ".join(map(repr, bundled()))
        near = difflib.get_close_matches(str(source).lower(), bundled(), 1)
        fix = f"did you mean {near[0]!r}?" if near else "check the path; nothing is downloaded"
        error = ValueError if path.name == str(source) and not path.suffix else FileNotFoundError
        raise error(
            f"source: expected the name of a bundled policy ({names}), a tsad or LeRobot "
            f"folder, or a Diffusion Policy .ckpt, got {str(source)!r}, where nothing is; {fix}"
        )
    if path.suffix in (".safetensors", ".json"):
        raise ValueError(
            f"source: expected a tsad folder, got the file {str(path)!r}; give the folder it is in"
        )
    from tsad.convert import read_checkpoint

    return _with_notes(path, read_checkpoint(path, weights=weights))


def _with_notes(path: Path, converted: Converted) -> tuple[PolicyConfig, Tensors, None]:
    for note in converted.notes:
        warnings.warn(f"{path}: {note}", stacklevel=4)
    return converted.config, converted.tensors, None


def _within(name: str, value: Any, most: float, advice: str) -> float | None:
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if value is None or (real and 0 <= value <= most):
        # one that the core's float32 takes for none is none
        return None if value is None else float(value) if np.float32(value) > 0 else 0.0
    kind = "" if real else f" ({type(value).__name__})"
    raise (ValueError if real else TypeError)(
        f"{name}: expected a number from 0 (none) to {most:g}, got {value!r}{kind}; {advice}"
    )


def _vision_precision(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value in VISION_PRECISIONS):
        return value
    raise ValueError(
        f"vision_precision: expected one of {', '.join(map(repr, VISION_PRECISIONS))}, got "
        f"{value!r}; choose one of these (it is the image encoders', precision the network's)"
    )


def _flag(name: str, value: Any) -> bool | None:
    if value is None or isinstance(value, bool | np.bool_):
        return None if value is None else bool(value)
    raise TypeError(
        f"{name}: expected True or False, got {value!r} ({type(value).__name__}); pass a bool"
    )


def _integer(name: str, value: Any, low: int, high: int) -> int:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole:
        raise TypeError(
            f"{name}: expected an integer from {low} to {high}, got {value!r} "
            f"({type(value).__name__}); pass an int"
        )
    if not low <= value <= high:
        raise ValueError(
            f"{name}: expected an integer from {low} to {high}, got {value}; choose one in this "
            "range"
        )
    return int(value)
