"""Overrides are typed, errors name the nearest field, and a dumped config comes back equal."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastclip.config import (
    RunConfig,
    TrainConfig,
    apply_overrides,
    from_dict,
    load_config,
    save_config,
    to_dict,
)
from fastclip.models.presets import PRESETS
from fastclip.recipes import RECIPES


@pytest.fixture
def config() -> TrainConfig:
    return RECIPES["smoke"]("shards")


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_round_trips_through_json(name, tmp_path):
    config = RECIPES[name]("some/shards")
    path = tmp_path / "config.json"
    save_config(config, path)
    assert load_config(path) == config


def test_every_preset_round_trips(config):
    for name in PRESETS:
        changed = apply_overrides(config, [f"model={name}"])
        assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(changed)))) == changed


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("run.steps=1_000", "steps", 1000),
        ("run.steps=1e3", "steps", 1000),
        ("run.steps=none", "steps", None),
        ("run.seed=9007199254740993", "seed", 2**53 + 1),  # no float is that
        ("run.epochs=0.5", "epochs", 0.5),
        ("run.freeze_text=true", "freeze_text", True),
        ("run.wandb_project=clip", "wandb_project", "clip"),
        ("run.device=cpu", "device", "cpu"),
        ("run.directory=a=b", "directory", "a=b"),
    ],
)
def test_override_is_read_by_the_fields_type(config, override, field, value):
    changed = getattr(apply_overrides(config, [override]).run, field)
    assert changed == value
    assert type(changed) is type(value)


def test_nested_override_keeps_the_rest(config):
    changed = apply_overrides(config, ["optim.learning_rate=1e-3", "model.embed_dim=96"])
    assert changed.optim.learning_rate == 1e-3
    assert changed.model.embed_dim == 96
    assert dataclasses.replace(changed, optim=config.optim, model=config.model) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rat=1", "learning_rate"),
        ("optimizer.lr=1", "optim"),
        ("run.steps=many", "whole number"),
        ("run.steps=1.5", "whole number"),
        ("run.freeze_text=perhaps", "true or false"),
        ("run.device=tpu", "auto, cpu, cuda"),
        ("engine.zero_stage=4", "0, 1, 2, 3"),
        ("run.steps.more=1", "single value"),
        ("run.steps", "field.name=value"),
        ("model=ViT-B-23", "ViT-B-32"),
        ("run.steps=-5", "positive"),
        ("run.seed=1e30", r"from 0 to 2\*\*62 - 1"),
        ("run.checkpoint_every_minutes=nan", "positive or none"),
        ("optim.learning_rate=inf", "positive"),
        ("optim.weight_decay=nan", "not negative"),
    ],
)
def test_wrong_override_names_the_way_out(config, override, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(config, [override])


@pytest.mark.parametrize("epochs", ["inf", "nan", "0"])
def test_epochs_are_finite(config, epochs):
    with pytest.raises(ValueError, match=r"run\.epochs is positive"):
        apply_overrides(config, ["run.steps=none", f"run.epochs={epochs}"])


def test_dumped_config_with_a_foreign_field_is_refused(config, tmp_path):
    plain = to_dict(config)
    plain["run"]["setps"] = 3
    path = tmp_path / "config.json"
    path.write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"run\.setps.*steps"):
        load_config(path)


def test_frozen_towers_leave_something_to_train():
    with pytest.raises(ValueError, match="nothing to train"):
        RunConfig(freeze_visual=True, freeze_text=True)
