"""Configurations are checked, frozen, and come back equal from JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fastclip.models.config import (
    ClipConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
    from_dict,
    to_dict,
)
from fastclip.models.presets import PRESETS, preset

CONFIG = ClipConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=28, patch_size=7, width=36, layers=2, heads=3, mlp_ratio=2.5),
    text=TextConfig(context_length=9, vocab_size=50, width=20, heads=2, layers=1),
    init_temperature=1 / 3,
    init_logit_bias=-10.0,
    projection="mlp",
    image_mean=(0.1, 0.2, 1 / 3),
)


@pytest.mark.parametrize("config", [CONFIG, *PRESETS.values()], ids=["custom", *PRESETS])
def test_json_round_trip_is_exact(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dimension": 3}, "embed_dimension"),
        ({"embed_dim": 2.0}, "embed_dim is a positive whole number"),
        ({"vision": {**to_dict(CONFIG)["vision"], "heads": 5}}, r"m\.vision: .*heads=5"),
        ({"vision": {**to_dict(CONFIG)["vision"], "type": "Swin"}}, "ViTConfig"),
        ({"text": None}, "TextConfig"),
        ({"image_std": [1, 1]}, "three numbers"),
        ({"type": "TextConfig"}, "embed_dim"),
    ],
)
def test_a_wrong_document_is_refused_by_field(change, message):
    with pytest.raises(ValueError, match=message):
        from_dict({**to_dict(CONFIG), **change}, "m")


def test_a_missing_field_is_named():
    document = to_dict(CONFIG)
    del document["embed_dim"]
    with pytest.raises(ValueError, match="embed_dim"):
        from_dict(document)


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ViTConfig, {"image_size": 225}, "multiple of patch_size"),
        (ViTConfig, {"heads": 7}, "does not divide"),
        (ViTConfig, {"layers": True}, "whole number"),
        (ViTConfig, {"mlp_ratio": 0.0}, "mlp_ratio"),
        (ViTConfig, {"activation": "relu"}, "quick_gelu"),
        (ResNetConfig, {"image_size": 100}, "multiple of 32"),
        (ResNetConfig, {"layers": (3, 4, 6)}, "four"),
        (ResNetConfig, {"layers": (3, 4, 0, 3)}, "four"),
        (ResNetConfig, {"heads": 33}, "does not divide"),
        (ResNetConfig, {"width": 33}, "odd"),
        (TextConfig, {"context_length": 0}, "context_length"),
        (ClipConfig, {"projection": "deep"}, "linear"),
        (ClipConfig, {"init_temperature": 0.001}, "max_logit_scale"),
        (ClipConfig, {"init_temperature": -1.0}, "positive"),
        (ClipConfig, {"init_logit_bias": "none"}, "init_logit_bias"),
        (ClipConfig, {"image_std": (1.0, 0.0, 1.0)}, "positive"),
        (ClipConfig, {"image_mean": (float("nan"), 0.0, 0.0)}, "three numbers"),
        (ClipConfig, {"vision": TextConfig()}, "ResNetConfig"),
    ],
)
def test_impossible_settings_are_errors(kind, fields, message):
    required: dict[str, Any] = {}
    if kind is ClipConfig:
        required = {"embed_dim": 8, "vision": ViTConfig(), "text": TextConfig()}
    with pytest.raises(ValueError, match=message):
        kind(**{**required, **fields})


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        CONFIG.embed_dim = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", PRESETS)
def test_preset_by_name(name):
    assert preset(name) is PRESETS[name]


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"did you mean 'ViT-B-32'.*RN-Nano"):
        preset("vit-b/32")
    with pytest.raises(ValueError, match="There are RN50"):
        preset("???")


def test_papers_table():
    """Table 19 and 20, the numbers that parameter counts do not see."""
    heads = {n: (c.vision.heads, c.text.heads) for n, c in PRESETS.items() if "Nano" not in n}
    assert heads == {
        "RN50": (32, 8),
        "RN101": (32, 8),
        "RN50x4": (40, 10),
        "RN50x16": (48, 12),
        "RN50x64": (64, 16),
        "ViT-B-32": (12, 8),
        "ViT-B-16": (12, 8),
        "ViT-L-14": (16, 12),
        "ViT-L-14-336": (16, 12),
    }
    assert all(c.text.activation == "quick_gelu" for c in PRESETS.values())
