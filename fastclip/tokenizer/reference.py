"""OpenAI's CLIP tokenizer, stage by stage: the readable meaning that every faster one must match.

    text  --clean-->  lower-case text  --pre_tokenize-->  words  --bpe-->  ids

The ids are those of OpenAI's ``SimpleTokenizer`` and of open_clip's for every input, odd ones
included; where a line looks strange, that is why. Importing this module needs ftfy and regex.
"""

from __future__ import annotations

import heapq
import html
import re
from collections.abc import Iterable

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
    SYMBOL_TO_BYTE,
    VOCAB_SIZE,
    WORD_END,
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


def clean(text: str) -> str:
    """Repair mojibake and entities, collapse whitespace, lower the case.

    Lower-casing comes last and sees the whole text, because a capital sigma becomes ς or σ by its
    neighbours. Entities are resolved by ftfy, strictly and only as long as it has met no ``<``,
    then twice by html.unescape, which also knows ``&copy`` without its semicolon.
    """
    if not _NOTHING_TO_REPAIR.fullmatch(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


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

    def __init__(self, dialect: Dialect) -> None:
        self._vocabulary = load_vocabulary(dialect)
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
        for word in self.pre_tokenize(clean(text)):
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

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids spell, a blank after each word, special tokens included.

        Bytes that are no UTF-8 become U+FFFD, as when a character was cut in two. Raises ValueError
        for an id outside 0..49407.
        """
        spellings: list[str] = []
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise ValueError(f"token id {token} is outside 0..{VOCAB_SIZE - 1}")
            spellings.append(self._vocabulary.tokens[token])
        # The end-of-word marks are ASCII and pass through the byte alphabet unchanged.
        spelled = bytes("".join(spellings).translate(SYMBOL_TO_BYTE), "latin-1")
        return spelled.decode("utf-8", errors="replace").replace(WORD_END, " ")
