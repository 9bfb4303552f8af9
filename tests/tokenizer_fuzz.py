"""Texts put together at random from pieces that cleaning and splitting treat specially."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator

# Pieces that each wake one of the rules, or one of the exceptions, of some stage.
FRAGMENTS = [
    "a", "B", "cat", "Photo", "THE", "jekyll", "zxq", "é", "É", "ß", "ẞ", "İ", "ı", "ſ", "\u212a",
    "Σ", "ΑΣ", "ς", "ΌΣΟΣ", "Ж", "привет", "ש", "م", "न", "स्ते", "ไทย", "น้ำ", "한국", "ᄒ",
    "ᅡ", "猫", "日本", "カ", "ｶﾞ", "Ａ", "！", "\u3000", "😀", "❤️", "👨\u200d👩", "🇫🇷",
    "👍🏽", "1️⃣", " ", "  ", "\n", "\r", "\r\n", "\t", "\x0b", "\x0c", "\x1c", "\x85",
    "\xa0", "\u2028", "\u200b", "\x00", "\x07", "\x1b[1m", "\x7f", "\xad", "\ufeff", "\u2060",
    "\ufffc", "\ud800", "\udc00", "\u0301", "\u0308", "\u0345", "\u0307", "\u0323", "\u20dd",
    "\ufe0f", "\u200d", "\u034f", "'", "''", "'s", "'t", "'re", "'VE", "'m", "'ll", "'d",
    "’s", "ʼt", "'ſ", "n't", '"', "“", "”", "0", "1", "42", "½", "²", "Ⅷ", "٣", "१", "①", "𝟙",
    "３", "3.5", "1,000", "!", "?", ".", ",", "...", "…", "-", "–", "—", "_", "/", "\\", "@",
    "#", "$", "€", "®", "°", "&", ";", "#", "&amp;", "&amp;amp;", "&lt;", "&LT;", "&copy",
    "&copy;", "&eacute;", "&EACUTE;", "&#39;", "&#x27", "&#233;", "&#128;", "&#x1c;",
    "&#xD800;", "&#769", "&#931;", "&notit;", "&nbsp;", "<", ">", "<b>", "</b>", "<br/>",
    "</w>", "&quot", "&hellip;", "&#65314;", "&#0;", "&#x110000;", "<|startoftext|>",
    "<|endoftext|>", "<start_of_text>", "<end_of_text>", "<|", "|>", "<END_OF_TEXT>", "Ã©",
    "â€™", "â€œ", "Â©", "Ã", "Ã ", "\xa0", "ðŸ˜€", "Ð¿Ñ€", "ÃƒÂ©", "\x92", "\ufffd", "à",
    "ã\x81", "ﬁ", "ﬆ", "ĳ", "™", "№", "㊗", "\u212b", "\u2126", "e\u0301", "\u1e9b\u0323", "\uf900",
    "\U0001d15e",
]  # fmt: skip


def fuzz(count: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        pieces = [rng.choice(FRAGMENTS) for _ in range(rng.randint(1, 12))]
        yield rng.choice(["", "", " "]).join(pieces)


def compare(count: int, seed: int) -> list[str]:
    """The texts, of `count`, for which the native tokenizer gives other ids than the Python one."""
    from fastclip.tokenizer.backends import NativeBackend
    from fastclip.tokenizer.reference import ReferenceTokenizer
    from fastclip.tokenizer.vocabulary import CleanMode, Dialect

    dialects: tuple[Dialect, ...] = ("openai", "open_clip")
    modes: tuple[CleanMode, ...] = ("lower", "lower", "lower", "whitespace", "canonicalize")
    pairs = [
        (NativeBackend(dialect, mode), ReferenceTokenizer(dialect, mode))
        for dialect in dialects
        for mode in modes
    ]
    wrong = []
    for number, text in enumerate(fuzz(count, seed)):
        native, python = pairs[number % len(pairs)]
        if native.encode(text) != python.encode(text):
            wrong.append(f"{native.settings}: {text!a}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, help="default: another one each time")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    wrong = compare(arguments.texts, seed)
    print(f"seed {seed}: {arguments.texts} texts, {len(wrong)} with other ids")
    for line in wrong[:50]:
        print(line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
