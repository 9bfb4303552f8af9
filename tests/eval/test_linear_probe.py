"""Linear probes against scikit-learn, their search against the definition, and their edges."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression as Oracle
from torch import Tensor

from fastclip.eval import linear_probe as module
from fastclip.eval.features import Features
from fastclip.eval.linear_probe import linear_probe, search_strength, split, strength_at
from fastclip.eval.logistic_regression import (
    Classifier,
    LogisticRegression,
    minimise_convex,
    sigmoid_slopes,
    softmax_slopes,
)

STRENGTHS = (1e-2, 1.0, 1e3)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def examples(count: int, width: int, classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """As models give them: directions of very different length about a large mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    x = centres[labels] + 1.5 * torch.randn(count, width, generator=generator)
    return x * torch.logspace(0.5, -1.0, width) + 3.0, labels


def features(x: Tensor, labels: Tensor) -> Features:
    keys = tuple(str(row) for row in range(len(x)))
    return Features(torch.nn.functional.normalize(x, dim=1), x, labels, keys)


def oracle(x: Tensor, labels: Tensor, strength: float) -> Any:
    """scikit-learn's, iterated until the gradient has vanished."""
    model = Oracle(C=1 / strength, tol=1e-9, max_iter=20_000)
    return model.fit(x.double().numpy(), labels.numpy())


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize(("count", "width"), [(240, 12), (20, 48)])
def test_equals_scikit_learn(classes: int, strength: float, count: int, width: int) -> None:
    x, labels = examples(count, width, classes)
    fresh, _ = examples(50, width, classes, seed=1)
    fit = LogisticRegression(x, labels, classes).fit(strength)
    expected = oracle(x, labels, strength).predict_proba(fresh.double().numpy())
    assert fit.converged
    np.testing.assert_allclose(fit.probabilities(fresh).numpy(), expected, atol=1e-4)
    torch.testing.assert_close(fit.scores(fresh).softmax(dim=1), fit.probabilities(fresh))
    assert float(fit.scores(fresh).sum(dim=1).abs().max()) < 1e-4


@pytest.mark.parametrize("strength", STRENGTHS)
def test_several_classes_are_one_vs_rest(strength: float) -> None:
    x, labels = examples(200, 10, 4)
    several = torch.nn.functional.one_hot(labels, 6).bool()
    several[:, 4] = several[:, 0] | several[:, 1]
    several[:, 5] = False  # no example: never predicted
    fit = LogisticRegression(x, several, 6).fit(strength)
    assert fit.scores(x)[:, 5].tolist() == [-math.inf] * 200
    for place in range(5):
        model = oracle(x, several[:, place], strength)
        expected = model.predict_proba(x.double().numpy())[:, 1]
        np.testing.assert_allclose(fit.probabilities(x)[:, place].numpy(), expected, atol=1e-4)


def test_the_start_does_not_matter() -> None:
    x, labels = examples(150, 20, 4)
    regression = LogisticRegression(x, labels, 4)
    cold = regression.fit(0.1, tolerance=1e-6)
    warm = regression.fit(0.1, tolerance=1e-6, start=regression.fit(100.0))
    torch.testing.assert_close(warm.probabilities(x), cold.probabilities(x), atol=1e-5, rtol=0)
    again = regression.fit(0.1, start=cold, tolerance=1e-5)
    assert again.iterations == 0


def test_classes_without_example_have_no_share() -> None:
    x, labels = examples(90, 8, 3)
    with_gaps = torch.tensor([1, 2, 4])[labels]
    fit = LogisticRegression(x, with_gaps, 6).fit(1.0)
    packed = LogisticRegression(x, labels, 3).fit(1.0)
    torch.testing.assert_close(fit.probabilities(x)[:, [1, 2, 4]], packed.probabilities(x))
    assert float(fit.probabilities(x)[:, [0, 3, 5]].sum()) == 0.0


def test_rows_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = examples(101, 8, 3)
    whole = LogisticRegression(x, labels, 3).fit(1.0).probabilities(x)
    monkeypatch.setattr("fastclip.eval.logistic_regression._CHUNK_SCORES", 64)
    torch.testing.assert_close(LogisticRegression(x, labels, 3).fit(1.0).probabilities(x), whole)


def test_minimum_of_a_quadratic() -> None:
    scales = torch.logspace(0, 3, 12, dtype=torch.float64)
    target = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def slope(x: Tensor) -> tuple[float, Tensor]:
        return float((scales * (x - target).square()).sum()) / 2, scales * (x - target)

    x, iterations, converged = minimise_convex(
        slope,
        torch.zeros(12, dtype=torch.float64),
        converged=lambda value, norm: norm < 1e-9,
        max_iterations=500,
    )
    assert converged
    assert iterations < 250  # scipy's L-BFGS needs 157
    torch.testing.assert_close(x, target)
    *_, converged = minimise_convex(
        slope, torch.zeros_like(x), converged=lambda value, norm: norm < 1e-9, max_iterations=2
    )
    assert not converged


def _value_by_step(peak: int) -> tuple[list[float], float]:
    """Strengths that the search asks for where the value falls off from `peak`, and its choice."""
    asked: list[float] = []

    def fit(strength: float, start: Classifier | None) -> Classifier:
        asked.append(strength)
        step = round(8 * (math.log10(strength) + 6))
        return Classifier(
            torch.full((1, 1), -float(abs(step - peak)), dtype=torch.float64),
            torch.zeros(1, dtype=torch.float64),
            True,
            0,
            True,
        )

    judging = features(torch.ones(1, 1), torch.tensor([0]))
    strength, searched, _ = search_strength(fit, judging, lambda scores, _: float(scores))
    assert sorted(asked) == [s for s, _ in searched]
    return asked, strength


@pytest.mark.parametrize("peak", [0, 1, 15, 24, 47, 96])
def test_the_search_finds_the_only_peak(peak: int) -> None:
    asked, strength = _value_by_step(peak)
    assert strength == strength_at(peak)
    assert asked[:7] == pytest.approx([1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6])
    assert len(asked) == len(set(asked)) <= 15


def test_strengths_are_eight_in_a_decade() -> None:
    steps = [strength_at(step) for step in range(97)]
    assert (steps[0], steps[48], steps[96]) == pytest.approx((1e-6, 1.0, 1e6))
    assert steps == pytest.approx(np.logspace(-6, 6, 97).tolist())


def test_of_equal_values_the_strongest_is_chosen() -> None:
    x, labels = examples(60, 6, 3)
    regression = LogisticRegression(x, labels, 3)
    strength, searched, fits = search_strength(
        lambda strength, start: regression.fit(strength, start=start),
        features(x, labels),
        lambda scores, _: 0.5,
    )
    assert strength == pytest.approx(1e6)
    assert len(searched) == len(fits) == 11


def test_probe_retrains_on_everything() -> None:
    x, labels = examples(240, 12, 4)
    test_x, test_labels = examples(300, 12, 4, seed=2)
    train, val = features(x[:160], labels[:160]), features(x[160:], labels[160:])
    result = linear_probe(train, val, features(test_x, test_labels), metric=accuracy)
    best = max(value for _, value in result.searched)
    assert result.strength == max(s for s, value in result.searched if value == best)
    expected = oracle(x, labels, result.strength)
    assert result.value == expected.score(test_x.double().numpy(), test_labels.numpy())
    for strength, value in result.searched:
        model = oracle(x[:160], labels[:160], strength) if strength > 1e-3 else None
        if model is not None:  # weaker ones take scikit-learn long
            held = model.score(x[160:].double().numpy(), labels[160:].numpy())
            assert value == pytest.approx(held, abs=1 / 80)
    assert max(result.unconverged, default=0.0) < 1e-3
    assert not result.absent
    assert result.seconds > 0


def test_without_validation_images_a_fifth_is_held_out() -> None:
    x, labels = examples(103, 6, 4)
    labels[0] = 4  # alone in its class
    whole = features(x, labels)
    fitting, judging = split(whole, seed=5)
    assert sorted(map(int, fitting.keys + judging.keys)) == list(range(103))
    counts, held = torch.bincount(labels), torch.bincount(judging.labels, minlength=5)
    assert held.tolist() == [*(round(0.2 * count) for count in counts[:4].tolist()), 0]
    assert split(whole, seed=5)[1].keys == judging.keys != split(whole, seed=6)[1].keys
    found = linear_probe(whole, None, whole, metric=accuracy, seed=5)
    given = linear_probe(fitting, judging, whole, metric=accuracy)
    assert found.searched == given.searched


def test_what_is_known_of_no_class_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    x, labels = examples(80, 6, 3)
    test = features(x, labels.clone())
    test.labels[0] = 4
    with caplog.at_level(logging.WARNING, "fastclip"):
        result = linear_probe(features(x, labels), None, test, metric=accuracy)
    assert result.absent == (3, 4)
    assert [r.message for r in caplog.records] == [
        "2 of 5 classes have no image to train a linear probe on, and are never predicted (first: "
        "3)"
    ]


def test_fits_that_do_not_converge_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_TOLERANCE", 0.0)
    x, labels = examples(80, 6, 3)
    with caplog.at_level(logging.WARNING, "fastclip"):
        result = linear_probe(features(x, labels), None, features(x, labels), metric=accuracy)
    assert result.unconverged == (result.strength,)
    assert len(caplog.records) == 1
    assert "1 fit(s) of a linear probe had not converged" in caplog.text


def test_bad_input() -> None:
    x, labels = examples(20, 4, 3)
    good = features(x, labels)
    with pytest.raises(ValueError, match="not finite"):
        LogisticRegression(x / 0, labels, 3)
    with pytest.raises(ValueError, match="labels are places among 2 classes"):
        LogisticRegression(x, labels, 2)
    with pytest.raises(ValueError, match=r"show 1$"):
        LogisticRegression(x, torch.zeros_like(labels), 3)
    with pytest.raises(ValueError, match="no class has both"):
        LogisticRegression(x, torch.ones(20, 2, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="strength is finite and positive, not 0"):
        LogisticRegression(x, labels, 3).fit(0.0)
    several = features(x, torch.ones(20, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="are alike"):
        linear_probe(good, None, several, metric=accuracy)
    with pytest.raises(ValueError, match="one kind is empty"):
        linear_probe(good, None, good.rows(torch.arange(0)), metric=accuracy)
    with pytest.raises(ValueError, match="is not a number, at strength"):
        linear_probe(good, None, good, metric=lambda scores, labels: math.nan)
    with pytest.raises(ValueError, match="none can be held out"):
        linear_probe(features(x[:3], torch.arange(3)), None, good, metric=accuracy)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1000.0])
def test_slopes_keep_their_precision_and_hold_no_subnormal_numbers(spread: float) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = spread * torch.randn(200, 12, generator=generator)
    target = torch.randint(12, (200,), generator=generator)
    one_hot = F.one_hot(target, 12).bool()
    wide = scores.double()

    losses, slopes = softmax_slopes(scores, target)
    expected = wide.softmax(dim=1).masked_fill(one_hot, 0.0)
    expected = torch.where(one_hot, -expected.sum(dim=1, keepdim=True), expected)
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-4, atol=1e-30)
    assert not bool(((slopes != 0) & (slopes.abs() < 1e-30)).any())
    reference = F.cross_entropy(wide, target, reduction="none")[:, None]
    torch.testing.assert_close(losses, reference, rtol=1e-4, atol=1e-12)

    losses, slopes = sigmoid_slopes(scores, one_hot)
    against = torch.where(one_hot, -wide, wide)
    expected = torch.where(one_hot, -against.sigmoid(), against.sigmoid())
    torch.testing.assert_close(slopes.double(), expected, rtol=1e-4, atol=1e-30)
    assert not bool(((slopes != 0) & (slopes.abs() < 1e-30)).any())
    torch.testing.assert_close(losses.double(), F.softplus(against), rtol=1e-4, atol=1e-30)
