"""Pairs for reward models: a mix curated by scores and domains, ratings binarised, decontamination, patch pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from posttrain.data.mixing import keyed, normal_text
from posttrain.data.views import Kept, fault
from posttrain.errors import ConfigError, suggest
from posttrain.types import Example, Message, Response

# ---------------------------------------------------------------------------- ratings to pairs


def mean_rating(example: Example, names: Sequence[str] = ()) -> Example:
    """Return the example with each response's score the mean of its ratings (those of ``names``, or all that it has).

    UltraFeedback's own overall score has ones that were meant as tens; the mean of its four ratings has not.

    Raises:
        DataError: a response with none of them.
    """
    responses: list[Response] = []
    for k, response in enumerate(example.responses):
        rated = [v for name, v in response.attributes.items() if not names or name in names]
        if not rated:
            wanted = ", ".join(names) or "any rating"
            raise fault(example, 0, "attributes", f"response {k} (from 0) has no {wanted}", "rate it or remove it")
        responses.append(replace(response, score=sum(rated) / len(rated)))
    return replace(example, responses=tuple(responses))


def binarised(examples: Sequence[Example], *, seed: int = 0, least: float = 0.0) -> Kept:
    """Return a pair of each example: the highest score against one of the lower ones, drawn by ``seed`` and prompt.

    The rejected response is any whose score is below the best by more than ``least``; an example without one is a tie, left
    out and counted. Of several best ones the draw takes one.

    Raises:
        DataError: a response without score.

    Source: Tunstall et al. 2023, Zephyr, arXiv 2310.16944, section 4.2.
    """
    found: list[Example] = []
    for i, example in enumerate(examples):
        scores = [r.score for r in example.responses]
        known = [s for s in scores if s is not None]
        if len(known) < len(scores) or len(scores) < 2:
            raise fault(example, i, "score", f"{len(known)} of {len(scores)} responses have one", "score two at least")
        best = [k for k, s in enumerate(known) if s == max(known)]
        lower = [k for k, s in enumerate(known) if max(known) - s > least]
        if not lower:
            continue
        pick = lambda what, among, e=example: among[keyed("binarise", seed, what, e.prompt_key) % len(among)]  # noqa: E731
        pair = example.responses[pick("chosen", best)], example.responses[pick("rejected", lower)]
        found.append(replace(example, responses=tuple(replace(r, rank=k) for k, r in enumerate(pair))))
    return Kept(found, len(examples) - len(found))


# ---------------------------------------------------------------------------- a mix


@dataclass(frozen=True, kw_only=True)
class Domain:
    """How much of a domain a mix takes: the best ``share`` of its rows, by a score from which ``offset`` is subtracted."""

    share: float
    offset: float = 0.0


SKYWORK = {"math": Domain(share=0.3), "code": Domain(share=0.3), "other": Domain(share=0.1)}
"""The shares of Liu et al. 2024 (Skywork-Reward, arXiv 2410.18451), section 3.1; offsets there are 0.1 and 0.05 of two sources."""


@dataclass(frozen=True)
class Curated:
    """The rows of a mix, and for each domain how many it had and how many were kept."""

    examples: list[Example]
    found: Mapping[str, int]
    kept: Mapping[str, int]


def top_of_domains(
    examples: Sequence[Example],
    scores: Sequence[float],
    domains: Mapping[str, Domain],
    *,
    domain: Callable[[Example], str] = lambda e: e.kind,
    source: Callable[[Example], str] = lambda e: "",
    offsets: Mapping[str, float] | None = None,
) -> Curated:
    """Return the best rows of each domain by ``score - offset``, in their order; ties go to the earlier row.

    Args:
        examples: the rows.
        scores: how good each row's best answer is, by a reward model there is already.
        domains: what is taken of each.
        domain: a row's domain.
        source: where a row is from; ``offsets`` names what is subtracted from the scores of a source that scores too well.
        offsets: by source.

    Raises:
        ConfigError: a row in a domain that is not named, a share outside 0 to 1, or another number of scores than rows.
    """
    if len(scores) != len(examples):
        raise ConfigError(f"got {len(scores)} scores for {len(examples)} rows; expected one a row")
    members: dict[str, list[tuple[float, int]]] = {name: [] for name in domains}
    for i, (example, score) in enumerate(zip(examples, scores, strict=True)):
        name = domain(example)
        if name not in members:
            raise ConfigError(f"row {i} (from 0) is in the domain '{name}'; {suggest(name, domains)}")
        lowered = score - domains[name].offset - (offsets or {}).get(source(example), 0.0)
        members[name].append((-lowered, i))
    chosen: list[int] = []
    for name, rows in members.items():
        share = domains[name].share
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of '{name}' is {share}; expected 0 to 1")
        chosen += [i for _, i in sorted(rows)[: round(share * len(rows))]]
    kept = Counter(domain(examples[i]) for i in chosen)
    return Curated([examples[i] for i in sorted(chosen)], {k: len(v) for k, v in members.items()}, dict(kept))


def first_pass(
    examples: Sequence[Example], scores: Sequence[Sequence[float]], *, only: Callable[[Example], bool] = lambda e: True
) -> Kept:
    """Return the rankings whose best answer a first model already scores above all worse ones; others stay out, counted.

    ``only`` says which rows are asked; the rest are kept. So noisy labels of one source go (Skywork asks WildGuard's rows by a
    model trained on all others).

    Raises:
        ConfigError: another number of scores than answers.

    Source: Liu et al. 2024, arXiv 2410.18451, section 3.1.
    """
    found: list[Example] = []
    for i, (example, row) in enumerate(zip(examples, scores, strict=True)):
        if len(row) != len(example.responses):
            raise ConfigError(f"row {i} (from 0) has {len(example.responses)} answers and {len(row)} scores")
        ranks = [r.rank or 0 for r in example.responses]
        best = min(ranks)
        lowest = min(s for s, rank in zip(row, ranks, strict=True) if rank == best)
        worse = [s for s, rank in zip(row, ranks, strict=True) if rank > best]
        if not only(example) or all(lowest > s for s in worse):
            found.append(example)
    return Kept(found, len(examples) - len(found))


# ---------------------------------------------------------------------------- decontamination


def words_of(text: str) -> list[str]:
    """Words as they are compared: case, Unicode form and punctuation don't count."""
    return re.findall(r"\w+", normal_text(text))


def grams(text: str, n: int) -> set[int]:
    """Hashes of the runs of ``n`` words; a shorter text is one run."""
    words = words_of(text)
    runs: Iterable[Sequence[str]] = (words[i : i + n] for i in range(len(words) - n + 1)) if len(words) > n else [words]
    return {keyed("gram", *run) for run in runs if run}


@dataclass(frozen=True)
class Overlap:
    """A row that shares runs of words with a benchmark: its position, the benchmark's item, and the share of its runs found."""

    row: int
    item: int
    share: float


def contaminated(
    examples: Sequence[Example], benchmark: Sequence[str], *, n: int = 13, least: float = 0.0, short: int = 8
) -> list[Overlap]:
    """Return the rows whose prompt shares a run of ``n`` words with a benchmark's prompt, the worst item of each.

    Prompts of fewer than ``n`` words are compared by runs of ``short``, and still shorter ones as a whole.

    Args:
        examples: the rows.
        benchmark: prompts of the benchmark.
        n: words in a run.
        least: the share of a row's runs that has to be exceeded.
        short: words in a run of a short prompt.

    Raises:
        ConfigError: runs of fewer than one word.
    """
    if not 1 <= short <= n:
        raise ConfigError(f"got runs of {n} and {short} words; expected the short ones shorter, and at least 1")
    tables: dict[int, dict[Hashable, int]] = {n: {}, short: {}}
    for item, text in enumerate(benchmark):
        for size, table in tables.items():
            for gram in grams(text, size):
                table.setdefault(gram, item)
    found: list[Overlap] = []
    for row, example in enumerate(examples):
        text = " ".join(m.content for m in example.prompt if m.role == "user")
        size = n if len(words_of(text)) >= n else short
        own = grams(text, size)
        hits = Counter(tables[size][gram] for gram in own if gram in tables[size])
        if hits:
            item, _ = min(hits.items(), key=lambda pair: (-pair[1], pair[0]))
            share = sum(hits.values()) / len(own)
            if share > least:
                found.append(Overlap(row, item, share))
    return found


def decontaminated(examples: Sequence[Example], benchmark: Sequence[str], *, n: int = 13, least: float = 0.0) -> Kept:
    """Return the rows that are not `contaminated`; the others are counted."""
    out = {overlap.row for overlap in contaminated(examples, benchmark, n=n, least=least)}
    return Kept([e for i, e in enumerate(examples) if i not in out], len(out))


# ---------------------------------------------------------------------------- patches


def patch_pairs(
    prompts: Sequence[Example], clean: Sequence[str], hack: Callable[[str, str], str], *, domain: str = ""
) -> list[Example]:
    """Return pairs that put a clean answer above the same answer hacked, a few dozen of which mend a reward model.

    Args:
        prompts: what is asked.
        clean: an answer to each.
        hack: ``(prompt, clean answer) -> hacked answer``, the pattern seen in a policy's late samples.
        domain: the ``kind`` of the rows, where a model has one system prompt for each; the prompts' own if "".

    Raises:
        ConfigError: a hack that changes nothing.

    Source: Cai et al. 2024, InternLM2, arXiv 2403.17297, section 4.3 (20 to 100 pairs after each round).
    """
    found: list[Example] = []
    for i, (example, answer) in enumerate(zip(prompts, clean, strict=True)):
        hacked = hack(example.prompt[-1].content, answer)
        if hacked == answer:
            raise ConfigError(f"the hack leaves answer {i} (from 0) as it is; expected another text")
        responses = tuple(
            Response(messages=(Message(role="assistant", content=text),), rank=rank)
            for rank, text in enumerate((answer, hacked))
        )
        found.append(replace(example, responses=responses, preferences=(), kind=domain or example.kind))
    return found
