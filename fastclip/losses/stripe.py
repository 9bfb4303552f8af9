"""What both losses do with this rank's stripe of S before and after its passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.distributed.collectives import all_gather_rows, reduce_scatter_rows, world_size
from fastclip.losses.common import LossGradients, Ranks
from fastclip.losses.ring import Block
from fastclip.ops.dispatch import Impl
from fastclip.ops.pairs import finish_pairs, prepare_pairs


@dataclass(frozen=True)
class Settings:
    """How a loss is computed; the same on every rank."""

    ranks: Ranks
    local: bool
    dtype: torch.dtype
    """In which features are multiplied; products are summed in fp32, or fp64 for fp64."""

    normalize: bool
    impl: Impl
    ring: bool = False
    label_smoothing: float = 0.0
    memory_budget: int = 0

    @property
    def alone(self) -> bool:
        """Whether nothing has to travel."""
        return self.local or world_size(self.ranks.group) == 1


class Stripe:
    """This rank's rows, prepared; their own columns, and how to bring both gradients home."""

    def __init__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ids: Tensor | None,
        settings: Settings,
    ) -> None:
        self.image, self.text = image_features, text_features
        self.settings, self.ranks, self.impl = settings, settings.ranks, settings.impl
        rows, columns, self.product, self.row_norm, self.own_column_norm = prepare_pairs(
            image_features, text_features, settings.dtype, settings.normalize, settings.impl
        )
        prepared = settings.normalize or image_features.dtype != settings.dtype
        self.rows = rows if prepared else image_features
        self.own_columns = columns if prepared else text_features
        self.scale = logit_scale.reshape(())
        self.row_ids = ids

    def hand_over(self) -> list[Tensor]:
        """Give its tensors away, for autograd to keep and, after a backward, to free.

        In compiled code there are none to give: the compiler knows how long each is needed.
        """
        if torch.compiler.is_compiling():
            return []
        self._lent = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        return [vars(self).pop(name) for name in self._lent]

    def take_back(self, tensors: Sequence[Tensor]) -> None:
        """What `hand_over` gave."""
        if tensors:
            vars(self).update(zip(self._lent, tensors, strict=True))

    def own_block(self, terms: Tensor | None = None) -> Block:
        """This rank's columns as they go round."""
        ids = None if self.row_ids is None else self.row_ids.contiguous()
        return Block(self.own_columns.contiguous(), self.own_column_norm, ids, terms, own=True)

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks below each other."""
        return x if self.settings.alone else all_gather_rows(x, self.ranks.sizes, self.ranks.group)

    def scatter(self, x: Tensor) -> Tensor:
        """This rank's rows of the sum over ranks; nothing ([0]) stays nothing."""
        if self.settings.alone or x.ndim == 1:
            return x
        return reduce_scatter_rows(x, self.ranks.sizes, self.ranks.group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if not self.settings.alone:
            dist.all_reduce(x, group=self.ranks.group)
        return x

    def finish(
        self,
        row_products: Tensor,
        column_products: Tensor,
        own_entry: Tensor,
        upstream: Tensor,
        need: tuple[bool, bool],
        terms: int,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's features by the rank convention, in their dtype.

        Args:
            terms: what each pair's part of the loss is divided by, besides N.
        """
        ranks = 1 if self.settings.alone else world_size(self.ranks.group)
        return finish_pairs(
            row_products,
            column_products,
            self.rows,
            self.own_columns,
            own_entry,
            self.image,
            self.text,
            self.scale,
            upstream,
            ranks / (terms * self.ranks.count),
            self.settings.normalize,
            *need,
            self.impl,
        )


def as_gradients(
    stripe: Stripe, d_image: Tensor, d_text: Tensor, d_scale: Tensor, d_bias: Tensor | None
) -> LossGradients:
    """The gradients, sums over ranks where there is one value for all of them."""
    if d_bias is None:
        return LossGradients(d_image, d_text, stripe.sum(d_scale), None)
    both = stripe.sum(torch.stack((d_scale, d_bias)))
    return LossGradients(d_image, d_text, both[0], both[1])
