"""Losses and advantage estimators: pure functions of tensors, unreduced; keyword-only floats are their configuration.

``preference`` is the mapping from name to loss of a pair, whose file has the same name. A package is imported before its
files, and its file sets the attribute first, so the name below is the mapping whatever is imported first. What needs more
than a `PairLogps` has a mapping of its own with its own record: ``token_losses``, ``scored_losses``, ``explored_losses``,
``unpaired_losses``, ``valued_losses``, ``listwise_losses``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.errors import ConfigError, suggest
from posttrain.losses import (  # each registers its losses
    anchored,
    batchwise,
    games,
    links,
    margins,
    reference_free,
    separable,
)
from posttrain.losses.judged import ExploredPairs, ScoredPairs, explored_losses, scored_losses
from posttrain.losses.listwise import Scored, listwise_losses
from posttrain.losses.preference import PairLogps, preference
from posttrain.losses.tokenwise import TokenLogps, TokenPairs, token_losses
from posttrain.losses.unpaired import Labelled, Valued, unpaired_losses, valued_losses
from posttrain.registry import Registry, load_object

__all__ = [
    "LOSSES",
    "ExploredPairs",
    "Labelled",
    "PairLogps",
    "Scored",
    "ScoredPairs",
    "TokenLogps",
    "TokenPairs",
    "Valued",
    "anchored",
    "batchwise",
    "explored_losses",
    "find_loss",
    "games",
    "links",
    "listwise_losses",
    "margins",
    "preference",
    "reference_free",
    "scored_losses",
    "separable",
    "token_losses",
    "unpaired_losses",
    "valued_losses",
]


LOSSES = (
    preference,
    token_losses,
    scored_losses,
    explored_losses,
    listwise_losses,
    unpaired_losses,
    valued_losses,
)
"""The mappings of preference losses, by what they learn from."""


def find_loss(loss: str | Callable[..., Any]) -> Registry:
    """The mapping that holds a loss, by its name, by ``module:function``, or the function itself; pairs' if none does.

    Raises:
        ConfigError: an unknown name, or one that several methods share.
    """
    if isinstance(loss, str) and ":" not in loss:
        for kind in LOSSES:
            if loss in kind:
                return kind
        preference.refuse_ambiguous(loss)
        raise ConfigError(
            f"unknown preference loss '{loss}'; {suggest(loss, [name for kind in LOSSES for name in kind])}"
        )
    function = load_object(loss) if isinstance(loss, str) else loss
    return next((kind for kind in LOSSES if kind.facts(function)), preference)
