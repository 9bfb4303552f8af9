"""The configuration that weights were made with, read off their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from fastclip.models.config import Activation, ClipConfig, ResNetConfig, TextConfig, ViTConfig

_HEAD_WIDTH = 64  # of all OpenAI models; their weights do not say it


def infer_config(
    state_dict: Mapping[str, Tensor],
    *,
    activation: Activation,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> ClipConfig:
    """The configuration that weights under our names were made with, as far as shapes tell.

    Args:
        state_dict: from `fastclip.models.interop.load_weights`.
        activation: of both towers' transformers; weights do not say it.
        vision_heads: None for heads of 64 channels, as in all OpenAI models.
        text_heads: None for heads of 64 channels.

    Raises:
        ValueError: a tensor is missing, or 64 does not divide a width and no heads are given.
    """
    try:
        vision = _infer_vision(state_dict, activation, vision_heads)
        context_length, width = state_dict["text.positional_embedding"].shape
        linear = "text.proj.weight" in state_dict
        text = TextConfig(
            context_length=context_length,
            vocab_size=state_dict["text.token_embedding.weight"].shape[0],
            width=width,
            heads=_heads(width, text_heads, "text_heads"),
            layers=_count(state_dict, "text.blocks."),
            mlp_ratio=mlp_ratio(width, state_dict["text.blocks.0.mlp.fc.weight"].shape[0]),
            activation=activation,
        )
        last = state_dict["text.proj.weight" if linear else "text.proj.2.weight"]
    except KeyError as error:
        raise ValueError(f"the weights lack {error.args[0]}") from None
    bias = state_dict.get("logit_bias")
    return ClipConfig(
        embed_dim=last.shape[0],
        vision=vision,
        text=text,
        init_logit_bias=None if bias is None else float(bias),
        projection="linear" if linear else "mlp",
    )


def _infer_vision(
    state_dict: Mapping[str, Tensor], activation: Activation, heads: int | None
) -> ViTConfig | ResNetConfig:
    if "visual.class_embedding" in state_dict:
        width, _, patch, _ = state_dict["visual.patch_embedding.weight"].shape
        return ViTConfig(
            image_size=patch * _side(state_dict["visual.positional_embedding"]),
            patch_size=patch,
            width=width,
            layers=_count(state_dict, "visual.blocks."),
            heads=_heads(width, heads, "vision_heads"),
            mlp_ratio=mlp_ratio(width, state_dict["visual.blocks.0.mlp.fc.weight"].shape[0]),
            activation=activation,
        )
    width = state_dict["visual.conv3.weight"].shape[0]
    stages = [_count(state_dict, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)]
    return ResNetConfig(
        image_size=32 * _side(state_dict["visual.attnpool.positional_embedding"]),
        layers=(stages[0], stages[1], stages[2], stages[3]),
        width=width,
        heads=_heads(32 * width, heads, "vision_heads"),
    )


def _heads(width: int, heads: int | None, argument: str) -> int:
    if heads is None and width % _HEAD_WIDTH:
        raise ValueError(
            f"the weights do not say how many heads {width} channels are cut into, and 64 does not "
            f"divide them: give {argument}"
        )
    return width // _HEAD_WIDTH if heads is None else heads


def _count(state_dict: Mapping[str, object], prefix: str) -> int:
    return len({n[len(prefix) :].partition(".")[0] for n in state_dict if n.startswith(prefix)})


def _side(positional_embedding: Tensor) -> int:
    return math.isqrt(positional_embedding.shape[0] - 1)


def mlp_ratio(width: int, hidden: int) -> float:
    """`hidden` over `width`, such that a configuration's `mlp_width` gives `hidden` back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
