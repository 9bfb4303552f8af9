"""CLIP's 49,408 tokens: two byte alphabets, 48,894 merges, and the two ends of a caption.

Ids 0-255 are the bytes, 256-511 the same bytes at the end of a word, 512 + r is the result of
merge r, then come SOT (49406) and EOT (49407). Tokens are spelled as in OpenAI's vocabulary file:
every byte has one printable character, and ``</w>`` marks the end of a word.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

Dialect = Literal["openai", "open_clip"]
CleanMode = Literal["lower", "whitespace", "canonicalize"]

MERGES_PATH = Path(__file__).with_name("bpe_merges.txt")
WORD_END = "</w>"
VOCAB_SIZE = 49_408
SOT = 49_406
EOT = 49_407

# The two trainers spell the ends of a caption differently; the ids are the same. In one dialect,
# the other's spelling is ordinary text.
SPECIAL_TOKENS: dict[Dialect, tuple[str, str]] = {
    "openai": ("<|startoftext|>", "<|endoftext|>"),
    "open_clip": ("<start_of_text>", "<end_of_text>"),
}


def _byte_symbols() -> tuple[dict[int, str], list[int]]:
    """The character that spells each byte, and the bytes in the order of their ids."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return symbols, printable + others


BYTE_TO_SYMBOL, BYTES_BY_ID = _byte_symbols()
SYMBOL_TO_BYTE = {ord(symbol): byte for byte, symbol in BYTE_TO_SYMBOL.items()}


@dataclass(frozen=True)
class Vocabulary:
    """The tables one dialect of the tokenizer reads. Shared between tokenizers, never written."""

    tokens: tuple[str, ...]  # spelling by id, 49,408 of them
    ids: dict[str, int]  # id by spelling
    ranks: dict[str, int]  # priority of the merge "left right"; the lowest is done first
    sot_text: str  # how this dialect spells SOT (id 49406)
    eot_text: str  # and EOT (id 49407)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids spell, a blank after each word, special tokens included.

        Bytes that are no UTF-8 become U+FFFD, as when a character was cut in two. Raises ValueError
        for an id outside 0..49407.
        """
        spellings: list[str] = []
        for token in ids:
            if not 0 <= token < VOCAB_SIZE:
                raise ValueError(f"token id {token} is outside 0..{VOCAB_SIZE - 1}")
            spellings.append(self.tokens[token])
        # The end-of-word marks are ASCII and pass through the byte alphabet unchanged.
        spelled = bytes("".join(spellings).translate(SYMBOL_TO_BYTE), "latin-1")
        return spelled.decode("utf-8", errors="replace").replace(WORD_END, " ")


def check_dialect(dialect: str) -> None:
    """Raises ValueError for an unknown dialect."""
    if dialect not in SPECIAL_TOKENS:
        known = ", ".join(map(repr, SPECIAL_TOKENS))
        raise ValueError(f"unknown tokenizer dialect {dialect!r}; it is one of {known}")


def check_truncate(truncate: object) -> None:
    """Raises ValueError for what is neither True nor False, such as the text "no"."""
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate is True or False, not {truncate!r}")


@lru_cache
def load_vocabulary(dialect: Dialect) -> Vocabulary:
    """Read the tables of one dialect (about 30 ms at the first call, then shared).

    Raises ValueError for an unknown dialect.
    """
    check_dialect(dialect)
    merges = MERGES_PATH.read_bytes().decode("utf-8").removesuffix("\n")
    lines = merges.split("\n")
    symbols = [BYTE_TO_SYMBOL[byte] for byte in BYTES_BY_ID]
    tokens = (
        *symbols,
        *(symbol + WORD_END for symbol in symbols),
        *merges.replace(" ", "").split("\n"),
        *SPECIAL_TOKENS[dialect],
    )
    return Vocabulary(
        tokens=tokens,
        ids={token: place for place, token in enumerate(tokens)},
        ranks={line: rank for rank, line in enumerate(lines)},
        sot_text=tokens[SOT],
        eot_text=tokens[EOT],
    )
