"""The stage that trains a reward model of any kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from posttrain.errors import ConfigError
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
