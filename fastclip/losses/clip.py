"""The softmax contrastive loss (arXiv 2103.00020, Figure 3), exact over all ranks.

One tower's features are gathered, each rank computes its stripe of the similarity matrix, column
sums are combined, and the gathered tower's gradient is reduce-scattered: the stripe's work is 1/W
of the matrix, and half the features travel that gathering both towers would move. Forward and
backward communicate, so that every rank must run both.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from fastclip.losses.clip_stripe import contrastive_stripe
from fastclip.losses.common import (
    LossGradients,
    agree,
    check_module_arguments,
    note_exact_gradients,
    operand_dtype,
    refuse_second_derivative,
    scalar,
)
from fastclip.losses.stripe import Settings
from fastclip.ops.dispatch import Impl

MEMORY_BUDGET = 2 << 30
"""Bytes for kept exponentials: all of them up to 32,768 × 32,768 in bf16."""


class _ClipLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ids: Tensor | None,
        settings: Settings,
    ) -> Tensor:
        with torch.autocast(image_features.device.type, enabled=False):
            stripe = contrastive_stripe(image_features, text_features, logit_scale, ids, settings)
            loss = stripe.forward(keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(image_features, text_features, logit_scale, ids, *stripe.hand_over())
        ctx.stripe = stripe
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        # Also refuses tensors changed in place.
        image, _, scale, _, *tensors = ctx.saved_tensors
        ctx.stripe.take_back(tensors)
        need_image, need_text, need_scale = ctx.needs_input_grad[:3]
        with torch.autocast(image.device.type, enabled=False):
            gradients = ctx.stripe.backward((need_image, need_text), grad_outputs[0])
            ctx.stripe.hand_over()
            return (
                gradients.d_image_features if need_image else None,
                gradients.d_text_features if need_text else None,
                gradients.d_logit_scale.to(scale.dtype).reshape(scale.shape)
                if need_scale
                else None,
                None,
                None,
            )


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing is in [0, 1), not {label_smoothing}")


def _check_budget(memory_budget: int) -> None:
    if memory_budget < 0:
        raise ValueError(f"memory_budget is a number of bytes, at least 0, not {memory_budget}")


def clip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    group: ProcessGroup | None = None,
    local: bool = False,
    ring: bool = False,
    ranks_alike: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Symmetric softmax contrastive loss over the pairs of all ranks.

    The similarity matrix is never held: extra memory is O(N·D), one chunk of logits and the memory
    budget. Products are summed in fp32 (fp64 for fp64) whatever the features' dtype. Under autocast
    features are multiplied in autocast's dtype, as matrix products are.

    Args:
        image_features: [b, D] of this rank; b may differ between ranks and be 0. fp32, bf16, fp16
            or fp64.
        text_features: [b, D], row i belonging to image i; the same dtype.
        logit_scale: the exponentiated scale, [] or [1], or a number.
        ids: int64 [b]; pairs with equal ids are positives of each other and share a row's target
            evenly. None: each pair is its own only positive.
        label_smoothing: share of each target spread evenly over all pairs, in [0, 1).
        normalize: bring features to unit length first, in the same pass as the cast; gradients are
            those of the raw features.
        memory_budget: bytes in which the forward may keep exponentials for the backward, which then
            multiplies three matrices instead of four; 0 recomputes them all. Triton only.
        group: the ranks whose pairs are contrasted; None is the default group where
            torch.distributed is initialised, and this process alone otherwise.
        local: contrast this rank's pairs alone, whatever the group.
        ring: let the text features go round the ranks instead of gathering them: no rank holds more
            than two ranks' texts, at the price of twice the traffic.
        ranks_alike: every rank calls with as many pairs and the same options, as in a training loop
            without a short last batch. They are not compared then, which spares a wait of the host
            for the device; where it is not so, ranks hang or compute what has no meaning.
        impl: what computes it: "reference" (PyTorch), "triton", or "auto" (see `choose`).

    Returns:
        The mean over all ranks' pairs, [], fp32, the same on every rank. Its gradients averaged
        over ranks (as DDP and ZeRO do) are those of the concatenated batch.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit here or between ranks.
    """
    settings = _settings(
        image_features, text_features, ids, label_smoothing, normalize, memory_budget, group,
        local, ring, ranks_alike, impl,
    )  # fmt: skip
    scale = scalar(logit_scale, "logit_scale", image_features)
    loss: Tensor = _ClipLoss.apply(  # pyright: ignore[reportAssignmentType]
        image_features, text_features, scale, ids, settings
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
    normalize: bool = False,
    memory_budget: int = MEMORY_BUDGET,
    group: ProcessGroup | None = None,
    local: bool = False,
    ring: bool = False,
    ranks_alike: bool = False,
    impl: Impl = "auto",
) -> tuple[Tensor, LossGradients]:
    """`clip_loss` and its gradients in one evaluation, without autograd.

    For training by cached features (arXiv 2101.06983): feed the gradients into a second forward of
    each micro-batch. Arguments and errors are `clip_loss`'s.
    """
    settings = _settings(
        image_features, text_features, ids, label_smoothing, normalize, memory_budget, group,
        local, ring, ranks_alike, impl,
    )  # fmt: skip
    scale = scalar(logit_scale, "logit_scale", image_features)
    with torch.autocast(image_features.device.type, enabled=False):
        stripe = contrastive_stripe(image_features, text_features, scale, ids, settings)
        loss = stripe.forward(keep=True)
        gradients = stripe.backward((True, True), torch.ones_like(loss))
    d_scale = gradients.d_logit_scale.to(scale.dtype).reshape(scale.shape)
    return loss, gradients._replace(d_logit_scale=d_scale)


def _settings(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    label_smoothing: float,
    normalize: bool,
    memory_budget: int,
    group: ProcessGroup | None,
    local: bool,
    ring: bool,
    ranks_alike: bool,
    impl: Impl,
) -> Settings:
    _check_smoothing(label_smoothing)
    _check_budget(memory_budget)
    return Settings(
        ranks=agree(image_features, text_features, ids, group, local, ranks_alike, normalize, ring),
        local=local,
        dtype=operand_dtype(image_features),
        normalize=normalize,
        impl=impl,
        ring=ring,
        label_smoothing=label_smoothing,
        memory_budget=memory_budget,
    )


class ClipLoss(nn.Module):
    """`clip_loss` as a module that takes the place of open_clip's.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted. They choose between approximations
            and layouts that this loss does not need: it is exact, and its work is split over ranks.
        rank, world_size: checked against the group. world_size=1 keeps the loss on this rank's
            pairs, as in open_clip; None takes the group as it is.
        use_horovod: refused.
        group, label_smoothing, normalize, memory_budget, ring, ranks_alike, impl: see `clip_loss`.
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
        normalize: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        ring: bool = False,
        ranks_alike: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        del local_loss, cache_labels
        _check_smoothing(label_smoothing)
        _check_budget(memory_budget)
        self.local = check_module_arguments(group, rank, world_size, use_horovod)
        if not self.local:
            note_exact_gradients(gather_with_grad)
        self.group = group
        self.label_smoothing = label_smoothing
        self.normalize, self.memory_budget, self.ring = normalize, memory_budget, ring
        self.ranks_alike = ranks_alike
        self.impl: Impl = impl

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits of this rank's images and texts, [b, b] each; training needs none."""
        if self.normalize:
            image_features, text_features = F.normalize(image_features), F.normalize(text_features)
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
            normalize=self.normalize,
            memory_budget=self.memory_budget,
            group=self.group,
            local=self.local,
            ring=self.ring,
            ranks_alike=self.ranks_alike,
            impl=self.impl,
        )
        return {"contrastive_loss": loss} if output_dict else loss
