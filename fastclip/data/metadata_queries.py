"""The queries that data is balanced by, from WordNet and text, as MetaCLIP makes its metadata.

In this order, up to a maximum: "0" to "99", the names of WordNet's synsets, frequent words, pairs
of words that occur together more often than chance has it, titles that are looked at. Within each,
the order is fixed, so that equal sources give equal lists.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fastclip.data.decode import BadSampleError
from fastclip.data.index import index_shards
from fastclip.data.phrases import can_occur, words
from fastclip.data.reader import check_caption_key, read_captions

logger = logging.getLogger("fastclip")

MAXIMUM = 500_000
UNIGRAM_COUNT = 100
PMI = 30.0
VIEWS = 70

_PARTS = ("noun", "verb", "adj", "adv")
_DROPPED = ("", *string.punctuation)


def build_queries(
    *,
    wordnet: Path | None = None,
    corpus: Sequence[str | Path] = (),
    titles: Path | None = None,
    maximum: int = MAXIMUM,
    unigram_count: int = UNIGRAM_COUNT,
    pmi: float = PMI,
    bigram_count: int = 1,
    views: int = VIEWS,
    caption_key: str = "txt",
) -> list[str]:
    """Make a list of queries. Empty ones and single punctuation are dropped, and all but the first
    of equal ones.

    Args:
        wordnet: a folder or file, see `wordnet_names`.
        corpus: text files (UTF-8, or .gz of it), and shards (`x.tar` or a pattern of such, a
            folder), of which the captions are read. All of it is read twice.
        titles: a file of lines "title<tab>views" in UTF-8; views of equal titles are added up.
        maximum: length of the list.
        unigram_count: how often a word has to occur in the corpus, at least.
        pmi: how many bits of pointwise mutual information a pair of words has at least, see
            `frequent_ngrams`. 30 can be reached in corpora of a billion words or more alone.
        bigram_count: how often it has to occur, at least.
        views: how many a title has, at least.
        caption_key: of the shards' captions, as in `DataConfig`.

    Raises:
        ValueError: a file is not what it should be (it is named, with the line), or there is no
            source.
        FileNotFoundError: one is not there.
    """
    if wordnet is None and titles is None and not corpus:
        raise ValueError("queries are made from WordNet, a corpus or titles: name one of them")
    if not math.isfinite(pmi) or abs(pmi) > 1000:
        raise ValueError(f"pmi is a number of bits, not {pmi}")
    check_caption_key(caption_key, "caption_key")
    if maximum < 1:
        raise ValueError(f"maximum is a positive number of queries, not {maximum}")
    queries = dict.fromkeys(map(str, range(100)))
    sources: list[tuple[str, Callable[[], Iterable[str]]]] = []
    if wordnet is not None:
        sources.append(("WordNet", lambda: wordnet_names(wordnet)))
    if corpus:
        unigrams, bigrams = frequent_ngrams(
            lambda: corpus_texts(corpus, caption_key),
            unigram_count=unigram_count,
            pmi=pmi,
            bigram_count=bigram_count,
        )
        sources += [("words", lambda: unigrams), ("pairs of words", lambda: bigrams)]
    if titles is not None:
        sources.append(("titles", lambda: viewed_titles(titles, views)))
    for name, read in sources:
        before = len(queries)
        queries.update(dict.fromkeys(query for query in read() if query not in _DROPPED))
        logger.info("queries from %s: %d", name, min(len(queries), maximum) - min(before, maximum))
        if len(queries) > maximum:
            logger.info("the list is full: %d more were left out", len(queries) - maximum)
            break
    chosen = list(queries)[:maximum]
    never = sum(not can_occur(query) for query in chosen)
    if never:
        logger.info("%d of them can never be found: their punctuation touches a word", never)
    return chosen


def wordnet_names(path: Path) -> list[str]:
    """Names of WordNet's synsets: the first word of each, up to the first full stop, _ as blank.

    Args:
        path: WordNet's folder, or one of its files. A synset's words are in data.noun and so on;
            without those, every word of index.noun and so on is taken.

    Raises:
        FileNotFoundError: there is no such file in it.
        ValueError: a line is not of WordNet's form.
    """
    if path.is_dir():
        named = [[path / f"{kind}.{part}" for part in _PARTS] for kind in ("data", "index")]
        found = [[file for file in files if file.is_file()] for files in named]
        files = found[0] or found[1]
        if not files:
            raise FileNotFoundError(f"{path} holds none of data.noun, index.noun and the like")
    else:
        files = [path]
    names: dict[str, None] = {}
    for file in files:
        word = 4 if file.name.startswith("data.") else 0
        for number, line in enumerate(_lines(file), 1):
            if line.startswith("  ") or not line.strip():  # the licence
                continue
            fields = line.split(" ")
            if len(fields) <= word + 1 or (word and not fields[0].isdigit()):
                raise ValueError(f"{file}, line {number}: not a line of WordNet's data or index")
            # "(a)" behind an adjective says where it may stand.
            name = fields[word].lower().partition("(")[0]
            names[name.partition(".")[0].replace("_", " ")] = None
    return list(names)


def frequent_ngrams(
    read: Callable[[], Iterable[str]],
    *,
    unigram_count: int = UNIGRAM_COUNT,
    pmi: float = PMI,
    bigram_count: int = 1,
) -> tuple[list[str], list[str]]:
    """Words that occur often, and pairs of words that occur together.

    Words are those that queries are matched with, except empty ones and those that are all ASCII
    punctuation; pairs do not reach over these. The pointwise mutual information of a pair is
    log2(count(a b) · N / (count(a) · count(b))), N being the number of words in the corpus.

    Args:
        read: gives the corpus's texts; called twice.
        unigram_count, pmi, bigram_count: what a word or pair has at least.

    Returns:
        Words by falling count, pairs by falling mutual information; equal ones in the order of
        their letters.
    """
    unigrams: Counter[str] = Counter()
    for text in read():
        unigrams.update(word for word in words(text) if not _is_punctuation(word))
    total = sum(unigrams.values())
    # A pair is no more frequent than the rarer of its words, so its information is at most
    # log2(N / count of the other): pairs with a word above this count need not be counted.
    most = total / 2.0**pmi
    bigrams: Counter[tuple[str, str]] = Counter()
    for text in read():
        last = ""
        for word in words(text):
            rare = not _is_punctuation(word) and unigrams[word] <= most * (1 + 1e-9)
            if rare and last:
                bigrams[last, word] += 1
            last = word if rare else ""
    scores = {}
    for (a, b), count in bigrams.items():
        information = math.log2(count * total) - math.log2(unigrams[a] * unigrams[b])
        if count >= bigram_count and information >= pmi:
            scores[f"{a} {b}"] = information
    return (
        sorted((w for w, n in unigrams.items() if n >= unigram_count), key=_falling(unigrams)),
        sorted(scores, key=_falling(scores)),
    )


def viewed_titles(path: Path, views: int = VIEWS) -> list[str]:
    """Titles of a file of "title<tab>views" with at least so many views, most viewed first."""
    counts: Counter[str] = Counter()
    for number, line in enumerate(_lines(path), 1):
        title, tab, count = line.rpartition("\t")
        if not tab or not count.isdecimal():
            raise ValueError(f"{path}, line {number}: not title<tab>views: {line[:80]!r}")
        counts[title.replace("_", " ").strip()] += int(count)
    return sorted((t for t, n in counts.items() if n >= views), key=_falling(counts))


def corpus_texts(corpus: Sequence[str | Path], caption_key: str = "txt") -> Iterator[str]:
    """The lines of text files and the captions of shards. Samples without one are counted."""
    for source in corpus:
        name = str(source)
        if not name.endswith(".tar") and not Path(name).is_dir():
            yield from _lines(Path(name))
            continue
        index = index_shards(name, needs=("txt",) if caption_key == "txt" else ("json",))
        left_out = len(index.problems)
        for number in range(len(index)):
            try:
                yield from read_captions(index[number], caption_key)
            except BadSampleError:
                left_out += 1
        if left_out:
            logger.warning("%s: %d sample(s) give no caption", name, left_out)


def write_queries(path: Path, queries: Sequence[str]) -> None:
    """Write queries in UTF-8, one a line. Raises ValueError as `check_queries`."""
    check_queries(queries)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes("".join(f"{query}\n" for query in queries).encode())
    partial.replace(path)


def read_queries(path: Path) -> list[str]:
    """Read queries: one a line, or a JSON list (`.json`), as MetaCLIP publishes its metadata.

    Blanks at the ends of a line are part of the query.

    Raises:
        ValueError: it is not that, or not UTF-8, a query is empty, or occurs twice.
    """
    if path.suffix == ".json":
        try:
            queries = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(queries, list) or not all(isinstance(q, str) for q in queries):
            raise ValueError(f"{path} is not a JSON list of strings")
    else:
        queries = list(_lines(path))
    try:
        check_queries(queries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return queries


def check_queries(queries: Sequence[str]) -> None:
    """Raise ValueError unless each is one line that is not empty, and none occurs twice."""
    if not queries:
        raise ValueError("there are no queries")
    first: dict[str, int] = {}
    for number, query in enumerate(queries, 1):
        if not query:
            raise ValueError(f"query {number} is empty: delete the line")
        if "\t" in query or "\n" in query or "\r" in query:
            raise ValueError(f"query {number} has a tab or a line end in it: {query!r}")
        if first.setdefault(query, number) != number:
            raise ValueError(f"queries {first[query]} and {number} are both {query!r}: delete one")


def _falling(values: dict[str, int] | dict[str, float]) -> Callable[[str], tuple[float, str]]:
    return lambda name: (-values[name], name)


def _is_punctuation(word: str) -> bool:
    return not word.strip(string.punctuation)


def _lines(path: Path) -> Iterator[str]:
    """A file's lines without their ends, "\\n" or "\\r\\n"."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not UTF-8: {error}") from None
                yield text.removesuffix("\n").removesuffix("\r")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: not a whole gzip file: {error}") from None
