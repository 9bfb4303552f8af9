"""Captions to token ids, exactly as OpenAI's CLIP and open_clip make them.

::

    tokenizer = Tokenizer(context_length=77)
    tokenizer(["a photo of a cat", "a diagram"])  # int64 [2, 77]

ftfy and regex are loaded when a Tokenizer is made, not when this package is imported.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from fastclip.tokenizer.vocabulary import EOT, SOT, VOCAB_SIZE, Dialect

__all__ = ["Tokenizer"]

_SHOWN_CHARACTERS = 60  # of an offending text, in an error message


class Tokenizer:
    """The tokenizer of every CLIP model of the OpenAI and open_clip families.

    A row is SOT, the ids of the text, EOT, then zeros up to `context_length`; zero is also the id
    of "!", so take the lengths of `encode_batch` rather than counting non-zeros. One instance may
    serve several threads.

    Args:
        context_length: length of a row in tokens, SOT and EOT included; at least 3.
        dialect: which spelling of SOT and EOT is recognised inside a text: "openai"
            (``<|startoftext|>``, ``<|endoftext|>``) or "open_clip" (``<start_of_text>``,
            ``<end_of_text>``). Any other text has the same ids in both.
        truncate: cut a text that is too long and end the row with EOT (True), or raise (False).

    Raises ValueError for a setting outside these, and ImportError without ftfy or regex.
    """

    vocab_size = VOCAB_SIZE
    sot = SOT
    eot = EOT
    pad = 0

    def __init__(
        self, context_length: int = 77, dialect: Dialect = "openai", truncate: bool = True
    ) -> None:
        _check_context_length(context_length)
        # Imported here, so that importing this package needs neither ftfy nor regex.
        from fastclip.tokenizer.reference import ReferenceTokenizer

        self.context_length = context_length
        self.dialect: Dialect = dialect
        self.truncate = truncate
        self._text = ReferenceTokenizer(dialect)

    @property
    def backend(self) -> Literal["python"]:
        """What does the work: "python"."""
        return "python"

    def encode(self, text: str) -> list[int]:
        """The ids of one text of any length, without SOT and EOT. Raises TypeError unless str."""
        if not isinstance(text, str):
            raise TypeError(f"a text to encode is a str, not {type(text).__name__}")
        return self._text.encode(text)

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
        return self._text.decode(ids)

    def encode_batch(self, texts: str | Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows and their lengths: int32 [B, context_length], int32 [B].

        A length counts SOT and EOT, so it is between 2 and `context_length`. Raises TypeError for
        anything but texts, and ValueError for a text that is too long if `truncate` is off; both
        name the text's index.
        """
        return self._rows(texts, self.context_length)

    def __call__(
        self, texts: str | Sequence[str], context_length: int | None = None
    ) -> torch.Tensor:
        """Token rows as int64 [B, context_length], the face of open_clip's tokenizers.

        `context_length` overrides the tokenizer's own for this call. Raises as `encode_batch`.
        """
        if context_length is None:
            context_length = self.context_length
        else:
            _check_context_length(context_length)
        return self._rows(texts, context_length)[0].to(torch.int64)

    def _rows(
        self, texts: str | Sequence[str], context_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = _checked(texts)
        flat = array("i", bytes(4 * len(batch) * context_length))
        lengths = array("i", bytes(4 * len(batch)))
        for index, text in enumerate(batch):
            ids = [SOT, *self._text.encode(text), EOT]
            if len(ids) > context_length:
                if not self.truncate:
                    raise ValueError(
                        f"texts[{index}] ({_beginning(text)}) has {len(ids)} tokens, SOT and EOT "
                        f"included, and the context length is {context_length}; shorten the text, "
                        "raise context_length, or set truncate=True to cut it"
                    )
                ids[context_length - 1 :] = [EOT]
            start = index * context_length
            flat[start : start + len(ids)] = array("i", ids)
            lengths[index] = len(ids)
        if not batch:
            return torch.zeros(0, context_length, dtype=torch.int32), torch.zeros(0).int()
        rows = torch.frombuffer(flat, dtype=torch.int32).view(len(batch), context_length)
        return rows, torch.frombuffer(lengths, dtype=torch.int32)


def _check_context_length(context_length: int) -> None:
    if isinstance(context_length, bool) or not isinstance(context_length, int):
        raise TypeError(f"context_length is an int, not {type(context_length).__name__}")
    if context_length < 3:
        raise ValueError(
            f"context_length is {context_length}; a row holds SOT, at least one token, and EOT, "
            "so it is at least 3"
        )


def _checked(texts: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(texts, str):
        return (texts,)
    if isinstance(texts, (bytes, bytearray)) or not isinstance(texts, Sequence):
        raise TypeError(
            f"texts is a str or a sequence of str, not {type(texts).__name__}; "
            "decode bytes, and turn other collections into a list"
        )
    batch = tuple(texts)
    for index, text in enumerate(batch):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, not str")
    return batch


def _beginning(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")
