"""The text tower: a causal transformer read out at the end-of-text token (section 2.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.config import Projection, TextConfig
from fastclip.models.layers import (
    LayerNorm,
    ResidualBlock,
    build_projection,
    compute_dtype,
    run_blocks,
)
from fastclip.tokenizer.packing import PackedTokens, Segments


class TextTransformer(nn.Module):
    """Tokens through causal pre-norm blocks.

    The mask is causal and the read-out stands at the end of text, so that what follows it never
    matters: texts may be packed, or cut after the longest of a batch, without changing any feature.

    Attributes:
        recompute: store only the blocks' inputs for backward.
        last_row: of the last block compute the ends of texts alone.
    """

    def __init__(self, config: TextConfig, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        width = config.width
        self.recompute = False
        self.last_row = True
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

    def forward(self, tokens: Tensor | PackedTokens) -> Tensor:
        """Token ids [B, L], or packed, -> features [B, embed_dim], not yet of unit length.

        The end of text is the first largest id of a row, as in OpenAI's code.
        """
        if isinstance(tokens, PackedTokens):
            return self._packed(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = x.to(compute_dtype(x))
        return self._read_out(x, tokens.argmax(dim=1), None)

    def _packed(self, tokens: PackedTokens) -> Tensor:
        places = F.embedding(tokens.positions, self.positional_embedding)
        x = self.token_embedding(tokens.ids) + places
        x = x.to(compute_dtype(x))
        ends = tokens.segments.starts[1:] - 1
        return self._read_out(x, ends, tokens.segments).index_select(0, tokens.places)

    def _read_out(self, x: Tensor, rows: Tensor, segments: Segments | None) -> Tensor:
        x = run_blocks(
            self.blocks,
            x,
            rows=rows,
            segments=segments,
            recompute=self.recompute,
            last_row=self.last_row,
        )
        return self.proj(self.ln_final(x))
