"""What micro-batching refuses, and that it replays random numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastclip.data.batch import Batch
from fastclip.engine import EngineConfig, build_engine
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.tokenizer.packing import PackedTokens
from fastclip.train_step import LossConfig, TrainStep, check_micro_batching, split_batch
from ranks import run_ranks


def test_batch_norm_in_training_is_refused():
    model = Clip(preset("RN-Nano"))
    check_micro_batching(model, 1)
    with pytest.raises(ValueError, match="BatchNorm"):
        check_micro_batching(model, 2)


def test_a_locked_resnet_may_be_split():
    model = Clip(preset("RN-Nano"))
    model.freeze(vision=True, text=False)
    check_micro_batching(model, 2)


def _batch(size: int) -> Batch:
    images = torch.randint(0, 256, (size, 3, 64, 64), dtype=torch.uint8)
    tokens = torch.randint(1, 400, (size, 6), dtype=torch.int32)
    tokens[:, -1] = 49407
    names = tuple(map(str, range(size)))
    return Batch(
        images=images,
        tokens=tokens,
        lengths=torch.full((size,), 6, dtype=torch.int32),
        ids=None,
        keys=names,
        captions=names,
        metadata=({},) * size,
    )


def test_uneven_parts_are_refused():
    with pytest.raises(ValueError, match="5 pairs cannot be cut into 2"):
        split_batch(_batch(5), 2)


def test_texts_packed_for_other_micro_batches_are_refused():
    batch = _batch(6)
    packed = tuple(PackedTokens.pack(rows) for rows in batch.tokens.split(3))
    batch = dataclasses.replace(batch, packed=packed)
    assert [len(texts) for _, texts in split_batch(batch, 2)] == [3, 3]
    with pytest.raises(ValueError, match=r"parts of \[3, 3\].* 3 micro-batches of 2"):
        split_batch(batch, 3)


def _replayed(runtime):
    """Gradients with patch dropout, and the generator then: of the step, and of one whole graph."""
    results = []
    for whole in (False, True):
        torch.manual_seed(0)
        model = Clip(preset("ViT-Nano-8")).train()
        model.set_patch_dropout(0.5)
        batch = _batch(8)
        torch.manual_seed(7)
        if whole:
            from fastclip.losses import clip_loss

            parts = [model(*part) for part in split_batch(batch, 4)]
            images = torch.cat([p.image_features for p in parts])
            texts = torch.cat([p.text_features for p in parts])
            clip_loss(images, texts, parts[-1].logit_scale).backward()
            gradients = {n: p.grad for n, p in model.named_parameters()}
            results.append((gradients, torch.get_rng_state()))
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine = build_engine(
            model,
            optimizer,
            EngineConfig(precision="fp32"),
            runtime,
            micro_batch_size=2,
            micro_batches=4,
        )
        TrainStep(engine, LossConfig(), micro_batches=4)(batch)
        gradients = {n: optimizer.state[p]["exp_avg"] / 0.1 for n, p in model.named_parameters()}
        results.append((gradients, torch.get_rng_state()))
        engine.close()
    return results


def test_second_forward_replays_the_first_ones_random_numbers(tmp_path):
    (((split, after_split), (whole, after_whole)),) = run_ranks(_replayed, 1, tmp_path)
    assert torch.equal(after_split, after_whole)  # or the next step would drop patches as this one
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-3, atol=1e-6)
