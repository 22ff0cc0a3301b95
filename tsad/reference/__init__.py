"""The specification: diffusion policies with test-time sparsity, in plain NumPy.

Four stages give one chunk of actions: encode, prune, plan, denoise. Nothing here is rewritten for
speed; the C core and every backend must equal it. Source: "Test-time Sparsity for Extreme Fast
Action Diffusion", arXiv 2605.13316. Read in this order:

``layers``     linear maps, norms, activations, attention
``dpt``        a family: Diffusion Policy's transformer; ``unet1d``, ``dit`` are others
``families``   what a family has to offer; how to add one
``chunk``      one chunk of any family: steps, sources, caches
``pruner``     the published pruner, which chooses the sources
``policy``     the stages behind the interface of ``tsad.load``, with lanes and episodes
``warm``       chunks that start from the one before
``lead``       what is made of the actions that are executed
``resnet``     images to the numbers of an observation

Letters: K denoising steps in loop order, B blocks, T horizon. ``w`` is a dict of tensors by name;
weights are (out, in).
"""

from tsad.reference.chunk import (
    COMPUTE,
    REUSE_ROLLOUT,
    REUSE_STEP,
    REUSE_TYPE,
    SKIP,
    Rollout,
    Sources,
    denoise,
)
from tsad.reference.dpt import branch, causal_masks, embed, encode, head, predict
from tsad.reference.layers import (
    Array,
    Network,
    Tensors,
    attention,
    gelu,
    layer_norm,
    linear,
    mish,
    relu,
    sinusoid,
    softmax,
)
from tsad.reference.lead import LeadReference
from tsad.reference.policy import ReferencePolicy
from tsad.reference.pruner import HoistedPruner, plan, prune
from tsad.reference.warm import WarmReference

__all__ = [
    "COMPUTE",
    "REUSE_ROLLOUT",
    "REUSE_STEP",
    "REUSE_TYPE",
    "SKIP",
    "Array",
    "HoistedPruner",
    "LeadReference",
    "Network",
    "ReferencePolicy",
    "Rollout",
    "Sources",
    "Tensors",
    "WarmReference",
    "attention",
    "branch",
    "causal_masks",
    "denoise",
    "embed",
    "encode",
    "gelu",
    "head",
    "layer_norm",
    "linear",
    "mish",
    "plan",
    "predict",
    "prune",
    "relu",
    "sinusoid",
    "softmax",
]
