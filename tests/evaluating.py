"""Evaluators of small models."""

from __future__ import annotations

from fastclip.distributed.runtime import Runtime
from fastclip.eval.evaluator import Evaluator
from fastclip.models.clip import Clip
from fastclip.tokenizer import Tokenizer


def evaluator(
    model: Clip,
    runtime: Runtime,
    *,
    batch_size: int = 5,
    workers: int = 1,
    apply_orientation: bool = False,
) -> Evaluator:
    return Evaluator(
        model=model,
        tokenizer=Tokenizer(context_length=model.config.text.context_length),
        runtime=runtime,
        batch_size=batch_size,
        workers=workers,
        apply_orientation=apply_orientation,
    )
