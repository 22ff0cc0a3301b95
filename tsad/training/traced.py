"""NumPy's functions on torch tensors, as far as `tsad.reference` uses them.

So the reference, the one place where a network is written down, runs in torch too, with gradients:
NumPy hands its functions of a `Traced` to it (``__array_ufunc__``, ``__array_function__``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.nn import functional as F


class Traced(NDArrayOperatorsMixin):
    """A torch tensor that NumPy takes for an array; what is computed of it is one, too."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    @property
    def dtype(self) -> np.dtype[Any]:
        return torch.empty(0, dtype=self.tensor.dtype).numpy().dtype

    @property
    def T(self) -> Traced:  # noqa: N802
        return Traced(self.tensor.T)

    def __getitem__(self, index: Any) -> Traced:
        return Traced(self.tensor[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tensor[index] = _tensor(value, self.tensor)

    def astype(self, dtype: Any) -> Traced:
        return Traced(self.tensor.to(torch.from_numpy(np.empty(0, dtype)).dtype))

    def reshape(self, *shape: int) -> Traced:
        return Traced(self.tensor.reshape(shape[0] if np.ndim(shape[0]) else shape))

    def mean(self, axis: int, *, keepdims: bool = False) -> Traced:
        return Traced(self.tensor.mean(axis, keepdim=keepdims))

    def sum(self, axis: int, *, keepdims: bool = False) -> Traced:
        return Traced(self.tensor.sum(axis, keepdim=keepdims))

    def max(self, axis: int, *, keepdims: bool = False) -> Traced:
        return Traced(self.tensor.amax(axis, keepdim=keepdims))

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        function = _UFUNCS.get(ufunc.__name__)
        if function is None or method != "__call__" or options:
            return NotImplemented
        return Traced(function(*(_tensor(value, self.tensor) for value in inputs)))

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        return _FUNCTIONS[func](*args, **kwargs) if func in _FUNCTIONS else NotImplemented


def _tensor(value: Any, like: Tensor) -> Tensor:
    """An operand as a tensor of the other's type."""
    tensor = value.tensor if isinstance(value, Traced) else torch.as_tensor(np.asarray(value))
    return tensor.to(like.dtype)


_UFUNCS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "subtract": torch.subtract,
    "multiply": torch.multiply,
    "divide": torch.divide,
    "matmul": torch.matmul,
    "negative": torch.negative,
    "power": torch.pow,
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "tanh": torch.tanh,
    "logaddexp": torch.logaddexp,
    "erf (vectorized)": torch.erf,  # of math.erf
}


def _concatenate(parts: Sequence[Any], axis: int = 0) -> Traced:
    like = next(part.tensor for part in parts if isinstance(part, Traced))
    return Traced(torch.cat([_tensor(part, like) for part in parts], axis))


def _split(x: Traced, sections: int, axis: int = 0) -> list[Traced]:
    return [Traced(part) for part in x.tensor.tensor_split(sections, axis)]


def _pad(x: Traced, widths: Sequence[tuple[int, int]]) -> Traced:
    return Traced(F.pad(x.tensor, [n for pair in reversed(widths) for n in pair]))


def _windows(x: Traced, length: int, axis: int) -> Traced:
    return Traced(x.tensor.unfold(axis, length, 1))


def _zeros_like(x: Traced, *, shape: Sequence[int]) -> Traced:
    return Traced(x.tensor.new_zeros(shape))


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    np.concatenate: _concatenate,
    np.flip: lambda x, axis: Traced(x.tensor.flip(axis)),
    np.moveaxis: lambda x, source, to: Traced(x.tensor.moveaxis(source, to)),
    np.pad: _pad,
    np.split: _split,
    np.swapaxes: lambda x, a, b: Traced(x.tensor.transpose(a, b)),
    np.zeros_like: _zeros_like,
    sliding_window_view: _windows,
}
