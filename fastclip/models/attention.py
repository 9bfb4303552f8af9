"""Attention. Every head of every tower goes through `attend`, where other back ends plug in."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.tokenizer.packing import Segments

logger = logging.getLogger("fastclip")

AttentionImpl = Literal["auto", "sdpa", "varlen", "xformers"]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """What computes attention."""

    impl: AttentionImpl = "auto"
    """sdpa (PyTorch's, any device), varlen (PyTorch's for packed texts; CUDA, bf16 or fp16),
    xformers (CUDA), or auto: varlen for packed texts where it runs, sdpa elsewhere."""

    last_row: bool = True
    """Of a tower's last block compute the row alone that is read out; exact."""

    def __post_init__(self) -> None:
        if self.impl not in get_args(AttentionImpl):
            choices = ", ".join(get_args(AttentionImpl))
            raise ValueError(f"attention.impl is {choices}, not {self.impl!r}")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    segments: Segments | None = None,
    visible: Tensor | None = None,
    impl: AttentionImpl = "auto",
) -> Tensor:
    """Scaled dot-product attention, of equally long sequences or of packed ones.

    Args:
        query: [B, Lq, H, d]; packed, [T, H, d], or [B, H, d]: one for each sequence.
        key: [B, Lk, H, d]; packed, [T, H, d].
        value: as `key`.
        causal: position i sees positions up to i only.
        segments: which of the T positions are whose; None for equally long sequences.
        visible: bool [B, Lk], keys that the queries of a sequence see; None for all. Not with
            `segments`, nor with `causal`.
        impl: see `AttentionConfig`.

    Returns:
        As `query`, in the operands' dtype.

    Raises:
        ValueError: this `impl` cannot run on these operands.
        ImportError: xformers is not installed.
    """
    if query.shape[0] == 0:
        return query  # no sequence; on some GPUs PyTorch returns no tensor then
    chosen = choose(impl, query, packed=segments is not None)
    if segments is None:
        if chosen == "xformers" and visible is None:
            return _xformers(query, key, value, causal, None)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if visible is None else visible[:, None, None, :]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        ).transpose(1, 2)
    if chosen == "varlen":
        return _varlen(query, key, value, causal, segments)
    if chosen == "xformers":
        return _xformers(query, key, value, causal, segments)
    # The decorator's types have lost the arguments.
    return _by_length(query, key, value, causal, segments)  # pyright: ignore[reportCallIssue]


def choose(impl: AttentionImpl, like: Tensor, *, packed: bool) -> AttentionImpl:
    """Which of sdpa, varlen and xformers runs on operands like `like`.

    Raises:
        ValueError: `impl` does not run there.
        ImportError: xformers is asked for and not installed.
    """
    fits_varlen = like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)
    if impl == "varlen" and not fits_varlen:
        raise ValueError(
            f"attention.impl=varlen runs on CUDA in bf16 or fp16, not on {like.device.type} in "
            f"{like.dtype}: set attention.impl=auto, or engine.precision=bf16"
        )
    if impl == "xformers":
        if not like.is_cuda:
            raise ValueError(
                f"attention.impl=xformers runs on CUDA, not on {like.device.type}: "
                "set attention.impl=auto"
            )
        return impl
    if impl == "sdpa" or not packed:
        return "sdpa"
    if fits_varlen:
        return "varlen"
    if like.is_cuda:
        _note_slow_packing()
    return "sdpa"


@cache
def _note_slow_packing() -> None:
    logger.warning(
        "attention of packed texts goes group by group of equal lengths, which is slow on a GPU: "
        "PyTorch's packed kernels need engine.precision=bf16 or fp16"
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, causal: bool, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = segments.starts, segments.bound
    if query.shape[0] != key.shape[0]:
        starts = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)
        longest = 1
    result = varlen_attn(
        query, key, value, starts, segments.starts, longest, segments.bound,
        window_size=(-1, 0 if causal else -1),
    )  # fmt: skip
    assert isinstance(result, Tensor)
    return result


def _xformers(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, segments: Segments | None
) -> Tensor:
    fmha = find_xformers()
    if segments is None:
        mask = fmha.attn_bias.LowerTriangularMask() if causal else None
        return fmha.memory_efficient_attention(query, key, value, attn_bias=mask)
    kind = fmha.attn_bias.BlockDiagonalCausalMask if causal else fmha.attn_bias.BlockDiagonalMask
    lengths = list(segments.lengths)
    own = lengths if query.shape[0] == key.shape[0] else [1] * len(lengths)
    bias = kind.from_seqlens(own, lengths)
    rows = (x[None] for x in (query, key, value))
    return fmha.memory_efficient_attention(*rows, attn_bias=bias)[0]


def find_xformers() -> Any:
    """xformers' attention module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from xformers.ops import fmha  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "attention.impl=xformers needs xformers: pip install xformers, or set "
            "attention.impl=auto"
        ) from error
    return fmha


@torch.compiler.disable
def _by_length(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, segments: Segments
) -> Tensor:
    """Packed sequences of one length lie side by side: each such group is a batch of its own.

    Splitting and joining move each number once in either direction; the gradient of a slice would
    be as large as the whole.
    """
    sizes = [count * length for count, length in segments.groups]
    counts = [count for count, _ in segments.groups]
    single = query.shape[0] != key.shape[0]
    groups = zip(
        counts, query.split(counts if single else sizes), key.split(sizes), value.split(sizes),
        strict=True,
    )  # fmt: skip
    results = []
    for count, *parts in groups:
        q, k, v = (x.unflatten(0, (count, -1)).transpose(1, 2) for x in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        results.append(attended.transpose(1, 2).flatten(0, 1))
    return torch.cat(results) if results else query


Rows = Tensor | int
"""Which position of each sequence: one number for all of them, or int64 [B]; of packed sequences,
int64 [B] counted from the first sequence's begin."""


def pick(x: Tensor, rows: Rows) -> Tensor:
    """One position of each sequence: [B, L, W] or packed [T, W] -> [B, W]."""
    if isinstance(rows, int):
        return x[:, rows]
    if x.dim() == 3:
        rows = rows + torch.arange(x.shape[0], device=x.device) * x.shape[1]
        x = x.flatten(0, 1)
    # Each position once: adding up its gradient takes no sorting, which indexing would do.
    return x.index_select(0, rows)


class QueryKeyValue(nn.Linear):
    """One product for queries, keys and values of all heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, 3 * width)
        self.heads = heads

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, rows: Rows | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[..., width] -> three times [..., H, d]; with `rows`, queries of these alone."""
        if rows is None:
            query, key, value = super().forward(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            return query, key, value
        width = self.in_features
        query = F.linear(pick(x, rows), self.weight[:width], self.bias[:width])
        both = F.linear(x, self.weight[width:], self.bias[width:])
        key, value = both.unflatten(-1, (2, self.heads, -1)).unbind(-3)
        return query.unflatten(-1, (self.heads, -1)), key, value


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Attributes:
        impl: see `AttentionConfig`.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.impl: AttentionImpl = "auto"
        self.qkv = QueryKeyValue(width, heads)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments | None = None,
        rows: Rows | None = None,
    ) -> Tensor:
        """What `qkv` gave, [B, L, H, d], to [B, L, width]; with `segments` [T, H, d] to [T, width].

        With `rows`, which `qkv` had too, to [B, width]; of packed sequences they are the last.
        """
        if rows is None:
            attended = attend(
                query, key, value, causal=self.causal, segments=segments, impl=self.impl
            )
        elif segments is not None:
            attended = attend(query, key, value, causal=False, segments=segments, impl=self.impl)
        else:
            visible = self._visible(key, rows)
            attended = attend(
                query[:, None], key, value, causal=False, visible=visible, impl=self.impl
            )[:, 0]
        return self.out(attended.flatten(-2))

    def _visible(self, key: Tensor, rows: Rows) -> Tensor | None:
        """Which positions the chosen ones see: bool [B, L], None for all."""
        if not self.causal:
            return None
        assert isinstance(rows, Tensor)
        return torch.arange(key.shape[1], device=key.device) <= rows[:, None]
