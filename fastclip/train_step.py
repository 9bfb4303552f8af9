"""One optimiser step: towers, one loss over the global batch, backward, update.

A global batch larger than memory is split into micro-batches, exactly (the GradCache construction,
arXiv 2101.06983): features of all micro-batches first, one evaluation of the loss on them, then a
second forward per micro-batch through which the features' gradients flow. Plain gradient
accumulation would be another objective, with fewer negatives, and is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.profiler import record_function

from fastclip.data.batch import Batch
from fastclip.engine import Engine
from fastclip.engine.step_guard import StepInfo
from fastclip.losses import (
    MEMORY_BUDGET,
    LossGradients,
    clip_loss_and_grads,
    siglip_loss_and_grads,
)
from fastclip.models.clip import Clip, ClipOutput
from fastclip.models.config import ClipConfig
from fastclip.ops.dispatch import Impl
from fastclip.tokenizer.packing import PackedTokens


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Which objective the towers are trained with."""

    kind: Literal["clip", "siglip"] = "clip"
    """Softmax (the paper's) or sigmoid (arXiv 2303.15343, needs model.init_logit_bias)."""

    label_smoothing: float = 0.0
    """Mass that a softmax target spreads evenly over the global batch, in [0, 1)."""

    impl: Impl = "auto"
    """What computes it: reference (PyTorch), triton, or auto, which is Triton on a GPU."""

    memory_budget: int = MEMORY_BUDGET
    """Bytes in which the softmax loss may keep exponentials between its passes; 0 recomputes."""

    def __post_init__(self) -> None:
        if self.kind not in ("clip", "siglip"):
            raise ValueError(f"loss.kind is 'clip' or 'siglip', not {self.kind!r}")
        if self.impl not in get_args(Impl):
            raise ValueError(f"loss.impl is {', '.join(get_args(Impl))}, not {self.impl!r}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"loss.label_smoothing is in [0, 1), not {self.label_smoothing}")
        if self.memory_budget < 0:
            raise ValueError(f"loss.memory_budget is at least 0, not {self.memory_budget}")
        if self.kind == "siglip" and self.label_smoothing != 0.0:
            raise ValueError("loss.label_smoothing belongs to loss.kind=clip")

    def check(self, model: ClipConfig) -> None:
        """Refuse a model that lacks what the objective needs.

        Raises:
            ValueError: it has no bias for the sigmoid loss.
        """
        if self.kind == "siglip" and model.init_logit_bias is None:
            raise ValueError("loss.kind=siglip needs model.init_logit_bias (the paper uses -10)")


@dataclass(frozen=True)
class StepResult:
    """What a step reports; tensors stay on the device until somebody logs them."""

    loss: Tensor
    """Global mean loss, shape [], the same on every rank."""

    logit_scale: Tensor
    """The exponentiated scale the loss was computed with, shape []."""

    info: StepInfo


class TrainStep:
    """Callable that takes one rank's share of a global batch and updates the model.

    Args:
        ranks_alike: shares are of one size on all ranks, as the loader gives them: the loss need
            not compare them.

    Raises:
        ValueError: `micro_batches` does not divide the batch, or the model has trainable BatchNorm
            (whose statistics depend on the split, so micro-batches would not be exact).
    """

    def __init__(
        self,
        engine: Engine,
        config: LossConfig,
        *,
        micro_batches: int = 1,
        ranks_alike: bool = False,
    ) -> None:
        model = engine.module
        check_micro_batching(model, micro_batches)
        config.check(model.config)
        self.engine = engine
        self.config = config
        self.micro_batches = micro_batches
        self.ranks_alike = ranks_alike

    def __call__(self, batch: Batch) -> StepResult:
        micro_batches = split_batch(batch, self.micro_batches)
        cached: list[ClipOutput] = []
        generator_states: list[list[Tensor]] = []
        for images, tokens in micro_batches[:-1]:
            generator_states.append(_generator_states(images.device))
            with torch.no_grad():
                cached.append(self.engine.forward(images, tokens))
        # The last micro-batch keeps its graph: with one micro-batch this is the ordinary step.
        last = self.engine.forward(*micro_batches[-1])
        cached.append(last)

        loss, gradients = self._loss_and_gradients(cached, batch.ids)
        sizes = [images.shape[0] for images, _ in micro_batches]
        d_image = gradients.d_image_features.split(sizes)
        d_text = gradients.d_text_features.split(sizes)
        d_scale, d_bias = gradients.d_logit_scale, gradients.d_logit_bias

        self.engine.backward(_surrogate(last, d_image[-1], d_text[-1], d_scale, d_bias))
        after = _generator_states(last.logit_scale.device)
        for index, (images, tokens) in enumerate(micro_batches[:-1]):
            _restore_generators(generator_states[index], images.device)
            output = self.engine.forward(images, tokens)
            # The temperature enters the loss once: its gradient was spent on the last micro-batch.
            none = torch.zeros_like(d_scale)
            none_bias = None if d_bias is None else torch.zeros_like(d_bias)
            self.engine.backward(_surrogate(output, d_image[index], d_text[index], none, none_bias))
        _restore_generators(after, last.logit_scale.device)
        info = self.engine.step()
        return StepResult(loss.detach(), last.logit_scale.detach().reshape(()), info)

    def _loss_and_gradients(
        self, cached: list[ClipOutput], ids: Tensor | None
    ) -> tuple[Tensor, LossGradients]:
        image_features = torch.cat([_present(o.image_features) for o in cached]).detach()
        text_features = torch.cat([_present(o.text_features) for o in cached]).detach()
        logit_scale = cached[-1].logit_scale.detach()
        with record_function("fastclip::loss"), self.engine.module.precision():
            return self._loss(image_features, text_features, logit_scale, cached[-1], ids)

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        output: ClipOutput,
        ids: Tensor | None,
    ) -> tuple[Tensor, LossGradients]:
        if self.config.kind == "siglip":
            logit_bias = _present(output.logit_bias).detach()
            return siglip_loss_and_grads(
                image_features,
                text_features,
                logit_scale,
                logit_bias,
                ids=ids,
                ranks_alike=self.ranks_alike,
                impl=self.config.impl,
            )
        return clip_loss_and_grads(
            image_features,
            text_features,
            logit_scale,
            ids=ids,
            label_smoothing=self.config.label_smoothing,
            memory_budget=self.config.memory_budget,
            ranks_alike=self.ranks_alike,
            impl=self.config.impl,
        )


def check_micro_batching(model: Clip, micro_batches: int) -> None:
    """Refuse micro-batches for a model whose features depend on how a batch is split."""
    if micro_batches < 1:
        raise ValueError(f"micro_batches is at least 1, not {micro_batches}")
    if micro_batches > 1 and model.has_batch_norm:
        raise ValueError(
            "micro-batches are exact only without BatchNorm in training mode: its statistics "
            "change with the split. Use run.micro_batches=1 (more ranks, or "
            "run.activation_checkpointing_visual=full to save memory), a ViT, or a frozen ResNet."
        )


def split_batch(batch: Batch, micro_batches: int) -> list[tuple[Tensor, Tensor | PackedTokens]]:
    """Cut images and tokens into equal micro-batches.

    Raises:
        ValueError: that is not possible, or the texts were packed for another number of them.
    """
    size = batch.images.shape[0]
    if size % micro_batches:
        raise ValueError(f"a batch of {size} pairs cannot be cut into {micro_batches} equal parts")
    images = batch.images.tensor_split(micro_batches)
    if batch.packed is None:
        return list(zip(images, batch.tokens.tensor_split(micro_batches), strict=True))
    if [len(texts) for texts in batch.packed] != [len(part) for part in images]:
        raise ValueError(
            f"the batch's texts are packed in parts of {[len(part) for part in batch.packed]}, and "
            f"the step has {micro_batches} micro-batches of {size // micro_batches}: give the "
            "loader the same micro_batches"
        )
    return list(zip(images, batch.packed, strict=True))


def _surrogate(
    output: ClipOutput, d_image: Tensor, d_text: Tensor, d_scale: Tensor, d_bias: Tensor | None
) -> Tensor:
    """A scalar whose gradient is the given gradient of the features (constants elsewhere)."""
    terms = [
        (output.image_features, d_image),
        (output.text_features, d_text),
        (output.logit_scale, d_scale),
        (output.logit_bias, d_bias),
    ]
    total = output.logit_scale.new_zeros(())
    for value, gradient in terms:
        if value is not None and gradient is not None and value.requires_grad:
            total = total + (value.float() * gradient.float().reshape(value.shape)).sum()
    return total


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _generator_states(device: torch.device) -> list[Tensor]:
    """State of the generators that a forward may draw from (patch dropout, drop path)."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def _restore_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
