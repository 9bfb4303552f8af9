"""The sigmoid loss (SigLIP, arXiv 2303.15343), exact over all ranks.

Every pair of an image and a text is its own yes-or-no question, so there are no statistics to
combine: one tower is gathered, each rank answers for its rows, and the gathered tower's gradient is
reduce-scattered. Forward and backward communicate, so that every rank must run both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.distributed.collectives import all_gather_rows, reduce_scatter_rows, world_size
from fastclip.losses.common import (
    LossGradients,
    Ranks,
    agree,
    check_module_arguments,
    refuse_second_derivative,
    scalar,
)
from fastclip.ops.dispatch import Impl
from fastclip.ops.sigmoid import sigmoid_gradients, sigmoid_loss


class _Stripe:
    """This rank's rows against all columns."""

    def __init__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ids: Tensor | None,
        ranks: Ranks,
        local: bool,
        impl: Impl,
    ) -> None:
        self.ranks = ranks
        self.impl = impl
        self.alone = local or world_size(ranks.group) == 1
        self.operands = (
            image_features,
            self._gather(text_features),
            logit_scale.reshape(()),
            logit_bias.reshape(()),
        )
        self.ids = (ids, None if ids is None else self._gather(ids))

    def forward(self) -> Tensor:
        """The global loss, [], fp32 (fp64 for fp64 features)."""
        loss = self._sum(sigmoid_loss(*self.operands, *self.ids, self.ranks.offset, self.impl))
        wide = self.operands[0].dtype == torch.float64
        return loss if wide else loss.float()

    def backward(self, need_rows: bool, need_columns: bool) -> LossGradients:
        """Gradients by the rank convention, in the compute dtype."""
        d_image, d_text, d_scale, d_bias = sigmoid_gradients(
            *self.operands, *self.ids, self.ranks.offset, need_rows, need_columns, self.impl
        )
        ranks = 1 if self.alone else world_size(self.ranks.group)
        if not self.alone and need_columns:
            d_text = reduce_scatter_rows(d_text, self.ranks.sizes, self.ranks.group)
        both = self._sum(torch.stack((d_scale, d_bias)))
        return LossGradients(d_image.mul_(ranks), d_text.mul_(ranks), both[0], both[1])

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.alone else all_gather_rows(x, self.ranks.sizes, self.ranks.group)

    def _sum(self, x: Tensor) -> Tensor:
        if not self.alone:
            dist.all_reduce(x, group=self.ranks.group)
        return x


class _SigLipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        ids: Tensor | None,
        ranks: Ranks,
        local: bool,
        impl: Impl,
    ) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            stripe = _Stripe(
                image_features, text_features, logit_scale, logit_bias, ids, ranks, local, impl
            )
            loss = stripe.forward()
        ctx.save_for_backward(image_features, text_features, logit_scale, logit_bias, ids)
        ctx.stripe = stripe
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        *inputs, _ = ctx.saved_tensors  # also refuses tensors changed in place
        need_image, need_text = ctx.needs_input_grad[:2]
        with torch.autocast(inputs[0].device.type, enabled=False):
            gradients = ctx.stripe.backward(need_image, need_text)
            returned = [
                (gradient * grad_outputs[0]).to(x.dtype).reshape(x.shape) if needed else None
                for gradient, x, needed in zip(
                    gradients, inputs, ctx.needs_input_grad[:4], strict=True
                )
            ]
        return (*returned, *(None,) * 4)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    local: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Sigmoid loss over all N·N combinations of the pairs of all ranks, divided by N.

    Args:
        image_features: [b, D] of this rank, usually of unit length; b may differ between ranks
            and be 0. fp32, bf16, fp16 or fp64.
        text_features: [b, D], row i belonging to image i; the same dtype.
        logit_scale: the exponentiated scale, [] or [1], or a number.
        logit_bias: [] or [1], or a number; the paper starts at -10.
        ids: int64 [b]; pairs with equal ids are positives of each other, each combination of them
            answered with yes. None: each pair is its own only positive.
        group, local, impl: as for `clip_loss`.

    Returns:
        The loss, [], fp32, the same on every rank. Its gradients averaged over ranks (as DDP and
        ZeRO do) are those of the concatenated batch.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit here or between ranks.
    """
    ranks = agree(image_features, text_features, ids, group, local)
    scale = scalar(logit_scale, "logit_scale", image_features)
    bias = scalar(logit_bias, "logit_bias", image_features)
    loss: Tensor = _SigLipLoss.apply(  # pyright: ignore[reportAssignmentType]
        image_features, text_features, scale, bias, ids, ranks, local, impl
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
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, LossGradients]:
    """`siglip_loss` and its gradients in one evaluation, without autograd."""
    ranks = agree(image_features, text_features, ids, group, False)
    scale = scalar(logit_scale, "logit_scale", image_features)
    bias = scalar(logit_bias, "logit_bias", image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        stripe = _Stripe(image_features, text_features, scale, bias, ids, ranks, False, impl)
        loss = stripe.forward()
        gradients = stripe.backward(need_rows=True, need_columns=True)
    assert gradients.d_logit_bias is not None
    return loss, LossGradients(
        gradients.d_image_features.to(image_features.dtype),
        gradients.d_text_features.to(text_features.dtype),
        gradients.d_logit_scale.to(scale.dtype).reshape(scale.shape),
        gradients.d_logit_bias.to(bias.dtype).reshape(bias.shape),
    )


class SigLipLoss(nn.Module):
    """`siglip_loss` as a module that takes the place of open_clip's.

    Args:
        cache_labels, dist_impl: accepted; they choose between layouts that this loss does not need.
        rank, world_size: checked against the group. world_size=1 keeps the loss on this rank's
            pairs, as in open_clip; None takes the group as it is.
        group, impl: see `siglip_loss`.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        group: ProcessGroup | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        del cache_labels
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl is bidir, shift, reduce or gather, not {dist_impl!r}")
        self.local = check_module_arguments(group, rank, world_size, use_horovod=False)
        self.group = group
        self.impl: Impl = impl

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits of this rank's images and texts, [b, b]; for inspection, training needs none."""
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
            group=self.group,
            local=self.local,
            impl=self.impl,
        )
        return {"contrastive_loss": loss} if output_dict else loss
