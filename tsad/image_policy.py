"""`ImagePolicy`: a policy that sees images, with its encoders inside."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsad import _core
from tsad.busy import one_caller
from tsad.cameras import Cameras, Counts, Images, Window
from tsad.families.resnet import COLOURS, Camera
from tsad.policy import Choice, SparsePolicy


class ImagePolicy(SparsePolicy):
    """A `SparsePolicy` whose observations have images. Made by `tsad.load`.

    ``policy(obs)``: a dict by the names in ``config["features"]``, of each camera uint8 (lanes,
    n_obs_steps, H, W, 3) as it gives them, or float32 (lanes, n_obs_steps, 3, H, W) from 0 to 1,
    of any strides; of the rest float32 (lanes, n_obs_steps, its numbers). With one lane all of them
    may be without the first axis. H and W are the camera's (``config["vision"]``); resizing,
    cropping and the normalisation of the training data are the policy's. NumPy, or anything with
    DLPack in host memory.

    An image with the bytes of one in the lane's last window, or in the same one, is not encoded
    again; `reset` forgets. ``timings["vision"]`` is what the images took, part of ``"total"``;
    ``stats["images"]`` says how many of the last call's were encoded, and how many not again.

    With ``reuse_images=BOUND`` (`tsad.load`) an image that is nearly one of these takes its
    features, too: where no square of 8 x 8 pixels differs by more than BOUND of 255 levels, in the
    mean of its pixels. It is compared with what was encoded, so differences don't add up.
    ``stats["images"]["reused"]`` counts them.

    An array is taken too: observations whose images are features already, as `encode` makes them
    and as `tsad.Recorder` keeps them. The encoders run on the CPU, whatever the policy's device, in
    ``vision_precision``: float32, whatever the policy's precision, or "int16" or "int8" if
    `tsad.load` was told so.
    """

    __slots__ = ("_alone", "_reuse", "_cameras", "_images", "_milliseconds", "_rows", "_seen")

    _alone: threading.Lock
    _reuse: float
    _cameras: Cameras
    _images: Counts
    _milliseconds: float
    _rows: list[int]
    _seen: list[Window]

    def __init__(
        self, model: _core.Model, *, cameras: Cameras, reuse_images: float = 0.0, **options: Any
    ) -> None:
        self._see_with(cameras, options.get("lanes", 1), reuse_images)
        super().__init__(model, **options)

    def _see_with(self, cameras: Cameras, lanes: int, bound: float) -> None:
        self._alone = threading.Lock()
        self._reuse = bound
        self._cameras = cameras
        self._images = Counts(0, 0, 0)
        self._milliseconds = 0.0
        self._rows = []  # lanes of the last call
        self._seen = [{} for _ in range(lanes)]

    def _be_twin_of(self, other: Any) -> None:
        self._see_with(other._cameras, other.lanes, other._reuse)
        super()._be_twin_of(other)

    # ---- calls

    def __call__(self, obs: Any, *, lanes: Any = None, **options: Any) -> Any:
        """Actions, as `SparsePolicy`'s."""
        with one_caller(self._alone):
            rows = self._lanes(lanes)
            if not isinstance(obs, dict):
                self._refuse_frames(obs)
                actions = super().__call__(obs, lanes=rows, **options)
                self._said(rows, 0.0, Counts(0, 0, 0))
                return actions
            begin = time.perf_counter()
            images, bare = self._images_of(obs, len(rows), self.lanes == 1 == len(rows))
            windows = [self._seen[row] for row in rows]
            features, seen, counts = self._cameras.encode(images, windows, self._reuse)
            milliseconds = (time.perf_counter() - begin) * 1e3
            actions = super().__call__(_with(obs, features, bare), lanes=rows, **options)
            for row, window in zip(rows, seen, strict=True):
                self._seen[row] = window
            self._said(rows, milliseconds, counts)
            return actions

    def _said(self, rows: list[int], milliseconds: float, counts: Counts) -> None:
        self._rows, self._milliseconds, self._images = rows, milliseconds, counts

    def predict_noise(self, sample: Any, step: int, obs: Any) -> Any:
        """As `SparsePolicy`'s; ``obs`` may be a dict with images, (N, n_obs_steps, ...)."""
        if isinstance(obs, dict):
            obs = self._encoded(obs, len(sample), False, None)
        return super().predict_noise(sample, step, obs)

    def encode(self, obs: dict[str, Any], lanes: Any = None) -> NDArray[np.float32]:
        """Observations with their images as features, (lanes, n_obs_steps, obs_dim), raw units.

        That is what ``config["features"]`` says, side by side, and what the policy takes as an
        array; without the first axis if ``obs`` was. No state changes.
        """
        rows = self._lanes(lanes)
        return self._encoded(obs, len(rows), self.lanes == 1 == len(rows), rows)

    def reset(self, lanes: Any = None, seed: Any = None) -> None:
        """Start of an episode for all lanes or the listed ones, as `SparsePolicy`'s."""
        with one_caller(self._alone):
            super().reset(lanes, seed)
            for row in self._lanes(lanes):
                self._seen[row] = {}

    def _side_by_side(self, obs: dict[str, Any], n_rows: int, /) -> NDArray[np.float32]:
        # what the last call saw is known, so that this encodes nothing after it
        rows = self._rows if len(self._rows) == n_rows else None
        return self._encoded(obs, n_rows, self.lanes == 1 == n_rows, rows)

    def _adopt(self, choice: Choice) -> None:
        with one_caller(self._alone):
            super()._adopt(choice)

    # ---- facts

    @property
    def reuse_images(self) -> float:
        """The bound within which an image takes the features of another; 0 is none."""
        return self._reuse

    @property
    def vision_precision(self) -> str:
        """The image encoders', "float32", "int16" or "int8"."""
        return self._cameras.precision

    @property
    def timings(self) -> dict[str, float]:
        """Milliseconds of the last call: vision, encode, prune, plan, denoise, and total."""
        stages = super().timings
        stages["total"] += self._milliseconds
        return {"vision": self._milliseconds, **stages}

    @property
    def stats(self) -> dict[str, Any]:
        """As `SparsePolicy`'s, and ``images``: of the last call, "encoded", "known", "reused".

        ``weight_bytes`` counts the encoders too.
        """
        stats = super().stats
        stats["weight_bytes"] += self._cameras.weight_bytes
        return {**stats, "images": self._images._asdict()}

    def __repr__(self) -> str:
        reuse = f", reused within {self._reuse:g}" if self._reuse else ""
        return f"{super().__repr__()[:-1]}, images in {self.vision_precision}{reuse})"

    # ---- observations

    def _encoded(
        self, obs: dict[str, Any], n_rows: int, bare_fits: bool, rows: list[int] | None
    ) -> NDArray[np.float32]:
        images, bare = self._images_of(obs, n_rows, bare_fits)
        windows = [{}] * n_rows if rows is None else [self._seen[row] for row in rows]
        bound = 0.0 if rows is None else self._reuse
        features, _, _ = self._cameras.encode(images, windows, bound)
        return super()._side_by_side(_with(obs, features, bare), n_rows)

    def _refuse_frames(self, obs: Any) -> None:
        """TypeError where an image stands for the array of features."""
        if str(getattr(obs, "dtype", "")).endswith("uint8"):
            names = [feature.name for feature in self._config.features]
            raise TypeError(
                f"obs: expected a dict of arrays, its keys {names}, or a float32 array of features "
                f"as policy.encode gives it; got uint8 {tuple(obs.shape)}: put images into the dict"
            )

    def _images_of(
        self, obs: dict[str, Any], n_rows: int, bare_fits: bool
    ) -> tuple[dict[str, Images], bool]:
        """Each camera's images (n_rows, n_obs_steps, ...), and whether the first axis was missing.

        ``ValueError`` and ``TypeError`` name the key, what came and what is expected.
        """
        names = [feature.name for feature in self._config.features]
        cameras = self._cameras.vision.cameras
        if not isinstance(obs, dict):
            raise TypeError(
                f"obs: expected a dict of arrays, its keys {names}, got {type(obs).__name__}"
            )
        if set(obs) != set(names):
            missing = [camera for camera in cameras if camera.name not in obs]
            if missing and set(obs) <= set(names):
                raise ValueError(
                    f"obs: expected the keys {names}, got no {missing[0].name!r}; add it, uint8 "
                    f"(lanes, n_obs_steps, {missing[0].height}, {missing[0].width}, {COLOURS})"
                )
            super()._side_by_side(obs, n_rows)  # which refuses it
        arrays = {camera.name: _array(camera, obs[camera.name]) for camera in cameras}
        bare = bare_fits and all(array.ndim == 4 for array in arrays.values())
        lead = (self.n_obs_steps,) if bare else (n_rows, self.n_obs_steps)
        for camera in cameras:
            _check_shape(camera, arrays[camera.name], lead)
        for feature in self._config.features:
            shape = getattr(obs[feature.name], "shape", ())
            if feature.name not in arrays and len(shape) == (3 if bare else 2):
                raise ValueError(
                    f"obs[{feature.name!r}]: expected shape {(*lead, feature.dim)}, got "
                    f"{tuple(shape)}; the arrays of a call have the axis of lanes all, or none"
                )
        return {name: array[None] if bare else array for name, array in arrays.items()}, bare


def _with(
    obs: dict[str, Any], features: dict[str, NDArray[np.float32]], bare: bool
) -> dict[str, Any]:
    """The observation with features in the place of images, arrays of the images' libraries."""
    found = {name: value[0] if bare else value for name, value in features.items()}
    return obs | {name: _core._hand(value, obs[name]) for name, value in found.items()}


def _array(camera: Camera, images: Any) -> Images:
    """Any library's array as NumPy's, nothing copied."""
    label = f"obs[{camera.name!r}]"
    array: Images = images
    form = f"uint8 (..., {camera.height}, {camera.width}, {COLOURS})"
    if isinstance(images, np.ma.MaskedArray):
        raise TypeError(f"{label}: got a masked array, expected {form}; use {label}.filled(0)")
    if not isinstance(images, np.ndarray):
        if not hasattr(images, "__dlpack__"):
            raise TypeError(
                f"{label}: expected an array {form} (NumPy, or anything with __dlpack__), got "
                f"{type(images).__name__}; use np.asarray({label}, dtype=np.uint8)"
            )
        try:
            array = np.from_dlpack(images)
        except MemoryError:
            raise
        except Exception as error:  # any library's
            fix = ".detach().cpu()"
            if "bfloat16" in str(getattr(images, "dtype", "")):
                fix = ".to(torch.float32)"
            raise TypeError(
                f"{label}: expected an array in host memory, got a {type(images).__name__} that "
                f"can't be lent ({error}); of a torch tensor use {fix}"
            ) from error
    if array.dtype not in (np.uint8, np.float32):
        dtype = "float32" if array.dtype.kind == "f" else "uint8"
        torch = type(images).__module__.startswith("torch")
        scale = ""
        if array.dtype.kind in "iu":
            scale = ", after bringing its values to 0 to 255: others would wrap"
        elif array.dtype.kind == "b":
            scale = " * 255"
        raise TypeError(
            f"{label}: expected {form}, or float32 (..., {COLOURS}, {camera.height}, "
            f"{camera.width}) from 0 to 1, got {array.dtype}; use "
            f"{label}.{'to(torch.' if torch else 'astype(np.'}{dtype}){scale}"
        )
    return array


def _check_shape(camera: Camera, array: Images, lead: tuple[int, ...]) -> None:
    last, first = (camera.height, camera.width, COLOURS), (COLOURS, camera.height, camera.width)
    is_uint8 = array.dtype == np.uint8
    wanted, other = (last, first) if is_uint8 else (first, last)
    if array.shape == (*lead, *wanted):
        return
    names = "height, width, 3" if is_uint8 else "3, height, width"
    fix = f"these are ({'lanes, ' if len(lead) > 1 else ''}n_obs_steps, {names})"
    if array.shape[-3:] == other:
        places = "-3, -1" if is_uint8 else "-1, -3"
        fix = (
            f"{array.dtype} images are ({names}): use np.moveaxis(x, {places}), or of a torch "
            f"tensor x.movedim({places})"
        )
    elif array.shape == wanted:
        fix += "; this is one image: of one moment np.stack the last n_obs_steps, the newest last"
    elif array.shape[-3:] == wanted and array.ndim == 5 and array.shape[1] == lead[-1]:
        fix += "; pass lanes=[...] to run a subset"
    raise ValueError(
        f"obs[{camera.name!r}]: expected shape {(*lead, *wanted)}, got {array.shape}; {fix}"
    )
