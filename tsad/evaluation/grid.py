"""The settings that `tsad tune` tries by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tsad.evaluation.sweep import fitting
from tsad.planners import RowRule

if TYPE_CHECKING:
    from tsad import SparsePolicy

FEW_STEPS, FEWEST = (16, 10, 8, 6, 5, 4, 3, 2), 2
DPM_STEPS = (10, 8, 5, 4)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
# Steps computed: what few steps extrapolate from is a matter of where they are (bench/frontier).
MASKS = (("dpmsolver++", "10000010"), ("dpmsolver++", "10010010"), ("ddim", "10000100"))
# Steps, spacing, the last that a warm chunk runs, those computed of them, and whether half of the
# actions are executed: a warm start knows more of a chunk the fewer actions of the last one were.
WARM: tuple[tuple[int, str, int, str | None, bool], ...] = (
    (16, "trailing", 8, "10000000", False),
    (16, "trailing", 8, "10001000", False),
    (8, "leading", 4, None, True),
    (8, "trailing", 4, "1010", True),
)
SPARSE_FEW = ((16, 0.75), (16, 0.875), (8, 0.5), (8, 0.75), (4, 0.5))
# What is made of executed actions: the gain of a lead is a matter of the simulator's controller.
LEADS: tuple[dict[str, Any], ...] = (
    {"smoothing": True, "lead": 0.1},
    {"smoothing": True, "lead": 0.2},
    {"smoothing": True, "lead": 0.3},
    {"lead": 0.2},
)
PRUNED = (0.8, 0.9, 0.95)  # and its own choice
# Rules that look within a chunk, of so many steps of DDIM: their thresholds are what is tolerated.
RULED_STEPS, RULES = 16, {"fbcache": (0.1, 0.2, 0.4), "teacache": (0.25, 0.5, 1.0)}


def default_grid(policy: SparsePolicy) -> list[dict[str, Any]]:
    """Settings for a policy: its own, fewer steps of other samplers, some of the steps."""

    def computed(mask: str) -> str:
        return "-".join(str(step) for step, bit in enumerate(mask) if bit == "1")

    own = policy.num_inference_steps
    rows: list[dict[str, Any]] = [{"name": "dense"}]
    rows += [
        {"name": f"uniform-{100 * s:g}", "planner": "uniform", "sparsity": s}
        for s in SPARSITIES
        if (1 - s) * own >= FEWEST
    ]
    for spacing in ("leading", "trailing"):
        for steps in FEW_STEPS:
            name = f"ddim-{steps}" + ("-trailing" if spacing == "trailing" else "")
            rows.append({"name": name, "sampler": "ddim", "steps": steps, "spacing": spacing})
    rows += [
        {"name": f"dpm-{steps}", "sampler": "dpmsolver++", "steps": steps} for steps in DPM_STEPS
    ]
    for steps, s in SPARSE_FEW:
        row = {"name": f"ddim-{steps}-uniform-{100 * s:g}", "sampler": "ddim", "steps": steps}
        rows.append({**row, "planner": "uniform", "sparsity": s})
    for sampler, mask in MASKS:
        name = f"{sampler.removesuffix('solver++')}-{len(mask)}-rows-{computed(mask)}"
        rows.append({"name": name, "sampler": sampler, "steps": len(mask), "plan": mask})
    rows += _decided(policy)
    half = max(1, policy.n_action_steps // 2)
    for steps, spacing, last, some, halved in WARM:
        row = {"sampler": "ddim", "steps": steps, "spacing": spacing, "warm_start": last}
        name = f"ddim-{steps}" + ("-trailing" if spacing == "trailing" else "")
        name += f"-warm-{last}" + ("" if some is None else f"-rows-{computed(some)}")
        row |= ({"n_action_steps": half} if halved else {}) | (
            {} if some is None else {"plan": some}
        )
        rows.append({"name": name + (f"-{half}-actions" if halved else ""), **row})
    return [row for row in fitting(policy, rows) if row.get("steps", 0) < own]


def _decided(policy: SparsePolicy) -> list[dict[str, Any]]:
    """Settings in which a pruner or a rule decides, where the policy has them."""
    rows: list[dict[str, Any]] = []
    if policy.has_pruner:
        rows += [
            {"name": f"pruner-{100 * s:g}", "planner": "pruner", "sparsity": s} for s in PRUNED
        ]
        rows.append({"name": "pruner-own", "planner": "pruner"})
    for kind, thresholds in RULES.items():
        if RowRule(kind, 0.0).refusal(policy) is None:
            rows += [
                {
                    "name": f"ddim-{RULED_STEPS}-{kind}-{threshold:g}",
                    "sampler": "ddim",
                    "steps": RULED_STEPS,
                    "rule": {kind: threshold},
                }
                for threshold in thresholds
            ]
    return rows
