"""The whole model: two towers, unit-length features, and the learned temperature."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from fastclip import nvidia_apex
from fastclip.models.attention import AttentionConfig, SelfAttention, find_xformers
from fastclip.models.config import ClipConfig, Compiled, Recompute, ViTConfig
from fastclip.models.layers import LayerNorm, ResidualBlock, wide
from fastclip.models.resnet import AttentionPool, Bottleneck, ModifiedResNet
from fastclip.models.text import TextTransformer
from fastclip.models.vit import VisionTransformer
from fastclip.tokenizer.packing import PackedTokens

_MOST_VERSIONS = 64


class ClipOutput(NamedTuple):
    """What `Clip.forward` returns; everything in fp32 (fp64 from a model in fp64)."""

    image_features: Tensor | None
    """[B, embed_dim], of unit length unless asked otherwise; None without images."""

    text_features: Tensor | None
    """[B, embed_dim], of unit length unless asked otherwise; None without tokens."""

    logit_scale: Tensor
    """[1], the inverse temperature that similarities are multiplied by (exponentiated, bounded)."""

    logit_bias: Tensor | None
    """[1], added to the logits; None when the model has no bias."""


class Clip(nn.Module):
    """CLIP (arXiv 2103.00020, section 2).

    Parameters live in fp32 and are named ``visual.*``, ``text.*``, ``logit_scale`` [1] (a
    logarithm) and, when the configuration asks for one, ``logit_bias`` [1].

    Attributes:
        config: what the model was built from.
        autocast_dtype: the towers' dtype under autocast; None leaves the caller's autocast, if
            there is one, in force. The temperature and the normalisation are fp32 always.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.autocast_dtype: torch.dtype | None = None
        self._frozen: tuple[nn.Module, ...] = ()
        self._graphs = False
        arguments: dict[str, Any] = {
            "embed_dim": config.embed_dim,
            "projection": config.projection,
        }
        self.visual = (
            VisionTransformer(config.vision, **arguments)
            if isinstance(config.vision, ViTConfig)
            else ModifiedResNet(config.vision, **arguments)
        )
        self.text = TextTransformer(config.text, **arguments)
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(config.init_temperature)]))
        self.logit_bias: nn.Parameter | None = None
        if config.init_logit_bias is not None:
            self.logit_bias = nn.Parameter(torch.tensor([float(config.init_logit_bias)]))
        # (x / 255 - mean) / std as one multiplication and one addition.
        mean, std = torch.tensor(config.image_mean), torch.tensor(config.image_std)
        self._pixel_gain: Tensor
        self._pixel_shift: Tensor
        self.register_buffer("_pixel_gain", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("_pixel_shift", (-mean / std).view(3, 1, 1), persistent=False)

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | PackedTokens | None = None,
        *,
        normalize: bool = True,
    ) -> ClipOutput:
        """Features of images, of texts, or of both.

        Args:
            images: [B, 3, R, R] with the configuration's R; uint8 as decoded (normalised here, on
                the device), or floating point and already normalised.
            tokens: int32 or int64 [B, L], L at most the context length. Anything after a row's end
                of text is ignored, so that L may be the batch's longest text. Or packed.
            normalize: scale the features to unit length.

        Raises:
            ValueError: a shape does not fit, or (on a CPU) a token is outside the vocabulary.
            TypeError: a dtype does not fit.
        """
        if images is None and tokens is None:
            raise ValueError("give images, tokens or both")
        self._begin()
        with self.precision():
            with record_function("fastclip::image tower"):
                image_features = None if images is None else self.visual(self._pixels(images))
            with record_function("fastclip::text tower"):
                text_features = None if tokens is None else self.text(self._checked(tokens))
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            return ClipOutput(
                _finish(image_features, normalize),
                _finish(text_features, normalize),
                bounded_exp(self.logit_scale, self.config.max_logit_scale),
                self.logit_bias,
            )

    def _begin(self) -> None:
        """Tell CUDA graphs that what they gave before is not needed any more."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def represent(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length image features, and what linear probes use; one pass through the tower.

        The latter is before the projection for Vision Transformers: the class token, normalised.
        For ResNets it is the attention pooling's output (arXiv 2103.00020, appendix A.3). Neither
        torch.compile of whole towers nor parameters sharded by ZeRO-3 know of this method.

        Args:
            images: as for `forward`.

        Returns:
            Features [B, embed_dim] and representations [B, width], both in fp32 (fp64 from a model
            in fp64).

        Raises:
            ValueError, TypeError: as `forward`.
        """
        self._begin()
        with self.precision():
            representation = self.visual.represent(self._pixels(images))
            features = self.visual.proj(representation)
        with torch.autocast(self.logit_scale.device.type, enabled=False):
            return F.normalize(wide(features), dim=-1), wide(representation)

    def precision(self) -> AbstractContextManager[object]:
        """Autocast as the towers run under it; features are multiplied in its dtype, too."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.logit_scale.device.type, dtype=self.autocast_dtype)

    def _pixels(self, images: Tensor) -> Tensor:
        side = self.config.vision.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(
                f"images are [batch, 3, {side}, {side}] for this model, not {list(images.shape)}"
            )
        if images.dtype == torch.uint8:
            return (images * self._pixel_gain).add_(self._pixel_shift)
        if not images.is_floating_point():
            raise TypeError(
                f"images are uint8 pixels or normalised floating point numbers, not {images.dtype}"
            )
        return images.to(self._pixel_gain.dtype)

    def _checked(self, tokens: Tensor | PackedTokens) -> Tensor | PackedTokens:
        text = self.config.text
        if isinstance(tokens, PackedTokens):
            longest = max(tokens.segments.lengths, default=0)
            if longest > text.context_length:
                raise ValueError(
                    f"a packed text has {longest} tokens, more than the context length "
                    f"{text.context_length}; truncate in the tokenizer"
                )
            self._check_vocabulary(tokens.ids)
            return tokens
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"tokens are int32 or int64, not {tokens.dtype}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= text.context_length:
            raise ValueError(
                f"tokens are [batch, length] with a length from 1 to the context length "
                f"{text.context_length}, not {list(tokens.shape)}; truncate in the tokenizer"
            )
        self._check_vocabulary(tokens)
        return tokens

    def _check_vocabulary(self, ids: Tensor) -> None:
        # Elsewhere the check would make the host wait for the device.
        if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
            return
        size = self.config.text.vocab_size
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"token ids run from 0 to {size - 1} in this model; the batch holds "
                f"{low if low < 0 else high}"
            )

    def set_attention(self, config: AttentionConfig) -> None:
        """Choose what computes attention in both towers, and how much of it.

        Raises:
            ImportError: xformers is asked for and not installed.
        """
        if config.impl == "xformers":
            find_xformers()
        for module in self.modules():
            if isinstance(module, SelfAttention | AttentionPool):
                module.impl = config.impl
            elif isinstance(module, VisionTransformer | TextTransformer):
                module.last_row = config.last_row

    def compile_parts(self, parts: Compiled, *, cuda_graphs: bool = False) -> None:
        """Have torch.compile compile parts of both towers, each at its first call.

        Args:
            parts: the blocks, of which all of a tower share their code, or the towers as a whole.
            cuda_graphs: replay what was compiled as CUDA graphs, one for each shape of the inputs.
        """
        if parts == "none":
            return
        mode = "reduce-overhead" if cuda_graphs else None
        whole = [self.visual, self.text]
        blocks = [m for m in self.modules() if isinstance(m, ResidualBlock | Bottleneck)]
        for module in whole if parts == "towers" else blocks:
            module.compile(mode=mode)
        self._graphs = cuda_graphs
        # Of the one function that blocks of both towers share there are versions for images and
        # texts, the last row, gradients or none, training and evaluation, sizes fixed or free:
        # more than the 8 after which torch leaves what is new uncompiled.
        limit = max(torch._dynamo.config.recompile_limit, _MOST_VERSIONS)
        torch._dynamo.config.recompile_limit = limit

    def use_apex_layer_norm(self) -> None:
        """Normalise layers by NVIDIA apex's kernel.

        Raises:
            ImportError: apex is not built with it.
        """
        function = nvidia_apex.find_layer_norm()
        if function is None:
            raise ImportError(f"run.layer_norm=apex {nvidia_apex.ADVICE}: build it, or set torch")
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.function = function

    def set_patch_dropout(self, share: float) -> None:
        """Leave out that share of an image's patches in training.

        Raises:
            ValueError: it is not in [0, 1), or the image tower has no patches.
        """
        if not 0.0 <= share < 1.0:
            raise ValueError(f"patch dropout is in [0, 1), not {share}")
        if isinstance(self.visual, VisionTransformer):
            self.visual.patch_dropout = share
        elif share:
            raise ValueError("patch dropout is for Vision Transformers: a ResNet has no patches")

    def set_activation_checkpointing(self, vision: Recompute, text: Recompute) -> None:
        """What of a tower's blocks is computed anew in backward to save memory; equal gradients.

        full: everything, a third more work; running statistics of BatchNorm are updated once, by
        the first forward pass. selective: normalisations and activations, about half of what a
        transformer block keeps, at the price of no product.

        Raises:
            ValueError: selective, for a ResNet.
        """
        if vision == "selective" and not isinstance(self.visual, VisionTransformer):
            raise ValueError(
                "run.activation_checkpointing_visual=selective is for transformers; a ResNet has "
                "full"
            )
        for tower, how in ((self.visual, vision), (self.text, text)):
            tower.recompute = how == "full"
            for module in tower.modules():
                if isinstance(module, ResidualBlock):
                    module.recompute_cheap = how == "selective"

    def freeze(self, vision: bool, text: bool) -> None:
        """Lock towers (LiT, arXiv 2111.07991): no gradients, BatchNorm as in evaluation for good.

        A tower that is not named frozen is set free again.
        """
        choices = ((self.visual, vision), (self.text, text))
        for tower, frozen in choices:
            tower.requires_grad_(not frozen)
        self._frozen = tuple(tower for tower, frozen in choices if frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Clip:
        """Training or evaluation mode; frozen towers stay in evaluation mode."""
        super().train(mode)
        for tower in self._frozen:
            tower.eval()
        return self

    @property
    def has_batch_norm(self) -> bool:
        """Whether features of one image depend on the others of its batch in training.

        True with BatchNorm in a tower that is not frozen; micro-batches are not exact then.
        """
        return any(isinstance(module, _BatchNorm) for module in self._trained_modules())

    def _trained_modules(self) -> Iterator[nn.Module]:
        for tower in (self.visual, self.text):
            if tower not in self._frozen:
                yield from tower.modules()


def tower_of(parameter_name: str) -> Literal["visual", "text", "logit"]:
    """Which part of `Clip` a parameter belongs to, for example to give each its learning rate.

    Raises:
        ValueError: `Clip` has no such parameter.
    """
    head = parameter_name.partition(".")[0]
    if head in ("logit_scale", "logit_bias"):
        return "logit"
    if head == "visual":
        return "visual"
    if head == "text":
        return "text"
    raise ValueError(
        f"{parameter_name!r} begins with neither 'visual.' nor 'text.' and is no logit parameter"
    )


def bounded_exp(logarithm: Tensor, bound: float) -> Tensor:
    """exp(`logarithm`), at most `bound`, with a gradient that can leave the bound but not pass it.

    Where the logarithm exceeds ln(bound), the gradient passes only if descending along it lowers
    the logarithm. A plain clamp has no gradient there, and a temperature that once stepped over
    the bound would stay for ever; cutting the parameter after each step would not survive sharded
    optimisers.

    Returns:
        fp32, of the shape of `logarithm`.
    """
    result: Tensor = _BoundedExp.apply(wide(logarithm), math.log(bound))  # pyright: ignore[reportAssignmentType]
    return result


class _BoundedExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logarithm: Tensor, ceiling: float) -> Tensor:
        value = logarithm.clamp(max=ceiling).exp()
        ctx.save_for_backward(logarithm, value)
        ctx.ceiling = ceiling
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logarithm, value = ctx.saved_tensors
        gradient = grad_outputs[0] * value
        # A comparison with NaN is false: a broken gradient passes and is seen.
        held = (logarithm > ctx.ceiling) & (gradient < 0)
        return gradient.masked_fill(held, 0.0), None


def _finish(features: Tensor | None, normalize: bool) -> Tensor | None:
    if features is None:
        return None
    return F.normalize(wide(features), dim=-1) if normalize else wide(features)
