"""Lists of queries: each source as MetaCLIP reads it, their order, and what is refused."""

from __future__ import annotations

import gzip
import json
import logging
import math
from pathlib import Path

import pytest

from fastclip.data.metadata_queries import (
    build_queries,
    frequent_ngrams,
    read_queries,
    viewed_titles,
    wordnet_names,
    write_queries,
)
from shards import COLOURS, SHAPES, write_shards

NUMBERS = [str(number) for number in range(100)]
LICENCE = "  1 This software and database is being provided to you ...\n"


def _wordnet(folder: Path, kind: str) -> Path:
    lines = {
        "data.noun": [
            "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived",
            "00001930 03 n 02 physical_entity 0 thing 1 001 @ 00001740 n 0000 | an entity",
            "00002000 03 n 02 A.D. 0 anno_Domini 0 000 | an era",
            "00002100 03 n 01 .22 0 000 | a calibre",
        ],
        "data.adj": [
            "00003000 00 a 01 galore(ip) 0 000 | in great numbers",
            "00003100 00 a 01 physical_entity 0 000 | there already",
        ],
        "index.noun": [
            "anno_domini n 1 0 1 0 00002000",
            "entity n 1 1 ~ 1 1 00001740",
            "thing n 1 0 1 0 00001930",
        ],
    }
    folder.mkdir(exist_ok=True)
    for name, content in lines.items():
        if name.startswith(kind):
            (folder / name).write_text(LICENCE + "".join(f"{line}  \n" for line in content))
    return folder


def test_names_of_synsets(tmp_path: Path) -> None:
    folder = _wordnet(tmp_path, "")  # data and index: data tells which word a synset is named by
    names = ["entity", "physical entity", "a", "", "galore"]
    assert wordnet_names(folder) == names
    assert wordnet_names(folder / "data.adj") == ["galore", "physical entity"]
    assert build_queries(wordnet=folder) == [*NUMBERS, "entity", "physical entity", "a", "galore"]


def test_words_of_an_index(tmp_path: Path) -> None:
    assert wordnet_names(_wordnet(tmp_path, "index")) == ["anno domini", "entity", "thing"]


def test_what_is_no_wordnet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of data\.noun"):
        wordnet_names(tmp_path)
    (tmp_path / "data.noun").write_text(LICENCE + "word\n")
    with pytest.raises(ValueError, match=r"data\.noun, line 2"):
        wordnet_names(tmp_path)


def test_words_are_those_that_matching_sees() -> None:
    texts = ["a cat, a dog.", 'the "cat" !', "a cat  sat", "- & ..."]
    unigrams, _ = frequent_ngrams(lambda: texts, unigram_count=1)
    assert unigrams == ["a", "cat", '"cat"', "dog", "sat", "the"]
    assert frequent_ngrams(lambda: texts, unigram_count=2)[0] == ["a", "cat"]
    assert frequent_ngrams(lambda: texts, unigram_count=3)[0] == ["a"]


def test_pairs_by_mutual_information() -> None:
    texts = ["new york"] * 4 + ["a new hat", "a hat", "york , a new"] + ["filler"] * 20
    counts = {"new": 6, "york": 5, "a": 3, "hat": 2, "filler": 20}
    total = sum(counts.values())
    pairs = {"new york": 4, "a new": 2, "new hat": 1, "a hat": 1}  # not over the comma

    def information(pair: str) -> float:
        a, b = pair.split()
        return math.log2(pairs[pair] * total / (counts[a] * counts[b]))

    ordered = sorted(pairs, key=information, reverse=True)
    for least in (-9.0, *(information(pair) - 1e-6 for pair in pairs), 9.0):
        kept = [pair for pair in ordered if information(pair) >= least]
        assert frequent_ngrams(lambda: texts, pmi=least)[1] == kept
    assert frequent_ngrams(lambda: texts, pmi=-9, bigram_count=2)[1] == [
        pair for pair in ordered if pairs[pair] >= 2
    ]


def test_pairs_with_a_frequent_word_are_not_counted_in_vain() -> None:
    """The bound that saves counting them: as rare as one another, and at the threshold itself."""
    texts = ["x y", *["z"] * 6]  # log2(1 · 8 / (1 · 1)) = 3
    assert frequent_ngrams(lambda: texts, pmi=3.0)[1] == ["x y"]
    assert frequent_ngrams(lambda: texts, pmi=3.01)[1] == []


def test_titles_by_views(tmp_path: Path) -> None:
    path = tmp_path / "titles.tsv"
    path.write_text("New_York\t69\nRome\t500\nOslo\t70\nNew_York\t1\nBonn\t69\n")
    assert viewed_titles(path) == ["Rome", "New York", "Oslo"]
    assert viewed_titles(path, 100) == ["Rome"]
    path.write_text("Rome\t500\nOslo 70\n")
    with pytest.raises(ValueError, match=r"titles\.tsv, line 2"):
        viewed_titles(path)


def test_sources_fill_the_list_in_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wordnet = _wordnet(tmp_path / "wordnet", "data")
    text = tmp_path / "text.txt"
    text.write_text("entity cat cat\ncat b! 7 7\nb\n")
    titles = tmp_path / "titles.tsv"
    titles.write_text("cat\t900\nA. B.\t80\nRome\t75\n!\t99\n")
    expected = [
        *(*NUMBERS, "entity", "physical entity", "a", "galore"),
        *("cat", "b"),  # 7 and "entity" are there already
        *("cat cat", "entity cat", "7 7", "cat b"),
        *("A. B.", "Rome"),
    ]

    def build(maximum: int) -> list[str]:
        return build_queries(
            wordnet=wordnet,
            corpus=[text],
            titles=titles,
            unigram_count=2,
            pmi=-9,
            maximum=maximum,
        )

    queries = build(1000)
    assert queries[:106] == expected[:106]
    assert sorted(queries[106:110]) == sorted(expected[106:110])
    assert queries[110:] == expected[110:]
    for maximum in (1, 99, 100, 103, 108, 111, 112):
        assert build(maximum) == queries[:maximum]
    with caplog.at_level(logging.INFO, "fastclip"):
        build(111)
    assert "1 of them can never be found" in caplog.text
    assert "1 more were left out" in caplog.text


def test_a_corpus_may_be_packed_or_in_shards(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with gzip.open(tmp_path / "text.gz", "wt") as file:
        file.write("größer\r\ngrößer\n")
    assert build_queries(corpus=[tmp_path / "text.gz"], unigram_count=2)[100:] == ["größer"]
    shards = write_shards(tmp_path)
    by_folder = build_queries(corpus=[shards], unigram_count=8)[100:]
    assert by_folder == ["a", *sorted(SHAPES), *sorted(COLOURS)]  # 48, 12 and 8 times
    assert build_queries(corpus=[f"{shards}/*.tar"], unigram_count=8)[100:] == by_folder
    labels = build_queries(corpus=[shards], unigram_count=8, caption_key="json:label")
    assert labels[100:] == by_folder[1:]
    with caplog.at_level(logging.WARNING, "fastclip"):
        build_queries(corpus=[shards], caption_key="json:absent")
    assert "48 sample(s) give no caption" in caplog.text


def test_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad \xff\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8"):
        build_queries(corpus=[tmp_path / "a.txt"])
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"text " * 9)[:-4])
    with pytest.raises(ValueError, match=r"a\.gz: not a whole gzip file"):
        build_queries(corpus=[tmp_path / "a.gz"])
    with pytest.raises(FileNotFoundError):
        build_queries(corpus=[tmp_path / "absent.txt"])
    with pytest.raises(ValueError, match="name one of them"):
        build_queries()
    with pytest.raises(ValueError, match="not 0"):
        build_queries(corpus=[tmp_path / "a.txt"], maximum=0)


def test_queries_come_back_from_a_file(tmp_path: Path) -> None:
    queries = ["a", " b ", "größe", "c\u2028d", "e\x85", "0"]
    write_queries(tmp_path / "queries.txt", queries)
    assert read_queries(tmp_path / "queries.txt") == queries
    assert [path.name for path in tmp_path.iterdir()] == ["queries.txt"]
    (tmp_path / "queries.json").write_text(json.dumps(queries))
    assert read_queries(tmp_path / "queries.json") == queries


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", "a\n\nb\n", r"q\.txt: query 2 is empty"),
        ("q.txt", "a\nb\na\n", "queries 1 and 3 are both 'a'"),
        ("q.txt", "a\tb\n", "query 1 has a tab"),
        ("q.txt", "", "there are no queries"),
        ("q.json", "[1]", "not a JSON list of strings"),
        ("q.json", "[", "not JSON"),
        ("q.json", '["a", "b\\nc"]', "query 2 has a tab or a line end"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / name)
