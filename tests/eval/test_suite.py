"""All tasks together: keys, modes, table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evaluating import evaluator
from fastclip.distributed.runtime import Runtime
from fastclip.eval.retrieval import RetrievalTask
from fastclip.eval.suite import EvalConfig, format_table, run_suite
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from shards import write_shards

ALONE = Runtime.alone(torch.device("cpu"))


def test_suite_leaves_mode_and_random_numbers_alone(tmp_path: Path) -> None:
    shards = str(write_shards(tmp_path, pairs=24))
    config = EvalConfig(
        zero_shot=(
            ZeroShotTask(
                name="shapes",
                shards=shards,
                classes=str(tmp_path / "classes.json"),
                templates=("{}",),
            ),
        ),
        retrieval=(RetrievalTask(name="pairs", shards=shards),),
        batch_size=16,
        workers=1,
    )
    model = Clip(preset("RN-Nano")).train()
    model.freeze(vision=True, text=False)
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    metrics = run_suite(evaluator(model, ALONE, batch_size=16), config)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.visual.training  # frozen towers stay in evaluation mode
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())
    assert metrics["zero_shot/shapes/images"] == 24
    assert metrics["retrieval/pairs/texts"] == 24
    table = format_table(metrics)
    assert "shapes" in table.splitlines()[1]
    assert table.splitlines()[1].endswith(f"{1 / 24:.2%}")
    assert table.splitlines()[-1].startswith("pairs")


def test_empty_suite_says_so() -> None:
    assert format_table({}) == "no evaluation is configured"


def test_names_of_tasks_are_unique() -> None:
    task = RetrievalTask(name="a", shards="x")
    with pytest.raises(ValueError, match=r"eval\.retrieval has two tasks named a"):
        EvalConfig(retrieval=(task, task))
    with pytest.raises(ValueError, match="no /"):
        RetrievalTask(name="a/b", shards="x")
