"""On public data that users bring; skipped unless POSTTRAIN_REAL_DATA names a directory that holds it."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from posttrain.data import ReadReport, demonstrations, rankings, read, stream
from posttrain.data.collate import ranking_rows
from posttrain.data.judging import join_references, join_verdicts, read_judge_templates
from posttrain.data.principles import read_chats, read_principles, read_rules
from posttrain.data.views import (
    labelled,
    preferences_as_pairs,
    rated,
    references,
    scored_as_rankings,
    targets,
)
from posttrain.models.load import find_model, load_tokenizer, new_reward, weights_package
from posttrain.models.lora import Lora
from posttrain.rewards.model import score_rows
from posttrain.train.loop import Run, fit
from posttrain.train.objectives import RewardModel
from posttrain.train.optim import Optim
from posttrain.train.sources import ranking_source
from posttrain.work.inputs import choose_dtype

FOLDER = os.environ.get("POSTTRAIN_REAL_DATA", "")
pytestmark = [pytest.mark.real_data, pytest.mark.skipif(not FOLDER, reason="POSTTRAIN_REAL_DATA is not set")]


BESIDE = {
    "judge__mt-bench-prompts__all.jsonl.gz",
    "judge__mt-bench-reference-gpt4__all.jsonl.gz",
    "judge__pandalm-gpt35-verdicts__train.jsonl.gz",
    "principles__constitution-cai-paper.json",
    "principles__constitution-llm-swarm.json",
    "rules__rbr-propositions.yaml",
}
"""Files that hold no examples, but what belongs to them."""


def manifest():
    """File -> rows that the folder's manifest promises."""
    if not FOLDER:
        return {}
    table = re.findall(r"^\| (\S+) \| (\d*) \|", (Path(FOLDER) / "MANIFEST.md").read_text(), re.MULTILINE)
    return {name: int(rows or 0) for name, rows in table}


EMPTY_ANSWERS = {"pairs__ultrafeedback-slice__train.jsonl.gz": 2}
"""File -> pairs of which one answer is empty, beside those of hh-rlhf."""

ROWS = manifest()
HH = [name for name in ROWS if name.startswith("pairs__hh-")]


def whole(name, **options):
    """All examples of a file, and the report on its rows."""
    report = ReadReport()
    return read(Path(FOLDER) / name, skip_bad=ROWS[name], report=report, **options), report


@pytest.mark.parametrize("name", sorted(ROWS.keys() - BESIDE))
def test_every_row_of_every_file_is_read_or_named(name):
    examples, report = whole(name)
    assert report.rows == ROWS[name] > 0
    rows = {example.row for example in examples}
    assert len(rows) + report.faulty + report.useless.total() == ROWS[name]
    if name not in HH:
        assert report.faulty == EMPTY_ANSWERS.get(name, 0), report.bad[:3]
        assert all("': empty text; " in fault for fault in report.bad)


def test_the_known_faults_of_hh_rlhf_are_found():
    useless, bad = Counter(), Counter()
    told = (
        "the turns before the last differ",
        "the final answer is empty",
        "ends with a Human turn",
        "turn 4': empty text",
    )
    for name in HH:
        examples, report = whole(name)
        assert all([r.rank for r in e.responses] == [0, 1] for e in examples)
        assert any(len(e.prompt) > 1 for e in examples)
        useless += report.useless
        assert len(report.bad) == report.faulty
        for fault in report.bad:
            assert fault.startswith(f"{Path(FOLDER) / name} row ")
            found = [words for words in told if words in fault]
            assert found
            bad.update(found)
    assert useless == {"identical answers": 36}
    # The 2 that end with a Human turn are among the 17; the last is a conversation with an empty turn further up.
    assert [bad[words] for words in told] == [17, 10, 2, 1]


def test_what_stands_beside_examples():
    folder = Path(FOLDER)
    for name in sorted(name for name in BESIDE if name.startswith("principles")):
        assert len(read_principles(folder / name)) == ROWS[name]
    assert len(read_chats(folder / "principles__constitution-llm-swarm.json")) > 0
    rules = read_rules(folder / "rules__rbr-propositions.yaml")
    gold, _ = whole("labelled__rbr-gold__train.jsonl.gz")
    assert set(gold[0].responses[0].attributes) <= set(rules.questions)
    assert len(read_judge_templates(folder / "judge__mt-bench-prompts__all.jsonl.gz")) == 8
    pairs, _ = whole("pairs__pandalm-human__train.jsonl.gz")
    verdicts = join_verdicts(pairs, folder / "judge__pandalm-gpt35-verdicts__train.jsonl.gz", by="gpt")
    judged = sum(any(p.by == "gpt" for p in e.preferences) for e in verdicts.examples)
    assert judged + verdicts.unmatched + verdicts.unreadable == 700
    prompts, _ = whole("prompts__mt-bench__all.jsonl.gz")
    joined = join_references(prompts, folder / "judge__mt-bench-reference-gpt4__all.jsonl.gz")
    assert (joined.unmatched, sum("gpt-4" in e.meta.get("references", {}) for e in joined.examples)) == (0, 30)


def test_views_of_what_was_read():
    solutions, _ = whole("kwise__gsm8k-model-solutions__train.jsonl.gz")
    labels = Counter(e.responses[0].label for e in labelled(solutions))
    assert labels == {True: 1008, False: 1632}
    trees, _ = whole("kwise__oasst-trees__train.jsonl.gz")
    assert len(rankings(trees)) == len(trees) > 80
    paths, _ = whole("kwise__oasst-trees__train.jsonl.gz", format="oasst_paths")
    assert len(demonstrations(paths)) == 80
    answers, _ = whole("kwise__finegrained-qa__train.jsonl.gz")
    pairs = preferences_as_pairs(answers)
    assert len(pairs.examples) + pairs.ties == 6 * 350
    assert len(references(answers, "gold")) == 350
    scores, _ = whole("rated__prometheus-mtbench__eval.jsonl.gz")
    assert all(1 <= e.responses[0].score <= 5 for e in rated(scores))
    truths, _ = whole("labelled__truthfulqa-judge__train.jsonl.gz", format="truthfulqa_judge")
    assert Counter(e.responses[0].label for e in labelled(truths)) == {True: 1684, False: 2316}
    slice_, _ = whole("pairs__ultrafeedback-slice__train.jsonl.gz")
    scored = scored_as_rankings(slice_)
    assert len(scored.examples) + scored.ties == len(slice_)
    for name in sorted(ROWS):
        if name.startswith(("verifiable__", "eval__")):
            assert targets(list(stream(Path(FOLDER) / name)))


@pytest.mark.slow
@pytest.mark.skipif(weights_package() is None, reason="needs the SmolLM2 weights package")
def test_a_reward_model_fits_64_pairs(tmp_path):
    path = find_model("smollm2").path
    tokenizer = load_tokenizer(path)
    examples = read(Path(FOLDER) / "pairs__hh-helpful-base__train.jsonl.gz", skip_bad=100)
    rows, _ = ranking_rows(tokenizer, examples, max_length=120, overlong="drop")
    rows = rows[:64]
    assert len(rows) == 64
    model = new_reward(path, dtype=choose_dtype("auto", path), lora=Lora(rank=16), seed=0)
    source = ranking_source(rows, [[0, 1]] * 64, per_step=8, seed=0)
    run = Run(directory=tmp_path, steps=24, max_tokens=1024, save_every=1000, console=Console(quiet=True))
    fit({"reward": model}, RewardModel(), source, optim=Optim(lr=1e-3, schedule="cosine", warmup_steps=4), run=run)
    scores = torch.tensor(score_rows(model, rows))
    assert (scores[:, 0] > scores[:, 1]).float().mean() >= 0.99
