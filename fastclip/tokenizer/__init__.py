"""Captions to token ids, exactly as OpenAI's CLIP and open_clip make them.

::

    tokenizer = Tokenizer(context_length=77)
    tokenizer(["a photo of a cat", "a diagram"])  # int64 [2, 77]

The work is done in C++ (csrc/). ftfy and regex are loaded when they are needed: for a text with
mojibake, and by the Python tokenizer that the C++ one is tested against.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch

from fastclip.tokenizer.backends import BackendName, choose
from fastclip.tokenizer.reduction import ReductionMask, check_reduction, reduce_batch
from fastclip.tokenizer.texts import (
    TextInput,
    as_destination,
    as_sequence,
    check_context_length,
    decoded,
)
from fastclip.tokenizer.vocabulary import (
    EOT,
    SOT,
    VOCAB_SIZE,
    CleanMode,
    Dialect,
    check_dialect,
    check_truncate,
    load_vocabulary,
)

__all__ = ["PackedIds", "Tokenizer"]


class PackedIds(NamedTuple):
    """Texts one behind the other, as attention over texts of different lengths takes them."""

    ids: torch.Tensor
    """int32 [sum of lengths]: SOT, the ids, EOT of each text."""

    cu_seqlens: torch.Tensor
    """int32 [B + 1]: where each text begins in `ids`, and its end."""

    lengths: torch.Tensor
    """int32 [B]."""


class Tokenizer:
    """The tokenizer of every CLIP model of the OpenAI and open_clip families.

    A row is SOT, the ids of the text, EOT, then zeros up to `context_length`; zero is also the id
    of "!", so take the lengths of `encode_batch` rather than counting non-zeros. One instance may
    serve several threads, and a process forked from one that has used it.

    Texts are a str, a list or tuple of str or bytes (UTF-8), a one-dimensional NumPy array of
    bytes, str or objects, or an Arrow array of strings; bytes, NumPy's and Arrow's are read in
    place.

    Args:
        context_length: length of a row in tokens, SOT and EOT included; at least 3.
        dialect: which spelling of SOT and EOT is recognised inside a text: "openai"
            (``<|startoftext|>``, ``<|endoftext|>``) or "open_clip" (``<start_of_text>``,
            ``<end_of_text>``). Any other text has the same ids in both.
        truncate: cut a text that is too long and end the row with EOT (True), or raise (False).
        clean: "lower" as OpenAI; "whitespace" keeps the case; "canonicalize" also deletes ASCII's
            punctuation, as open_clip's SigLIP models have it.
        reduction_mask: open_clip's ways of choosing what stays of a text that is too long, instead
            of its beginning: "simple", "random", "shuffle", "syntax".
        threads: how many work on one batch of the native tokenizer; None: one for each processor,
            at most 8. Batches of up to 256 texts stay on the calling thread.
        strict: hand texts with characters that the native tables do not know (a Unicode version
            other than 14 and 15) to Python, so that even those get this Python's ids.
        backend: "native", "python", or "auto": the native one if it was built.

    Raises ValueError for a setting outside these, and ImportError for a backend that is not there.
    """

    vocab_size = VOCAB_SIZE
    sot = SOT
    eot = EOT
    pad = 0

    def __init__(
        self,
        context_length: int = 77,
        dialect: Dialect = "openai",
        truncate: bool = True,
        *,
        clean: CleanMode = "lower",
        reduction_mask: ReductionMask = "",
        threads: int | None = None,
        strict: bool = False,
        backend: Literal["auto", "native", "python"] = "auto",
    ) -> None:
        check_context_length(context_length)
        check_dialect(dialect)
        if clean not in ("lower", "whitespace", "canonicalize"):
            raise ValueError(f"clean is 'lower', 'whitespace' or 'canonicalize', not {clean!r}")
        check_reduction(reduction_mask)
        check_truncate(truncate)
        self.context_length = context_length
        self.dialect: Dialect = dialect
        self.truncate = truncate
        self.clean: CleanMode = clean
        self.reduction_mask: ReductionMask = reduction_mask
        self._made_with: dict[str, Any] = {"threads": threads, "strict": strict, "backend": backend}
        self._backend = choose(backend, dialect, clean, strict, threads)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {
            "context_length": self.context_length,
            "dialect": self.dialect,
            "truncate": self.truncate,
            "clean": self.clean,
            "reduction_mask": self.reduction_mask,
            **self._made_with,
        }
        return _make, (settings,)

    @property
    def backend(self) -> BackendName:
        """What does the work: "native" or "python"."""
        return self._backend.name

    def encode(self, text: str) -> list[int]:
        """The ids of one text of any length, without SOT and EOT. Raises TypeError unless str."""
        if not isinstance(text, str):
            raise TypeError(f"a text to encode is a str, not {type(text).__name__}")
        return self._backend.encode(text)

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """The text that ids (a list, or an integer tensor [n]) stand for, a blank after each word.

        What cleaning changed stays changed: case, whitespace and the blanks around punctuation do
        not come back. Padding decodes as "!", so cut it off first. Raises ValueError for an id
        outside 0..49407 and for a tensor of more than one row.
        """
        if isinstance(ids, torch.Tensor):
            if ids.dim() != 1:
                raise ValueError(f"decode takes the ids of one text, not {list(ids.shape)}; loop")
            ids = ids.tolist()
        return load_vocabulary(self.dialect).decode(ids)

    def encode_batch(self, texts: TextInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows and their lengths: int32 [B, context_length], int32 [B].

        A length counts SOT and EOT, so it is between 2 and `context_length`. Raises TypeError for
        anything but texts, and ValueError for bytes that are not UTF-8, for a null, and for a text
        that is too long if `truncate` is off; all name the text's index.
        """
        return self._rows(texts, self.context_length, torch.int32)

    def encode_packed(self, texts: TextInput) -> PackedIds:
        """The texts one behind the other, none longer than `context_length`. Raises as
        `encode_batch`."""
        rows, lengths = self._rows(texts, self.context_length, torch.int32)
        starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
        packed = self._backend.pack(rows, lengths, int(starts[-1]))
        return PackedIds(packed, starts, lengths)

    def __call__(
        self, texts: TextInput, context_length: int | None = None, out: Any = None
    ) -> torch.Tensor:
        """Token rows as int64 [B, context_length], the face of open_clip's tokenizers.

        Args:
            texts: the texts.
            context_length: overrides the tokenizer's own for this call.
            out: where to write the rows, and what to return: a contiguous torch tensor on the CPU
                (pinned ones included) or a C-contiguous writable NumPy array, [B, context_length]
                of int32, int64 or uint16. If the call raises, what it holds is not specified.

        Raises as `encode_batch`, and TypeError or ValueError for an unfit `out`.
        """
        if context_length is None:
            context_length = self.context_length
        else:
            check_context_length(context_length)
        rows = self._rows(texts, context_length, torch.int64, out)[0]
        return rows if out is None else out

    def _rows(
        self, texts: TextInput, context_length: int, dtype: torch.dtype, out: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._backend.read(texts)
        if out is None:
            rows = torch.empty(len(batch), context_length, dtype=dtype)
        else:
            rows = as_destination(out, len(batch), context_length)
        lengths = torch.empty(len(batch), dtype=torch.int32)
        if self.reduction_mask:
            self._reduce(texts, rows, lengths)
        else:
            self._backend.fill(batch, rows, lengths, self.truncate)
        return rows, lengths

    def _reduce(self, texts: TextInput, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        plain = [decoded(text, index) for index, text in enumerate(as_sequence(texts))]
        room = rows.shape[1] - 2
        reduced = reduce_batch(plain, self.reduction_mask, room, self._backend.encode)
        rows.zero_()
        for row, ids in zip(rows, reduced, strict=True):
            row[: len(ids) + 2] = torch.tensor([SOT, *ids, EOT], dtype=row.dtype)
        lengths.copy_(torch.tensor([len(ids) + 2 for ids in reduced], dtype=torch.int32))


def _make(settings: dict[str, Any]) -> Tokenizer:
    return Tokenizer(**settings)
