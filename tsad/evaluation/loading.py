"""Policies as arguments and settings ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tsad.evaluation.usage import DIAL, OPTIONS, RULE, argument
from tsad.load import policy_folder, read_policy
from tsad.presets import check_clash, find_preset
from tsad.setting import Setting

if TYPE_CHECKING:
    from tsad import SparsePolicy


def setting_of(words: Mapping[str, Any], source: str) -> Setting:
    """What arguments, or a row of a settings file, say, or the preset that they name.

    UsageError if a preset isn't there, or other words contradict it.
    """
    with argument("--rule", RULE):
        asked = Setting.of(words)
    name = words.get("preset")
    if name is None:
        return asked
    with argument("--preset", OPTIONS | DIAL):
        folder = policy_folder(source)
        preset = find_preset(folder, name, source)
        check_clash(preset, asked)
        preset.load_plan()
        preset.load_fitted()
        scheduler = read_policy(source)[0].scheduler
    # None where it is the policy's own: the same settings then go on with each other's episodes
    own = preset.timestep_spacing == scheduler.timestep_spacing
    return replace(preset, timestep_spacing=None) if own else preset


def load_policy(
    source: str,
    machine: Any,
    *,
    name: str,
    lanes: int,
    setting: Setting | None = None,
    **more: Any,
) -> SparsePolicy:
    """`tsad.load` on a machine's ``device`` and ``threads``; UsageError names the argument.

    ``setting`` is what is loaded, else what the machine's other words say; `configure` sets the
    rest of it.
    """
    import tsad

    setting = Setting.of(vars(machine)) if setting is None else setting
    with argument(name):
        options = {**setting.options(), "device": machine.device, "threads": machine.threads}
        return tsad.load(source, lanes=lanes, **options, **more)


def configure(policy: SparsePolicy, setting: Setting) -> None:
    """`Setting.apply`; UsageError names the argument."""
    if setting.rule is not None:
        with argument("--rule", dict.fromkeys(DIAL, "--rule")):
            setting.apply(policy)
        return
    with argument("--plan", DIAL):
        if setting.plan is None and setting.planner is not None:
            policy.planner = setting.planner
        if setting.plan is None:
            check_sparsity(policy, setting.sparsity or 0.0)
        setting.apply(policy)


def check_sparsity(policy: SparsePolicy, value: float) -> None:
    """``ValueError``, in this command line's words, beyond what the planner reaches."""
    if value > policy.max_sparsity:
        raise ValueError(
            f"sparsity: got {value:g}, but the planner {policy.planner!r} reaches "
            f"{policy.max_sparsity:.4g} at {policy.num_inference_steps} steps; "
            "use less, or more --steps"
        )
