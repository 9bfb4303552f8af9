"""The softmax contrastive loss (arXiv 2103.00020, Figure 3), exact over all ranks.

One tower's features are gathered, each rank computes its stripe of the similarity matrix, column
sums are combined, and the gathered tower's gradient is reduce-scattered: the stripe's work is 1/W
of the matrix, and half the features travel that gathering both towers would move. Forward and
backward communicate, so that every rank must run both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.distributed.collectives import all_gather_rows, reduce_scatter_rows, world_size
from fastclip.kernels.reference import contrastive_loss
from fastclip.losses.common import (
    LossGradients,
    Ranks,
    agree,
    check_module_arguments,
    note_exact_gradients,
    refuse_second_derivative,
    scalar,
)
from fastclip.ops.contrastive import contrastive_gradients, contrastive_statistics
from fastclip.ops.dispatch import Impl


class _Stripe:
    """This rank's rows against all columns: forward once, then gradients."""

    def __init__(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ids: Tensor | None,
        label_smoothing: float,
        ranks: Ranks,
        local: bool,
        impl: Impl,
    ) -> None:
        self.ranks = ranks
        self.impl = impl
        self.alone = local or world_size(ranks.group) == 1
        self.rows = image_features
        self.columns = self._gather(text_features)
        self.scale = logit_scale.reshape(())
        self.ids = (ids, None if ids is None else self._gather(ids))
        self.label_smoothing = label_smoothing

    def forward(self) -> Tensor:
        """The global loss, [], fp32 (fp64 for fp64 features)."""
        self.others_of_row, others_of_column, own, gap = contrastive_statistics(
            self.rows,
            self.columns,
            self.scale,
            *self.ids,
            self.ranks.offset,
            self.label_smoothing,
            self.impl,
        )
        self.others_of_column = self._combine(others_of_column)
        self.own_of_column = self._gather(own)
        first = self.ranks.offset
        mine = slice(first, first + self.rows.shape[0])
        loss = contrastive_loss(
            self.others_of_row,
            self.others_of_column[mine],
            own,
            gap,
            self.ranks.count,
        )
        return self._sum(loss).to(own.dtype)

    def backward(self, need_rows: bool, need_columns: bool) -> LossGradients:
        """Gradients by the rank convention, in the compute dtype."""
        d_image, d_text, d_scale = contrastive_gradients(
            self.rows,
            self.columns,
            self.scale,
            self.others_of_row,
            self.others_of_column,
            self.own_of_column,
            *self.ids,
            self.ranks.offset,
            self.label_smoothing,
            need_rows,
            need_columns,
            self.impl,
        )
        ranks = 1 if self.alone else world_size(self.ranks.group)
        if not self.alone and need_columns:
            d_text = reduce_scatter_rows(d_text, self.ranks.sizes, self.ranks.group)
        return LossGradients(d_image.mul_(ranks), d_text.mul_(ranks), self._sum(d_scale), None)

    def _gather(self, x: Tensor) -> Tensor:
        return x if self.alone else all_gather_rows(x, self.ranks.sizes, self.ranks.group)

    def _sum(self, x: Tensor) -> Tensor:
        if not self.alone:
            dist.all_reduce(x, group=self.ranks.group)
        return x

    def _combine(self, partial: Tensor) -> Tensor:
        """Log-sum-exp over ranks of each column's partial one."""
        if self.alone:
            return partial
        most = partial.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ranks.group)
        # A column without any other pair (N = 1) has −inf everywhere, and −inf − −inf is not 0.
        shift = most.masked_fill(most == float("-inf"), 0.0)
        total = (partial - shift).exp_()
        dist.all_reduce(total, group=self.ranks.group)
        return total.log_().add_(shift)


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ids: Tensor | None,
        label_smoothing: float,
        ranks: Ranks,
        local: bool,
        impl: Impl,
    ) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            stripe = _Stripe(
                image_features, text_features, logit_scale, ids, label_smoothing, ranks, local, impl
            )
            loss = stripe.forward()
        ctx.save_for_backward(image_features, text_features, logit_scale, ids)
        ctx.stripe = stripe
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        upstream = grad_outputs[0]
        image, text, scale, _ = ctx.saved_tensors  # also refuses tensors changed in place
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image.device.type, enabled=False):
            gradients = ctx.stripe.backward(need_image, need_text)
            return (
                (gradients.d_image_features * upstream).to(image.dtype) if need_image else None,
                (gradients.d_text_features * upstream).to(text.dtype) if need_text else None,
                (gradients.d_logit_scale * upstream).to(scale.dtype).reshape(scale.shape)
                if need_scale
                else None,
                *(None,) * 5,
            )


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is in [0, 1), not {label_smoothing}")


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    local: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Symmetric softmax contrastive loss over the pairs of all ranks.

    The similarity matrix is never held: extra memory is O(N·D) and one chunk of logits. Whatever
    the features' dtype, products are summed in fp32 (fp64 for fp64), also under autocast.

    Args:
        image_features: [b, D] of this rank, usually of unit length; b may differ between ranks
            and be 0. fp32, bf16, fp16 or fp64.
        text_features: [b, D], row i belonging to image i; the same dtype.
        logit_scale: the exponentiated scale, [] or [1], or a number.
        ids: int64 [b]; pairs with equal ids are positives of each other and share a row's target
            evenly. None: each pair is its own only positive.
        label_smoothing: share of each target spread evenly over all pairs, in [0, 1).
        group: the ranks whose pairs are contrasted; None is the default group where
            torch.distributed is initialised, and this process alone otherwise.
        local: contrast this rank's pairs alone, whatever the group.
        impl: what computes it: "reference" (PyTorch), "triton", or "auto" (see `choose`).

    Returns:
        The mean over all ranks' pairs, [], fp32, the same on every rank. Its gradients averaged
        over ranks (as DDP and ZeRO do) are those of the concatenated batch.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit here or between ranks.
    """
    _check_smoothing(label_smoothing)
    ranks = agree(image_features, text_features, ids, group, local)
    scale = scalar(logit_scale, "logit_scale", image_features)
    loss: Tensor = _ClipLoss.apply(  # pyright: ignore[reportAssignmentType]
        image_features, text_features, scale, ids, label_smoothing, ranks, local, impl
    )
    return loss


@torch.no_grad()
def clip_loss_and_grads(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, LossGradients]:
    """`clip_loss` and its gradients in one evaluation, without autograd.

    For training by cached features (arXiv 2101.06983): feed the gradients into a second forward of
    each micro-batch. Arguments and errors are `clip_loss`'s.
    """
    _check_smoothing(label_smoothing)
    ranks = agree(image_features, text_features, ids, group, False)
    scale = scalar(logit_scale, "logit_scale", image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        stripe = _Stripe(
            image_features, text_features, scale, ids, label_smoothing, ranks, False, impl
        )
        loss = stripe.forward()
        gradients = stripe.backward(need_rows=True, need_columns=True)
    return loss, LossGradients(
        gradients.d_image_features.to(image_features.dtype),
        gradients.d_text_features.to(text_features.dtype),
        gradients.d_logit_scale.to(scale.dtype).reshape(scale.shape),
        None,
    )


class ClipLoss(nn.Module):
    """`clip_loss` as a module that takes the place of open_clip's.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted. They choose between approximations
            and layouts that this loss does not need: it is exact, and its work is split over ranks.
        rank, world_size: checked against the group. world_size=1 keeps the loss on this rank's
            pairs, as in open_clip; None takes the group as it is.
        use_horovod: refused.
        group, label_smoothing, impl: see `clip_loss`.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = True,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        *,
        group: ProcessGroup | None = None,
        label_smoothing: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        del local_loss, cache_labels
        _check_smoothing(label_smoothing)
        self.local = check_module_arguments(group, rank, world_size, use_horovod)
        if not self.local:
            note_exact_gradients(gather_with_grad)
        self.group = group
        self.label_smoothing = label_smoothing
        self.impl: Impl = impl

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of this rank's images and texts, [b, b] each; training needs none."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits = logits + logit_bias
        return logits, logits.T

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        ids: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, [], or ``{"contrastive_loss": loss}``; see `clip_loss` for the arguments.

        A constant `logit_bias` cancels in a softmax: it is accepted and gets no gradient.
        """
        del logit_bias
        loss = clip_loss(
            image_features,
            text_features,
            logit_scale,
            ids=ids,
            label_smoothing=self.label_smoothing,
            group=self.group,
            local=self.local,
            impl=self.impl,
        )
        return {"contrastive_loss": loss} if output_dict else loss
