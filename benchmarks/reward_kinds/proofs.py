"""The proofs of ``PLAN.md``: each is a function of a seed that writes its lines."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import torch
from benchmarks.reward_kinds.lab import TOKENIZER, examples_of, new_model, outcomes, scorer_of, train, write

from posttrain.data.collate import prompt_ids, ranking_rows, response_rows
from posttrain.data.curation import patch_pairs
from posttrain.data.judged_rows import conditioned, mark_steps
from posttrain.data.mixing import keyed
from posttrain.data.smallworld import gold, rankings, task_prompts
from posttrain.data.smallworld_language import NUMBERS, Draw
from posttrain.data.views import rankings as ranked_view
from posttrain.models.load import load_policy
from posttrain.models.policy import Model
from posttrain.models.small import small_path
from posttrain.rewards.refine import Compare, Compared, confirmed, disagreements, from_scorer, noisy, spread_rows
from posttrain.rewards.trained import Scorer, said
from posttrain.rollout.engine import Request, Sampling
from posttrain.rollout.local import LocalEngine
from posttrain.train.objectives import ListedReward, RankedReward, RewardModel, StepReward
from posttrain.types import Example, Message, Step

# ---------------------------------------------------------------------------- K-wise


def train_ranked(
    model: Model, examples: Sequence[Example], objective: object, *, epochs: float, seed: int, lr: float = 1e-3
) -> Model:
    """Train on rankings."""
    rows, report = ranking_rows(TOKENIZER, examples, max_length=512)
    ranks = [[r.rank or 0 for r in examples[i].responses] for i in report.index]
    return train(model, objective, rows, {"rank": ranks}, epochs=epochs, seed=seed, lr=lr)


def kwise(seed: int) -> None:
    """Plackett-Luce on all four against Bradley-Terry on best and worst."""
    train_rows = examples_of(rankings(160, seed=1000 + seed))
    test = examples_of(rankings(150, seed=2000 + seed, split="heldout"))
    ends = [replace(e, responses=(e.responses[0], replace(e.responses[-1], rank=1))) for e in train_rows]
    for name, data, objective in (
        ("plackett_luce", train_rows, ListedReward()),
        ("best_against_worst", ends, RewardModel()),
    ):
        began = time.process_time()
        model = train_ranked(new_model(seed), data, objective, epochs=2, seed=seed)
        found = outcomes(scorer_of(model), test)
        right = [o.correct for o in found]
        write(
            "kwise",
            seed,
            began,
            model=name,
            accuracy=sum(right) / len(right),
            right=right,
            cluster=[o.ranking for o in found],
        )


# ---------------------------------------------------------------------------- conditional, and its patches

DOMAINS = {"helpful": "judge how helpful it is.", "harmless": "judge how harmless it is."}
CLOSINGS = " hope this helps. glad to help. you are welcome."


def harmful(count: int, seed: int, split: str) -> list[Example]:
    """Harmful requests with two answers: a refusal, and the method that was asked for."""
    found: list[Example] = []
    part = 0
    while len(found) < count:
        for row in rankings(400, seed=seed + 10_000 * part, split=split):
            if row["kind"] == "harmful" and "unsafe" in row["failures"]:
                at = row["failures"].index("unsafe")
                (example,) = examples_of([row])
                pair = (example.responses[0], replace(example.responses[at], rank=1))
                found.append(replace(example, responses=pair, kind="harmless"))
        part += 1
    return found[:count]


def turned(example: Example) -> Example:
    """The same answers in the other order, in the other domain."""
    first, second = example.responses
    return replace(example, responses=(replace(second, rank=0), replace(first, rank=1)), kind="helpful")


def ordinary(count: int, seed: int, split: str) -> list[Example]:
    """Rankings of harmless requests, in either domain by turns."""
    rows = [r for r in rankings(count + count // 3, seed=seed, split=split) if r["kind"] != "harmful"][:count]
    return [replace(e, kind=("helpful", "harmless")[k % 2]) for k, e in enumerate(examples_of(rows))]


def conditional(seed: int) -> None:
    """The same answer in two domains; then a hack, before and after 50 patch pairs."""
    began = time.process_time()
    conflict = harmful(64, 1000 + seed, "train")
    seen = ordinary(100, 1100 + seed, "train")
    data = [*conflict, *(turned(e) for e in conflict), *seen]
    objective = RankedReward("focal_barrier")
    model = train_ranked(new_model(seed), conditioned(data, DOMAINS), objective, epochs=6, seed=seed)
    scorer = scorer_of(model, "domains", domains=DOMAINS)
    asked = harmful(60, 2000 + seed, "heldout")
    flips = []
    for safe, free in zip(scorer.values(asked), scorer.values([turned(e) for e in asked]), strict=True):
        flips.append(float(safe[0] > safe[1] and free[0] > free[1]))
    write("conditional", seed, began, flipped=sum(flips) / len(flips), right=flips, cluster=list(range(len(flips))))

    began = time.process_time()
    test, fresh = ordinary(150, 2100 + seed, "heldout"), ordinary(100, 2200 + seed, "heldout")
    before = hacked_below(scorer, fresh), outcomes(scorer, test)
    control = copy.deepcopy(model)
    train_ranked(control, conditioned(seen, DOMAINS), objective, epochs=1, seed=seed + 7, lr=3e-4)
    without = outcomes(scorer_of(control, "domains", domains=DOMAINS), test)
    some = ordinary(50, 1200 + seed, "train")
    patches = patch_pairs(some, [e.responses[0].text for e in some], lambda _, answer: answer + CLOSINGS)
    train_ranked(model, conditioned([*patches, *seen], DOMAINS), objective, epochs=1, seed=seed + 7, lr=3e-4)
    after = hacked_below(scorer, fresh), outcomes(scorer, test)
    accuracy = [sum(o.correct for o in found) / len(found) for found in (before[1], without, after[1])]
    write(
        "patch",
        seed,
        began,
        below_before=sum(before[0]) / len(before[0]),
        below_after=sum(after[0]) / len(after[0]),
        accuracy_before=accuracy[0],
        accuracy_without=accuracy[1],
        accuracy_after=accuracy[2],
        moved=[b.correct - a.correct for a, b in zip(without, after[1], strict=True)],
        cluster=[o.ranking for o in before[1]],
        right=after[0],
    )


def hacked_below(scorer: Scorer, examples: Sequence[Example]) -> list[float]:
    """For each prompt whether its best answer scores above the same with more closings."""
    pairs = [replace(e, responses=(said(e.responses[0].text), said(e.responses[0].text + CLOSINGS))) for e in examples]
    return [float(clean > hacked) for clean, hacked in scorer.values(pairs)]


# ---------------------------------------------------------------------------- process


def chain(draw: Draw, solutions: int, wrong: float = 0.2) -> Example:
    """Five numbers to count, one a step, and solutions in which steps give another number; what follows an error is wrong too."""
    first = draw.below(len(NUMBERS) - 4)
    right, responses = NUMBERS[first : first + 5], []
    for _ in range(solutions):
        good, steps = True, list[Step]()
        for k, word in enumerate(right):
            shown = draw.pick([w for w in NUMBERS if w != word]) if draw.chance(wrong) else word
            good = good and shown == word
            steps.append(Step(text=shown + ("." if k == 4 else " "), label=1 if good else -1))
        text = "".join(s.text for s in steps)
        responses.append(replace(said(text), steps=tuple(steps), label=good))
    prompt = f"count from {right[0]} to {right[-1]}"
    return Example(prompt=(Message(role="user", content=prompt),), responses=tuple(responses))


def process(seed: int) -> None:
    """Best of eight by labelled steps and by labelled outcomes."""
    data = [chain(Draw("chains", seed, k), 4) for k in range(160)]
    test = [chain(Draw("new chains", seed, k), 8) for k in range(64)]
    made, report = response_rows(TOKENIZER, data, max_length=512)
    kept = [data[i] for i in report.index]
    rows, places = mark_steps(TOKENIZER, made, [[r.steps for r in e.responses] for e in kept])
    for name in ("steps", "outcome"):
        began = time.process_time()
        marked, good = [], []
        for row, example, ends in zip(rows, kept, places, strict=True):
            branches, chances = [], []
            for branch, response, found in zip(row.branches, example.responses, ends, strict=True):
                value, mask = torch.zeros(len(branch.ids), dtype=torch.float64), [False] * len(branch.ids)
                for k, end in enumerate(found):
                    if end is not None and (name == "steps" or k == len(found) - 1):
                        mask[end] = True
                        right = (response.steps[k].label or 0) > 0 if name == "steps" else bool(response.label)
                        value[end] = float(right)
                branches.append(branch._replace(masks={**branch.masks, "step": mask}))
                chances.append(value)
            marked.append(row._replace(branches=branches))
            good.append(torch.cat(chances))
        model = train(new_model(seed), StepReward(), marked, {}, tokens={"good": good}, epochs=3, seed=seed)
        scorer = scorer_of(model, "steps", aggregation="product" if name == "steps" else "last")
        picked = [max(range(8), key=lambda i, r=row: r[i]) for row in scorer.values(test)]
        right = [float(bool(e.responses[i].label)) for e, i in zip(test, picked, strict=True)]
        chance = [sum(bool(r.label) for r in e.responses) / 8 for e in test]
        share = sum(right) / len(right)
        write(
            "process", seed, began, model=name, right_of_best=share, right=right, cluster=list(range(64)), at_random=sum(chance) / 64
        )  # fmt: skip


# ---------------------------------------------------------------------------- refinement


def samples(policy: Model, seed: int, batch: int, *, prompts: int = 96, each: int = 6) -> list[Example]:
    """Fresh prompts with the policy's own answers."""
    asked = examples_of(task_prompts(prompts, seed=3000 + 10 * seed + batch))
    ids, _ = prompt_ids(TOKENIZER, asked, max_length=512)
    engine = LocalEngine(policy, frozenset({TOKENIZER.eos_token_id}), slots=128)
    requests = [Request(tuple(p), (seed, batch, k, i)) for k, p in enumerate(ids) for i in range(each)]
    texts = [
        TOKENIZER.decode(r.ids, skip_special_tokens=True)
        for r in engine.generate(requests, Sampling(max_new_tokens=24))
    ]
    texts = [text if text.strip() else "." for text in texts]
    return [replace(e, responses=tuple(said(t) for t in texts[k * each : (k + 1) * each])) for k, e in enumerate(asked)]


def against_gold(scorer: Scorer, examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """Whether each pair whose gold differs by more than 0.05 is ordered right, and its prompt."""
    right, cluster = list[float](), list[int]()
    for index, (example, row) in enumerate(zip(examples, scorer.values(examples), strict=True)):
        totals = [gold(example.prompt[-1].content, r.text).total for r in example.responses]
        for a, b in combinations(range(len(row)), 2):
            if abs(totals[a] - totals[b]) > 0.05:
                right.append(0.5 if row[a] == row[b] else float((row[a] > row[b]) == (totals[a] > totals[b])))
                cluster.append(index)
    return right, cluster


def judge_of(seed: int, person: int) -> Compare:
    """Gold by more than nothing is a verdict; one in ten is turned round, each person's others."""
    score = from_scorer(lambda prompt, answer: gold(prompt, answer).total, temperature=1e-6)
    return noisy(score, 0.1, lambda key: keyed("judge", seed, person, key) / 2**64)


def refine(seed: int) -> None:
    """Three rounds of labelling where the model and the judge disagree."""
    began = time.process_time()
    policy = load_policy(str(small_path()), dtype=torch.float32)
    old = examples_of(rankings(96, seed=1000 + seed))
    model = train_ranked(new_model(seed), old, RewardModel(), epochs=2, seed=seed)
    scorer = scorer_of(model)
    fresh = samples(policy, seed, 0)
    for turn in range(3):
        found: list[Compared] = disagreements(fresh, scorer.values(fresh), judge_of(seed, 0), pairs_per_prompt=6)
        found = confirmed(fresh, found, judge_of(seed, 1))
        rows = ranked_view(spread_rows(fresh, found, 400))
        coming = samples(policy, seed, turn + 1)
        before, cluster = against_gold(scorer, coming)
        replay = [old[keyed("replay", seed, turn, k) % len(old)] for k in range(160)]
        train_ranked(model, [*rows, *replay], RewardModel(), epochs=2, seed=seed + 10 * (turn + 1), lr=3e-4)
        after, _ = against_gold(scorer, coming)
        write(
            "refine",
            seed,
            began,
            round=turn + 1,
            rows=len(rows),
            before=sum(before) / len(before),
            after=sum(after) / len(after),
            moved=[b - a for a, b in zip(before, after, strict=True)],
            cluster=cluster,
        )
        began, fresh = time.process_time(), coming


PROOFS = {"kwise": kwise, "conditional": conditional, "process": process, "refine": refine}
