"""`clip_loss` as a loss of sentence-transformers, which importing this needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastclip.losses.clip import MEMORY_BUDGET, clip_loss
from fastclip.ops.dispatch import Impl

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
except ImportError as error:
    raise ImportError(
        "fastclip.losses.sentence_transformers needs sentence-transformers 6 or newer: "
        "pip install 'fastclip-torch[sentence-transformers]'"
    ) from error


class SymmetricRankingLoss(MultipleNegativesRankingLoss):
    """In-batch negatives in both directions, without the matrix of similarities.

    Takes the place of ``MultipleNegativesRankingLoss(model, scale,
    directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")``: the same loss
    and gradients, in memory that grows with the batch and not with its square. Inside sentence-
    transformers' wrappers (Matryoshka and the like) it is used as that loss is.

    Args:
        model: the model that embeds both columns.
        scale: what cosine similarities are multiplied by, above 0.
        gather_across_devices: contrast the pairs of all ranks. Gradients are then exact: averaged
            over ranks they are those of the whole batch on one device.
        ring, memory_budget, impl: see `fastclip.losses.clip_loss`.

    Raises:
        ValueError: at the first batch, if it has other columns than (anchor, positive): there is no
            place for explicit negatives in a loss with two directions.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        scale: float = 20.0,
        gather_across_devices: bool = False,
        *,
        ring: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            model,
            scale,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        )
        self.ring, self.memory_budget = ring, memory_budget
        self.impl: Impl = impl

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss, [].

        Args:
            embeddings: anchors and positives, [b, D] each, of any length.
            labels: not used; anchor i belongs to positive i.
        """
        del labels
        if len(embeddings) != 2:
            raise ValueError(
                f"this loss takes two columns, anchor and positive, not {len(embeddings)}; remove "
                "the negatives or use sentence-transformers' own MultipleNegativesRankingLoss"
            )
        anchors, positives = embeddings
        return clip_loss(
            anchors,
            positives,
            self.scale,
            normalize=True,
            memory_budget=self.memory_budget,
            local=not self.gather_across_devices,
            ring=self.ring,
            impl=self.impl,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        return {
            "scale": self.scale,
            "gather_across_devices": self.gather_across_devices,
            "ring": self.ring,
            "memory_budget": self.memory_budget,
            "impl": self.impl,
        }
