"""One rank's share of a loss on one GPU: its rows against all columns, without communication.

What other ranks would send is made up of this rank's own: the time is right, the gradients are not
compared with anything.
"""

from __future__ import annotations

from types import ModuleType

import torch

from benchmarks.cases import Case
from benchmarks.losses import Operands, Result, Step
from fastclip.kernels import reference
from fastclip.ops.dispatch import Impl


def contrastive(case: Case, impl: Impl, budget: int) -> Step:
    """Both passes of the softmax loss; this rank's column sums stand in for all ranks'.

    Args:
        budget: bytes for exponentials kept from the first pass.
    """
    passes, pairs = _modules("contrastive", impl)

    @torch.no_grad()
    def step(operands: Operands) -> Result:
        image, text, scale, _ = operands
        mine = image[: case.rows], text[: case.rows]
        rows, own_columns, product, row_norm, _ = pairs.prepare_pairs(*mine, image.dtype)
        # Columns come with their norms, and these features have unit length.
        operands_of_both = rows, text, scale, product, row_norm, row_norm.new_ones(case.pairs)
        statistics = passes.contrastive_statistics(*operands_of_both, memory_budget=budget)
        others_of_row, others_of_column, gap, exponentials = statistics
        loss, row_terms, column_terms, own_entry = passes.contrastive_summary(
            others_of_row, others_of_column, product.repeat(case.world), scale, gap, None
        )
        one = torch.ones_like(loss)
        row_products, column_products, _ = passes.contrastive_products(
            *operands_of_both, row_terms, column_terms, own_entry, exponentials, one
        )
        d_rows, d_columns = pairs.finish_pairs(
            row_products, column_products[: case.rows], rows, own_columns, own_entry, *mine,
            scale, one, 0.5 / case.pairs,
        )  # fmt: skip
        return Result(loss, d_rows, d_columns)

    return step


def sigmoid(case: Case, impl: Impl) -> Step:
    """The sigmoid loss's pass."""
    passes, pairs = _modules("sigmoid", impl)

    @torch.no_grad()
    def step(operands: Operands) -> Result:
        image, text, scale, bias = operands
        assert bias is not None
        mine = image[: case.rows], text[: case.rows]
        rows, own_columns, product, _, _ = pairs.prepare_pairs(*mine, image.dtype)
        loss, row_products, column_products, _, _, own_entry = passes.sigmoid_products(
            rows, text, scale, bias, product
        )
        one = torch.ones_like(loss)
        d_rows, d_columns = pairs.finish_pairs(
            row_products, column_products[: case.rows], rows, own_columns, own_entry, *mine,
            scale, one, 1 / case.pairs,
        )  # fmt: skip
        return Result(loss, d_rows, d_columns)

    return step


def _modules(loss: str, impl: Impl) -> tuple[ModuleType, ModuleType]:
    """Where a loss's passes are, and what concerns each pair alone."""
    if impl == "reference":
        return reference, reference
    from fastclip.kernels import contrastive, pairs, sigmoid

    return (contrastive if loss == "contrastive" else sigmoid), pairs
