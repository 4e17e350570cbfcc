"""Proofs that reward models can be trusted further, on the small world: ``python -m benchmarks.reward_trust``.

What is run, measured and expected stands in ``benchmarks/reward_trust.md``. Each seed's results are appended to
``benchmarks/results/reward_trust.jsonl``; finished seeds are skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from posttrain.data import parse_row, smallworld
from posttrain.data.answers import answer_rows
from posttrain.data.collate import ranking_rows
from posttrain.data.lengths import balance_lengths, length_gap, ranked_pairs
from posttrain.evals.bias import within_correlation
from posttrain.evals.overoptimisation import best_of_n
from posttrain.evals.reward import accuracy, pair_outcomes, ranking_ranks
from posttrain.evals.reward_eval import best_of_n_results
from posttrain.evals.statistics import paired_bootstrap
from posttrain.models.load import find_model, load_tokenizer, new_reward
from posttrain.models.policy import Model
from posttrain.rewards.debias import fit_length_slope, residual
from posttrain.rewards.ensemble import rule
from posttrain.rewards.model import score_rows
from posttrain.rollout.engine import uniforms
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import RewardModel
from posttrain.train.odin import Odin, length_role
from posttrain.train.optim import Optim
from posttrain.train.sources import ranking_source
from posttrain.types import Example
from posttrain.work.gold_samples import sampled

RESULTS = Path(__file__).parent / "results" / "reward_trust.jsonl"
PAIRS, FLIPPED, MEMBERS, EPOCHS, LR = 300, 0.25, 4, 4, 1e-3
PROMPTS, SAMPLES, TEMPERATURE, COUNTS = 48, 256, 1.3, tuple(2**k for k in range(9))
BIASED, HELD, SHORT_KEPT = 1000, 250, 0.2


def main() -> None:
    """Run what is not there yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=["overoptimisation", "length", "two_heads"], default=None)
    options = parser.parse_args()
    done = {(r["proof"], r["seed"]) for r in read(options.out)}
    for seed in map(int, options.seeds.split(",")):
        for proof in (overoptimisation, length, two_heads):
            name = proof.__name__
            seed += 3 * (proof is two_heads)  # seeds of its own: it was declared after those of `length` had been run
            if (name, seed) in done or options.only not in (None, name):
                continue
            started = time.process_time()
            row = {"proof": name, "seed": seed, **proof(seed), "cpu_seconds": round(time.process_time() - started, 1)}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, seed, json.dumps(row["verdict"]), f"{row['cpu_seconds']} s")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------------------- over-optimisation


def overoptimisation(seed: int) -> dict[str, Any]:
    """Best of n by single members and by ensembles, trained on pairs of which a quarter is flipped."""
    path = find_model("small").path
    tokenizer = load_tokenizer(path)
    pairs = flipped(one_pair_each(smallworld.rankings(PAIRS, seed=1000 + seed), seed), seed)
    members = [train(path, tokenizer, pairs, seed=100 * seed + k) for k in range(MEMBERS)]
    examples = sampled(PROMPTS, SAMPLES, seed=seed, temperature=TEMPERATURE)
    gold = np.array([[r.score for r in e.responses] for e in examples], dtype=np.float64)
    rows = [a.row for a in answer_rows(tokenizer, examples, max_length=512)]
    proxy = np.array([score_rows(m, [r for r in rows if r], max_tokens=4096) for m in members])  # [K, P, N]
    proxy -= proxy.mean(axis=(1, 2), keepdims=True)
    flat = proxy.reshape(MEMBERS, -1)
    ensembles = {
        "mean": rule("mean")(flat),
        "minimum": rule("minimum")(flat),
        "variance 0.5": rule("variance", 0.5)(flat),
    }
    singles = np.mean([best_of_n(p, gold, COUNTS) for p in proxy], axis=0)  # [P, counts]
    found = {"single": falls(singles)} | {
        name: falls(best_of_n(scores.reshape(gold.shape), gold, COUNTS)) for name, scores in ensembles.items()
    }
    results = {f"member {k}": best_of_n_results(p.tolist(), gold.tolist()) for k, p in enumerate(proxy)}
    results |= {n: best_of_n_results(s.reshape(gold.shape).tolist(), gold.tolist()) for n, s in ensembles.items()}
    single, penalised = found["single"], found["variance 0.5"]
    verdict = {
        "single falls": single["low"] > 0,
        "penalised ensemble falls": penalised["low"] > 0.01,
        "drop of single": single["drop"],
        "drop of penalised": penalised["drop"],
    }
    return {"counts": COUNTS, "falls": found, "best_of_n": results, "verdict": verdict}


def falls(values: np.ndarray) -> dict[str, Any]:
    """How far gold at the largest n lies under its highest point: ``[P, counts]`` by prompt, interval paired over prompts."""
    means = values.mean(axis=0)
    peak = int(means.argmax())
    found = paired_bootstrap(values[:, peak], values[:, -1], range(len(values)))
    return {
        "gold": means.tolist(),
        "peak_n": COUNTS[peak],
        "drop": found.mean,
        "low": found.low,
        "high": found.high,
        "prompts": found.n,
        "by_prompt": values.round(5).tolist(),
    }


def one_pair_each(rankings: Sequence[Mapping[str, Any]], seed: int) -> list[Example]:
    """A pair of each ranking, drawn by seed."""
    out = []
    for i, row in enumerate(rankings):
        pairs = ranked_pairs([parse_row(row)])
        out.append(pairs[int(uniforms(("pair", seed, i), 1)[0] * len(pairs))])
    return out


def flipped(pairs: Sequence[Example], seed: int) -> list[Example]:
    """The pairs, a share of ``FLIPPED`` of them the wrong way round."""
    draws = uniforms(("flip", seed), len(pairs))
    turn = lambda e: replace(e, responses=tuple(replace(r, rank=1 - (r.rank or 0)) for r in e.responses))  # noqa: E731
    return [turn(e) if u < FLIPPED else e for e, u in zip(pairs, draws, strict=True)]


# ---------------------------------------------------------------------------- length


def two_heads(seed: int) -> dict[str, Any]:
    """The same of two heads alone, on seeds that `length` did not use."""
    return length(seed, ("two heads",))


def length(seed: int, methods: Sequence[str] = ("balanced", "two heads", "residual")) -> dict[str, Any]:
    """Correlation with length and accuracy of models of pairs in which longer answers win too often."""
    path = find_model("small").path
    tokenizer = load_tokenizer(path)
    pairs = longer_wins(ranked_pairs([parse_row(r) for r in smallworld.rankings(2 * BIASED, seed=2000 + seed)]), seed)
    held = [parse_row(r) for r in smallworld.rankings(HELD, seed=3000 + seed, split="heldout")]
    rows, _ = ranking_rows(tokenizer, held, max_length=512)
    ranks = ranking_ranks(held)
    lengths = [[len(r.text) for r in e.responses] for e in held]
    raw_model = train(path, tokenizer, pairs, seed=seed)
    balanced, report = balance_lengths(pairs, seed=seed)
    scores = {"raw": score_rows(raw_model, rows, max_tokens=4096)}
    if "balanced" in methods:
        scores["balanced"] = score_rows(train(path, tokenizer, balanced, seed=seed), rows, max_tokens=4096)
    if "two heads" in methods:
        scores["two heads"] = score_rows(train(path, tokenizer, pairs, seed=seed, odin=True), rows, max_tokens=4096)
    if "residual" in methods:  # fitted where length does not also stand for what is better
        even_rows, _ = ranking_rows(tokenizer, balanced, max_length=512)
        even = score_rows(raw_model, even_rows, max_tokens=4096)
        slope = fit_length_slope(even, [[len(r.text) for r in e.responses] for e in balanced])
        scores["residual"] = [residual(s, n, slope).tolist() for s, n in zip(scores["raw"], lengths, strict=True)]
    outcomes = {name: pair_outcomes(s, ranks) for name, s in scores.items()}
    found: dict[str, Any] = {}
    for name, s in scores.items():
        rho, share = within_correlation(s, lengths), accuracy(outcomes[name])
        assert rho is not None
        mine, others = ([o.correct for o in outcomes[k]] for k in (name, "raw"))
        change = paired_bootstrap(mine, others, [o.ranking for o in outcomes["raw"]])
        found[name] = {
            "rho": [rho.mean, rho.low, rho.high],
            "accuracy": [share.mean, share.low, share.high],
            "change": [change.mean, change.low, change.high],
            "moved": [a - b for a, b in zip(mine, others, strict=True)],
        }
    base = abs(found["raw"]["rho"][0])
    verdict = {
        name: {"halved": abs(e["rho"][0]) <= base / 2, "points": round(100 * e["change"][0], 2)}
        for name, e in found.items()
        if name != "raw"
    }
    cluster = [o.ranking for o in outcomes["raw"]]
    return {"pairs": len(pairs), "balance": str(report), "models": found, "cluster": cluster, "verdict": verdict}


def longer_wins(pairs: Sequence[Example], seed: int) -> list[Example]:
    """One pair a ranking at most; those whose better answer is not the longer one stay with a chance of ``SHORT_KEPT``."""
    draws = uniforms(("longer", seed), len(pairs))
    kept: dict[str, Example] = {}
    for pair, u in zip(pairs, draws, strict=True):
        if length_gap(pair) > 0 or u < SHORT_KEPT:
            kept.setdefault(pair.prompt_key, pair)
    return list(kept.values())[:BIASED]


# ---------------------------------------------------------------------------- training


def train(path: str, tokenizer: Any, pairs: Sequence[Example], *, seed: int, odin: bool = False) -> Model:
    """A Bradley-Terry model of pairs, all weights of the small model, or one with a second head for length."""
    rows, _ = ranking_rows(tokenizer, pairs, max_length=512)
    ranks = [[r.rank or 0 for r in e.responses] for e in pairs]
    model = new_reward(path, dtype=torch.float32, seed=seed)
    source = ranking_source(rows, ranks, per_step=16, seed=seed)
    roles: dict[str, Model] = {"reward": model}
    if odin:
        roles["length"] = length_role(model)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            directory=Path(folder),
            steps=EPOCHS * source.steps_per_epoch,
            max_tokens=4096,
            save_every=10**6,
            console=Console(quiet=True),
        )
        optim = Optim(lr=LR, schedule="cosine", warmup_steps=8)
        fit(roles, Odin(weight=0.1) if odin else RewardModel(), source, optim=optim, run=run)
    model.net.requires_grad_(False)
    return model


if __name__ == "__main__":
    main()
