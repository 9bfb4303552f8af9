"""The text tower: a causal transformer read out at the end-of-text token (section 2.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastclip.models.config import Projection, TextConfig
from fastclip.models.layers import (
    LayerNorm,
    ResidualBlock,
    build_projection,
    compute_dtype,
    run_block,
)


class TextTransformer(nn.Module):
    """Tokens through causal pre-norm blocks.

    The mask is causal and the read-out stands at the end of text, so that what follows it never
    matters: tokens may be cut after the longest text of a batch without changing any feature.
    """

    def __init__(self, config: TextConfig, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        width = config.width
        self.recompute = False
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, width))
        self.blocks = nn.ModuleList(
            ResidualBlock(
                width,
                config.heads,
                config.mlp_width,
                config.activation,
                causal=True,
                depth=config.layers,
            )
            for _ in range(config.layers)
        )
        self.ln_final = LayerNorm(width)
        self.proj = build_projection(width, embed_dim, projection)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L] -> features [B, embed_dim], not yet of unit length.

        The end of text is the first largest id of a row, as in OpenAI's code.
        """
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = x.to(compute_dtype(x))
        for block in self.blocks:
            x = run_block(block, x, recompute=self.recompute)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return self.proj(self.ln_final(x[rows, tokens.argmax(dim=1)]))
