"""What decays, who learns how fast, and when."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fastclip.models.clip import Clip
from fastclip.models.presets import preset
from fastclip.nvidia_apex import find_optimizer
from fastclip.optim import (
    OptimConfig,
    build_optimizer,
    learning_rate_at,
    parameter_groups,
    set_learning_rate,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["ViT-Nano-8", "RN-Nano"])
@pytest.mark.parametrize("bias", [None, -10.0])
def test_every_trained_parameter_is_in_one_group(name: str, bias: float | None) -> None:
    model = Clip(dataclasses.replace(preset(name), init_logit_bias=bias))
    config = OptimConfig(visual_lr_scale=0.1, text_lr_scale=3.0)
    groups = parameter_groups(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(names.values())
    for group in groups:
        tower, kind = group["name"].split("/")
        for parameter in group["params"]:
            name_of = names[id(parameter)]
            undecayed = (
                name_of.endswith(("bias", "class_embedding"))
                or "logit" in name_of
                or parameter.ndim < 2
            )
            assert (kind == "no_decay") == undecayed, name_of
            assert name_of.startswith(tower)
        assert group["weight_decay"] == (0.2 if kind == "decay" else 0.0)
        assert group["lr_scale"] == {"visual": 0.1, "text": 3.0, "logit": 1.0}[tower]


def test_frozen_towers_are_in_no_group() -> None:
    model = Clip(preset("ViT-Nano-8"))
    model.freeze(vision=True, text=False)
    groups = parameter_groups(model, OptimConfig())
    assert {group["name"].split("/")[0] for group in groups} == {"text", "logit"}


def test_schedule() -> None:
    config = OptimConfig(learning_rate=0.4, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate_at(step, config, 24) for step in range(30)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4] == pytest.approx(0.4)
    assert rates[14] == pytest.approx(0.4 * (0.1 + 0.9 * 0.5))  # half way
    assert rates[24:] == pytest.approx([0.04] * 6)
    assert rates[4:25] == sorted(rates[4:25], reverse=True)
    flat = dataclasses.replace(config, schedule="constant")
    assert learning_rate_at(20, flat, 24) == 0.4
    assert learning_rate_at(0, dataclasses.replace(config, warmup_steps=0), 24) == 0.4
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=4 is not shorter than the run's 4"):
        learning_rate_at(0, config, 4)


def test_an_update_is_decoupled_adam() -> None:
    torch.manual_seed(0)
    model = Clip(preset("ViT-Nano-8"))
    config = OptimConfig(
        learning_rate=1e-2, beta1=0.8, beta2=0.9, eps=1e-5, warmup_steps=0, text_lr_scale=0.5
    )
    optimizer = build_optimizer(parameter_groups(model, config), config, CPU)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert set_learning_rate(optimizer, 0, config, 10) == 1e-2
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 1e-2 * (0.5 if name.startswith("text.") else 1.0)
        decay = 0.2 if parameter.ndim > 1 and "logit" not in name else 0.0
        gradient = parameter.grad
        assert gradient is not None
        step = gradient / (gradient.abs() + 1e-5)  # the moments' corrections cancel at first
        expected = before[name] * (1 - rate * decay) - rate * step
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    half = set_learning_rate(optimizer, 5, config, 10)
    assert half == pytest.approx(0.5e-2)
    assert {group["lr"] for group in optimizer.param_groups} == {half, 0.5 * half}


def test_apex_that_is_missing_says_what_to_do() -> None:
    if find_optimizer("FusedAdam") is not None:
        pytest.skip("NVIDIA's apex is installed here")
    config = OptimConfig(implementation="apex")
    with pytest.raises(ImportError, match=r"optim\.implementation=torch"):
        build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], config, CPU)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("eps", -1.0),
        ("beta2", 1.0),
        ("weight_decay", -0.1),
        ("warmup_steps", -1),
        ("final_lr_fraction", 1.5),
        ("schedule", "linear"),
        ("implementation", "fused"),
    ],
)
def test_settings_that_do_not_fit_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{field}"):
        OptimConfig(**{field: value})  # pyright: ignore[reportArgumentType]
