"""The Vision Transformer image tower (arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastclip.models.config import Projection, ViTConfig
from fastclip.models.layers import LayerNorm, ResidualBlock, build_projection, run_blocks


class VisionTransformer(nn.Module):
    """Patches and a class token through pre-norm blocks; the class token is the image's feature.

    Attributes:
        recompute: store only the blocks' inputs for backward.
        last_row: of the last block compute the class token alone.
        patch_dropout: share of the patches left out in training, others for each image (FLIP,
            arXiv 2212.00794).
    """

    def __init__(self, config: ViTConfig, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        width, patch = config.width, config.patch_size
        scale = width**-0.5
        self.recompute = False
        self.last_row = True
        self.patch_dropout = 0.0
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
        return self.proj(self.represent(images))

    def represent(self, images: Tensor) -> Tensor:
        """What `proj` is given: the normalised class token, [B, width]."""
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        # The stream runs in the dtype of the products, not in the parameters' fp32.
        places = self.positional_embedding.to(patches.dtype)
        class_token = self.class_embedding.to(patches.dtype) + places[0]
        patches = self._some(patches + places[1:])
        x = torch.cat([class_token.expand(patches.shape[0], 1, -1), patches], dim=1)
        x = run_blocks(
            self.blocks,
            self.ln_pre(x),
            rows=0,
            recompute=self.recompute,
            last_row=self.last_row,
        )
        return self.ln_post(x)

    def _some(self, patches: Tensor) -> Tensor:
        """Those of [B, L, width] that are not dropped, in no order."""
        if not self.training or self.patch_dropout == 0.0:
            return patches
        batch, length, width = patches.shape
        kept = kept_patches(length, self.patch_dropout)
        chance = torch.rand(batch, length, device=patches.device)
        rows = chance.topk(kept, dim=1, sorted=False).indices
        rows = rows + torch.arange(batch, device=patches.device)[:, None] * length
        return patches.flatten(0, 1).index_select(0, rows.flatten()).view(batch, kept, width)


def kept_patches(patches: int, dropout: float) -> int:
    """How many of an image's patches are not dropped: at least one."""
    return max(1, round(patches * (1.0 - dropout)))
