"""Live comparison with the installed open_clip, on more text than a table can hold."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.reference import ReferenceTokenizer, clean
from fastclip.tokenizer.vocabulary import SOT, WORD_END, load_vocabulary
from tokenizer_fuzz import fuzz


@pytest.fixture(scope="module")
def ours() -> ReferenceTokenizer:
    return ReferenceTokenizer("open_clip")


def compare_stages(texts: Iterable[str], ours: ReferenceTokenizer, peer: Any) -> None:
    """Each stage is fed open_clip's result of the one before, so that a failure names its stage."""
    for text in texts:
        cleaned = peer.clean_fn(text)
        assert clean(text) == cleaned, ascii(text)
        words = peer.pat.findall(cleaned)
        assert ours.pre_tokenize(cleaned) == words, ascii(text)
        assert ours.encode(text) == peer.encode(text), ascii(text)


def compare_ids(texts: Iterable[str], ours: ReferenceTokenizer, peer: Any) -> None:
    wrong = [ascii(text) for text in texts if ours.encode(text) != peer.encode(text)]
    assert not wrong, wrong[:20]


def peer_bpe(peer: Any, word: str) -> tuple[int, ...]:
    spelled = "".join(peer.byte_encoder[byte] for byte in word.encode("utf-8"))
    return tuple(peer.encoder[token] for token in peer.bpe(spelled).split(" "))


def test_vocabulary(peer: Any):
    assert dict(load_vocabulary("open_clip").ids) == peer.encoder


def test_every_token_as_a_word(ours: ReferenceTokenizer, peer: Any):
    tokens = load_vocabulary("open_clip").tokens[:SOT]
    decode = load_vocabulary("open_clip").decode
    words = {decode([place]).removesuffix(" ") for place in range(len(tokens))}
    whole = [word for word in words if word and "\ufffd" not in word and WORD_END not in word]
    assert len(whole) > 40_000
    wrong = [word for word in whole if ours.bpe(word) != peer_bpe(peer, word)]
    assert not wrong


def test_merge_pairs_as_words(ours: ReferenceTokenizer, peer: Any):
    """Two tokens side by side: the right ones of a merge, and some of no merge."""
    rng = random.Random(1)
    pairs = [line.split(" ") for line in load_vocabulary("open_clip").ranks]
    joined = [left + right for left, right in rng.sample(pairs, 4000)]
    joined += [rng.choice(pairs)[1] + rng.choice(pairs)[0] for _ in range(4000)]
    alphabet = {ord(symbol): byte for byte, symbol in peer.byte_encoder.items()}
    words = [
        bytes(text.replace(WORD_END, "").translate(alphabet), "latin-1").decode("utf-8", "ignore")
        for text in joined
    ]
    wrong = [word for word in words if word and ours.bpe(word) != peer_bpe(peer, word)]
    assert not wrong


@pytest.mark.parametrize("symbols", ["a", "é", "猫", "😀", "aé", "a猫", "é😀", "aé猫😀"])
def test_words_of_1_to_600_bytes(symbols: str, ours: ReferenceTokenizer, peer: Any):
    rng = random.Random(symbols)
    for size in [*range(1, 34), *range(61, 601, 60)]:
        word = "".join(rng.choice(symbols) for _ in range(size))
        word = word.encode()[:size].decode("utf-8", "ignore")
        if word:
            assert ours.bpe(word) == peer_bpe(peer, word), word


@pytest.mark.parametrize("length", [74, 75, 76, 77, 78])
def test_texts_of_about_one_row(length: int, peer: Any):
    texts = ["a " * length, "猫" * (length // 2) + "!a" * (length - length // 2), "1" * length]
    tokenizer = Tokenizer(dialect="open_clip")
    assert len(tokenizer.encode(texts[0])) == length
    assert torch.equal(tokenizer(texts), peer(texts))


def test_context_lengths_from_3_to_300(peer: Any):
    texts = ["", "a", "a photo of a cat", "one 2 three " * 20, "x " * 298, "x " * 299, "é" * 400]
    for context_length in [*range(3, 20), 76, 77, 78, 248, 299, 300]:
        tokenizer = Tokenizer(context_length, "open_clip")
        expected = peer(texts, context_length=context_length)
        assert torch.equal(tokenizer(texts), expected)
        assert torch.equal(tokenizer.encode_batch(texts)[0], expected.int())


def test_the_two_spellings_of_whitespace_agree(open_clip: ModuleType):
    r"""open_clip splits on `str.isspace`, OpenAI on `\s`; only U+001C-1F tell them apart."""
    space = open_clip.re.compile(r"\s")
    differing = [c for c in map(chr, range(0x110000)) if bool(space.match(c)) != c.isspace()]
    assert differing == ["\x1c", "\x1d", "\x1e", "\x1f"]
    for character in differing:  # and no spelling of those is left by then
        code = ord(character)
        for spelling in (character, f"&#{code};", f"&#x{code:x};", f"&amp;amp;#{code};"):
            assert clean(f"a{spelling}b") == "ab"


def test_grammar_fuzz(ours: ReferenceTokenizer, peer: Any):
    compare_stages(fuzz(5_000, seed=20_210_226), ours, peer)


@pytest.mark.slow
def test_long_grammar_fuzz(ours: ReferenceTokenizer, peer: Any):
    compare_stages(fuzz(300_000, seed=20_210_105), ours, peer)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=40))
def test_any_text(text: str, ours: ReferenceTokenizer, peer: Any):
    compare_stages([text], ours, peer)


def in_contexts(code_points: Iterable[int], contexts: Iterable[str]) -> Iterator[str]:
    return (context.replace("_", chr(c)) for c in code_points for context in contexts)


def test_code_points(ours: ReferenceTokenizer, peer: Any):
    """All of Latin and the like, every 37th of the assigned planes, a few of the empty ones."""
    points = [*range(0x250), *range(0x250, 0x40000, 37), *range(0x40000, 0x110000, 997)]
    points += range(0xE0000, 0xE0200, 37)
    compare_ids(in_contexts(points, ["_", "a_a", "'_"]), ours, peer)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_code_point(ours: ReferenceTokenizer, peer: Any):
    contexts = ["_", "a_", "_a", "a_a", "'_", "1_", "_\u0301", "Σ_", "AΣ_", "AΣ_B"]
    compare_ids(in_contexts(range(0x110000), contexts), ours, peer)
