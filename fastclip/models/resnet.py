"""CLIP's ResNet image tower (arXiv 2103.00020, section 2.4).

Against the original ResNet: a stem of three convolutions (ResNet-D), average pooling before every
strided convolution so that it does not alias, and attention in place of the last average pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastclip.models.attention import AttentionImpl, attend
from fastclip.models.config import Projection, ResNetConfig
from fastclip.models.layers import run_block


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions beside an identity; four times `planes` channels come out."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * planes
        self.stride = stride
        self.conv1 = _convolution(inputs, planes, 1)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _convolution(planes, planes, 3)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = _convolution(planes, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _convolution(inputs, outputs, 1), nn.BatchNorm2d(outputs)
            )
        # A new block is its identity.
        nn.init.zeros_(self.bn3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 4·planes, H/stride, W/stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        if self.stride > 1:
            x, y = F.avg_pool2d(x, self.stride), F.avg_pool2d(y, self.stride)
        y = self.bn3(self.conv3(y))
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(y + identity, inplace=True)


class AttentionPool(nn.Module):
    """One round of multi-head attention whose query is the mean over all positions.

    Attributes:
        impl: see `AttentionConfig`.
    """

    def __init__(self, width: int, heads: int, grid_size: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.impl: AttentionImpl = "auto"
        self.positional_embedding = nn.Parameter(torch.randn(grid_size**2 + 1, width) * width**-0.5)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, output_dim)
        for layer in (self.query, self.key_value, self.out):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[B, width, H, W] -> [B, output_dim]."""
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        batch, length, width = x.shape
        head_width = width // self.heads
        query = self.query(x[:, :1]).view(batch, 1, self.heads, head_width)
        key, value = self.key_value(x).view(batch, length, 2, self.heads, head_width).unbind(2)
        attended = attend(query, key, value, causal=False, impl=self.impl)
        return self.out(attended.reshape(batch, width))


class ModifiedResNet(nn.Module):
    """Stem, four stages of bottlenecks, attention pooling.

    Attributes:
        recompute: store only the blocks' inputs for backward.
        memory_format: of the activations. Channels last is faster everywhere; on a CPU in fp32
            torch's BatchNorm then sums with a relative error of some 1e-6 instead of 1e-7.
    """

    def __init__(self, config: ResNetConfig, embed_dim: int, projection: Projection) -> None:
        super().__init__()
        width, half = config.width, config.width // 2
        self.recompute = False
        self.memory_format = torch.channels_last
        self.conv1 = _convolution(3, half, 3, stride=2)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _convolution(half, half, 3)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _convolution(half, width, 3)
        self.bn3 = nn.BatchNorm2d(width)
        stages = []
        inputs = width
        for stage, blocks in enumerate(config.layers):
            planes = width * 2**stage
            stages.append(nn.ModuleList())
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                stages[-1].append(Bottleneck(inputs, planes, stride))
                inputs = 4 * planes
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        # The pooling's output layer is the paper's linear projection, and the mlp's first layer.
        linear = projection == "linear"
        self.attnpool = AttentionPool(
            inputs, config.heads, config.grid_size, embed_dim if linear else inputs
        )
        self.proj = (
            nn.Identity() if linear else nn.Sequential(nn.ReLU(), nn.Linear(inputs, embed_dim))
        )

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, R, R] -> features [B, embed_dim], not yet of unit length."""
        return self.proj(self.represent(images))

    def represent(self, images: Tensor) -> Tensor:
        """What `proj` is given: the pooled output, [B, embed_dim] unless the projection is an mlp.

        With the paper's linear projection, which is the pooling's last layer, these are the
        features themselves.
        """
        x = images.contiguous(memory_format=self.memory_format)  # weights may be in either
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        x = F.avg_pool2d(x, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = run_block(block, x, recompute=self.recompute)
        return self.attnpool(x)
