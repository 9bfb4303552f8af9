"""docs/memory.md says what the engines hold, and what the program would say now."""

from __future__ import annotations

import dataclasses
import gc
import json
import warnings

import pytest
import torch

from benchmarks import memory_table
from fastclip.engine import build_engine
from fastclip.losses import clip_loss
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig
from ranks import run_ranks
from small_towers import Place, engine_config


def test_the_tables_of_parameters_are_up_to_date():
    text = memory_table.PATH.read_text(encoding="utf-8")
    assert memory_table.states_table() in text
    before, _, _ = memory_table.TEXT.partition("{states}")
    assert text.startswith(before)


def _held() -> int:
    """Bytes of all tensors that live."""
    gc.collect()
    sizes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                storage = thing.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _bytes_per_parameter(runtime, place: Place, algorithm: str, folder) -> float:
    """After a step, when the gradients are gone."""
    settings: dict = {"precision": "bf16" if algorithm == "compact_adamw" else "fp32"}
    if place == 3:  # or its buffers would be larger than the model
        path = folder / f"{runtime.rank}.json"
        buffers = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0}
        path.write_text(json.dumps({"zero_optimization": buffers}))
        settings["deepspeed_json"] = str(path)
    before = _held()
    config = preset("ViT-Nano-8")
    text = dataclasses.replace(config.text, vocab_size=5000)
    model = Clip(dataclasses.replace(config, text=text)).train()
    count = sum(p.numel() for p in model.parameters())
    engine = build_engine(
        model,
        OptimConfig(algorithm=algorithm),  # pyright: ignore[reportArgumentType]
        engine_config(place, **settings),
        runtime,
        micro_batch_size=4,
    )
    side = config.vision.image_size
    images = torch.zeros(4, 3, side, side, dtype=torch.uint8)
    output = engine.forward(images, torch.full((4, 8), 3))
    assert output.image_features is not None
    assert output.text_features is not None
    engine.backward(clip_loss(output.image_features, output.text_features, output.logit_scale))
    del output, images
    engine.step()
    found = (_held() - before) / count
    engine.close()
    return found


def _all_places(runtime, folder):
    places: list[tuple[Place, str]] = [(stage, "adamw") for stage in (0, 1, 2, 3)]
    if runtime.world_size == 1:
        places.extend([("plain", "adamw"), ("plain", "compact_adamw")])
    return {place: _bytes_per_parameter(runtime, *place, folder) for place in places}


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_engines_hold_what_the_formula_says(ranks, tmp_path):
    found = run_ranks(_all_places, ranks, tmp_path, tmp_path)[0]
    for (place, algorithm), held in found.items():
        stage = 0 if place == "plain" else place
        gradients = {0: 4, 1: 4, 2: 4 / ranks, 3: 0}[stage]  # stage 3 has a buffer for its share
        expected = memory_table.state_bytes(stage, ranks) - gradients
        if algorithm == "compact_adamw":
            expected = 8 - 2
        print(f"{place} {algorithm}, {ranks} ranks: {held:.2f} of {expected:.2f}")
        assert held == pytest.approx(expected, rel=0.05)
