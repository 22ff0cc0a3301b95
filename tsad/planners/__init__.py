"""Planners: who decides what a chunk computes.

A planner is any callable ``planner(policy, sparsity) -> Plan`` (or one plan per lane, in a list);
``policy.planner = planner`` puts it at the dial, and each new ``policy.sparsity`` calls it once.
Its plan should reach the sparsity asked for, counted in cost (`Plan.sparsity`).

The functions here make plans to be set by hand, ``policy.plan = tsad.planners.uniform(policy, 8)``:

* ``dense(policy)``: all computed
* ``uniform(policy, n)``: n evenly spaced steps computed, every other repeats the last one
* ``random(policy, sparsity, seed)``: any valid plan of that cost, for tests
* ``from_file(path)``: what `Plan.save` wrote
* ``import_plan(policy, path)``: schedules of other programs (EVO's pairs, step masks, npy)
* ``c3ache``, ``delta_dit``, ``deepcache``, ``teacache``, ``fbcache``, ``l2c``: published rules

and these are planners, for the dial: ``policy.planner = tsad.planners.Bac(alike)``:

* ``Bac``: published as block-wise adaptive caching, from the similarity of branch outputs
* ``deepcache_sparse``: `deepcache` of one level (UNets)
* ``Scores``: a number per cell (DiP-GO)
* ``Threshold``: `teacache` or `fbcache` from recorded distances
* ``EffectPlanner``: the least effect on the executed actions, as `tsad.training.sensitivity`
  measured it

`RowRule` decides within a chunk, at run time: the first-block cache, or TeaCache.

`Turns` is a policy around a policy: two plans take turns, every so many-th chunk or at random.

A policy's planner can be one of the names in ``NAMES``, too: "dense", "uniform" (`uniform_sparse`),
and "pruner", which is the policy's own and plans each chunk anew from its observation.
"""

from tsad.planners.bac import Bac, similarity
from tsad.planners.base import Planner, PolicyFacts
from tsad.planners.effects import EffectPlanner, Effects
from tsad.planners.files import from_pairs, from_steps, import_plan
from tsad.planners.rules import (
    Threshold,
    c3ache,
    deepcache,
    deepcache_sparse,
    delta_dit,
    fbcache,
    fbcache_rows,
    fit_teacache,
    relative_l1,
    teacache,
    teacache_rows,
)
from tsad.planners.runtime import RowRule
from tsad.planners.scores import Scores, l2c
from tsad.planners.static import dense, from_file, random, uniform, uniform_sparse
from tsad.planners.turns import Turns

NAMES = ("dense", "uniform", "pruner")

__all__ = [
    "NAMES",
    "Bac",
    "EffectPlanner",
    "Effects",
    "Planner",
    "PolicyFacts",
    "RowRule",
    "Scores",
    "Threshold",
    "Turns",
    "c3ache",
    "deepcache",
    "deepcache_sparse",
    "delta_dit",
    "dense",
    "fbcache",
    "fbcache_rows",
    "fit_teacache",
    "from_file",
    "from_pairs",
    "from_steps",
    "import_plan",
    "l2c",
    "random",
    "relative_l1",
    "similarity",
    "teacache",
    "teacache_rows",
    "uniform",
    "uniform_sparse",
]
