"""What may be handed in, where rows may go, and what is refused, by both tokenizers."""

from __future__ import annotations

import os
import random
import sys
import threading
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch

import tokenizer_fuzz
from fastclip.tokenizer import Tokenizer, backends
from fastclip.tokenizer.backends import NativeBackend
from fastclip.tokenizer.reference import ReferenceTokenizer
from fastclip.tokenizer.vocabulary import CleanMode

TEXTS = [
    "a photo of a cat",
    "",
    "Ein schöner Käfer – 3½ €",
    "猫 &amp; 犬",
    "😀 it’s",
    "cafÃ©",
    "x\x00y",
]


@pytest.fixture(params=["native", "python"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(16, backend=request.param)


@pytest.fixture
def rows() -> torch.Tensor:
    return Tokenizer(16, backend="python")(TEXTS)


def test_containers(tokenizer: Tokenizer, rows: torch.Tensor):
    encoded = [text.encode() for text in TEXTS]
    for texts in (TEXTS, tuple(TEXTS), encoded, [*TEXTS[:3], *encoded[3:]]):
        assert torch.equal(tokenizer(texts), rows)
    for array in (np.array(TEXTS), np.array(TEXTS, dtype=object), np.array(encoded)):
        assert torch.equal(tokenizer(array), rows)
    cells = np.array(encoded)
    assert torch.equal(tokenizer(cells[::-2]), rows.flip(0)[::2])
    assert tokenizer(np.array([], dtype="S4")).shape == (0, 16)


def test_arrow_arrays(tokenizer: Tokenizer, rows: torch.Tensor):
    pa = pytest.importorskip("pyarrow")
    array = pa.array(TEXTS)
    for kind in ("string", "large_string", "binary", "large_binary", "string_view"):
        assert torch.equal(tokenizer(array.cast(kind)), rows), kind
    assert torch.equal(tokenizer(array.slice(2, 3)), rows[2:5])
    assert torch.equal(tokenizer(pa.chunked_array([TEXTS[:2], TEXTS[2:]])), rows)
    assert tokenizer(pa.array([], type="string")).shape == (0, 16)
    assert torch.equal(tokenizer(pa.array(["", ""])), tokenizer(["", ""]))
    with pytest.raises(ValueError, match=r"texts\[1\] is null"):
        tokenizer(pa.array(["a", None]))
    with pytest.raises(TypeError, match="not of int64"):
        tokenizer(pa.array([1, 2]))


def test_arrays_of_something_else(tokenizer: Tokenizer):
    for array in (np.zeros(3), np.array([["a"]]), np.array("a")):
        with pytest.raises(TypeError, match="one-dimensional NumPy array of bytes, str or objects"):
            tokenizer(array)
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        tokenizer(np.array(["a", 3], dtype=object))


@pytest.mark.parametrize(
    ("wrong", "byte"),
    [
        (b"ab\xff", 2),
        (b"\xc3", 0),
        (b"abc\xe2\x82", 3),
        (b"\xc0\xaf", 0),
        (b"\xed\xa0\x80", 0),
        (b"a\xf4\x90\x80\x80", 1),
        (b"\xe0\x80\x80", 0),
        ("é".encode() * 70 + b"\x80", 140),
    ],
)
def test_bytes_that_are_not_utf8(tokenizer: Tokenizer, wrong: bytes, byte: int):
    with pytest.raises(ValueError, match=rf"^texts\[1\] is not UTF-8: byte {byte} "):
        tokenizer([b"fine", wrong])


def test_texts_that_are_odd(tokenizer: Tokenizer):
    python = ReferenceTokenizer("openai")
    for text in (
        "\x00",
        "a\x00b",
        "\ud83d",
        "\udc00\ud83d",
        "\ud83d\ude00",
        "\x7f" * 100,
        " " * 500,
    ):
        expected = [49406, *python.encode(text)[:14], 49407]
        assert tokenizer(text)[0, : len(expected)].tolist() == expected

    class Name(str):
        __slots__ = ()

    assert torch.equal(tokenizer([Name("a cat")]), tokenizer(["a cat"]))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16"])
def test_out(tokenizer: Tokenizer, rows: torch.Tensor, dtype: str):
    array = np.full((len(TEXTS), 16), 7, dtype=dtype)
    assert tokenizer(TEXTS, out=array) is array
    assert array.tolist() == rows.tolist()
    tensor = torch.full((len(TEXTS), 16), 7).to(getattr(torch, dtype))
    assert tokenizer(TEXTS, out=tensor) is tensor
    assert tensor.tolist() == rows.tolist()
    part = torch.zeros(len(TEXTS) + 2, 16, dtype=getattr(torch, dtype))
    tokenizer(TEXTS, out=part[1:-1])
    assert part[1:-1].tolist() == rows.tolist()
    assert not part[0].to(torch.int64).any()
    assert not part[-1].to(torch.int64).any()


def test_unfit_out(tokenizer: Tokenizer):
    texts = ["a", "b"]
    frozen = np.zeros((2, 16), dtype=np.int64)
    frozen.flags.writeable = False
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.zeros(2, 16), TypeError, "not torch.float32"),
        (np.zeros((2, 16), dtype=np.int16), TypeError, "not int16"),
        (np.zeros((2, 16), dtype=bool), TypeError, "not bool"),
        ([[0] * 16] * 2, TypeError, "not list"),
        (torch.zeros(3, 16, dtype=torch.int32), ValueError, r"out is \[3, 16\]; 2 texts"),
        (torch.zeros(2, 17, dtype=torch.int32), ValueError, r"need \[2, 16\]"),
        (torch.zeros(32, dtype=torch.int32), ValueError, r"out is \[32\]"),
        (torch.zeros(2, 32, dtype=torch.int32)[:, ::2], ValueError, "not contiguous"),
        (np.zeros((2, 32), dtype=np.int32)[:, ::2], ValueError, "not C-contiguous"),
        (np.zeros((16, 2), dtype=np.int32).T, ValueError, "not C-contiguous"),
        (frozen, ValueError, "read-only"),
        (torch.zeros(2, 16, dtype=torch.int32, device="meta"), ValueError, "on meta"),
    ]
    for out, error, message in cases:
        with pytest.raises(error, match=message):
            tokenizer(texts, out=out)


def test_packed(tokenizer: Tokenizer):
    ids, lengths = tokenizer.encode_batch(TEXTS)
    packed = tokenizer.encode_packed(TEXTS)
    assert packed.ids.dtype == packed.cu_seqlens.dtype == packed.lengths.dtype == torch.int32
    assert torch.equal(packed.lengths, lengths)
    bounds = packed.cu_seqlens.tolist()
    assert (bounds[0], bounds[-1]) == (0, len(packed.ids))
    for row, length, begin, end in zip(ids, lengths, bounds[:-1], bounds[1:], strict=True):
        assert torch.equal(packed.ids[begin:end], row[:length])
    nothing = tokenizer.encode_packed([])
    assert nothing.ids.shape == (0,)
    assert nothing.cu_seqlens.tolist() == [0]


def test_the_first_text_that_is_too_long_is_named():
    texts = ["a"] * 2000
    texts[700] = "word " * 20
    texts[650] = "cafÃ© " * 20  # found after the batch, by ftfy's way
    for backend in ("native", "python"):
        tokenizer = Tokenizer(16, truncate=False, threads=3, backend=backend)
        with pytest.raises(ValueError, match=r"^texts\[650\] .* has 22 tokens"):
            tokenizer(texts)


@pytest.mark.parametrize("mode", ["lower", "whitespace", "canonicalize"])
def test_clean_modes_are_those_of_open_clip(open_clip: ModuleType, mode: CleanMode):
    peer = open_clip.SimpleTokenizer(clean=mode)
    native = Tokenizer(dialect="open_clip", clean=mode, backend="native")
    texts = list(tokenizer_fuzz.fuzz(3000, seed=3))
    texts += ["A_b!c", "IT'S Don'T", "<END_OF_TEXT> <end_of_text>", "ΑΣ_", "x.'s"]
    assert [t for t in texts if native.encode(t) != peer.encode(t)] == []
    assert torch.equal(native(texts[:200]), peer(texts[:200]))


@pytest.mark.parametrize("mask", ["simple", "random", "shuffle"])
@pytest.mark.parametrize("backend", ["native", "python"])
def test_reduction_masks_are_those_of_open_clip(
    open_clip: ModuleType,
    mask: Literal["simple", "random", "shuffle"],
    backend: Literal["native", "python"],
):
    texts = ["short", "one two three four five six seven eight nine ten", "1234567890 12345", ""]
    peer = open_clip.SimpleTokenizer(context_length=8, reduction_mask=mask)
    ours = Tokenizer(8, "open_clip", reduction_mask=mask, backend=backend)
    for seed in range(20):
        results = []
        for tokenizer in (peer, ours):
            random.seed(seed)
            torch.manual_seed(seed)
            results.append(tokenizer(texts))
        assert torch.equal(*results)
    assert ours.encode_packed(texts).lengths.tolist() == [3, 8, 8, 2]


def test_syntax_mask_is_that_of_open_clip(open_clip: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """With a stand-in for nltk, whose data cannot be had everywhere: a word's tag is its length."""
    nltk = ModuleType("nltk")
    tags = ["DT", "NN", "VBZ", "JJ", "NNS", "IN"]
    functions: dict[str, Any] = {
        "download": lambda name: None,
        "tokenize": type("tokenize", (), {"word_tokenize": staticmethod(str.split)}),
        "pos_tag": lambda words: [(word, tags[len(word) % len(tags)]) for word in words],
    }
    for name, value in functions.items():
        setattr(nltk, name, value)
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    texts = ["the quick brown fox jumps over a very lazy dog", "a cat", "ab " * 30]
    peer = open_clip.SimpleTokenizer(context_length=7, reduction_mask="syntax")
    ours = Tokenizer(7, "open_clip", reduction_mask="syntax")
    assert torch.equal(ours(texts), peer(texts))


def test_unknown_settings():
    wrong: Any = "all"
    with pytest.raises(ValueError, match="unknown reduction mask 'all'"):
        Tokenizer(reduction_mask=wrong)
    with pytest.raises(ValueError, match=r"clean is .*, not 'all'"):
        Tokenizer(clean=wrong)
    with pytest.raises(ValueError, match=r"backend is .*, not 'all'"):
        Tokenizer(backend=wrong)
    for threads in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="threads is a positive int"):
            Tokenizer(threads=threads)  # pyright: ignore[reportArgumentType]


def test_without_nltk(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(ImportError, match="pip install nltk"):
        Tokenizer(reduction_mask="syntax")


def test_where_nothing_was_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastclip.tokenizer._native", None)
    monkeypatch.delattr("fastclip.tokenizer._native", raising=False)
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="not built.*the Python one is used"):
        assert Tokenizer().backend == "python"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer()  # said once
    with pytest.raises(ImportError, match="C\\+\\+17 compiler"):
        Tokenizer(backend="native")


def test_another_unicode_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unicodedata, "unidata_version", "16.0.0")
    backends._warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r"Unicode 16\.0\.0"):
        native = NativeBackend("openai")
    assert native._native.unicode_version == "15.0.0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NativeBackend("openai")
        NativeBackend("openai", strict=True)
    monkeypatch.setattr(unicodedata, "unidata_version", "13.0.0")
    assert NativeBackend("openai", strict=True)._native.unicode_version == "14.0.0"


def test_strict_hands_over_what_the_tables_do_not_know(monkeypatch: pytest.MonkeyPatch):
    strict = Tokenizer(16, strict=True, backend="native")
    seen: list[str] = []
    encode = ReferenceTokenizer.encode

    def spy(self: ReferenceTokenizer, text: str) -> list[int]:
        seen.append(text)
        return encode(self, text)

    monkeypatch.setattr(ReferenceTokenizer, "encode", spy)
    unknown = "a \U0001f9ff\u0378 cat"
    rows = strict(["a cat 😀", unknown, "猫", f"{unknown} " * 20])
    assert seen == [unknown, f"{unknown} " * 20]
    python = Tokenizer(16, backend="python")
    assert torch.equal(rows, python(["a cat 😀", unknown, "猫", f"{unknown} " * 20]))
    assert strict.encode("&#888;x") == Tokenizer(backend="python").encode("&#888;x")
    with pytest.raises(ValueError, match=r"texts\[0\] .* tokens"):
        Tokenizer(5, truncate=False, strict=True)(unknown)


def test_threads_share_a_native_tokenizer():
    texts = [
        f"word{i} {chr(97 + i % 26) * (i % 9)} photo №{i}’s {chr(0x430 + i % 30) * 9}"
        for i in range(3000)
    ]
    alone = Tokenizer(32, threads=1, backend="native")(texts)
    shared = Tokenizer(32, threads=4, backend="native")
    with ThreadPoolExecutor(8) as pool:
        for rows in pool.map(shared, [texts] * 24):
            assert torch.equal(rows, alone)


def test_other_threads_run_meanwhile():
    """The interpreter's lock is released: a thread of Python gets on while a batch is encoded."""
    tokenizer = Tokenizer(threads=1, backend="native")
    texts = ["猫犬" * 300_000] * 6  # about a second
    tokenizer("warm")
    beats = 0
    stop = threading.Event()

    def beat() -> None:
        nonlocal beats
        while not stop.wait(0.001):
            beats += 1

    thread = threading.Thread(target=beat)
    thread.start()
    before = beats
    tokenizer(texts)
    during = beats - before
    stop.set()
    thread.join()
    assert during >= 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_goes_on():
    """As in a DataLoader's workers: the threads of the parent's pool do not exist in the child."""
    tokenizer = Tokenizer(16, threads=3, backend="native")
    texts = [f"picture {i} of a käfer" for i in range(2000)]
    expected = tokenizer(texts)
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = all(torch.equal(tokenizer(texts), expected) for _ in range(3))
        finally:
            os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(tokenizer(texts), expected)


def test_the_tables_are_those_of_this_python():
    """Canary: what the installed unicodedata, regex and ftfy give is what was compiled."""
    from importlib.metadata import version

    from fastclip.tokenizer import _native

    if int(unicodedata.unidata_version.split(".")[0]) not in backends.KNOWN_UNICODE:
        pytest.skip(f"there are no tables for Unicode {unicodedata.unidata_version}")
    if {name: version(name) for name in _native.MADE_WITH} != _native.MADE_WITH:
        pytest.skip(f"the tables were made with {_native.MADE_WITH}")
    import subprocess
    from pathlib import Path

    script = Path(__file__).parents[2] / "csrc" / "generate_tables.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
