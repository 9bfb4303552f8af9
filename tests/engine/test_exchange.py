"""A checkpoint goes on under another engine, ZeRO stage or number of ranks as if nothing were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastclip.checkpoint import (
    find_resume_point,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    step_tag,
)
from fastclip.engine import Engine, EngineConfig, build_engine, whole_state
from fastclip.engine.config import effective_zero_stage
from fastclip.engine.universal import write
from fastclip.optim import OptimConfig, parameter_groups
from ranks import run_ranks
from small_towers import Towers, product_loss

PAIRS = 12
BEFORE, AFTER = 3, 3
THEN, NOW = OptimConfig(weight_decay=0.2), OptimConfig(weight_decay=0.4, beta1=0.8, beta2=0.95)
Place = tuple[str, int, int]  # engine, ZeRO stage, ranks
SOURCES: tuple[Place, ...] = (
    ("plain", 0, 1),
    ("deepspeed", 0, 2),
    ("deepspeed", 1, 2),
    ("deepspeed", 2, 1),
    ("deepspeed", 3, 2),
)
TARGETS: tuple[Place, ...] = (
    ("plain", 0, 1),
    ("deepspeed", 0, 1),
    ("deepspeed", 2, 1),
    ("deepspeed", 3, 1),
    ("deepspeed", 0, 2),
    ("deepspeed", 1, 2),
    ("deepspeed", 3, 2),
    ("deepspeed", 1, 3),
)


class Remembering(Towers):
    """With a frozen layer and a buffer, which no optimiser knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.visual[0].requires_grad_(False)
        self.forwards: torch.Tensor
        self.register_buffer("forwards", torch.zeros(()))

    def forward(self, images=None, tokens=None):
        self.forwards += 1
        return super().forward(images, tokens)


def _model(seed: int) -> Remembering:
    torch.manual_seed(seed)
    return Remembering()


def _optimizer(model: torch.nn.Module, config: OptimConfig = NOW) -> torch.optim.AdamW:
    """With the groups of training: of the temperature's, all ranks but one own nothing."""
    groups = parameter_groups(model, config)  # pyright: ignore[reportArgumentType]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=1e-2, betas=betas, eps=1e-4, fused=True)


def _set_anew(optimizer: torch.optim.Optimizer) -> None:
    groups = _optimizer(_model(0)).param_groups
    for group, other in zip(optimizer.param_groups, groups, strict=True):
        group.update(weight_decay=other["weight_decay"], betas=other["betas"])


def _settings(place: Place) -> EngineConfig:
    backend, stage, _ = place
    return EngineConfig(backend=backend, zero_stage=stage, precision="fp32")  # pyright: ignore[reportArgumentType]


def _engine(
    runtime, place: Place, model: Remembering, config: OptimConfig = NOW, universal: bool = False
) -> Engine:
    return build_engine(
        model,  # pyright: ignore[reportArgumentType]
        _optimizer(model, config),
        _settings(place),
        runtime,
        micro_batch_size=PAIRS // runtime.world_size,
        universal=universal,
    )


def _train(engine: Engine, runtime, steps: range) -> None:
    share = PAIRS // runtime.world_size
    rows = slice(runtime.rank * share, (runtime.rank + 1) * share)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(PAIRS, 8, generator=generator)
        tokens = torch.randn(PAIRS, 8, generator=generator)
        output = engine.forward(images[rows], tokens[rows])
        engine.backward(product_loss(output, share))
        engine.step()


def _write(runtime, places: list[Place], directory: Path) -> dict[str, torch.Tensor] | None:
    """A checkpoint under each engine; the weights of a run that is not interrupted.

    After the checkpoint the optimiser has other settings, as a resumed run's may be.
    """
    weights = None
    for place in places:
        engine = _engine(runtime, place, _model(0), THEN)
        _train(engine, runtime, range(BEFORE))
        save_checkpoint(
            directory / "-".join(map(str, place)),
            engine,
            runtime,
            step=BEFORE,
            pairs=0,
            loader_state={},
            model_config={},
            keep=1,
        )
        _set_anew(engine.optimizer)
        _train(engine, runtime, range(BEFORE, BEFORE + AFTER))
        weights = engine.full_state_dict()
        engine.close()
    return weights


def _continue(
    runtime, targets: list[Place], sources: tuple[Place, ...], directory: Path
) -> dict[tuple[Place, Place], dict[str, torch.Tensor] | None]:
    weights = {}
    for target in targets:
        stage = effective_zero_stage(_settings(target), runtime.world_size, OptimConfig())
        for source in sources:
            checkpoints = directory / "-".join(map(str, source))
            point = find_resume_point(checkpoints, runtime, stage, {})
            assert point is not None
            model = _model(1)
            load_weights(point, model)  # pyright: ignore[reportArgumentType]
            engine = _engine(runtime, target, model, universal=point.universal)
            load_checkpoint(point, engine, runtime)
            _train(engine, runtime, range(BEFORE, BEFORE + AFTER))
            weights[source, target] = engine.full_state_dict()
            engine.close()
    return weights


def test_checkpoints_load_under_every_engine(tmp_path):
    expected = None
    for ranks in (1, 2):
        places = [place for place in SOURCES if place[2] == ranks]
        whole = run_ranks(_write, ranks, tmp_path, places, tmp_path)[0]
        expected = whole if expected is None else expected
    assert expected is not None
    pairs = 0
    for ranks in (1, 2, 3):
        targets = [place for place in TARGETS if place[2] == ranks]
        results = run_ranks(_continue, ranks, tmp_path, targets, SOURCES, tmp_path)[0]
        for (source, target), weights in results.items():
            pairs += 1
            assert weights is not None
            for name, tensor in expected.items():
                message = f"{source} to {target}: {name}"
                torch.testing.assert_close(
                    weights[name], tensor, rtol=0, atol=1e-6, msg=lambda m, s=message: f"{s}\n{m}"
                )
    assert pairs == len(SOURCES) * len(TARGETS)
    made = sorted(p.parent.name for p in tmp_path.glob(f"*/{step_tag(BEFORE)}-universal"))
    assert len(made) == len(SOURCES)


def test_a_state_that_is_not_adams_cannot_be_converted(tmp_path):
    momentum = {"weight": {"momentum_buffer": torch.zeros(2), "step": torch.tensor(1.0)}}
    with pytest.raises(ValueError, match="no exp_avg, exp_avg_sq: it can only be resumed"):
        write(tmp_path, {"weight": torch.zeros(2)}, momentum)


class CountsPerGroup(torch.optim.SGD):
    """As apex's and DeepSpeed's fused Adam keep the number of steps."""


def test_counts_per_group_are_restored(tmp_path):
    model = _model(0)
    optimizer = _optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for _ in range(3):
        optimizer.step()
    whole_state.save(tmp_path, model, optimizer)
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    other = CountsPerGroup(groups, lr=0.1)
    whole_state.load(tmp_path, model, other)
    assert {group["step"] for group in other.param_groups} == {3}
    parameter = groups[0]["params"][0]
    assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])
    for group in other.param_groups:  # and they are written, wherever they have gone on
        group["step"] += 1
    whole_state.save(tmp_path, model, other)
    again = _optimizer(model)
    whole_state.load(tmp_path, model, again)
    assert float(again.state[parameter]["step"]) == 4.0


def test_other_states_are_named(tmp_path):
    model = _model(0)
    optimizer = _optimizer(model)
    with pytest.raises(FileNotFoundError, match=r"has no optimizer\.safetensors"):
        whole_state.load(tmp_path, model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    whole_state.save(tmp_path, model, optimizer)
    model.text.requires_grad_(False)
    with pytest.raises(ValueError, match=r"text\.bias was trained there only"):
        whole_state.load(tmp_path, model, optimizer)
    momentum = torch.optim.SGD(model.visual.parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    model.text.requires_grad_(True)
    whole_state.save(tmp_path, model, momentum)
    with pytest.raises(ValueError, match="other parameters"):
        whole_state.load(tmp_path, model, optimizer)


def test_one_parameters_count_is_all_parameters(tmp_path):
    model = _model(0)
    optimizer = _optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:  # as DeepSpeed's FusedAdam leaves them
        for parameter in group["params"][:-1]:
            optimizer.state[parameter]["step"].zero_()
    stored = whole_state.states(model, optimizer)
    assert {float(state["step"]) for state in stored.values()} == {1.0}
