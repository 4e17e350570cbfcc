"""Scoring text with models of any tokenizer: alone, several, over HTTP, whole files cut off and gone on with."""

from __future__ import annotations

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.conftest import smol
from posttrain.data.answers import answer_rows
from posttrain.data.chat import render_prompt, render_response
from posttrain.data.load import read
from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.models.load import new_reward, save_merged
from posttrain.models.lora import Lora
from posttrain.models.members import new_members, save_member
from posttrain.models.small import small_path
from posttrain.rewards.average import average_rewards
from posttrain.rewards.base import Completion
from posttrain.rewards.ensemble import minimum, rule
from posttrain.rewards.panel import load_panel, panel_reward
from posttrain.rewards.remote import remote_reward, remote_scores
from posttrain.rewards.serve import Server
from posttrain.types import Example, Message, Response
from posttrain.work.scoring import score_file
from tiny import plain_net

TOKEN = "a-token-of-the-tests"
TEXTS = [("Name a colour.", ["Red.", "Blue, or green", "Tuesday"]), ("Hello there", ["General greeting!"])]


def example(prompt: str, answers: list[str], **more) -> Example:
    said = tuple(Response(messages=(Message(role="assistant", content=a),), **more) for a in answers)
    return Example(prompt=(Message(role="user", content=prompt),), responses=said)


EXAMPLES = [example(*item) for item in TEXTS]


def stirred(model, seed):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two whole reward models and two members of one trunk; the models' tokenizer is not the small model's."""
    home = tmp_path_factory.mktemp("rewards")
    net = plain_net(dtype=torch.float32, vocab_size=512, pad_token_id=9)
    net.save_pretrained(home / "base")
    smol().save_pretrained(home / "base")
    for k in (1, 2):
        model = stirred(new_reward(str(home / "base"), dtype=torch.float32, seed=k), k)
        save_merged(model, str(home / "base"), home / f"rm{k}", smol())
        (home / f"rm{k}" / "reward.json").write_text(json.dumps({"mean": 0.25 * k}))
    lora = Lora(rank=4, alpha=8)
    for k, member in enumerate(new_members(str(home / "base"), dtype=torch.float32, lora=lora, seeds=[3, 4])):
        stirred(member, 10 + k)
        save_member(member, str(home / "base"), home / f"member{k}", lora, mean=0.5)
    return home


@pytest.fixture(scope="module")
def panel(home):
    return load_panel(str(home / "rm1"), dtype=torch.float32)


@contextmanager
def serving(panel, **options):
    def scores(examples, truncated):
        return [found.scores for found in panel.score(examples, truncated=truncated)]

    server = Server(scores, token=TOKEN, label="rm", **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(20)
        assert not thread.is_alive()


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    given = {"Authorization": f"Bearer {TOKEN}"} | {k.replace("_", "-"): v for k, v in headers.items()}
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {k: v for k, v in given.items() if v is not None})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_scores_are_those_of_the_model_by_itself_less_its_mean(home, panel):
    rows = [
        (render_prompt(smol(), e.prompt), [render_response(smol(), e.prompt, r.messages) for r in e.responses])
        for e in EXAMPLES
    ]
    found = panel.score(EXAMPLES)
    for (prompt, answers), scored in zip(rows, found, strict=True):
        for ids, score in zip(answers, scored.scores, strict=True):
            states = panel.members[0].model.trunk(torch.tensor([[*prompt, *ids]])).last_hidden_state[0, -1]
            assert score == pytest.approx(float(panel.members[0].model.scalar(states)) - 0.25, abs=1e-5)
    assert len({s for f in found for s in f.scores}) == 4
    one_by_one = [panel.score([e])[0].scores for e in EXAMPLES]
    assert np.concatenate([f.scores for f in found]) == pytest.approx(np.concatenate(one_by_one), abs=1e-5)


def test_an_answer_that_is_too_long_has_no_score_and_costs_the_others_nothing(panel):
    long = example("Name a colour.", ["Red.", "very " * 300 + "long"])
    short = replace(panel, max_length=100)
    scored = short.score([long, example("Hi " * 200, ["Red."])])
    assert scored[0].scores[0] == pytest.approx(panel.score(EXAMPLES)[0].scores[0], abs=1e-5)
    assert scored[0].scores[1] is None and scored[1].scores == [None]


def test_a_cut_answer_is_read_without_a_stop_token():
    whole = answer_rows(smol(), EXAMPLES, max_length=512)
    cut = answer_rows(smol(), EXAMPLES, max_length=512, truncated=[[True, False, False], [False]])
    assert cut[0].row.branches[0].ids == whole[0].row.branches[0].ids[:-1]
    assert whole[0].row.branches[0].ids[-1] == smol().eos_token_id
    assert cut[0].row.branches[1:] == whole[0].row.branches[1:] and cut[1] == whole[1]


def test_a_row_that_can_not_be_rendered_is_named():
    bad = replace(EXAMPLES[0], responses=(Response(messages=(Message(role="user", content="?"),)),), file="f", row=7)
    with pytest.raises(DataError, match="f row 7, field 'responses'"):
        answer_rows(smol(), [EXAMPLES[0], bad], max_length=100)


def test_an_ensemble_of_whole_models_and_of_members_on_one_trunk(home):
    paths = [home / "rm1", home / "rm2", home / "member0", home / "member1"]
    alone = [np.concatenate([s.scores for s in load_panel(str(p), dtype=torch.float32).score(EXAMPLES)]) for p in paths]
    both = load_panel(",".join(map(str, paths)), dtype=torch.float32, combine=minimum)
    assert both.members[2].model.net is both.members[3].model.net is not both.members[0].model.net
    found = both.score(EXAMPLES)
    assert np.concatenate([s.scores for s in found]) == pytest.approx(np.min(alone, axis=0), abs=1e-5)
    assert np.concatenate([s.spread for s in found]) == pytest.approx(np.std(alone, axis=0), abs=1e-5)
    assert [len(s.members) for s in found] == [4, 4] and np.std(alone, axis=0).min() > 1e-3
    penalised = replace(both, combine=rule("variance", 2.0)).score(EXAMPLES)[1].scores[0]
    column = np.array([a[3] for a in alone])
    assert penalised == pytest.approx(column.mean() - 2 * column.var(), abs=1e-5)


def test_members_of_other_tokenizers_and_empty_directories_are_refused(home, tmp_path):
    with pytest.raises(ConfigError, match="no reward model in"):
        load_panel(str(tmp_path), dtype=torch.float32)
    with pytest.raises(ConfigError, match="all different"):
        new_members(str(home / "base"), dtype=torch.float32, lora=Lora(), seeds=[1, 1])
    other = stirred(new_reward(str(small_path()), dtype=torch.float32), 0)
    from posttrain.models.load import load_tokenizer

    save_merged(other, str(small_path()), tmp_path / "small", load_tokenizer(str(small_path())))
    (tmp_path / "small" / "reward.json").write_text("{}")
    with pytest.raises(ConfigError, match="other tokens than"):
        load_panel(f"{home / 'rm1'},{tmp_path / 'small'}", dtype=torch.float32)


def completions() -> list[Completion]:
    """What a policy of another tokenizer sampled: the ids mean nothing to the reward model."""
    made = []
    for group, (said, answers) in enumerate(TEXTS):
        for k, text in enumerate(answers):
            given = Example(prompt=(Message(role="user", content=said),))
            ids = tuple(range(k + 1))
            made.append(
                Completion(example=given, text=text, prompt_ids=(90 + group,), ids=ids, truncated=k == 1, group=group)
            )
    return made


def test_a_served_model_scores_as_it_does_here(panel):
    local = panel_reward(panel)(completions())
    with serving(panel) as server:
        assert remote_reward(server.url, TOKEN)(completions()) == local
        assert remote_scores(server.url, TOKEN, EXAMPLES) == [s.scores for s in panel.score(EXAMPLES)]
    uncut = panel.score(EXAMPLES)
    assert local[0].value == uncut[0].scores[0] and local[1].value != uncut[0].scores[1]


def test_requests_that_come_together_are_scored_together(panel):
    ready, batches = threading.Event(), []

    def slow(examples, truncated):
        batches.append(len(examples))
        ready.wait(10)
        return [[float(len(r.text)) for r in e.responses] for e in examples]

    server = Server(slow, token=TOKEN)
    thread = threading.Thread(target=server.run)
    thread.start()
    answers = {}
    texts = ["a" * n for n in range(1, 9)]

    def one(text):
        answers[text] = remote_scores(server.url, TOKEN, [example("?", [text])])

    workers = [threading.Thread(target=one, args=(t,)) for t in texts]
    for w in workers:
        w.start()
    while server.jobs.qsize() + sum(batches) < 8 and any(w.is_alive() for w in workers):
        time.sleep(0.01)
    ready.set()
    for w in workers:
        w.join(20)
    server.stop()
    thread.join(20)
    assert answers == {t: [[float(len(t))]] for t in texts}
    assert sum(batches) == 8 and len(batches) <= 3


def test_what_a_server_refuses(panel):
    body = {"examples": [{"prompt": "?", "responses": ["a"]}]}
    with serving(panel, max_bytes=2000) as server:
        assert ask(server, "GET", "/health", Authorization=None) == (200, {"ready": True, "model": "rm"})
        assert ask(server, "GET", "/schema")[1]["request"]["required"] == ["examples"]
        for wrong in (None, "Bearer wrong", f"Basic {TOKEN}"):
            status, said = ask(server, "POST", "/score", body, Authorization=wrong)
            assert status == 401 and "Bearer TOKEN" in said["error"]
        assert ask(server, "POST", "/score", body, Host="evil.example:80")[0] == 403
        assert ask(server, "POST", "/other", body)[0] == 404 and ask(server, "GET", "/score")[0] == 404
        assert ask(server, "POST", "/score", b"x" * 2001)[0] == 413
        assert ask(server, "POST", "/score", {"examples": [{"prompt": "?", "responses": ["a"] * 1100}]})[0] == 413
        for bad, said in [
            (b"{", "not JSON"),
            (b"[" * 900, "not JSON"),
            ({"examples": []}, "at least one"),
            ({"examples": [3]}, "request row 1"),
            ({"examples": [{"prompt": 3, "responses": ["a"]}]}, "prompt"),
            (body | {"mean": 1}, "unknown field 'mean'"),
            (body | {"truncated": [[1]]}, "true or false"),
            (body | {"truncated": []}, "true or false"),
        ]:
            status, answer = ask(server, "POST", "/score", bad)
            assert (status, said in answer["error"]) == (400, True), answer
        status, answer = ask(server, "POST", "/score", {"examples": [{"prompt": "?", "responses": [{"messages": [{"role": "user", "content": "x"}]}]}]})  # fmt: skip # noqa: E501
        assert status in (400, 422) and answer["error"]
        status, answer = ask(server, "POST", "/score", body)  # none of that ended the server
        assert status == 200 and answer["scores"] == [panel.score([example("?", ["a"])])[0].scores]
        with pytest.raises(RewardError, match=r"refused \(401\)"):
            remote_scores(server.url, "x" * 20, EXAMPLES)
    with pytest.raises(RewardError, match="no answer in 1 tries"):
        remote_scores(server.url, TOKEN, EXAMPLES, tries=1)
    with pytest.raises(ConfigError, match="at least 16"):
        Server(lambda e, t: [], token="short")


def test_a_fault_of_one_request_is_its_own(panel):
    def picky(examples, truncated):
        if any(r.text == "bad" for e in examples for r in e.responses):
            raise RewardError("can't read this")
        return [[1.0] * len(e.responses) for e in examples]

    server = Server(picky, token=TOKEN)
    thread = threading.Thread(target=server.run)
    thread.start()
    statuses = {}

    def one(text):
        statuses[text] = ask(server, "POST", "/score", {"examples": [{"prompt": "?", "responses": [text]}]})

    workers = [threading.Thread(target=one, args=(t,)) for t in ("good", "bad", "fine")]
    for w in workers:
        w.start()
    for w in workers:
        w.join(20)
    server.stop()
    thread.join(20)
    assert statuses["good"][0] == statuses["fine"][0] == 200
    assert statuses["bad"] == (422, {"error": "can't read this"})


def test_a_file_is_scored_in_order_and_gone_on_with(panel, tmp_path):
    rows = [{"prompt": f"Name {i}.", "chosen": f"Red {i}.", "rejected": "no " * (i + 1)} for i in range(150)]
    source, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows[:150]))
    outcome = score_file(panel, str(source), out, identity={"model": "a"})
    assert (outcome.examples, outcome.scored, outcome.too_long, outcome.resumed) == (150, 300, 0, 0)
    examples = read(out)
    wanted = panel.score(read(source))
    got = np.array([[r.score for r in e.responses] for e in examples])
    assert got == pytest.approx(np.array([s.scores for s in wanted]), abs=1e-5)
    assert [[r.rank for r in e.responses] for e in examples] == [[0, 1]] * 150
    whole = out.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        score_file(panel, str(source), out, identity={"model": "a"})

    class Killed(Exception):
        pass

    def kill(examples, answers):
        raise Killed

    out.unlink()
    with pytest.raises(Killed):
        score_file(panel, str(source), out, identity={"model": "a"}, on_done=kill)
    assert len(out.read_bytes().splitlines()) == 64
    with pytest.raises(ConfigError, match="begun with other model"):
        score_file(panel, str(source), out, identity={"model": "b"})
    with out.open("ab") as file:
        file.write(b'{"prompt": [{"role": "us')  # the power failed in the middle of a line
    outcome = score_file(panel, str(source), out, identity={"model": "a"})
    assert (outcome.examples, outcome.resumed) == (150, 64) and out.read_bytes() == whole
    assert not list(tmp_path.glob("*.progress"))


def test_given_scores_stay_and_disagreement_is_written(home, tmp_path):
    source, out = tmp_path / "rated.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"prompt": "Rated.", "completion": "Yes.", "score": 7}) + "\n")
    both = load_panel(f"{home / 'rm1'},{home / 'rm2'}", dtype=torch.float32)
    score_file(both, str(source), out, identity={})
    ((response,),) = [e.responses for e in read(out)]
    assert response.attributes["given_score"] == 7 and response.attributes["disagreement"] > 0
    assert response.score == pytest.approx(both.score(read(source))[0].scores[0])


def test_a_panel_reward_is_blind_to_ids(panel):
    first, *others = panel_reward(panel)(completions())
    alone = panel_reward(panel)(completions()[:1])[0]
    assert first.value == pytest.approx(alone.value, abs=1e-5) and first.parts == {}
    assert len({s.value for s in others}) == 3


def test_averaged_weights_are_one_model_whose_reference_answers_average_0(home, tmp_path):
    from safetensors.torch import load_file

    reference = [example(f"Name {n}.", [f"It is {n}.", "no"]) for n in range(16)]
    paths = [str(home / "rm1"), str(home / "rm2")]
    found = average_rewards(paths, tmp_path / "warm", reference=reference)
    one, two, both = (load_file(Path(p) / "model.safetensors") for p in (*paths, tmp_path / "warm"))
    assert found["method"] == "average" and len(both) == len(one)
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    panel = load_panel(str(tmp_path / "warm"), dtype=torch.float32)
    assert np.mean([s.scores[0] for s in panel.score(reference)]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ConfigError, match="at least 16"):
        average_rewards(paths, tmp_path / "other", reference=reference[:3])
