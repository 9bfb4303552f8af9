"""The softmax loss on one rank's stripe of S, with the columns gathered or going round."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.kernels.reference import own_targets, positives_of
from fastclip.losses.common import LossGradients
from fastclip.losses.ring import Block, ring_lap
from fastclip.losses.stripe import Stripe, as_gradients
from fastclip.ops.contrastive import (
    contrastive_products,
    contrastive_statistics,
    contrastive_summary,
)


class GatheredStripe(Stripe):
    """The rows against all columns at once."""

    def forward(self, keep: bool) -> Tensor:
        """The global loss, [], fp32 (fp64 for fp64 features).

        Args:
            keep: a backward may follow: keep exponentials within the memory budget.
        """
        settings = self.settings
        self.columns = self.gather(self.own_columns)
        self.column_norm, product = self._gather_numbers()
        column_ids = positives = None
        if self.row_ids is not None:
            column_ids = self.gather(self.row_ids)
            positives = positives_of(self.row_ids, column_ids)
        self.ids = (self.row_ids, column_ids, positives, self.ranks.count, self.ranks.offset)
        others_of_row, others_of_column, gap, self.exponentials = contrastive_statistics(
            self.rows,
            self.columns,
            self.scale,
            self.product,
            self.row_norm,
            self.column_norm,
            *self.ids,
            settings.label_smoothing,
            settings.memory_budget if keep else 0,
            self.impl,
        )
        smoothing, count = settings.label_smoothing, self.ranks.count
        loss, self.row_terms, self.column_terms, self.own_entry = contrastive_summary(
            others_of_row,
            self._combine(others_of_column),
            product,
            self.scale,
            gap,
            own_targets(positives, smoothing, self.product, count),
            count,
            self.ranks.offset,
            self.impl,
        )
        return self.sum(loss)

    def backward(self, need: tuple[bool, bool], upstream: Tensor) -> LossGradients:
        """Gradients by the rank convention; features' in their dtype, not needed ones [0]."""
        row_products, column_products, d_scale = contrastive_products(
            self.rows,
            self.columns,
            self.scale,
            self.product,
            self.row_norm,
            self.column_norm,
            self.row_terms,
            self.column_terms,
            self.own_entry,
            self.exponentials,
            upstream,
            *self.ids,
            self.settings.label_smoothing,
            *need,
            self.impl,
        )
        features = self.finish(
            row_products, self.scatter(column_products), self.own_entry, upstream, need, 2
        )
        return as_gradients(self, *features, d_scale, None)

    def _gather_numbers(self) -> tuple[Tensor, Tensor]:
        """Of all columns the norm and the product with their own row, in one message."""
        if self.settings.alone:
            return self.own_column_norm, self.product
        norm, product = self.own_column_norm, self.product
        both = self.gather(torch.stack((norm.to(product.dtype), product), dim=1))
        return both[:, 0].to(norm.dtype).contiguous(), both[:, 1].contiguous()

    def _combine(self, partial: Tensor) -> Tensor:
        """Log-sum-exp over ranks of each column's partial one."""
        if self.settings.alone:
            return partial
        most = partial.clone()
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self.ranks.group)
        # A column without any other pair (N = 1) has −inf everywhere, and −inf − −inf is not 0.
        shift = most.masked_fill(most == float("-inf"), 0.0)
        total = (partial - shift).exp_()
        dist.all_reduce(total, group=self.ranks.group)
        return total.log_().add_(shift)


class RingStripe(Stripe):
    """The rows against one rank's columns after the other; no rank ever holds a whole tower."""

    def forward(self, keep: bool) -> Tensor:
        """As `GatheredStripe.forward`; each block of columns collects its own statistics."""
        settings, count = self.settings, self.ranks.count
        self.positives = None
        if self.row_ids is not None:
            self.positives = positives_of(self.row_ids, self.gather(self.row_ids))
        others_of_row, gap = [], torch.zeros_like(self.product)
        self.exponentials, budget = [], settings.memory_budget if keep else 0

        def visit(block: Block, carried: Tensor) -> Tensor:
            nonlocal gap, budget
            row, column, part, exponentials = contrastive_statistics(
                self.rows,
                block.columns,
                self.scale,
                self.product,
                self.row_norm,
                block.norm,
                *self._ids(block),
                settings.label_smoothing,
                budget,
                self.impl,
            )
            others_of_row.append(row)
            gap = gap + part
            self.exponentials.append(exponentials)
            budget -= exponentials.nbytes
            return torch.logaddexp(carried, column)

        nothing = torch.full_like(self.product, float("-inf"), dtype=torch.float64)
        others_of_column = ring_lap(self.own_block(), nothing, self.ranks, visit)
        loss, self.row_terms, self.column_terms, self.own_entry = contrastive_summary(
            torch.stack(others_of_row).logsumexp(0),
            others_of_column,
            self.product,
            self.scale,
            gap,
            own_targets(self.positives, settings.label_smoothing, self.product, count),
            count,
            0,
            self.impl,
        )
        return self.sum(loss)

    def backward(self, need: tuple[bool, bool], upstream: Tensor) -> LossGradients:
        """As `GatheredStripe.backward`; each block of columns collects its own products."""
        row_products, d_scale = torch.zeros((), device=self.rows.device), upstream.new_zeros(())
        kept = iter(self.exponentials)

        def visit(block: Block, carried: Tensor) -> Tensor:
            nonlocal row_products, d_scale
            assert block.terms is not None
            entry = self.own_entry if block.own else torch.zeros_like(self.own_entry)
            of_rows, of_columns, part = contrastive_products(
                self.rows,
                block.columns,
                self.scale,
                self.product,
                self.row_norm,
                block.norm,
                self.row_terms,
                block.terms.T.contiguous(),
                entry,
                next(kept),
                upstream,
                *self._ids(block),
                self.settings.label_smoothing,
                *need,
                self.impl,
            )
            row_products = row_products + of_rows
            d_scale = d_scale + part
            return carried + of_columns if need[1] else carried

        wide = self.product.dtype
        dims = self.own_columns.shape[1] if need[1] else 0
        carried = self.own_columns.new_zeros((self.own_columns.shape[0], dims), dtype=wide)
        block = self.own_block(self.column_terms.T.contiguous())
        column_products = ring_lap(block, carried, self.ranks, visit)
        features = self.finish(row_products, column_products, self.own_entry, upstream, need, 2)
        return as_gradients(self, *features, d_scale, None)

    def _ids(self, block: Block) -> tuple[Tensor | None, Tensor | None, Tensor | None, int, int]:
        offset = 0 if block.own else block.columns.shape[0]
        return self.row_ids, block.ids, self.positives, self.ranks.count, offset


def contrastive_stripe(*arguments: Any) -> GatheredStripe | RingStripe:
    settings = arguments[-1]
    ring = settings.ring and not settings.alone
    return RingStripe(*arguments) if ring else GatheredStripe(*arguments)
