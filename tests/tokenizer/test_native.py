"""The native tokenizer gives the Python one's ids: for every kind of text, dtype, thread, scan."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer_fuzz
from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.backends import NativeBackend
from fastclip.tokenizer.reference import ReferenceTokenizer, merge
from fastclip.tokenizer.vocabulary import (
    BYTE_TO_SYMBOL,
    SOT,
    WORD_END,
    Dialect,
    load_vocabulary,
)

DIALECTS: tuple[Dialect, ...] = ("openai", "open_clip")
SCANS: tuple[Literal["best", "portable"], ...] = ("best", "portable")
NATIVE = {dialect: NativeBackend(dialect) for dialect in DIALECTS}
PYTHON = {dialect: ReferenceTokenizer(dialect) for dialect in DIALECTS}


def wrong_ones(texts: Iterable[str], dialect: Dialect = "openai") -> list[str]:
    native, python = NATIVE[dialect], PYTHON[dialect]
    return [ascii(t)[:200] for t in texts if native.encode(t) != python.encode(t)][:20]


def expected(case: Any, field: str, dialect: Dialect) -> list[int]:
    if dialect == "open_clip":
        return case.expected.get(f"open_clip_{field}", case.expected[field])
    return case.expected[field]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("scan", SCANS)
def test_tricky_texts(case_table: Any, dialect: Dialect, scan: Literal["best", "portable"]):
    native = NativeBackend(dialect, scan=scan)
    cases = [case for case in case_table.cases if case.category != "version"]
    wrong = [c.text for c in cases if native.encode(c.text) != expected(c, "ids", dialect)]
    assert not wrong


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
def test_tricky_rows(case_table: Any, dialect: Dialect, threads: int, dtype: torch.dtype):
    """More than a thread's share of rows, into a buffer that held something else."""
    cases = [case for case in case_table.cases if case.category != "version"] * 3
    rows = [expected(case, "row", dialect) for case in cases]
    padded = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    out = torch.full((len(cases), 77), 999).to(dtype)
    tokenizer = Tokenizer(dialect=dialect, threads=threads, backend="native")
    assert tokenizer([case.text for case in cases], out=out) is out
    assert torch.equal(out.to(torch.int64), padded)


def test_grammar_fuzz():
    """`make fuzz` runs a million."""
    assert tokenizer_fuzz.compare(20_000, seed=20_260_226) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_long_grammar_fuzz():
    assert tokenizer_fuzz.compare(1_000_000, seed=20_261_123) == []


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(max_size=60))
def test_any_text(text: str):
    assert wrong_ones([text]) == []


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(max_codepoint=127), max_size=200))
def test_any_ascii(text: str):
    """The scan of 64 bytes at a time, with its carries from block to block."""
    portable = NativeBackend("openai", scan="portable")
    assert NATIVE["openai"].encode(text) == portable.encode(text) == PYTHON["openai"].encode(text)


@pytest.mark.parametrize("length", [62, 63, 64, 65, 126, 127, 128, 129, 191, 192, 193])
def test_words_across_the_blocks_of_a_scan(length: int):
    pieces = ["it's", "we're", "x'll", "don't", "''s", "a", "1", "!", "'", "abcdefghijklmnopq", " "]
    rng = random.Random(length)
    texts = []
    for _ in range(300):
        text = ""
        while len(text) < length:
            text += rng.choice(pieces)
        texts.append(text[:length])
    assert wrong_ones(texts) == []


def in_contexts(code_points: Iterable[int], contexts: Iterable[str]) -> Iterator[str]:
    return (context.replace("_", chr(c)) for c in code_points for context in contexts)


def test_every_code_point():
    """All of them, 32 to a text; those that are told apart by their neighbours also one by one."""
    texts = [
        " ".join(f"a{chr(c)}a" for c in range(start, start + 32))
        for start in range(0, 0x110000, 32)
    ]
    assert wrong_ones(texts) == []
    assert wrong_ones(in_contexts(range(0x700), ["_", "'_", "_\u0301", "Σ_", "AΣ_B"])) == []
    assert wrong_ones(in_contexts(range(0x700, 0x20000, 61), ["_", "'_", "_\u0301", "AΣ_B"])) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_code_point_in_every_context(dialect: Dialect):
    contexts = ["_", "a_", "_a", "a_a", "'_", "1_", "_\u0301", "Σ_", "AΣ_", "AΣ_B"]
    assert wrong_ones(in_contexts(range(0x110000), contexts), dialect) == []


def test_signs_of_mojibake():
    """All pairs of what ftfy's test for mojibake tells apart, between three kinds of neighbours."""
    from ftfy.badness import MOJIBAKE_CATEGORIES

    signs = sorted({c for part in MOJIBAKE_CATEGORIES.values() for c in (part[0], part[-1])})
    signs += ["Ã", "Â", "Ð", "°", "œ", "×", "²", "à", "√", "‚", "в", "Ђ", "Г", "ў", "β", "€", "ā"]
    texts = [f"{a}{b}{c}{d}" for a in ("", " ", "a") for b in signs for c in signs for d in "a "]
    assert wrong_ones(texts) == []


def test_entities():
    import html.entities

    names = sorted({name.rstrip(";") for name in html.entities.html5})
    names += [name.upper() for name in names]
    assert (
        wrong_ones(f"&{name}{after}" for name in names for after in (";", "", "1", " ", "<")) == []
    )
    numbers = [*range(0x180), *range(0xD7F0, 0xE010, 7), *range(0xFDC0, 0xFE00), 0xFFFE, 0x1FFFF]
    numbers += [0x10FFFF, 0x110000, 2**31, 2**32 - 1, 2**32, 2**64, 10**23]
    spellings = ["&#{};", "&#{}", "&#x{:x};", "&#X{:X}g", "&amp;#{};", "<&#{};"]
    assert wrong_ones(s.format(n) for n in numbers for s in spellings) == []


def test_normalisation():
    """Marks in all orders on starters that are whole, that come apart, and that are Hangul."""
    starters = [
        "e",
        "é",
        "ệ",
        "ǟ",
        "Σ",
        "ᄒ",
        "하",
        "한",
        "\u0915",
        "\u09c7",
        "\u0b47",
        "\u1025",
        "",
    ]
    marks = [
        "\u0301",
        "\u0323",
        "\u0302",
        "\u0344",
        "\u0338",
        "\u1161",
        "\u11ab",
        "\u093c",
        "\u09be",
    ]
    marks += ["\u0b57", "\u102e", "\u0345", "\u0f71", "\u20d2"]
    texts = [
        f"{s}{a}{b}{c}" for s in starters for a in ["", *marks] for b in marks for c in ["", *marks]
    ]
    assert wrong_ones(texts) == []


def test_every_token_as_a_word():
    vocabulary = load_vocabulary("openai")
    words = {vocabulary.decode([place]).removesuffix(" ") for place in range(SOT)}
    whole = sorted(word for word in words if word and "\ufffd" not in word and WORD_END not in word)
    assert len(whole) > 40_000
    assert wrong_ones(whole) == []


def test_merge_pairs_as_words():
    vocabulary = load_vocabulary("openai")
    words = []
    for line in vocabulary.ranks:
        left, right = (vocabulary.ids[part] for part in line.split(" "))
        words.append(vocabulary.decode([left, right]).removesuffix(" "))
    assert wrong_ones(words) == []


@pytest.mark.parametrize(
    "symbols", ["a", "é", "猫", "😀", "aé", "a猫", "é😀", "aé猫😀", "thequick"]
)
def test_words_of_1_to_600_bytes(symbols: str):
    """Through each way of merging: in registers, by scanning, with a heap."""
    rng = random.Random(symbols)
    vocabulary = load_vocabulary("openai")
    for size in [*range(1, 140), *range(150, 601, 25)]:
        word = "".join(rng.choice(symbols) for _ in range(size)).encode()[:size]
        text = word.decode("utf-8", "ignore")
        if not text.isalpha():  # signs and letters would be two words
            continue
        spelled = [BYTE_TO_SYMBOL[byte] for byte in text.encode()]
        spelled[-1] += WORD_END
        ids = [vocabulary.ids[token] for token in merge(spelled, vocabulary.ranks)]
        assert NATIVE["openai"].encode(text) == ids, text


def test_words_met_again():
    """What the caches of words give back: short, long, of many tokens, in sets that overflow."""
    rng = random.Random(5)
    letters = "abcdefghijklmnopqrstuvwxyzéжक猫"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 30))) for _ in range(3000)]
    texts = [" ".join(rng.choices(words, k=12)) for _ in range(4000)]
    assert wrong_ones(texts) == []


@pytest.mark.parametrize("length", [73, 74, 75, 76, 77, 78])
def test_texts_of_about_one_row(length: int):
    texts = ["a " * length, "猫" * (length // 2) + "!a" * (length - length // 2), "1" * length]
    texts += ["zxq" * length, "é" * length, "a<|endoftext|>" * (length // 2)]
    native, python = Tokenizer(backend="native"), Tokenizer(backend="python")
    assert torch.equal(native(texts), python(texts))
    native.truncate = python.truncate = False

    def row_or_error(tokenizer: Tokenizer, text: str) -> str:
        try:
            return str(tokenizer(text).tolist())
        except ValueError as error:
            return str(error)

    for text in texts:
        assert row_or_error(native, text) == row_or_error(python, text)


def test_context_lengths_from_3_to_300():
    texts = ["", "a", "a photo of a cat", "one 2 three " * 20, "x " * 298, "x " * 299, "é" * 400]
    for context_length in [*range(3, 20), 76, 77, 78, 248, 299, 300]:
        native = Tokenizer(context_length, backend="native").encode_batch(texts)
        python = Tokenizer(context_length, backend="python").encode_batch(texts)
        assert torch.equal(native[0], python[0])
        assert torch.equal(native[1], python[1])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "unit", ["a", "é", "猫", "thequick", "'", "&", "Σ", "\u0301", "Ã ", "1", "<"]
)
def test_a_megabyte_without_an_end(unit: str):
    """Nothing that a text may hold takes quadratic time; the Python tokenizer would, for some."""
    text = unit * (1_000_000 // len(unit.encode()))
    rows, lengths = Tokenizer(backend="native").encode_batch([text, text[: len(text) // 2]])
    assert rows[0, 0] == SOT
    assert lengths.tolist() == [77, 77] or unit in "\u0301'<&"
    if unit in ("a", "thequick"):
        ids = NATIVE["openai"].encode(text)
        assert load_vocabulary("openai").decode(ids) == text + " "
