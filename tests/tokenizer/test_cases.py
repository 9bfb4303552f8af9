"""The table of tricky texts: what the original Python tokenizers make of each, stage by stage."""

from __future__ import annotations

import unicodedata
from collections import Counter
from importlib.metadata import version
from typing import Any

import pytest
import torch

from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.reference import ReferenceTokenizer, clean
from fastclip.tokenizer.vocabulary import Dialect

DIALECTS: tuple[Dialect, ...] = ("openai", "open_clip")


@pytest.fixture(scope="module")
def cases(case_table: Any) -> list[Any]:
    return [case for case in case_table.cases if case.category != "version"]


def expected(case: Any, field: str, dialect: Dialect) -> list[int]:
    """`field` as this dialect has it; open_clip's is recorded only where it is another."""
    if dialect == "open_clip":
        return case.expected.get(f"open_clip_{field}", case.expected[field])
    return case.expected[field]


def test_the_table_covers_every_category(case_table: Any):
    counts = Counter(case.category for case in case_table.cases)
    assert counts.total() >= 400
    assert set(counts) == {
        *("basic", "apostrophe", "number", "case", "space", "html", "mojibake", "ftfy", "nfc"),
        *("script", "emoji", "special", "punct", "long", "edge", "version"),
    }
    assert min(counts.values()) >= 10
    # Lone surrogates have survived the JSON, two in a row included.
    assert "\ud83d\ude00" in {case.text for case in case_table.cases}


def test_clean(cases: list[Any]):
    wrong = [c.text for c in cases if clean(c.text) != c.expected["clean"]]
    assert not wrong


def test_pre_tokenize(cases: list[Any]):
    tokenizer = ReferenceTokenizer("openai")
    wrong = [
        c.text for c in cases if tokenizer.pre_tokenize(c.expected["clean"]) != c.expected["words"]
    ]
    assert not wrong


def test_bpe(cases: list[Any]):
    tokenizer = ReferenceTokenizer("openai")
    wrong = [
        c.text
        for c in cases
        if [i for word in c.expected["words"] for i in tokenizer.bpe(word)] != c.expected["ids"]
    ]
    assert not wrong


@pytest.mark.parametrize("dialect", DIALECTS)
def test_encode(cases: list[Any], dialect: Dialect):
    tokenizer = Tokenizer(dialect=dialect)
    wrong = [c.text for c in cases if tokenizer.encode(c.text) != expected(c, "ids", dialect)]
    assert not wrong


@pytest.mark.parametrize("dialect", DIALECTS)
def test_rows(cases: list[Any], dialect: Dialect):
    rows = [expected(case, "row", dialect) for case in cases]
    tokenizer = Tokenizer(dialect=dialect)
    texts = [case.text for case in cases]
    padded = torch.tensor([row + [0] * (77 - len(row)) for row in rows])
    assert torch.equal(tokenizer(texts), padded)
    ids, lengths = tokenizer.encode_batch(texts)
    assert torch.equal(ids, padded.int())
    assert lengths.tolist() == [len(row) for row in rows]


def test_rows_without_truncation(cases: list[Any]):
    tokenizer = Tokenizer(truncate=False)
    fitting = [case for case in cases if not case.expected["too_long"]]
    too_long = [case for case in cases if case.expected["too_long"]]
    assert len(too_long) >= 10
    cut = Tokenizer()
    texts = [case.text for case in fitting]
    assert torch.equal(tokenizer(texts), cut(texts))
    for case in too_long:
        count = len(case.expected["ids"]) + 2
        with pytest.raises(ValueError, match=rf"^texts\[0\] .* has {count} tokens"):
            tokenizer(case.text)


def test_decode(cases: list[Any]):
    tokenizer = Tokenizer()
    wrong = [c.text for c in cases if tokenizer.decode(c.expected["ids"]) != c.expected["decoded"]]
    assert not wrong


def test_version_dependent_cases(case_table: Any):
    here = {"unicodedata": unicodedata.unidata_version, "regex": version("regex")}
    recorded = {name: case_table.versions[name] for name in here}
    if here != recorded:
        pytest.skip(f"the ids of newer characters were recorded with {recorded}; here is {here}")
    tokenizer = Tokenizer()
    cases = [case for case in case_table.cases if case.category == "version"]
    assert [tokenizer.encode(c.text) for c in cases] == [c.expected["ids"] for c in cases]
