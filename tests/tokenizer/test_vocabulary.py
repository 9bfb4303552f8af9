from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastclip.tokenizer.reference import merge
from fastclip.tokenizer.vocabulary import (
    BYTE_TO_SYMBOL,
    EOT,
    MERGES_PATH,
    SOT,
    SYMBOL_TO_BYTE,
    VOCAB_SIZE,
    load_vocabulary,
)

MERGES_SHA256 = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"


def test_the_table_is_the_one_checked_in():
    assert hashlib.sha256(MERGES_PATH.read_bytes()).hexdigest() == MERGES_SHA256
    notice = MERGES_PATH.with_name("BPE_LICENSE").read_text()
    assert "MIT License" in notice
    assert "Copyright (c) 2021 OpenAI" in notice


def test_the_table_is_reproducible(strip_vocabulary: ModuleType, tmp_path: Path):
    source = strip_vocabulary.installed_source()
    if source is None:
        pytest.skip("open_clip is not installed, so there is no vocabulary file to strip")
    output = tmp_path / "merges.txt"
    script = str(strip_vocabulary.__file__)
    subprocess.run([sys.executable, script, "--output", output], check=True)
    assert output.read_bytes() == MERGES_PATH.read_bytes()


def test_another_vocabulary_is_refused(strip_vocabulary: ModuleType, tmp_path: Path):
    (tmp_path / "other.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match="another vocabulary"):
        strip_vocabulary.strip(tmp_path / "other.gz")


def test_ids_and_tokens():
    for dialect, ends in (
        ("openai", ("<|startoftext|>", "<|endoftext|>")),
        ("open_clip", ("<start_of_text>", "<end_of_text>")),
    ):
        vocabulary = load_vocabulary(dialect)
        assert len(vocabulary.tokens) == len(vocabulary.ids) == VOCAB_SIZE == 49_408
        assert [vocabulary.ids[t] for t in vocabulary.tokens] == list(range(VOCAB_SIZE))
        assert (vocabulary.tokens[SOT], vocabulary.tokens[EOT]) == ends
        assert (vocabulary.sot_text, vocabulary.eot_text) == ends
        assert vocabulary.tokens[0] == "!"
        assert vocabulary.tokens[256] == "!</w>"
        assert vocabulary.tokens[512] == "in"
        assert vocabulary.tokens[49_405] == "jekyll</w>"


def test_the_byte_alphabet_is_one_to_one():
    assert sorted(SYMBOL_TO_BYTE.values()) == list(range(256))
    assert {b: SYMBOL_TO_BYTE[ord(BYTE_TO_SYMBOL[b])] for b in range(256)} == {
        b: b for b in range(256)
    }


def test_merges_come_after_their_parts():
    """What lets a heap, or any leftmost-lowest order, replace OpenAI's merge-all loop."""
    vocabulary = load_vocabulary("openai")
    for line, rank in vocabulary.ranks.items():
        left, right = line.split(" ")
        assert vocabulary.ids[left] < 512 + rank
        assert vocabulary.ids[right] < 512 + rank
        assert vocabulary.ids[left + right] == 512 + rank
        assert not left.endswith("</w>")


def test_every_token_merges_to_itself():
    vocabulary = load_vocabulary("openai")
    for token in vocabulary.tokens[:SOT]:
        stem = token.removesuffix("</w>")
        symbols = list(stem)
        symbols[-1] += token[len(stem) :]
        assert merge(symbols, vocabulary.ranks) == [token]


def test_an_unknown_dialect_is_named():
    with pytest.raises(ValueError, match=r"'huggingface'.*'openai', 'open_clip'"):
        load_vocabulary("huggingface")  # pyright: ignore[reportArgumentType]
