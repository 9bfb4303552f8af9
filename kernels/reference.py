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

NORM_FLOOR = 1e-12
"""Shortest length that normalisation divides by, torch's own."""


class PreparedPairs(NamedTuple):
    """Operands of the passes over S, and what is known of each pair alone."""

    rows: Tensor
    """[b, D], image features, normalised if asked for, in the operands' dtype."""

    columns: Tensor
    """[b, D], text features likewise."""

    product: Tensor
    """[b], S_ii / s, in compute dtype like the norms."""

    row_norm: Tensor
    """[b], norms of `rows`: with the columns' they bound S."""

    column_norm: Tensor
    """[b]"""


class ContrastiveStatistics(NamedTuple):
    """What the first pass over S leaves behind; log-sum-exps in fp64, the rest in compute dtype.

    Rounded to fp32, a log-sum-exp near 80 would be off by 4e-6, and with it a whole row of G.
    """

    others_of_row: Tensor
    """[b], log-sum-exp over the row without its own pair; complete."""

    others_of_column: Tensor
    """[N], log-sum-exp over this rank's rows of each column without its own pair; partial."""

    gap: Tensor
    """[b], S_ii − Σ_j T_ij S_ij for targets T; zero with one positive and no smoothing."""

    exponentials: Tensor
    """[c], exponentials of c logits, kept for the second pass by the implementation; c may be 0."""


class ContrastiveSummary(NamedTuple):
    """What complete statistics say: the loss, and what the second pass takes from them."""

    loss: Tensor
    """[], this rank's rows' part of the loss."""

    row_terms: Tensor
    """[2, b], power and weight: e^power · weight is q·e^−O of the row, O being the others'
    log-sum-exp and q = 1 − p_ii their share of the softmax."""

    column_terms: Tensor
    """[2, N], likewise of the columns."""

    own_entry: Tensor
    """[b], G_ii · 2N."""


class ContrastiveProducts(NamedTuple):
    """Products of G · 2N without its own pairs; None where not asked for."""

    row_products: Tensor | None
    """[b, D], G · columns; complete."""

    column_products: Tensor | None
    """[N, D], Gᵀ · rows; this rank's rows' part."""

    d_scale: Tensor
    """[], Σ G∘S / s with own pairs, finished; this rank's rows' part."""


class SigmoidProducts(NamedTuple):
    """The sigmoid loss and, as in `ContrastiveProducts`, what its gradients are made of."""

    loss: Tensor
    """[], this rank's rows' part."""

    row_products: Tensor | None
    column_products: Tensor | None
    d_scale: Tensor
    d_bias: Tensor
    own_entry: Tensor
    """[b], G_ii · N."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which features of `dtype` are multiplied and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepare_pairs(
    image: Tensor, text: Tensor, dtype: torch.dtype, *, normalize: bool = False
) -> PreparedPairs:
    """Operands of the passes.

    Args:
        image: [b, D], features of one tower.
        text: [b, D], features of the other; row i belongs to image i.
        dtype: the operands'.
        normalize: divide each row by its length, or by 1e-12 if that is more, as torch's normalize
            does; lengths are taken before the cast.
    """
    wide = compute_dtype(image.dtype)
    rows, columns = (
        F.normalize(x.to(wide), dim=1, eps=NORM_FLOOR).to(dtype) if normalize else x.to(dtype)
        for x in (image, text)
    )
    a, b = _upcast(rows, columns)
    return PreparedPairs(rows, columns, (a * b).sum(1), a.norm(dim=1), b.norm(dim=1))


def finish_pairs(
    row_products: Tensor | None,
    column_products: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    own_entry: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    upstream: Tensor,
    factor: float,
    *,
    normalize: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the features, in their dtype; None where there are no products.

    Args:
        row_products, column_products: [b, D], of this rank's pairs and complete.
        rows, columns: [b, D], this rank's operands.
        own_entry: [b], G_ii as in the products.
        image, text: [b, D], the features that `prepare_pairs` got.
        scale, upstream: [], they and `factor` multiply the result. 1/N belongs here: inside the
            products it would underflow in half precision.
    """
    scale, upstream = _upcast(image, scale, upstream)[1:]
    factors = scale * upstream * factor
    results = []
    for products, other, x in ((row_products, columns, image), (column_products, rows, text)):
        if products is None:
            results.append(None)
            continue
        wide = products.dtype
        gradient = products + own_entry[:, None] * other.to(wide)
        if normalize:
            length = x.to(wide).norm(dim=1, keepdim=True)
            unit = x.to(wide) / length.clamp_min(NORM_FLOOR)
            along = (unit * gradient).sum(1, keepdim=True)
            # Below the floor the length counts as constant, as in torch's normalize.
            along = along.masked_fill(length < NORM_FLOOR, 0.0)
            gradient = (gradient - unit * along) / length.clamp_min(NORM_FLOOR)
        results.append((gradient * factors).to(x.dtype))
    return results[0], results[1]


def contrastive_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    product: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    positives: Tensor | None = None,
    pair_count: int | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int = 0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveStatistics:
    """First pass of the softmax contrastive loss (InfoNCE in both directions).

    Args:
        rows: [b, D], operands of one tower; pair `row_offset` + i is row i.
        columns: [n, D], operands of the other tower, all ranks' pairs or a part of them.
        scale: [], multiplies the similarities.
        product: [b], dot product of each own pair.
        row_norm, column_norm: [b] and [n], norms of the operands; only the kernels need them.
        row_offset: index of the first row's own column; n where the columns hold no row's own.
        row_ids, column_ids: int64 [b] and [n]; equal ids are positives of each other. None: a
            pair's only positive is itself.
        positives: [b], how many of all columns share each row's id; None: counted in `columns`.
        pair_count: N, pairs of all ranks; None: n.
        label_smoothing: share of each target that is spread evenly over all N.
        memory_budget: bytes that kept exponentials may take; this implementation keeps none.
        chunk_elements: logits held at a time.
    """
    del row_norm, column_norm, memory_budget
    rows, columns, scale, product = _upcast(rows, columns, scale, product)
    count = columns.shape[0]
    targets_of = _Targets(row_ids, column_ids, positives, label_smoothing, pair_count or count)
    own = scale * product
    others_of_row = torch.full_like(own, float("-inf"), dtype=torch.float64)
    gap = torch.zeros_like(own)
    others_of_column = columns.new_full((count,), float("-inf"), dtype=torch.float64)
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        logits = scale * (rows[chunk] @ columns.T)
        if not targets_of.plain:
            targets = targets_of.chunk(chunk, row_offset, logits)
            # Differences before the weighting: large logits of either sign cancel exactly.
            behind = own[chunk, None] - logits
            # The own logit was summed in another order than the product: rounding is no gap.
            _own_entries(behind, chunk, row_offset).zero_()
            gap[chunk] = (targets * behind).sum(1)
        _own_entries(logits, chunk, row_offset).fill_(float("-inf"))
        others_of_row[chunk] = _logsumexp(logits, 1)
        others_of_column = torch.logaddexp(others_of_column, _logsumexp(logits, 0))
    return ContrastiveStatistics(others_of_row, others_of_column, gap, rows.new_empty(0))


def contrastive_summary(
    others_of_row: Tensor,
    others_of_column: Tensor,
    product_of_column: Tensor,
    scale: Tensor,
    gap: Tensor,
    own_target: Tensor | None,
    *,
    row_offset: int = 0,
    pair_count: int | None = None,
) -> ContrastiveSummary:
    """Between the passes, when statistics are complete.

    Args:
        others_of_row, gap: [b], of all columns.
        others_of_column: [n], of all ranks' rows; the rows' own columns are among them.
        product_of_column: [n], dot product of each column's own pair.
        own_target: [b], T_ii, see `own_targets`; None: 1.
    """
    scale = scale.to(product_of_column.dtype)
    own_of_column = scale * product_of_column
    mine = slice(row_offset, row_offset + others_of_row.shape[0])
    behind_row = others_of_row - own_of_column[mine]
    behind_column = others_of_column - own_of_column
    loss = (_softplus(behind_row) + _softplus(behind_column[mine])) / 2 + gap
    row_share, column_share = torch.sigmoid(behind_row), torch.sigmoid(behind_column)
    own_entry = (-row_share - column_share[mine]).to(own_of_column.dtype)
    if own_target is not None:
        own_entry = own_entry + 2 * (1 - own_target)
    count = pair_count or others_of_column.shape[0]
    total = (loss.sum(dtype=torch.float64) / count).to(own_of_column.dtype)
    return ContrastiveSummary(
        total,
        _power_and_weight(others_of_row, row_share, own_of_column.dtype),
        _power_and_weight(others_of_column, column_share, own_of_column.dtype),
        own_entry,
    )


def contrastive_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    product: Tensor,
    row_norm: Tensor,
    column_norm: Tensor,
    row_terms: Tensor,
    column_terms: Tensor,
    own_entry: Tensor,
    exponentials: Tensor,
    upstream: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    positives: Tensor | None = None,
    pair_count: int | None = None,
    label_smoothing: float = 0.0,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> ContrastiveProducts:
    """Second pass: G = e^{S−R} + e^{S−C} − 2T, recomputed chunk by chunk, and its products.

    With O the others' log-sum-exp and q their share, e^{S−R} is q·e^{S−O}: nothing cancels.

    Args:
        row_terms, column_terms, own_entry: from `contrastive_summary`.
        exponentials: from the first pass.
        upstream: [], multiplies d_scale.
        need_rows, need_columns: whether that tower's gradient is wanted (a frozen one's is not).
    """
    del row_norm, column_norm, exponentials
    rows, columns, scale, product = _upcast(rows, columns, scale, product)
    count = columns.shape[0]
    row_power, row_weight = row_terms
    column_power, column_weight = column_terms
    row_products = torch.zeros_like(rows) if need_rows else None
    column_products = torch.zeros_like(columns) if need_columns else None
    d_scale = (own_entry * product).sum()
    targets_of = _Targets(row_ids, column_ids, positives, label_smoothing, pair_count or count)
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        similarity = rows[chunk] @ columns.T
        logits = scale * similarity
        gradient = (logits + row_power[chunk, None]).exp_().mul_(row_weight[chunk, None])
        gradient += (logits + column_power).exp_().mul_(column_weight)
        if not targets_of.plain:
            gradient -= 2 * targets_of.chunk(chunk, row_offset, logits)
        _own_entries(gradient, chunk, row_offset).zero_()
        d_scale += (gradient * similarity).sum()
        if row_products is not None:
            row_products[chunk] = gradient @ columns
        if column_products is not None:
            column_products.addmm_(gradient.T, rows[chunk])
    d_scale = d_scale * upstream.to(d_scale.dtype) / (2 * (pair_count or count))
    return ContrastiveProducts(row_products, column_products, d_scale)


def own_targets(
    positives: Tensor | None, label_smoothing: float, like: Tensor, pair_count: int
) -> Tensor | None:
    """T_ii, the target of each own pair, like `like` [b]; None where it is 1."""
    if positives is None and label_smoothing == 0:
        return None
    share = torch.ones_like(like) if positives is None else 1.0 / positives.to(like.dtype)
    return share * (1 - label_smoothing) + label_smoothing / pair_count


def positives_of(row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """How many columns share each row's id, fp32 [b]."""
    ordered = column_ids.sort().values
    last = torch.searchsorted(ordered, row_ids, right=True)
    return (last - torch.searchsorted(ordered, row_ids)).float()


def sigmoid_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    pair_count: int | None = None,
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
    return (total / (pair_count or count)).to(rows.dtype)


def sigmoid_products(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor,
    product: Tensor,
    *,
    row_offset: int = 0,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    pair_count: int | None = None,
    need_rows: bool = True,
    need_columns: bool = True,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> SigmoidProducts:
    """`sigmoid_loss` and, in the same pass, the products of G · N without its own pairs.

    No entry needs another's statistics. The own pairs are in the loss and in the gradients of scale
    and bias where the columns hold them. Arguments are as for the softmax.
    """
    rows, columns, scale, bias, product = _upcast(rows, columns, scale, bias, product)
    count = columns.shape[0]
    row_products = torch.zeros_like(rows) if need_rows else None
    column_products = torch.zeros_like(columns) if need_columns else None
    own_entry = -torch.sigmoid(-(scale * product + bias))
    d_scale, d_bias = scale.new_zeros(()), bias.new_zeros(())
    total = torch.zeros((), dtype=torch.float64, device=rows.device)
    for chunk in _chunks(rows.shape[0], count, chunk_elements):
        similarity = rows[chunk] @ columns.T
        logits = scale * similarity + bias
        signs = _signs(chunk, row_offset, row_ids, column_ids, logits)
        total += _softplus(-signs * logits).sum(dtype=torch.float64)
        gradient = -signs * torch.sigmoid(-signs * logits)
        d_scale += (gradient * similarity).sum()
        d_bias += gradient.sum()
        _own_entries(gradient, chunk, row_offset).zero_()
        if row_products is not None:
            row_products[chunk] = gradient @ columns
        if column_products is not None:
            column_products.addmm_(gradient.T, rows[chunk])
    pairs = pair_count or count
    return SigmoidProducts(
        (total / pairs).to(rows.dtype),
        row_products,
        column_products,
        d_scale / pairs,
        d_bias / pairs,
        own_entry,
    )


def _logsumexp(logits: Tensor, dim: int) -> Tensor:
    """Exponentials and sums in the dtype of the logits, the logarithm and its shift in fp64."""
    most = logits.amax(dim, keepdim=True)
    # Without any other pair (N = 1) the maximum is −inf, and −inf − −inf is not 0.
    most.masked_fill_(most == float("-inf"), 0.0)
    total = (logits - most).exp_().sum(dim)
    return total.double().log_() + most.squeeze(dim)


def _power_and_weight(others: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    """n and w with e^n·w = share·e^−others: the rounding of n alone would move a whole row of G."""
    power = (-others).to(dtype)
    weight = share * (-others - power).exp()
    nothing = others == float("-inf")  # no other pair, N = 1
    return torch.stack((power, weight.to(dtype))).masked_fill(nothing, 0.0)


def _softplus(x: Tensor) -> Tensor:
    # torch's own threshold of 20 is right for fp32 and costs fp64 half of its digits.
    return F.softplus(x, threshold=40.0)


def _upcast(rows: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    dtype = compute_dtype(rows.dtype)
    return tuple(tensor.to(dtype) for tensor in (rows, *others))


def _chunks(rows: int, count: int, chunk_elements: int) -> Iterator[slice]:
    size = max(1, chunk_elements // max(count, 1))
    for first in range(0, rows if count else 0, size):
        yield slice(first, min(first + size, rows))


def _own_entries(matrix: Tensor, chunk: slice, row_offset: int) -> Tensor:
    """View of the own pairs' entries in a chunk's [rows, N] matrix."""
    return matrix.diagonal(row_offset + chunk.start)


class _Targets:
    """Rows of the targets: even over a row's positives, smoothed over all pairs; they sum to 1."""

    def __init__(
        self,
        row_ids: Tensor | None,
        column_ids: Tensor | None,
        positives: Tensor | None,
        label_smoothing: float,
        pair_count: int,
    ) -> None:
        self.row_ids, self.column_ids, self.positives = row_ids, column_ids, positives
        if row_ids is not None and column_ids is not None and positives is None:
            self.positives = positives_of(row_ids, column_ids)
        self.smoothing, self.pair_count = label_smoothing, pair_count
        self.plain = row_ids is None and label_smoothing == 0

    def chunk(self, chunk: slice, row_offset: int, like: Tensor) -> Tensor:
        """Targets of a chunk of rows, [rows, n], like `like`."""
        positive = torch.zeros_like(like)
        if self.row_ids is None or self.column_ids is None or self.positives is None:
            _own_entries(positive, chunk, row_offset).fill_(1.0)
        else:
            positive.copy_(self.row_ids[chunk, None] == self.column_ids[None, :])
            positive /= self.positives[chunk, None].to(like.dtype)
        return positive.mul_(1 - self.smoothing).add_(self.smoothing / self.pair_count)


def _signs(
    chunk: slice, row_offset: int, row_ids: Tensor | None, column_ids: Tensor | None, like: Tensor
) -> Tensor:
    """+1 for positives and −1 for the rest, [rows, N]."""
    if row_ids is None or column_ids is None:
        signs = torch.full_like(like, -1.0)
        _own_entries(signs, chunk, row_offset).fill_(1.0)
        return signs
    return (row_ids[chunk, None] == column_ids[None, :]).to(like.dtype).mul_(2).sub_(1)
