"""`SparsePolicy`: a model, its memory, and the dial."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad import _core, planners
from tsad.attributes import advice
from tsad.config import block_names, block_types
from tsad.plan import REUSE_ROLLOUT, SOURCE_NAMES, Plan
from tsad.planners import Planner, checks
from tsad.precision import FLOAT32_BOUND, exact_twin, measured_bound, rounding
from tsad.samplers import tail

if TYPE_CHECKING:
    from tsad.config import PolicyConfig
    from tsad.fitted import Fitted
    from tsad.samplers import Sampler

# What runs: planner, dial, one plan per lane (None: the pruner's), whether the user fixed them, and
# the plans of cold chunks (None: dense).
Choice = tuple["str | Planner", "float | None", "list[Plan] | None", bool, "list[Plan] | None"]


class SparsePolicy(_core.Policy):
    """A diffusion policy that runs each chunk along a plan. Made by `tsad.load`.

    ``policy(obs)`` runs one chunk: ``obs`` float32 (lanes, n_obs_steps, obs_dim) in raw units, the
    newest observation last; the result is float32 (lanes, n_action_steps, action_dim). With one
    lane, ``obs`` (n_obs_steps, obs_dim) gives (n_action_steps, action_dim). Where an observation's
    features have names (``config["features"]``, a LeRobot policy's), ``obs`` may be a dict of
    arrays by name, each (lanes, n_obs_steps, its numbers) or without the first axis. Keywords:
    ``out`` writes into your array; ``noise`` (K, lanes, horizon, action_dim) replaces the policy's
    own, or (lanes, horizon, action_dim) the initial sample alone; ``lanes`` runs a subset, listed
    or marked by a mask of one bool per lane; ``return_horizon`` returns all actions, as
    predicted. Arrays are borrowed, not copied (those of a dict are): NumPy, or anything with
    DLPack (torch, JAX ...) in host memory; the result is of the library of ``obs``, of a dict's
    first feature. A policy on a GPU takes arrays in that GPU's memory, too: it reads them after
    what torch's current stream holds (or the default stream, of other libraries), and what that
    stream gets next comes after ``out`` is written. Torch's ``out`` is not waited for: the call
    returns at once, and whatever is asked of the policy next waits and says what failed; ``out``
    is NaN then, and the lanes start anew. Without ``out`` the result is a NumPy array. A refused
    call changes nothing, but for numbers on the GPU (NaN, too large), which are found while the
    chunk runs: its lanes start anew. Observations whose normalised
    magnitude passes 1e12 are refused: the network can't represent them. If it overflows all the
    same, the call raises ``RuntimeError`` and returns nothing, and its lanes start anew, as after
    `reset`; only their streams of noise have gone on.

    ``policy.sparsity = 0.95`` turns the dial, ``policy.plan = plan`` fixes a plan, and
    ``policy.reset(seed=0)`` starts an episode. A new policy is dense.

    With a warm start of N (`tsad.load`) a chunk is denoised from the one before it, in the last N
    steps alone. Only the first chunk after a reset, the cold one, runs all K from pure noise. Every
    later one starts at step K - N with

        x = sqrt(alphas_cumprod) shifted + sqrt(1 - alphas_cumprod) noise

    at the noise level of that step (of flow matching, at time t: t shifted + (1 - t) noise).
    ``shifted`` is the lane's previous chunk, all of its horizon,
    normalised, moved by the actions executed since: index j is what index j + executed was, and the
    last action fills the end. ``executed`` says how many those are, 0 to horizon, one number for
    all lanes of the call or one per row; without it all that a chunk returns. Plans, the dial,
    ``num_inference_steps``, ``predict_noise`` and ``stats`` are those of the warm chunks, N steps.
    A plan that reads no rollout is followed from the first warm chunk on; one that does begins with
    its ``first``, as ever. There is no planner "pruner": a pruner is trained for all the steps.
    ``noise`` is of all K steps; what it has at step K - N is what a warm chunk begins with.
    ``tsad.reference.WarmReference`` is the specification; sources: RTI-DP (arXiv 2508.05396) and
    Falcon (2503.00339), here without its candidates.

    What `tsad fit` found (`fitted`) replaces coefficients of the sampler, and afterwards a warm
    chunk x is x + gain (x - shifted) + shift, normalised, within what the sampler clips to; without
    a warm start there is only the shift. The next chunk goes on from that.

    A lead (`tsad.load`) needs to know ``executed`` as well: a call without ``return_horizon``
    returns each action a, smoothed or not, as a + lead (a - last), where ``last`` is what the
    lane's previous chunk has for its time, moved as above; in an episode's first chunk, a. Where
    the sampler clips, that is clipped to the same range. ``tsad.reference.LeadReference`` is the
    specification.

    One thread at a time: while a chunk runs, others get ``RuntimeError``, setters and `reset`
    included. The GIL is free meanwhile.

    ``copy.copy`` and ``copy.deepcopy`` give a policy of its own that shares the immutable model.
    ``pickle`` keeps what `tsad.load` was asked for, which is asked again where it is unpickled
    (in another process, say): of the same files, then. Both keep plan, planner and dial. Neither
    keeps the episode: the new policy is as after a `reset`, and its noise another.
    """

    __slots__ = (
        "__weakref__",
        "_blocks",
        "_cold",
        "_config",
        "_device",
        "_dial",
        "_error_bound",
        "_fitted",
        "_fixed",
        "_lead",
        "_loaded",
        "_planner",
        "_plans",
        "_precision",
        "_sampler",
        "_smoothing",
        "_types",
        "_warm_start",
    )

    def __init__(
        self,
        model: _core.Model,
        *,
        config: PolicyConfig,
        sampler: Sampler,
        lanes: int = 1,
        threads: int = 1,
        device: str = "cpu",
        precision: str = "float32",
        warm_start: int | None = None,
        lead: float = 0.0,
        smoothing: bool = False,
        fitted: Fitted | None = None,
    ) -> None:
        start = None
        if warm_start is not None:
            last = tail(sampler, warm_start)
            last = last if fitted is None else fitted.applied(last)
            start = (np.ascontiguousarray(last.table, np.float32), *last.mixture(0))
        super().__init__(
            model,
            lanes=lanes,
            threads=threads,
            warm_start=start,
            lead=lead,
            smoothing=smoothing,
            features=config.named_numbers,
            correction=None if fitted is None else fitted.correction(),
        )
        self._warm_start, self._fitted = warm_start, fitted
        self._lead, self._smoothing = lead, smoothing
        self._config = config
        self._sampler = sampler
        self._device = device
        self._precision = precision
        self._loaded: tuple[str, dict[str, Any]] | None = None  # source and options of `tsad.load`
        self._error_bound: float | None = FLOAT32_BOUND if precision == "float32" else None
        self._blocks = block_names(config.network)
        self._types = block_types(config.network)
        if len(self._blocks) != self.n_blocks or len(sampler.timesteps) != model.n_steps:
            raise ValueError(
                f"config, sampler: expected {self.n_blocks} blocks and {model.n_steps} "
                f"steps as the model has, got {len(self._blocks)} and {len(sampler.timesteps)}; "
                "make the model from them (tsad.load)"
            )
        own = config.pruner is None or config.pruner.default
        self._planner: str | Planner = "pruner" if self.has_pruner and own else "uniform"
        self._dial: float | None = 0.0
        self._fixed = False  # by the user
        self._plans: list[Plan] | None = None  # one per lane; None: the pruner plans
        self._cold: list[Plan] | None = None  # with a warm start; None: dense
        self._follow(self._planner, self._dial)

    # ---- the dial

    @property
    def sparsity(self) -> float | None:
        """The dial: the fraction of a chunk's cost that is saved, 0 (dense) to `max_sparsity`.

        The planner meets it at least, in chunks after the first of an episode. None: the pruner
        decides by its own scores; that needs the planner "pruner". With a fixed `plan` this is the
        plan's (its mean over the lanes). Setting it frees a fixed plan.
        """
        if self._fixed and self._plans is not None:
            return float(np.mean([plan.sparsity for plan in self._plans]))
        return self._dial

    @sparsity.setter
    def sparsity(self, value: float | None) -> None:
        self._follow(self._planner, self._check_dial(self._planner, value))

    @property
    def max_sparsity(self) -> float:
        """The end of the dial: 1 - 1/K, as step 0 is computed; 0 with the planner "dense"."""
        return checks.end_of_dial(self._planner, self.num_inference_steps)

    @property
    def planner(self) -> str | Planner:
        """Who turns the dial into plans: "dense", "uniform", "pruner", or your own `Planner`.

        At first it is "pruner" where the policy has one and its ``config.json`` does not say
        ``"default": false`` of it (the bundled policy's does), else "uniform".
        Setting it keeps the dial (the planner "dense" turns it to 0) and frees a fixed plan.
        """
        return self._planner

    @planner.setter
    def planner(self, planner: str | Planner) -> None:
        choices = ", ".join(map(repr, planners.NAMES))
        if not (planner in planners.NAMES if isinstance(planner, str) else callable(planner)):
            raise ValueError(
                f"planner: expected one of {choices}, or a callable (policy, sparsity) -> Plan, "
                f"got {planner!r}; choose one of these"
            )
        if planner == "pruner" and not self.has_pruner:
            fix = "choose 'uniform', or load a folder with pruner.safetensors, and no warm_start"
            raise ValueError(f"planner: got 'pruner', but this policy has none; {fix}")
        dial = 0.0 if planner == "dense" or self._dial is None else self._dial
        rule = isinstance(planner, planners.RowRule)
        self._follow(planner, self._check_dial(planner, None if rule else dial))

    @property
    def plan(self) -> Plan | list[Plan]:
        """The last executed plan, a copy (a list for several lanes).

        A lane that has not run since its reset shows the plan that it will run. Set a `Plan`, or
        one per lane, to fix it, and None to give the choice back to the planner. In the middle of
        an episode a plan is refused if it reuses a rollout that is not there.
        """
        plans = [self._executed(lane) for lane in range(self.lanes)]
        return plans[0] if self.lanes == 1 else plans

    @plan.setter
    def plan(self, plan: Plan | Sequence[Plan] | None) -> None:
        if plan is None:
            self._follow(self._planner, self._dial)
        else:
            self._adopt((self._planner, self._dial, self._bind(plan), True, self._cold))

    @property
    def cold_plan(self) -> Plan | list[Plan] | None:
        """With a warm start: the plan of an episode's first chunk, of all steps; None: dense.

        A list for several lanes. Set a `Plan` without ``first`` that reads no rollout, or one per
        lane.
        """
        return self._cold[0] if self._cold is not None and self.lanes == 1 else self._cold

    @cold_plan.setter
    def cold_plan(self, plan: Plan | Sequence[Plan] | None) -> None:
        if plan is not None and self._warm_start is None:
            raise ValueError(
                "cold_plan: expected None, as this policy has no warm start, got a plan; the first "
                "chunk's is policy.plan.first, or load it with warm_start=N"
            )
        bound = None if plan is None else self._bind(plan, "cold_plan")
        if bound is not None and any(p.first is not None for p in bound):
            raise ValueError(
                "cold_plan: expected a plan without `first`, as it is of the first chunk alone, "
                "got one with it; pass Plan(plan.first.sources)"
            )
        self._adopt((self._planner, self._dial, self._plans, self._fixed, bound))

    def _check_dial(self, planner: str | Planner, value: float | None) -> float | None:
        return checks.check_dial(planner, value, self.num_inference_steps)

    def _follow(self, planner: str | Planner, dial: float | None) -> None:
        """Let the planner decide; if it fails or the policy is busy, nothing has changed."""
        plans: list[Plan] | None = None
        if dial == 0 and isinstance(planner, str):
            plans = self._bind(planners.dense(self))
        elif planner == "uniform" and dial is not None:
            plans = self._bind(planners.uniform_sparse(self, dial))
        elif not isinstance(planner, str | planners.RowRule):
            plans = self._bind(planner(self, 0.0 if dial is None else dial))
        self._adopt((planner, dial, plans, False, self._cold))

    def _adopt(self, choice: Choice) -> None:
        """Run along these plans, or the pruner's; if the policy is busy, nothing has changed."""
        planner, dial, plans, fixed, cold = choice
        if isinstance(planner, planners.RowRule) and plans is None:
            planner.set(self)
        elif plans is None:
            self._set_pruner(-1.0 if dial is None else dial)
        else:
            plans = self._bind(plans)
            first = [None] * self.lanes if cold is None else [plan.sources for plan in cold]
            self._set_plans([(*self._arrays(plan), first[i]) for i, plan in enumerate(plans)])
        self._planner, self._dial, self._plans, self._fixed = planner, dial, plans, fixed
        self._cold = cold

    # ---- plans

    def _bind(self, plan: Plan | Sequence[Plan], name: str = "plan") -> list[Plan]:
        """One checked plan per lane, with this policy's names and costs; of cold chunks by name."""
        given = checks.plans_of(plan, self.lanes, name)
        bound: dict[int, Plan] = {}  # one object per distinct plan
        return [bound.setdefault(id(item), self._bind_one(item, name)) for item in given]

    def _bind_one(self, plan: Plan, name: str) -> Plan:
        steps = len(self._sampler.timesteps) if name == "cold_plan" else self.num_inference_steps
        return checks.bound_plan(
            plan, steps, self._blocks, self._types, cost=self.block_costs, name=name
        )

    def _make_plan(
        self, sources: NDArray[np.uint8], first: Plan | None, metadata: dict[str, Any] | None
    ) -> Plan:
        return Plan(
            sources,
            first,
            blocks=self._blocks,
            types=self._types,
            cost=self.block_costs,
            metadata=metadata,
        )

    def _arrays(self, plan: Plan) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        if plan.first is not None:
            return plan.sources, plan.first.sources
        # with a warm start an episode has begun densely already, in the cold chunk
        follow = self._warm_start is not None and not (plan.sources == REUSE_ROLLOUT).any()
        return plan.sources, plan.sources if follow else np.zeros_like(plan.sources)

    def _executed(self, lane: int) -> Plan:
        chosen = None if self._plans is None else self._plans[lane]
        if not self._stats(lane)["chunks"]:  # has not run in this episode
            return planners.dense(self) if chosen is None else chosen  # a pruner begins densely
        sources = self._get_plan(lane)
        if chosen is not None and np.array_equal(sources, chosen.sources):
            return chosen
        return self._make_plan(sources, None, None)

    # ---- copies

    def _choice(self) -> Choice:
        return self._planner, self._dial, self._plans, self._fixed, self._cold

    def _be_twin_of(self, other: Any) -> None:
        """Initialise as another policy of the same model."""
        SparsePolicy.__init__(
            self,
            other.model,
            config=other._config,
            sampler=other._sampler,
            lanes=other.lanes,
            threads=other.threads,
            device=other._device,
            precision=other._precision,
            warm_start=other._warm_start,
            lead=other._lead,
            smoothing=other._smoothing,
            fitted=other._fitted,
        )

    def __copy__(self) -> SparsePolicy:
        twin = type(self).__new__(type(self))
        twin._be_twin_of(self)
        twin._adopt(self._choice())
        twin._loaded, twin._error_bound = self._loaded, self._error_bound
        _own(twin).update(_own(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsePolicy:
        memo[id(self)] = twin = copy.copy(self)
        _own(twin).update(copy.deepcopy(_own(self), memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        if self._loaded is None:
            raise TypeError(
                "policy: expected one that tsad.load made, to be loaded again where it is "
                "unpickled, got one made otherwise; write its files (tsad.checkpoint.write_folder) "
                "and load them, or copy.deepcopy it in this process"
            )
        return _load_again, (*self._loaded, self._choice())

    # ---- facts

    def __setattr__(self, name: str, value: Any) -> None:
        # a slot, a property, or of a subclass, which may have attributes of its own
        kind = getattr(type(self), name, None)
        known = hasattr(kind, "__set__") and getattr(kind, "fset", name) is not None
        if hasattr(self, "__dict__") or (known and not inspect.isgetsetdescriptor(kind)):
            super().__setattr__(name, value)
            return
        raise AttributeError(f"policy.{name}: {advice(type(self), name, value, load)}")

    @property
    def _source(self) -> str | None:
        """What `tsad.load` read it from: a bundled name, or a whole path."""
        return None if self._loaded is None else self._loaded[0]

    @property
    def blocks(self) -> list[str]:
        """Names of the prunable blocks in execution order, e.g. "layers.0.cross_attn"."""
        return list(self._blocks)

    @property
    def block_types(self) -> list[str]:
        """Type of each block; blocks of one type may stand in for each other."""
        return list(self._types)

    @property
    def timesteps(self) -> NDArray[Any]:
        """Training timestep of each denoising step, (K,), noisiest first; int64, of flow matching
        float64 times from 0 (noise) on."""
        return np.array(self._sampler.timesteps[-self.num_inference_steps :])

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as ``config.json`` says it, with the sampler that is in use; a copy.

        Its steps are all, also with a warm start.
        """
        config = self._config.to_dict()
        config["scheduler"]["type"] = self._sampler.name
        config["scheduler"]["num_inference_steps"] = len(self._sampler.timesteps)
        return config

    @property
    def warm_start(self) -> int | None:
        """N, the steps of a chunk that starts from the one before; None: every one from noise."""
        return self._warm_start

    @property
    def lead(self) -> float:
        """How much further executed actions go than the chunk before foresaw; 0: not at all."""
        return self._lead

    @property
    def smoothing(self) -> bool:
        """Whether executed actions are weighed with their neighbours."""
        return self._smoothing

    @property
    def fitted(self) -> Fitted | None:
        """What `tsad fit` found for this sampler and a plan; None: the sampler as it is."""
        return self._fitted

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._device

    @property
    def precision(self) -> str:
        """Type of weights and activations."""
        return self._precision

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call: encode, prune, plan, denoise, and total."""
        return self._timings()

    @property
    def stats(self) -> dict[str, Any]:
        """What the last chunk did, over all lanes.

        ``chunks``: since each lane's reset, summed. ``sparsity`` (of the cost), ``cell_sparsity``:
        means; ``mean_sparsity``: of all these chunks. ``cells``: by source. ``forced``: computed
        because nothing was there to reuse. ``max_age``: oldest rollout reused, in chunks.
        ``bytes``, ``weight_bytes``: memory of this policy, and of the model it shares.
        ``precision`` and ``error_bound``: how far a dense chunk's normalised actions may be from
        float64's, same noise; of fewer bits measured when first read, some dozens of chunks; None
        if `tsad.load` did not make it, or its files are gone. ``lanes``: the first seven for each.
        """
        dense = int(self.block_costs.sum()) * self.num_inference_steps
        lanes = []
        for lane in range(self.lanes):
            raw = self._stats(lane)
            cells = dict(zip(SOURCE_NAMES, raw["cells"], strict=True))
            total = sum(raw["cells"])
            ran, n = total > 0, raw["chunks"]  # ever, since the reset
            lanes.append(
                {
                    "chunks": n,
                    "sparsity": 1 - raw["cost"] / dense if ran else 0.0,
                    "mean_sparsity": 1 - raw["spent"] / dense / n if n else 0.0,
                    "cell_sparsity": 1 - cells["compute"] / total if ran else 0.0,
                    "cells": cells,
                    "forced": raw["forced"],
                    "max_age": raw["max_age"],
                }
            )
        return {
            "chunks": sum(s["chunks"] for s in lanes),
            "sparsity": float(np.mean([s["sparsity"] for s in lanes])),
            "cell_sparsity": float(np.mean([s["cell_sparsity"] for s in lanes])),
            "mean_sparsity": float(np.mean([s["mean_sparsity"] for s in lanes])),
            "cells": {name: sum(s["cells"][name] for s in lanes) for name in SOURCE_NAMES},
            "forced": sum(s["forced"] for s in lanes),
            "max_age": max(s["max_age"] for s in lanes),
            "bytes": self._bytes,
            "weight_bytes": self.model.weight_bytes,
            "precision": self._precision,
            "error_bound": self._bound(),
            "lanes": lanes,
        }

    def _bound(self) -> float | None:
        if self._error_bound is None and self._loaded is not None:
            # dense chunks from noise; of a warm start these are not what is fitted
            fitted = self._fitted if self._warm_start is None else None
            exact = exact_twin(self, load, fitted)
            if exact is None:
                return None
            own: dict[str, Any] = {name: getattr(self, name) for name in ("threads", "precision")}
            own |= {"config": self._config, "sampler": self._sampler, "fitted": fitted}
            with rounding(self._precision):
                self._error_bound = measured_bound(SparsePolicy(self.model, **own), exact)
        return self._error_bound

    def __repr__(self) -> str:
        if self._fixed:
            plan = f"fixed plan, sparsity {self.sparsity:.4g}"
        elif self._dial is None:
            plan = f"planner {self._planner!r}, its own sparsity"
        else:
            plan = f"planner {self._planner!r}, sparsity {self._dial:.4g}"
        if self._warm_start is not None:
            plan += f", warm start: the last {self._warm_start} of {self.model.n_steps} steps"
        plan += ", fitted" if self._fitted is not None else ""
        plan += ", smoothed" if self._smoothing else ""
        plan += f", lead {self._lead:g}" if self._lead else ""
        lanes = f"{self.lanes} lane{'s' if self.lanes > 1 else ''}"
        return (
            f"{type(self).__name__}({self._sampler.name} {self.num_inference_steps} steps x "
            f"{self.n_blocks} blocks, obs {self.n_obs_steps} x {self.obs_dim} -> actions "
            f"{self.n_action_steps} x {self.action_dim} of {self.horizon}, {lanes}, "
            f"{self._device} {self._precision} {self.backend}, {plan})"
        )


def _own(policy: SparsePolicy) -> dict[str, Any]:
    """The attributes that a subclass gave it."""
    return getattr(policy, "__dict__", {})


# `tsad.load`, which is above this module, puts itself here
load: Any = None


def _load_again(source: str, options: dict[str, Any], choice: Choice) -> SparsePolicy:
    """The policy that was pickled."""
    policy: SparsePolicy = load(source, **options)
    policy._adopt(choice)
    return policy
