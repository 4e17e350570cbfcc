"""AdamW with fp32 masters, learning-rate schedules, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from posttrain.errors import CheckError, ConfigError
from posttrain.train.ema import Average
from posttrain.train.fused import Moved, check_fused, fused_step
from posttrain.train.online_merging import OnlineMerge
from posttrain.train.rounding import rounded


@dataclass(frozen=True, kw_only=True)
class Optim:
    """How parameters move.

    ``lr`` is the peak for every role, ``role_lr`` overrides it by role; the schedule is a linear warm-up over
    ``warmup_steps`` from ``1 / warmup_steps`` of the peak, then ``schedule``: "constant", "linear" or "cosine" down to
    ``floor`` of the peak, reached one step after the last. ``clip`` bounds the gradient's norm, role by role. With ``merge``
    each step is merged with what the start model had learnt since its base. ``average`` follows a role's weights. ``fused``
    makes the step within the backward pass (`posttrain.train.fused`), which wants ``clip`` infinite.
    """

    lr: float
    role_lr: Mapping[str, float] = field(default_factory=dict[str, float])
    schedule: str = "constant"
    warmup_steps: int = 0
    floor: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    merge: OnlineMerge | None = None
    average: Average | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        """Refuse a fused step that needs all gradients at once."""
        if self.fused:
            check_fused(self)


def schedule_factor(optim: Optim, step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` (from 0) of ``steps``.

    Raises:
        ConfigError: an unknown schedule.
    """
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "linear":
        return 1 - (1 - optim.floor) * done
    if optim.schedule == "cosine":
        return optim.floor + (1 - optim.floor) * 0.5 * (1 + math.cos(math.pi * done))
    raise ConfigError(f"unknown schedule '{optim.schedule}'; expected constant, linear or cosine")


class NonFiniteGradient(CheckError):
    """A gradient whose norm is NaN or infinite; nothing was changed."""


class MasterAdamW:
    """torch's AdamW on fp32 copies of narrower parameters; fp32 and fp64 parameters are their own masters.

    ``before_change`` is called before masters, moments and parameters move: someone may still be reading them.
    """

    def __init__(self, roles: Mapping[str, Mapping[str, nn.Parameter]], optim: Optim) -> None:
        """Prepare masters and moments for ``roles[role][name]``."""
        self.roles = {role: dict(named) for role, named in roles.items()}
        self.optim = optim
        self.before_change: Callable[[], None] = lambda: None
        self.masters: dict[str, dict[str, Tensor]] = {}
        groups = []
        for role, named in self.roles.items():
            self.masters[role] = {
                n: p.detach().float().clone() if p.dtype in (torch.bfloat16, torch.float16) else p
                for n, p in named.items()
            }
            groups.append({"params": list(self.masters[role].values()), "name": role})
        self.inner = torch.optim.AdamW(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
        )
        self._moved = Moved()  # by the last pass of a fused step
        if optim.average is not None:
            optim.average.begin(self.masters)

    @contextmanager
    def last_pass(self, factor: float) -> Iterator[None]:
        """Around the last backward pass before `step`: where the step is fused, it is made within."""
        if not self.optim.fused:
            yield
            return
        with fused_step(self, factor) as self._moved:
            yield

    def set_rates(self, factor: float) -> None:
        """Set each role's learning rate to ``factor`` of its peak."""
        for group in self.inner.param_groups:
            group["lr"] = factor * self.optim.role_lr.get(group["name"], self.optim.lr)

    def step(self, factor: float) -> float:
        """Clip, update, clear gradients; returns the norm of all gradients before clipping.

        Raises:
            NonFiniteGradient: nothing was changed.
        """
        norms: list[float] = []
        for role, named in self.roles.items():
            masters = list(self.masters[role].values())
            for parameter, master in zip(named.values(), masters, strict=True):
                if master is not parameter and parameter.grad is not None:
                    master.grad = parameter.grad.float()
            norms.append(float(nn.utils.clip_grad_norm_(masters, self.optim.clip)))
        total = math.sqrt(sum(n * n for n in norms) + self._moved.squares)
        self._moved = Moved()
        if not math.isfinite(total):
            raise NonFiniteGradient(
                f"the gradient's norm is {total} ({dict(zip(self.roles, norms, strict=True))}); weights are unchanged"
            )
        self.before_change()
        self.set_rates(factor)
        starts = self._decayed()
        self.inner.step()
        for (role, name), start in starts.items():
            assert self.optim.merge is not None
            master = self.masters[role][name]
            step = int(self.inner.state[master]["step"])
            master.data.copy_(self.optim.merge.merged(role, name, step, start, master.data))
        for role, named in self.roles.items():
            for name, parameter in named.items():
                master = self.masters[role][name]
                if master is not parameter:
                    self.follow(parameter, master)
        if self.optim.average is not None:
            self.optim.average.move(self.masters)
        self.clear()
        return total

    def follow(self, parameter: nn.Parameter | Tensor, master: Tensor) -> None:
        """Put a master's value into its narrower parameter; bf16 is rounded at random (`posttrain.train.rounding`)."""
        moment = self.inner.state.get(master, {}).get("exp_avg") if parameter.dtype == torch.bfloat16 else None
        parameter.data.copy_(rounded(master.detach(), moment))

    def _decayed(self) -> dict[tuple[str, str], Tensor]:
        """Copies of the masters that are merged, after the weight decay of this step: decay is no part of what is merged."""
        task = {} if self.optim.merge is None else self.optim.merge.task
        rates = {group["name"]: group["lr"] for group in self.inner.param_groups}
        return {
            (role, name): master.detach() * (1 - rates[role] * self.optim.weight_decay)
            for role, named in self.masters.items()
            for name, master in named.items()
            if name in task.get(role, {}) and master.grad is not None
        }

    def clear(self) -> None:
        """Drop all gradients."""
        self.inner.zero_grad(set_to_none=True)
        for named in self.roles.values():
            for parameter in named.values():
                parameter.grad = None

    def dtypes(self) -> dict[str, str]:
        """What each role's trained parameters are computed in."""
        return {
            role: ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in named.values()}))
            for role, named in self.roles.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Masters, moments and the average by flat name, for a checkpoint."""
        out: dict[str, Tensor] = {} if self.optim.average is None else self.optim.average.named()
        for role, masters in self.masters.items():
            for name, master in masters.items():
                out[f"{role}/master/{name}"] = master.detach()
                for key, value in self.inner.state.get(master, {}).items():
                    out[f"{role}/{key}/{name}"] = torch.as_tensor(value)
        return out

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore masters, moments and the parameters that follow them.

        Raises:
            CheckError: the checkpoint is of other parameters.
        """
        self.before_change()
        for key in tensors:
            role, _, name = key.split("/", 2)
            if name not in self.masters.get(role, {}):
                raise CheckError(f"the checkpoint has '{key}', which is not trained here; it is of another model")
        for role, masters in self.masters.items():
            for name, master in masters.items():
                key = f"{role}/master/{name}"
                if key not in tensors or tensors[key].shape != master.shape:
                    raise CheckError(
                        f"the checkpoint has no '{key}' of shape {tuple(master.shape)}; it is of another model"
                    )
                master.data.copy_(tensors[key])
                state = {
                    k: tensors[f"{role}/{k}/{name}"].clone()
                    for k in ("step", "exp_avg", "exp_avg_sq")
                    if f"{role}/{k}/{name}" in tensors
                }
                if state:
                    self.inner.state[master] = state
                if master is not self.roles[role][name]:
                    self.follow(self.roles[role][name], master)
        if self.optim.average is not None:
            self.optim.average.load(tensors)
