"""What a step hands its loss: all micro-batches' features, the settings, the model's precision."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fastclip import losses, train_step
from fastclip.data.batch import Batch
from fastclip.distributed.runtime import Runtime
from fastclip.engine import EngineConfig, build_engine
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig
from fastclip.train_step import LossConfig, TrainStep, split_batch

MODEL = dataclasses.replace(preset("ViT-Nano-8"), init_logit_bias=-10.0)
SIDE = MODEL.vision.image_size


def _batch() -> Batch:
    return Batch(
        images=torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8),
        tokens=torch.randint(1, 400, (4, 6), dtype=torch.int32),
        lengths=torch.full((4,), 6, dtype=torch.int32),
        ids=torch.tensor([3, 3, 5, 7]),
        keys=(),
        captions=(),
        metadata=(),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "clip", "impl": "reference", "label_smoothing": 0.1, "memory_budget": 12345},
        {"kind": "siglip", "impl": "reference"},
    ],
)
def test_a_step_hands_its_settings_over(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{settings['kind']}_loss_and_grads"
    calls = []

    def noted(*inputs: Tensor, **options: Any) -> Any:
        precision = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        calls.append((inputs, options, precision))
        return getattr(losses, name)(*inputs, **options)

    monkeypatch.setattr(train_step, name, noted)
    engine = build_engine(
        Clip(MODEL).train(),
        OptimConfig(),
        EngineConfig(precision="bf16"),
        Runtime.alone(torch.device("cpu")),
        micro_batch_size=2,
        micro_batches=2,
    )
    batch = _batch()
    with torch.no_grad():
        parts: list[Any] = [engine.forward(*part) for part in split_batch(batch, 2)]
    scalars = [parts[-1].logit_scale]
    if settings["kind"] == "siglip":
        scalars.append(parts[-1].logit_bias)
    step = TrainStep(engine, LossConfig(**settings), micro_batches=2, ranks_alike=True)
    step(batch)

    ((inputs, options, precision),) = calls
    expected = [
        torch.cat([part.image_features for part in parts]),
        torch.cat([part.text_features for part in parts]),
        *scalars,
    ]
    torch.testing.assert_close(list(inputs), expected, rtol=0.0, atol=1e-2)  # bf16's
    assert options.pop("ids") is batch.ids
    expected_options = {key: value for key, value in settings.items() if key != "kind"}
    assert options == {**expected_options, "ranks_alike": True}
    # The towers' features are fp32; what the loss multiplies them in is autocast's.
    assert precision is torch.bfloat16
