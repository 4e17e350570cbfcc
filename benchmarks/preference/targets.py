"""What each loss targets, declared before any run: the number that it should move, which way, and against what.

Losses of pairs target the accuracy of their own reward on held-out pairs: of log-ratios to the start or of the policy's own
log-probabilities, summed or a token's. Those below were made for something else.
"""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.losses import (
    find_loss,
    listwise_losses,
    preference,
    scored_losses,
    token_losses,
    unpaired_losses,
    valued_losses,
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number out of `lab.measured`, the direction it should move, and what it is compared with: "start" or a loss."""

    number: str
    up: bool = True
    against: str = "start"


MADE_FOR = {
    "apo_down": Target(number="chosen", up=False),  # both responses become less likely, the rejected one more so
    "apo_zero": Target(number="chosen"),
    "cal_dpo": Target(number="chosen"),
    "cpo": Target(number="chosen"),
    "cpo_sum": Target(number="chosen"),
    "dpo_nll": Target(number="chosen", against="dpo"),
    "dpo_nll_masked": Target(number="chosen", against="dpo"),
    "dpop": Target(number="chosen"),
    "iterative_rpo": Target(number="chosen", against="dpo"),
    "ld_dpo": Target(number="length", up=False, against="dpo"),
    "nca": Target(number="chosen"),
    "nca_k": Target(number="chosen", against="info_nca"),
    "npo": Target(number="rejected", up=False),
    "npo_kl": Target(number="kl", up=False, against="npo"),
    "npo_nll": Target(number="chosen", against="npo"),
    "orpo": Target(number="chosen"),
    "r_dpo": Target(number="length", up=False, against="dpo"),
    "slic": Target(number="accuracy_gap"),
    "sppo_hard": Target(number="chosen"),
    "tdpo1": Target(number="kl", up=False, against="dpo"),
    "tdpo2": Target(number="kl", up=False, against="dpo"),
}

REGISTRIES = (preference, token_losses, scored_losses, listwise_losses, unpaired_losses, valued_losses)
"""Losses that train from data that is there; those of `explored_losses` need samples made while they run."""


def losses() -> list[str]:
    """Every loss that trains offline, family by family."""
    return [name for kind in REGISTRIES for name in sorted(kind)]


def target_of(loss: str) -> Target:
    """What a loss targets."""
    if loss in MADE_FOR:
        return MADE_FOR[loss]
    facts = find_loss(loss).facts(loss)
    reads = "accuracy" if "reference" in facts.get("needs", ("reference",)) else "accuracy_gap"
    return Target(number=reads + ("_token" if facts.get("per_token") else ""))
