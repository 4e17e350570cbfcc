"""Stages that make data: sampled, scored, selected, trained on; resumed to the byte; and training on fresh samples by name."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console

from caches import own_cache
from posttrain.cli import main
from posttrain.data import read
from posttrain.data.smallworld import gold
from posttrain.graph import describe, ordered
from posttrain.runner import run_recipe
from posttrain.stages import Context, Generate, Label, Prefer, Recipe, Select
from posttrain.types import Example, Message, Response
from posttrain.work import generate as work
from posttrain.work.label import with_scores

GOLD = "posttrain.data.smallworld_gold:gold_total"


def shorter(prompt: str, a: str, b: str) -> float:
    """A comparison that prefers short answers, and likes the first it reads."""
    return 0.6 + 0.3 * ((len(a) < len(b)) - (len(a) > len(b)))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("making")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def made(name, **stages):
    return Recipe(name, stages)


@pytest.fixture(scope="module")
def run(folder):
    """Sampled on demonstrations, scored by gold, pairs, DPO on them; and SPIN's pairs of the same samples."""
    own = Generate(
        model="small", data="smallworld", part="demonstrations", samples=4, limit=10, max_new_tokens=24, at_once=4
    )
    scored = Label(data=own, reward=GOLD, cut_score=-1.0)
    pairs = Select(data=scored, builder="best_worst")
    policy = Prefer(
        model="small",
        data=pairs,
        loss="sppo",
        lora_rank=0,
        lr=1e-4,
        prompts_per_step=4,
        warmup_steps=0,
        dtype="float32",
    )
    spin = Select(data=(own, own), builder="spin")
    return run_recipe(
        made("made", own=own, scored=scored, pairs=pairs, policy=policy, spin=spin),
        root=folder / "runs",
        console=Console(file=StringIO(), width=200),
    )


def test_samples_stand_after_the_datas_answers(run):
    examples = read(run / "own/data/samples.jsonl")
    assert len(examples) == 10
    for e in examples:
        human, *own = e.responses
        assert human.meta == {} and len(own) == 4 and gold(e.prompt[-1].content, human.text).total > 0.8
        for r in own:
            made = r.meta["sampled"]
            assert len(made["ids"]) == len(made["logp"]) <= 24 and max(made["logp"]) <= 0
            assert made["stopped"] == (made["ids"][-1] == 5)


def test_scores_ranks_and_win_rates(run):
    for e in read(run / "scored/data/samples.jsonl"):
        for r in e.responses:
            stopped = r.meta.get("sampled", {}).get("stopped", True)
            assert r.score == pytest.approx(gold(e.prompt[-1].content, r.text).total if stopped else -1.0)
        best = [r for r in e.responses if r.rank == 0]
        assert best and all(r.score == max(x.score for x in e.responses) for r in best)
        assert sum(r.attributes["win_rate"] for r in e.responses) == pytest.approx(len(e.responses) / 2)


def test_pairs_are_trained_on_and_losses_of_win_rates_read_those_against_all_samples(run):
    pairs = read(run / "pairs/data/rankings.jsonl")
    assert all(e.responses[0].score > e.responses[1].score for e in pairs)
    rates = [r.attributes["win_rate"] for e in pairs for r in e.responses]
    first = lines(run / "policy/metrics.jsonl")[0]
    assert (run / "policy/model.safetensors").exists() and first["loss/listwise"] > 0
    from posttrain.train.objectives import objective_of
    from posttrain.work.prefer import score_columns

    found = score_columns(objective_of("sppo", {}, 1.0), pairs)["score"]
    assert [x for row in found for x in row] == pytest.approx(rates)


def test_equal_answers_get_one_score_even_where_the_judge_wavers():
    said = lambda text, stopped=True: Response(  # noqa: E731
        messages=(Message(role="assistant", content=text),), meta={"sampled": {"ids": [1], "stopped": stopped}}
    )
    e = Example(
        prompt=(Message(role="user", content="p"),),
        responses=(said("a", False), said("b"), said("a"), said("b"), said("c")),
    )
    found = with_scores(e, [9.0, 1.0, 2.0, 1.0 + 1e-7, None], cut_score=-1.0).responses
    assert [r.score for r in found] == [2.0, 1.0, 2.0, 1.0, None]
    assert [r.rank for r in found] == [None] * 5  # one has no score
    assert [r.rank for r in with_scores(e, [0.0, 1.0, 2.0, 1.0, 0.5], cut_score=-1.0).responses] == [0, 1, 0, 1, 2]


def test_spin_reads_several_stages(run):
    pairs = read(run / "spin/data/rankings.jsonl")
    once = sum(len({r.text for r in e.responses}) - 1 for e in read(run / "own/data/samples.jsonl"))
    assert len(pairs) == 2 * once and all("sampled" in e.responses[1].meta for e in pairs)


def test_a_stage_that_was_cut_off_goes_on_to_the_same_bytes(run, folder, monkeypatch):
    stage = Generate(
        model="small", data="smallworld", part="demonstrations", samples=4, limit=10, max_new_tokens=24, at_once=4
    )
    ctx = Context(dir=folder / "cut", inputs={}, console=Console(file=StringIO()))
    ctx.dir.mkdir()
    asked = []
    engine = work.LocalEngine.generate

    def counted(self, requests, sampling, on_done=None):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(requests))
        return engine(self, requests, sampling, on_done)

    monkeypatch.setattr(work.LocalEngine, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        stage.run(ctx)
    assert not (ctx.dir / "data/samples.jsonl").exists() and asked == [16, 16]
    asked.clear()
    stage.run(ctx)
    assert asked == [8]  # the lots before are in the journal
    assert (ctx.dir / "data/samples.jsonl").read_bytes() == (run / "own/data/samples.jsonl").read_bytes()


def test_a_lot_s_size_changes_no_sample(run, folder):
    stage = Generate(
        model="small", data="smallworld", part="demonstrations", samples=4, limit=3, max_new_tokens=24, at_once=32
    )
    ctx = Context(dir=folder / "lots", inputs={}, console=Console(file=StringIO()))
    ctx.dir.mkdir()
    stage.run(ctx)
    texts = [[r.text for r in e.responses] for e in read(folder / "lots/data/samples.jsonl")]
    assert texts == [[r.text for r in e.responses] for e in read(run / "own/data/samples.jsonl")][:3]


def test_the_key_of_a_stage_knows_its_reward_function(folder, monkeypatch):
    (folder / "myreward.py").write_text("def f(prompt, answer):\n    return 1.0\n")
    monkeypatch.syspath_prepend(folder)
    (folder / "answers.jsonl").write_text('{"prompt": "p", "completions": ["a", "b"]}\n')
    recipe = made("keyed", label=Label(data="answers.jsonl", reward="myreward:f"))
    first = describe(ordered(recipe), seed=0, tiny=False)["label"]
    assert [name for name, _ in first["files"]] == ["answers.jsonl", "myreward.py"]
    (folder / "myreward.py").write_text("def f(prompt, answer):\n    return 2.0\n")
    assert describe(ordered(recipe), seed=0, tiny=False)["label"]["key"] != first["key"]


# ---------------------------------------------------------------------------- the command line


def test_a_comparison_labels_and_a_reward_model_too(folder, capsys):
    rows = [
        {"prompt": f"repeat the word {w}.", "completions": [f"{w}.", f"the word is {w}.", f"{w} {w}."]}
        for w in ("tree", "sun")
    ]
    (folder / "three.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["label", "three.jsonl", "--reward", f"{__name__}:shorter", "--name", "compared"]) == 0
    for e in read(folder / "runs/compared/label/data/samples.jsonl"):
        assert [r.rank for r in e.responses] == [0, 2, 1]
        assert e.responses[0].score == pytest.approx(0.8) and e.responses[0].attributes["win_rate"] == pytest.approx(
            2.1 / 3
        )
        assert len(e.preferences) == 3 and e.preferences[0].better == pytest.approx(0.8)
    assert main(["train", "reward", "--tiny", "--limit", "8", "--epochs", "1", "--model", "small"]) == 0
    judge = "runs/train-reward-tiny/reward"
    assert main(["label", "three.jsonl", "--reward", judge, "--name", "scored"]) == 0
    assert main(["select", "runs/scored/label", "--builder", "ranked", "--name", "picked", "--out", "pairs.jsonl"]) == 0
    assert "ranked: 2 prompts, 2 examples" in capsys.readouterr().out
    scores = [r.score for e in read(folder / "pairs.jsonl") for r in e.responses]
    assert len(scores) == 6 and len(set(scores)) > 2


def test_answers_are_generated_by_name(folder):
    options = "--model small --data smallworld --limit 2 --samples 2 --max-new-tokens 8 --out some.jsonl"
    assert main(["generate", *options.split()]) == 0
    assert [len(e.responses) for e in read(folder / "some.jsonl")] == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("select three.jsonl --builder rsoo", "unknown builder 'rsoo'; did you mean 'rso'?"),
        ("select three.jsonl --builder rso --options.sample 3", "builder 'rso' has no option 'sample'"),
        ("select three.jsonl --builder ranked --name nothing", "three.jsonl row 1, field 'score': no response has one"),
        ("select three.jsonl", "needs --builder STR"),
        ("label three.jsonl --reward nothing", "no reward model in 'nothing' (no reward.json)"),
        ("label three.jsonl --reward posttrain.data.smallworld_gold:golden", "has no 'golden'"),
        ("generate --model small --data nothing", "unknown data 'nothing'"),
        (
            "train online_dpo --reward builtins:len --model small --data smallworld --loss dro_v",
            "'dro_v' learns a value network from answers with ratings",
        ),
        (
            "train xpo --reward builtins:len --model small --data smallworld --samples-per-prompt 3",
            "'xpo' compares one sample with one of its opponent's",
        ),
    ],
)
def test_faults_of_usage_are_one_line(folder, arguments, said, capsys):
    (folder / "three.jsonl").exists() or (folder / "three.jsonl").write_text(
        '{"prompt": "p", "completions": ["a", "b"]}\n'
    )
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("loss", ["kto", "nash_md", "tdpo2"])
def test_any_loss_trains_on_fresh_samples(folder, loss, capsys):
    options = f"--loss {loss} --reward {GOLD} --model small --tiny --steps 2 --prompts-per-step 4 --max-staleness 1 --name on-{loss}"
    assert main(["train", "online_dpo", *options.split()]) == 0
    rows = lines(folder / f"runs/on-{loss}/online_dpo/metrics.jsonl")
    assert [row["rollout/staleness"] for row in rows] == [0, 1] and "reward/mean" in rows[0]
    assert "FAILED" not in capsys.readouterr().out
    assert (folder / f"runs/on-{loss}/online_dpo/model.safetensors").exists()
    assert len(lines(folder / f"runs/on-{loss}/online_dpo/samples.jsonl")) == 16


def test_xpo_trains(folder):
    options = f"--reward {GOLD} --model small --tiny --steps 2 --prompts-per-step 4 --loss.alpha 1e-3"
    assert main(["train", "xpo", *options.split()]) == 0
    assert len(lines(folder / "runs/train-xpo-tiny/xpo/metrics.jsonl")) == 2
