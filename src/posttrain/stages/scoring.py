"""The stages that train a reward model of any kind, alone or several as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from posttrain.errors import ConfigError
from posttrain.stages.base import Plan
from posttrain.stages.training import TrainReward


@dataclass(frozen=True, kw_only=True)
class TrainScorer(TrainReward):
    """A reward model of a kind in `posttrain.rewards.kinds`; sizes are those of `TrainReward`.

    ``loss`` and ``options`` change a kind's loss of pairs and its numbers (`posttrain.losses.reward_pairs`), ``centre`` is the
    coefficient of ``(s_chosen + s_rejected)^2``. ``attributes`` names those to learn (none: all that the data has) and
    ``attribute_weights`` what each is worth in the score. ``domains`` maps an example's kind to the system prompt that the model
    is given. ``verdicts`` maps words to what each is worth and ``question`` asks for one. Steps end at ``separator`` where
    the data has none, and ``aggregation`` makes one score of them. A gated model starts from the directory of an
    attribute model, in ``model``. Writes a plain model directory and ``reward.json``.
    """

    WORK: ClassVar[str] = "posttrain.work.reward_kinds:run"
    DATA: ClassVar[tuple[str, ...]] = ()
    TINY: ClassVar[Mapping[str, Any]] = {"model": "small", "lora_rank": 0, "lr": 1e-3, "epochs": 3.0}
    kind: str = "bradley_terry"
    loss: str = ""
    options: dict[str, float] = field(default_factory=dict[str, float])
    centre: float = 0.0
    attributes: tuple[str, ...] = ()
    attribute_weights: tuple[float, ...] = ()
    domains: dict[str, str] = field(default_factory=dict[str, str])
    question: str = ""
    verdicts: dict[str, float] = field(default_factory=dict[str, float])
    separator: str = "\n"
    aggregation: Literal["product", "min", "mean", "last"] = "product"

    def check(self) -> None:
        """Also refuse an unknown kind or loss, and options that it does not have or that would do nothing."""
        from posttrain.losses.reward_pairs import reward_losses
        from posttrain.rewards.kinds import find_kind

        kind = find_kind(self.kind)
        if kind.loss:
            reward_losses.bound(self.loss or kind.loss, self.options)
        elif self.loss or self.options or self.centre:
            raise ConfigError(f"a {self.kind} model has a loss of its own; leave loss, options and centre out")
        only = {"attributes": "attributes", "attribute_weights": "attributes", "domains": "domains"}
        only |= {"question": "verdicts", "verdicts": "verdicts"}
        for name, form in only.items():
            if getattr(self, name) and kind.form != form:
                raise ConfigError(f"a {self.kind} model reads no {name}; leave it out")
        super().check()


@dataclass(frozen=True, kw_only=True)
class TrainEnsemble(TrainScorer):
    """Several reward models of one kind as one; they differ in the seed of their head, adapter and order of data.

    With ``share`` they stand on one network in memory, an adapter and a head each (Zhai et al. 2023); else each is a model of its
    own. ``rule`` (`posttrain.rewards.ensemble`) joins their scores, with ``penalty`` (None: the rule's own) on disagreement. Writes a
    directory with the members in it, which is taken wherever a reward model's is.
    """

    WORK: ClassVar[str] = "posttrain.work.reward_ensemble:run"
    TINY: ClassVar[Mapping[str, Any]] = {"model": "small", "lora_rank": 8, "lr": 1e-3, "epochs": 3.0}
    members: int = 3
    share: bool = True
    rule: str = "variance"
    penalty: float | None = None

    def check(self) -> None:
        """Also refuse a rule or penalty that is not known, and members that can't share what they stand on."""
        from posttrain.rewards.ensemble import rule
        from posttrain.rewards.kinds import find_kind

        rule(self.rule, self.penalty)
        form = find_kind(self.kind).form
        if self.members < 2:
            raise ConfigError(f"got members={self.members}; an ensemble has at least 2")
        if form in ("gated", "verdicts") or (self.share and form == "attributes"):
            raise ConfigError(
                f"members of kind '{self.kind}' can't be an ensemble"
                + (" that shares a network; give share False" if form == "attributes" else "")
            )
        if self.share and not self.lora_rank:
            raise ConfigError("members that share a network differ by their adapters; give lora_rank, or share False")
        super().check()

    def plan(self) -> Plan:
        """One member after the other."""
        one = super().plan()
        return replace(one, tokens=self.members * one.tokens, flops=self.members * one.flops)
