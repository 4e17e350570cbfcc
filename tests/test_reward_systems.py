"""Systems whose point is their reward model, each at the size of the small world; rows where it errs, patches, the auto-rater."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console

from caches import own_cache
from data.conftest import smol
from posttrain.data import read
from posttrain.graph import override
from posttrain.models.load import find_model, load_tokenizer, new_reward, save_merged
from posttrain.registry import RECIPES
from posttrain.rewards.base import Completion
from posttrain.rewards.hacks import contains, patch_pairs, phrases, risen, without
from posttrain.rewards.panel import load_panel
from posttrain.runner import run_recipe
from posttrain.stages import SFT, Context, Generate, Reinforce, TrainReward
from posttrain.types import Example, Message, Response
from posttrain.work.autorate import verdict
from posttrain.work.converse import continued
from posttrain.work.rewarding import network_of, reads_ids, reward_of
from tiny import plain_net

GOLD = "posttrain.rewards.judges:noisy_gold"


def example(prompt: str, *answers: str, **more) -> Example:
    said = tuple(Response(messages=(Message(role="assistant", content=a),)) for a in answers)
    return Example(prompt=(Message(role="user", content=prompt),), responses=said, **more)


def test_what_rose_is_found_as_the_longest_phrase_that_rose_so_much():
    early = ["red.", "it is red.", "blue, and so on.", "two cats."]
    late = ["red and so on.", "And so on, it is red.", "so it is blue and so on", "and so on."]
    (first,) = risen(early, late, least=0.3)  # 'and', 'so on' ... are parts of it
    assert (first.phrase, first.early, first.late) == ("and so on", 0.25, 1.0)
    assert {"blue and so on", "and so on"} <= {r.phrase for r in risen(early, late, least=0.2)}
    assert risen(early, early) == []
    assert phrases("A b.", 2) == {"a", "b", "a b"}


def test_a_phrase_is_cut_out_with_its_gaps():
    assert without("It is red, And so on. Thanks.", "and so on") == "It is red. Thanks."
    assert without("and so on. red", "and so on") == "red"
    assert without("sand so one", "and so on") == "sand so one" and not contains("sand so one", "and so on")


def test_patch_pairs_are_those_that_the_judge_agrees_with():
    late = [example("colour?", "red and so on.", "blue."), example("wheels?", "and so on")]
    early = [example("sky?", "blue", "grey and so on")]
    shorter = lambda prompt, a, b: float(len(a) < len(b))  # noqa: E731
    pairs = patch_pairs(late, early, "and so on", shorter, 9)
    assert [[r.text for r in e.responses] for e in pairs] == [["red.", "red and so on."], ["blue", "blue and so on."]]
    assert [[r.rank for r in e.responses] for e in pairs] == [[0, 1], [0, 1]] and pairs[0].meta["patch"] is True
    assert patch_pairs(late, early, "and so on", lambda p, a, b: 1 - shorter(p, a, b), 9) == []


def test_an_auto_rater_alarms_where_preference_falls_as_the_reward_rises():
    rates = lambda *means: {f"p{k}": np.full(8, m) for k, m in enumerate(means)}  # noqa: E731
    rewards = {"baseline": 0.0, "p0": 1.0, "p1": 2.0, "p2": 3.0}
    honest, hacked = verdict(rewards, rates(0.6, 0.7, 0.8)), verdict(rewards, rates(0.6, 0.4, 0.2))
    assert (honest["tau"], honest["hacked"], honest["picked"]) == (1.0, False, "p2")
    assert hacked["hacked"] and hacked["picked"] == "p0" and hacked["tau"] == pytest.approx(-2 / 3)
    assert verdict(rewards, rates(0.4, 0.3, 0.2))["picked"] == "baseline"


def test_earlier_turns_are_other_rows_and_not_trained():
    earlier = [example(f"question {k}", f"answer {k}") for k in range(4)]
    own = example("question 2", "right")
    system = Message(role="system", content="be kind")
    found = continued(Example(prompt=(system, *own.prompt), responses=own.responses), earlier, 2, (0, "prompts", 1))
    roles = [m.role for m in found.prompt]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [m.train for m in found.prompt if m.role == "assistant"] == [False, False]
    assert len({m.content for m in found.prompt}) == 6 and found.prompt[-1].content == "question 2"
    assert continued(own, earlier, 2, (0, "prompts", 1)) == continued(own, earlier, 2, (0, "prompts", 1))


def test_a_reward_model_of_another_tokenizer_reads_the_text(tmp_path):
    smol().save_pretrained(tmp_path / "base")
    plain_net(dtype=torch.float32, vocab_size=512, pad_token_id=9).save_pretrained(tmp_path / "base")
    model = new_reward(str(tmp_path / "base"), dtype=torch.float32, seed=1)
    save_merged(model, str(tmp_path / "base"), tmp_path / "rm", smol())
    (tmp_path / "rm/reward.json").write_text(json.dumps({"mean": 0.25}))
    own = load_tokenizer(find_model("small").path)
    assert not reads_ids(tmp_path / "rm", own) and network_of(tmp_path / "rm", own, torch.float32) is None
    assert reads_ids(tmp_path / "rm", smol()) and reads_ids(tmp_path / "rm", None)
    asked = example("say red", "red.", "a red kite")
    ctx = Context(dir=tmp_path, inputs={}, console=Console(file=StringIO()))
    reward = reward_of(str(tmp_path / "rm"), ctx, dtype=torch.float32, max_tokens=512, tokenizer=own)
    found = reward(
        [
            Completion(
                example=asked,
                text=r.text,
                prompt_ids=(1, 2),
                ids=tuple(own(r.text)["input_ids"]),
                truncated=False,
                group=0,
            )
            for r in asked.responses
        ]
    )
    panel = load_panel(str(tmp_path / "rm"), dtype=torch.float32)
    assert [s.value for s in found] == pytest.approx(panel.score([asked])[0].scores)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward systems")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def tiny(name, folder, **options):
    """A recipe with two steps a policy, run to its end."""
    recipe, changes = RECIPES[name](**options), {}
    for stage_name, stage in recipe.stages.items():
        if isinstance(stage, Reinforce):
            warm = {"value_warmup": 1} if stage.value_warmup else {}
            changes[stage_name] = {"steps": 2, "prompts_per_step": 4, **warm}
        elif isinstance(stage, Generate):
            changes[stage_name] = {"limit": 6}
        elif isinstance(stage, (SFT, TrainReward)):
            changes[stage_name] = {"epochs": 1.0} | ({} if getattr(stage, "rows", None) else {"limit": 16})
    small = override(recipe, changes)
    return run_recipe(small, root=folder / "runs", name=name, console=Console(file=StringIO()), tiny=True)


def results(path):
    return json.loads((path / "results.json").read_text())


def test_starling_scores_whole_rankings_and_stays_near_its_start(folder):
    run = tiny("starling", folder)
    record = json.loads((run / "reward/reward.json").read_text())
    assert record["kind"] == "plackett_luce" and (run / "model/config.json").exists()
    rows = [json.loads(line) for line in (run / "reinforce/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["kl/mean"] == pytest.approx(0.0, abs=1e-3)


def test_gemini_adds_rows_where_people_disagree(folder):
    run = tiny("gemini", folder, rounds=2)  # a pairwise model plays the people
    first, second = results(run / "found0"), results(run / "found1")
    assert first["before"] == 24 and first["new"] > 4 and 0 <= first["agreement"] <= 1
    assert second["before"] == first["before"] + first["new"]
    assert len(read(run / "found1/data/rankings.jsonl")) == second["before"] + second["new"]


def test_internlm2_tells_the_domain_and_starts_its_critic_from_the_reward_model(folder):
    run = tiny("internlm2", folder, judge=GOLD, rounds=2)
    record = json.loads((run / "reward1/reward.json").read_text())
    assert record["form"] == "domains" and record["domains"]["harmful"] != record["domains"]["sort"]
    assert results(run / "fast0")["before"] == results(run / "slow0")["before"] + results(run / "slow0")["new"]
    assert set(results(run / "rated")["policies"]) == {"baseline", "policy0", "policy1"}


def test_gemma2_learns_on_conversations_merges_and_rates(folder):
    run = tiny("gemma2", folder, judge=GOLD)
    talk = read(run / "talks/data/prompts.jsonl")[0]
    assert [m.role for m in talk.prompt] == ["user", "assistant", "user"]
    assert json.loads((run / "model/merge.json").read_text())["method"] == "warp"
    rated = results(run / "rated")
    assert set(rated["policies"]) == {"baseline", "policy_near", "policy_middle", "policy_far", "model"}
