"""Towers under the engine: sharded parameters, recomputed blocks, synchronised BatchNorm."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastclip.engine import EngineConfig, build_engine
from fastclip.models.clip import Clip, ClipOutput
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.layers import convert_sync_batch_norm
from ranks import run_ranks

VIT = ClipConfig(
    embed_dim=12,
    vision=ViTConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2),
    text=TextConfig(context_length=8, vocab_size=40, width=16, heads=2, layers=2),
)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=4, heads=4)
)
BATCH = 4


def _data(pairs: int, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (pairs, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 40, (pairs, 8), generator=generator)
    return images, tokens, torch.randn(pairs, 12, generator=generator)


def _loss(output: ClipOutput, weights: torch.Tensor) -> torch.Tensor:
    assert output.image_features is not None
    assert output.text_features is not None
    agreement = (output.image_features * output.text_features * weights).sum()
    return agreement * output.logit_scale[0] * 0.01 + (output.image_features * weights).sum()


def _optimizer(model: Clip) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)


def _beside_plain_torch(runtime, config: ClipConfig, zero_stage: int) -> float:
    torch.manual_seed(0)
    model = Clip(config)
    reference = copy.deepcopy(model)
    convert_sync_batch_norm(model)
    model.set_activation_checkpointing(vision="full", text="full")
    engine = build_engine(
        model,
        _optimizer(model),
        EngineConfig(zero_stage=zero_stage, precision="fp32"),  # pyright: ignore[reportArgumentType]
        runtime,
        micro_batch_size=BATCH,
    )
    optimizer = _optimizer(reference)
    pairs = BATCH * runtime.world_size
    mine = slice(BATCH * runtime.rank, BATCH * (runtime.rank + 1))
    for step in range(3):
        images, tokens, weights = _data(pairs, step)
        optimizer.zero_grad()
        (_loss(reference(images, tokens), weights) / pairs).backward()
        optimizer.step()
        output = engine.forward(images[mine], tokens[mine])
        engine.backward(_loss(output, weights[mine]) / BATCH)
        engine.step()
    weights = engine.full_state_dict()
    engine.close()
    expected = reference.state_dict()
    if weights is None:
        return 0.0
    return max(float((weights[n].double() - t.double()).abs().max()) for n, t in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_two_ranks_train_like_one_process(config, zero_stage, tmp_path):
    differences = run_ranks(_beside_plain_torch, 2, tmp_path, config, zero_stage)
    assert max(differences) < 2e-5
