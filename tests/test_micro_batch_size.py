"""Micro-batches that fit: activations are counted as they grow, and the fewest parts are taken."""

from __future__ import annotations

import logging

import pytest
import torch

from fastclip.config import RunConfig, TrainConfig, apply_overrides, from_dict, to_dict
from fastclip.micro_batch_size import find_micro_batches, kept_bytes, measure
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.recipes.smoke import smoke


@pytest.fixture(scope="module")
def model() -> Clip:
    return Clip(preset("ViT-Nano-8")).train()


def test_activations_grow_linearly(model: Clip) -> None:
    need = measure(model, 64, loss_budget=0)
    for pairs in (7, 20):
        others = kept_bytes(model, 1) - need.per_pair
        assert kept_bytes(model, pairs) == pytest.approx(others + pairs * need.per_pair, rel=0.01)


def test_recomputation_and_half_precision_keep_less() -> None:
    clip = Clip(preset("ViT-Nano-8")).train()
    plain = measure(clip, 64, 0).per_pair
    layers = len(clip.visual.blocks)  # pyright: ignore[reportArgumentType]
    clip.set_activation_checkpointing(vision="full", text="full")
    full = measure(clip, 64, 0).per_pair
    kept = (kept_bytes(clip, 3) - kept_bytes(clip, 1)) / 2
    assert kept < 0.3 * plain
    # In backward the activations of one block, of the larger tower, are there besides.
    assert kept + 0.5 * (plain - kept) / layers < full < kept + (plain - kept) / layers
    assert clip.visual.recompute
    assert clip.text.recompute
    clip.set_activation_checkpointing(vision="none", text="none")
    clip.autocast_dtype = torch.bfloat16
    assert measure(clip, 64, 0).per_pair < 0.75 * plain


def test_the_fewest_that_fit_are_taken(model: Clip, caplog: pytest.LogCaptureFixture) -> None:
    need = measure(model, 48, loss_budget=1000)
    with caplog.at_level(logging.INFO, "fastclip"):
        for pairs, parts in ((48, 1), (47, 2), (16, 3), (13, 4), (1, 48)):
            free = int((need.fixed + pairs * need.per_pair) / 0.9) + 1
            assert find_micro_batches(model, 48, loss_budget=1000, free=free) == parts
    assert "micro-batches: 3 of 16 pairs" in caplog.text
    with pytest.raises(ValueError, match="activation_checkpointing_visual"):
        find_micro_batches(model, 48, loss_budget=1000, free=int(need.fixed))
    assert find_micro_batches(model, 48, loss_budget=0) == 1  # of this machine's memory


def test_batch_norm_takes_the_whole_batch() -> None:
    assert find_micro_batches(Clip(preset("RN-Nano")).train(), 48, loss_budget=0, free=1) == 1


def test_the_setting() -> None:
    config = apply_overrides(smoke("x"), ["run.micro_batches=auto"])
    assert config.run.micro_batches == "auto"
    assert from_dict(TrainConfig, to_dict(config)) == config
    assert apply_overrides(config, ["run.micro_batches=3"]).run.micro_batches == 3
    for wrong in ("0", "many", "1.5"):
        with pytest.raises(ValueError, match=r"run\.micro_batches"):
            apply_overrides(config, [f"run.micro_batches={wrong}"])
    with pytest.raises(ValueError, match=r"run\.micro_batches is at least 1"):
        RunConfig(micro_batches=-1)
