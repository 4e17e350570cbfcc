"""Text encoded word by word has the ids it has as a whole."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

from posttrain.data import words as module
from posttrain.data.control import make_coder
from posttrain.data.words import Words, cuts_at_spaces, encode_words

from .conftest import BUILDERS, CORPUS, smol
from .families import FAMILIES, family

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
NO_REGEX = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
LLAMA, QWEN = sorted(module._CUTS, key=len, reverse=True)
NASTY = [
    *" \n\t\r\x1c\x85\xa0\u3000\u180e\u200b\u2028",
    *" a a s'.-_1²٣é中ß́́ﷺ",
    " ",
    "  ",
    "word",
    "<think>",
    "'ll",
    "\u0301",
    "😀",
]


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), NO_REGEX])


CUTTERS = {
    "bytes": BYTES,
    "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "runs of digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), BYTES]),
    "llama": split(LLAMA),
    "qwen": split(QWEN),
}


def build(cutter, normalizer=None, *, added=(), **options):
    made = Tokenizer(models.BPE(**options))
    made.pre_tokenizer = cutter
    if normalizer is not None:
        made.normalizer = normalizer
    texts = [*CORPUS, *(a + b for a in NASTY for b in NASTY)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    made.add_tokens(list(added))
    return made


def spec_of(made):
    return json.loads(made.to_str())


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["plain", "nfc"])
@pytest.mark.parametrize("name", CUTTERS)
def test_words_give_the_ids_of_the_whole(name, normalizer):
    made = build(CUTTERS[name], normalizer, added=["<think>", "</think>"])
    assert cuts_at_spaces(spec_of(made))
    draw = random.Random(0)
    texts = ["".join(draw.choices(NASTY, k=draw.randint(0, 12))) for _ in range(3000)]
    whole = [encoding.ids for encoding in made.encode_batch(texts, add_special_tokens=False)]
    known = Words({}, {})
    for _ in range(2):
        assert list(encode_words(made, known, texts * 3)) == whole * 3
        assert len(known.later) > 300  # it didn't encode them whole


def test_known_words_are_not_encoded_again():
    made, other = build(BYTES), build(BYTES, unk_token="a")
    texts = ["the sum of two and three"] * 3
    known = Words({}, {})
    ids = list(encode_words(made, known, texts))
    assert set(known.first) == {"the"}
    assert set(known.later) == {"sum", "of", "two", "and", "three"}
    for kept in known:
        kept.update({word: [7] for word in kept})
    assert list(encode_words(other, known, texts)) == [[7] * 6] * 3 != ids


def test_of_a_known_word_with_a_comma_only_the_comma_is_encoded():
    made, known = build(BYTES), Words({}, {})
    texts = ["Name a colour and another colour"] * 3
    list(encode_words(made, known, texts))
    known.later["colour"] = [7]
    (ids,) = encode_words(made, known, ["Name a colour, colour.\n\nAnd another colour"])
    assert ids == [*made.encode("Name a").ids, 7, *made.encode(",").ids, 7, *made.encode(".\n\nAnd another").ids, 7]
    assert known.later["colour,"] == [7, *made.encode(",").ids]


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MOST", 50)
    monkeypatch.setattr(module, "_AT_ONCE", 200)
    made, known = build(BYTES), Words({}, {})
    texts = [f"a{i} " * 3 + "b" * 40 + " end" for i in range(300) for _ in range(3)]
    assert list(encode_words(made, known, texts)) == [e.ids for e in made.encode_batch(texts)]
    assert 0 < len(known.later) < 80
    assert "b" * 40 not in known.later
    assert all(len(kept) < 80 for kept in known)


def test_words_that_do_not_recur_are_left_in_their_texts():
    made, known = build(BYTES), Words({}, {})
    texts = [f"x{i} y{i}" for i in range(50)]
    assert list(encode_words(made, known, texts)) == [e.ids for e in made.encode_batch(texts)]
    assert known == Words({}, {})


@pytest.mark.parametrize(
    "made",
    [
        build(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        build(split(r"\s?\p{L}+")),
        build(split(r"[^ ]+ ?")),
        build(pre_tokenizers.Metaspace()),
        build(pre_tokenizers.Sequence([BYTES, pre_tokenizers.Digits()])),
        build(BYTES, normalizers.NFKC()),
        build(BYTES, normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        build(BYTES, dropout=0.1),
        build(BYTES, added=["two words"]),
        build(BYTES, added=["word<x>"]),
        build(BYTES, added=[AddedToken("<x>", rstrip=True)]),
        build(BYTES, added=[AddedToken("<x>", single_word=True)]),
        Tokenizer(models.BPE()),
    ],
    ids=lambda made: "",
)
def test_others_are_encoded_as_a_whole(made):
    assert not cuts_at_spaces(spec_of(made))


def test_which_tokenizers_are_encoded_by_words():
    by_words = {name for name in FAMILIES if make_coder(family(name)).words is not None}
    assert by_words == {"llama3", "qwen2.5", "qwen3", "smollm2", "chatml", "deepseek"}
    assert {name for name, make in BUILDERS.items() if make_coder(make()).words is not None} == {"smol", "llama3"}
    assert make_coder(smol()).words == Words({}, {})
