"""The numbers a run closes with, ``results.json``: what it holds, and the functions that build each section.

``results.json`` holds, each section optional except ``schema`` and ``machine``::

    schema              1
    machine             {line, device, threads, fp32_gflops, bf16_gflops}; the last two measured, GFLOP/s
    reward_accuracy     {model: {accuracy, low, high, pairs, rankings,
                                 by_failure: {label: {accuracy, low, high, pairs, rankings}},
                                 by_ranking: [accuracy of each ranking]}}
                        models: reward, reward_unseen, and the baselines length, bag_of_words, frozen_base,
                        all on the same held-out rankings; length has also direction ("longer" or "shorter",
                        chosen on training rankings) and flipped (accuracy of the other direction here)
    reward_comparisons  [{name: "reward - length", mean, low, high, n, excludes_zero}]
                        every reward model against every baseline
    policies            {policy: {scorer: {mean, low, high, n}, kl, length, truncated: the same, seconds}}
                        kl in nats a sequence against the supervised policy, length in tokens, truncated
                        a share, seconds to generate
    differences         [{name: "ppo - sft", scorer, mean, low, high, n, excludes_zero}]
    prompts             how many stand behind policies and differences
    samples_per_prompt  the largest number of answers a prompt
    rows                {"policies/POLICY/SCORER": [number]}: each mean under policies, by prompt
    samples             [{prompt, answers: {policy: {text, scores: {scorer: number}, truncated}}}]
    worst               the same with {scorer, before, after, drop}: the prompts that training made worse
    stages              {stage: seconds}

Intervals are 95 % by bootstrap over rankings or prompts (`posttrain.evals.statistics`); n counts those.
A bound that does not exist (a single ranking or prompt) is null. ``excludes_zero`` is the function of that
name in `posttrain.evals.statistics`, which also wants at least 6 of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.errors import ConfigError, DataError
from posttrain.evals.grids import MEASURES
from posttrain.evals.reward import PairOutcome, accuracy, group_by_failure
from posttrain.evals.statistics import Interval, cluster_bootstrap, excludes_zero, paired_bootstrap

SCHEMA = 1
BASELINES = ("length", "bag_of_words", "frozen_base")

Scores = Mapping[str, Mapping[str, ArrayLike]]  # policy -> scorer -> [prompts, samples]
Answers = Mapping[str, Sequence[Sequence[str]]]  # policy -> [prompts][samples] text


def closing_results(
    *,
    machine: Mapping[str, Any],
    reward_accuracy: Mapping[str, Any] | None = None,
    reward_comparisons: Sequence[Mapping[str, Any]] | None = None,
    policy: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
    worst: Sequence[Mapping[str, Any]] | None = None,
    stages: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Put the sections together; what a recipe does not have stays out.

    Args:
        machine: from `machine_section`.
        reward_accuracy: from `reward_section`.
        reward_comparisons: from `compare_rewards`.
        policy: from `policy_section`.
        samples: from `sample_rows`.
        worst: from `worst_rows`.
        stages: seconds by stage.
    """
    sections = {
        "reward_accuracy": reward_accuracy,
        "reward_comparisons": reward_comparisons,
        **(policy or {}),
        "samples": samples,
        "worst": worst,
        "stages": stages,
    }
    return {"schema": SCHEMA, "machine": dict(machine)} | {k: v for k, v in sections.items() if v is not None}


def machine_section(*, device: str, threads: int, fp32_gflops: float, bf16_gflops: float) -> dict[str, Any]:
    """Build ``machine``: without it no time or speed in the tables says anything.

    Args:
        device: what computed, in words.
        threads: that torch used.
        fp32_gflops: speed of an fp32 matrix product, measured, GFLOP/s.
        bf16_gflops: the same in bf16.
    """
    speeds = f"matrix products at {fp32_gflops:.0f} GFLOP/s in fp32, {bf16_gflops:.0f} in bf16"
    line = f"{device}, {threads} thread{'s' * (threads != 1)}, {speeds}"
    numbers = {"fp32_gflops": round(fp32_gflops, 1), "bf16_gflops": round(bf16_gflops, 1)}
    return {"line": line, "device": device, "threads": threads} | numbers


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Write ``results.json`` in one step, so that no reader sees half of it; nan and infinity are refused."""
    try:
        text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ConfigError(f"results can't be written to {path}: {error}; expected finite numbers or None") from error
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def read_results(path: Path) -> dict[str, Any]:
    """Read ``results.json``.

    Raises:
        DataError: not JSON, or of another schema.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; run the evaluation stage again") from error
    found = results.get("schema") if isinstance(results, dict) else None
    if found != SCHEMA:
        raise DataError(f"{path} has schema {found}, expected {SCHEMA}; run the evaluation stage again")
    return results


def reward_section(
    outcomes: Mapping[str, Sequence[PairOutcome]], *, length_direction: int | None = None
) -> dict[str, Any]:
    """Build ``reward_accuracy``: each model's accuracy on the same pairs, overall and by failure label.

    Args:
        outcomes: model name to its `pair_outcomes`.
        length_direction: the direction the "length" baseline was given, from training rankings.

    Raises:
        ConfigError: models judged on different pairs, or a "length" model without its direction.
    """
    _same_pairs(outcomes)
    section: dict[str, Any] = {}
    for model, pairs in outcomes.items():
        groups = group_by_failure(pairs).items()
        section[model] = _accuracy_entry(pairs) | {
            "by_failure": {label: _accuracy_entry(g) for label, g in groups},
            "by_ranking": _by_ranking(pairs),
        }
    if "length" in section:
        if length_direction not in (1, -1):
            raise ConfigError(f"got length_direction {length_direction}; expected 1 or -1, from `length_direction`")
        direction = "longer" if length_direction == 1 else "shorter"
        section["length"] |= {"direction": direction, "flipped": 1 - section["length"]["accuracy"]}
    return section


def compare_rewards(
    outcomes: Mapping[str, Sequence[PairOutcome]], *, baselines: Sequence[str] = BASELINES
) -> list[dict[str, Any]]:
    """Build ``reward_comparisons``: each reward model's accuracy minus each baseline's, paired by ranking."""
    _same_pairs(outcomes)
    rows = []
    for model in (name for name in outcomes if name not in baselines):
        for baseline in (name for name in baselines if name in outcomes):
            ours, theirs = outcomes[model], outcomes[baseline]
            interval = paired_bootstrap(
                [o.correct for o in ours], [o.correct for o in theirs], [o.ranking for o in ours]
            )
            rows.append({"name": f"{model} - {baseline}"} | _difference(interval))
    return rows


def policy_section(
    scores: Scores,
    *,
    kl: Mapping[str, ArrayLike] | None = None,
    length: Mapping[str, ArrayLike] | None = None,
    truncated: Mapping[str, ArrayLike] | None = None,
    seconds: Mapping[str, float] | None = None,
    resamples: int = 4000,
    seed: int = 0,
) -> dict[str, Any]:
    """Build ``policies``, ``differences`` and ``rows``: means by policy, later minus earlier policy, means by prompt.

    Args:
        scores: policy to scorer to ``[prompts, samples]``; policies in order of training (base, sft, ppo),
            all on the
            same prompts in the same order. Differences pair a prompt's mean under one policy with that
            under the other.
        kl: policy to ``[prompts, samples]``, nats a sequence against the supervised policy.
        length: the same in tokens.
        truncated: the same, whether the answer stopped at the length limit.
        seconds: seconds that each policy took to generate.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        ConfigError: scorers or prompts that differ between policies, a policy without a measure that others
            have,
            a score that is not finite.
    """
    tables = {
        policy: {name: _table(values, policy, name) for name, values in row.items()} for policy, row in scores.items()
    }
    prompts, samples = _shared_shape(tables)
    options = {"resamples": resamples, "seed": seed}
    policies: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[float]] = {}
    for policy, row in tables.items():
        measured = dict(row)
        for name, given in (("kl", kl), ("length", length), ("truncated", truncated)):
            if given is not None:
                measured[name] = _table(_of(given, policy, name), policy, name)
        policies[policy] = {
            name: _mean_entry(values, prompts, policy, name, options) for name, values in measured.items()
        }
        rows |= {f"policies/{policy}/{name}": values.mean(axis=1).tolist() for name, values in measured.items()}
        if seconds is not None:
            policies[policy]["seconds"] = float(_of(seconds, policy, "seconds"))
    return {
        "policies": policies,
        "differences": _differences(tables, prompts, options),
        "prompts": prompts,
        "samples_per_prompt": samples,
        "rows": rows,
    }


def sample_rows(
    prompts: Sequence[str],
    answers: Answers,
    scores: Scores,
    *,
    truncated: Mapping[str, ArrayLike] | None = None,
    count: int = 6,
) -> list[dict[str, Any]]:
    """Build ``samples``: each policy's first answer on ``count`` evenly spaced prompts."""
    chosen = np.unique(np.linspace(0, len(prompts) - 1, min(count, len(prompts))).round().astype(int))
    return [_answer_row(int(i), 0, prompts, answers, scores, truncated) for i in chosen]


def worst_rows(
    prompts: Sequence[str],
    answers: Answers,
    scores: Scores,
    *,
    before: str,
    after: str,
    scorer: str = "reward",
    truncated: Mapping[str, ArrayLike] | None = None,
    count: int = 5,
) -> list[dict[str, Any]]:
    """Build ``worst``: the prompts whose mean score fell most, ``before`` to ``after``; fewer if fewer fell.

    Shown of each is the sample number whose own score fell most.
    """
    old, new = (_table(scores[p][scorer], p, scorer) for p in (before, after))
    drop = old.mean(axis=1) - new.mean(axis=1)
    shared = min(old.shape[1], new.shape[1])
    shown = np.argmax(old[:, :shared] - new[:, :shared], axis=1)
    order = [int(i) for i in np.argsort(-drop, kind="stable") if drop[i] > 0][:count]
    return [
        _answer_row(i, int(shown[i]), prompts, answers, scores, truncated)
        | {"scorer": scorer, "before": before, "after": after, "drop": float(drop[i])}
        for i in order
    ]


def _answer_row(
    prompt: int,
    sample: int,
    prompts: Sequence[str],
    answers: Answers,
    scores: Scores,
    truncated: Mapping[str, ArrayLike] | None,
) -> dict[str, Any]:
    """Collect one prompt's answers; a policy with fewer samples shows its last."""
    row: dict[str, Any] = {"prompt": prompts[prompt], "answers": {}}
    for policy, texts in answers.items():
        at = min(sample, len(texts[prompt]) - 1)
        row["answers"][policy] = {
            "text": texts[prompt][at],
            "scores": {name: float(np.asarray(values)[prompt, at]) for name, values in scores[policy].items()},
            "truncated": None if truncated is None else bool(np.asarray(truncated[policy])[prompt, at]),
        }
    return row


def _differences(
    tables: Mapping[str, Mapping[str, NDArray[np.float64]]], prompts: int, options: Any
) -> list[dict[str, Any]]:
    """Compare each policy with each earlier one on every scorer, the last policy first."""
    names = list(tables)
    pairs = [(names[j], names[i]) for j in range(len(names) - 1, 0, -1) for i in range(j - 1, -1, -1)]
    rows = []
    for scorer in tables[names[0]]:
        for new, old in pairs:
            means = [tables[policy][scorer].mean(axis=1) for policy in (new, old)]
            interval = paired_bootstrap(means[0], means[1], range(prompts), **options)
            rows.append({"name": f"{new} - {old}", "scorer": scorer} | _difference(interval))
    return rows


def _table(values: ArrayLike, policy: str, name: str) -> NDArray[np.float64]:
    """Return ``[prompts, samples]`` float64."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or table.size == 0:
        raise ConfigError(f"{name} of policy '{policy}' has shape {table.shape}; expected [prompts, samples]")
    return table


def _of(given: Mapping[str, Any], policy: str, name: str) -> Any:
    """Look a policy's measure up, refusing a hole."""
    if policy not in given:
        raise ConfigError(f"{name} has {', '.join(given) or 'no policy'} but not '{policy}'; expected every policy")
    return given[policy]


def _shared_shape(tables: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> tuple[int, int]:
    """Check that policies share scorers and prompts; return prompts and the largest number of samples."""
    scorers = {policy: tuple(row) for policy, row in tables.items()}
    if len(set(scorers.values())) != 1 or not next(iter(scorers.values())):
        raise ConfigError(f"got scorers {scorers}; expected at least one policy, and the same scorers for each")
    reserved = set(MEASURES) & set(next(iter(scorers.values())))
    if reserved:
        raise ConfigError(f"a scorer is called {sorted(reserved)}; expected a name other than {', '.join(MEASURES)}")
    shapes = {f"{policy}.{name}": table.shape for policy, row in tables.items() for name, table in row.items()}
    if len({shape[0] for shape in shapes.values()}) != 1:
        raise ConfigError(f"got [prompts, samples] {shapes}; expected the same prompts for every policy and scorer")
    return next(iter(shapes.values()))[0], max(shape[1] for shape in shapes.values())


def _mean_entry(table: NDArray[np.float64], prompts: int, policy: str, name: str, options: Any) -> dict[str, Any]:
    """Average ``[prompts, samples]`` with its interval by prompt."""
    if table.shape[0] != prompts:
        raise ConfigError(f"{name} of policy '{policy}' has {table.shape[0]} prompts; expected {prompts}")
    return _entry(cluster_bootstrap(table.ravel(), np.repeat(np.arange(prompts), table.shape[1]), **options))


def _same_pairs(outcomes: Mapping[str, Sequence[PairOutcome]]) -> None:
    """Refuse a comparison of models on different pairs."""
    keys = {model: [(o.ranking, o.better, o.worse) for o in pairs] for model, pairs in outcomes.items()}
    first = next(iter(keys.values()), [])
    odd = [model for model, key in keys.items() if key != first]
    if odd or not first:
        raise ConfigError(
            f"models {odd or list(keys)} have other pairs than the first, or none; expected the same for all"
        )


def _accuracy_entry(pairs: Sequence[PairOutcome]) -> dict[str, Any]:
    """Return accuracy with its interval and what it was counted on."""
    entry = _entry(accuracy(pairs))
    return {
        "accuracy": entry["mean"],
        "low": entry["low"],
        "high": entry["high"],
        "pairs": len(pairs),
        "rankings": entry["n"],
    }


def _by_ranking(pairs: Sequence[PairOutcome]) -> list[float]:
    """Return the accuracy within each ranking, in the order of the data."""
    found: dict[int, list[float]] = {}
    for pair in pairs:
        found.setdefault(pair.ranking, []).append(pair.correct)
    return [float(np.mean(found[ranking])) for ranking in sorted(found)]


def _difference(interval: Interval) -> dict[str, Any]:
    return _entry(interval) | {"excludes_zero": excludes_zero(interval)}


def _entry(interval: Interval) -> dict[str, Any]:
    """Return an interval as JSON has it: bounds that do not exist are None."""
    bounds = {k: v if math.isfinite(v) else None for k, v in (("low", interval.low), ("high", interval.high))}
    return {"mean": interval.mean, **bounds, "n": interval.n}
