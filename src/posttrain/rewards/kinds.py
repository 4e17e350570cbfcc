"""The kinds of reward models: what each learns from, how rows are made of it, and how its outputs become one score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from posttrain.errors import ConfigError, suggest

Form = Literal["responses", "domains", "attributes", "steps", "pairs", "verdicts", "gated"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind.

    Attributes:
        form: what rows are made of, and so how a score is read.
        loss: the loss of pairs it is trained with; "" where the form has one of its own.
        data: what the responses need.
        sign: -1 where a better response gets the lower output (costs); the score is always higher for better.
        summary: one line.
        options: changes of the loss's defaults.
    """

    form: Form
    summary: str
    data: str = "ranks"
    loss: str = ""
    sign: int = 1
    options: dict[str, float] = field(default_factory=dict[str, float])


def _pairs(loss: str, summary: str, data: str = "ranks") -> Kind:
    return Kind(form="responses", loss=loss, summary=summary, data=data, sign=-1 if loss == "cost" else 1)


KINDS: dict[str, Kind] = {
    "bradley_terry": _pairs("bradley_terry", "every pair of a ranking, each answer computed once"),
    "margin": _pairs("margin", "a gap at least as wide as the ratings differ", "ranks and scores"),
    "tempered": _pairs("tempered", "Bradley-Terry of gaps over a temperature"),
    "focal": _pairs("focal", "pairs already right count less"),
    "focal_barrier": _pairs("focal_barrier", "focal, and scores held within -5 and 5"),
    "hinge": _pairs("hinge", "gaps up to a target"),
    "margin_mse": _pairs("margin_mse", "gaps near a target"),
    "soft": _pairs("soft", "cross-entropy on the probability that a pair's order is right", "pairs with a probability"),
    "scaled": _pairs("scaled", "pairs weighted by how much their ratings differ", "ranks and scores"),
    "cost": _pairs("cost", "harm: below 0 is safe, above 0 unsafe", "ranks and the attribute safe"),
    "plackett_luce": Kind(form="responses", summary="the likelihood of each whole ranking"),
    "conditional": Kind(form="domains", loss="focal_barrier", summary="one model, a system prompt for each domain"),
    "attributes": Kind(
        form="attributes", summary="a rating for each attribute, and their weighted sum", data="attributes"
    ),
    "process": Kind(form="steps", summary="the chance of each step to be good", data="labelled steps"),
    "pairwise": Kind(
        form="pairs", loss="bradley_terry", summary="P(a over b), both answers in one input, in both orders"
    ),
    "generative": Kind(form="verdicts", summary="a language model's verdict in words", data="scores, labels or ranks"),
    "gated": Kind(form="gated", summary="attributes weighted by a gate that reads the prompt"),
}
"""What ``posttrain train reward --kind`` takes."""


def find_kind(name: str) -> Kind:
    """The kind of a name.

    Raises:
        ConfigError: an unknown one.
    """
    if name not in KINDS:
        raise ConfigError(f"unknown kind of reward model '{name}'; {suggest(name, KINDS)}")
    return KINDS[name]
