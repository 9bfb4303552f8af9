"""The family of the scaling experiment, its uncertainties, and the verb's arguments."""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path

import pytest

from fastclip.experiments.scaling import add_scaling_verb
from fastclip.experiments.scaling_family import FAMILY, PRESETS, family
from fastclip.experiments.scaling_report import Measured
from fastclip.experiments.scaling_runs import Training
from fastclip.flops import executed_flops_per_sample


def _measured(errors: dict[str, float], shared: tuple[tuple[str, ...], ...]) -> Measured:
    images = dict.fromkeys(errors, 100)
    training = Training(seed=0, seconds=1.0, errors=errors, test_images=images, retrieval={})
    return Measured(
        member=FAMILY[0],
        parameters=1,
        flops_per_image=1.0,
        images=1,
        learning_rate=1e-3,
        trainings=(training, training),
        shared=shared,
    )


def test_binomial_intervals_add_up_by_shared_images() -> None:
    one = _measured({"a": 0.5, "b": 0.5}, (("a",), ("b",)))
    assert one.binomial_deviation == pytest.approx(0.05 / math.sqrt(2))
    assert _measured({"a": 0.5, "b": 0.5}, (("a", "b"),)).binomial_deviation == pytest.approx(0.05)
    low, high = one.binomial_interval
    assert (low + high) / 2 == pytest.approx(0.5)
    assert _measured({"a": 1.0}, (("a",),)).binomial_interval == (1.0, 1.0)


def test_the_family_spans_what_the_paper_does() -> None:
    costs = [executed_flops_per_sample(member.model, [5]) for member in FAMILY]
    assert costs == sorted(costs)
    assert costs[-1] / costs[0] > 30
    for member in FAMILY:
        vision = member.model.vision
        assert member.model.text.width == 8 * vision.width
        assert member.model.text.layers == FAMILY[0].model.text.layers
    for before, after in itertools.pairwise(FAMILY):
        assert after.model.vision.width >= before.model.vision.width
        assert after.model.vision.image_size >= before.model.vision.image_size
    for preset in PRESETS.values():
        assert [member.seeds for member in family(preset, None)] == list(preset.seeds)
        assert {member.seeds for member in family(preset, 2)} == {2}
    with pytest.raises(ValueError, match="--seeds is at least 1, not 0"):
        family(PRESETS["small"], 0)


def test_the_verb_needs_the_demos_data_and_ten_steps(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_scaling_verb(parser.add_subparsers())
    words = ["scaling", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    options = parser.parse_args(words)
    with pytest.raises(FileNotFoundError, match="fastclip data demo"):
        options.run(options)
    (tmp_path / "train").mkdir()
    (tmp_path / "style-fluent-emoji-flat").mkdir()
    options = parser.parse_args([*words, "--preset", "long", "--images", "100"])
    with pytest.raises(ValueError, match="--images is at least 2,560, ten steps, not 100"):
        options.run(options)
