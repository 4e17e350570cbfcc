"""Every kind of reward model from the command line: trained, written, read back, and scored by plain transformers."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from caches import own_cache
from posttrain.cli import main
from posttrain.data.judged_rows import asked
from posttrain.data.load import read
from posttrain.data.smallworld import gold, rankings
from posttrain.errors import ModelError
from posttrain.models.load import load_reward as load_plain
from posttrain.rewards.base import Completion
from posttrain.rewards.kinds import KINDS
from posttrain.rewards.panel import load_panel
from posttrain.rewards.remote import remote_scores
from posttrain.rewards.serve import Server
from posttrain.rewards.trained import Scorer, as_reward, load_reward
from posttrain.stages import Context, TrainScorer
from posttrain.types import Example
from posttrain.work import reward_kinds

NAMES = ("helpfulness", "length", "format")
ROWS = rankings(6, seed=5)


def example_row(row: dict, **more) -> dict:
    """A ranking with all that any kind reads, in the library's own format."""
    responses = []
    for k, text in enumerate(row["completions"]):
        scores = gold(row["prompt"], text)._asdict()
        words = text.split(" ")
        steps = [{"text": w + " ", "label": 1 if k == 0 else -1} for w in words[:-1]]
        responses.append(
            {
                "messages": [{"role": "assistant", "content": text}],
                "rank": k,
                "score": 1 - k / 4,
                "attributes": {n: scores[n] for n in NAMES} | {"safe": float(scores["harm"] == 0)},
                "steps": [*steps, {"text": words[-1], "label": 1 if k == 0 else -1}],
            }
        )
    return {"prompt": [{"role": "user", "content": row["prompt"]}], "responses": responses, "kind": "helpful"} | more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with data, in which every kind is trained once."""
    folder = tmp_path_factory.mktemp("kinds")
    rows = [example_row(r, kind=("helpful", "harmless")[k % 2]) for k, r in enumerate(ROWS)]
    (folder / "rankings.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        own_cache(patch, folder / "cache")
        yield folder


def train(
    kind: str, *more: str, name: str = "", model: str = "small", data: str = "rankings.jsonl", epochs: int = 1
) -> Path:
    run = name or kind
    options = (
        f"--data {data} --model {model} --prompts-per-step 6 --epochs {epochs} --dtype float32 --lr 1e-3 --name {run}"
    )
    assert main(["train", "reward", "--kind", kind, *options.split(), *more]) == 0
    return Path("runs") / run / "reward"


SHOWN = {
    "attributes": ["--attributes", ",".join(NAMES), "--attribute-weights", "0.7,0.15,0.15"],
    "cost": ["--lora-rank", "4"],
    "generative": ["--lora-rank", "0"],
}


@pytest.fixture(scope="module")
def trained(folder):
    """Directories by kind, made when first asked for."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            model = str(get("attributes")) if kind == "gated" else "small"
            more = SHOWN.get(kind, ["--lora-rank", "0"])
            made[kind] = train(kind, *more, model=model)
        return made[kind]

    return get


def examples() -> list[Example]:
    return read("rankings.jsonl")


ONE_OF_EACH = ("bradley_terry", "cost", "conditional", "attributes", "process", "pairwise", "generative", "gated")


def test_one_of_each_form_is_tried():
    assert {KINDS[k].form for k in ONE_OF_EACH} == {k.form for k in KINDS.values()}


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_scores_are_the_same_alone_together_and_cut(trained, kind):
    """Whatever stands beside a response, and however passes are cut, its score is the same; and finite."""
    scorer = load_reward(trained(kind))
    together = scorer.values(examples())
    assert all(math.isfinite(x) for row in together for x in row)
    small = replace(scorer, max_tokens=40).values(examples()[::-1])[::-1]
    assert [x for r in small for x in r] == pytest.approx([x for r in together for x in r], abs=2e-5)
    if kind != "pairwise":
        first = examples()[0]
        alone = [scorer.values([replace(first, responses=(r,))])[0][0] for r in first.responses]
        assert alone == pytest.approx(together[0], abs=2e-5)


@pytest.mark.parametrize("kind", [k for k in ONE_OF_EACH if k != "generative"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_transformers_reads_the_same_outputs(trained, kind, side):
    scorer = load_reward(trained(kind))
    net = AutoModelForSequenceClassification.from_pretrained(trained(kind)).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained(kind), padding_side=side)
    assert net.config.num_labels == max(1, len(scorer.record["outputs"]))
    rows = scorer.rows(examples()[:3])
    mine = torch.cat(scorer.read(rows, "scores"))
    ids = [[*r.prompt, *b.ids] for r in rows for b in r.branches]
    padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(net(**padded).logits, mine, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_generative_model_says_the_same_in_plain_transformers(trained, side):
    """Of each verdict the log-probability of all its tokens after the question, whatever is padded where."""
    scorer = load_reward(trained("generative"))
    net = AutoModelForCausalLM.from_pretrained(trained("generative")).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained("generative"), padding_side=side)
    words, several = scorer.record["verdicts"], examples()[:2]
    flat = [asked(e, r, scorer.record["question"], list(words)) for e in several for r in e.responses]
    rows = scorer.rows(flat)
    padded = tokenizer.pad({"input_ids": [[*r.prompt, *b.ids] for r in rows for b in r.branches]}, return_tensors="pt")
    places = padded["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    with torch.no_grad():
        logp = net(**padded, position_ids=places).logits.log_softmax(-1)
    wanted, k = [], 0
    for row in rows:
        said = []
        for branch in row.branches:
            at = padded["attention_mask"][k].nonzero()[-len(branch.ids) :, 0]
            said.append(float(logp[k, at - 1, torch.tensor(branch.ids)].double().sum()))
            k += 1
        wanted.append(torch.softmax(torch.tensor(said), 0)[1])
    found = [score.parts["yes"] for row in scorer(several) for score in row]
    assert found == pytest.approx([float(x) for x in wanted], abs=2e-5)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_scores_are_the_same_after_saving_and_loading(trained, tmp_path, kind, rank):
    """As they are in memory when training ends, whole or with an adapter, which is merged when it is written."""
    model = str(trained("attributes")) if kind == "gated" else "small"
    rank = 0 if kind == "gated" else rank  # only its gate is trained
    stage = TrainScorer(
        model=model, data="rankings.jsonl", kind=kind, lora_rank=rank, limit=2, lr=1e-2, dtype="float32"
    )
    net, start, record = reward_kinds.trained(stage, Context(dir=tmp_path, inputs={}, console=Console(file=StringIO())))
    reward_kinds.write_scorer(net, start, tmp_path, record)
    assert (net.adapter is not None) == (rank > 0)
    before = Scorer(net, start.tokenizer, record).values(examples())
    after = load_reward(tmp_path).values(examples())
    assert [x for r in after for x in r] == pytest.approx([x for r in before for x in r], abs=2e-5)


def test_every_kind_scores_the_same_through_a_server(trained):
    for kind in ONE_OF_EACH:
        panel = load_panel(str(trained(kind)), dtype=torch.float32)
        wanted = [s.scores for s in panel.score(examples())]
        server = Server(
            lambda given, cut, panel=panel: [s.scores for s in panel.score(given, truncated=cut)],
            token="a-token-of-tests",
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            found = remote_scores(server.url, "a-token-of-tests", examples())
        finally:
            server.stop()
            thread.join(20)
        assert [x for r in found for x in r] == pytest.approx([x for r in wanted for x in r], abs=1e-5), kind
        assert [x for r in wanted for x in r] == pytest.approx(
            [x for r in load_reward(trained(kind)).values(examples()) for x in r], abs=2e-5
        ), kind


def test_contributions_add_up_to_the_score(trained):
    for kind in ("attributes", "gated"):
        scorer = load_reward(trained(kind))
        for row in scorer(examples()):
            for score in row:
                assert set(score.parts) == {*NAMES, "offset"}
                assert sum(score.parts.values()) == pytest.approx(score.value, abs=1e-5)
    rating = load_reward(trained("attributes")).read(scorer.rows(examples()[:1]), "scores")[0]
    weights = load_reward(trained("attributes")).record["weights"]
    by_hand = (rating.double() @ torch.tensor(weights, dtype=torch.float64)).tolist()
    mean = load_reward(trained("attributes")).record["mean"]
    found = load_reward(trained("attributes")).values(examples()[:1])[0]
    assert [x - mean for x in by_hand] == pytest.approx(found, abs=1e-5)


def test_ratings_that_are_missing_are_left_out_of_the_error(trained):
    """Answers rated by one attribute or the other train one model: heads of both move, by the ratings that there are."""
    rows = [json.loads(line) for line in Path("rankings.jsonl").read_text().splitlines()]
    for row in rows:
        for k, response in enumerate(row["responses"]):
            name = ("helpfulness", "length")[k % 2]
            response["attributes"] = {name: {"helpfulness": 3.0, "length": -2.0}[name]}
    Path("some.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    place = train("attributes", "--lora-rank", "0", name="some", data="some.jsonl", epochs=20)
    scorer = load_reward(place)
    assert scorer.record["outputs"] == ["helpfulness", "length"]
    ratings = torch.cat(scorer.read(scorer.rows(examples()), "scores")).mean(0).tolist()
    assert ratings[0] > 1 and ratings[1] < -0.5


def test_a_pairwise_model_is_antisymmetric(trained):
    scorer, several = load_reward(trained("pairwise")), examples()[:2]
    turned = [replace(e, responses=e.responses[::-1]) for e in several]
    for one, two in zip(scorer.prefer(several), scorer.prefer(turned), strict=True):
        for i in range(4):
            assert one[i][i] == 0.5
            for j in range(4):
                assert one[i][j] + one[j][i] == 1.0 and one[i][j] == pytest.approx(two[3 - i][3 - j], abs=1e-6)
    alone = replace(several[0], responses=several[0].responses[:1])
    assert scorer([alone])[0][0].value is None


def test_a_process_model_scores_each_step_where_it_ends(trained):
    scorer = load_reward(trained("process"))
    (example, *_), ((score, *_), *_) = examples(), scorer(examples())
    response = example.responses[0]
    assert len(score.steps) == len(response.steps) > 1
    ids = scorer.rows([example])[0].branches[0].ids
    ends = [scorer.tokenizer.decode(ids[: end + 1]).rstrip() for end in score.steps]
    said = ["".join(s.text for s in response.steps[: k + 1]).rstrip() for k in range(len(response.steps))]
    assert ends == said
    assert score.value == pytest.approx(math.prod(score.steps.values()), abs=1e-9)


def test_a_conditional_model_reads_the_domain(trained):
    scorer = load_reward(trained("conditional"))
    one = examples()[0]
    helpful, harmless = (scorer.values([replace(one, kind=k)])[0] for k in ("helpful", "harmless"))
    assert helpful != harmless
    with pytest.raises(ValueError, match="no system prompt for 'poetry'"):
        scorer.values([replace(one, kind="poetry")])


def test_verdicts_are_probabilities(trained):
    (score, *_), *_ = load_reward(trained("generative"))(examples())
    assert set(score.parts) == {"no", "yes"} and sum(score.parts.values()) == pytest.approx(1, abs=1e-9)
    assert score.value == pytest.approx(score.parts["yes"], abs=1e-9)


def test_a_cost_is_lower_for_better(trained):
    scorer = load_reward(trained("cost"))
    raw = torch.cat(scorer.read(scorer.rows(examples()), "score")).tolist()
    assert [-x for x in raw] == pytest.approx([v for row in scorer.values(examples()) for v in row], abs=1e-5)


def test_a_scorer_is_a_reward(trained):
    scorer, one = load_reward(trained("bradley_terry")), examples()[0]
    asks = [
        Completion(example=one, text=r.text, prompt_ids=(1,), ids=(2,), truncated=False, group=0) for r in one.responses
    ]
    assert [s.value for s in as_reward(scorer)(asks)] == pytest.approx(scorer.values([one])[0], abs=1e-6)


def test_scores_of_another_form_are_not_taken_for_plain_ones(trained):
    for kind in ("process", "pairwise", "conditional"):
        with pytest.raises(ModelError, match=f"is a reward model of kind '{kind}'"):
            load_plain(str(trained(kind)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--kind bradley", "unknown kind of reward model 'bradley'; did you mean 'bradley_terry'?"),
        ("--kind hinge --options margin,2", "has no option 'margin'"),
        ("--kind process --centre 0.01", "has a loss of its own"),
        ("--kind hinge --attributes helpfulness", "a hinge model reads no attributes"),
        ("--kind gated", "is no reward model of kind 'attributes'"),
        ("--kind attributes --attributes taste", "a response has none of taste"),
    ],
)
def test_faults_of_usage_are_one_line(folder, arguments, said, capsys):
    base = "--data rankings.jsonl --model small --lora-rank 0 "
    assert main(["train", "reward", *base.split(), *arguments.split(), "--name", "fault-" + arguments.split()[1]]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ONE_OF_EACH])
def test_every_other_kind_trains(trained, kind):
    assert all(math.isfinite(x) for row in load_reward(trained(kind)).values(examples()) for x in row)


def test_the_table_of_kinds(capsys):
    assert main(["list", "kinds"]) == 0
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
