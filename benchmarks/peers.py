"""Other implementations, called as their authors mean them to be; one small function each.

Each takes a case and returns a loss, a function of image and text features, scale and, for the
sigmoid loss, bias. Imports are inside, since every peer is optional. All but siglip-kernel's keep
open_clip's convention: a mean over pairs, halves of both directions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.losses import Loss, Operands, Result, Step


def plain_contrastive(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The definition in three lines of torch; logits in fp32 after a product in the features'
    dtype."""
    logits = scale * (image @ text.T).float()
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def plain_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The definition; logits as in `plain_contrastive`."""
    logits = scale * (image @ text.T).float() + bias
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


def compiled(loss: Loss) -> Loss:
    """A loss under torch.compile, for one shape."""
    return torch.compile(loss, dynamic=False)


def open_clip_contrastive(case: Case) -> Loss:
    """open_clip's ClipLoss on one rank, under autocast as its trainer runs it (amp_bf16)."""
    return _under_autocast(_imported("open_clip.loss").ClipLoss(), case)


def open_clip_sigmoid(case: Case) -> Loss:
    """open_clip's SigLipLoss on one rank, under autocast."""
    return _under_autocast(_imported("open_clip.loss").SigLipLoss(), case)


def open_clip_stripe(case: Case) -> Step:
    """What ClipLoss(local_loss=True) computes on rank 0 once both towers are gathered.

    Its own class gathers by itself and cannot be given gathered features, so that this is its
    arithmetic: this rank's images against all texts, and its texts against all images.
    """

    def step(operands: Operands) -> Result:
        image, text, scale, _ = operands
        with torch.autocast(image.device.type, dtype=image.dtype, enabled=case.dtype != "fp32"):
            labels = torch.arange(case.rows, device=image.device)
            per_image = scale * image[: case.rows] @ text.T
            per_text = scale * text[: case.rows] @ image.T
            loss = (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2
        d_image, d_text, _ = torch.autograd.grad(loss, (image, text, scale))
        return Result(loss.detach(), d_image, d_text)

    return step


def memeff(case: Case) -> Loss:
    """memeff's CLIP loss; the temperature is a number, and has no gradient.

    Its default, stable=True, returns gradients of another length than the loss's.
    """
    module = _imported("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / case.scale, normalized_inputs=True, stable=False
    )
    return lambda image, text, scale: module(image, text)


def inf_cl(case: Case) -> Loss:
    """Inf-CL on one rank, once per direction; computes in TF32 whatever the features' dtype."""
    loss = _imported("inf_cl").cal_flash_loss
    # Features are split into heads of a power of two, 256 at most, and D must be whole heads.
    heads = next(dims for dims in (256, 128, 64, 32, 16) if case.dims % dims == 0)

    def both(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        image, text = image.float(), text.float()
        rows = loss(image, text, scale=scale, head_dim=heads).mean()
        return (rows + loss(text, image, scale=scale, head_dim=heads).mean()) / 2

    return both


def cut_cross_entropy(filter_eps: float | str | None) -> Callable[[Case], Loss]:
    """Cut Cross-Entropy, once per direction, the other tower as the classifier's weights.

    Args:
        filter_eps: softmax entries below it get no gradient; None computes all, "auto" is the
            package's default.
    """

    def build(case: Case) -> Loss:
        loss = _imported("cut_cross_entropy.cce").cce_linear_cross_entropy

        def both(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            targets = torch.arange(case.pairs, device=image.device)
            # There is no argument for a scale: it goes into one operand, rounded to its dtype.
            rows = loss((scale * image).to(image.dtype), text, targets, filter_eps=filter_eps)
            columns = loss((scale * text).to(text.dtype), image, targets, filter_eps=filter_eps)
            return (rows + columns) / 2

        return both

    return build


def siglip_kernel(case: Case) -> Loss:
    """siglip-kernel's own choice of backend; it takes the logarithm of the scale."""
    del case
    loss = _imported("siglip_kernel").fused_siglip_loss
    return lambda image, text, scale, bias: loss(image, text, scale.log(), bias)


def siglip_kernel_stripe(case: Case) -> Step:
    """This rank's images against each rank's texts in turn, as siglip-kernel's ring does."""
    loss = _imported("siglip_kernel").fused_chunked_bf16_siglip_loss

    def step(operands: Operands) -> Result:
        image, text, scale, bias = operands
        assert bias is not None
        total = image.new_zeros((), dtype=torch.float32)
        for block, texts in enumerate(text.split(case.rows)):
            # None: no text of another rank belongs to an image of this one.
            offset = 0 if block == 0 else None
            total = total + loss(image[: case.rows], texts, scale.log(), bias, diag_offset=offset)
        d_image, d_text, _, _ = torch.autograd.grad(total, (image, text, scale, bias))
        return Result(total.detach(), d_image, d_text)

    return step


def _imported(name: str) -> Any:
    """A module, imported when it is needed; untyped, since a peer need not be installed."""
    return importlib.import_module(name)


def _under_autocast(loss: Loss, case: Case) -> Loss:
    """Half precision as a trainer has it: products in the features' dtype, softmax in fp32."""

    def autocast(*operands: Tensor) -> Tensor:
        image = operands[0]
        with torch.autocast(image.device.type, dtype=image.dtype, enabled=case.dtype != "fp32"):
            return loss(*operands)

    return autocast
