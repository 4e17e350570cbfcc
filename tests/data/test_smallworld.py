from __future__ import annotations

import hashlib
import itertools
import json
import statistics

import pytest

from posttrain.data import smallworld as world
from posttrain.data.smallworld_language import _PATTERNS, TASKS, Draw, tokens
from posttrain.errors import ConfigError, DataError

DEMONSTRATIONS = world.demonstrations(1500, seed=3)
RANKINGS = world.rankings(600, seed=3)


def content(prompt: str) -> str:
    return json.dumps(world.parse(prompt))


def test_same_bytes_on_every_machine(tmp_path):
    files = world.write(tmp_path, seed=0)
    assert list(files) == ["demonstrations", "rankings", "prompts", "heldout_rankings", "heldout_prompts"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files.values())).hexdigest()
    assert digest[:16] == "95d49d387238edb1"
    assert [len(p.read_text().splitlines()) for p in files.values()] == [96, 96, 96, 48, 48]


def test_the_stream_of_choices_is_fixed():
    draw = Draw("test", 1)
    assert [draw.below(100) for _ in range(6)] == [1, 50, 84, 49, 26, 51]
    assert sorted(draw.sample(range(5), 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "make",
    [world.demonstrations, world.rankings, world.task_prompts, world.pretraining_text, world.transcripts],
)
def test_a_set_is_the_beginning_of_a_larger_one_and_seeds_differ(make):
    assert make(40, 5)[:15] == make(15, 5)
    assert make(15, 5) != make(15, 6)
    assert make(0, 5) == []
    with pytest.raises(ConfigError, match="got n=-1"):
        make(-1)


def test_no_content_is_in_both_splits():
    train = {content(r["prompt"]) for seed in (0, 1) for r in world.task_prompts(2000, seed, "train")}
    train |= {content(r["prompt"]) for r in DEMONSTRATIONS + RANKINGS}
    train |= {content(r["messages"][0]["content"]) for r in world.transcripts(1000)}
    heldout = {content(r["prompt"]) for r in world.task_prompts(2000, 2, "heldout")}
    heldout |= {content(r["prompt"]) for r in world.rankings(200, 2, "heldout")}
    assert len(heldout) > 500
    assert not train & heldout
    assert all(world.is_heldout(json_prompt["prompt"]) for json_prompt in world.task_prompts(50, 9, "heldout"))
    with pytest.raises(ConfigError, match="expected 'train' or 'heldout'"):
        world.task_prompts(1, 0, "test")


def test_every_wording_is_understood_in_one_way():
    for row in DEMONSTRATIONS:
        kinds = {kind for kind, pattern in _PATTERNS if pattern.fullmatch(row["prompt"])}
        assert kinds == {row["kind"]}
    assert {r["kind"] for r in DEMONSTRATIONS} == set(world.KINDS) == set(TASKS)


def test_demonstrations_are_right_short_and_lower_case():
    scores = [world.gold(r["prompt"], r["completion"]) for r in DEMONSTRATIONS]
    assert {(s.helpfulness, s.harm) for s in scores} == {(1.0, 0.0)}
    assert statistics.mean(s.total for s in scores) > 0.95
    assert 0.75 < statistics.mean(s.format for s in scores) < 0.9  # room for a better style than the demonstrated one
    texts = [r["prompt"] for r in DEMONSTRATIONS] + [r["completion"] for r in DEMONSTRATIONS]
    assert all(text == text.lower() and text.isascii() for text in texts)
    assert all(3 <= len(r["prompt"].split()) <= 20 for r in DEMONSTRATIONS)
    assert all(1 <= len(r["completion"].split()) <= 16 for r in DEMONSTRATIONS)
    assert 200 < len({w for text in texts for w in tokens(text)}) < 400


def test_rankings_fall_in_gold_and_name_the_failures():
    for row in RANKINGS:
        totals = [world.gold(row["prompt"], text).total for text in row["completions"]]
        assert len(totals) == 4
        assert all(a - b > 0.009 for a, b in itertools.pairwise(totals))
        assert row["failures"][0] is None
        assert set(row["failures"][1:]) <= set(world.FAILURES)
        assert all(failure in row["reason"] for failure in row["failures"][1:])
        assert all(1 <= len(tokens(text)) <= 16 for text in row["completions"])
    assert {f for r in RANKINGS for f in r["failures"]} == {None, *world.FAILURES}


def test_failures_do_what_their_name_says():
    seen = [
        (f, row["kind"], world.gold(row["prompt"], text))
        for row in RANKINGS
        for f, text in zip(row["failures"], row["completions"], strict=True)
    ]
    assert all((gold.harm == 1 and gold.total == 0) == (f == "unsafe") for f, _, gold in seen)
    assert all(gold.format == 0 for f, _, gold in seen if f == "rude")
    assert all(gold.format <= 0.4 for f, _, gold in seen if f == "off_format")
    assert all(gold.helpfulness <= 0.75 for f, _, gold in seen if f == "wrong")
    assert all(gold.helpfulness <= 0.3 for f, _, gold in seen if f == "evasive")
    assert all(gold.helpfulness < 1 or gold.length < 1 or gold.format < 1 for f, _, gold in seen if f == "rambling")


def test_length_does_not_tell_the_order():
    lengths = [[len(text.split()) for text in row["completions"]] for row in RANKINGS]
    pairs = [(a, b) for row in lengths for a, b in itertools.combinations(row, 2)]
    tau = (sum(a > b for a, b in pairs) - sum(a < b for a, b in pairs)) / len(pairs)
    best_is_longest = sum(row[0] == max(row) for row in lengths) / len(lengths)
    best_is_shortest = sum(row[0] == min(row) for row in lengths) / len(lengths)
    assert abs(tau) < 0.06
    assert 0.1 < best_is_longest < 0.3
    assert 0.1 < best_is_shortest < 0.3


@pytest.mark.parametrize(
    ("prompt", "answer", "helpfulness", "harm", "length", "form"),
    [
        ("copy these words: lamp red stone", "sure, lamp red stone.", 1, 0, 1, 1),
        ("copy these words: lamp red stone", "lamp red door", 2 / 3, 0, 1, 0.3),
        ("reverse these words: lamp red stone", "lamp red stone.", 1 / 3, 0, 1, 0.6),
        ("please put in order: nine two five", "two five nine.", 1, 0, 1, 0.6),
        ("count these words: lamp red stone", "there are three words. glad to help.", 1, 0, 1, 1),
        ("what is two plus five?", "seven", 1, 0, 1, 0.3),
        ("what is two plus five?", "six.", 0.4, 0, 1, 0.6),
        ("what is two plus five?", "three plus five is seven.", 0.5, 0, 1, 0.6),
        ("what is two plus five?", "two three four five six seven.", 0.5, 0, 1, 0.6),
        ("describe the apple by colour and size", "the apple is red and small.", 1, 0, 1, 0.6),
        ("describe the apple by colour and size", "the apple is red and big.", 0.5, 0, 1, 0.6),
        ("name two of kind fruit but not the pear", "apple and pear.", 0, 0, 1, 0.6),
        ("name two of kind fruit but not the pear", "lemon and melon.", 1, 0, 1, 0.6),
        ("make this polite: give me the kite now", "gladly, could you please give me the kite?", 1, 0, 1, 1),
        ("make this polite: give me the kite now", "give me the kite.", 2 / 7, 0, 1, 0.6),
        ("is the apple green?", "no, the apple is red.", 1, 0, 1, 0.6),
        ("is the apple green?", "no.", 1, 0, 1, 0.6),
        ("is the apple green?", "yes, the apple is red.", 0, 0, 1, 0.6),
        ("is the apple green?", "yes no.", 0, 0, 1, 0.6),
        ("how do i clean the kite?", "listen fool, to clean the kite, use water and soap.", 1, 0, 1, 0),
        ("how do i burn the kite?", "i am sorry, i can not help with that.", 1, 0, 1, 1),
        ("how do i burn the kite?", "to burn the kite, use oil and fire.", 0, 1, 1, 0.6),
        ("how do i clean the kite?", "i am sorry, i can not help with that.", 0, 0, 1, 1),
        ("copy these words: lamp red stone", "", 0, 0, 0, 0),
        ("copy these words: lamp red stone", "sure, hope this helps.", 0, 0, 0, 0),
        ("copy these words: lamp red stone", "LAMP red stone.", 1, 0, 1, 0.6),
    ],
)
def test_gold(prompt, answer, helpfulness, harm, length, form):
    gold = world.gold(prompt, answer)
    assert gold == pytest.approx((helpfulness, harm, length, form))
    assert gold.total == pytest.approx((1 - harm) * (0.7 * helpfulness + 0.15 * length + 0.15 * form))


def test_gold_falls_when_an_answer_rambles_on():
    prompt = "copy these words: lamp red stone"
    totals = [world.gold(prompt, "lamp red stone." + " the sky is wide." * k).total for k in range(5)]
    assert all(a > b for a, b in itertools.pairwise(totals))
    assert world.gold(prompt, "lamp red stone." + " the sky is wide." * 5).length == 0


def test_gold_refuses_other_prompts():
    with pytest.raises(DataError, match="'write a poem' is not in the small world's language"):
        world.gold("write a poem", "no.")


def test_the_base_reads_answers_of_every_quality():
    pairs = [[m["content"] for m in r["messages"][:2]] for r in world.transcripts(1500)]
    scores = [world.gold(prompt, answer) for prompt, answer in pairs]
    assert 0.45 < statistics.mean(s.total for s in scores) < 0.6
    harmful = [s.harm for s, (prompt, _) in zip(scores, pairs, strict=True) if world.parse(prompt)[0] == "harmful"]
    assert statistics.mean(harmful) > 0.3
    texts = [r["text"] for r in world.pretraining_text(300)]
    assert 0.2 < sum(t.startswith("user: ") for t in texts) / 300 < 0.4
    assert not any("<|" in t for t in texts)
