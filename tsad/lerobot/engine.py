"""What samples in place of LeRobot's loop: a tsad policy of the network alone.

Its observation is LeRobot's condition, already encoded and normalised, its actions are
normalised ones: the maps at both ends are the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tsad.lerobot.heads import describe, drops_out, parameters
from tsad.scope import scope

if TYPE_CHECKING:
    from tsad.plan import Plan
    from tsad.policy import SparsePolicy

PRECISIONS = ("float32", "int16", "int8")


@dataclass(frozen=True)
class Settings:
    """How to sample; what is None is the policy's own."""

    sampler: str | None = None
    """``"ddpm"``, ``"ddim"`` or ``"dpmsolver++"``; of flow matching ``"euler"`` or ``"rk4"``."""
    num_inference_steps: int | None = None
    timestep_spacing: str | None = None
    precision: str = "float32"
    """``"float32"``, ``"int16"`` or ``"int8"``: bits of the large matrices."""
    threads: int | None = None
    """Default: the CPUs that this process may use, at most four."""
    sparsity: float | None = None
    """The dial, 0 to 1 - 1/K."""
    plan: Plan | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            choices = ", ".join(map(repr, PRECISIONS))
            raise ValueError(
                f"precision: expected one of {choices}, got {self.precision!r}; choose one "
                f"({scope('precisions')})"
            )
        if self.sparsity is not None and self.plan is not None:
            raise ValueError("plan, sparsity: expected one of the two, got both; leave one out")
        from tsad.load import default_threads

        default_threads(self.threads, 1)

    @property
    def is_exact(self) -> bool:
        """Whether actions are LeRobot's own, up to float32 rounding."""
        return all(getattr(self, f.name) == f.default for f in fields(self) if f.name != "threads")


def lerobot_noise(policy: SparsePolicy, draw: Callable[[], Any], first: Any) -> Any:
    """Noise (K, lanes, horizon, action_dim), a torch tensor: ``first``, then what LeRobot draws.

    ``draw`` draws (lanes, horizon, action_dim).
    """
    import torch

    z = torch.zeros((policy.num_inference_steps, *first.shape))
    z[0] = first
    if policy.adds_noise:  # LeRobot draws after every step but the last timestep's
        for k, t in enumerate(policy.timesteps[:-1]):
            if t > 0:
                z[k + 1] = draw()
    return z


class Engine:
    """Samples for one policy (``owner`` and ``net``: see `tsad.lerobot.heads`). It keeps no
    reference to them, and copies without weights: a copy of the policy takes its own.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._policy: SparsePolicy | None = None
        self._weights: tuple[Any, ...] = ()
        self._samples: tuple[float, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        return Engine(self.settings)

    def __reduce__(self) -> Any:
        return Engine, (self.settings,)

    def check(self, owner: Any, net: Any) -> None:
        """Raises ``ValueError`` or ``TypeError`` where the settings or the network do not fit."""
        from tsad.config import PolicyConfig, block_names, block_types
        from tsad.planners import checks

        config = self._config(owner, net)
        steps = len(self._make_sampler(config).timesteps)
        network = PolicyConfig.from_dict(config, file="policy.config").network
        if self.settings.plan is not None:
            for plan in checks.plans_of(self.settings.plan, None):
                checks.bound_plan(plan, steps, block_names(network), block_types(network))
        elif self.settings.sparsity is not None:
            checks.check_dial("uniform", self.settings.sparsity, steps)

    def prepare(self, owner: Any, net: Any) -> None:
        """Take the weights now: errors of theirs are raised here, not by the first chunk."""
        self._ready(owner, net, 1)

    def runs(self, owner: Any, condition: Any) -> bool:
        """Whether to sample here; else LeRobot's own loop does.

        In training mode, too, where it is the same network: the UNet has no dropout.
        """
        import torch

        return (
            condition is not None
            and not torch.is_grad_enabled()
            and not (owner.training and drops_out(owner))
            and condition.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )

    def forget(self) -> None:
        """Take the weights anew at the next chunk."""
        self._policy, self._weights = None, ()

    def reset(self, net: Any) -> None:
        """Start of an episode: earlier chunks are forgotten, and changed weights are noticed."""
        if self._policy is None:
            return
        if self._sampled(net) != self._samples:
            self.forget()
        else:
            self._policy.reset()

    def sample(
        self,
        owner: Any,
        net: Any,
        batch_size: int,
        condition: Any,
        generator: Any = None,
        noise: Any = None,
    ) -> Any:
        """Normalised actions (batch_size, horizon, action_dim), as ``conditional_sample``."""
        import torch

        policy = self._ready(owner, net, batch_size)
        like = next(net.parameters())
        shape = (batch_size, policy.horizon, policy.action_dim)

        def draw() -> Any:
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

        z = lerobot_noise(policy, draw, draw() if noise is None else noise)
        cond = condition.detach().to(torch.float32)
        obs = cond.reshape(batch_size, policy.n_obs_steps, -1).contiguous()
        out = np.empty(shape, np.float32)
        policy(obs.numpy(), noise=z.numpy(), out=out, return_horizon=True)
        return torch.from_numpy(out).to(like.dtype)

    # ---- the policy behind it

    def _ready(self, owner: Any, net: Any, lanes: int) -> SparsePolicy:
        weights = tuple((p.data_ptr(), p._version) for p in net.parameters())
        if self._policy is None or weights != self._weights:
            self._policy = self._make(owner, net, lanes)
            self._weights, self._samples = weights, self._sampled(net)
        elif self._policy.lanes != lanes:
            self._policy = self._with_lanes(self._policy, lanes)
        return self._policy

    def _config(self, owner: Any, net: Any) -> dict[str, Any]:
        """A ``config.json`` of the network alone."""
        network, scheduler = describe(owner, net)
        obs_dim, action_dim = network["obs_dim"], network["action_dim"]

        def identity(n: int) -> dict[str, list[float]]:
            return {"scale": [1.0] * n, "offset": [0.0] * n}

        return {
            "format": "tsad",
            "format_version": 1,
            "network": network,
            "scheduler": scheduler,
            "normalizer": {"obs": identity(obs_dim), "action": identity(action_dim)},
        }

    def _make_sampler(self, config: dict[str, Any]) -> Any:
        from tsad.load import check_spacing
        from tsad.samplers import make_sampler

        s = self.settings
        scheduler = dict(config["scheduler"])
        if s.timestep_spacing is not None:
            check_spacing(s.timestep_spacing, scheduler["type"])
            scheduler["timestep_spacing"] = s.timestep_spacing
        return make_sampler(
            scheduler,
            sampler=s.sampler,
            num_inference_steps=s.num_inference_steps,
            coefficients=np.float32,  # as diffusers computes them
        )

    def _make(self, owner: Any, net: Any, lanes: int) -> SparsePolicy:
        from tsad.config import PolicyConfig
        from tsad.load import default_threads, make_model
        from tsad.policy import SparsePolicy

        config = self._config(owner, net)
        sampler = self._make_sampler(config)
        parsed = PolicyConfig.from_dict(config, file="policy.config")
        tensors: dict[str, NDArray[np.float32]] = {
            name: p.detach().float().cpu().contiguous().numpy()
            for name, p in parameters(net).items()
        }
        built = make_model(parsed, tensors, None, sampler, precision=self.settings.precision)
        threads = default_threads(self.settings.threads, lanes)
        policy = SparsePolicy(
            built,
            config=parsed,
            sampler=sampler,
            lanes=lanes,
            threads=threads,
            precision=self.settings.precision,
        )
        self._turn(policy)
        return policy

    def _with_lanes(self, old: SparsePolicy, lanes: int) -> SparsePolicy:
        """The same model for another batch size."""
        from tsad.load import default_threads
        from tsad.policy import SparsePolicy

        policy = SparsePolicy(
            old.model,
            config=old._config,
            sampler=old._sampler,
            lanes=lanes,
            threads=default_threads(self.settings.threads, lanes),
            precision=self.settings.precision,
        )
        self._turn(policy)
        return policy

    def _turn(self, policy: SparsePolicy) -> None:
        if self.settings.plan is not None:
            policy.plan = self.settings.plan
        elif self.settings.sparsity is not None:
            policy.sparsity = self.settings.sparsity

    @staticmethod
    def _sampled(net: Any) -> tuple[float, ...]:
        """A few numbers of every tensor, to notice weights that changed unseen."""
        found = []
        for p in net.parameters():
            flat = p.detach().reshape(-1)
            found += flat[:: max(1, flat.numel() // 3)][:3].tolist()
        return tuple(found)

    def __repr__(self) -> str:
        given = {k: v for k, v in asdict(self.settings).items() if v is not None}
        return f"Engine({given})"
