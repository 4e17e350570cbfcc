"""Scoring text with one reward model or several: whole files, requests and rollouts, whatever the policy's tokenizer is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.data.answers import Answers, answer_rows
from posttrain.errors import ConfigError, RewardError
from posttrain.models.load import load_tokenizer, model_files
from posttrain.models.members import is_member, load_members, member_base
from posttrain.rewards.base import Completion, Reward, Score
from posttrain.rewards.ensemble import disagreement, less_variance, rule
from posttrain.rewards.model import features_and_scores
from posttrain.rewards.trained import RECORD, Scorer, load_reward
from posttrain.types import Example, Message, Response

Combine = Callable[[NDArray[np.float64]], NDArray[np.float64]]
ENSEMBLE = "ensemble"
"""The form, in ``reward.json``, of a directory whose members are in it."""

_PROBE = Example(
    prompt=(Message(role="user", content="What's 12 + 30, exactly?"),),
    responses=(Response(messages=(Message(role="assistant", content="It is 42; naïvely so: ∎ 数"),)),),
)


class Scored(NamedTuple):
    """One example's scores, one a response, None = none given; ``members[k]`` are those of member k, ``spread`` their deviation."""

    scores: list[float | None]
    members: list[list[float | None]]
    spread: list[float | None]


@dataclass(frozen=True)
class Panel:
    """Reward models that read text; several are an ensemble.

    Attributes:
        label: its name in tables.
        members: of any kind, all with one tokenizer, which needn't be the policy's.
        combine: ``[K, B] -> [B]``, joins the members' scores.
        max_length: answers of more tokens, prompt included, have no score.
        temperature: an ensemble's scores are divided by it; a single model's own is in its record.
    """

    label: str
    members: tuple[Scorer, ...]
    combine: Combine = less_variance
    max_length: int = 2048
    temperature: float = 1.0

    def score(
        self,
        examples: Sequence[Example],
        *,
        truncated: Sequence[Sequence[bool]] | None = None,
        on_done: Callable[[int], None] | None = None,
    ) -> list[Scored]:
        """Score every response of every example, each prompt computed once; ``on_done`` hears how many answers are done.

        Of a response that was cut by length (``truncated``), the stop token that it never had is not read.

        Raises:
            RewardError: a score that is not finite.
        """
        answers = answer_rows(self.members[0].tokenizer, examples, max_length=self.max_length, truncated=truncated)
        columns: list[list[list[float | None]]] = []
        for k, member in enumerate(self.members):
            columns.append(_values(member, examples, answers))
            if on_done is not None:
                on_done((k + 1) * sum(len(a.places) for a in answers))
        known = [s for column in columns for row in column for s in row if s is not None]
        if not np.isfinite(known).all():
            raise RewardError(f"reward model '{self.label}' gave a score that is not finite; try --dtype float32")
        return [self._join([column[i] for column in columns]) for i in range(len(examples))]

    def _join(self, members: list[list[float | None]]) -> Scored:
        if len(members) == 1:
            return Scored(members[0], members, [None if s is None else 0.0 for s in members[0]])
        scores: list[float | None] = []
        spread: list[float | None] = []
        for column in zip(*members, strict=True):
            known = np.array([[s] for s in column if s is not None], dtype=np.float64)
            whole = len(known) == len(members)
            scores.append(float(self.combine(known)[0]) / self.temperature if whole else None)
            spread.append(float(disagreement(known)[0]) / self.temperature if whole else None)
        return Scored(scores, members, spread)

    def features(self, examples: Sequence[Example]) -> list[NDArray[np.float64]]:
        """The first member's states at the score token, ``[K, d]`` an example, of the answers that fit.

        Raises:
            ConfigError: a model that reads no single answers.
        """
        first = self.members[0]
        if first.model.scalar is None or first.record["form"] not in ("responses", "domains", "attributes", "gated"):
            raise ConfigError(f"'{self.label}' reads no single answers; their distance is that of models that do")
        answers = answer_rows(first.tokenizer, examples, max_length=self.max_length)
        rows = [a.row for a in answers if a.row is not None]
        found = iter(features_and_scores(first.model, rows, max_tokens=first.max_tokens)[0] if rows else [])
        width = first.model.scalar.in_features
        return [np.zeros((0, width)) if a.row is None else next(found) for a in answers]


def _values(member: Scorer, examples: Sequence[Example], answers: Sequence[Answers]) -> list[list[float | None]]:
    """A member's scores of the answers that fit."""
    places = [i for i, a in enumerate(answers) if a.row is not None]
    found: list[list[float | None]] = []
    if member.record["form"] == "responses":
        rows = [row for a in answers if (row := a.row) is not None]
        read = member.read(rows, "score") if rows else []
        found = [[*member.scaled(scores)] for scores in read]
    elif places:
        fitting = lambda i: zip(examples[i].responses, answers[i].places, strict=True)  # noqa: E731
        short = [replace(examples[i], responses=tuple(r for r, p in fitting(i) if p is not None)) for i in places]
        found = [[s.value for s in row] for row in member(short)]
    by_place = dict(zip(places, found, strict=True))
    return [[None if p is None else by_place[i][p] for p in a.places] for i, a in enumerate(answers)]


def load_panel(
    path: str,
    *,
    dtype: torch.dtype,
    combine: Combine | None = None,
    max_length: int = 2048,
    max_tokens: int = 1024,
) -> Panel:
    """Load a reward model of any kind, or an ensemble: the directory of one, or directories separated by commas.

    Members that `posttrain.models.members.save_member` wrote on one base share its network in memory. ``combine`` None is the
    ensemble's own rule, or `posttrain.rewards.ensemble.less_variance` of members that are named one by one.

    Raises:
        ConfigError: no reward model there, or members of different tokenizers.
    """
    paths = panel_paths(path)
    shared = [p for p in paths if is_member(p)]
    models = dict(zip(shared, load_members(shared, dtype=dtype), strict=True))
    members: list[Scorer] = []
    for p in paths:
        if p in models:
            members.append(Scorer(models[p], load_tokenizer(member_base(p)), _member_record(Path(p)), max_tokens))
        else:
            members.append(load_reward(p, dtype=dtype, max_tokens=max_tokens))
    for p, member in zip(paths, members, strict=True):
        if answer_rows(member.tokenizer, [_PROBE], max_length=512) != answer_rows(
            members[0].tokenizer, [_PROBE], max_length=512
        ):
            raise ConfigError(f"'{p}' reads a conversation as other tokens than '{paths[0]}'; an ensemble reads alike")
    whole = _ensemble_record(Path(path.strip()))
    own = rule(whole["rule"], whole["penalty"]) if whole else less_variance
    return Panel(panel_label(path), tuple(members), combine or own, max_length, whole.get("temperature", 1.0))


def panel_label(path: str) -> str:
    """A panel's name in tables: of a stage's directory with the run's."""
    given = [Path(part.strip()) for part in path.split(",") if part.strip()]
    first = given[0].resolve()
    name = f"{first.parent.name}/{first.name}" if (first.parent / "run.json").exists() else first.name
    return name if len(given) == 1 else f"{name} and {len(given) - 1} more"


def _ensemble_record(directory: Path) -> dict[str, Any]:
    """What an ensemble's directory says of it; empty of any other."""
    file = directory / RECORD
    record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return record if record.get("form") == ENSEMBLE else {}


def _member_record(directory: Path) -> dict[str, Any]:
    """What is known of a member: it scores answers, less its mean."""
    plain = {"kind": "bradley_terry", "form": "responses", "sign": 1, "mean": 0.0, "outputs": []}
    return plain | json.loads((directory / RECORD).read_text())


def panel_paths(path: str) -> list[str]:
    """The directories of a panel's members; those of an ensemble's directory are in it.

    Raises:
        ConfigError: none, or one that holds no reward model.
    """
    paths: list[str] = []
    for part in (part.strip() for part in path.split(",") if part.strip()):
        inside = _ensemble_record(Path(part)).get("members", [])
        paths += [str(Path(part) / name) for name in inside] or [part]
    for p in paths or [path]:
        if not is_member(p) and not (Path(p) / RECORD).exists():
            raise ConfigError(
                f"no reward model in '{p}' (no {RECORD}); give the directory of a reward stage, or several with commas"
            )
    return paths


def panel_base(path: str) -> str:
    """Where a panel's tokenizer and configuration are."""
    return member_base(panel_paths(path)[0])


def panel_files(path: str) -> list[Path]:
    """The files that decide a panel's scores."""
    given = [Path(part.strip()) for part in path.split(",") if part.strip()]
    found = [place / RECORD for place in given if _ensemble_record(place)]
    for p in panel_paths(path):
        beside = (RECORD, "head.safetensors", "adapter_model.safetensors", "gate.safetensors")
        found += [*model_files(member_base(p)), *(Path(p) / name for name in beside if (Path(p) / name).exists())]
    return list(dict.fromkeys(found))


def as_examples(completions: Sequence[Completion]) -> tuple[list[Example], list[list[bool]], list[tuple[int, int]]]:
    """Completions as text: an example a prompt, which answers were cut, and where each completion went."""
    groups: dict[tuple[int, ...], list[Completion]] = {}
    order = {ids: i for i, ids in enumerate(dict.fromkeys(c.prompt_ids for c in completions))}
    places: list[tuple[int, int]] = []
    for c in completions:
        group = groups.setdefault(c.prompt_ids, [])
        places.append((order[c.prompt_ids], len(group)))
        group.append(c)
    answer = lambda c: Response(messages=(Message(role="assistant", content=c.text),))  # noqa: E731
    examples = [replace(g[0].example, responses=tuple(map(answer, g)), preferences=()) for g in groups.values()]
    return examples, [[c.truncated for c in g] for g in groups.values()], places


def panel_reward(panel: Panel) -> Reward:
    """A reward that reads completions as text, so that the policy may have another tokenizer and any size.

    An answer longer than the panel's ``max_length`` gets no score: the reward abstains.
    """

    def reward(completions: Sequence[Completion]) -> list[Score]:
        examples, truncated, places = as_examples(completions)
        found = panel.score(examples, truncated=truncated)
        out: list[Score] = []
        for r, b in places:
            value, spread = found[r].scores[b], found[r].spread[b]
            parts = {"disagreement": spread} if spread is not None and len(panel.members) > 1 else {}
            out.append(Score(value, parts))
        return out

    return reward
