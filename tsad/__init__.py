"""tsad: diffusion policies with test-time sparsity, in C.

>>> import tsad
>>> policy = tsad.load("pusht")
>>> policy.sparsity = 0.95
>>> policy.reset(seed=0)
>>> actions = policy(obs)

Importing and running need NumPy only; everything else is imported where it is used.
"""

from tsad import _program  # noqa: F401  # isort: skip  # before anything that takes its time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tsad.guard import Guard
    from tsad.recorder import Recorder

try:
    from tsad import _core  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"tsad's compiled core can't be imported ({error}); build and install it with "
        "'pip install .', and run Python outside the source folder"
    ) from error

from tsad import planners
from tsad.image_policy import ImagePolicy
from tsad.load import load
from tsad.plan import COMPUTE, REUSE_ROLLOUT, REUSE_STEP, REUSE_TYPE, SKIP, Plan
from tsad.policy import SparsePolicy

__all__ = [
    "COMPUTE",
    "REUSE_ROLLOUT",
    "REUSE_STEP",
    "REUSE_TYPE",
    "SKIP",
    "Guard",
    "ImagePolicy",
    "Plan",
    "Recorder",
    "SparsePolicy",
    "__version__",
    "load",
    "planners",
]

__version__: str


def __getattr__(name: str) -> Any:
    if name == "Recorder":  # not everybody's, as `sim`
        from tsad.recorder import Recorder

        return Recorder
    if name == "Guard":
        from tsad.guard import Guard

        return Guard
    if name in ("convert", "sim"):
        from importlib import import_module

        return import_module(f"tsad.{name}")
    if name != "__version__":
        raise AttributeError(f"module 'tsad' has no attribute {name!r}")
    from tsad._extras import version  # slow to import

    globals()["__version__"] = version()
    return globals()["__version__"]
