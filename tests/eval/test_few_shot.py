"""Few-shot curves: the draws, their intervals, and the number that zero-shot is worth."""

from __future__ import annotations

import logging
import math

import pytest
import scipy.stats
import torch
from torch import Tensor

from fastclip.eval import few_shot as module
from fastclip.eval.features import Features
from fastclip.eval.few_shot import FewShotResult, equal_shots, few_shot
from fastclip.eval.intervals import t_interval
from fastclip.eval.linear_probe import search_fit, search_strength
from fastclip.eval.logistic_regression import LogisticRegression

CLASSES = 4


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(dim=1) == labels).double().mean())


def _features(count: int, seed: int, classes: int = CLASSES) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(1))
    x = centres[labels] + 1.2 * torch.randn(count, 6, generator=generator)
    keys = tuple(str(row) for row in range(count))
    return Features(torch.nn.functional.normalize(x, dim=1), x, labels, keys)


def _drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Features, Features | None]]:
    """What each probe is trained on, and what chooses its strength."""
    draws = []
    probe = module._probe

    def see(drawn: Features, judging: Features | None, *rest: object) -> tuple[float, list[float]]:
        draws.append((drawn, judging))
        return probe(drawn, judging, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "_probe", see)
    return draws


def test_draws_are_balanced_nested_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = _drawn(monkeypatch)
    train, test = _features(80, 2), _features(60, 3)

    def run(seed: int, shots: tuple[int, ...] = (1, 2, 8)) -> dict[int, FewShotResult]:
        return few_shot(
            train, test, shots=shots, repeats=3, seed=seed, metric=accuracy, strength=1.0
        )

    first = run(0)
    for number, (drawn, judging) in enumerate(draws):
        k = (1, 2, 8)[number // 3]
        assert torch.bincount(drawn.labels).tolist() == [k] * CLASSES
        assert judging is not None
        assert torch.bincount(judging.labels).tolist() == [min(k, 4)] * CLASSES
        assert not set(drawn.keys) & set(judging.keys)
        if k > 1:
            assert set(draws[number - 3][0].keys) < set(drawn.keys)
    assert len({drawn.keys for drawn, _ in draws[:3]}) == 3
    assert run(0) == first
    assert run(0, (8, 2)) == {2: first[2], 8: first[8]}  # other shots draw nothing anew
    before = len(draws)
    run(1)
    assert draws[before][0].keys != draws[0][0].keys
    assert all(result.short_classes == 0 for result in first.values())


def test_values_are_those_of_probes_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = _drawn(monkeypatch)
    test = _features(60, 3)
    result = few_shot(_features(80, 2), test, shots=(4,), repeats=2, metric=accuracy)[4]
    values = []
    for drawn, judging in draws:
        assert judging is not None
        regression = LogisticRegression(drawn.representation, drawn.labels, CLASSES)
        strength, _, _ = search_strength(search_fit(regression), judging, accuracy)
        scores = regression.fit(strength).scores(test.representation)
        values.append(accuracy(scores, test.labels))
    assert result.values == tuple(values)
    assert result.mean == pytest.approx(sum(values) / 2)


def test_small_classes_give_all_they_have(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draws = _drawn(monkeypatch)
    whole = _features(80, 2)
    rows = torch.cat([(whole.labels == c).nonzero()[:n, 0] for c, n in enumerate((2, 3, 8, 9))])
    train = whole.rows(rows)
    with caplog.at_level(logging.WARNING, "fastclip"):
        results = few_shot(train, _features(60, 3), shots=(3, 16), repeats=2, metric=accuracy)
    assert torch.bincount(draws[0][0].labels).tolist() == [2, 3, 3, 3]
    judging = draws[0][1]
    assert judging is not None
    assert torch.bincount(judging.labels, minlength=4).tolist() == [0, 0, 3, 3]
    assert (results[3].short_classes, results[16].short_classes) == (1, 4)
    assert [(set(drawn.keys), judged) for drawn, judged in draws[2:]] == [
        (set(train.keys), None)
    ] * 2
    assert results[16].low <= results[16].mean <= results[16].high
    told = [record.message for record in caplog.records if "training images" in record.message]
    assert told == [
        "1 class(es) have fewer than 3 training images; all of theirs are used",
        "4 class(es) have fewer than 16 training images; all of theirs are used",
    ]


def test_a_given_strength_needs_no_other_image() -> None:
    whole = _features(40, 2)
    train = whole.rows(torch.cat([(whole.labels == c).nonzero()[:1, 0] for c in range(CLASSES)]))
    test = _features(60, 3)
    result = few_shot(train, test, shots=(1,), repeats=2, metric=accuracy, strength=1.0)[1]
    fit = LogisticRegression(train.representation, train.labels, CLASSES).fit(1.0)
    assert result.values == (accuracy(fit.scores(test.representation), test.labels),) * 2
    assert result.low == result.mean == result.high
    with pytest.raises(ValueError, match="or to few_shot a strength"):
        few_shot(train, test, shots=(1,), repeats=2, metric=accuracy)


def test_intervals_are_those_of_scipy() -> None:
    values = [0.2, 0.5, 0.35, 0.41, 0.3]
    expected = scipy.stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=scipy.stats.sem(values))
    assert t_interval(values) == pytest.approx(expected)


def _curve(means: dict[int, float]) -> dict[int, FewShotResult]:
    return {k: FewShotResult(mean, mean, mean, (mean,), 0) for k, mean in means.items()}


def test_equal_shots() -> None:
    curve = _curve({1: 0.2, 4: 0.4, 16: 0.8})
    assert equal_shots(0.3, curve) == pytest.approx(2.0)  # half-way between 1 and 4
    assert equal_shots(0.5, curve) == pytest.approx(4 * 4**0.25)
    assert equal_shots(0.2, curve) == 1.0
    assert equal_shots(0.8, curve) == pytest.approx(16.0)
    assert equal_shots(0.1, curve) is None
    assert equal_shots(0.81, curve) is None
    assert equal_shots(0.81, {}) is None
    dips = _curve({1: 0.2, 2: 0.6, 4: 0.4, 8: 0.7})
    assert equal_shots(0.5, dips) == pytest.approx(math.exp(0.75 * math.log(2)))  # the first time


def test_bad_input() -> None:
    train, test = _features(40, 2), _features(20, 3)
    for shots, repeats in (((), 2), ((0, 1), 2), ((1,), 1)):
        with pytest.raises(ValueError, match="shots are 1 or more and repeats 2 or more"):
            few_shot(train, test, shots=shots, repeats=repeats, metric=accuracy)
    several = Features(
        train.embedding, train.representation, torch.ones(40, 2, dtype=torch.bool), train.keys
    )
    with pytest.raises(ValueError, match="images of one class each"):
        few_shot(several, several, metric=accuracy)
