"""Effects of preference objectives, declared before they were measured: arms, sizes, seeds, numbers and directions.

``python -m benchmarks.preference effects [NAME ...]`` appends the runs that are missing to
``benchmarks/results/preference-effects.jsonl``. Settings (`arms`) were chosen on seeds from 100; reported are seeds 0, 1 and 2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.preference import arms
from benchmarks.preference.arms import FILE, MARGIN_ASKED, Numbers
from benchmarks.preference.lab import append, finished

SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """``number`` of an arm less that of another (or of "start", or of nothing) lies ``above`` or below ``bound``."""

    number: str
    arm: str
    against: str = ""
    above: bool = True
    bound: float = 0.0
    says: str = ""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A question, how each arm is run with a seed, and what is expected."""

    question: str
    arms: tuple[str, ...]
    sizes: str
    run: Callable[[str, int], Numbers]
    claims: tuple[Claim, ...]


EFFECTS = {
    "format_mask": Effect(
        question=(
            "Does a likelihood term with a format mask keep chosen answers probable where DPO alone lets them fall?"
        ),
        sizes="Small model, 96 pairs of a best and a worst answer, 24 steps; 64 held-out pairs.",
        arms=("start", "dpo", "dpo_nll", "dpo_nll_masked"),
        run=arms.format_mask,
        claims=(
            Claim(
                number="chosen", arm="dpo", against="start", above=False, says="`dpo`: the chosen log-probability falls"
            ),
            Claim(
                number="chosen",
                arm="dpo_nll_masked",
                against="start",
                bound=-1.0,
                says="`dpo_nll_masked`: it falls by less than 1 nat",
            ),
            Claim(
                number="chosen",
                arm="dpo_nll_masked",
                against="dpo",
                says="`dpo_nll_masked` keeps more of it than `dpo`",
            ),
        ),
    ),
    "stop_rate": Effect(
        question="Do answers still end, where rejected answers stop at a place where chosen ones go on?",
        sizes="Small model, 96 pairs that agree up to there, 36 steps; one answer to each of 64 held-out prompts.",
        arms=("start", "dpo", "dpo_nll_masked"),
        run=arms.stop_rate,
        claims=(
            Claim(number="stopped", arm="dpo", against="start", above=False, says="`dpo`: fewer answers end"),
            Claim(
                number="stopped",
                arm="dpo_nll_masked",
                against="start",
                bound=-0.02,
                says="`dpo_nll_masked`: the share that ends falls by less than 0.02",
            ),
        ),
    ),
    "twins": Effect(
        question="Do chosen answers stay probable where rejected ones differ in a single word?",
        sizes="Small model, 96 pairs, 24 steps; 64 held-out pairs.",
        arms=("start", "dpo", "dpop"),
        run=arms.twins,
        claims=(
            Claim(
                number="chosen", arm="dpo", against="start", above=False, says="`dpo`: the chosen log-probability falls"
            ),
            Claim(number="chosen", arm="dpop", against="dpo", says="`dpop` keeps more of it than `dpo`"),
        ),
    ),
    "at_margin": Effect(
        question="At equal margin, is the policy's sequential KL smaller with TDPO2?",
        sizes=(
            "Small model, 96 pairs of a best and a worst answer; KL(reference || policy) along 48 held-out "
            f"pairs where their margin is {MARGIN_ASKED:g} nats."
        ),
        arms=("dpo", "tdpo2"),
        run=arms.at_margin,
        claims=(
            Claim(number="reached", arm="tdpo2", bound=0.5, says="`tdpo2` reaches the margin"),
            Claim(
                number="sequential_kl",
                arm="tdpo2",
                against="dpo",
                above=False,
                says="`tdpo2` has less sequential KL there than `dpo`",
            ),
        ),
    ),
    "ties": Effect(
        question="Are pairs that are almost equally good left alone when their scores are read?",
        sizes=(
            "Small model, 64 pairs whose gold scores differ by 0.06 and 64 clear ones, 32 steps; 48 "
            "held-out pairs of each."
        ),
        arms=("dpo:beta=0.2", "reward_aware_po"),
        run=arms.ties,
        claims=(
            Claim(
                number="near_rejected",
                arm="reward_aware_po",
                against="dpo:beta=0.2",
                says="near-ties: the rejected log-probability falls less",
            ),
            Claim(
                number="near_margin",
                arm="reward_aware_po",
                against="dpo:beta=0.2",
                above=False,
                says="near-ties: the margin is smaller",
            ),
            Claim(
                number="clear_accuracy",
                arm="reward_aware_po",
                against="dpo:beta=0.2",
                bound=-0.05,
                says="clear pairs: accuracy within 0.05",
            ),
        ),
    ),
    "forgetting": Effect(
        question=(
            "Does NPO forget without losing the rest, where gradient ascent (its limit of beta 0) loses everything?"
        ),
        sizes=(
            "Small model, 64 answers about things to forget, 25 steps; 64 held-out requests of the same "
            "kinds and 64 of others."
        ),
        arms=("start", "npo", "npo:beta=1e-6"),
        run=arms.forgetting,
        claims=(
            Claim(
                number="forget_logp",
                arm="npo",
                against="start",
                above=False,
                says="`npo` forgets: log-probability of right answers falls",
            ),
            Claim(
                number="retain_helpfulness",
                arm="npo",
                against="npo:beta=1e-6",
                says="`npo` keeps more of the other kinds than gradient ascent",
            ),
        ),
    ),
    "flips": Effect(
        question="What do objectives made for wrong labels do where one pair in five is the wrong way round?",
        sizes="Small base model, 128 pairs, 26 of them flipped, 64 steps; 64 clean held-out rankings and an answer to each prompt.",
        arms=("dpo", "cdpo:label_smoothing=0.2", "robust_dpo:label_smoothing=0.2"),
        run=arms.flips,
        claims=(
            Claim(
                number="accuracy",
                arm="robust_dpo:label_smoothing=0.2",
                against="dpo",
                says="`robust_dpo` orders more held-out pairs right than `dpo`",
            ),
            Claim(
                number="gold_total",
                arm="robust_dpo:label_smoothing=0.2",
                against="dpo",
                says="its answers score higher",
            ),
            Claim(
                number="kl",
                arm="cdpo:label_smoothing=0.2",
                against="dpo",
                above=False,
                says="`cdpo` stays nearer to the start than `dpo`",
            ),
            Claim(
                number="gold_total",
                arm="cdpo:label_smoothing=0.2",
                against="dpo",
                says="its answers score higher",
            ),
            Claim(
                number="accuracy",
                arm="cdpo:label_smoothing=0.2",
                against="dpo",
                says="`cdpo` orders more held-out pairs right than `dpo`",
            ),
        ),
    ),
    "adapters": Effect(
        question=(
            "Hermes 3: does DPO on an adapter, its reference the base without it, take half the memory at "
            "equal accuracy?"
        ),
        sizes=(
            "Accuracy on the small model (96 pairs, 24 steps, 96 held-out pairs); peak memory beyond the "
            "imports on SmolLM2 in fp32, two steps of four pairs, MiB."
        ),
        arms=("full", "adapter"),
        run=arms.adapters,
        claims=(
            Claim(
                number="memory_share",
                arm="adapter",
                above=False,
                bound=0.5,
                says="memory at most half of the whole network's",
            ),
            Claim(number="accuracy", arm="adapter", against="full", bound=-0.02, says="accuracy within two points"),
        ),
    ),
    "one_stage": Effect(
        question="Zephyr by ORPO: does one stage from the base bring format and margin?",
        sizes=(
            "Small base model, 128 pairs of a best and a worst answer, 48 steps; 64 held-out pairs and an "
            "answer to each prompt."
        ),
        arms=("start", "orpo:lam=0.05", "orpo:lam=0"),
        run=arms.one_stage,
        claims=(
            Claim(
                number="gold_format",
                arm="orpo:lam=0.05",
                against="start",
                says="the format score of answers rises",
            ),
            Claim(
                number="gap_token",
                arm="orpo:lam=0.05",
                against="start",
                says="better answers get further ahead, nats a token",
            ),
            Claim(
                number="gap_token", arm="orpo:lam=0.05", against="orpo:lam=0", says="further than by likelihood alone"
            ),
        ),
    ),
    "unwanted": Effect(
        question="Phi-3: does unwanted behaviour become less probable at equal task score?",
        sizes=(
            "Small base model, 96 pairs of a right answer and a rebuff or harmful method, 24 steps; 64 held-out pairs."
        ),
        arms=("start", "dpo"),
        run=arms.unwanted,
        claims=(
            Claim(
                number="rejected",
                arm="dpo",
                against="start",
                above=False,
                says="log-probability of rebuffs and harmful methods falls",
            ),
            Claim(
                number="unwanted",
                arm="dpo",
                against="start",
                above=False,
                says="fewer answers are rude or harmful",
            ),
            Claim(
                number="gold_helpfulness",
                arm="dpo",
                against="start",
                bound=-0.03,
                says="helpfulness falls by less than 0.03",
            ),
        ),
    ),
}
"""Every effect that is claimed."""


def pilot(names: Sequence[str], seed: int) -> None:
    """Every arm once with a seed that is not reported; printed and not kept. Settings are chosen on these."""
    for name in names:
        for arm in EFFECTS[name].arms:
            began = time.process_time()
            numbers = EFFECTS[name].run(arm, seed)
            shown = {claim.number: round(numbers[claim.number], 3) for claim in EFFECTS[name].claims}
            print(f"{name}, {arm}, seed {seed}: {time.process_time() - began:.1f} s, {shown}", flush=True)


def run(names: Sequence[str], seeds: Sequence[int], file: Any = FILE) -> None:
    """Make the runs that are missing."""
    done = {(row["effect"], row["arm"], row["seed"]) for row in finished(file)}
    wanted = [(name, arm, seed) for name in names for seed in seeds for arm in EFFECTS[name].arms]
    for name, arm, seed in wanted:
        if (name, arm, seed) in done:
            continue
        began = time.process_time()
        numbers = EFFECTS[name].run(arm, seed)
        spent = time.process_time() - began
        append(file, {"effect": name, "arm": arm, "seed": seed, "numbers": numbers, "cpu": spent})
        shown = {claim.number: round(numbers[claim.number], 3) for claim in EFFECTS[name].claims}
        print(f"{name}, {arm}, seed {seed}: {spent:.1f} s, {shown}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """``python -m benchmarks.preference effects``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preference effects")
    parser.add_argument("names", nargs="*", help="which (default: all)")
    parser.add_argument("--pilot", type=int, metavar="SEED", help="every arm once with this seed, printed and not kept")
    given = parser.parse_args(arguments)
    names = given.names or list(EFFECTS)
    if given.pilot is not None:
        if given.pilot in SEEDS:
            raise SystemExit(f"seed {given.pilot} is reported; pilots use others, such as 100")
        return pilot(names, given.pilot)
    run(names, SEEDS)
