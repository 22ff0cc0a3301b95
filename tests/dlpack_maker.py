"""A DLPack producer made of ctypes, which can do all that the protocol allows, and more."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CPU, CUDA = 1, 2
_CODES = {"i": 0, "u": 1, "f": 2}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_new = ctypes.pythonapi.PyCapsule_New
_new.restype = ctypes.py_object
_new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype = ctypes.c_char_p
_name.argtypes = [ctypes.py_object]


class Producer:
    """An array behind DLPack. `deleted` counts calls of the deleter, `exports` the capsules."""

    def __init__(
        self,
        array: Any,
        *,
        versioned: bool = False,
        read_only: bool = False,
        major: int = 1,
        device: tuple[int, int] = (CPU, 0),
        deleter: bool = True,
        strides: bool = True,
        byte_offset: int = 0,
    ) -> None:
        self.array, self.device, self.versioned = array, device, versioned
        self.deleted = self.exports = 0
        self.capsule: Any = None
        count = array.ndim
        self._shape = (ctypes.c_int64 * count)(*array.shape)
        self._strides = (ctypes.c_int64 * count)(*(s // array.itemsize for s in array.strides))
        self._struct: Any = _Versioned() if versioned else _Managed()
        self._deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._delete)
        if deleter:
            self._struct.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        if versioned:
            self._struct.major, self._struct.flags = major, int(read_only)
        tensor = self._struct.tensor
        tensor.data = array.ctypes.data - byte_offset
        tensor.byte_offset = byte_offset
        tensor.device_type, tensor.device_id = device
        tensor.ndim, tensor.lanes = count, 1
        tensor.code, tensor.bits = _CODES[array.dtype.kind], 8 * array.itemsize
        tensor.shape = self._shape
        if strides:
            tensor.strides = self._strides
        self.tensor: Any = tensor  # to break it

    def _delete(self, address: int) -> None:
        assert address == ctypes.addressof(self._struct)
        self.deleted += 1

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **keywords: Any) -> Any:
        if not self.versioned and "max_version" in keywords:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.exports += 1
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        self.capsule = _new(ctypes.addressof(self._struct), name, None)
        return self.capsule

    @property
    def capsule_name(self) -> str:
        return _name(self.capsule).decode()


def forbidden(device: tuple[int, int]) -> Any:
    """An array on another device, which must not be asked for its data."""

    class Elsewhere:
        def __dlpack_device__(self) -> tuple[int, int]:
            return device

        def __dlpack__(self, **keywords: Any) -> Any:
            raise AssertionError("__dlpack__ called before the device was checked")

    return Elsewhere()


def array(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
