"""Presets: settings of a policy that were measured, by name.

``presets.json`` holds them; the plans that they use lie beside it. ``tsad tune --save`` makes them
and ``tsad.load(source, preset="fast")`` applies one. A preset belongs to weights, by their SHA-256:
what was measured of others says nothing of these.

There are two places for the presets of a policy. One is its own folder: they go where it goes. The
other is a folder of the user's, for policies whose folder can't be changed, those that come with
tsad above all: ``$TSAD_HOME/presets/<sha256 of the weights>``; without that variable
``$XDG_DATA_HOME/tsad`` or ``~/.local/share/tsad`` takes its place. `places` says which comes first.

::

  {
    "format": "tsad-presets", "format_version": 1,
    "presets": [
      {
        "name": "fast", "model_sha256": "2ba0801a...",
        "sampler": "ddim", "num_inference_steps": 8, "timestep_spacing": "leading",
        "precision": "int16", "n_action_steps": 8,
        "planner": "uniform", "sparsity": 0.75,
        "measured": {"milliseconds": 1.9, ...}
      }
    ]
  }

Instead of ``planner`` and ``sparsity`` there may be ``plan``, the name of a file, with
``plan_sha256``, of its bytes. Without any of them it is dense. ``n_action_steps`` is what a chunk
returns, if not all, and ``warm_start`` how many of the steps a chunk runs that starts from the one
before it; a plan, or planner and sparsity, are then of these steps. ``lead`` and ``smoothing`` are
what is made of the actions that are executed, ``reuse_images`` and ``vision_precision`` the bound
and the encoders' precision of a policy that sees.
``rule`` is an object of `tsad.rule` instead of planner, sparsity and plan, one that decides within
a chunk. With the planner "pruner" there is ``pruner_sha256``, of the pruner's file.
``fitted`` is the name of a file of `tsad fit`, with ``fitted_sha256``, of its bytes. ``measured``
is free: loss and interval, offline error, milliseconds, passes, the machine.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from tsad.checkpoint import MODEL_FILE, PRUNER_FILE, CheckpointError, format_json, read_json
from tsad.config import (
    MAX_HORIZON,
    MAX_TIMESTEPS,
    SAMPLERS,
    TIMESTEP_SPACINGS,
    Section,
)
from tsad.files import (
    Lock,
    is_bundled,
    make_folder,
    output_file,
    output_folder,
    sha256,
    user_folder,
    write_together,
)
from tsad.fitted import Fitted
from tsad.plan import Plan
from tsad.planners import NAMES as PLANNERS
from tsad.planners import RowRule
from tsad.rule import rule_of, rule_words
from tsad.setting import LOADED, MAX_LEAD, MAX_REUSE, MOVED, VISION_PRECISIONS, Setting

PRESETS_FILE = "presets.json"
FORMAT = "tsad-presets"
FORMAT_VERSION = 1
PRECISIONS = ("float32", "int16", "int8")
LOCK_SECONDS = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Preset(Setting):
    """A setting with a name, the weights that it belongs to, and what was measured.

    The fields are the keys of the module docstring; sampler, steps and spacing are always set.
    ``plan`` is the path of the plan file, in the folder that it was read from; None without one.
    """

    name: str
    model_sha256: str
    precision: str | None = field(default="float32", kw_only=True)
    plan: Path | None = field(default=None, kw_only=True)
    plan_sha256: str | None = field(default=None, kw_only=True)
    fitted: Fitted | Path | None = field(default=None, kw_only=True)
    fitted_sha256: str | None = field(default=None, kw_only=True)
    pruner_sha256: str | None = field(default=None, kw_only=True)
    measured: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """The object of ``presets.json``, without what is not set."""
        values = super().to_dict()
        last = ("plan", "plan_sha256", "fitted", "fitted_sha256", "pruner_sha256", "measured")
        return {
            "name": self.name,
            "model_sha256": self.model_sha256,
            **{name: value for name, value in values.items() if name not in last},
            **{name: values[name] for name in last if name in values},
        }

    def load_plan(self, policy: Any = None) -> Plan | None:
        """Its plan; ``CheckpointError`` if the file is missing or not the one it was made with."""
        if self.plan is None:
            return None
        self._check(self.plan, "plan", self.plan_sha256)
        return Plan.load(self.plan)

    def load_fitted(self) -> Fitted | None:
        """What was fitted for it; ``CheckpointError`` as of `load_plan`."""
        if isinstance(self.fitted, Path):
            self._check(self.fitted, "fitted", self.fitted_sha256)
        return super().load_fitted()

    def _check(self, path: Path, kind: str, wanted: str | None) -> None:
        """CheckpointError unless a file is the one that the preset was made with."""
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise CheckpointError(
                f"{path}: the {kind} of the preset {self.name!r} can't be read ({error}); copy "
                f"it beside {PRESETS_FILE}, or make the preset anew"
            ) from error
        if found != wanted:
            raise CheckpointError(
                f"{path}: expected the {kind} of the preset {self.name!r}, sha256 "
                f"{wanted}, got {found}; restore the file, or make the preset anew"
            )

    def words(self) -> str:
        """The setting in one line, e.g. "ddim, 8 steps leading, uniform 75 %, int16"."""
        parts = [str(self.sampler), f"{self.num_inference_steps} steps {self.timestep_spacing}"]
        if self.warm_start is not None:
            parts.append(f"warm start of {self.warm_start}")
        if self.plan is not None:
            parts.append(f"plan {self.plan.name}")
        elif self.rule is not None:
            parts.append(rule_words(self.rule))
        elif self.planner == "pruner" and self.sparsity is None:
            parts.append("pruner, its own sparsity")
        elif self.sparsity:
            parts.append(f"{self.planner or 'sparsity'} {100 * self.sparsity:.4g} %")
        else:
            parts.append("dense")
        if self.n_action_steps is not None:
            parts.append(f"{self.n_action_steps} actions of a chunk")
        if self.fitted is not None:
            parts.append("fitted")
        if self.smoothing:
            parts.append("smoothed")
        if self.lead:
            parts.append(f"lead {self.lead:g}")
        if self.reuse_images:
            parts.append(f"images within {self.reuse_images:g} reused")
        if self.vision_precision not in (None, "float32"):
            parts.append(f"images in {self.vision_precision}")
        return ", ".join([*parts, str(self.precision)])


def model_sha256(folder: Path) -> str:
    """SHA-256 of a folder's weights; ``CheckpointError`` if they can't be read."""
    try:
        return sha256(folder / MODEL_FILE)
    except OSError as error:
        raise CheckpointError(
            f"{folder / MODEL_FILE}: the weights can't be read ({error.strerror}), and presets "
            "belong to weights; give a tsad folder (tsad convert makes one)"
        ) from error


def read_presets(folder: Path) -> dict[str, Preset]:
    """The presets in a folder by name, those of other weights included; {} without the file.

    ``ValueError`` names the file, the preset and the key that is wrong.
    """
    path = folder / PRESETS_FILE
    if not path.exists():
        return {}
    section = Section(read_json(path), "", str(path))
    section.choice("format", (FORMAT,))
    version = section.take("format_version")
    if isinstance(version, bool) or version != FORMAT_VERSION:
        raise section.error("format_version", str(FORMAT_VERSION), version, "update tsad")
    rows = section.take("presets")
    section.done()
    if not isinstance(rows, list):
        raise section.error("presets", "a list of objects", rows)
    presets: dict[str, Preset] = {}
    for number, row in enumerate(rows):
        part = Section(row, f"presets[{number}]", str(path))
        preset = _read(part, folder)
        if preset.name in presets:
            raise part.error("name", "each name once", preset.name, "rename one of them")
        presets[preset.name] = preset
    return presets


def _read(section: Section, folder: Path) -> Preset:
    """One checked preset."""

    def text(key: str, pattern: str, expected: str) -> str:
        value = section.take(key)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise section.error(key, expected, value)
        return value

    def has(key: str) -> bool:
        section.known.append(key)
        return key in section.data

    preset = Preset(
        name=text("name", _NAME.pattern, "letters, digits, dots, dashes and underscores"),
        model_sha256=text("model_sha256", "[0-9a-f]{64}", "64 hexadecimal digits"),
        sampler=section.choice("sampler", SAMPLERS),
        num_inference_steps=section.integer("num_inference_steps", 1, MAX_TIMESTEPS),
        timestep_spacing=section.choice("timestep_spacing", TIMESTEP_SPACINGS),
        precision=section.choice("precision", PRECISIONS, "float32"),
        n_action_steps=section.integer("n_action_steps", 1, MAX_HORIZON)
        if has("n_action_steps")
        else None,
        warm_start=section.integer("warm_start", 1, MAX_TIMESTEPS) if has("warm_start") else None,
        lead=section.number("lead", -1.0, MAX_LEAD) if has("lead") else None,
        smoothing=section.flag("smoothing", False) if has("smoothing") else None,
        reuse_images=section.number("reuse_images", -1.0, MAX_REUSE)
        if has("reuse_images")
        else None,
        vision_precision=section.choice("vision_precision", VISION_PRECISIONS)
        if has("vision_precision")
        else None,
        planner=section.choice("planner", PLANNERS) if has("planner") else None,
        # a number above -1, then: 0 is dense
        sparsity=section.number("sparsity", -1.0, 1.0) if has("sparsity") else None,
        # in this folder, whatever the file says
        plan=folder / text("plan", _NAME.pattern, "the name of a file beside this one")
        if has("plan")
        else None,
        plan_sha256=text("plan_sha256", "[0-9a-f]{64}", "64 hexadecimal digits")
        if has("plan_sha256")
        else None,
        fitted=folder / text("fitted", _NAME.pattern, "the name of a file beside this one")
        if has("fitted")
        else None,
        fitted_sha256=text("fitted_sha256", "[0-9a-f]{64}", "64 hexadecimal digits")
        if has("fitted_sha256")
        else None,
        pruner_sha256=text("pruner_sha256", "[0-9a-f]{64}", "64 hexadecimal digits")
        if has("pruner_sha256")
        else None,
        rule=_rule(section) if has("rule") else None,
        measured=section.take("measured", {}),
    )
    section.done()
    if preset.sparsity is not None and preset.sparsity < 0:
        raise section.error("sparsity", "a number from 0 (dense) to 1", preset.sparsity)
    if preset.lead is not None and preset.lead < 0:
        raise section.error("lead", f"a number from 0 (none) to {MAX_LEAD:g}", preset.lead)
    if preset.reuse_images is not None and preset.reuse_images < 0:
        expected = f"a number from 0 (none) to {MAX_REUSE:g}"
        raise section.error("reuse_images", expected, preset.reuse_images)
    if preset.plan is not None and (preset.planner is not None or preset.sparsity is not None):
        raise section.error("plan", "no planner or sparsity beside it", preset.plan.name)
    others = (preset.plan, preset.planner, preset.sparsity, preset.fitted)
    if preset.rule is not None and others != (None,) * 4:
        raise section.error("rule", "no plan, planner, sparsity or fitted beside it", preset.rule)
    for key in ("plan", "fitted"):
        if (getattr(preset, key) is None) != (getattr(preset, f"{key}_sha256") is None):
            expected, fix = f"{key} and {key}_sha256, or neither", "add or remove one"
            raise section.error(key, expected, "one of them", fix)
    if not isinstance(preset.measured, Mapping):
        raise section.error("measured", "a JSON object", preset.measured)
    return preset


def _rule(section: Section) -> RowRule:
    """One that decides within a chunk: a policy that is loaded has no plans that take turns."""
    given = section.take("rule")
    try:
        rule = rule_of(given)
    except (ValueError, TypeError) as error:
        raise section.error("rule", "a rule of tsad.rule", given, str(error)) from error
    if not isinstance(rule, RowRule):
        expected = "a rule that decides within a chunk"
        raise section.error("rule", expected, given, 'e.g. {"fbcache": 0.2}')
    return rule


def home() -> Path:
    """Where this user's presets are; there or not."""
    return user_folder("XDG_DATA_HOME", ".local/share")


def places(folder: Path) -> list[Path]:
    """The folders of a policy's presets, the first first: where new ones go, and old are found.

    It is the policy's own folder if you may change that, and yours else; then the other.
    """
    yours = home() / "presets" / model_sha256(folder)
    own = os.access(folder, os.W_OK) and not is_bundled(folder)
    return [folder, yours] if own else [yours, folder]


def known_presets(folder: Path) -> tuple[dict[str, Preset], list[ValueError]]:
    """The presets of a policy by name, from all its places, and what is wrong with their files.

    What one place has hides what the next has under the same name, unless it was made for other
    weights; a file that can't be read hides nothing.
    """
    presets: dict[str, Preset] = {}
    wrong, found = [], model_sha256(folder)
    for place in places(folder):
        try:
            for name, preset in read_presets(place).items():
                if name not in presets or presets[name].model_sha256 != found:
                    presets[name] = preset
        except ValueError as error:
            wrong.append(error)
        except OSError as error:
            text = f"{place / PRESETS_FILE}: can't be read ({error.strerror})"
            wrong.append(CheckpointError(f"{text}; make it readable, or remove it"))
    return presets, wrong


def find_preset(folder: Path | None, name: str, source: str) -> Preset:
    """The preset of that name, made for these weights; ``ValueError`` says what there is.

    ``folder`` is the policy's, None if it has none; ``source`` names the policy in messages. A
    file of presets that can't be read is a warning, if the preset is found without it.
    """
    if not isinstance(name, str):
        raise TypeError(f"preset: expected a name, got {name!r} ({type(name).__name__})")
    if folder is None:
        raise ValueError(
            f"preset: got {name!r}, but {source!r} is a checkpoint, and only folders hold presets; "
            "make one with: tsad convert CHECKPOINT FOLDER"
        )
    presets, wrong = known_presets(folder)
    for error in wrong:
        if name not in presets:
            raise error
        warnings.warn(f"{error} (until then its presets are left out)", stacklevel=3)
    if name not in presets:
        there = f"the presets {', '.join(map(repr, presets))}" if presets else "no presets"
        near = difflib.get_close_matches(name.lower(), presets, 1)
        fix = f"did you mean {near[0]!r}?" if near else "tsad tune --save makes some"
        raise ValueError(f"preset: got {name!r}, but {source!r} has {there}; {fix}")
    preset, found = presets[name], model_sha256(folder)
    if preset.model_sha256 != found:
        raise ValueError(
            f"preset: {name!r} was made for other weights, {MODEL_FILE} of sha256 "
            f"{preset.model_sha256}, and this policy's is {found}; make it anew"
        )
    _check_pruner(preset, folder)
    return preset


def pruner_sha256(folder: Path) -> str | None:
    """SHA-256 of a folder's pruner; None if it has none."""
    path = folder / PRUNER_FILE
    return sha256(path) if path.is_file() else None


def _check_pruner(preset: Preset, folder: Path) -> None:
    """ValueError if a preset runs a pruner, and was measured with another than is there."""
    wanted = preset.pruner_sha256
    if wanted is not None and wanted != (found := pruner_sha256(folder)):
        raise ValueError(
            f"preset: {preset.name!r} was measured with the pruner of sha256 {wanted}, and this "
            f"policy's is {found}; restore {PRUNER_FILE}, or make the preset anew"
        )


def check_clash(preset: Preset, asked: Setting) -> None:
    """``ValueError`` if what is asked beside the preset says otherwise."""
    for name in (*LOADED, "n_action_steps"):
        value, own = getattr(asked, name), getattr(preset, name)
        none = name in (*MOVED, "reuse_images") and not value and not own
        none = none or (name, value, own) == ("vision_precision", "float32", None)
        if value is not None and value != own and not none:
            raise ValueError(
                f"{name}: got {value!r}, but the preset {preset.name!r} has {own!r}, and what was "
                "measured is the whole of it; leave out one of the two"
            )
    for name in ("plan", "planner", "sparsity", "rule"):
        if (value := getattr(asked, name)) is not None:
            raise ValueError(
                f"{name}: got {value!r}, but the preset {preset.name!r} decides what is computed; "
                "leave out one of the two"
            )


def place_for(folder: Path, names: Iterable[str], *, overwrite: bool) -> Path:
    """Where new presets of a policy go, after checking that those of these names can.

    ``OSError`` if the place can't be written, or has one of them and ``overwrite`` is false;
    ``ValueError`` if what is there can't be read.
    """
    place = places(folder)[0]
    output_folder(place)
    if not (place / PRESETS_FILE).exists():
        return place
    output_file(place / PRESETS_FILE, overwrite=True)
    there = read_presets(place).keys() & names
    if there - set(stale(folder, place)) and not overwrite:
        raise FileExistsError(
            f"{place / PRESETS_FILE} has {' and '.join(sorted(there))}; --overwrite replaces them"
        )
    return place


def save_presets(folder: Path, presets: Iterable[tuple[Preset, Plan | None]]) -> None:
    """Put presets into a folder, one of `places`, which is made if it is missing.

    Others that are there stay, those of equal name are replaced; who else saves some waits. A plan
    becomes the file ``preset-NAME.npz``, what is fitted ``preset-NAME-fitted.json``; these are
    replaced first, so whoever is interrupted leaves
    presets that are refused, never ones that run another plan.
    """
    make_folder(folder)
    with Lock(folder / PRESETS_FILE, wait=LOCK_SECONDS):
        _save(folder, read_presets(folder), presets)


def _save(
    folder: Path, kept: dict[str, Preset], presets: Iterable[tuple[Preset, Plan | None]]
) -> None:
    files: dict[Path, bytes] = {}
    for preset, plan in presets:
        values = vars(preset) | dict.fromkeys(("plan", "plan_sha256", "fitted", "fitted_sha256"))
        own: dict[str, tuple[str, bytes]] = {}
        if plan is not None:
            buffer = BytesIO()
            plan.write(buffer)
            own["plan"] = f"preset-{preset.name}.npz", buffer.getvalue()
        if (fitted := preset.load_fitted()) is not None:
            own["fitted"] = f"preset-{preset.name}-fitted.json", fitted.to_bytes()
        for key, (name, content) in own.items():
            files[folder / name] = content
            digest = hashlib.sha256(content).hexdigest()
            values |= {key: folder / name, f"{key}_sha256": digest}
        kept[preset.name] = Preset(**values)
    rows = ",\n".join("    " + format_json(p.to_dict(), "    ") for p in kept.values())
    text = (
        f'{{\n  "format": "{FORMAT}",\n  "format_version": {FORMAT_VERSION},\n'
        f'  "presets": [\n{rows}\n  ]\n}}\n'
    )
    write_together({**files, folder / PRESETS_FILE: text.encode()})


def stale(folder: Path, place: Path | None = None) -> list[str]:
    """Names of the presets in a folder, or another place, made for other weights than are in it."""
    presets = read_presets(place or folder)
    found = model_sha256(folder) if presets else ""
    return [name for name, preset in presets.items() if preset.model_sha256 != found]


def stale_note(folder: Path) -> list[str]:
    """What to tell whoever has just replaced a folder's weights, in one line or none."""
    names = stale(folder)
    if not names:
        return []
    return [
        f"{PRESETS_FILE} stays, but its {', '.join(names)} were made for other weights and are "
        "refused; tsad tune --save makes new ones"
    ]
