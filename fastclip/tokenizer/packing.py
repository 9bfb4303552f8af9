"""Texts without padding: the tokens of a batch one after the other, each text up to its end.

What stands behind a text's end of text has no influence on a causal tower that is read out there,
so that leaving it out is exact, and captions are short: a fifth of 77 positions, or less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which of the positions of a packed batch belong to which sequence."""

    starts: Tensor
    """int32 [B + 1]: sequence i is positions starts[i] up to starts[i + 1]."""

    lengths: tuple[int, ...]
    """Of the sequences, equal ones side by side; known to the host, so that nobody has to ask the
    device."""

    bound: int = field(init=False)
    """At least the longest length; one of few values, for what is compiled for each of them."""

    def __post_init__(self) -> None:
        longest = max(self.lengths, default=1)
        object.__setattr__(self, "bound", -(-longest // 64) * 64)

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """Sequences of one length lie side by side: (how many, of which length)."""
        return tuple((sum(1 for _ in same), length) for length, same in groupby(self.lengths))


@dataclass(frozen=True)
class PackedTokens:
    """Token ids of B texts without padding, in ascending order of length.

    Behind them there may be sequences of no text, which fill the tokens up to a round number.
    """

    ids: Tensor
    """int32 [T]."""

    positions: Tensor
    """int32 [T]: of a token in its text."""

    segments: Segments
    """Where each text is."""

    places: Tensor
    """int64 [B]: row i of the batch is the packed text number places[i]."""

    def __len__(self) -> int:
        return len(self.places)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the texts, ascending."""
        return self.segments.lengths[: len(self)]

    @classmethod
    def pack(cls, tokens: Tensor, *, multiple: int = 1) -> PackedTokens:
        """Cut rows after their end of text, which is the first largest id of a row, and join them.

        Args:
            tokens: int32 or int64 [B, L] on the CPU.
            multiple: fill up to a multiple of so many tokens, so that T takes few values.

        Raises:
            TypeError: anything else.
        """
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or tokens.is_cuda:
            raise TypeError(
                f"token rows are int32 or int64 [batch, length] on the CPU, not "
                f"{list(tokens.shape)} of {tokens.dtype} on {tokens.device}"
            )
        if tokens.numel() == 0:
            lengths = torch.zeros(len(tokens), dtype=torch.int64)
        else:
            lengths = tokens.argmax(dim=1) + 1
        lengths, order = lengths.sort(stable=True)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        columns = torch.arange(tokens.shape[1], dtype=torch.int32)
        inside = columns < lengths[:, None]
        starts = torch.zeros(len(tokens) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=starts[1:])
        ids = tokens[order][inside].to(torch.int32)
        positions = columns.expand(inside.shape)[inside]
        filler = _filler(len(ids), multiple, max(2, min(64, tokens.shape[1])))
        if filler:
            nothing = ids.new_zeros(sum(filler))
            ids, positions = torch.cat([ids, nothing]), torch.cat([positions, nothing])
            more = starts[-1] + torch.tensor(filler, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            starts = torch.cat([starts, more])
        segments = Segments(starts, (*lengths.tolist(), *filler))
        return cls(ids, positions, segments, places)

    def to(self, device: torch.device, *, non_blocking: bool = False) -> PackedTokens:
        """The same on `device`."""
        return self._replaced(lambda x: x.to(device, non_blocking=non_blocking))

    def pin(self) -> PackedTokens:
        """The same in page-locked memory."""
        return self._replaced(Tensor.pin_memory)

    def _replaced(self, moved: Callable[[Tensor], Tensor]) -> PackedTokens:
        segments = dataclasses.replace(self.segments, starts=moved(self.segments.starts))
        return PackedTokens(moved(self.ids), moved(self.positions), segments, moved(self.places))


def _filler(tokens: int, multiple: int, longest: int) -> tuple[int, ...]:
    """Lengths of sequences that bring `tokens` to a multiple; always as many, of one at least."""
    if multiple <= 1:
        return ()
    count = -(-(multiple - 1) // (longest - 1))
    spare = -(tokens + count) % multiple
    full, rest = divmod(spare, longest - 1)
    lengths = [longest] * full + ([1 + rest] if rest else [])
    return (*lengths, *[1] * (count - len(lengths)))
