"""OpenAI's CLIP tokenizer, stage by stage: the readable meaning that every faster one must match.

    text  --clean-->  lower-case text  --pre_tokenize-->  words  --bpe-->  ids

The ids are those of OpenAI's ``SimpleTokenizer`` and of open_clip's for every input, odd ones
included; where a line looks strange, that is why. Importing this module needs ftfy and regex.
"""

from __future__ import annotations

import heapq
import html
import re
import string

try:
    import ftfy
    import regex
except ImportError as error:
    raise ImportError(
        f"the tokenizer cleans captions with ftfy and splits them with regex, and {error.name} is "
        'not installed; run: pip install "fastclip-torch[train]"'
    ) from error

from fastclip.tokenizer.vocabulary import (
    BYTE_TO_SYMBOL,
    WORD_END,
    CleanMode,
    Dialect,
    load_vocabulary,
)

# Words whose ids are remembered. A caption set's vocabulary is Zipfian: 7,000 words cover 99 % of
# COCO's, 23,000 of a web scrape's. Longer words do not come back, and could fill the memory.
CACHED_WORDS = 1 << 16
CACHED_WORD_LENGTH = 48

# ASCII without "&" (no entity) and without control characters (which ftfy deletes) has nothing
# that ftfy or html.unescape could change.
_NOTHING_TO_REPAIR = re.compile(r"[\t\n\f\r -%'-~]*")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def clean(text: str, mode: CleanMode = "lower") -> str:
    """Repair mojibake and entities, collapse whitespace, lower the case.

    Lower-casing comes last and sees the whole text, because a capital sigma becomes ς or σ by its
    neighbours. Entities are resolved by ftfy, strictly and only as long as it has met no ``<``,
    then twice by html.unescape, which also knows ``&copy`` without its semicolon.

    "whitespace" leaves the case alone. "canonicalize" turns underscores into blanks and deletes the
    rest of ASCII's punctuation before it lowers the case, as big_vision does.
    """
    if not _NOTHING_TO_REPAIR.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    if mode == "canonicalize":
        text = text.replace("_", " ").translate(_WITHOUT_PUNCTUATION)
    text = " ".join(text.split())
    return text if mode == "whitespace" else text.lower()


def merge(symbols: list[str], ranks: dict[str, int]) -> list[str]:
    """Byte-pair encoding of one word: join the adjacent pair of lowest rank until none is known.

    Of equal pairs the leftmost goes first. `symbols` is consumed. The pairs wait in a heap and the
    symbols stand in a linked list, so that a word of n symbols costs O(n log n), whatever it is.
    """
    count = len(symbols)
    following = list(range(1, count + 1))
    preceding = list(range(-1, count - 1))

    def rank_at(left: int) -> int | None:
        """Rank of the pair that now begins at `left`; a symbol swallowed by its neighbour is ''."""
        right = following[left]
        return ranks.get(f"{symbols[left]} {symbols[right]}") if right < count else None

    heap = [(rank, left) for left in range(count) if (rank := rank_at(left)) is not None]
    heapq.heapify(heap)
    while heap:
        rank, left = heapq.heappop(heap)
        if rank_at(left) != rank:
            continue  # one of the two has been merged with something else meanwhile
        right = following[left]
        symbols[left] += symbols[right]
        symbols[right] = ""
        following[left] = following[right]
        if following[left] < count:
            preceding[following[left]] = left
        for changed in (preceding[left], left):
            if changed >= 0 and (rank := rank_at(changed)) is not None:
                heapq.heappush(heap, (rank, changed))
    return [symbol for symbol in symbols if symbol]


class ReferenceTokenizer:
    """Text to ids and back, without the ends of a caption and without padding.

    Safe to share between threads: the tables are only read, and the cache of words is a dict whose
    entries never depend on who wrote them.
    """

    def __init__(self, dialect: Dialect, clean_mode: CleanMode = "lower") -> None:
        self._vocabulary = load_vocabulary(dialect)
        self._clean_mode: CleanMode = clean_mode
        self._special_texts = (self._vocabulary.sot_text, self._vocabulary.eot_text)
        # Spelled as the original is, idle brackets included: how a set ignores case is regex's own.
        self._words = regex.compile(
            "|".join(map(regex.escape, self._special_texts))
            + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE,
        )
        self._cache: dict[str, tuple[int, ...]] = {}

    def pre_tokenize(self, cleaned: str) -> list[str]:
        """Split cleaned text into special tokens, contractions, words, digits and runs of signs.

        The first alternative that fits wins, and only where a match begins: ``'sup`` is ``'s``,
        ``up``, but ``!'s`` is ``!'``, ``s``. Case is ignored even though `clean` has lowered it,
        which still shows in two characters: ``'ſ`` counts as ``'s``, and U+0345 (folded to a letter
        without being one) fits nowhere and is dropped.
        """
        return self._words.findall(cleaned)

    def bpe(self, word: str) -> tuple[int, ...]:
        """The ids of one pre-token; a special token's spelling has an id of its own."""
        if not word:
            return ()
        ids = self._vocabulary.ids
        if word in self._special_texts:
            return (ids[word],)
        symbols = [BYTE_TO_SYMBOL[byte] for byte in word.encode("utf-8")]
        symbols[-1] += WORD_END
        return tuple(ids[token] for token in merge(symbols, self._vocabulary.ranks))

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length, without SOT and EOT unless it spells them out."""
        ids: list[int] = []
        for word in self.pre_tokenize(clean(text, self._clean_mode)):
            known = self._cache.get(word)
            if known is None:
                known = self.bpe(word)
                self._remember(word, known)
            ids += known
        return ids

    def _remember(self, word: str, ids: tuple[int, ...]) -> None:
        if len(word) > CACHED_WORD_LENGTH:
            return
        if len(self._cache) >= CACHED_WORDS:
            self._cache.clear()  # the frequent words are back within a few captions
        self._cache[word] = ids
