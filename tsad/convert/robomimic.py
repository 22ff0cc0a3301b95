"""The observation encoder of Diffusion Policy's hybrid image policies, which robomimic makes.

``obs_encoder.obs_nets.<key>`` of each image is a ``VisualCore``: a ResNet-18, a spatial softmax, a
linear layer, then a ReLU; numbers are taken as they are. All stand side by side in the order of
``shape_meta``. Most of a ``VisualCore`` is in a state dict twice, as ``backbone`` and ``pool``, and
in ``nets``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tsad.checkpoint import CheckpointError, Tensors, check_tensors
from tsad.config import VISUAL, Feature, VisionConfig
from tsad.convert.settings import Settings
from tsad.convert.torch_file import TensorRef, TorchFile
from tsad.convert.trunk import COUNTER, places, trunk_shapes, trunk_tensors
from tsad.families.resnet import COLOURS, EncoderConfig, Size, head_shapes, map_size, prefix
from tsad.section import Shapes

_NETS = "obs_encoder.obs_nets."
_CROP = [76, 76]  # Diffusion Policy's default
_TRUNK, _POOL, _LINEAR = "nets.0.nets.", "nets.1.", "nets.3"
_TWINS = {"backbone.": "nets.0.", "pool.": _POOL}
_HEAD = {"pool.weight": f"{_POOL}nets.weight", "pool.bias": f"{_POOL}nets.bias"}
_HEAD |= {"out.weight": f"{_LINEAR}.weight", "out.bias": f"{_LINEAR}.bias"}
_PLACES = (f"{_POOL}pos_x", f"{_POOL}pos_y")
_TEMPERATURE = f"{_POOL}temperature"
_PARTS = ("scale", "offset")


class OutsideError(ValueError):
    """Why the encoder is not one that runs here; observations are then its output."""


class Encoder:
    """A checkpoint's encoder.

    Raises `OutsideError`, or ``CheckpointError``, unless it is robomimic's, all of it is there and
    nothing else.
    """

    def __init__(self, settings: Settings, state: Mapping[str, Any], obs_dim: int) -> None:
        self._settings = settings
        self._encoders: list[EncoderConfig] = []
        self._refs: list[dict[str, TensorRef]] = []
        self._cameras: list[dict[str, Any]] = []
        self.features: list[Feature] = []
        for key in settings.keys("policy.shape_meta.obs"):
            at = f"policy.shape_meta.obs.{key}"
            kind, shape = settings.get(f"{at}.type", "low_dim"), self._sizes(f"{at}.shape")
            if kind == "rgb" and len(shape) == 3 and shape[0] == COLOURS:
                self._add_camera(key, (shape[1], shape[2]), _own(state, key))
            elif kind == "low_dim" and len(shape) == 1:
                self.features.append(Feature(key, "STATE", shape[0]))
            else:
                raise OutsideError(f"shape_meta.obs.{key} is {kind!s:.20} of shape {shape!s:.40}")
        if not self._cameras:
            raise OutsideError("shape_meta has no images")
        total = sum(feature.dim for feature in self.features)
        if total != obs_dim:
            raise OutsideError(f"it makes {total} numbers of a step, the network takes {obs_dim}")
        known = tuple(f"{_NETS}{camera['name']}." for camera in self._cameras)
        for name in state:
            if name.startswith("obs_encoder.") and not name.startswith(known):
                raise OutsideError(f"it has an unknown part, {name:.100}")

    def _sizes(self, key: str, default: Any = None) -> list[int]:
        """A list of sizes, each of which may be an interpolation; empty if it is none."""
        value = self._settings.get(key, default)
        items = value if isinstance(value, list) else []
        sizes = [self._settings.get(f"{key}.{i}", item) for i, item in enumerate(items)]
        return sizes if all(type(n) is int and n > 0 for n in sizes) else []

    def _add_camera(self, key: str, size: Size, own: dict[str, TensorRef]) -> None:
        get = self._settings.get
        crop = self._sizes("policy.crop_shape", _CROP)
        if crop and not get("policy.eval_fixed_crop", False):
            raise OutsideError("it crops at random, also in evaluation (eval_fixed_crop: false)")
        sizes = [own[_HEAD[name]].shape if _HEAD[name] in own else () for name in _HEAD]
        if not sizes[0] or not sizes[2]:
            raise OutsideError(f"{key} has no ResNet-18 with a spatial softmax")
        norm = "group" if get("policy.obs_encoder_group_norm", False) else "folded"
        encoder = EncoderConfig("resnet18", norm, sizes[0][0], sizes[2][0])
        wanted = _wanted(encoder, (crop[0], crop[1]) if crop else size)
        if _TEMPERATURE in own:
            wanted[_TEMPERATURE] = (1,)
        check_tensors(own, wanted, f"{_NETS}{key}")
        camera = {"name": key, "encoder": len(self._encoders), "height": size[0], "width": size[1]}
        self._cameras.append(camera | ({"crop": crop} if crop else {}))
        self._encoders.append(encoder)
        self._refs.append(own)
        self.features.append(Feature(key, VISUAL, encoder.feature_dim))

    def vision(self, numbers: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
        """The ``vision`` of a config.json; ``numbers``: scale and offset of each image's pixels."""
        cameras = [
            camera | {part: [numbers[camera["name"]][i]] * COLOURS for i, part in enumerate(_PARTS)}
            for camera in self._cameras
        ]
        parts = VisionConfig(tuple(self._encoders), ()).to_dict()
        return parts | {"cameras": cameras}

    def tensors(self, checkpoint: TorchFile) -> Tensors:
        """Those of a tsad folder."""
        found: Tensors = {}
        for i, (camera, refs) in enumerate(zip(self._cameras, self._refs, strict=True)):
            start = f"{_NETS}{camera['name']}."
            own = {name: checkpoint.read(ref, f"{start}{name}") for name, ref in refs.items()}
            seen = camera.get("crop") or (camera["height"], camera["width"])
            grid = places(map_size((seen[0], seen[1])))
            for name, expected in zip(_PLACES, grid.T, strict=True):
                if not np.abs(own[name][0] - expected).max() <= 1e-6:
                    raise CheckpointError(
                        f"{checkpoint.file}: {start}{name}: expected places from -1 to 1, got "
                        "others; the file is damaged"
                    )
            trunk = {k.removeprefix(_TRUNK): v for k, v in own.items() if k.startswith(_TRUNK)}
            parts = trunk_tensors(self._encoders[i], trunk)
            parts |= {ours: own[theirs] for ours, theirs in _HEAD.items()}
            temperature = own.get(_TEMPERATURE, np.ones(1, np.float32))
            for name in ("pool.weight", "pool.bias"):  # the softmax is of the maps divided by it
                parts[name] = parts[name] / temperature
            found |= {f"{prefix(i)}{name}": value for name, value in parts.items()}
        return found


def _own(state: Mapping[str, Any], key: str) -> dict[str, TensorRef]:
    """The tensors of one ``VisualCore`` by their names in ``nets``."""
    found: dict[str, TensorRef] = {}
    start = f"{_NETS}{key}."
    for name, ref in state.items():
        if not name.startswith(start) or name.endswith(f".{COUNTER}"):
            continue
        rest = name.removeprefix(start)
        for twin, plain in _TWINS.items():
            if rest.startswith(twin):
                rest = plain + rest.removeprefix(twin)
        if not isinstance(ref, TensorRef) or found.setdefault(rest, ref) != ref:
            raise OutsideError(f"{name:.100} is no tensor, or there are two of it")
    return found


def _wanted(encoder: EncoderConfig, seen: Size) -> Shapes:
    height, width = map_size(seen)
    found = {f"{_TRUNK}{name}": shape for name, shape in trunk_shapes(encoder).items()}
    found |= {_HEAD[name]: shape for name, shape in head_shapes(encoder).items()}
    return found | {name: (1, height * width) for name in _PLACES}
