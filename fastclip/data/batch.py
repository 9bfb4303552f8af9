"""What the loader gives and the step takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Image–text pairs of one rank."""

    images: Tensor
    """uint8 [B, 3, R, R], RGB; the model normalises them on its device."""

    tokens: Tensor
    """int32 [B, L], zero-padded; L may be less than the context length."""

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

    def __len__(self) -> int:
        return self.images.shape[0]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The batch with images, tokens and ids on `device`."""
        return dataclasses.replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            lengths=self.lengths.to(device, non_blocking=non_blocking),
            ids=None if self.ids is None else self.ids.to(device, non_blocking=non_blocking),
        )

    def pin(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU overlap with work."""
        return dataclasses.replace(
            self,
            images=self.images.pin_memory(),
            tokens=self.tokens.pin_memory(),
            lengths=self.lengths.pin_memory(),
            ids=None if self.ids is None else self.ids.pin_memory(),
        )
