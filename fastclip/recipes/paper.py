"""The CLIP paper's training runs (arXiv 2103.00020, Tables 18–20), one recipe per model.

32 epochs at a global batch of 32,768:
``fastclip train vit_b_32 --data '/data/{00000..41455}.tar'``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from fastclip.config import RunConfig, TrainConfig
from fastclip.data.config import DataConfig
from fastclip.engine.config import EngineConfig
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig


def _paper(model: str, *, learning_rate: float, beta2: float, eps: float) -> TrainConfig:
    return TrainConfig(
        model=preset(model),
        data=DataConfig(train=""),
        optim=OptimConfig(
            learning_rate=learning_rate,
            beta1=0.9,
            beta2=beta2,
            eps=eps,
            weight_decay=0.2,
            warmup_steps=2000,
        ),
        engine=EngineConfig(zero_stage=1, precision="bf16"),
        run=RunConfig(directory=f"runs/{model}", global_batch_size=32768, epochs=32),
    )


def _resnet(model: str, learning_rate: float) -> Callable[[str], TrainConfig]:
    def recipe(data: str) -> TrainConfig:
        return _with_data(_paper(model, learning_rate=learning_rate, beta2=0.999, eps=1e-8), data)

    recipe.__doc__ = f"{model} as in the paper: AdamW β2 0.999, ε 1e-8."
    return recipe


def _vit(model: str, learning_rate: float) -> Callable[[str], TrainConfig]:
    def recipe(data: str) -> TrainConfig:
        return _with_data(_paper(model, learning_rate=learning_rate, beta2=0.98, eps=1e-6), data)

    recipe.__doc__ = f"{model} as in the paper: AdamW β2 0.98, ε 1e-6."
    return recipe


def _with_data(config: TrainConfig, data: str) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, train=data))


def vit_l_14_336(data: str) -> TrainConfig:
    """ViT-L/14@336px: one more epoch at the higher resolution, from trained ViT-L/14 weights.

    Give them with ``run.init_from=...``.
    """
    config = _with_data(_paper("ViT-L-14-336", learning_rate=2e-5, beta2=0.98, eps=1e-6), data)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, epochs=1))


PAPER_RECIPES: dict[str, Callable[[str], TrainConfig]] = {
    "rn50": _resnet("RN50", 5e-4),
    "rn101": _resnet("RN101", 5e-4),
    "rn50x4": _resnet("RN50x4", 5e-4),
    "rn50x16": _resnet("RN50x16", 4e-4),
    "rn50x64": _resnet("RN50x64", 3.6e-4),
    "vit_b_32": _vit("ViT-B-32", 5e-4),
    "vit_b_16": _vit("ViT-B-16", 5e-4),
    "vit_l_14": _vit("ViT-L-14", 4e-4),
    "vit_l_14_336": vit_l_14_336,
}
