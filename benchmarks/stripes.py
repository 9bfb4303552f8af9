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


def contrastive(case: Case, impl: Impl) -> Step:
    """Both passes of the softmax loss; this rank's column sums stand in for all ranks'."""
    passes: ModuleType = reference
    if impl == "triton":
        from fastclip.kernels import contrastive as passes

    @torch.no_grad()
    def step(operands: Operands) -> Result:
        image, text, scale, _ = operands
        rows = image[: case.rows]
        statistics = passes.contrastive_statistics(rows, text, scale)
        others_of_row, others_of_column, own, gap = statistics
        mine = others_of_column[: case.rows]
        loss = reference.contrastive_loss(others_of_row, mine, own, gap, case.pairs)
        own_of_column = own.repeat(case.world)
        gradients = passes.contrastive_gradients(
            rows, text, scale, others_of_row, others_of_column, own_of_column
        )
        return Result(loss, gradients.d_rows, gradients.d_columns)

    return step


def sigmoid(case: Case, impl: Impl) -> Step:
    """Both passes of the sigmoid loss."""
    passes: ModuleType = reference
    if impl == "triton":
        from fastclip.kernels import sigmoid as passes

    @torch.no_grad()
    def step(operands: Operands) -> Result:
        image, text, scale, bias = operands
        assert bias is not None
        rows = image[: case.rows]
        loss = passes.sigmoid_loss(rows, text, scale, bias)
        gradients = passes.sigmoid_gradients(rows, text, scale, bias)
        return Result(loss, gradients.d_rows, gradients.d_columns)

    return step
