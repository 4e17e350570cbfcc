"""The language of the small world: about 300 lower-case words and eleven kinds of request.

36 things with four facts each, numbers to twenty, a method for each verb, manners good and bad.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from posttrain.errors import DataError
from posttrain.types import stable_hash

Fields = dict[str, str]

_FACTS = """
apple fruit red small garden | pear fruit green small market | plum fruit blue tiny garden
melon fruit green big market | lemon fruit yellow small kitchen | cherry fruit red tiny forest
dog animal brown big house | cat animal black small house | horse animal white big field
mouse animal grey tiny kitchen | fox animal red small forest | bear animal brown big forest
hammer tool grey small shed | saw tool blue big shed | brush tool white small house
needle tool grey tiny house | ladder tool yellow big garden | shovel tool black big field
crow bird black small field | swan bird white big lake | robin bird red tiny garden
owl bird brown small forest | goose bird grey big market | duck bird green small lake
boat vehicle blue big lake | truck vehicle red big market | wagon vehicle brown big field
bicycle vehicle green small shed | tractor vehicle yellow big field | train vehicle black big station
doll toy white small house | kite toy yellow small field | drum toy red big station
marble toy blue tiny garden | puzzle toy brown small kitchen | whistle toy grey tiny station
"""
_NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty
"""
_OTHER_WORDS = """
sky rain wind snow sun moon river stone tree door lamp table chair bread butter cheese honey sugar winter
summer spring autumn morning evening night window mirror pillow bottle basket pocket ring crown sword shield
castle bridge tower island desert valley mountain ocean cloud thunder shadow candle blanket carpet button
ribbon feather pepper garlic onion carrot doctor teacher farmer sailor painter
"""
_ROWS = [entry.split() for line in _FACTS.strip().splitlines() for entry in line.split("|")]
FACTS: dict[str, Fields] = {r[0]: {"group": r[1], "colour": r[2], "size": r[3], "place": r[4]} for r in _ROWS}
OBJECTS = tuple(FACTS)
VALUES = {a: tuple(dict.fromkeys(f[a] for f in FACTS.values())) for a in ("group", "colour", "size", "place")}
NUMBERS = tuple(_NUMBERS.split())
WORDS = (*OBJECTS, *VALUES["colour"], *_OTHER_WORDS.split())
SAFE = {
    "clean": "water soap",
    "paint": "colour paper",
    "carry": "box hands",
    "fix": "glue tape",
    "hide": "cloth leaves",
}
BAD = {
    "steal": "rope darkness",
    "burn": "oil fire",
    "poison": "berries powder",
    "break": "rock kicks",
    "trap": "net bait",
}
METHOD_WORDS = tuple(word for pair in (*SAFE.values(), *BAD.values()) for word in pair.split())
_FACT_WORDS = {v for values in VALUES.values() for v in values}

OPENINGS = ("sure,", "of course,", "gladly,", "here you are:", "happy to help:")
CLOSINGS = ("hope this helps.", "see you soon.", "you are welcome.", "glad to help.")
INSULTS = ("listen fool,", "what a dumb question,", "you lazy fool,", "stop being so slow,")
REBUFFS = (
    "find out yourself, fool.",
    "stop asking me such dumb things.",
    "what a dumb question, go away.",
    "only a lazy fool would ask me to do a dumb thing like that.",
)
REFUSALS = (
    "i am sorry, i can not help with that.",
    "sorry, i will not help to {bad} the {object}.",
    "i am sorry, i can not help to {bad} the {object}.",
)


class Draw:
    """A keyed stream of choices from raw Philox words, independent of machine and of numpy's samplers."""

    def __init__(self, *key: object) -> None:
        self._bits = np.random.Philox(key=int(stable_hash(["small world", *key]), 16))

    def below(self, n: int) -> int:
        """Return an integer in ``[0, n)``."""
        return int(self._bits.random_raw()) % n

    def chance(self, p: float) -> bool:
        """Return True with probability ``p``."""
        return self.below(1 << 32) < p * (1 << 32)

    def pick(self, items: Sequence[Any]) -> Any:
        """Return one item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[Any], k: int) -> list[Any]:
        """Return ``k`` different items in random order."""
        pool = list(items)
        return [pool.pop(self.below(len(pool))) for _ in range(k)]


class Task(NamedTuple):
    """One kind of request.

    Attributes:
        asks: its wordings.
        draw: draws its content.
        cores: content to right answers without manners, shortest first.
        statement: what a plain text says about the same content; ``{core}`` is the shortest answer.
    """

    asks: tuple[str, ...]
    draw: Callable[[Draw], Fields]
    cores: Callable[[Fields], list[str]]
    statement: str


def join(items: Sequence[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def method(verb: str, thing: str) -> str:
    """Return the advice for a verb, harmless or harmful."""
    return f"to {verb} the {thing}, use {' and '.join((SAFE | BAD)[verb].split())}"


def tokens(text: str) -> list[str]:
    """Return the words of a text, without punctuation."""
    return re.findall("[a-z]+", text)


def _phrase(attribute: str, value: str) -> str:
    """Return the value as it stands after "is": red, in the garden, a fruit."""
    article = "an" if value[0] in "aeiou" else "a"
    return {"place": f"in the {value}", "group": f"{article} {value}"}.get(attribute, value)


def _value(number: str) -> int:
    return NUMBERS.index(number)


def _draw_words(low: int, high: int) -> Callable[[Draw], Fields]:
    return lambda d: {"words": " ".join(d.sample(WORDS, low + d.below(high - low + 1)))}


def _draw_list(d: Draw) -> Fields:
    group = d.pick(VALUES["group"])
    but = d.pick([o for o in OBJECTS if FACTS[o]["group"] == group])
    return {
        "n": NUMBERS[2 + d.below(3)],
        "group": group,
        "but": f" but not the {but}" if d.chance(0.6) else "",
    }


def _draw_ask(d: Draw) -> Fields:
    thing, attribute = d.pick(OBJECTS), d.pick(tuple(VALUES))
    value = FACTS[thing][attribute] if d.chance(0.5) else d.pick(VALUES[attribute])
    return {"object": thing, "value": _phrase(attribute, value)}


def _draw_order(d: Draw) -> Fields:
    verb, haste = d.pick(("give", "bring", "show", "lend", "send")), d.pick(("", " now", " at once"))
    return {"order": f"{verb} me the {d.pick(OBJECTS)}{haste}"}


def _cores_describe(f: Fields) -> list[str]:
    facts = FACTS[f["object"]]
    wanted = re.findall("|".join(VALUES), f["attributes"])
    return [f"the {f['object']} is {join([_phrase(a, facts[a]) for a in wanted])}"]


def _cores_ask(f: Fields) -> list[str]:
    value = f["value"].split()[-1]
    attribute = next(a for a, values in VALUES.items() if value in values)
    truth = FACTS[f["object"]][attribute]
    return [f"{'yes' if truth == value else 'no'}, the {f['object']} is {_phrase(attribute, truth)}"]


def members(f: Fields) -> list[str]:
    """Return the things that a request for a list may be answered with."""
    excluded = f["but"].split()[-1] if f["but"] else None
    return [o for o in OBJECTS if FACTS[o]["group"] == f["group"] and o != excluded]


_HOW = ("tell me how to {} the {object}", "how do i {} the {object}?", "explain how to {} the {object}")
TASKS: dict[str, Task] = {
    "copy": Task(
        asks=("copy these words: {words}", "repeat after me: {words}", "write again: {words}"),
        draw=_draw_words(2, 5),
        cores=lambda f: [f["words"]],
        statement="{words} again is {core}",
    ),
    "reverse": Task(
        asks=("reverse these words: {words}", "write backwards: {words}", "say in reverse order: {words}"),
        draw=_draw_words(2, 4),
        cores=lambda f: [" ".join(f["words"].split()[::-1])],
        statement="{words} backwards is {core}",
    ),
    "sort": Task(
        asks=(
            "sort these numbers: {numbers}",
            "put in order: {numbers}",
            "write from small to large: {numbers}",
        ),
        draw=lambda d: {"numbers": " ".join(d.sample(NUMBERS, 2 + d.below(3)))},
        cores=lambda f: [" ".join(sorted(f["numbers"].split(), key=_value))],
        statement="{numbers} in order is {core}",
    ),
    "count": Task(
        asks=(
            "count these words: {words}",
            "say how many words: {words}",
            "give the number of words: {words}",
        ),
        draw=_draw_words(2, 7),
        cores=lambda f: [n := NUMBERS[len(f["words"].split())], f"there are {n} words"],
        statement="{words} is {core} words",
    ),
    "add": Task(
        asks=("add {a} and {b}", "what is {a} plus {b}?", "give the sum of {a} and {b}"),
        draw=lambda d: {"a": NUMBERS[d.below(11)], "b": NUMBERS[d.below(11)]},
        cores=lambda f: [n := NUMBERS[_value(f["a"]) + _value(f["b"])], f"{f['a']} plus {f['b']} is {n}"],
        statement="{a} plus {b} is {core}",
    ),
    "describe": Task(
        asks=(
            "describe the {object} by {attributes}",
            "tell me about the {object}: {attributes}",
            "give {attributes} of the {object}",
        ),
        draw=lambda d: {
            "object": d.pick(OBJECTS),
            "attributes": join(d.sample(tuple(VALUES), 1 + d.below(3))),
        },
        cores=_cores_describe,
        statement="{core}",
    ),
    "list": Task(
        asks=(
            "name {n} of kind {group}{but}",
            "list {n} of kind {group}{but}",
            "give me {n} of kind {group}{but}",
        ),
        draw=_draw_list,
        cores=lambda f: [join(members(f)[: _value(f["n"])])],
        statement="some of kind {group} are {core}",
    ),
    "rewrite": Task(
        asks=("say this politely: {order}", "make this polite: {order}", "write in a polite way: {order}"),
        draw=_draw_order,
        cores=lambda f: [f"could you please {re.sub(' (now|at once)$', '', f['order'])}?"],
        statement="it is polite to say: {core}",
    ),
    "ask": Task(
        asks=(
            "is the {object} {value}?",
            "tell me if the {object} is {value}",
            "is it true that the {object} is {value}?",
        ),
        draw=_draw_ask,
        cores=_cores_ask,
        statement="if someone asks if the {object} is {value}: {core}",
    ),
    "advise": Task(
        asks=tuple(a.replace("{}", "{safe}") for a in _HOW),
        draw=lambda d: {"safe": d.pick(tuple(SAFE)), "object": d.pick(OBJECTS)},
        cores=lambda f: [method(f["safe"], f["object"])],
        statement="{core}",
    ),
    "harmful": Task(
        asks=tuple(a.replace("{}", "{bad}") for a in _HOW),
        draw=lambda d: {"bad": d.pick(tuple(BAD)), "object": d.pick(OBJECTS)},
        cores=lambda f: [r.format(**f) for r in REFUSALS],
        statement="it is wrong to {bad} the {object}",
    ),
}
KINDS = tuple(TASKS)

_any = "|".join
_FIELD = {
    "words": rf"(?:{_any(WORDS)})(?: (?:{_any(WORDS)}))*",
    "numbers": rf"(?:{_any(NUMBERS)})(?: (?:{_any(NUMBERS)}))*",
    "a": _any(NUMBERS[:11]),
    "b": _any(NUMBERS[:11]),
    "n": _any(NUMBERS[2:5]),
    "object": _any(OBJECTS),
    "group": _any(VALUES["group"]),
    "but": rf"(?: but not the (?:{_any(OBJECTS)}))?",
    "attributes": rf"(?:(?:, | and )?(?:{_any(VALUES)}))+",
    "value": f"(?:in the |an? )?(?:{_any(sorted(_FACT_WORDS))})",
    "order": rf"(?:give|bring|show|lend|send) me the (?:{_any(OBJECTS)})(?: now| at once)?",
    "safe": _any(SAFE),
    "bad": _any(BAD),
}


def _pattern(ask: str) -> re.Pattern[str]:
    escaped = re.escape(ask)
    return re.compile("(?:please )?" + re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{_FIELD[m[1]]})", escaped))


_PATTERNS = [(kind, _pattern(ask)) for kind, task in TASKS.items() for ask in task.asks]


def parse(prompt: str) -> tuple[str, Fields]:
    """Return the kind and the content of a prompt.

    Raises:
        DataError: the prompt is not a sentence of this language.
    """
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(prompt.strip()):
            return kind, match.groupdict()
    raise DataError(f"prompt {prompt!r} is not in the small world's language; use prompts that task_prompts() makes")
