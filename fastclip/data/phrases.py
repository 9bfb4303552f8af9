"""Which of many queries occur in texts, word for word, as MetaCLIP matches its metadata.

A query e occurs in a text t if " e " is a part of `spacing` (t): case counts, and queries may
overlap. Both are thus cut at every single blank, and e occurs where its words, empty ones included,
are consecutive words of t.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

try:
    from fastclip.data import _native
except ImportError:  # it was not built
    _native = None

logger = logging.getLogger("fastclip")

PUNCTUATION = ",.;:?!`"
BLANKS = "\t\n\r"


class PhraseMatches(NamedTuple):
    """The queries that occur in each text of a batch."""

    offsets: NDArray[np.int64]
    """[B + 1]: the queries of text i are ids[offsets[i] : offsets[i + 1]]."""

    ids: NDArray[np.int32]
    """Places in the list of queries; within a text ascending, none twice."""


class Phrases:
    """Finds queries in texts. Any number of threads may share one; the native one frees the GIL.

    Args:
        queries: str, none twice. They are taken as they are: blanks at their ends count, and one
            that `can_occur` denies is never found.
        backend: "native" (C++), "python" (the same, ten times slower or more), or "auto": the
            native one if it was built, otherwise Python's, which is said once.

    Raises:
        ValueError: two queries are equal, or `backend` is another one.
        TypeError: `queries` is a str, or one of them is none.
        ImportError: backend="native", and it was not built.
    """

    def __init__(
        self,
        queries: Sequence[str],
        *,
        backend: Literal["auto", "native", "python"] = "auto",
    ) -> None:
        _check_strings("queries", queries)
        _check_unlike(queries)
        self._table = _choose(backend)(queries)
        self._count = len(queries)

    @property
    def backend(self) -> Literal["native", "python"]:
        """What does the work."""
        return "python" if isinstance(self._table, _PythonTable) else "native"

    def __len__(self) -> int:
        return self._count

    def match(self, texts: Sequence[str]) -> PhraseMatches:
        """The queries that occur in each of B texts. Raises TypeError if one is not a str."""
        if isinstance(texts, str):
            raise TypeError("texts is a sequence of str, not one str")
        return PhraseMatches(*self._table.match(texts))


def spacing(text: str) -> str:
    """The text between two blanks; blanks around , . ; : ? ! `; tabs and line ends as blanks."""
    text = f" {text} "
    for mark in PUNCTUATION:
        if mark in text:
            text = text.replace(mark, f" {mark} ")
    for blank in BLANKS:
        if blank in text:
            text = text.replace(blank, " ")
    return text


def words(text: str) -> list[str]:
    """What `spacing` cuts a text into, at least one word; some may be empty."""
    return spacing(text)[1:-1].split(" ")


def can_occur(query: str) -> bool:
    """Whether there is a text that the query occurs in.

    Not so for "Mr. Smith": a text's full stop stands alone, and "Mr . Smith" finds it.
    """
    first, *others = query.split(" ")
    text, last = first, first
    for word in others:
        # Beside a mark, `spacing` puts the blank.
        text += word if {last, word} & set(PUNCTUATION) else f" {word}"
        last = word
    return f" {query} " in spacing(text)


class _Table(Protocol):
    def match(self, texts: Sequence[str], /) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...


class _PythonTable:
    """All beginnings of the phrases, up to each of their blanks, in one dict."""

    def __init__(self, phrases: Sequence[str]) -> None:
        self._ids: dict[str, int] = {}  # -1: only a beginning
        for phrase in phrases:
            end = phrase.find(" ")
            while end >= 0:
                self._ids.setdefault(phrase[:end], -1)
                end = phrase.find(" ", end + 1)
        self._ids.update({phrase: number for number, phrase in enumerate(phrases)})

    def match(self, texts: Sequence[str], /) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        offsets, ids = [0], []
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{number}] is {type(text).__name__}, not str")
            ids += sorted(self._find(words(text)))
            offsets.append(len(ids))
        return np.array(offsets, np.int64), np.array(ids, np.int32)

    def _find(self, text: list[str]) -> set[int]:
        get = self._ids.get
        found = set()
        for begin, phrase in enumerate(text, 1):
            number = get(phrase)
            while number is not None:
                found.add(number)
                if begin == len(text):
                    break
                phrase = f"{phrase} {text[begin]}"
                begin += 1
                number = get(phrase)
        found.discard(-1)
        return found


def _choose(backend: str) -> Callable[[Sequence[str]], _Table]:
    if backend not in ("auto", "native", "python"):
        raise ValueError(f"backend is 'auto', 'native' or 'python', not {backend!r}")
    if backend == "python":
        return _PythonTable
    if _native is not None:
        return _native.PhraseTable
    if backend == "native":
        raise ImportError(_NOT_BUILT)
    _say_once(f"{_NOT_BUILT}; until then queries are matched in Python, more slowly")
    return _PythonTable


_NOT_BUILT = (
    "the native part of fastclip.data was not built: it needs a C++17 compiler when fastclip is "
    "installed; FASTCLIP_NATIVE=1 pip install --force-reinstall --no-deps fastclip-torch shows "
    "what is missing"
)


@lru_cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _check_strings(name: str, values: Sequence[str]) -> None:
    if isinstance(values, str):
        raise TypeError(f"{name} is a sequence of str, not one str")
    for number, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name}[{number}] is {type(value).__name__}, not str")


def _check_unlike(queries: Sequence[str]) -> None:
    if len(set(queries)) == len(queries):
        return
    first: dict[str, int] = {}
    for number, query in enumerate(queries):
        if query in first:
            raise ValueError(
                f"queries {first[query]} and {number} are both {query!r}: keep one of them"
            )
        first[query] = number
