"""What both towers are made of, and what is done to a tower from outside.

Normalisation, the residual block, projections, activation checkpointing, synchronised BatchNorm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastclip.distributed.collectives import all_gather_rows, all_reduce_sum, world_size
from fastclip.models.attention import Rows, SelfAttention, pick
from fastclip.models.config import Activation, Projection
from fastclip.tokenizer.packing import Segments

ModuleT = TypeVar("ModuleT", bound=nn.Module)
ResultT = TypeVar("ResultT")


def wide(x: Tensor) -> Tensor:
    """`x` in fp32; fp64 stays, so that a whole model can be computed in it for comparison."""
    return x if x.dtype == torch.float64 else x.float()


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in fp32 whatever comes in, and gives back the input's dtype.

    Attributes:
        function: what computes it, with the arguments of torch's.
    """

    function: Callable[..., Tensor] = staticmethod(F.layer_norm)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is torch's)
        normalized = self.function(
            wide(input), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return normalized.to(input.dtype)


class Mlp(nn.Module):
    """The two-layer perceptron of a transformer block."""

    def __init__(self, width: int, hidden_width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc = nn.Linear(width, hidden_width)
        self.proj = nn.Linear(hidden_width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        return self.contract(self.fc(x))

    def contract(self, hidden: Tensor) -> Tensor:
        """The second half: [..., hidden width] -> [..., width]."""
        quick = self.activation == "quick_gelu"
        return self.proj(hidden * torch.sigmoid(1.702 * hidden) if quick else F.gelu(hidden))


class ResidualBlock(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the stream.

    Attributes:
        recompute_cheap: keep for backward what products and attention give, and compute anew what
            lies between: normalisations and activations.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: Activation,
        *,
        causal: bool,
        depth: int,
    ) -> None:
        super().__init__()
        self.recompute_cheap = False
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal=causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = Mlp(width, mlp_width, activation)
        # As in OpenAI's code: what enters the stream shrinks with the stack's depth; the MLP's
        # biases keep torch's default and attention's are zero.
        stream_std = width**-0.5 * (2 * depth) ** -0.5
        nn.init.normal_(self.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(self.attn.out.weight, std=stream_std)
        nn.init.normal_(self.mlp.fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.proj.weight, std=stream_std)
        nn.init.zeros_(self.attn.qkv.bias)
        nn.init.zeros_(self.attn.out.bias)

    def forward(
        self, x: Tensor, segments: Segments | None = None, rows: Rows | None = None
    ) -> Tensor:
        """[B, L, width], or [T, width] with `segments`, to the same.

        With `rows`, only those come out, [B, width]: a last block computes nothing else, since the
        rest would not be read.
        """
        query, key, value = self._before_product(lambda x: self.attn.qkv(self.ln_1(x), rows), x)
        attended = self.attn(query, key, value, segments, rows)
        x = (x if rows is None else pick(x, rows)) + attended
        hidden = self._before_product(lambda x: self.mlp.fc(self.ln_2(x)), x)
        return x + self._before_product(self.mlp.contract, hidden)

    def _before_product(self, function: Callable[[Tensor], ResultT], x: Tensor) -> ResultT:
        """``function(x)``, which ends in a product; storing only x where that is asked for.

        The second run stops at the product, before it is computed, having got what its backward
        pass needs. Compiled code decides itself what to keep.
        """
        if not self.recompute_cheap or torch.compiler.is_compiling():
            return function(x)
        return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    *,
    rows: Rows,
    segments: Segments | None = None,
    recompute: bool = False,
    last_row: bool = True,
) -> Tensor:
    """The given `rows` of what `x` is after all blocks: [B, width].

    With `last_row`, the last block computes these alone.
    """
    last = len(blocks) - 1
    for number, block in enumerate(blocks):
        wanted = rows if number == last and last_row else None
        x = run_block(block, x, segments, wanted, recompute=recompute)
    return x if last_row else pick(x, rows)


def build_projection(width: int, embed_dim: int, kind: Projection) -> nn.Module:
    """The map from a tower's pooled feature [B, width] into the shared space [B, embed_dim].

    ``linear`` is the paper's; ``mlp`` is ConVIRT's (arXiv 2010.00747) hidden layer with a ReLU.
    """
    if kind == "linear":
        projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(projection.weight, std=width**-0.5)
        return projection
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, embed_dim))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` run: autocast's where it is on, else `x`'s own."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def run_block(block: nn.Module, x: Tensor, *arguments: Any, recompute: bool) -> Tensor:
    """``block(x, *arguments)``, storing only these for the backward pass when `recompute` is set.

    The gradients are those of the plain run, and so are BatchNorm's running statistics: the second
    forward pass works on copies of them. Under `recompute`, `Tensor.backward` works and
    `torch.autograd.grad` does not.
    """
    if not (recompute and torch.is_grad_enabled() and x.requires_grad):
        return block(x, *arguments)

    def run(x: Tensor) -> Tensor:
        second_pass = torch.is_grad_enabled()
        with _spare_running_statistics(block) if second_pass else contextlib.nullcontext():
            return block(x, *arguments)

    # torch's other variant recomputes in the middle of a block's backward pass, when ZeRO-3 has
    # already gathered the parameters that the recomputation then releases. The towers draw no
    # random numbers, hence no generator states.
    return checkpoint(run, x, use_reentrant=True, preserve_rng_state=False)


@contextlib.contextmanager
def _spare_running_statistics(module: nn.Module) -> Iterator[None]:
    """Put copies in place of all running statistics, and the originals back at the end."""
    owned = [
        (norm, dict(norm.named_buffers(recurse=False)))
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
    ]
    try:
        for norm, buffers in owned:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, buffers in owned:
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batches of all ranks, on any back end (torch's own needs CUDA).

    Ranks may hold different numbers of images, or none. Outputs, gradients and running statistics
    are those of `nn.BatchNorm2d` on the concatenated batch; parameter and buffer names too.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.group = group

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is torch's)
        """[B, C, H, W] -> [B, C, H, W]; collective in training, also for a rank with B = 0."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        y, mean, variance, count = _NormaliseOverRanks.apply(  # pyright: ignore[reportGeneralTypeIssues]
            wide(input), self.weight, self.bias, self.eps, self.group
        )
        self._update_running_statistics(mean, variance * (count / (count - 1)))
        return y.to(input.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = self.momentum
        if rate is None:
            rate = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(unbiased_variance, rate)


class _NormaliseOverRanks(torch.autograd.Function):
    """(x - mean) / std · weight + bias, with one collective each way.

    Each rank sends its own mean and spread around it, which are combined without cancellation
    (Chan et al. 1979); sums of squares around zero would lose digits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        positions = x.numel() // channels
        own_mean = x.sum((0, 2, 3)) / max(positions, 1)
        spread = (x - own_mean[:, None, None]).square_().sum((0, 2, 3))
        own = torch.cat([own_mean, spread, x.new_tensor([positions])])[None]
        everyone = all_gather_rows(own, [1] * world_size(group), group)
        means, spreads, counts = everyone.split([channels, channels, 1], dim=1)
        count = counts.sum()
        if count < 2:
            raise ValueError(
                "BatchNorm in training needs more than one value per channel over all ranks; "
                f"this batch has {int(count)}"
            )
        mean = (counts * means).sum(0) / count
        variance = (spreads + counts * (means - mean).square()).sum(0) / count
        y = x.clone()
        if positions:
            y = F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps), count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, variance, count)
        return y, mean, variance, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        d_y = grad_outputs[0]
        centred = x - mean[:, None, None]
        d_bias = d_y.sum((0, 2, 3))
        projection = (d_y * centred).sum((0, 2, 3))
        # The statistics depend on every rank's x, so their gradients are sums over ranks.
        totals = all_reduce_sum(torch.cat([d_bias, projection]), ctx.group) / count
        d_mean, d_spread = totals.chunk(2)
        d_x = centred.mul_((-d_spread * inverse_std.square())[:, None, None])
        d_x.add_(d_y).sub_(d_mean[:, None, None]).mul_((weight * inverse_std)[:, None, None])
        return d_x, projection * inverse_std, d_bias, None, None


def convert_sync_batch_norm(model: ModuleT, group: dist.ProcessGroup | None = None) -> ModuleT:
    """Make every BatchNorm of `model` use the statistics of the whole group's batch.

    Call it after moving the model to its device: CUDA models get torch's `nn.SyncBatchNorm`, others
    `SynchronizedBatchNorm2d`. Parameters, buffers and their names stay the same objects.

    Args:
        model: changed in place and returned.
        group: ranks that share a batch; None means the default group.
    """
    on_cuda = any(p.is_cuda for p in model.parameters())
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm) is nn.BatchNorm2d:
                setattr(parent, name, _synchronized(norm, group, on_cuda))
    return model


def _synchronized(
    norm: nn.BatchNorm2d, group: dist.ProcessGroup | None, on_cuda: bool
) -> nn.Module:
    synchronized = (
        nn.SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, process_group=group)
        if on_cuda
        else SynchronizedBatchNorm2d(norm.num_features, norm.eps, norm.momentum, group=group)
    )
    synchronized.weight, synchronized.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(synchronized, name, buffer)
    return synchronized.train(norm.training)
