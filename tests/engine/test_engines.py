"""The engine against plain torch: averaging, micro-batches, loss scale, skips, settings."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastclip.engine import build_engine
from fastclip.engine.config import (
    EngineConfig,
    Precision,
    choose_backend,
    deepspeed_settings,
    effective_zero_stage,
)
from fastclip.optim import OptimConfig
from ranks import run_ranks
from small_towers import Place, Towers, adamw, engine_config, product_loss


def _train_beside_torch(
    runtime, place: Place, precision: Precision, micro_batches: int, clipping: float
):
    """Four steps under an engine and under plain torch; step 1 overflows when scaled."""
    torch.manual_seed(0)
    model, reference = Towers(), Towers()
    reference.load_state_dict(model.state_dict())
    config = engine_config(
        place,
        precision=precision,
        initial_loss_scale=1024.0,
        gradient_clipping=clipping,
    )
    engine = build_engine(
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


PLACES: tuple[Place, ...] = ("plain", 0, 1, 2, 3)


def _all_cases(runtime):
    return {
        (place, precision, parts, clipping): _train_beside_torch(
            runtime, place, precision, parts, clipping
        )
        for place in PLACES
        if place != "plain" or runtime.world_size == 1
        for precision, parts, clipping in CASES
    }


@pytest.mark.parametrize("world_size", [1, 2])
def test_engine_steps_like_plain_torch(world_size, tmp_path):
    results = run_ranks(_all_cases, world_size, tmp_path)
    for rank in range(world_size):
        for (place, precision, parts, clipping), result in results[rank].items():
            difference, norms, applied, scale = result
            case = f"{place} {precision} {parts} micro-batches clipping {clipping}"
            assert difference < 2e-7, case
            overflowed = precision == "fp16"
            assert applied == [True, not overflowed, True, True], case
            assert scale == (512.0 if overflowed else 1.0), case
            finite = [n for n, ok in zip(norms, applied, strict=True) if ok]
            assert finite == pytest.approx([1.0] * len(finite), rel=1e-5), case
            assert not overflowed or norms[1] == math.inf


def _misuse(runtime, place: Place):
    model = Towers()
    engine = build_engine(
        model,  # pyright: ignore[reportArgumentType]
        adamw(model),
        engine_config(place, precision="fp32", max_skipped_steps=2),
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


@pytest.mark.parametrize("place", ["plain", 1])
def test_divergence_and_misuse_are_errors(place, tmp_path):
    (messages,) = run_ranks(_misuse, 1, tmp_path, place)
    assert len(messages) == 1
    assert "2 updates in a row" in messages[0]


def _settings(config: EngineConfig) -> dict:
    return deepspeed_settings(
        config,
        micro_batch_size=4,
        micro_batches=2,
        world_size=3,
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


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        ({}, 1, "plain"),
        ({}, 2, "deepspeed"),
        ({"backend": "deepspeed"}, 1, "deepspeed"),
        ({"deepspeed_json": "settings.json"}, 1, "deepspeed"),
        ({"outlier_factor": 3.0}, 1, "plain"),
        ({"outlier_factor": 3.0, "zero_stage": 0}, 2, "deepspeed"),
    ],
)
def test_the_engine_follows_the_number_of_ranks(settings, ranks, expected):
    config = EngineConfig(**settings)
    assert choose_backend(config, ranks, OptimConfig()) == expected
    assert effective_zero_stage(config, ranks, OptimConfig()) == (
        0 if expected == "plain" else config.zero_stage
    )


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        ({"backend": "plain"}, 2, "is for one rank, not 2"),
        ({"outlier_factor": 3.0}, 2, "outlier_factor needs engine.zero_stage=0"),
        ({"backend": "torch"}, 1, "auto, plain or deepspeed"),
        ({"backend": "plain", "deepspeed_json": "x.json"}, 1, "deepspeed_json needs"),
    ],
)
def test_what_an_engine_cannot_do_is_an_error(settings, ranks, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(EngineConfig(**settings), ranks, OptimConfig())
