"""Policies of random weights on a chosen backend, for the tests of the C engine."""

from __future__ import annotations

from typing import Any

from cases import Tensors, config, random_pruner, random_tensors

from tsad import _core
from tsad.config import PolicyConfig
from tsad.load import make_model
from tsad.reference import ReferencePolicy
from tsad.samplers import make_sampler


def make(
    name: str,
    *,
    seed: int = 0,
    lanes: int = 1,
    threads: int = 1,
    backend: str | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    pruner: bool | str = False,
    tensors: Tensors | None = None,
    precision: str = "float32",
    **scheduler: Any,
) -> _core.Policy:
    """The engine on the named case of cases.py."""
    case = config(name, pruner=pruner, **scheduler)
    weights = random_tensors(case["network"], seed) if tensors is None else tensors
    pruner_weights = random_pruner(case["pruner"], case["network"], seed) if pruner else None
    table = make_sampler(case["scheduler"], sampler=sampler, num_inference_steps=steps)
    parsed = PolicyConfig.from_dict(case)
    model = make_model(parsed, weights, pruner_weights, table, backend=backend, precision=precision)
    return _core.Policy(model, lanes=lanes, threads=threads)


def make_reference(
    name: str,
    *,
    seed: int = 0,
    lanes: int = 1,
    sampler: str | None = None,
    steps: int | None = None,
    pruner: bool | str = False,
    **scheduler: Any,
) -> ReferencePolicy:
    """The specification, in float64, on the same case and weights."""
    case = config(name, pruner=pruner, **scheduler)
    return ReferencePolicy(
        case,
        random_tensors(case["network"], seed),
        random_pruner(case["pruner"], case["network"], seed) if pruner else None,
        lanes=lanes,
        sampler=sampler,
        num_inference_steps=steps,
    )
