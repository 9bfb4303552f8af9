"""The optimisers' benchmark: the same numbers for all, and failures are rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import bench_optim, record
from benchmarks.bench_optim import Drawn, Provider
from benchmarks.harness import RESUME

CPU = torch.device("cpu")


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **bench_optim.SETTINGS)


def _broken(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    raise RuntimeError("no such optimiser\nhere")


def _still(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def _main(out: Path) -> tuple[int, list[dict[str, str]]]:
    arguments = ["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(out)]
    status = bench_optim.main([*arguments, "--models", "ViT-B-32", "ViT-L-14"])
    return status, record.read_rows(out / "optim.csv")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models that numbers were drawn for; a linear layer stands in for each."""
    models: list[str] = []

    def layer(model: str) -> nn.Module:
        models.append(model)
        return nn.Linear(8, 4)

    monkeypatch.setattr(bench_optim, "preset", lambda model: model)
    monkeypatch.setattr(bench_optim, "Clip", layer)
    return models


def test_numbers_are_drawn_once_for_a_model_and_failures_are_rows(
    drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    providers = [Provider("broken", _broken), Provider("still", _still), Provider("right", _adamw)]
    monkeypatch.setattr(bench_optim, "providers", lambda: providers)
    status, rows = _main(tmp_path)
    assert status == 1
    assert drawn == ["ViT-B-32", "ViT-L-14"]
    errors = ["RuntimeError: no such optimiser", "the step is off by 1", ""]
    assert [row["error"] for row in rows] == 2 * errors
    assert [row["median_ms"] != "" for row in rows] == 2 * [False, False, True]


def test_a_lost_device_ends_the_run_after_its_row(
    drawn: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_optim, "providers", lambda: [Provider("broken", _broken)])
    monkeypatch.setattr(bench_optim, "alive", lambda device: False)
    status, rows = _main(tmp_path)
    assert status == RESUME
    assert len(rows) == len(drawn) == 1


def test_every_provider_begins_with_the_same_numbers(drawn: list[str]) -> None:
    numbers = bench_optim.draw("ViT-B-32", CPU)
    for stored in (torch.float32, torch.bfloat16):
        weight, bias = bench_optim.parameters_of(numbers, stored)
        assert (weight.dtype, bias.dtype) == (stored, torch.float32)
        for parameter, (value, gradient) in zip((weight, bias), numbers, strict=True):
            assert torch.equal(parameter.detach().bfloat16(), value)
            assert parameter.grad is not None
            assert torch.equal(parameter.grad.bfloat16(), gradient)
        before = Drawn(*(tensor.clone() for tensor in numbers[0]))
        _adamw([weight, bias]).step()
        assert torch.equal(before.value, numbers[0].value)  # a step is of a copy
