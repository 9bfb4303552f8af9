"""A few minutes of real training on two CPU cores, on what ``fastclip data demo`` builds."""

from pathlib import Path

from fastclip.config import RunConfig, TrainConfig
from fastclip.data.config import DataConfig
from fastclip.engine.config import EngineConfig
from fastclip.eval.retrieval import RetrievalTask
from fastclip.eval.suite import EvalConfig
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig


def demo(data: str) -> TrainConfig:
    """RN-Nano on the demo's pairs; zero-shot on drawing styles that it has never seen."""
    root = Path(data or "demo/data")
    return TrainConfig(
        model=preset("RN-Nano"),
        data=DataConfig(
            train=str(root / "train"),
            workers=1,
            crop_scale=(0.7, 1.0),
            positives="label",  # one caption occurs in up to seven styles
        ),
        optim=OptimConfig(learning_rate=2e-3, beta2=0.98, eps=1e-6, warmup_steps=60),
        engine=EngineConfig(zero_stage=0, precision="fp32", gradient_clipping=1.0),
        eval=EvalConfig(
            zero_shot=(
                _zero_shot(root, "fluent-emoji-flat", "style-fluent-emoji-flat", "emoji"),
                _zero_shot(root, "fxemoji", "style-fxemoji", "emoji"),
                _zero_shot(root, "flagpack", "style-flagpack", "flags"),
                _zero_shot(root, "seen styles", "test-seen-styles", "emoji"),
                _zero_shot(root, "seen flags", "test-seen-flags", "flags"),
                _zero_shot(root, "digits", "test-digits", "digits"),
                _zero_shot(root, "foods", "test-foods", "food-groups"),
            ),
            retrieval=(
                RetrievalTask(name="unseen style", shards=str(root / "style-fluent-emoji-flat")),
                RetrievalTask(name="unseen captions", shards=str(root / "test-captions")),
            ),
            workers=1,
        ),
        run=RunConfig(
            directory="runs/demo",
            global_batch_size=256,
            epochs=8,
            log_every_steps=10,
            checkpoint_every_steps=100,
            evaluate_every_steps=221,
        ),
    )


def _zero_shot(root: Path, name: str, split: str, classes: str) -> ZeroShotTask:
    # Training has seen bare names and nothing else: a sentence around one would be new to it.
    return ZeroShotTask(
        name=name,
        shards=str(root / split),
        classes=str(root / "classes" / f"{classes}.json"),
        templates=("{}",),
    )
