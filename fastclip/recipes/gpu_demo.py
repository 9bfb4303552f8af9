"""A minute of training on one GPU, on what ``fastclip data demo`` builds."""

import dataclasses

from fastclip.config import RunConfig, TrainConfig
from fastclip.engine.config import EngineConfig
from fastclip.eval.suite import EvalConfig
from fastclip.models.config import ClipConfig, TextConfig, ViTConfig
from fastclip.optim import OptimConfig
from fastclip.recipes.demo import demo

HELD_OUT = ("fluent-emoji-flat", "fxemoji", "flagpack")
"""Drawing styles that training never sees."""

MODEL = ClipConfig(
    embed_dim=256,
    vision=ViTConfig(image_size=64, patch_size=8, width=384, layers=6, heads=6),
    text=TextConfig(context_length=32, width=256, heads=4, layers=4),
)
"""For the demo's pictures of 80 pixels. A batch of 8192 fits into 80 GB with every activation
kept."""


def gpu_demo(data: str) -> TrainConfig:
    """A small ViT on the demo's pairs in batches of 1024; zero-shot on unseen drawing styles."""
    base = demo(data)
    tasks = tuple(task for task in base.eval.zero_shot if task.name in HELD_OUT)
    return dataclasses.replace(
        base,
        model=MODEL,
        data=dataclasses.replace(base.data, workers="auto"),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=40),
        engine=EngineConfig(zero_stage=0, precision="bf16", gradient_clipping=1.0),
        eval=EvalConfig(zero_shot=tasks, batch_size=1024, workers=8),
        run=RunConfig(
            directory="runs/gpu_demo",
            global_batch_size=1024,
            epochs=30,
            log_every_steps=20,
            checkpoint_every_steps=None,
            checkpoint_every_minutes=None,
        ),
    )
