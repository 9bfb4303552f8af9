"""Matching queries: both backends against the definition, on texts made to break them."""

from __future__ import annotations

import itertools
import logging
import random
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastclip.data import phrases
from fastclip.data.phrases import Phrases, can_occur, spacing, words

BACKENDS = [
    pytest.param(
        "native",
        marks=pytest.mark.skipif(phrases._native is None, reason="the native part was not built"),
    ),
    "python",
]
# Sixteen bytes are the longest word that the native table holds inside.
PIECES = [
    *("a", "b", "ab", "aa", " ", " ", " ", "  ", ",", ".", ";", ":", "?", "!", "`", "\t", "\n"),
    *("\r", "'", "-", "é", "ж", "漢", "😀", "\0", "a\0", "\u00a0", "\x85", "\u2028", "\udc80"),
    *("fifteen bytes,.", "sixteencharacter", "sixteencharacteR", "seventeencharacte"),
    *("seventeencharactE", "ж" * 8, "ж" * 9, "x" * 40, "x" * 39 + "y"),
]


def by_definition(queries: list[str], text: str) -> list[int]:
    """MetaCLIP's loop, in other words."""
    spaced = re.sub("[\t\n\r]", " ", re.sub("([,.;:?!`])", r" \1 ", f" {text} "))
    return [number for number, query in enumerate(queries) if f" {query} " in spaced]


def found(matcher: Phrases, texts: list[str]) -> list[list[int]]:
    offsets, ids = matcher.match(texts)
    assert offsets.dtype == np.int64
    assert ids.dtype == np.int32
    assert offsets[0] == 0
    assert offsets[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets.tolist())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_texts_are_matched_as_defined(backend) -> None:
    rng = random.Random(7)

    def make(most: int, pieces: list[str]) -> str:
        return "".join(rng.choice(pieces) for _ in range(rng.randint(0, most)))

    total = 0
    for _ in range(250):
        pieces = rng.sample(PIECES, rng.choice((2, 4, 8, 30))) + [" "] * rng.randint(0, 4)
        queries = list(dict.fromkeys(make(6, pieces) for _ in range(rng.randint(0, 60))))
        texts = [make(rng.choice((4, 14, 40)), pieces) for _ in range(40)]
        rows = found(Phrases(queries, backend=backend), texts)
        assert rows == [by_definition(queries, text) for text in texts]
        total += sum(map(len, rows))
    assert total > 20_000  # it was not all misses


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_blanks_and_punctuation_do(backend) -> None:
    queries = ["a b", "a  b", " a", "a ", "", ",", "Mr. Smith", "Mr . Smith", "a , b", "A", "a"]
    matcher = Phrases(queries, backend=backend)

    def names(text: str) -> list[str]:
        return [queries[number] for number in found(matcher, [text])[0]]

    assert names("a b") == ["a b", "a"]
    assert names("a\tb\n") == ["a b", "", "a"]
    assert names("a  b") == ["a  b", "a ", "", "a"]
    assert names(" a") == [" a", "", "a"]
    assert names("a,b") == [",", "a , b", "a"]
    assert names("a, b") == ["", ",", "a"]  # MetaCLIP leaves two blanks there
    assert names("a ,b") == ["a ", "", ",", "a"]
    assert names("Mr. Smith") == [""]
    assert names("Mr.Smith") == ["Mr . Smith"]
    assert names("A\u00a0b") == []
    assert names("") == [""]


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_overlap_and_count_once(backend) -> None:
    queries = ["red fox", "red", "fox red fox", "fox", "red fox red fox red", "fox jumps"]
    matcher = Phrases(queries, backend=backend)
    assert found(matcher, ["red fox red fox", "a fox jumps", "redfox"]) == [
        [0, 1, 2, 3],
        [3, 5],
        [],
    ]
    assert found(matcher, ["red fox " * 500]) == [[0, 1, 2, 3, 4]]
    assert found(matcher, []) == []
    assert found(Phrases([], backend=backend), ["red", ""]) == [[], []]
    assert len(matcher) == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_queries_and_long_texts(backend) -> None:
    """Tables large enough that slots collide and wrap around, texts longer than a block."""
    rng = random.Random(3)
    vocabulary = [f"w{n}" if n % 3 else f"a-long-word-number-{n}" for n in range(3000)]
    queries = list(
        dict.fromkeys(" ".join(rng.choices(vocabulary, k=rng.randint(1, 4))) for _ in range(20_000))
    )
    texts = [" ".join(rng.choices(queries, k=n)) for n in (1, 3, 40, 900)]
    place = {query: number for number, query in enumerate(queries)}
    rows = found(Phrases(queries, backend=backend), texts)
    for text, row in zip(texts, rows, strict=True):
        parts = text.split(" ")
        spans = {" ".join(parts[i : i + n]) for i in range(len(parts)) for n in (1, 2, 3, 4)}
        assert row == sorted(place[span] for span in spans if span in place)


@pytest.mark.skipif(phrases._native is None, reason="the native part was not built")
def test_threads_share_one_table() -> None:
    rng = random.Random(5)
    queries = list(dict.fromkeys(f"{rng.randint(0, 99)} {rng.randint(0, 99)}" for _ in range(3000)))
    texts = [" ".join(str(rng.randint(0, 99)) for _ in range(12)) for _ in range(3000)]
    matcher = Phrases(queries, backend="native")
    expected = found(matcher, texts)
    assert any(expected)
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: found(matcher, texts), range(16)):
            assert rows == expected


def test_spacing_is_metaclips() -> None:
    assert spacing("a,b.c;d:e?f!g`h") == " a , b . c ; d : e ? f ! g ` h "
    assert spacing("a\tb\nc\rd") == " a b c d "
    assert spacing('it\'s (a) "b" – c/d') == ' it\'s (a) "b" – c/d '
    assert words("a, b") == ["a", ",", "", "b"]
    assert words("") == [""]


def test_which_queries_can_occur() -> None:
    pieces = ["a", " ", ",", "."]
    texts = ["".join(t) for n in range(7) for t in itertools.product(pieces, repeat=n)]
    spaced = "|".join(map(spacing, texts))
    queries = ["".join(t) for n in range(5) for t in itertools.product(pieces, repeat=n)]
    for query in queries:
        assert can_occur(query) == (f" {query} " in spaced), repr(query)
    assert not can_occur("a\tb")


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="queries 1 and 3 are both 'b'"):
        Phrases(["a", "b", "c", "b"])
    with pytest.raises(TypeError, match=r"queries\[1\] is int"):
        Phrases(["a", 1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="not one str"):
        Phrases("abc")
    with pytest.raises(ValueError, match="'cuda'"):
        Phrases(["a"], backend="cuda")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_are_str(backend) -> None:
    matcher = Phrases(["a"], backend=backend)
    with pytest.raises(TypeError, match=r"texts\[1\] is bytes, not str"):
        matcher.match(["a", b"a"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="not one str"):
        matcher.match("a")


def test_without_the_native_part_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(phrases, "_native", None)
    phrases._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastclip"):
        matchers = [Phrases(["a"]) for _ in range(3)]
    assert {matcher.backend for matcher in matchers} == {"python"}
    assert [record.getMessage() for record in caplog.records].count(caplog.messages[0]) == 1
    assert "C++17 compiler" in caplog.text
    with pytest.raises(ImportError, match="was not built"):
        Phrases(["a"], backend="native")
