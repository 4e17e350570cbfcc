"""What is made of scored answers: rejection sampling to its golden numbers and its distribution, every builder by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.base import Completion
from posttrain.rewards.builders import SAMPLED, build, builders, chunks, draws, permutation
from posttrain.rewards.comparing import compared, comparison_reward, from_scores, self_play_scores, win_rates
from posttrain.rewards.selection import statistical_rejection
from posttrain.types import Example, Message, Preference, Response

CHI2 = {2: 13.816, 3: 16.266}
"""99.9 % points: a right sampler fails one test in a thousand, and draws here are fixed."""


def answer(text, *, own=True, **feedback):
    meta = {SAMPLED: {"ids": [1], "logp": [0.0], "stopped": True}} if own else {}
    return Response(messages=(Message(role="assistant", content=text),), meta=meta, **feedback)


def example(*responses, prompt="p", **more):
    return Example(prompt=(Message(role="user", content=prompt),), responses=responses, **more)


def scored(**scores):
    return example(*(answer(text, score=float(s)) for text, s in scores.items()))


def texts(built):
    return [[r.text for r in e.responses] for e in built.examples]


# ---------------------------------------------------------------------------- rejection sampling


def test_rejection_sampling_to_its_golden_numbers():
    used = iter([0.3, 0.5, 0.1, 0.05, 0.9, 0.2, 0.6, 0.01])
    found = statistical_rejection("abcd", [2.0, 1.0, 0.0, -1.0], used, samples=3, beta=0.5)
    assert found == [0, 1, 2] and next(used, None) is None
    chance = [math.exp((s - 2) / 0.5) for s in (2.0, 1.0, 0.0, -1.0)]
    assert chance == pytest.approx([1, 0.135335, 0.018316, 0.002479], abs=1e-6)


def test_equal_candidates_count_once_with_the_last_score():
    found = statistical_rejection(["x", "y", "x"], [5.0, 1.0, 0.0], iter([0.99, 0.0]), samples=1, beta=0.5)
    assert found == [1]  # x has score 0 now: exp(-2) < 0.99, and y is the best


@pytest.mark.parametrize(("samples", "beta"), [(3, 0.5), (1, 0.0), (-1, 1.0)])
def test_what_rejection_sampling_refuses(samples, beta):
    with pytest.raises(ConfigError, match="expected no more than there are, and beta > 0"):
        statistical_rejection("aab", [1.0, 1.0, 2.0], itertools.repeat(0.0), samples=samples, beta=beta)


def test_the_first_accepted_has_the_distribution_of_one_pass():
    scores, counts = [0.0, 1.0, 0.5, 0.2], np.zeros(4)
    chance = [math.exp((s - 1) / 0.7) for s in scores]
    expected = [chance[0], 1 - chance[0], 0.0, 0.0]  # the best one ends the pass
    for seed in range(2000):
        counts[statistical_rejection("abcd", scores, draws(seed, "first"), samples=1, beta=0.7)[0]] += 1
    wanted = 2000 * np.array(expected[:2])
    assert counts[2:].sum() == 0 and ((counts[:2] - wanted) ** 2 / wanted).sum() < 10.83


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_acceptance_follows_the_tilted_distribution(beta):
    """Of candidates drawn from a policy, those accepted in a pass follow policy(y) exp(r(y) / beta) / Z: a chi-square test."""
    policy, reward = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.0, 0.4, 0.8, 1.0])
    target = policy * np.exp(reward / beta)
    target /= target.sum()
    kinds = np.random.default_rng(0).choice(4, size=6000, p=policy)
    accept = int(0.5 * 6000 * (policy * np.exp((reward - 1) / beta)).sum())  # within the first pass
    found = statistical_rejection(
        range(6000), [float(reward[k]) for k in kinds], draws(1, "fit"), samples=accept, beta=beta
    )
    assert found == sorted(found)  # one pass
    counts = np.bincount(kinds[found], minlength=4)
    assert ((counts - accept * target) ** 2 / (accept * target)).sum() < CHI2[3]
    assert ((counts - accept * policy) ** 2 / (accept * policy)).sum() > 10 * CHI2[3]  # and not the policy


def test_beta_runs_from_the_best_to_any():
    scores = [float(i) for i in range(10)]
    assert sorted(statistical_rejection(range(10), scores, draws(0), samples=3, beta=1e-6)) == [7, 8, 9]
    taken = [statistical_rejection(range(10), scores, draws(s), samples=1, beta=1e9)[0] for s in range(50)]
    assert set(taken) == {0}  # the first one is accepted as good as surely


# ---------------------------------------------------------------------------- pairs out of scores


def test_rso_pairs_what_was_accepted_and_depends_on_seed_and_prompt_only():
    examples = [
        scored(a=3, b=2, c=1, d=0, e=-1),
        example(*(answer(x, score=1.0 * i) for i, x in enumerate("fgh")), prompt="q"),
    ]
    built = build("rso", examples, seed=4, options={"samples": 4, "beta": 2.0})
    assert len(built.examples) == 3  # four of five in two pairs, two of three distinct in one
    again = build("rso", examples[::-1], seed=4, options={"samples": 4, "beta": 2.0})
    assert sorted(texts(again)) == sorted(texts(built))
    assert texts(build("rso", examples, seed=5, options={"samples": 4, "beta": 2.0})) != texts(built)
    for e in built.examples:
        chosen, rejected = e.responses
        assert (chosen.rank, rejected.rank) == (0, 1) and chosen.score > rejected.score


def test_a_tournament_of_k_gives_k_minus_one_pairs():
    built = build("tournament", [scored(a=3, b=2, c=1, d=0, e=-1)], seed=1)
    assert len(built.examples) == 4 and all(c < r for c, r in texts(built))  # by letter the better comes first
    assert texts(built)[-1][0] == "a" and sum(c == "a" for c, _ in texts(built)) >= 2
    assert len(build("rso_tournament", [scored(a=3, b=2, c=1, d=0)], options={"samples": 4}).examples) == 3


def test_comparisons_of_the_example_go_before_scores():
    circle = example(*(answer(x, score=0.5) for x in "ab"), preferences=(Preference(a=0, b=1, better=0.3),))
    assert texts(build("tournament", [circle])) == [["b", "a"]]
    tie = example(
        *(answer(x, score=s) for x, s in (("a", 1.0), ("b", 0.0))), preferences=(Preference(a=1, b=0, better=0.5),)
    )
    built = build("tournament", [tie])
    assert built.examples == [] and built.empty == 1 and str(built) == "0 examples; 1 prompts gave none"


def test_best_over_worst_and_its_margin():
    e = scored(a=0.2, b=0.9, c=-0.4)
    assert texts(build("best_worst", [e])) == [["b", "c"]]
    assert build("best_worst", [e], options={"margin": 1.3}).empty == 1
    assert build("best_worst", [scored(a=1, b=1)]).empty == 1


def test_dno_asks_more_of_the_teachers_answers():
    e = example(
        answer("teacher", own=False, score=5), answer("own", score=6), answer("near", score=4), answer("bad", score=3)
    )
    assert texts(build("dno", [e])) == [["teacher", "bad"], ["own", "teacher"], ["own", "near"], ["own", "bad"]]
    assert texts(build("dno", [e], options={"least": 6, "own_gap": 3})) == [["own", "bad"]]


def test_rankings_demonstrations_and_thumbs():
    e = scored(a=1, b=3, c=3)
    assert [r.rank for r in build("ranked", [e]).examples[0].responses] == [1, 0, 0]
    assert texts(build("best", [e], options={"most": 2})) == [["b"], ["c"]]
    assert [x.responses[0].label for x in build("thumbs", [e], options={"threshold": 2}).examples] == [
        False,
        True,
        True,
    ]


def test_responses_without_score_are_counted_and_equal_ones_count_once():
    e = example(answer("a", score=1.0), answer("b"), answer("a", score=2.0), answer("c", score=1.5))
    built = build("ranked", [e])
    assert [(r.text, r.rank) for r in built.examples[0].responses] == [("a", 0), ("c", 1)]
    assert built.unscored == 1 and "1 responses without a score left out" in str(built)
    with pytest.raises(DataError, match=r"field 'score': no response has one; label the responses first"):
        build("ranked", [example(answer("a"), answer("b"))])


# ---------------------------------------------------------------------------- what data came with, and samples


def test_spin_puts_the_datas_answer_first():
    e = example(answer("human", own=False), answer("one"), answer("two"), answer("human"))
    assert texts(build("spin", [e])) == [["human", "one"], ["human", "two"]]
    with pytest.raises(DataError, match="found 0 answers of the data itself"):
        build("spin", [example(answer("one"))])


def test_d2o_ranks_all_samples_over_the_bad_answer():
    e = example(answer("good", own=False, rank=0), answer("bad", own=False, rank=1), answer("s"), answer("t"))
    (made,) = build("d2o", [e]).examples
    assert [(r.text, r.rank) for r in made.responses] == [("s", 0), ("t", 0), ("bad", 1)]
    assert build("d2o", [example(answer("s"))]).empty == 1


def test_unwanted_behaviour_is_rejected():
    e = example(
        answer("no", own=False, label=False), answer("yes", own=False), answer("rude", own=False, failure="rude")
    )
    assert texts(build("unwanted", [e])) == [["yes", "no"], ["yes", "rude"]]
    ranks = example(answer("x", own=False, rank=1), answer("y", own=False, rank=0))
    assert texts(build("unwanted", [ranks])) == [["y", "x"]]


def test_chunks_deal_all_of_the_data():
    parts = chunks([scored(a=i) for i in range(7)], 3)
    assert [len(p) for p in parts] == [2, 2, 3] and [e.responses[0].score for p in parts for e in p] == [*range(7)]
    easiest = chunks([scored(a=i) for i in range(4)], 2, hardness=lambda e: -e.responses[0].score)
    assert [e.responses[0].score for e in easiest[0]] == [3, 2]
    with pytest.raises(ConfigError, match="got 3 chunks of 2 examples"):
        chunks([scored(a=0), scored(a=1)], 3)


def test_every_builder_says_what_it_makes():
    for name in builders:
        assert builders.facts(name)["makes"] in ("rankings", "demonstrations", "labelled", "prompts")
        assert builders[name].__doc__
    with pytest.raises(ConfigError, match="builder 'rso' has no option 'sample'; did you mean 'samples'"):
        build("rso", [], options={"sample": 3})


def test_orders_depend_on_the_key_alone():
    assert permutation(5, 0, "x") == permutation(5, 0, "x") != permutation(5, 1, "x")
    assert list(itertools.islice(draws(3), 300)) == list(itertools.islice(draws(3), 300))


# ---------------------------------------------------------------------------- comparisons


def test_win_rates_and_self_play_scores_to_their_golden_numbers():
    better = [[0.5, 0.7, 0.4], [0.3, 0.5, 0.6], [0.6, 0.4, 0.5]]
    assert self_play_scores(better) == pytest.approx([0.55, 0.45, 0.5])
    assert win_rates(better) == pytest.approx([1.6 / 3, 1.4 / 3, 0.5])


def test_a_judge_who_favours_the_first_favours_none():
    first = compared(lambda prompt, a, b: 0.9, "p", "ab")
    assert first == [[0.5, pytest.approx(0.5)], [pytest.approx(0.5), 0.5]]
    by_length = compared(from_scores(lambda prompt, text: float(len(text))), "p", ["a", "bbb"])
    assert by_length[1][0] == pytest.approx(1 / (1 + math.exp(-2))) and by_length[0][1] == pytest.approx(
        1 - by_length[1][0]
    )


def test_a_comparison_is_a_reward():
    wins = {("a", "b"): 0.7, ("b", "c"): 0.6, ("a", "c"): 0.4}
    reward = comparison_reward(lambda prompt, a, b: wins[a, b] if (a, b) in wins else 1 - wins[b, a])
    e = example()
    given = [
        Completion(example=e, text=t, prompt_ids=(), ids=(), truncated=False, group=g) for g, t in enumerate("abcab")
    ]
    from dataclasses import replace

    groups = [replace(c, group=int(i > 2)) for i, c in enumerate(given)]
    found = reward(groups)
    assert [s.value for s in found] == pytest.approx([0.55, 0.45, 0.5, 0.7, 0.3])
    assert found[3].parts["win_rate"] == pytest.approx(0.6)
