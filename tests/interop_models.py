"""Small models in every layout, for the tests of reading and writing weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.model import build_model_from_openai_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPModel

from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.interop_names import (
    LAYOUTS,
    Layout,
)

TEXT = TextConfig(context_length=11, vocab_size=60, width=64, heads=1, layers=2)
VIT = ClipConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=32, patch_size=8, width=128, layers=2, heads=2),
    text=TEXT,
)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=4, heads=2)
)
PAIRS = [
    pytest.param(config, layout, id=f"{name}-{layout}")
    for name, config in (("ViT", VIT), ("ResNet", RESNET))
    for layout in LAYOUTS
    if (name, layout) != ("ResNet", "huggingface")
]


def build(config: ClipConfig) -> Clip:
    """A model in which no parameter has the value that a new model would have."""
    model = Clip(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn_like(tensor) * 0.05
                tensor.add_(noise.abs() if "running_var" in name else noise)
    return model


def inputs(config: ClipConfig) -> tuple[Tensor, Tensor]:
    side = config.vision.image_size
    tokens = torch.randint(1, 59, (4, config.text.context_length))
    tokens[:, 6] = 59
    tokens[:, 7:] = 0
    tokens[1, 8] = 59
    return torch.randn(4, 3, side, side), tokens


def features(model: Clip, images: Tensor, tokens: Tensor) -> list[Tensor]:
    output = model(images, tokens, normalize=False)
    assert output.image_features is not None
    assert output.text_features is not None
    return [output.image_features, output.text_features]


def peer_features(layout: Layout, directory: Path, images: Tensor, tokens: Tensor) -> list[Tensor]:
    peer: Any
    if layout == "huggingface":
        peer = CLIPModel.from_pretrained(directory).eval()
        images_out = peer.get_image_features(images).pooler_output
        return [images_out, peer.get_text_features(tokens).pooler_output]
    if layout == "open_clip":
        peer = open_clip.create_model(f"local-dir:{directory}").eval()
    else:
        weights = load_file(directory / "model.safetensors")
        peer = build_model_from_openai_state_dict(weights, cast_dtype=torch.float32).float()
    return [peer.encode_image(images), peer.encode_text(tokens)]
