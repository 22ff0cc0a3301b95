"""Does a GPU compute what the CPU does? Asked once for each model, GPU and driver, at load.

Two chunks of an episode, the first dense, the second along a plan of all sources, are run on both
with the same noise, and so is a pruner. Where actions differ by more than rounding, the GPU is
refused for this model, and the first cell that makes them differ is looked for. What agreed is
kept in the user's cache folder, so that the next process does not ask again. ``TSAD_TRUST=1`` asks
nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tsad import _core, device
from tsad.files import make_folder, sha256, user_folder, write_json
from tsad.plan import COMPUTE, REUSE_ROLLOUT, SKIP, SOURCE_NAMES, Plan
from tsad.policy import SparsePolicy
from tsad.precision import FLOAT32_BOUND, TF32_MARGIN, made_up_observations

if TYPE_CHECKING:
    from tsad.checkpoint import Tensors
    from tsad.config import PolicyConfig
    from tsad.samplers import Sampler

BOUND = 2 * FLOAT32_BOUND
"""Of normalised actions, or of the largest where that is above 1: either may be off by half.
Weights of 16 bits are rounded alike on both; for TF32 see `_allowed`."""
Policies = Callable[[str, str], SparsePolicy]
SHARES = (0.3, 0.2, 0.2, 0.2, 0.1)
"""Of the sources of the second chunk."""


class Difference(NamedTuple):
    """Where two results are furthest apart."""

    error: float
    where: str
    bound: float = BOUND

    @property
    def matters(self) -> bool:
        """Whether that is more than rounding."""
        return not self.error <= self.bound


class Comparison:
    """A model in one lane on the CPU and on the GPU."""

    def __init__(self, cpu: SparsePolicy, gpu: SparsePolicy, bound: float = BOUND) -> None:
        self._pair = (gpu, cpu)
        self._bound = bound
        self._said = ""  # by the GPU, where it gave nothing
        self._scale = np.array(cpu.config["normalizer"]["action"]["scale"], np.float64)
        self._obs = made_up_observations(cpu, 2)
        shape = (cpu.num_inference_steps, cpu.n_blocks)
        sparse = np.random.default_rng(0).choice(len(SHARES), shape, p=SHARES)
        sparse[0] = COMPUTE if len(sparse) > 1 else REUSE_ROLLOUT
        self._cells = np.stack([np.full(shape, COMPUTE), sparse]).astype(np.uint8)

    @property
    def cells(self) -> int:
        """Of both chunks."""
        return int(self._cells.size)

    @property
    def prunes(self) -> bool:
        """Whether there is a pruner to ask."""
        return self._pair[0].has_pruner

    def chunks(self, n: int) -> Difference:
        """The first ``n`` cells of the two chunks, the others left out."""
        cells = self._cells.copy()
        cells.reshape(-1)[n:] = SKIP
        got, expected = (self._run(policy, cells, n) * self._scale for policy in self._pair)
        unit = max(1.0, float(np.abs(expected).max()))
        return _difference(got, expected, unit, "action", self._bound)

    def _run(self, policy: SparsePolicy, cells: NDArray[Any], n: int) -> NDArray[np.float64]:
        """(chunks, horizon, action_dim)"""
        policy.reset()
        policy.plan = Plan(cells[1], cells[0], types=policy.block_types)
        shape = (policy.num_inference_steps, 1, policy.horizon, policy.action_dim)
        found = []
        for i in range(1 if n <= cells[0].size else 2):
            noise = np.random.default_rng((2, i)).standard_normal(shape, np.float32)
            try:
                found.append(policy(self._obs[i], noise=noise, return_horizon=True))
            except RuntimeError as error:  # it overflows, or the device fails
                if policy is self._pair[1]:
                    raise
                self._said = f" ({error})"
                found.append(np.full(shape[2:], np.nan))
        return np.array(found, np.float64)

    def scores(self) -> Difference:
        """Of the pruner, for all cells."""
        got, expected = (np.asarray(p._pruner_scores(self._obs[0]), float) for p in self._pair)
        unit = float(np.abs(expected).max())
        return _difference(got, expected, unit, "pruner score", self._bound)

    def problem(self) -> str | None:
        """What is not right of the GPU; None: it agrees."""
        if self.prunes and (found := self.scores()).matters:
            return found.where
        if not (found := self.chunks(self.cells)).matters:
            return None
        where = found.where + self._said
        if self.chunks(0).matters:
            return f"{where}; so is it without any block computed"
        agrees, differs = 0, self.cells
        while differs - agrees > 1:  # with so many cells
            middle = (agrees + differs) // 2
            if self.chunks(middle).matters:
                differs = middle
            else:
                agrees = middle
        chunk, step, block = (int(i) for i in np.unravel_index(agrees, self._cells.shape))
        source = SOURCE_NAMES[self._cells[chunk, step, block]]
        return (
            f"{where}; the first cell that differs is step {step}, block "
            f"{self._pair[0].blocks[block]!r} ({source}) of the {('dense', 'sparse')[chunk]} chunk"
        )


def _difference(got: Any, expected: Any, unit: float, what: str, bound: float) -> Difference:
    apart = np.abs(got - expected) / unit
    apart = np.where(np.isnan(apart), np.inf, apart)
    at = tuple(int(i) for i in np.unravel_index(apart.argmax(), apart.shape))
    place = ", ".join(map(str, at))
    return Difference(
        float(apart[at]),
        f"{what} [{place}] is {got[at]:.7g}, the CPU's {expected[at]:.7g}",
        bound,
    )


def _allowed(policies: Policies, precision: str) -> float:
    """How far products of cuBLAS may be from float32's: in TF32 a multiple of what rounding the
    weights alone does on a CPU."""
    if precision != "tf32":
        return BOUND
    rounded = Comparison(policies("cpu", "float32"), policies("cpu", "tf32"))
    found = [rounded.chunks(rounded.cells).error]
    if rounded.prunes:
        found.append(rounded.scores().error)
    return BOUND + TF32_MARGIN * max(found)


def problem_of(policies: Policies, precision: str = "float32") -> str | None:
    """What is not right of the GPU, with this backend's own products and with cuBLAS's."""
    exact = "float32" if precision == "tf32" else precision
    own = device.setting("TSAD_CUDA_BLAS", "0") if precision == "tf32" else contextlib.nullcontext()
    with own:
        problem = Comparison(policies("cpu", exact), policies("cuda", precision)).problem()
    if problem:
        return problem
    with device.through_cublas() as used:  # of all rows: more lanes may have them
        if not used:
            return None
        pair = policies("cpu", exact), policies("cuda", precision)
        problem = Comparison(*pair, _allowed(policies, precision)).problem()
    without = "TSAD_CUDA_BLAS=0 does without it"
    return problem and f"{problem}, with cuBLAS {device.cublas().version}: {without}"


def _key(facts: dict[str, Any], config: PolicyConfig, sampler: Sampler, tensors: Any) -> str:
    """Of everything that what was found depends on."""
    digest = hashlib.sha256(json.dumps([facts, config.to_dict()], sort_keys=True).encode())
    digest.update(np.ascontiguousarray(sampler.table, np.float32).tobytes())
    for named in tensors:
        for name in sorted(named):
            array = np.ascontiguousarray(named[name])
            digest.update(f"{name} {array.dtype} {array.shape};".encode())
            digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def check(
    policies: Policies,
    config: PolicyConfig,
    sampler: Sampler,
    tensors: list[Tensors],
    precision: str,
) -> None:
    """Refuse a GPU that computes something else, with a ``RuntimeError`` that says what.

    ``policies`` makes the policy, in one lane, on a device, in a precision (a GPU's is its own).
    """
    if os.environ.get("TSAD_TRUST", "") not in ("", "0"):
        return
    cuda = device.cuda()
    facts = {
        "build": [sha256(str(library)) for library in (_core.__file__, cuda.library)],
        "gpu": device.identity(),
        "precision": precision,
    }
    known = _folder() / f"{_key(facts, config, sampler, tensors)}.json"
    if known.exists():
        return
    problem = problem_of(policies, precision)
    if problem is not None:
        raise RuntimeError(
            f"device: expected a GPU that computes what the CPU does, got {cuda.name!r}, whose "
            f'{problem}; use device="cpu", and see python -m tsad.gpu_check; TSAD_TRUST=1 loads '
            "without asking"
        )
    with contextlib.suppress(OSError):  # no such folder can be made: it is asked again
        make_folder(_folder())
        write_json(known, facts)


def _folder() -> Path:
    return user_folder("XDG_CACHE_HOME", ".cache") / "trusted"
