"""A run of seconds on any machine, to check an installation: a tiny ViT on the given shards."""

from fastclip.config import RunConfig, TrainConfig
from fastclip.data.config import DataConfig
from fastclip.engine.config import EngineConfig
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig


def smoke(data: str) -> TrainConfig:
    """Twenty steps of ViT-Nano-8 with 64 pairs each; `data` is a shard pattern or folder."""
    return TrainConfig(
        model=preset("ViT-Nano-8"),
        data=DataConfig(train=data),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=5),
        engine=EngineConfig(zero_stage=0, precision="fp32"),
        run=RunConfig(directory="runs/smoke", global_batch_size=64, steps=20, log_every_steps=5),
    )
