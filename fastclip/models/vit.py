"""The Vision Transformer image tower (arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastclip.models.config import Projection, ViTConfig
from fastclip.models.layers import LayerNorm, ResidualBlock, build_projection, run_block


class VisionTransformer(nn.Module):
    """Patches and a class token through pre-norm blocks; the class token is the image's feature."""

    def __init__(self, config: ViTConfig, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        scale = width**-0.5
        self.recompute = False
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(
            scale * torch.randn(config.grid_size**2 + 1, width)
        )
        self.ln_pre = LayerNorm(width)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                width,
                config.heads,
                config.mlp_width,
                config.activation,
                causal=False,
                depth=config.layers,
            )
            for _ in range(config.layers)
        )
        self.ln_post = LayerNorm(width)
        self.proj = build_projection(width, embed_dim, projection)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, R, R] -> features [B, embed_dim], not yet of unit length."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        # The stream runs in the dtype of the products, not in the parameters' fp32.
        class_token = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = torch.cat([class_token, patches], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        return self.proj(self.ln_post(x[:, 0]))
