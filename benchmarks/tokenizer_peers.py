"""The tokenizers that ours is measured beside, and how each makes rows of 77 ids."""

from __future__ import annotations

import html
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import captions

CONTEXT_LENGTH = 77
BYTE_LEVEL = Path("demo/captions/byte_level.json")

Encode = Callable[[list[str]], Any]
"""From texts to rows [B, 77], or to whatever the peer makes instead."""


def fresh_copies(texts: Sequence[str]) -> list[str]:
    """New str objects, as a reader of shards makes them: nothing about them is cached."""
    return [
        text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass") for text in texts
    ]


def cleaned_copies(texts: Sequence[str]) -> list[str]:
    """For a peer that does no cleaning: it is done beforehand, and not counted."""
    from fastclip.tokenizer.reference import clean

    return [clean(text) for text in texts]


@dataclass(frozen=True)
class Provider:
    """One way to turn captions into ids."""

    name: str

    build: Callable[[int], Encode]
    """From a number of threads to the function that is measured."""

    module: str = "fastclip.tokenizer"
    distribution: str = "fastclip-torch"

    share: float = 1.0
    """Of a batch that it gets, so that slow ones do not take all the time."""

    threaded: bool = False
    comparable: bool = True
    """Whether its rows should be CLIP's ids."""

    prepare: Callable[[Sequence[str]], list[str]] = fresh_copies

    def load(self) -> None:
        """Import what it needs."""
        importlib.import_module(self.module)


def _fastclip(threads: int) -> Encode:
    from fastclip.tokenizer import Tokenizer

    return Tokenizer(backend="native", threads=threads)


def _fastclip_into(threads: int) -> Encode:
    """Into a buffer that is used again, as a loader has it."""
    from fastclip.tokenizer import Tokenizer

    tokenizer = Tokenizer(backend="native", threads=threads)
    buffers: dict[int, torch.Tensor] = {}

    def encode(texts: list[str]) -> torch.Tensor:
        count = len(texts)
        if count not in buffers:
            buffers[count] = torch.zeros(count, CONTEXT_LENGTH, dtype=torch.int32)
        return tokenizer(texts, out=buffers[count])

    return encode


def _fastclip_python(threads: int) -> Encode:
    from fastclip.tokenizer import Tokenizer

    return Tokenizer(backend="python")


def _open_clip(threads: int) -> Encode:
    """From its file: the package around it would load torchvision."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None
    assert package.origin is not None
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def _clip_json() -> Any:
    """The tokenizer of the tokenizers package, as transformers makes it for CLIP."""
    from transformers import CLIPTokenizer

    from fastclip.tokenizer.vocabulary import load_vocabulary

    vocabulary = load_vocabulary("openai")
    merges: Any = [tuple(line.split(" ")) for line in vocabulary.ranks]
    return CLIPTokenizer(vocab=dict(vocabulary.ids), merges=merges)


def _transformers(threads: int) -> Encode:
    tokenizer = _clip_json()

    def encode(texts: list[str]) -> Any:
        rows = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=CONTEXT_LENGTH,
            return_tensors="np",
        )
        return rows["input_ids"]

    return encode


def _tokenizers(threads: int) -> Encode:
    """The batch call alone; its result is a list of objects, which are turned into rows."""
    import os

    import numpy as np

    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    fast = _clip_json()._tokenizer
    fast.enable_truncation(CONTEXT_LENGTH)
    fast.enable_padding(length=CONTEXT_LENGTH, pad_id=0)
    return lambda texts: np.array([row.ids for row in fast.encode_batch_fast(texts)])


def _instant(threads: int) -> Encode:
    from instant_clip_tokenizer import Tokenizer  # pyright: ignore

    tokenizer = Tokenizer()
    return lambda texts: tokenizer.tokenize_batch(texts, context_length=CONTEXT_LENGTH)


def _cleaned_instant(threads: int) -> Encode:
    """The fastest that was exact, special tokens apart: OpenAI's cleaning, then Rust."""
    import ftfy

    instant = _instant(threads)

    def clean(text: str) -> str:
        return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()

    return lambda texts: instant([clean(text) for text in texts])


def _gigatoken(threads: int) -> Encode:
    """It refuses CLIP's vocabulary, so it is given one of GPT-2's kind and of equal size."""
    import gigatoken  # pyright: ignore[reportMissingImports]

    tokenizer = gigatoken.Tokenizer.from_json(BYTE_LEVEL.read_text())
    return lambda texts: tokenizer.encode_batch(texts, parallel=threads > 1)


def train_byte_level(corpora: Path) -> None:
    """Make the vocabulary that gigatoken is measured with, unless it is there."""
    from tokenizers import ByteLevelBPETokenizer

    if BYTE_LEVEL.is_file():
        return
    trained = ByteLevelBPETokenizer()
    lines = [*captions.glosses(corpora), *captions.emoji_names(corpora)]
    trained.train_from_iterator(map(str.lower, lines), vocab_size=49_408, show_progress=False)
    BYTE_LEVEL.parent.mkdir(parents=True, exist_ok=True)
    BYTE_LEVEL.write_text(trained._tokenizer.to_str())


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fastclip", _fastclip, threaded=True),
        Provider("fastclip-out", _fastclip_into, threaded=True),
        Provider("fastclip-python", _fastclip_python, share=0.05),
        Provider("open_clip", _open_clip, "ftfy", "open_clip_torch", 0.05),
        Provider(
            "clean+instant", _cleaned_instant, distribution="instant-clip-tokenizer", share=0.1
        ),
        Provider("tokenizers", _tokenizers, "transformers", "tokenizers", 0.1, threaded=True),
        Provider("transformers", _transformers, "transformers", "transformers", 0.05),
        Provider("instant", _instant, "instant_clip_tokenizer", "instant-clip-tokenizer"),
        Provider(
            "gigatoken",
            _gigatoken,
            "gigatoken",
            "gigatoken",
            threaded=True,
            comparable=False,
            prepare=cleaned_copies,
        ),
    )
}
