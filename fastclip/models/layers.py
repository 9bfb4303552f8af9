"""What both towers are made of, and what is done to a tower from outside.

Normalisation, the residual block, projections, activation checkpointing, synchronised BatchNorm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastclip.distributed.collectives import all_reduce_sum
from fastclip.models.attention import SelfAttention
from fastclip.models.config import Activation, Projection

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def wide(x: Tensor) -> Tensor:
    """`x` in fp32; fp64 stays, so that a whole model can be computed in it for comparison."""
    return x if x.dtype == torch.float64 else x.float()


class LayerNorm(nn.LayerNorm):
    """LayerNorm that computes in fp32 whatever comes in, and gives back the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (the name is torch's)
        normalized = F.layer_norm(
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
        x = self.fc(x)
        x = x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x)
        return self.proj(x)


class ResidualBlock(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each added to the stream."""

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

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, width] -> [B, L, width]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


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


def run_block(block: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """``block(x)``, storing only `x` for the backward pass when `recompute` is set.

    The gradients are those of the plain run, and so are BatchNorm's running statistics: the second
    forward pass works on copies of them. Under `recompute`, `Tensor.backward` works and
    `torch.autograd.grad` does not.
    """
    if not (recompute and torch.is_grad_enabled() and x.requires_grad):
        return block(x)

    def run(x: Tensor) -> Tensor:
        second_pass = torch.is_grad_enabled()
        with _spare_running_statistics(block) if second_pass else contextlib.nullcontext():
            return block(x)

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
        x = wide(input)
        positions = x.new_tensor([x.numel() // x.shape[1]])
        # The count rides along in the same message; it carries no gradient.
        totals = all_reduce_sum(torch.cat([x.sum((0, 2, 3)), positions]), self.group)
        count = totals[-1].detach()
        if count < 2:
            raise ValueError(
                "BatchNorm in training needs more than one value per channel over all ranks; "
                f"this batch has {int(count)}"
            )
        mean = totals[:-1] / count
        centred = x - mean[:, None, None]
        variance = all_reduce_sum(centred.square().sum((0, 2, 3)), self.group) / count
        self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        gain = torch.rsqrt(variance + self.eps) * self.weight
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(input.dtype)

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
