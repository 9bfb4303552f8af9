"""The two tokenizers behind one face: the native one, and the readable Python one.

Both fill rows of ids and give the same ids; `choose` picks one.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Sequence, Sized
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from fastclip.tokenizer.texts import (
    NativeTexts,
    TextInput,
    as_native,
    as_sequence,
    decoded,
    not_utf8,
    too_long,
)
from fastclip.tokenizer.vocabulary import EOT, MERGES_PATH, SOT, SPECIAL_TOKENS, CleanMode, Dialect

if TYPE_CHECKING:
    from fastclip.tokenizer import _native
    from fastclip.tokenizer.reference import ReferenceTokenizer

BackendName = Literal["native", "python"]
KNOWN_UNICODE = (14, 15)  # of which csrc/tables holds tables
_DEFAULT_THREADS = 8


class Backend(Protocol):
    """Texts to ids. Safe to share between threads."""

    name: BackendName

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without SOT and EOT."""
        ...

    def read(self, texts: TextInput) -> Sized:
        """The texts in the form that `fill` takes. Raises TypeError for anything but texts."""
        ...

    def fill(self, batch: Any, rows: torch.Tensor, lengths: torch.Tensor, truncate: bool) -> None:
        """Write rows [B, context_length] and their int32 lengths [B], both ends included.

        Raises ValueError, with the rows unspecified, for a text that is too long (unless
        `truncate`) or bytes that are not UTF-8, naming the first.
        """
        ...

    def pack(self, rows: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
        """int32 [total]: rows of int32 without their padding, one behind the other."""
        ...


def choose(
    wanted: Literal["auto", "native", "python"],
    dialect: Dialect,
    clean: CleanMode,
    strict: bool,
    threads: int | None,
) -> Backend:
    """The tokenizer that is `wanted`; "auto" is the native one, or else Python's, with a warning.

    Raises ImportError for "native" where it was not built, and for "python" without ftfy and regex.
    """
    if wanted == "python":
        return PythonBackend(dialect, clean)
    if wanted not in ("auto", "native"):
        raise ValueError(f"backend is 'auto', 'native' or 'python', not {wanted!r}")
    try:
        return NativeBackend(dialect, clean, strict, threads)
    except ImportError as error:
        if wanted == "native":
            raise ImportError(_NOT_BUILT) from error
        _warn_once(f"{_NOT_BUILT}; until then the Python one is used, about 100 times slower")
        return PythonBackend(dialect, clean)


_NOT_BUILT = (
    "the native tokenizer was not built: it needs a C++17 compiler when fastclip is installed; "
    "FASTCLIP_NATIVE=1 pip install --force-reinstall --no-deps fastclip-torch shows what is missing"
)


@lru_cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@lru_cache
def _vocabulary() -> _native.Vocabulary:
    from fastclip.tokenizer import _native

    return _native.Vocabulary(MERGES_PATH.read_bytes())


class NativeBackend:
    """The tokenizer of csrc/. ftfy is loaded at the first text with mojibake, if there is one."""

    name: BackendName = "native"

    def __init__(
        self,
        dialect: Dialect,
        clean: CleanMode = "lower",
        strict: bool = False,
        threads: int | None = None,
        scan: Literal["best", "portable"] = "best",
    ) -> None:
        from fastclip.tokenizer import _native

        if threads is None:
            threads = min(_DEFAULT_THREADS, len(os.sched_getaffinity(0)))
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads is a positive int or None, not {threads!r}")
        version = int(unicodedata.unidata_version.split(".")[0])
        if version not in KNOWN_UNICODE and not strict:
            _warn_once(
                f"this Python knows Unicode {unicodedata.unidata_version}, the native tokenizer "
                f"{KNOWN_UNICODE[0]} and {KNOWN_UNICODE[-1]}: characters assigned since may be "
                "split otherwise than OpenAI's code would here; strict=True hands texts that have "
                "one to Python"
            )
        self.settings: tuple[Dialect, CleanMode] = (dialect, clean)
        self._python: ReferenceTokenizer | None = None
        self._native = _native.Native(
            _vocabulary(),
            *SPECIAL_TOKENS[dialect],
            clean=clean,
            strict=strict,
            unicode_version=version,
            threads=threads,
            scan=scan,
        )

    @property
    def instructions(self) -> str:
        """What scans ASCII: "avx512", "avx2" or "portable"."""
        return self._native.scan

    def encode(self, text: str) -> list[int]:
        return self._native.ids(text, self._repair, self._encode_in_python)

    def read(self, texts: TextInput) -> NativeTexts:
        return as_native(texts)

    def fill(
        self,
        batch: NativeTexts,
        rows: torch.Tensor,
        lengths: torch.Tensor,
        truncate: bool,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`numbers`: what errors call the texts, if `batch` is a part of them."""
        context_length = rows.shape[1]
        problem = self._native.rows(
            batch.texts,
            rows.data_ptr(),
            context_length,
            rows.element_size(),
            lengths.data_ptr(),
            truncate,
            self._repair,
            self._encode_in_python,
        )
        if problem is not None:
            index, kind, detail = problem
            number = index if numbers is None else numbers[index]
            if kind == "utf-8":
                raise not_utf8(number, detail)
            raise too_long(number, batch.texts.as_str(index), detail, context_length)

    def pack(self, rows: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
        from fastclip.tokenizer import _native

        packed = torch.empty(total, dtype=torch.int32)
        count, context_length = rows.shape
        _native.pack(rows.data_ptr(), lengths.data_ptr(), count, context_length, packed.data_ptr())
        return packed

    def _repair(self, text: str) -> str:
        from fastclip.tokenizer.reference import clean

        return clean(text, self.settings[1])

    def _encode_in_python(self, text: str) -> list[int]:
        if self._python is None:
            from fastclip.tokenizer.reference import ReferenceTokenizer

            self._python = ReferenceTokenizer(*self.settings)
        return self._python.encode(text)


class PythonBackend:
    """fastclip.tokenizer.reference, text by text."""

    name: BackendName = "python"

    def __init__(self, dialect: Dialect, clean: CleanMode = "lower") -> None:
        # Imported here, so that importing this package needs neither ftfy nor regex.
        from fastclip.tokenizer.reference import ReferenceTokenizer

        self._text = ReferenceTokenizer(dialect, clean)

    def encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def read(self, texts: TextInput) -> Sequence[str | bytes]:
        return as_sequence(texts)

    def fill(
        self,
        batch: Sequence[str | bytes],
        rows: torch.Tensor,
        lengths: torch.Tensor,
        truncate: bool,
    ) -> None:
        context_length = rows.shape[1]
        filled = []
        counts = []
        for index, item in enumerate(batch):
            text = decoded(item, index)
            ids = [SOT, *self._text.encode(text), EOT]
            if len(ids) > context_length:
                if not truncate:
                    raise too_long(index, text, len(ids), context_length)
                ids[context_length - 1 :] = [EOT]
            counts.append(len(ids))
            filled.append(ids + [0] * (context_length - len(ids)))
        if filled:
            rows.copy_(torch.tensor(filled))
            lengths.copy_(torch.tensor(counts))

    def pack(self, rows: torch.Tensor, lengths: torch.Tensor, total: int) -> torch.Tensor:
        return rows[torch.arange(rows.shape[1]) < lengths[:, None]]
