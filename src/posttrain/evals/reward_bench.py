"""The two public ways to sum up a reward model's accuracy: RewardBench's sections and RM-Bench's matrix of styles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError
from posttrain.types import Example

_PROGRAMS = dict.fromkeys(("hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"), 164)
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100,
        "alpacaeval-length": 95,
        "alpacaeval-hard": 95,
        "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37,
        "llmbar-natural": 100,
        "llmbar-adver-neighbor": 134,
        "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47,
        "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100,
        "refusals-offensive": 100,
        "xstest-should-refuse": 154,
        "xstest-should-respond": 250,
        "donotanswer": 136,
    },
    "Reasoning": {"math-prm": 984, **_PROGRAMS},
}
"""RewardBench's sections: subset to its weight, its number of pairs; math's 447 count as the 984 of programming do."""

PRIOR_SETS = "Prior Sets"
"""The fifth section, of older test sets, which counts half."""


def section_scores(accuracy: Mapping[str, float]) -> dict[str, float]:
    """Return each section's accuracy, weighted by subset size, of the sections whose subsets are all there.

    Args:
        accuracy: subset to accuracy; names that belong to no section are ignored.

    Source: Lambert et al. 2024, arXiv 2403.13787, section 4.2.
    """
    found = {}
    for section, weights in SECTIONS.items():
        if all(name in accuracy for name in weights):
            found[section] = sum(w * accuracy[name] for name, w in weights.items()) / sum(weights.values())
    if PRIOR_SETS in accuracy:
        found[PRIOR_SETS] = accuracy[PRIOR_SETS]
    return found


def total_score(sections: Mapping[str, float]) -> float:
    """The mean of the four sections; with prior sets, those count half a section.

    Raises:
        ConfigError: a section is missing.
    """
    missing = [name for name in SECTIONS if name not in sections]
    if missing:
        raise ConfigError(
            f"no accuracy for {', '.join(missing)}; RewardBench's total needs all of {', '.join(SECTIONS)}"
        )
    weights = dict.fromkeys(SECTIONS, 1.0) | ({PRIOR_SETS: 0.5} if PRIOR_SETS in sections else {})
    return sum(w * sections[name] for name, w in weights.items()) / sum(weights.values())


def style_matrix(chosen: ArrayLike, rejected: ArrayLike) -> NDArray[np.float64]:
    """``[S, S]`` accuracy of the chosen answer in style i against the rejected one in style j; ties count half.

    Args:
        chosen: ``[R, S]`` scores of right answers, styles from concise to marked up.
        rejected: ``[R, S]`` scores of wrong ones, in the same styles.

    Raises:
        ConfigError: shapes that differ, or no rows.

    Source: Liu et al. 2024 (RM-Bench), arXiv 2410.16184, section 3.4.
    """
    right, wrong = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if right.ndim != 2 or right.shape != wrong.shape or not len(right):
        raise ConfigError(f"got scores {right.shape} and {wrong.shape}; expected both [rows, styles]")
    return (np.sign(right[:, :, None] - wrong[:, None, :]) / 2 + 0.5).mean(axis=0)


def style_summary(matrix: NDArray[np.float64]) -> dict[str, float]:
    """The means of the three parts of the matrix.

    ``hard`` is above the diagonal, where the wrong answer is the more elaborate one; ``normal`` on it; ``easy`` below.
    """
    upper, lower = np.triu_indices(len(matrix), 1), np.tril_indices(len(matrix), -1)
    return {
        "hard": float(matrix[upper].mean()),
        "normal": float(np.diag(matrix).mean()),
        "easy": float(matrix[lower].mean()),
        "mean": float(matrix.mean()),
    }


def styled_rows(examples: Sequence[Example]) -> list[int]:
    """Positions of the examples with as many right as wrong answers, each with the style it is in (RM-Bench's rows)."""
    found = []
    for i, example in enumerate(examples):
        styles = [[r.meta.get("style") for r in example.responses if r.rank == rank] for rank in (0, 1)]
        if styles[0] and styles[0] == styles[1] and None not in styles[0]:
            found.append(i)
    return found
