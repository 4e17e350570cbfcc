"""A trained reward model of any kind, read back from its directory: answers in, one score each with what it is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.data.collate import response_rows
from posttrain.data.judged_rows import asked, conditioned, in_both_orders, mark_steps, steps_of
from posttrain.errors import ConfigError, ModelError
from posttrain.forest import Batch, Row, build_forest, split
from posttrain.losses.reward_points import step_score, verdict_value
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.load import load_reward as load_heads
from posttrain.models.policy import Model, forward_stats
from posttrain.models.scores import Gate
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.types import Example, Message, Response

RECORD = "reward.json"
LIMIT = 1 << 20  # tokens: answers to score are never cut


@dataclass(frozen=True)
class Scorer:
    """A reward model with its tokenizer and record (``reward.json``); call it with examples for a score of each response.

    A score's ``parts`` add up to it (attributes, gated) or are probabilities (verdicts); ``steps`` has the chance of each step.
    """

    model: Model
    tokenizer: Any
    record: Mapping[str, Any]
    max_tokens: int = 1024

    def __call__(self, examples: Sequence[Example]) -> list[list[Score]]:
        """Score every response of every example, higher is better; one list an example.

        Raises:
            DataError: an example without responses, or in a domain that the model has no prompt for.
        """
        return FORMS[self.record["form"]](self, list(examples))

    def values(self, examples: Sequence[Example]) -> list[list[float]]:
        """The scores alone; NaN where the model abstains."""
        return [[math.nan if s.value is None else s.value for s in row] for row in self(examples)]

    @property
    def temperature(self) -> float:
        """What scores are divided by, so that the sigmoid of a difference is a probability that was checked."""
        return self.record.get("temperature", 1.0)

    def scaled(self, outputs: Tensor) -> list[float]:
        """Scores of a head's outputs ``[K]``: higher is better, demonstrations average 0, over the temperature."""
        sign, mean = self.record["sign"], self.record["mean"]
        return [(sign * x - mean) / self.temperature for x in outputs.tolist()]

    def read(self, rows: Sequence[Row], want: str, mask: str | None = None) -> list[Tensor]:
        """One statistic of rows, a tensor a row: ``[K]`` or ``[K, k]`` of its branches, ``[M]`` of their tokens."""
        names = {"score", "scores", "gate"}
        batch, found = Batch(build_forest(rows), {}, {}, {}), list[Tensor]()
        with torch.no_grad():
            for part in split(batch, self.max_tokens, whole_groups=False):
                marks = part.forest.masks[mask] if mask else None
                found.append(forward_stats(self.model, part.forest, frozenset({want}), mask=marks)[want])
        sizes = [len(r.branches) if want in names else sum(len(b.ids) for b in r.branches) for r in rows]
        return list(torch.cat(found).split(sizes))

    def rows(self, examples: Sequence[Example]) -> list[Row]:
        """The examples as token ids, in the domain's own prompt where the model has one for each."""
        if self.record["form"] == "domains":
            examples = conditioned(examples, self.record["domains"])
        return response_rows(self.tokenizer, examples, max_length=LIMIT)[0]

    def prefer(self, examples: Sequence[Example]) -> list[list[list[float]]]:
        """``P(answer i over answer j)`` of a model that compares, by example; 1/2 on the diagonal.

        Both orders are read: ``P = sigmoid(s(i, j) - s(j, i))``, so that ``P(i, j) + P(j, i) = 1`` exactly.

        Raises:
            ConfigError: another kind of model.
        """
        if self.record["form"] != "pairs":
            raise ConfigError(f"a {self.record['kind']} model scores single answers; expected a pairwise one")
        pairs = [(e, a, b) for e in examples for i, a in enumerate(e.responses) for b in e.responses[i + 1 :]]
        both = [in_both_orders(e, a, b, self.record["template"]) for e, a, b in pairs]
        read = self.read(self.rows(both), "score") if both else []
        gaps = iter([float(x[0] - x[1]) / self.temperature for x in read])
        out: list[list[list[float]]] = []
        for example in examples:
            size = len(example.responses)
            table = [[0.5] * size for _ in range(size)]
            for i in range(size):
                for j in range(i + 1, size):
                    table[i][j] = 1 / (1 + math.exp(-max(-700.0, min(700.0, next(gaps)))))
                    table[j][i] = 1 - table[i][j]
            out.append(table)
        return out


def load_reward(directory: str | Path, *, dtype: torch.dtype = torch.float32, max_tokens: int = 1024) -> Scorer:
    """Read a reward model that ``posttrain train reward`` wrote, of whatever kind; one of before kinds is Bradley-Terry.

    Raises:
        ConfigError: no ``reward.json``.
        ModelError: weights that are not those of the record.
    """
    path = Path(directory)
    if not (path / RECORD).exists():
        raise ConfigError(f"no reward model in '{directory}' (no {RECORD}); give the directory of a reward stage")
    known = {"kind": "bradley_terry", "form": "responses", "sign": 1, "mean": 0.0, "outputs": []}
    record = known | json.loads((path / RECORD).read_text())
    if record["form"] == "verdicts":
        model = load_policy(str(path), dtype=dtype)
    else:
        model = load_heads(str(path), dtype=dtype, outputs=max(1, len(record["outputs"])), form=record["form"])
    if record["form"] == "gated":
        assert model.scalar is not None
        gate = Gate(model.scalar.in_features, model.scalar.out_features, **record["gate"])
        gate.load_state_dict(load_file(path / "gate.safetensors"))
        model = replace(model, gate=gate.to(model.scalar.weight.dtype))
    return Scorer(model, load_tokenizer(str(path)), record, max_tokens)


def as_reward(scorer: Scorer) -> Reward:
    """The scorer as a reward of sampled responses, whose text it tokenises itself; a group is scored together."""

    def reward(completions: Sequence[Completion]) -> list[Score]:
        groups: dict[int, list[int]] = {}
        for k, c in enumerate(completions):
            groups.setdefault(c.group, []).append(k)
        examples = [
            replace(completions[members[0]].example, responses=tuple(said(completions[k].text) for k in members))
            for members in groups.values()
        ]
        out = [Score(None)] * len(completions)
        for members, scores in zip(groups.values(), scorer(examples), strict=True):
            for k, score in zip(members, scores, strict=True):
                out[k] = score
        return out

    return reward


def said(text: str) -> Response:
    """A response of one assistant turn."""
    return Response(messages=(Message(role="assistant", content=text),))


# ---------------------------------------------------------------------------- how each form is read


def _scalar(scorer: Scorer, examples: list[Example]) -> list[list[Score]]:
    found = scorer.read(scorer.rows(examples), "score")
    return [[Score(value) for value in scorer.scaled(scores)] for scores in found]


def _weighted(scorer: Scorer, examples: list[Example]) -> list[list[Score]]:
    """Attributes by fixed weights or by the gate's: ``sum_i w_i a_i - mean``, and the parts that add up to it."""
    rows, names, mean = scorer.rows(examples), scorer.record["outputs"], scorer.record["mean"]
    ratings = scorer.read(rows, "scores")
    weights = (
        scorer.read(rows, "gate")
        if scorer.model.gate is not None
        else [torch.tensor(scorer.record["weights"])] * len(rows)
    )
    out: list[list[Score]] = []
    for rating, weight in zip(ratings, weights, strict=True):
        table = (rating * weight / scorer.temperature).tolist()
        parts = [dict(zip([*names, "offset"], [*row, -mean / scorer.temperature], strict=True)) for row in table]
        out.append([Score(sum(p.values()), p) for p in parts])
    return out


def _stepped(scorer: Scorer, examples: list[Example]) -> list[list[Score]]:
    solutions = [[steps_of(r, scorer.record["separator"]) for r in e.responses] for e in examples]
    rows, places = mark_steps(scorer.tokenizer, scorer.rows(examples), solutions)
    out: list[list[Score]] = []
    for row, ends, marks in zip(rows, places, scorer.read(rows, "marks", "step"), strict=True):
        scores: list[Score] = []
        for logit, found in zip(marks.split([len(b.ids) for b in row.branches]), ends, strict=True):
            if not found or None in found:
                scores.append(Score(None))
                continue
            at = [end for end in found if end is not None]
            chances = torch.sigmoid(logit[at].double())
            value = float(step_score(chances, scorer.record["aggregation"]))
            scores.append(Score(value, {}, dict(zip(at, chances.tolist(), strict=True))))
        out.append(scores)
    return out


def _compared(scorer: Scorer, examples: list[Example]) -> list[list[Score]]:
    """The mean probability to beat each other response; one alone has no score."""
    out: list[list[Score]] = []
    for table in scorer.prefer(examples):
        others = len(table) - 1
        out.append([Score((sum(row) - 0.5) / others if others else None) for row in table])
    return out


def _told(scorer: Scorer, examples: list[Example]) -> list[list[Score]]:
    words: dict[str, float] = scorer.record["verdicts"]
    flat = [asked(e, r, scorer.record["question"], list(words)) for e in examples for r in e.responses]
    rows = response_rows(scorer.tokenizer, flat, max_length=LIMIT)[0]
    found = iter(scorer.read(rows, "logp", "loss"))
    values, group = torch.tensor(list(words.values()), dtype=torch.float64), torch.zeros(len(words), dtype=torch.long)
    lengths = iter([[len(b.ids) for b in row.branches] for row in rows])
    out: list[list[Score]] = []
    for example in examples:
        scores: list[Score] = []
        for _ in example.responses:
            sums = torch.stack([x.sum() for x in next(found).double().split(next(lengths))])
            chances = dict(zip(words, torch.softmax(sums, 0).tolist(), strict=True))
            scores.append(Score(float(verdict_value(sums, values, group)), chances))
        out.append(scores)
    return out


FORMS = {
    "responses": _scalar,
    "domains": _scalar,
    "attributes": _weighted,
    "gated": _weighted,
    "steps": _stepped,
    "pairs": _compared,
    "verdicts": _told,
}


def require_record(path: Path, name: str) -> dict[str, Any]:
    """The record of a reward model of one kind.

    Raises:
        ModelError: another kind.
    """
    record: dict[str, Any] = json.loads((path / RECORD).read_text()) if (path / RECORD).exists() else {}
    if record.get("kind") != name:
        raise ModelError(f"'{path}' is no reward model of kind '{name}' (found '{record.get('kind', 'none')}')")
    return record
