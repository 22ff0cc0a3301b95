"""The C core of tsad: models, policies, image encoders, the resolver of plans."""

from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

# Whatever is borrowed without a copy: numpy.ndarray, or an object with __dlpack__ and
# __dlpack_device__ (torch, JAX, CuPy ...), float32, C-contiguous, in host memory; of
# a policy on a GPU also in that GPU's.
_Array = Any
# Numbers, or a mask of one bool per lane; torch's tensors count as SupportsIndex.
_Lanes = SupportsIndex | Sequence[SupportsIndex] | NDArray[np.integer[Any] | np.bool_]
_Seed = SupportsIndex | Sequence[SupportsIndex] | NDArray[np.integer[Any]]

@final
class Model:
    """An immutable model, shared by policies."""

    def __init__(
        self,
        *,
        family: str = "diffusion_policy_transformer",
        horizon: int,
        n_obs_steps: int,
        n_action_steps: int,
        obs_dim: int,
        action_dim: int,
        n_layers: int = 0,
        n_heads: int = 0,
        n_emb: int = 0,
        n_cond_layers: int = 0,
        causal: bool = True,
        sampler: _Array,
        time_emb: _Array | None = None,
        obs_scale: _Array,
        obs_offset: _Array,
        action_scale: _Array,
        action_offset: _Array,
        block_cost: _Array,
        tensors: Mapping[str, _Array],
        pruner: dict[str, Any] | None = None,
        nodes: _Array | None = None,
        registers: _Array | None = None,
        backend: str | None = None,
        precision: str = "float32",
        down_dims: _Array | None = None,
        kernel_size: int = 0,
        n_groups: int = 0,
        use_film_scale_modulation: bool = False,
        obs_shift: _Array | None = None,
        action_shift: _Array | None = None,
        hidden_dim: int = 0,
        use_rope: bool = False,
        rotation: _Array | None = None,
        use_positional_encoding: bool = False,
    ) -> None: ...
    @property
    def n_steps(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...
    @property
    def obs_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def has_pruner(self) -> bool: ...
    @property
    def adds_noise(self) -> bool: ...
    @property
    def block_type(self) -> NDArray[np.uint8]: ...
    @property
    def block_cost(self) -> NDArray[np.int64]: ...
    @property
    def backend(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def ring_bytes(self) -> int: ...
    @property
    def rollout_bytes(self) -> int: ...

@disjoint_base
class Policy:
    """A model with memory for some lanes; used by one thread at a time."""

    def __init__(
        self,
        model: Model,
        *,
        lanes: int = 1,
        threads: int = 1,
        warm_start: tuple[_Array, float, float] | None = None,  # sampler (N, 9), signal, noise
        lead: float = 0.0,
        smoothing: bool = False,
        features: tuple[tuple[str, int], ...] | None = None,
        correction: tuple[_Array, _Array] | None = None,  # gain, shift (horizon, action_dim)
    ) -> None: ...
    def __call__(
        self,
        obs: _Array | dict[str, _Array],
        *,
        out: _Array | None = None,
        noise: _Array | None = None,
        lanes: _Lanes | None = None,
        return_horizon: bool = False,
        executed: _Lanes | None = None,
    ) -> Any: ...
    def predict_noise(self, sample: _Array, step: int, obs: _Array | dict[str, _Array]) -> Any: ...
    def reset(self, lanes: _Lanes | None = None, seed: _Seed | None = None) -> None: ...
    @property
    def model(self) -> Model: ...
    @property
    def lanes(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def horizon(self) -> int: ...
    @property
    def n_obs_steps(self) -> int: ...
    @property
    def n_action_steps(self) -> int: ...
    @property
    def obs_dim(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def num_inference_steps(self) -> int: ...
    @property
    def n_blocks(self) -> int: ...
    @property
    def has_pruner(self) -> bool: ...
    @property
    def adds_noise(self) -> bool: ...
    @property
    def block_costs(self) -> NDArray[np.int64]: ...
    @property
    def backend(self) -> str: ...
    @property
    def _bytes(self) -> int: ...
    def _lanes(self, lanes: _Lanes | None, /) -> list[int]: ...
    def _side_by_side(self, obs: dict[str, _Array], n_rows: int, /) -> NDArray[np.float32]: ...
    def _set_plan(
        self, lane: SupportsIndex, sources: NDArray[np.uint8], first: NDArray[np.uint8]
    ) -> None: ...
    def _set_plans(
        self,
        plans: Sequence[tuple[NDArray[np.uint8] | None, ...]],  # sources, first, cold
        /,
    ) -> None: ...
    def _set_pruner(self, sparsity: float, /) -> None: ...
    def _set_rule(
        self, blocks: int, threshold: float, most: int, polynomial: tuple[float, ...], /
    ) -> None: ...
    def _set_audit(self, on: bool, /) -> None: ...
    def _audit(self, lane: SupportsIndex, /) -> tuple[float, float, float, float]: ...
    def _get_plan(self, lane: SupportsIndex, /) -> NDArray[np.uint8]: ...
    def _ages(self, lane: SupportsIndex, /) -> NDArray[np.uint32]: ...
    def _stats(self, lane: SupportsIndex, /) -> dict[str, Any]: ...
    def _timings(self) -> dict[str, float]: ...
    def _pruner_scores(self, obs: _Array, /) -> NDArray[np.float32]: ...

@final
class Vision:
    """An image encoder: a ResNet trunk, spatial softmax, a linear layer."""

    def __init__(
        self,
        tensors: Mapping[str, _Array],
        *,
        depth: int = 18,
        norm: str = "folded",
        keypoints: int,
        height: int,
        width: int,
        channels: int = 3,
        scale: _Array | None = None,
        offset: _Array | None = None,
        relu: bool = False,
        threads: int = 1,
        backend: str | None = None,
        precision: str = "float32",
    ) -> None: ...
    def encode(self, images: _Array, out: _Array | None = None) -> Any: ...
    @property
    def features(self) -> int: ...
    @property
    def keypoints(self) -> int: ...
    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def channels(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def backend(self) -> str: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def _bytes(self) -> int: ...

def resolve(
    sources: NDArray[np.uint8],
    block_type: NDArray[np.uint8],
    filled: NDArray[np.uint8] | None = None,
) -> NDArray[np.int32]: ...
def backends() -> list[str]: ...
def describe(
    *,
    family: str = "diffusion_policy_transformer",
    horizon: int,
    n_obs_steps: int,
    n_action_steps: int,
    obs_dim: int,
    action_dim: int,
    n_layers: int = 0,
    n_heads: int = 0,
    n_emb: int = 0,
    n_cond_layers: int = 0,
    causal: bool = True,
    down_dims: _Array | None = None,
    kernel_size: int = 0,
    n_groups: int = 0,
    use_film_scale_modulation: bool = False,
    hidden_dim: int = 0,
    use_rope: bool = False,
    use_positional_encoding: bool = False,
    pruner: dict[str, int] | None = None,
) -> dict[str, Any]: ...
def _load_backend(path: str, /) -> tuple[str, str | None]: ...
def _plan_fault(
    sources: NDArray[np.uint8],
    block_type: NDArray[np.uint8],
    filled: NDArray[np.uint8] | None = None,
) -> tuple[int, int, int, str] | None: ...
def _borrow(array: _Array, /) -> dict[str, Any]: ...
def _copy(array: _Array, name: str, /) -> NDArray[np.float32]: ...
def _hand(array: NDArray[np.float32], like: _Array, /) -> Any: ...
