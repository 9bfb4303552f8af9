"""transformers' CLIP with this loss in place of the one that `return_loss=True` computes.

    pip install fastclip-torch transformers
    python examples/huggingface_clip.py

The model's own loss holds the matrix of similarities, and sees one process's pairs only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from fastclip.losses import clip_loss

TOLERANCE = 1e-5


def small_model() -> CLIPModel:
    """A CLIP of random weights."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text = {**tower, "num_attention_heads": 2, "vocab_size": 100, "eos_token_id": 99}
    text |= {"max_position_embeddings": 16, "bos_token_id": 98, "pad_token_id": 0}
    vision = {**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def main() -> None:
    torch.manual_seed(0)
    model = small_model()
    tokens = torch.randint(1, 98, (8, 16))
    tokens[:, -1] = 99
    pixels = torch.randn(8, 3, 32, 32)

    output = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    output.loss.backward()
    expected = {name: _gradient(p).clone() for name, p in model.named_parameters()}
    model.zero_grad()

    output = model(input_ids=tokens, pixel_values=pixels)
    loss = clip_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp())
    loss.backward()
    for name, parameter in model.named_parameters():
        scale = max(float(expected[name].norm()), 1e-6)
        if float((_gradient(parameter) - expected[name]).norm()) > TOLERANCE * scale + 1e-7:
            raise SystemExit(f"{name}: the gradients differ")
    count = len(expected)
    print(f"ok: loss {float(loss.detach()):.6f}, the gradients of {count} parameters are equal")


if __name__ == "__main__":
    main()
