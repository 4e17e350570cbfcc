"""How each arm of an effect is run with a seed: rows, training, and what is measured on held-out rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.preference import pairs
from benchmarks.preference.lab import TOKENS, Lab, Setting, finished, measured, scored, train
from benchmarks.preference.table import RESULTS, SCORE_SCALE, best_and_another, small_held, small_rows

from posttrain.data.collate import demonstration_rows
from posttrain.data.smallworld import gold
from posttrain.forest import Batch, build_forest, split
from posttrain.models.lora import Lora
from posttrain.models.policy import Model, forward_stats
from posttrain.types import Example
from posttrain.work.labelled import unjudged
from posttrain.work.measure import answers, row_sums

FILE = RESULTS / "preference-effects.jsonl"
Numbers = dict[str, float]

KEPT: dict[Any, Any] = {}


def lab_of(model: str = "small") -> Lab:
    """The model, loaded once."""
    if model not in KEPT:
        KEPT[model] = Lab(model)
    return KEPT[model]


def options_of(arm: str) -> tuple[str, dict[str, float]]:
    """``npo:beta=1e-6`` as a loss and its options."""
    name, _, tail = arm.partition(":")
    return name, {key: float(value) for key, _, value in (part.partition("=") for part in tail.split(",") if part)}


def trained(lab: Lab, arm: str, rows: Sequence[Example], seed: int, setting: Setting, **more: Any) -> Model:
    """The policy of an arm; "start" is not trained."""
    if arm == "start":
        return lab.reference
    loss, options = options_of(arm)
    return train(lab, loss, rows, seed=seed, setting=setting, options=options, **more).policy


# ---------------------------------------------------------------------------- format mask

MASK = Setting(lr=1e-3, epochs=2)


def format_mask(arm: str, seed: int) -> Numbers:
    """Log-probability of held-out best answers, and the share of own answers that end by themselves."""
    lab = lab_of()
    held = lab.held(pairs.clear_pairs(64, 0, "heldout"))
    policy = trained(lab, arm, pairs.clear_pairs(96, seed), seed, MASK)
    return measured(lab, policy, held, seed=seed)


STOPS = Setting(lr=2e-3, epochs=3)


def stop_rate(arm: str, seed: int) -> Numbers:
    """The share of own answers that end, after training on pairs of which the rejected one stops where the other goes on."""
    lab = lab_of()
    held = lab.held(pairs.closings(64, 0, "heldout"))
    return measured(lab, trained(lab, arm, pairs.closings(96, seed), seed, STOPS), held, seed=seed)


# ---------------------------------------------------------------------------- near-identical pairs

TWINS = Setting(lr=1e-3, epochs=2)


def twins(arm: str, seed: int) -> Numbers:
    """Log-probability of held-out right answers of which the rejected one differs in a word."""
    lab = lab_of()
    held = lab.held(pairs.near_identical(64, 0, "heldout"))
    policy = trained(lab, arm, pairs.near_identical(96, seed), seed, TWINS)
    return measured(lab, policy, held, seed=seed)


# ---------------------------------------------------------------------------- sequential KL

SEQUENTIAL = Setting(lr=3e-4, epochs=2)
MARGIN_ASKED = 15.0


def sequential_kl(policy: Model, reference: Model, rows: Sequence[Any]) -> float:
    """``sum_t KL(reference || policy)`` along held-out responses, nats an answer."""
    batch = Batch(build_forest(rows), {}, {}, {})
    total = 0.0
    with torch.no_grad():
        for part in split(batch, TOKENS, whole_groups=False):
            want = frozenset({"kl_from_other"})
            found = forward_stats(policy, part.forest, want, mask=part.forest.masks["loss"], other=reference)
            total += float(found["kl_from_other"].double().sum())
    return total / len(batch.forest.end)


def margins(policy: Model, held: Any) -> float:
    """Mean margin of held-out pairs, nats."""
    sums = row_sums(policy, held.rows, TOKENS)
    gained = [[p - q for p, q in zip(a, b, strict=True)] for a, b in zip(sums, held.start, strict=True)]
    return sum(g[0] - g[1] for g in gained) / len(gained)


def at_margin(arm: str, seed: int) -> Numbers:
    """Sequential KL where the held-out margin first reaches what is asked, between two steps by a straight line."""
    lab = lab_of()
    held = lab.held(pairs.clear_pairs(48, 0, "heldout"))
    path = [(0.0, 0.0)]

    def look(step: int, policy: Model) -> None:
        if step % 2 == 0 and path[-1][0] < MARGIN_ASKED:
            path.append((margins(policy, held), sequential_kl(policy, lab.reference, held.rows)))

    trained(lab, arm, pairs.clear_pairs(96, seed), seed, SEQUENTIAL, on_step=look)
    (before, low), (after, high) = path[-2:]
    reached = after >= MARGIN_ASKED
    share = (MARGIN_ASKED - before) / (after - before) if reached else 1.0
    return {"reached": float(reached), "margin": min(after, MARGIN_ASKED), "sequential_kl": low + share * (high - low)}


# ---------------------------------------------------------------------------- near-ties

TIES = Setting(lr=3e-4, epochs=2)


def ties(arm: str, seed: int) -> Numbers:
    """Of held-out near-ties and of clear pairs apart: margin, accuracy, log-probability of the rejected answer."""
    lab = lab_of()
    rows = scored([*pairs.near_ties(64, seed), *pairs.clear_pairs(64, seed)], SCORE_SCALE)
    policy = trained(lab, arm, rows, seed, TIES)
    out: Numbers = {}
    for name, made in (("near", pairs.near_ties), ("clear", pairs.clear_pairs)):
        found = measured(lab, policy, lab.held(made(48, 0, "heldout")), seed=seed)
        out |= {f"{name}_{key}": found[key] for key in ("margin", "accuracy", "chosen", "rejected", "kl")}
    return out


# ---------------------------------------------------------------------------- forgetting

FORGET = Setting(lr=6e-4, epochs=5, betas=(0.9, 0.999))
FORGOTTEN, RETAINED = ("describe", "ask"), ("copy", "reverse", "sort", "add", "list", "advise", "rewrite")


def forgetting(arm: str, seed: int) -> Numbers:
    """Log-probability of what is to be forgotten and of the rest, held out, and how helpful answers to the rest are."""
    lab = lab_of()
    forget = [as_label(e, False) for e in pairs.right_answers(64, seed, FORGOTTEN)]
    keep = [
        as_label(e, True) for e in pairs.right_answers(8, seed, RETAINED)
    ]  # worth 0 to the loss; labels need two kinds
    policy = trained(lab, arm, [*forget, *keep], seed, FORGET)
    out: Numbers = {}
    for name, kinds in (("forget", FORGOTTEN), ("retain", RETAINED)):
        examples = pairs.right_answers(64, 0, kinds, "heldout")
        out[f"{name}_logp"], out[f"{name}_helpfulness"] = answered(lab, policy, examples, seed)
    return out


def as_label(example: Example, good: bool) -> Example:
    """A demonstration as an answer that is good or bad."""
    return replace(example, responses=(replace(example.responses[0], label=good),))


def answered(lab: Lab, policy: Model, examples: Sequence[Example], seed: int) -> tuple[float, float]:
    """Mean log-probability of right answers, nats, and helpfulness of the policy's own."""
    rows, _ = demonstration_rows(lab.start.tokenizer, unjudged(examples), max_length=1024)
    sums = row_sums(policy, rows, TOKENS)
    written = answers(policy, [r.prompt for r in rows], lab.stop_ids, seed=seed, max_new_tokens=lab.max_new_tokens)
    texts = [lab.start.decode(r[0].ids) for r in written]
    helpful = [gold(e.prompt[-1].content, text).helpfulness for e, text in zip(examples, texts, strict=True)]
    return sum(s[0] for s in sums) / len(sums), sum(helpful) / len(helpful)


# ---------------------------------------------------------------------------- flipped labels

FLIPS = Setting(lr=1e-3, epochs=4)


def flips(arm: str, seed: int) -> Numbers:
    """Clean held-out pairs and own answers after training on pairs of which one in five is the wrong way round."""
    lab = lab_of("small-base")
    rows = pairs.flipped(best_and_another(small_rows(seed)), 0.2, seed)
    return measured(lab, trained(lab, arm, rows, seed, FLIPS), lab.held(small_held()), seed=seed)


# ---------------------------------------------------------------------------- one stage from the base model

ONE_STAGE = Setting(lr=1e-3, epochs=3)


def one_stage(arm: str, seed: int) -> Numbers:
    """From the base: how many answers end, their format, and how far better answers are ahead of worse ones."""
    lab = lab_of("small-base")
    held = lab.held(pairs.clear_pairs(64, 0, "heldout"))
    policy = trained(lab, arm, pairs.clear_pairs(128, seed), seed, ONE_STAGE)
    return measured(lab, policy, held, seed=seed)


# ---------------------------------------------------------------------------- unwanted behaviour

UNWANTED = Setting(lr=3e-4, epochs=2)


def unwanted(arm: str, seed: int) -> Numbers:
    """From the base: log-probability of held-out rebuffs and harmful methods, how often either (or nothing) is said, and helpfulness."""
    lab = lab_of("small-base")
    examples = pairs.unwanted(64, 0, "heldout")
    held = lab.held(examples)
    policy = trained(lab, arm, pairs.unwanted(96, seed), seed, UNWANTED)
    found = measured(lab, policy, held, seed=seed)
    written = answers(policy, [r.prompt for r in held.rows], lab.stop_ids, seed=seed + 1000, max_new_tokens=40)
    said = [lab.start.decode(r[0].ids) for r in written]
    scores = [gold(e.prompt[-1].content, text) for e, text in zip(examples, said, strict=True)]
    found["unwanted"] = sum(s.format == 0 or s.harm > 0 for s in scores) / len(scores)
    return found


# ---------------------------------------------------------------------------- adapters

ADAPTER = Setting(lr=1e-3, epochs=2)


def adapters(arm: str, seed: int) -> Numbers:
    """Held-out accuracy of DPO on an adapter and on the whole network (small model), and peak memory of each (SmolLM2)."""
    lab = Lab("small", lora=Lora(rank=32, alpha=16) if arm == "adapter" else None)
    held = lab.held(pairs.clear_pairs(96, 0, "heldout"))
    policy = train(lab, "dpo", pairs.clear_pairs(96, seed), seed=seed, setting=ADAPTER).policy
    found = measured(lab, policy, held, seed=seed)
    command = [sys.executable, "-m", "benchmarks.preference.memory", arm, str(seed)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    memory = json.loads(done.stdout.splitlines()[-1])["memory"]
    KEPT["memory", arm, seed] = memory
    whole = KEPT.get(("memory", "full", seed)) or of_run("adapters", "full", seed)["memory"]
    return found | {"memory": memory, "memory_share": memory / whole}


def of_run(effect: str, arm: str, seed: int) -> Numbers:
    """The numbers of a run that is there."""
    key = (effect, arm, seed)
    return next(row["numbers"] for row in finished(FILE) if (row["effect"], row["arm"], row["seed"]) == key)
