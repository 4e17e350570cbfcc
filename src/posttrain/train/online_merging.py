"""Merging at every step: the optimiser's update is merged with what the start model had learnt since its base.

``task = theta_start - theta_base`` (a supervised model and the pretrained one it came from), ``delta`` is the step that AdamW has
just taken. A rule merges the two, tensor by tensor, and the weights move by what it returns. ``task`` is added at every step, so
that after T steps weights have drifted by up to ``alpha T task``: alpha must be tiny.

Source: Lu et al. 2024, Online Merging Optimizers, arXiv 2405.17931.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.models.merge import coins, require
from posttrain.registry import Registry

Key = Sequence[object]
Rule = Callable[..., Tensor]

online_merges = Registry("online merging")
"""Names to rules ``(delta, task, key, *, alpha, keep) -> step``; the fact ``trimmed`` says that ``task`` comes trimmed."""


@online_merges.register("ondare")
def ondare(delta: Tensor, task: Tensor, key: Key, *, alpha: float, keep: float) -> Tensor:
    """Sparse by chance, ``(1 - alpha) m delta + alpha n task``; each entry of the masks m and n is 1 with probability ``keep``.

    What stays is not divided by ``keep``, so that steps are shorter than AdamW's by that factor in the mean.

    Source: Lu et al. 2024, arXiv 2405.17931, equation 4.
    """
    one, two = (coins(delta.shape, keep, [*key, part]).to(delta.device) for part in ("delta", "task"))
    return blend(delta * one, task * two, alpha)


@online_merges.register("ondare_rescaled")
def ondare_rescaled(delta: Tensor, task: Tensor, key: Key, *, alpha: float, keep: float) -> Tensor:
    """As `ondare`, divided by ``keep``, as the authors' released optimiser does; unlike theirs, ``n`` is drawn at every step.

    Source: Lu et al. 2024, arXiv 2405.17931, released code.
    """
    return ondare(delta, task, key, alpha=alpha, keep=keep) / keep


@online_merges.register("onties", trimmed=True)
def onties(delta: Tensor, task: Tensor, key: Key, *, alpha: float, keep: float) -> Tensor:
    """Sparse by size, then one sign: with ``u = (1 - alpha) F(delta)``, ``v = alpha F(task)``, u + v where they agree, else the larger.

    ``F`` keeps the share ``keep`` of a tensor's entries that are largest in size. ``task`` comes trimmed.

    Source: Lu et al. 2024, arXiv 2405.17931, equation 7.
    """
    one, two = (1 - alpha) * largest(delta, keep), alpha * task
    larger = torch.where(one.abs() > two.abs(), one, two)
    return torch.where((one.sign() == two.sign()) | (one.abs() == two.abs()), one + two, larger)


@online_merges.register("onties_unweighted", trimmed=True)
def onties_unweighted(delta: Tensor, task: Tensor, key: Key, *, alpha: float, keep: float) -> Tensor:
    """As `onties` with the sign of ``F(delta) + F(task)`` before they are weighted, as in the authors' released optimiser.

    ``task`` is far larger than one step: it wins wherever the two disagree, and steps against it are not taken.

    Source: Lu et al. 2024, arXiv 2405.17931, released code.
    """
    trimmed = largest(delta, keep)
    sign = torch.where(trimmed + task >= 0, 1.0, -1.0)
    return blend(trimmed * (trimmed.sign() == sign), task * (task.sign() == sign), alpha)


def blend(delta: Tensor, task: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) delta + alpha task``."""
    return (1 - alpha) * delta + alpha * task


def largest(tensor: Tensor, keep: float) -> Tensor:
    """The share ``keep`` (one entry at least) of entries largest in size, and what equals the smallest of them; the others 0."""
    size = tensor.abs()
    count = max(1, round(keep * tensor.numel()))
    least = size.flatten().kthvalue(tensor.numel() - count + 1).values
    return torch.where(size >= least, tensor, 0.0)


@dataclass(frozen=True, kw_only=True)
class OnlineMerge:
    """What an optimiser needs to merge at every step.

    Attributes:
        rule: a name in `online_merges`.
        alpha: the share of ``task`` in a step, in [0, 1].
        keep: the share of entries that stays, in (0, 1].
        task: by role and parameter, in the dtype of its master; parameters that are not there move as AdamW moves them.
        seed: of the masks, which are keyed by seed, step, role and name: a run that goes on draws what it would have drawn.
    """

    rule: str
    alpha: float
    keep: float
    task: Mapping[str, Mapping[str, Tensor]]
    seed: int = 0

    def merged(self, role: str, name: str, step: int, start: Tensor, end: Tensor) -> Tensor:
        """Where a parameter goes that AdamW would move from ``start`` to ``end`` in its step number ``step`` (from 1)."""
        rule: Rule = online_merges[self.rule]
        delta = end - start
        moved = rule(delta, self.task[role][name], [self.seed, step, role, name], alpha=self.alpha, keep=self.keep)
        return torch.where(moved == delta, end, start + moved)  # start + delta may differ from end in the last bit


def check_numbers(rule: str, alpha: float, keep: float) -> None:
    """Raise `ConfigError` for a rule that is not known, or numbers outside their ranges."""
    online_merges[rule]
    require("alpha", alpha, 0 <= alpha <= 1, "0 to 1; the paper's search starts at 1e-7")
    require("keep", keep, 0 < keep <= 1, "more than 0, at most 1")


def task_vectors(
    parameters: Mapping[str, nn.Parameter], base: Mapping[str, Tensor], rule: str, keep: float
) -> dict[str, Tensor]:
    """``theta_start - theta_base`` of every parameter, in fp32 at least, trimmed if the rule wants it; read one at a time.

    Heads of reward and value models, which no base has, are left out.

    Raises:
        ConfigError: a parameter that the base has not, or has in another shape.
    """
    trimmed = online_merges.facts(rule).get("trimmed", False)
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name.startswith("scalar."):
            continue
        if name not in base or base[name].shape != parameter.shape:
            raise ConfigError(
                f"the merging base has no '{name}' of shape {tuple(parameter.shape)}; give the model it came from"
            )
        wide = torch.promote_types(parameter.dtype, torch.float32)
        task = parameter.detach().to(wide) - base[name].to(wide).to(parameter.device)
        found[name] = largest(task, keep) if trimmed else task
    return found
