"""Losses and advantage estimators: pure functions of tensors, unreduced; keyword-only floats are their configuration.

``preference`` is the mapping from name to loss of a pair, whose file has the same name. A package is imported before its
files, and its file sets the attribute first, so the name below is the mapping whatever is imported first.
"""

from posttrain.losses import (
    anchored,
    batchwise,
    links,
    margins,
    reference_free,
    separable,
)  # they register their losses
from posttrain.losses.preference import PairLogps, preference

__all__ = [
    "PairLogps",
    "anchored",
    "batchwise",
    "links",
    "margins",
    "preference",
    "reference_free",
    "separable",
]
