"""Planners: who decides what a chunk computes.

A planner is any callable ``planner(policy, sparsity) -> Plan`` (or one plan per lane, in a list);
``policy.planner = planner`` puts it at the dial, and each new ``policy.sparsity`` calls it once.
Its plan should reach the sparsity asked for, counted in cost (`Plan.sparsity`).

The functions here make plans to be set by hand, ``policy.plan = tsad.planners.uniform(policy, 8)``:

* ``dense(policy)``: all computed
* ``uniform(policy, n)``: n evenly spaced steps computed, every other repeats the last one
* ``random(policy, sparsity, seed)``: any valid plan of that cost, for tests
* ``from_file(path)``: what `Plan.save` wrote

A policy's planner can be one of the names in ``NAMES``, too: "dense", "uniform" (`uniform_sparse`),
and "pruner", which is the policy's own and plans each chunk anew from its observation.
"""

from tsad.planners.base import Planner, PolicyFacts
from tsad.planners.static import dense, from_file, random, uniform, uniform_sparse

NAMES = ("dense", "uniform", "pruner")

__all__ = [
    "NAMES",
    "Planner",
    "PolicyFacts",
    "dense",
    "from_file",
    "random",
    "uniform",
    "uniform_sparse",
]
