"""What the loader gives and the step takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastclip.tokenizer.packing import PackedTokens


@dataclass(frozen=True)
class Batch:
    """Image–text pairs of one rank."""

    images: Tensor
    """uint8 [B, 3, R, R], RGB; the model normalises them on its device."""

    tokens: Tensor
    """int32 [B, L], zero-padded; L may be less than the context length. Where there are packed
    ones, these rows stay on the host."""

    lengths: Tensor
    """int32 [B], tokens of each row with start and end of text."""

    ids: Tensor | None
    """int64 [B]; pairs with equal ids are positives of each other. None: there are no others."""

    keys: tuple[str, ...]
    """Names of the samples."""

    captions: tuple[str, ...]
    """The texts that were tokenised."""

    metadata: tuple[dict[str, Any], ...]
    """The samples' json members; empty where there is none or it was not needed."""

    packed: tuple[PackedTokens, ...] | None = None
    """The tokens without padding, of each micro-batch in turn."""

    ready: torch.cuda.Event | None = None
    """After which images that a GPU has decoded may be used on another stream."""

    def __len__(self) -> int:
        return self.images.shape[0]

    def computed_lengths(self) -> list[int]:
        """Tokens that each text is computed with, padding included; [] without texts."""
        if self.packed is None:
            return [self.tokens.shape[1]] * min(len(self), 1)
        return [length for part in self.packed for length in part.lengths]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The batch with images, ids, and tokens (packed, or else in rows) on `device`."""

        if self.ready is not None:
            stream = torch.cuda.current_stream(self.images.device)
            stream.wait_event(self.ready)
            self.images.record_stream(stream)

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        batch = dataclasses.replace(
            self, images=moved(self.images), ids=None if self.ids is None else moved(self.ids)
        )
        if self.packed is None:
            return dataclasses.replace(
                batch, tokens=moved(self.tokens), lengths=moved(self.lengths)
            )
        packed = tuple(part.to(device, non_blocking=non_blocking) for part in self.packed)
        return dataclasses.replace(batch, packed=packed)

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with work."""
        images = self.images if self.images.is_cuda else self.images.pin_memory()
        ids = None if self.ids is None else self.ids.pin_memory()
        if self.packed is not None:  # in rows they stay on the host
            packed = tuple(part.pin() for part in self.packed)
            return dataclasses.replace(self, images=images, ids=ids, packed=packed)
        return dataclasses.replace(
            self,
            images=images,
            ids=ids,
            tokens=self.tokens.pin_memory(),
            lengths=self.lengths.pin_memory(),
        )
