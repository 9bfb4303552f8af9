"""The CUDA tokenizer gives the host's ids: emulated on the host, compiled, and on a GPU."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenizer_fuzz
from fastclip.tokenizer import Tokenizer, cuda
from fastclip.tokenizer.cuda import CudaTokenizer
from fastclip.tokenizer.texts import as_native
from tokenizer_emulation import ROOT, EmulatedEncoder, compile_emulation

MakeTokenizer = Callable[..., CudaTokenizer]

# All done by the warps themselves.
PLAIN = [
    "",
    " ",
    "a photo of a cat",
    "A Photo, of the author's CAT's 3 kittens — it's theirs, they'll say!",
    "Ein schöner Käfer für 3½ € auf der Straße",
    "Привет, мир! 猫が好き。 나는 고양이를 좋아한다",
    "😀👍🏽 party",
    "''s 'S'll'd'x 'reve '' '",
    "x" * 16 + " " + "y" * 17 + " " + "ab" * 100,
    "antidisestablishmentarianism " * 30,
    "1234567890 " * 40,
    "नमस्ते दुनिया",
    "!" * 256 + " a" * 384,
]


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = compile_emulation(tmp_path_factory.mktemp("emulation"))
    if library is None:
        pytest.skip("there is no C++ compiler")
    return library


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeTokenizer:
    """CudaTokenizer, on the host and on a GPU."""
    if request.param == "emulated":
        library = request.getfixturevalue("library")
        monkeypatch.setattr(
            cuda,
            "_open",
            lambda device, strict: (torch.device("cpu"), EmulatedEncoder(library, strict)),
        )
        monkeypatch.setattr(cuda, "_stream", lambda device: 0)
    return CudaTokenizer


def refused(tokenizer: CudaTokenizer, texts: Iterable[str]) -> list[int]:
    """What the warps leave to the host."""
    batch = as_native(list(texts))
    _, lengths, numbers = tokenizer.enqueue_utf8(*tokenizer._stage(batch))
    which = cuda._numbers(numbers)
    assert which == (lengths == 0).nonzero().flatten().tolist()
    return which


def assert_equal(ours: torch.Tensor, expected: torch.Tensor, texts: list[str]) -> None:
    different = (ours.cpu().to(torch.int64) != expected.to(torch.int64)).any(1).nonzero().flatten()
    assert [ascii(texts[i])[:200] for i in different[:10].tolist()] == []


@pytest.mark.parametrize("context_length", [3, 4, 20, 77, 300])
def test_plain_texts_are_done_by_the_warps(make: MakeTokenizer, context_length: int):
    tokenizer = make(context_length)
    rows, lengths = tokenizer.encode_batch(PLAIN)
    expected, expected_lengths = Tokenizer(context_length, backend="native").encode_batch(PLAIN)
    assert_equal(rows, expected, PLAIN)
    assert torch.equal(lengths.cpu(), expected_lengths)
    assert refused(tokenizer, PLAIN) == []


def test_tricky_texts(make: MakeTokenizer, case_table: Any):
    texts = [case.text for case in case_table.cases if case.category != "version"]
    for dialect in ("openai", "open_clip"):
        expected = Tokenizer(dialect=dialect, backend="python")(texts)
        tokenizer = make(dialect=dialect)
        assert_equal(tokenizer(texts), expected, texts)
        assert 0 < len(refused(tokenizer, texts)) < 0.8 * len(texts)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
def test_texts_in_one_piece(make: MakeTokenizer, dtype: torch.dtype):
    texts = [*PLAIN, "caf&eacute;", "", "schÃ¶n", "z" * 2000, "fin"]
    tokenizer = make(33)
    encoded = [text.encode() for text in texts]
    data = torch.frombuffer(bytearray(b"".join([b"skipped", *encoded])), dtype=torch.uint8)
    ends = torch.tensor([len(text) for text in encoded]).cumsum(0) + 7
    offsets = torch.cat([torch.tensor([7]), ends]).to(torch.int32)
    expected, expected_lengths = Tokenizer(33).encode_batch(texts)
    for where in ("cpu", tokenizer.device):
        rows, lengths = tokenizer.encode_utf8(data.to(where), offsets.to(where), dtype=dtype)
        assert rows.dtype == dtype
        assert_equal(rows, expected, texts)
        assert torch.equal(lengths.cpu(), expected_lengths)
    assert tokenizer.encode_utf8(data, offsets, 5)[0].shape == (len(texts), 5)
    assert tokenizer.encode_utf8(data, offsets[:1])[0].shape == (0, 33)


def test_grammar_fuzz(make: MakeTokenizer):
    tokenizer = make()
    harmless = [
        piece for piece in tokenizer_fuzz.FRAGMENTS if not refused(tokenizer, [f" {piece} "])
    ]
    assert len(harmless) > 80
    rng = random.Random(20_261_124)
    texts = list(tokenizer_fuzz.fuzz(20_000, 3))
    texts += [
        rng.choice(["", " ", ""]).join(rng.choices(harmless, k=rng.randint(1, 30)))
        for _ in range(20_000)
    ]
    texts += [
        "".join(rng.choices("'''strevldmSTRE1! é猫", k=rng.randint(1, 80))) for _ in range(9000)
    ]
    assert_equal(tokenizer(texts), Tokenizer(backend="native")(texts), texts)
    assert len(refused(tokenizer, texts[20_000:])) < 0.15 * len(texts)


def _every_code_point(form: str, step: int) -> list[str]:
    return [form.format(chr(c)) for c in range(0, 0x110000, step) if not 0xD800 <= c < 0xE000]


@pytest.mark.parametrize("form", ["{}", "a{}b", "'{}"])
def test_code_points(make: MakeTokenizer, form: str):
    texts = _every_code_point(form, 1)[:0x30000:3]
    tokenizer = make(20)
    assert_equal(tokenizer(texts), Tokenizer(20, backend="native")(texts), texts)
    assert len(refused(tokenizer, texts)) < 0.05 * len(texts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("form", ["{}", "a{}", "{}a", "a{}b", "'{}", "1{}", "{}\u0301", "é{}"])
def test_all_code_points(make: MakeTokenizer, form: str):
    texts = _every_code_point(form, 1)
    assert_equal(make(20)(texts), Tokenizer(20, backend="native")(texts), texts)


def test_characters_of_a_newer_unicode_version(make: MakeTokenizer):
    codes = range(0x1FA70, 0x1FB00)
    unassigned = next(chr(code) for code in codes if unicodedata.category(chr(code)) == "Cn")
    unassigned = f"a {unassigned} b"
    assert refused(make(strict=True), [unassigned, "a b"]) == [0]
    assert refused(make(), [unassigned, "a b"]) == []


def test_bad_texts_are_named(make: MakeTokenizer):
    tokenizer = make(8, truncate=False)
    fine = ["a cat"] * 40
    with pytest.raises(ValueError, match=r"texts\[40\] \('a a a a a a a'\) has 9 tokens"):
        tokenizer([*fine, "a a a a a a a", "&amp;"])
    with pytest.raises(ValueError, match=r"texts\[3\] is not UTF-8: byte 2"):
        tokenizer([*fine[:3], b"ab\xff", "&amp;"])
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        tokenizer(["a", 3])
    data = torch.zeros(10, dtype=torch.uint8)
    for offsets in ([0, 11], [0, 5, 4], [-1, 5]):
        with pytest.raises(ValueError, match=r"texts\[\d\] is bytes -?\d+ to \d+ by its offsets"):
            tokenizer.encode_utf8(data, torch.tensor(offsets, dtype=torch.int32))
    with pytest.raises(TypeError, match="offsets is a contiguous vector of"):
        tokenizer.encode_utf8(data, torch.tensor([0, 5]))
    with pytest.raises(TypeError, match="data is a tensor, not bytes"):
        tokenizer.encode_utf8(b"abc", torch.tensor([0, 3], dtype=torch.int32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one offset more than texts"):
        tokenizer.encode_utf8(data, torch.empty(0, dtype=torch.int32))
    with pytest.raises(ValueError, match="context_length is 2147483648, more than"):
        tokenizer.encode_utf8(data, torch.tensor([0], dtype=torch.int32), 2**31)
    with pytest.raises(TypeError, match="ids are int32"):
        tokenizer.encode_utf8(data, torch.tensor([0], dtype=torch.int32), dtype=torch.int8)
    assert tokenizer([]).shape == (0, 8)
    # Lone surrogates are the host's; what comes after a failed call is right again.
    assert_equal(tokenizer(["a\ud800"]), Tokenizer(8)(["a\ud800"]), ["a\ud800"])


def test_without_a_gpu_or_the_module(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="context_length is 2"):
        CudaTokenizer(2)
    if not torch.cuda.is_available():
        with pytest.raises((RuntimeError, ImportError), match=r"Tokenizer gives the same ids"):
            CudaTokenizer()
    monkeypatch.setitem(sys.modules, "fastclip.tokenizer._cuda", None)
    monkeypatch.delattr("fastclip.tokenizer._cuda", raising=False)
    with pytest.raises(ImportError, match="needs nvcc"):
        CudaTokenizer()


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("there is no nvcc")
    return found


def test_the_module_is_built_where_there_is_nvcc(nvcc: str):
    from fastclip.tokenizer import _cuda

    assert (_cuda.device_count() > 0) == torch.cuda.is_available()
    dump = Path(nvcc).with_name("cuobjdump")
    if dump.exists():
        listed = subprocess.run(
            [str(dump), "--list-elf", str(_cuda.__file__)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(re.findall(r"sm_(\d+)", listed.stdout)) >= {"80", "90", "100"}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_fit(nvcc: str, arch: int, tmp_path: Path):
    """No spills, and shared memory and registers for at least 40 warps a multiprocessor."""
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", f"-arch=sm_{arch}", "-cubin"]
    source = ROOT / "csrc/bpe_cuda.cu"
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "kernel.cubin"), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    spills = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", done.stderr
    )
    used = re.findall(r"Used (\d+) registers.*?(\d+) bytes smem", done.stderr)
    assert len(spills) == len(used) == 3  # ids of 2, 4 and 8 bytes
    assert set(spills) == {("0", "0", "0")}
    shared_memory = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}[arch]
    for registers, shared in used:
        blocks = min(65536 // (256 * int(registers)), shared_memory // (int(shared) + 1024))
        assert 8 * blocks >= 40


@pytest.mark.gpu
def test_a_graph_replays():
    tokenizer = CudaTokenizer()
    texts = [PLAIN[i % 7] for i in range(5000)]
    data, offsets = (part.to(tokenizer.device) for part in tokenizer._stage(as_native(texts)))
    tokenizer.enqueue_utf8(data, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, lengths, refused_ones = tokenizer.enqueue_utf8(data, offsets)
    rows.fill_(-1)
    lengths.fill_(-1)
    graph.replay()
    expected, expected_lengths = Tokenizer().encode_batch(texts)
    assert torch.equal(rows.cpu(), expected)
    assert torch.equal(lengths.cpu(), expected_lengths)
    assert int(refused_ones[0]) == 0


@pytest.mark.gpu
def test_other_streams_and_many_texts():
    texts = list(tokenizer_fuzz.fuzz(300_000, 9))
    tokenizer = CudaTokenizer(20)
    with torch.cuda.stream(torch.cuda.Stream()):
        rows = tokenizer(texts).cpu()
    assert_equal(rows, Tokenizer(20, backend="native")(texts), texts)
