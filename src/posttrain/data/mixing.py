"""Mixtures of sources, splits that keep a prompt on one side, and a streaming shuffle that can be resumed.

Nothing here draws from a global generator: each decision is a hash of the seed and of what it is about, so that
it's the same on every machine, for any reading order and however often a program was stopped.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Generic, Literal, TypeVar, get_args

from posttrain.errors import ConfigError, DataError, suggest
from posttrain.types import Example

T = TypeVar("T")

WhenOut = Literal["stop", "repeat"]
"""What a mixture does when a source that is due has run out."""

BLOCK = 64
"""Draws whose order within a mixture the seed shuffles."""


def keyed(*key: object) -> int:
    """Return a number from 0 to 2^64 - 1 that depends on ``key`` only, evenly spread over keys."""
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# ---------------------------------------------------------------------------- which prompts are the same


def normal_text(text: str) -> str:
    """Return the text without what doesn't tell prompts apart: case, Unicode form, amount of white space."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.lower().split())


def normal_prompt(example: Example) -> str:
    """Return the normalised turns of an example's prompt; prompts with the same turns count as one."""
    calls = [[(c.name, sorted(c.arguments.items(), key=str)) for c in m.tool_calls] for m in example.prompt]
    turns = [f"{m.role}\x1f{normal_text(m.content)}" for m in example.prompt]
    return "\x1e".join(turns) + (str(calls) if any(calls) else "")


def normal_opening(example: Example) -> str:
    """Return the normalised first user turn, so that all conversations that open with it count as one."""
    first = next((m for m in example.prompt if m.role == "user"), example.prompt[0] if example.prompt else None)
    return normal_text(first.content) if first else ""


# ---------------------------------------------------------------------------- splits


@dataclass(kw_only=True)
class SplitReport:
    """How the shares came out: the share asked for and the rows that fell on each side."""

    shares: dict[str, float] = field(default_factory=dict[str, float])
    rows: Counter[str] = field(default_factory=Counter[str])


def sides(
    examples: Iterable[Example],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    key: Callable[[Example], str] = normal_prompt,
    report: SplitReport | None = None,
) -> Iterator[tuple[str, Example]]:
    """Return each example with the name of its side, one after another.

    u = hash(seed, key) / 2^64 decides: the first name takes u < its share, the next what follows ... So all
    examples of one key are on one side, whatever other rows there are, and the rows of each side are near its
    share, nearer the more distinct keys there are. A larger first share only moves examples to it.

    Args:
        examples: any number of them.
        shares: name of side to share; they add up to 1.
        seed: another seed is another split.
        key: what has to stay together: `normal_prompt`, `normal_opening` (whole trees of conversations) or your own.
        report: filled in while reading.

    Raises:
        ConfigError: shares that aren't positive or don't add up to 1.
    """
    bounds = _bounds(shares)
    if report is not None:
        report.shares = dict(shares)
        report.rows.update(dict.fromkeys(shares, 0))
    return _sides(examples, bounds, seed, key, report)


def _sides(
    examples: Iterable[Example],
    bounds: Sequence[tuple[str, float]],
    seed: int,
    key: Callable[[Example], str],
    report: SplitReport | None,
) -> Iterator[tuple[str, Example]]:
    for example in examples:
        u = keyed("split", seed, key(example)) / 2**64
        name = next((name for name, bound in bounds if u < bound), bounds[-1][0])
        if report is not None:
            report.rows[name] += 1
        yield name, example


def split(
    examples: Iterable[Example],
    shares: Mapping[str, float],
    *,
    seed: int = 0,
    key: Callable[[Example], str] = normal_prompt,
    report: SplitReport | None = None,
) -> dict[str, list[Example]]:
    """Return the examples of each side, in their order; see `sides`, which needn't hold them."""
    parts: dict[str, list[Example]] = {name: [] for name in shares}
    for name, example in sides(examples, shares, seed=seed, key=key, report=report):
        parts[name].append(example)
    return parts


def _bounds(shares: Mapping[str, float]) -> list[tuple[str, float]]:
    """Each side's name and the end of its range of u."""
    for name, share in shares.items():
        if not (math.isfinite(share) and share > 0):
            raise ConfigError(f"the share of '{name}' is {share}; expected a number above 0")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        found = ", ".join(f"{name}={share:g}" for name, share in shares.items()) or "none"
        raise ConfigError(f"the shares {found} add up to {total:g}; expected 1, such as train=0.9, test=0.1")
    ends, end = [], 0.0
    for name, share in shares.items():
        end += share
        ends.append((name, end))
    return ends


# ---------------------------------------------------------------------------- mixtures


@dataclass(frozen=True, kw_only=True)
class Part:
    """One source of a mixture: ``open()`` starts a pass over it; ``weight`` is its part relative to the others'."""

    name: str
    open: Callable[[], Iterable[Example]]
    weight: float = 1.0


@dataclass(kw_only=True)
class MixReport:
    """What a mixture took: its ``rates``, ``rows`` drawn from each part, and ``passes`` completed over each."""

    rates: dict[str, float] = field(default_factory=dict[str, float])
    rows: Counter[str] = field(default_factory=Counter[str])
    passes: Counter[str] = field(default_factory=Counter[str])
    ended_by: str = ""


def size_weights(sizes: Mapping[str, int], temperature: float = 1.0) -> dict[str, float]:
    """Return p_i = n_i^(1/T) / sum_j n_j^(1/T): T = 1 by size, larger T more even, infinite T equal parts.

    Raises:
        ConfigError: a temperature that isn't above 0, an empty source.
    """
    if not temperature > 0:
        raise ConfigError(f"the temperature is {temperature}; expected a number above 0 (1 = by size)")
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"the source '{name}' has {size} rows, so it has no part; leave it out")
    logs = {name: math.log(size) / temperature for name, size in sizes.items()}
    top = max(logs.values(), default=0.0)
    powers = {name: math.exp(value - top) for name, value in logs.items()}  # the largest is 1: no overflow
    return {name: power / sum(powers.values()) for name, power in powers.items()}


def mix(
    parts: Sequence[Part],
    *,
    seed: int = 0,
    when_out: WhenOut = "stop",
    total: int | None = None,
    report: MixReport | None = None,
) -> Iterator[Example]:
    """Return examples of all parts, one after another, at the rates of their weights.

    Counts are exact, not drawn by chance: after every 64 examples each part has given rate x examples of them,
    less or more than that by under 1; within such a block the seed decides the order. Each part keeps its own
    order (`Shuffle` it, or the mixture, to change that). Nothing is read ahead. ``meta["origin"]`` says where an example came from:
    part, file and row, with what ``origin`` held ``before``.

    Args:
        parts: the sources, with unique names.
        seed: of the order within blocks.
        when_out: ``stop`` ends the mixture at the first draw from a part that has run out; ``repeat`` starts that
            part again, counted in the report, and ends when every part has been gone through.
        total: examples at most (under ``repeat``, also the number that it goes on to).
        report: filled in while reading.

    Raises:
        ConfigError: no parts, equal names, a weight that isn't above 0, an unknown ``when_out``.
        DataError: a part without examples.
    """
    rates = _rates(parts, when_out, total)
    report = MixReport() if report is None else report
    report.rates = rates
    report.rows.update(dict.fromkeys(rates, 0))
    report.passes.update(dict.fromkeys(rates, 0))
    return islice(_mixed(parts, seed, when_out, total, report), total)


def _mixed(parts: Sequence[Part], seed: int, when_out: str, total: int | None, report: MixReport) -> Iterator[Example]:
    opens = {part.name: part.open for part in parts}
    running = {name: iter(start()) for name, start in opens.items()}
    for name in _order(report.rates, seed):
        example = next(running[name], None)
        if example is None:
            if not report.rows[name]:
                raise DataError(f"the source '{name}' has no examples; leave it out of the mixture")
            report.passes[name] += 1
            if when_out == "stop" or (total is None and all(report.passes.values())):
                report.ended_by = f"'{name}' ran out"
                return
            running[name] = iter(opens[name]())
            example = next(running[name], None)
            if example is None:
                raise DataError(f"the source '{name}' can't be read twice; give a function that opens it anew")
        report.rows[name] += 1
        if report.rows.total() == total:
            report.ended_by = f"{total} examples were asked for"
        yield _with_origin(example, name)


def _rates(parts: Sequence[Part], when_out: str, total: int | None) -> dict[str, float]:
    if when_out not in get_args(WhenOut):
        raise ConfigError(f"unknown when_out '{when_out}'; {suggest(when_out, get_args(WhenOut))}")
    if total is not None and total < 1:
        raise ConfigError(f"total is {total}; expected at least 1, or leave it out")
    if not parts:
        raise ConfigError("a mixture of nothing; expected at least one part")
    weights = {part.name: part.weight for part in parts}
    if len(weights) < len(parts):
        twice = next(n for n, count in Counter(part.name for part in parts).items() if count > 1)
        raise ConfigError(f"two parts are named '{twice}'; give each its own name")
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the weight of '{name}' is {weight}; expected a number above 0")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _order(rates: Mapping[str, float], seed: int) -> Iterator[str]:
    """Which part each draw takes: blocks with exact counts, each in an order of its own."""
    due, block = _due(rates), 0
    while True:
        names = list(islice(due, BLOCK))
        yield from (names[i] for i in sorted(range(BLOCK), key=lambda i: keyed("mix", seed, block, i)))
        block += 1


def _due(rates: Mapping[str, float]) -> Iterator[str]:
    """Draw parts so that |drawn_i(n) - n rate_i| <= 1 - 1/(2k - 2) for all n, k parts.

    Among parts that lag by at least 1/(2k - 2), the one that would soonest lag by too much (Tijdeman 1980, "The
    chairman assignment problem").
    """
    least = 1 / max(2 * len(rates) - 2, 1)
    drawn, n = dict.fromkeys(rates, 0), 0
    while True:
        n += 1
        lag = {name: n * rate - drawn[name] for name, rate in rates.items()}
        ready = [name for name in rates if lag[name] >= least - 1e-9] or [max(rates, key=lambda name: lag[name])]
        name = min(ready, key=lambda name: (1 - least - lag[name]) / rates[name])
        drawn[name] += 1
        yield name


def _with_origin(example: Example, part: str) -> Example:
    origin: dict[str, Any] = {"part": part, "file": example.file, "row": example.row}
    if "origin" in example.meta:
        origin["before"] = example.meta["origin"]
    return replace(example, meta={**example.meta, "origin": origin})


# ---------------------------------------------------------------------------- shuffle


class Shuffle(Generic[T]):
    """Iterate over a source in a shuffled order, with ``buffer`` items in memory; `state` is where it stands.

    The buffer is filled; each step gives out one of its items, chosen by hash(seed, epoch, step), and reads the
    next one. So an item comes at most ``buffer`` steps early; with a buffer as large as the source every order
    is possible. Each (seed, epoch) is another order.

    Args:
        source: opens the items from the first on; it has to give the same ones each time.
        buffer: items in memory.
        seed: of the order.
        epoch: which pass this is.

    Raises:
        ConfigError: a buffer below 1.
    """

    def __init__(self, source: Callable[[], Iterable[T]], *, buffer: int, seed: int, epoch: int = 0) -> None:
        if buffer < 1:
            raise ConfigError(f"a shuffle buffer of {buffer}; expected at least 1 (1 keeps the order)")
        self._buffer, self._seed, self._epoch = buffer, seed, epoch
        self._items = enumerate(source())
        self._waiting: list[tuple[int, T]] = []
        self._read = self._given = 0

    @classmethod
    def resume(cls, source: Callable[[], Iterable[T]], state: Mapping[str, Any]) -> Shuffle[T]:
        """Return a shuffle that goes on exactly where ``state`` was taken; reads the source up to there again.

        Raises:
            ConfigError: a state that isn't one of `state`'s.
            DataError: the source has become shorter.
        """
        keys = {"buffer", "seed", "epoch", "read", "given", "waiting"}
        if not isinstance(state, Mapping) or keys - state.keys():
            raise ConfigError(f"not the state of a shuffle; expected an object with {', '.join(sorted(keys))}")
        self = cls(source, buffer=state["buffer"], seed=state["seed"], epoch=state["epoch"])
        slots = {index: slot for slot, index in enumerate(state["waiting"])}
        found = {}
        while self._read < state["read"]:
            if not self._take():
                raise DataError(f"the source ends after {self._read} items, {state['read']} were read from it before")
            index, item = self._waiting.pop()
            if index in slots:
                found[slots[index]] = (index, item)
        self._waiting = [found[slot] for slot in range(len(slots))]
        self._given = state["given"]
        return self

    def state(self) -> dict[str, Any]:
        """Return where it stands, as JSON values: item numbers in the buffer, how many were read and given out."""
        return {
            "buffer": self._buffer,
            "seed": self._seed,
            "epoch": self._epoch,
            "read": self._read,
            "given": self._given,
            "waiting": [index for index, _ in self._waiting],
        }

    def __iter__(self) -> Shuffle[T]:
        return self

    def __next__(self) -> T:
        while len(self._waiting) < self._buffer and self._take():
            pass
        if not self._waiting:
            raise StopIteration
        slot = keyed("shuffle", self._seed, self._epoch, self._given) % len(self._waiting)
        self._waiting[slot], self._waiting[-1] = self._waiting[-1], self._waiting[slot]
        self._given += 1
        return self._waiting.pop()[1]

    def _take(self) -> bool:
        """Read one item into the buffer; False at the end."""
        pair = next(self._items, None)
        if pair is None:
            return False
        self._waiting.append(pair)
        self._read += 1
        return True
