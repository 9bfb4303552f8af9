from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclip.tokenizer import Tokenizer, reference

TOKENIZER = Tokenizer()


def run_python(program: str) -> str:
    """The standard error of a program that fails in a fresh interpreter; "" when it succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return done.stderr if done.returncode else ""


def test_call_gives_int64_rows():
    rows = TOKENIZER(["a photo of a cat", ""])
    assert rows.dtype == torch.int64
    assert rows.shape == (2, 77)
    assert rows[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert rows[1, :2].tolist() == [49406, 49407]
    assert not rows[0, 7:].any()
    assert not rows[1, 2:].any()


def test_one_text_is_a_batch_of_one():
    assert torch.equal(TOKENIZER("a cat"), TOKENIZER(("a cat",)))


def test_encode_batch_gives_int32_rows_and_lengths():
    ids, lengths = Tokenizer(context_length=5).encode_batch(["a cat", "", "a photo of a cat", "!"])
    assert ids.dtype == lengths.dtype == torch.int32
    assert ids.tolist() == [
        [49406, 320, 2368, 49407, 0],
        [49406, 49407, 0, 0, 0],
        [49406, 320, 1125, 539, 49407],
        [49406, 256, 49407, 0, 0],
    ]
    assert lengths.tolist() == [4, 2, 5, 3]


def test_no_texts():
    assert TOKENIZER([]).shape == (0, 77)
    ids, lengths = TOKENIZER.encode_batch([])
    assert (ids.shape, ids.dtype) == ((0, 77), torch.int32)
    assert (lengths.shape, lengths.dtype) == ((0,), torch.int32)


def test_attributes():
    assert TOKENIZER.backend == "native"
    assert Tokenizer(backend="python").backend == "python"
    assert (TOKENIZER.vocab_size, TOKENIZER.sot, TOKENIZER.eot, TOKENIZER.pad) == (
        49408,
        49406,
        49407,
        0,
    )
    assert Tokenizer(32, "open_clip").context_length == 32


def test_context_length_of_one_call():
    assert torch.equal(
        TOKENIZER("a photo of a cat", context_length=5), Tokenizer(5)("a photo of a cat")
    )


def test_too_long_without_truncation():
    tokenizer = Tokenizer(context_length=5, truncate=False)
    assert tokenizer(["a b c"]).shape == (1, 5)
    with pytest.raises(ValueError, match=r"texts\[1\] \('one two three four'\) has 6 tokens") as e:
        tokenizer.encode_batch(["a", "one two three four", "a"])
    assert "truncate=True" in str(e.value)
    with pytest.raises(ValueError, match=r"texts\[0\] \('(word ){12}…'\) has 1002 tokens"):
        tokenizer("word " * 1000)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\] is NoneType, not str"),
        (["a", "b", bytearray(b"c")], r"texts\[2\] is bytearray, not str"),
        ([["a"]], r"texts\[0\] is list, not str"),
        (b"a", "not bytes"),
        ({"a"}, "not set"),
        (None, "not NoneType"),
        (7, "not int"),
        (torch.zeros(2), "not Tensor"),
    ],
)
def test_wrong_types(texts: Any, message: str):
    with pytest.raises(TypeError, match=message):
        TOKENIZER(texts)
    with pytest.raises(TypeError, match=message):
        TOKENIZER.encode_batch(texts)


def test_encode_wants_one_text():
    wrong: Any = ["a"]
    with pytest.raises(TypeError, match="not list"):
        TOKENIZER.encode(wrong)


@pytest.mark.parametrize("context_length", [2, 0, -1])
def test_context_length_too_small(context_length: int):
    with pytest.raises(ValueError, match=f"context_length is {context_length};"):
        Tokenizer(context_length)
    with pytest.raises(ValueError, match=f"context_length is {context_length};"):
        TOKENIZER("a", context_length)


def test_context_length_of_another_type():
    wrong: Any = 77.0
    with pytest.raises(TypeError, match="not float"):
        Tokenizer(wrong)


def test_unknown_dialect():
    wrong: Any = "gpt2"
    with pytest.raises(ValueError, match="unknown tokenizer dialect 'gpt2'"):
        Tokenizer(dialect=wrong)


def test_truncate_is_true_or_false():
    wrong: Any = "no"
    with pytest.raises(ValueError, match="truncate is True or False, not 'no'"):
        Tokenizer(truncate=wrong)


def test_special_tokens_belong_to_a_dialect():
    openai, open_clip = Tokenizer(), Tokenizer(dialect="open_clip")
    assert openai.encode("a<|endoftext|>b") == [320, 49407, 321]
    assert open_clip.encode("a<end_of_text>b") == [320, 49407, 321]
    assert 49407 not in openai.encode("a<end_of_text>b")
    assert 49407 not in open_clip.encode("a<|endoftext|>b")


def test_decode():
    assert TOKENIZER.decode(TOKENIZER.encode("A photo of a CAFÉ!")) == "a photo of a café ! "
    assert TOKENIZER.decode(TOKENIZER("a cat")[0, :4]) == "<|startoftext|>a cat <|endoftext|>"
    assert Tokenizer(dialect="open_clip").decode([49406, 49407]) == "<start_of_text><end_of_text>"
    assert TOKENIZER.decode([]) == ""
    cut_in_two = TOKENIZER.encode("𓀀")[:1]
    assert "\ufffd" in TOKENIZER.decode(cut_in_two)


def test_decode_of_a_batch():
    with pytest.raises(ValueError, match=r"one text, not \[2, 77\]"):
        TOKENIZER.decode(TOKENIZER(["a", "b"]))


@pytest.mark.parametrize("token", [-1, 49408])
def test_decode_of_an_unknown_id(token: int):
    with pytest.raises(ValueError, match=rf"{token} is outside 0\.\.49407"):
        TOKENIZER.decode([0, token])


def test_threads_share_a_tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "CACHED_WORDS", 50)  # so that the cache is emptied all the time
    texts = [f"word{i} {chr(97 + i % 26) * (i % 9)} photo №{i}’s" for i in range(400)]
    alone = Tokenizer(32)(texts)
    shared = Tokenizer(32)
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(shared, [texts] * 16):
            assert torch.equal(rows, alone)


def test_the_word_cache_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "CACHED_WORDS", 10)
    tokenizer = reference.ReferenceTokenizer("openai")
    sizes = []
    for number in range(200):
        tokenizer.encode(f"w{'x' * number} ab")
        sizes.append(len(tokenizer._cache))
    assert max(sizes) == 10
    assert all(len(word) <= reference.CACHED_WORD_LENGTH for word in tokenizer._cache)


def test_pickled_tokenizer_gives_the_same_rows():
    tokenizer = Tokenizer(20, "open_clip", truncate=False)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy("a café<end_of_text>"), tokenizer("a café<end_of_text>"))
    with pytest.raises(ValueError, match="truncate=True"):
        copy("a " * 30)


def test_importing_the_package_loads_neither_ftfy_nor_regex_nor_numpy():
    program = """
import sys
sys.modules["numpy"] = None
import fastclip.tokenizer
ids, lengths = fastclip.tokenizer.Tokenizer().encode_batch(["a cat"])
assert lengths.tolist() == [4]
assert not {"ftfy", "regex"} & set(sys.modules)
assert fastclip.tokenizer.Tokenizer().encode("caf\u00c3\u00a9") == [15304]
assert {"ftfy", "regex"} <= set(sys.modules)
"""
    assert run_python(program) == ""


@pytest.mark.parametrize("missing", ["ftfy", "regex"])
def test_a_missing_package_says_what_to_install(missing: str):
    program = f"""
import sys
sys.modules[{missing!r}] = None
from fastclip.tokenizer import Tokenizer
Tokenizer().encode("a cat, a caf\u00e9 & 2\u00bd \U0001f431\u2026")
Tokenizer().encode("caf\u00c3\u00a9")
"""
    error = run_python(program)
    assert f"{missing} is not installed" in error
    assert 'pip install "fastclip-torch[train]"' in error


@pytest.mark.timeout(60)
@pytest.mark.parametrize("letters", ["a", "abcdefghij", "é", "猫", "thequick"])
def test_a_word_of_100_kb(letters: str):
    word = letters * (100_000 // len(letters.encode()))
    ids = TOKENIZER.encode(word)
    assert TOKENIZER.decode(ids) == word + " "


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.text(max_size=60), max_size=4), st.integers(3, 30))
def test_rows_are_framed_and_padded(texts: list[str], context_length: int):
    rows, lengths = Tokenizer(context_length).encode_batch(texts)
    for text, row, length in zip(texts, rows.tolist(), lengths.tolist(), strict=True):
        ids = TOKENIZER.encode(text)[: context_length - 2]
        assert row == [49406, *ids, 49407] + [0] * (context_length - length)
        assert length == len(ids) + 2


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_decoding_gives_back_the_cleaned_text_but_for_blanks(text: str):
    cleaned = reference.clean(text)
    kept = cleaned.replace("\u0345", "").replace("</w>", "")
    decoded = TOKENIZER.decode(TOKENIZER.encode(text))
    assert decoded.replace(" ", "") == kept.replace(" ", "")
