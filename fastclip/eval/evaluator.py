"""A model under evaluation, and how images and texts come to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from fastclip.data.eval_loader import EvalBatch, SampleSource, eval_batches
from fastclip.distributed.runtime import Runtime
from fastclip.models.clip import Clip
from fastclip.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What every evaluation of a model needs."""

    model: Clip
    """On the runtime's device."""

    tokenizer: Tokenizer
    """Of the model's context length."""

    runtime: Runtime

    batch_size: int
    """Images or texts per forward pass of a rank."""

    workers: int
    """Decoding threads of a rank."""

    apply_orientation: bool = False
    """As in `DataConfig`."""

    @property
    def image_size(self) -> int:
        """Pixels along an edge of the model's images."""
        return self.model.config.vision.image_size

    def batches(self, source: SampleSource) -> Iterator[EvalBatch]:
        """This rank's share of the samples, once; see `eval_batches`."""
        return eval_batches(
            source,
            image_size=self.image_size,
            batch_size=self.batch_size,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            workers=self.workers,
            apply_orientation=self.apply_orientation,
        )

    def image_features(self, batch: EvalBatch) -> Tensor:
        """Of unit length, fp32 [B, D], on the runtime's device."""
        return self.model(images=batch.images.to(self.runtime.device)).image_features
