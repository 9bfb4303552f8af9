"""The engine against plain torch: averaging, micro-batches, loss scale, skips, settings."""

from __future__ import annotations

import json
import math
from typing import Literal

import pytest
import torch

from fastclip.engine import Engine
from fastclip.engine_config import EngineConfig, Precision, deepspeed_settings
from ranks import run_ranks
from small_towers import Towers, adamw, product_loss


def _train_beside_torch(
    runtime, stage: Literal[0, 1, 2, 3], precision: Precision, micro_batches: int, clipping: float
):
    """Four steps under DeepSpeed and under plain torch; step 1 overflows when scaled."""
    torch.manual_seed(0)
    model, reference = Towers(), Towers()
    reference.load_state_dict(model.state_dict())
    config = EngineConfig(
        zero_stage=stage,
        precision=precision,
        initial_loss_scale=1024.0,
        gradient_clipping=clipping,
    )
    engine = Engine(
        model,  # pyright: ignore[reportArgumentType]
        adamw(model),
        config,
        runtime,
        micro_batch_size=4,
        micro_batches=micro_batches,
    )
    optimizer = adamw(reference, fused=False)
    pairs = runtime.world_size * micro_batches * 4
    norms, applied = [], []
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(pairs, 8, generator=generator)
        tokens = torch.randn(pairs, 8, generator=generator)
        overflow = step == 1 and precision == "fp16"
        optimizer.zero_grad()
        product_loss(reference(images, tokens), pairs).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), clipping or math.inf)
        if not overflow:
            optimizer.step()
        for part in range(micro_batches):
            first = (runtime.rank * micro_batches + part) * 4
            rows = slice(first, first + 4)
            loss = (
                product_loss(engine.forward(images[rows], tokens[rows]), pairs) * runtime.world_size
            )
            broken = overflow and runtime.rank == 0 and part == 0
            engine.backward(loss * math.inf if broken else loss)
        info = engine.step()
        norms.append(float(info.gradient_norm) / float(norm))
        applied.append(bool(info.applied))
    weights = engine.full_state_dict()
    difference = 0.0
    if weights is not None:
        expected = reference.state_dict()
        difference = max(float((weights[n] - expected[n]).abs().max()) for n in expected)
    scale = float(engine.loss_scale.value)
    engine.close()
    return difference, norms, applied, scale


CASES: tuple[tuple[Precision, int, float], ...] = (
    ("fp32", 3, 0.0),
    ("fp16", 2, 0.0),
    ("fp32", 1, 0.1),
    ("fp16", 1, 0.1),
)


def _all_cases(runtime):
    return {
        (stage, precision, parts, clipping): _train_beside_torch(
            runtime, stage, precision, parts, clipping
        )
        for stage in (0, 1, 2, 3)
        for precision, parts, clipping in CASES
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_engine_steps_like_plain_torch(world_size, tmp_path):
    results = run_ranks(_all_cases, world_size, tmp_path)
    for rank in range(world_size):
        for (stage, precision, parts, clipping), result in results[rank].items():
            difference, norms, applied, scale = result
            case = f"ZeRO {stage} {precision} {parts} micro-batches clipping {clipping}"
            assert difference < 2e-7, case
            overflowed = precision == "fp16"
            assert applied == [True, not overflowed, True, True], case
            assert scale == (512.0 if overflowed else 1.0), case
            finite = [n for n, ok in zip(norms, applied, strict=True) if ok]
            assert finite == pytest.approx([1.0] * len(finite), rel=1e-5), case
            assert not overflowed or norms[1] == math.inf


def _misuse(runtime):
    model = Towers()
    engine = Engine(
        model,  # pyright: ignore[reportArgumentType]
        adamw(model),
        EngineConfig(precision="fp32", max_skipped_steps=2),
        runtime,
        micro_batch_size=2,
        micro_batches=2,
    )
    data = torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="0 of 2 micro-batches"):
        engine.step()
    messages = []
    for _ in range(2):
        for _ in range(2):
            engine.backward(product_loss(engine.forward(data, data), 4) * math.nan)
        engine.step()
        try:
            engine.raise_if_diverged()
        except FloatingPointError as error:
            messages.append(str(error))
    engine.close()
    return messages


def test_divergence_and_misuse_are_errors(tmp_path):
    (messages,) = run_ranks(_misuse, 1, tmp_path)
    assert len(messages) == 1
    assert "2 updates in a row" in messages[0]


def _settings(config: EngineConfig) -> dict:
    return deepspeed_settings(
        config,
        micro_batch_size=4,
        micro_batches=2,
        world_size=3,
        on_cuda=False,
        zero_keys={"stage", "reduce_bucket_size"},
    )


def test_settings_state_what_deepspeed_would_default_silently():
    settings = _settings(EngineConfig())
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_batch_size"] == 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimization"),
        ({"bf16": {"enabled": True}}, r"engine\.precision"),
        ({"gradient_clipping": 1.0}, r"engine\.gradient_clipping"),
        ({"zero_optimization": {"stage": 2}}, r"engine\.zero_stage"),
        ({"zero_optimization": {"reduce_bucket_sise": 2}}, "reduce_bucket_size"),
    ],
)
def test_unknown_or_owned_deepspeed_keys_are_errors(content, message, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        _settings(EngineConfig(deepspeed_json=str(path)))


def test_users_deepspeed_settings_are_merged(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 7}}))
    merged = _settings(EngineConfig(deepspeed_json=str(path)))["zero_optimization"]
    assert merged["reduce_bucket_size"] == 7
    assert merged["stage"] == 1


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_deepspeed_json_names_the_file(content, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"ds\.json"):
        _settings(EngineConfig(deepspeed_json=str(path)))
