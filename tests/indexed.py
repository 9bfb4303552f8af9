"""A small search index for tests: a model with random weights, real shards, real features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastclip.config import to_dict
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.search.embed import EmbedSettings, embed
from shards import write_shards

SETTINGS = EmbedSettings(batch_size=8, workers=1, device="cpu", fields=("label",))


def write_model(folder: Path, seed: int = 3, **changes: int) -> Path:
    """A checkpoint's folder with a tiny model; `changes` are fields of its configuration."""
    torch.manual_seed(seed)
    config = preset("ViT-Nano-8")
    config = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=1),
        text=dataclasses.replace(config.text, layers=1),
        **changes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(to_dict(config)))
    save_file(Clip(config).state_dict(), folder / "model.safetensors")
    return folder


def write_index(folder: Path, pairs: int = 48, per_shard: int = 16) -> Path:
    """The index ``folder/index`` of ``folder/shards`` by ``folder/model``."""
    shards = write_shards(folder, pairs, per_shard)
    embed(str(shards), write_model(folder / "model"), folder / "index", SETTINGS)
    return folder / "index"
