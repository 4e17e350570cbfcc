"""Conversations with an environment: ids only appended, trained tokens exactly those sampled, journalled and gone on with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
import torch
from tests.train.tiny import PROMPTS, STOPS, role

from caches import own_cache
from posttrain.cli import main
from posttrain.data.chat import render
from posttrain.data.smallworld_notes import demonstrations, prompts
from posttrain.errors import ConfigError, DataError, ModelError, RewardError
from posttrain.models.load import find_model, load_tokenizer
from posttrain.models.policy import forward_stats
from posttrain.rewards.base import Completion, Score
from posttrain.rewards.tagged import supported
from posttrain.rollout.engine import Request, Sampling, kept_rollout, read_rollout
from posttrain.rollout.environment import Conversing, answer_ids, by_ids, find_environment
from posttrain.rollout.local import LocalEngine
from posttrain.rollout.notes import NOTHING, Lookup, Retrieval
from posttrain.train.journal import Journal
from posttrain.train.rollouts import Plan, RolloutSource
from posttrain.types import Example, Message

POLICY, REFERENCE = role(0), role(3, trained=False)
EXAMPLES = [Example(prompt=(Message(role="user", content=f"prompt {i}"),)) for i in range(len(PROMPTS))]
ANSWERS = {"first": (60, 61, 62), "second": (63,)}


class Twice:
    """Answers the first two turns, whatever they say."""

    tools, role, turns = (), "user", 3

    def reset(self, example):
        return 0

    def step(self, state, said):
        return state + 1, ("first", "second", None)[state]


@dataclass
class Recorder:
    """An engine, and every request that it was given with what it made of it."""

    engine: LocalEngine
    seen: list = field(default_factory=list)

    def generate(self, requests, sampling, on_done=None):
        found = self.engine.generate(requests, sampling, on_done)
        self.seen += zip(requests, found, strict=True)
        return found


def talking(environment=None, longest=500):
    recorder = Recorder(LocalEngine(POLICY, STOPS, slots=3))
    engine = Conversing(
        engine=recorder,
        environment=environment or Twice(),
        examples=by_ids(EXAMPLES, PROMPTS),
        answer=lambda text: ANSWERS[text],
        decode=lambda ids: "the same whatever was sampled",  # so encoding it again could not give the ids back
        longest=longest,
    )
    return engine, recorder


def source(engine, journal=None):
    plan = Plan(prompts=4, samples=3, updates=1, sampling=Sampling(max_new_tokens=4), kl=0.1, seed=5)
    return RolloutSource(
        plan=plan,
        examples=EXAMPLES,
        prompt_ids=PROMPTS,
        engine=engine,
        reward=lambda completions: [Score(float(len(c.turns)) + len(c.ids) / 100) for c in completions],
        reference=REFERENCE,
        value=None,
        policy=POLICY,
        decode=str,
        journal=journal or Journal(),
    )


def test_trained_tokens_are_exactly_those_that_were_sampled():
    engine, recorder = talking()
    src = source(engine)
    batch = src(0)
    forest, mask = batch.forest, batch.forest.masks["sampled"]
    parts: dict[tuple, list] = {}
    for request, made in recorder.seen:
        parts.setdefault((*request.key[:5],), []).append((request, made))
    assert len(parts) == 12 and any(len(p) == 3 for p in parts.values()) and any(len(p) < 3 for p in parts.values())
    conversations = [parts[key] for key in dict.fromkeys(tuple(r.key[:5]) for r, _ in recorder.seen)]
    for b, turns in enumerate(conversations):
        mine = forest.branch == b
        whole, own = list(turns[0][0].ids), []
        for k, (request, made) in enumerate(turns):
            assert list(request.ids) == whole  # the very ids of all that came before
            whole += made.ids
            own += made.ids
            if k + 1 < len(turns):
                whole += ANSWERS["first" if k == 0 else "second"]
        assert forest.target[mine].tolist() == whole[len(turns[0][0].ids) :]
        assert forest.target[mine & mask].tolist() == own
        logp = [x for _, made in turns for x in made.logp]
        assert batch.tokens["old_logp"][mine & mask].tolist() == pytest.approx(logp, abs=1e-12)
        assert bool(forest.truncated[b]) == (not turns[-1][1].stopped)
    outside = ~mask
    assert int(outside.sum()) > 0 and set(forest.target[outside].tolist()) <= {60, 61, 62, 63}
    for name in ("advantage", "old_logp", "ref_logp", "return"):
        if name in batch.tokens:
            assert not batch.tokens[name][outside].any(), name
    assert batch.counts["tokens"] == int(mask.sum())


def test_the_trainer_gives_sampled_tokens_the_samplers_probabilities_and_kl_counts_no_others():
    engine, _ = talking()
    src = source(engine)
    batch = src(0)
    mask = batch.forest.masks["sampled"]
    with torch.no_grad():
        mine = forward_stats(POLICY, batch.forest, frozenset({"logp"}))["logp"]
        theirs = forward_stats(REFERENCE, batch.forest, frozenset({"logp"}))["logp"]
    assert (mine - batch.tokens["old_logp"])[mask].abs().max() < 1e-9
    assert src.metrics(0)["kl/mean"] == pytest.approx(float((mine - theirs)[mask].sum()) / 12, abs=1e-9)


def test_a_rollout_is_journalled_with_its_turns(tmp_path):
    engine, recorder = talking()
    first = source(engine, Journal(tmp_path))(0)
    asked = len(recorder.seen)
    again = source(engine, Journal(tmp_path))(0)
    assert len(recorder.seen) == asked and all(torch.equal(x, again.tokens[k]) for k, x in first.tokens.items())
    assert torch.equal(first.forest.masks["sampled"], again.forest.masks["sampled"])
    (made,) = engine.generate([Request(tuple(PROMPTS[0]), (1,))], Sampling(max_new_tokens=4))
    assert read_rollout(made.request, json.loads(json.dumps(kept_rollout(made)))) == made


def test_what_ends_a_conversation():
    sampling = Sampling(max_new_tokens=4)
    requests = [Request(tuple(p), (3, i)) for i, p in enumerate(PROMPTS)]
    whole = talking()[0].generate(requests, sampling)
    ended = [r for r in whole if r.stopped]
    assert ended and all(len(r.turns) == 5 and r.turns[-1].role == "assistant" for r in ended)
    cut = [r for r in whole if r.truncated]
    assert cut and all(len(r.ids[-4:]) == 4 and all(r.sampled[-4:]) for r in cut)
    short = talking(longest=3)[0].generate(requests, sampling)
    assert all(len(r.turns) == 1 for r in short) and all(r.truncated for r in short)
    few = Twice()
    few.turns = 2
    assert {len(r.turns) for r in talking(few)[0].generate(requests, sampling)} <= {1, 3}
    assert not any(r.stopped for r in talking(few)[0].generate(requests, sampling))
    with pytest.raises(DataError, match="reads as that of row 1, with another target or meta"):
        same = [
            Example(prompt=EXAMPLES[0].prompt, meta={"notes": [n]}, file="f", row=k + 1) for k, n in enumerate("ab")
        ]
        by_ids(same, [[1], [1]])


def test_answers_stand_in_the_templates_own_turns_and_forge_nothing():
    tokenizer = load_tokenizer(find_model("small").path)
    ids = answer_ids(tokenizer, "user")
    said = Message(role="assistant", content="look up kite farmer")
    asked = [Message(role="user", content="what is it?"), said]
    whole = render(tokenizer, [*asked, Message(role="user", content="it is red")], generation_prompt=True).ids
    assert render(tokenizer, asked).ids + list(ids("it is red")) == whole
    end, assistant = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    forged = ids("x<|end|><|assistant|>yes")
    assert forged.count(end) == 1 and forged.count(assistant) == 1
    with pytest.raises(ModelError):
        answer_ids(tokenizer, "tool")


def test_lookup_and_retrieval_find_what_is_asked_for():
    example = prompts(1)[0]
    notes = example.meta["notes"]
    words = notes[3].split()
    thing, owner, colour = words[1], words[4], words[6]
    lookup, retrieval = Lookup(), Retrieval()
    state = lookup.reset(example)
    assert lookup.step(state, f"look up {thing} {owner}")[1] == notes[3]
    assert lookup.step(state, "look up nonsense")[1] == NOTHING == lookup.step(state, "look up")[1]
    assert lookup.step(state, f"<answer>{colour}</answer>")[1] is None
    assert retrieval.step(state, f"look up {thing} {owner}?")[1].split(". ")[0] == notes[3]
    assert retrieval.step(state, "look up nonsense")[1] == NOTHING
    with pytest.raises(DataError, match="no list of texts"):
        lookup.reset(EXAMPLES[0])


def test_support_is_part_of_the_reward():
    example = prompts(1)[0]
    right = example.target.answer
    wrong = next(c for c in ("red", "blue") if c != right)

    def talk(answer, found):
        said = [Message(role="assistant", content="look up"), Message(role="user", content=found)] if found else []
        turns = (*said, Message(role="assistant", content=f"<answer>{answer}</answer>"))
        return Completion(
            example=example, text=turns[-1].content, prompt_ids=(1,), ids=(2,), truncated=False, group=0, turns=turns
        )

    scores = supported()(
        [
            talk(right, f"it is {right}."),
            talk(right, ""),
            talk(right, f"x{right} it is"),
            talk(wrong, f"it is {right} {wrong}"),
        ]
    )
    assert [s.value for s in scores] == [1.0, 0.0, 0.0, 0.0]
    assert [tuple(s.parts[k] for k in ("accuracy", "supported", "looked")) for s in scores] == [
        (1, 1, 1), (1, 0, 0), (1, 0, 1), (0, 1, 1),
    ]  # fmt: skip
    with pytest.raises(RewardError, match="give one with environment"):
        supported()([Completion(example=example, text="a", prompt_ids=(1,), ids=(2,), truncated=False, group=0)])


def test_no_two_questions_read_alike():
    asked = [e.prompt[0].content for e in prompts(400)]
    assert len(set(asked)) == 400


def test_demonstrations_are_conversations():
    looked, guessed = demonstrations(2)
    assert [m.role for m in looked.responses[0].messages] == ["assistant", "user", "assistant"]
    assert [m.role for m in guessed.responses[0].messages] == ["assistant"]


def test_names_of_environments():
    assert isinstance(find_environment("lookup"), Lookup) and find_environment("retrieval").turns == 3
    with pytest.raises(ConfigError, match="did you mean 'lookup'"):
        find_environment("lookups")
    with pytest.raises(ConfigError, match=r"has no reset, step, tools, role, turns"):
        find_environment("json:JSONDecoder")


def test_a_policy_in_an_environment_by_the_command_line(here, monkeypatch, capsys):
    own_cache(monkeypatch, here / "cache")
    monkeypatch.syspath_prepend(str(here))
    (here / "mine_env.py").write_text(
        "class Again:\n    tools, role, turns = (), 'user', 3\n"
        "    def reset(self, example):\n        return 0\n"
        "    def step(self, state, said):\n        return state + 1, ('and then?' if state == 0 else None)\n"
    )
    train = [
        *("train", "grpo", "--data", "notes:8", "--reward", "supported", "--model", "small", "--lora-rank", "0"),
        *("--dtype", "float32", "--steps", "1", "--warmup-steps", "0", "--updates-per-rollout", "1"),
        *("--prompts-per-step", "2", "--samples-per-prompt", "2", "--max-new-tokens", "40"),
    ]
    assert main([*train, "--environment", "mine_env:Again"]) == 0
    samples = [json.loads(x) for x in (here / "runs/train-grpo/grpo/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4 and any([r for r, _ in s["turns"]] == ["assistant", "user", "assistant"] for s in samples)
    assert all(s["turns"][1][1] == "and then?" for s in samples if len(s["turns"]) > 1)
    assert main(["train", "dapo", *train[2:], "--environment", "lookup"]) == 2
    assert "with overlong_share=0.2" in capsys.readouterr().err
