"""What every kernel means, in plain PyTorch: specification, CPU path, test oracle and baseline.

Notation: N pairs over all ranks, of which this rank's *rows* are b consecutive ones, from pair
`row_offset` on; D dims; s the (exponentiated) scale. S = s·rows·columnsᵀ is [b, N] and is never
held whole: it is computed in chunks of rows, forward for its statistics and again for gradients, so
that extra memory is O(N·D) plus one chunk. Operands are upcast to fp32 (fp64 stays fp64) before
anything is multiplied, and the scale is applied to the product.

The own pair S_ii is kept apart from the other logits everywhere. R_i − S_ii, which goes to zero as
training converges, is then softplus(O_i − S_ii) with O_i the log-sum-exp of the others, and loses
no digits; nor does 1 − p_ii in the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits computed at a time (16 MiB in fp32)."""


class ContrastiveStatistics(NamedTuple):
    """What the first pass over S leaves behind; log-sum-exps in fp64, the rest in compute dtype.

    Rounded to fp32, a log-sum-exp near 80 would be off by 4e-6, and with it a whole row of G.
    """

    others_of_row: Tensor
    """[b], log-sum-exp over the row without its own pair; complete."""

    others_of_column: Tensor
    """[N], log-sum-exp over this rank's rows of each column without its own pair; partial."""

    own: Tensor
    """[b], S_ii, the logit of the own pair."""

    gap: Tensor
    """[b], S_ii − Σ_j T_ij S_ij for targets T; zero with one positive and no smoothing."""


class ContrastiveGradients(NamedTuple):
    """Gradients of the loss with respect to its operands; None where not asked for."""

    d_rows: Tensor | None
    """[b, D]; complete."""

    d_columns: Tensor | None
    """[N, D]; this rank's rows' part."""

    d_scale: Tensor
    """[]; this rank's rows' part."""


class SigmoidGradients(NamedTuple):
    """As `ContrastiveGradients`, with the bias."""

    d_rows: Tensor | None
    d_columns: Tensor | None
    d_scale: Tensor
    d_bias: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which features of `dtype` are multiplied and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveStatistics:
    """First pass of the softmax contrastive loss (InfoNCE in both directions).

    Args:
        rows: [b, D], features of one tower; pair `row_offset` + i is row i.
        columns: [N, D], features of the other tower, all ranks' pairs.
        scale: [], multiplies the similarities.
        row_offset: index of the first row's own column.
        row_ids, column_ids: int64 [b] and [N]; equal ids are positives of each other. None: a
            pair's only positive is itself.
        label_smoothing: share of each target that is spread evenly over all N.
        chunk_elements: logits held at a time.
    """
    rows, columns, scale = _upcast(rows, columns, scale)
    count = columns.shape[0]
    own = scale * (rows * columns[row_offset : row_offset + rows.shape[0]]).sum(1)
    others_of_row, gap = torch.empty_like(own, dtype=torch.float64), torch.zeros_like(own)
    others_of_column = columns.new_full((count,), float("-inf"), dtype=torch.float64)
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        logits = scale * (rows[chunk] @ columns.T)
        if row_ids is not None or label_smoothing > 0:
            targets = _targets(
                chunk, row_offset, count, row_ids, column_ids, label_smoothing, logits
            )
            # Differences before the weighting: large logits of either sign cancel exactly.
            behind = own[chunk, None] - logits
            # The own logit was summed in another order than the product: rounding is no gap.
            _own_entries(behind, chunk, row_offset).zero_()
            gap[chunk] = (targets * behind).sum(1)
        _own_entries(logits, chunk, row_offset).fill_(float("-inf"))
        others_of_row[chunk] = _logsumexp(logits, 1)
        others_of_column = torch.logaddexp(others_of_column, _logsumexp(logits, 0))
    return ContrastiveStatistics(others_of_row, others_of_column, own, gap)


def contrastive_loss(
    others_of_row: Tensor, others_of_column: Tensor, own: Tensor, gap: Tensor, count: int
) -> Tensor:
    """This rank's rows' part of the loss, []; the statistics, [b], are complete."""
    both = _softplus(others_of_row - own) + _softplus(others_of_column - own)
    return (both / 2 + gap).sum(dtype=torch.float64) / count


def contrastive_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    others_of_row: Tensor,
    others_of_column: Tensor,
    own_of_column: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveGradients:
    """Second pass: G = (e^{S−R} + e^{S−C} − 2T) / 2N recomputed chunk by chunk, and its products.

    Args:
        others_of_row: [b] from the first pass.
        others_of_column: [N], complete: combined over all ranks' rows.
        own_of_column: [N], S_jj of all pairs.
        need_rows, need_columns: whether that tower's gradient is wanted (a frozen one's is not).
    """
    rows, columns, scale = _upcast(rows, columns, scale)
    count = columns.shape[0]
    own = own_of_column[row_offset : row_offset + rows.shape[0]]
    row_lse, row_rest = split(torch.logaddexp(others_of_row, own.double()), own.dtype)
    column_lse, column_rest = split(
        torch.logaddexp(others_of_column, own_of_column.double()), own.dtype
    )
    others_of_own_column = others_of_column[row_offset : row_offset + rows.shape[0]]
    own_gradient = -torch.sigmoid(others_of_row - own) - torch.sigmoid(others_of_own_column - own)
    d_rows = torch.empty_like(rows) if need_rows else None
    d_columns = torch.zeros_like(columns) if need_columns else None
    d_scale = scale.new_zeros(())
    plain = row_ids is None and label_smoothing == 0
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        similarity = rows[chunk] @ columns.T
        logits = scale * similarity
        gradient = (logits - row_lse[chunk, None]).sub_(row_rest[chunk, None]).exp_()
        gradient += (logits - column_lse).sub_(column_rest).exp_()
        entries = own_gradient[chunk]
        if not plain:
            targets = _targets(
                chunk, row_offset, count, row_ids, column_ids, label_smoothing, logits
            )
            entries = entries + 2 * (1 - _own_entries(targets, chunk, row_offset))
            gradient -= 2 * targets
        _own_entries(gradient, chunk, row_offset).copy_(entries)
        d_scale += (gradient * similarity).sum()
        if d_rows is not None:
            d_rows[chunk] = gradient @ columns
        if d_columns is not None:
            d_columns.addmm_(gradient.T, rows[chunk])
    # 1/2N at the end: inside the products it would underflow in half precision.
    factor = 1 / (2 * count)
    if d_rows is not None:
        d_rows *= scale * factor
    if d_columns is not None:
        d_columns *= scale * factor
    return ContrastiveGradients(d_rows, d_columns, d_scale * factor)


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """This rank's rows' part of the sigmoid loss (arXiv 2303.15343), [].

    −(1/N)·Σ_ij log σ(y_ij (S_ij + bias)) with y_ij = 1 for positives and −1 otherwise.
    """
    rows, columns, scale, bias = _upcast(rows, columns, scale, bias)
    count = columns.shape[0]
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        logits = scale * (rows[chunk] @ columns.T) + bias
        signs = _signs(chunk, row_offset, row_ids, column_ids, logits)
        total += _softplus(-signs * logits).sum(dtype=torch.float64)
    return total / count


def sigmoid_gradients(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SigmoidGradients:
    """Gradients of `sigmoid_loss`; columns, scale and bias are this rank's rows' part."""
    rows, columns, scale, bias = _upcast(rows, columns, scale, bias)
    count = columns.shape[0]
    d_rows = torch.empty_like(rows) if need_rows else None
    d_columns = torch.zeros_like(columns) if need_columns else None
    d_scale, d_bias = scale.new_zeros(()), bias.new_zeros(())
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        similarity = rows[chunk] @ columns.T
        logits = scale * similarity + bias
        signs = _signs(chunk, row_offset, row_ids, column_ids, logits)
        gradient = -signs * torch.sigmoid(-signs * logits)
        d_scale += (gradient * similarity).sum()
        d_bias += gradient.sum()
        if d_rows is not None:
            d_rows[chunk] = gradient @ columns
        if d_columns is not None:
            d_columns.addmm_(gradient.T, rows[chunk])
    if d_rows is not None:
        d_rows *= scale / count
    if d_columns is not None:
        d_columns *= scale / count
    return SigmoidGradients(d_rows, d_columns, d_scale / count, d_bias / count)


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """Exponentials and sums in the dtype of the logits, the logarithm and its shift in fp64."""
    most = logits.amax(dim, keepdim=True)
    # Without any other pair (N = 1) the maximum is −inf, and −inf − −inf is not 0.
    most.masked_fill_(most == float("-inf"), 0.0)
    total = (logits - most).exp_().sum(dim)
    return total.double().log_() + most.squeeze(dim)


def split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp64 as the sum of two tensors of `dtype`, of which the second is the first's rounding."""
    high = x.to(dtype)
    return high, (x - high).to(dtype)


def _softplus(x: Tensor) -> Tensor:
    # torch's own threshold of 20 is right for fp32 and costs fp64 half of its digits.
    return F.softplus(x, threshold=40.0)


def _upcast(rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dtype = compute_dtype(rows.dtype)
    return tuple(tensor.to(dtype) for tensor in (rows, *others))


def _chunks(rows: int, count: int, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // max(count, 1))
    for first in range(0, rows, size):
        yield slice(first, min(first + size, rows))


def _own_entries(matrix: Tensor, chunk: slice, row_offset: int) -> Tensor:
    """View of the own pairs' entries in a chunk's [rows, N] matrix."""
    return matrix.diagonal(row_offset + chunk.start)


def _targets(
    chunk: slice,
    row_offset: int,
    count: int,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    label_smoothing: float,
    like: Tensor,
) -> Tensor:
    """Targets of a chunk, [rows, N]: even over a row's positives, smoothed; rows sum to 1."""
    positive = torch.zeros_like(like)
    if row_ids is None or column_ids is None:
        _own_entries(positive, chunk, row_offset).fill_(1.0)
    else:
        positive.copy_(row_ids[chunk, None] == column_ids[None, :])
        positive /= positive.sum(1, keepdim=True)
    return positive.mul_(1 - label_smoothing).add_(label_smoothing / count)


def _signs(
    chunk: slice, row_offset: int, row_ids: Tensor | None, column_ids: Tensor | None, like: Tensor
) -> Tensor:
    """+1 for positives and −1 for the rest, [rows, N]."""
    if row_ids is None or column_ids is None:
        signs = torch.full_like(like, -1.0)
        _own_entries(signs, chunk, row_offset).fill_(1.0)
        return signs
    return (row_ids[chunk, None] == column_ids[None, :]).to(like.dtype).mul_(2).sub_(1)
