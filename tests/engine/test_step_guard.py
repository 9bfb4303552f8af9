"""A bad gradient changes no parameter, is counted, and nobody waits to know."""

from __future__ import annotations

import math

import pytest
import torch

from fastclip.distributed.runtime import Runtime
from fastclip.engine import build_engine
from fastclip.engine.config import EngineConfig
from fastclip.engine.step_guard import LossScale, StepGuard
from ranks import run_ranks
from small_towers import Place, Towers, adamw, engine_config, product_loss

BAD = {2: math.inf, 3: math.nan, 7: -math.inf, 11: math.nan}
STEPS = 14


def test_loss_scale_doubles_after_a_window_and_halves_at_an_overflow():
    scale = LossScale(8.0, window=2, enabled=True)
    for overflow in (False, False, True, False, False):
        scale.update(torch.tensor(overflow))
    assert float(scale.value) == 16.0
    other = LossScale(1.0, window=2, enabled=True)
    other.load_state_dict(scale.state_dict())
    assert other.state_dict() == scale.state_dict() == {"value": 16.0, "good_steps": 0}


def test_a_run_that_turns_to_fp16_begins_with_the_settings_scale():
    off, on = LossScale(64.0, window=2, enabled=False), LossScale(64.0, window=2, enabled=True)
    on.load_state_dict(off.state_dict())
    assert float(on.value) == 64.0


def _poisoned(runtime, place: Place, fused: bool, precision: str):
    """Parameters before and after each step, which of them were applied, and the count."""
    torch.manual_seed(0)
    model = Towers()
    engine = build_engine(
        model,  # pyright: ignore[reportArgumentType]
        adamw(model, fused),
        engine_config(place, precision=precision, initial_loss_scale=4.0),
        runtime,
        micro_batch_size=4,
    )
    changed, applied = [], []
    for step in range(STEPS):
        before = engine.full_state_dict()
        images, tokens = torch.randn(4, 8), torch.randn(4, 8)
        loss = product_loss(engine.forward(images, tokens), 4)
        # One rank's gradient is bad: all must skip.
        bad = BAD.get(step, 1.0) if runtime.rank == runtime.world_size - 1 else 1.0
        engine.backward(loss * bad)
        applied.append(bool(engine.step().applied))
        after = engine.full_state_dict()
        if before is not None and after is not None:
            changed.append(any(not torch.equal(before[n], after[n]) for n in before))
            assert all(tensor.isfinite().all() for tensor in after.values())
    skipped = int(engine.guard.skipped_steps)
    engine.close()
    return changed, applied, skipped


def _all_poisoned(runtime):
    cases: list[tuple[Place, bool, str]] = [
        (0, True, "fp32"),
        (0, True, "fp16"),
        (0, False, "fp16"),
        (1, True, "fp16"),
        (2, True, "fp32"),
        (3, True, "fp32"),
    ]
    if runtime.world_size == 1:
        cases.extend([("plain", True, "fp32"), ("plain", True, "fp16"), ("plain", False, "fp16")])
    return {case: _poisoned(runtime, *case) for case in cases}


@pytest.mark.parametrize("world_size", [1, 2])
def test_no_bad_update_is_made(world_size, tmp_path):
    expected = [step not in BAD for step in range(STEPS)]
    for rank, results in enumerate(run_ranks(_all_poisoned, world_size, tmp_path)):
        for case, (changed, applied, skipped) in results.items():
            assert applied == expected, case
            assert skipped == len(BAD), case
            assert rank or changed == expected, case


def test_unusual_norms_are_skipped_once_the_usual_one_is_known():
    guard = StepGuard(EngineConfig(zero_stage=0, outlier_factor=5.0), torch.device("cpu"))
    norms = [100.0] + [1.0 + 0.1 * (step % 3) for step in range(60)]
    assert all(bool(guard.judge(torch.tensor(norm))) for norm in norms)
    state = guard.state_dict()
    other = StepGuard(guard.config, torch.device("cpu"))
    other.load_state_dict(state)
    for each in (guard, other):
        assert not bool(each.judge(torch.tensor(9.0)))
        assert not bool(each.judge(torch.tensor(math.nan)))
        assert bool(each.judge(torch.tensor(0.0)))
        assert bool(each.judge(torch.tensor(1.0)))
    assert guard.state_dict() == other.state_dict()
    plain = StepGuard(EngineConfig(), torch.device("cpu"))
    assert bool(plain.judge(torch.tensor(1e30)))


def test_a_refused_outlier_leaves_the_loss_scale_alone():
    torch.manual_seed(0)
    model = Towers()
    settings = {"precision": "fp16", "initial_loss_scale": 8.0, "outlier_factor": 3.0}
    engine = build_engine(
        model,  # pyright: ignore[reportArgumentType]
        adamw(model),
        engine_config("plain", **settings),
        Runtime.alone(torch.device("cpu")),
        micro_batch_size=4,
    )
    images, tokens = torch.randn(4, 8), torch.randn(4, 8)
    infos = []
    for factor in [1.0] * 20 + [50.0, math.inf]:
        engine.backward(product_loss(engine.forward(images, tokens), 4) * factor)
        infos.append((engine.step(), float(engine.loss_scale.value)))
    (unusual, kept), (overflow, halved) = infos[-2:]
    assert not bool(unusual.applied)
    assert bool(unusual.gradient_norm.isfinite())
    assert kept == 8.0
    assert not bool(overflow.applied)
    assert halved == 4.0


def test_too_many_skipped_updates_in_a_row_are_an_error():
    guard = StepGuard(EngineConfig(max_skipped_steps=3), torch.device("cpu"))
    for applied in (False, False, True, False, False):
        guard.count(torch.tensor(applied))
    guard.raise_if_diverged()
    guard.count(torch.tensor(False))
    with pytest.raises(FloatingPointError, match="3 updates in a row"):
        guard.raise_if_diverged()
    assert int(guard.skipped_steps) == 5


def test_an_outlier_is_above_the_usual():
    with pytest.raises(ValueError, match="is above 1"):
        EngineConfig(outlier_factor=0.5)
