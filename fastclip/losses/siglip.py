"""The sigmoid loss (SigLIP, arXiv 2303.15343), exact over all ranks.

Every pair of an image and a text is its own yes-or-no question, so there are no statistics to
combine: one tower is gathered, each rank answers for its rows, and the gathered tower's gradient is
reduce-scattered. Forward and backward communicate, so that every rank must run both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.losses.common import (
    LossGradients,
    agree,
    check_module_arguments,
    operand_dtype,
    refuse_second_derivative,
    scalar,
)
from fastclip.losses.ring import Block, ring_lap
from fastclip.losses.stripe import Settings, Stripe, as_gradients
from fastclip.ops.dispatch import Impl
from fastclip.ops.sigmoid import sigmoid_loss, sigmoid_products


class _SigmoidStripe(Stripe):
    """One pass makes loss and gradients: where a backward may follow, the forward makes both."""

    def forward(self, bias: Tensor, need: tuple[bool, bool] | None) -> Tensor:
        """The global loss, [], fp32 (fp64 for fp64 features).

        Args:
            need: which features' gradients are wanted; None: no gradient is.
        """
        self.bias = bias.reshape(())
        if need is None:
            return self.sum(self.loss())
        loss, self.row_products, self.column_products, *scalars = self.loss_and_products(need)
        self.d_scale, self.d_bias, self.own_entry = scalars
        return self.sum(loss)

    def backward(self, need: tuple[bool, bool], upstream: Tensor) -> LossGradients:
        """Gradients by the rank convention; features' in their dtype, not needed ones [0]."""
        products = self.row_products, self.column_products
        features = self.finish(*products, self.own_entry, upstream, need, 1)
        return as_gradients(self, *features, self.d_scale * upstream, self.d_bias * upstream)

    def loss(self) -> Tensor:
        """This rank's part of the loss."""
        raise NotImplementedError

    def loss_and_products(self, need: tuple[bool, bool]) -> tuple[Tensor, ...]:
        """`sigmoid_products` of this rank's rows, the columns' products being back home."""
        raise NotImplementedError


class _GatheredStripe(_SigmoidStripe):
    """The rows against all columns at once."""

    def loss(self) -> Tensor:
        operands, ids = self._gathered()
        return sigmoid_loss(*operands, *ids, self.impl)

    def loss_and_products(self, need: tuple[bool, bool]) -> tuple[Tensor, ...]:
        operands, ids = self._gathered()
        loss, of_rows, of_columns, *rest = sigmoid_products(
            *operands, self.product, *ids, *need, self.impl
        )
        return loss, of_rows, self.scatter(of_columns), *rest

    def _gathered(self) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        column_ids = None if self.row_ids is None else self.gather(self.row_ids)
        operands = (self.rows, self.gather(self.own_columns), self.scale, self.bias)
        return operands, (self.row_ids, column_ids, self.ranks.count, self.ranks.offset)


class _RingStripe(_SigmoidStripe):
    """The rows against one rank's columns after the other; no rank ever holds a whole tower."""

    def loss(self) -> Tensor:
        loss = self.product.new_zeros(())

        def visit(block: Block, carried: Tensor) -> Tensor:
            nonlocal loss
            operands = (self.rows, block.columns, self.scale, self.bias)
            loss = loss + sigmoid_loss(*operands, *self._ids(block), self.impl)
            return carried

        ring_lap(self.own_block(), self.product.new_empty((len(self.rows), 0)), self.ranks, visit)
        return loss

    def loss_and_products(self, need: tuple[bool, bool]) -> tuple[Tensor, ...]:
        sums = [self.product.new_zeros(()) for _ in range(4)]  # loss, rows' products, scale, bias
        own_entry = self.product

        def visit(block: Block, carried: Tensor) -> Tensor:
            nonlocal sums, own_entry
            operands = (self.rows, block.columns, self.scale, self.bias, self.product)
            loss, of_rows, of_columns, d_scale, d_bias, own_entry = sigmoid_products(
                *operands, *self._ids(block), *need, self.impl
            )
            parts = (loss, of_rows, d_scale, d_bias)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
            return carried + of_columns if need[1] else carried

        dims = self.own_columns.shape[1] if need[1] else 0
        carried = self.product.new_zeros((len(self.rows), dims))
        of_columns = ring_lap(self.own_block(), carried, self.ranks, visit)
        loss, of_rows, d_scale, d_bias = sums
        return loss, of_rows, of_columns, d_scale, d_bias, own_entry

    def _ids(self, block: Block) -> tuple[Tensor | None, Tensor | None, int, int]:
        offset = 0 if block.own else block.columns.shape[0]
        return self.row_ids, block.ids, self.ranks.count, offset


def _stripe(*arguments: Any) -> _GatheredStripe | _RingStripe:
    settings = arguments[-1]
    ring = settings.ring and not settings.alone
    return _RingStripe(*arguments) if ring else _GatheredStripe(*arguments)


class _SigLipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ids: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            stripe = _stripe(image_features, text_features, logit_scale, ids, settings)
            need = ctx.needs_input_grad[:4]
            loss = stripe.forward(logit_bias, need[:2] if any(need) else None)
        inputs = (image_features, text_features, logit_scale, logit_bias, ids)
        ctx.save_for_backward(*inputs, *stripe.hand_over())
        ctx.stripe = stripe
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Also refuses tensors changed in place.
        image, text, scale, bias, _, *tensors = ctx.saved_tensors
        inputs = (image, text, scale, bias)
        ctx.stripe.take_back(tensors)
        need_image, need_text = ctx.needs_input_grad[:2]
        with torch.autocast(image.device.type, enabled=False):
            gradients = ctx.stripe.backward((need_image, need_text), grad_outputs[0])
            ctx.stripe.hand_over()
            returned = [
                gradient.to(x.dtype).reshape(x.shape) if needed else None
                for gradient, x, needed in zip(
                    gradients, inputs, ctx.needs_input_grad[:4], strict=True
                )
            ]
        return (*returned, None, None)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    normalize: bool = False,
    group: ProcessGroup | None = None,
    local: bool = False,
    ring: bool = False,
    ranks_alike: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Sigmoid loss over all N·N combinations of the pairs of all ranks, divided by N.

    Args:
        image_features: [b, D] of this rank; b may differ between ranks and be 0. fp32, bf16, fp16
            or fp64; under autocast they are multiplied in autocast's dtype.
        text_features: [b, D], row i belonging to image i; the same dtype.
        logit_scale: the exponentiated scale, [] or [1], or a number.
        logit_bias: [] or [1], or a number; the paper starts at -10.
        ids: int64 [b]; pairs with equal ids are positives of each other, each combination of them
            answered with yes. None: each pair is its own only positive.
        normalize, group, local, ring, ranks_alike, impl: as for `clip_loss`.

    Returns:
        The loss, [], fp32, the same on every rank. Its gradients averaged over ranks (as DDP and
        ZeRO do) are those of the concatenated batch.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit here or between ranks.
    """
    settings = _settings(
        image_features, text_features, ids, normalize, group, local, ring, ranks_alike, impl
    )
    scale = scalar(logit_scale, "logit_scale", image_features)
    bias = scalar(logit_bias, "logit_bias", image_features)
    loss: Tensor = _SigLipLoss.apply(  # pyright: ignore[reportAssignmentType]
        image_features, text_features, scale, bias, ids, settings
    )
    return loss


@torch.no_grad()
def siglip_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    normalize: bool = False,
    group: ProcessGroup | None = None,
    local: bool = False,
    ring: bool = False,
    ranks_alike: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, LossGradients]:
    """`siglip_loss` and its gradients in one evaluation, without autograd."""
    settings = _settings(
        image_features, text_features, ids, normalize, group, local, ring, ranks_alike, impl
    )
    scale = scalar(logit_scale, "logit_scale", image_features)
    bias = scalar(logit_bias, "logit_bias", image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        stripe = _stripe(image_features, text_features, scale, ids, settings)
        loss = stripe.forward(bias, (True, True))
        gradients = stripe.backward((True, True), torch.ones_like(loss))
    assert gradients.d_logit_bias is not None
    return loss, gradients._replace(
        d_logit_scale=gradients.d_logit_scale.to(scale.dtype).reshape(scale.shape),
        d_logit_bias=gradients.d_logit_bias.to(bias.dtype).reshape(bias.shape),
    )


def _settings(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    normalize: bool,
    group: ProcessGroup | None,
    local: bool,
    ring: bool,
    ranks_alike: bool,
    impl: Impl,
) -> Settings:
    return Settings(
        ranks=agree(image_features, text_features, ids, group, local, ranks_alike, normalize, ring),
        local=local,
        dtype=operand_dtype(image_features),
        normalize=normalize,
        impl=impl,
        ring=ring,
    )


class SigLipLoss(nn.Module):
    """`siglip_loss` as a module that takes the place of open_clip's.

    Args:
        cache_labels, dist_impl: accepted; they choose between layouts that this loss does not need.
        rank, world_size: checked against the group. world_size=1 keeps the loss on this rank's
            pairs, as in open_clip; None takes the group as it is.
        group, normalize, ring, ranks_alike, impl: see `siglip_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        group: ProcessGroup | None = None,
        normalize: bool = False,
        ring: bool = False,
        ranks_alike: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        del cache_labels
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is bidir, shift, reduce or gather, not {dist_impl!r}")
        self.local = check_module_arguments(group, rank, world_size, use_horovod=False)
        self.group = group
        self.normalize, self.ring = normalize, ring
        self.ranks_alike = ranks_alike
        self.impl: Impl = impl

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits of this rank's images and texts, [b, b]; for inspection, training needs none."""
        if self.normalize:
            image_features, text_features = F.normalize(image_features), F.normalize(text_features)
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, [], or ``{"contrastive_loss": loss}``; see `siglip_loss` for the arguments."""
        loss = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            0.0 if logit_bias is None else logit_bias,
            ids=ids,
            normalize=self.normalize,
            group=self.group,
            local=self.local,
            ring=self.ring,
            ranks_alike=self.ranks_alike,
            impl=self.impl,
        )
        return {"contrastive_loss": loss} if output_dict else loss
