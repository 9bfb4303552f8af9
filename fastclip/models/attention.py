"""Attention. Every head of every tower goes through `attend`, where other back ends plug in."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
    """Scaled dot-product attention.

    Args:
        query: [B, Lq, H, d].
        key: [B, Lk, H, d].
        value: [B, Lk, H, d].
        causal: position i sees positions up to i only.

    Returns:
        [B, Lq, H, d], in the operands' dtype.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused product for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        attended = attend(*qkv.unbind(2), causal=self.causal)
        return self.out(attended.reshape(batch, length, width))
