"""A linear probe with its search beside scikit-learn's: ``python -m benchmarks.bench_probe``.

Features are drawn as models give them: some directions vary a hundred times as much as others,
about a mean that is larger still. Both providers split, search and train again alike; scikit-learn
begins every fit at zero and ends it by its own default tolerance, as the paper's protocol has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Provider, finish, main
from benchmarks.plan import Variant, Work
from fastclip.eval.features import Features
from fastclip.eval.linear_probe import linear_probe, search_strength, split
from fastclip.eval.logistic_regression import Classifier


@dataclass(frozen=True)
class ProbeCase:
    """A data set's training images; a fifth as many are tested on."""

    images: int

    width: int

    classes: int

    @property
    def unit(self) -> int:
        """FLOP of the scores of all training images."""
        return 2 * self.images * self.width * self.classes

    def __str__(self) -> str:
        return f"{self.images}×{self.width}, {self.classes} classes"


class Operands(NamedTuple):
    """One data set."""

    train: Features
    test: Features


class Outcome(NamedTuple):
    """What a probe finds."""

    value: float
    strength: float


Call = Callable[[Operands], Outcome]


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of images whose own class scores best."""
    return float((scores.argmax(dim=1) == labels).double().mean())


def fastclip(case: ProbeCase) -> Call:
    """This project's probe."""

    def call(operands: Operands) -> Outcome:
        result = linear_probe(operands.train, None, operands.test, metric=accuracy)
        return Outcome(result.value, result.strength)

    return call


def scikit_learn(case: ProbeCase) -> Call:
    """The same search over scikit-learn's L-BFGS."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    def classifier(train: Features, strength: float) -> Classifier:
        model = LogisticRegression(C=1 / strength, max_iter=1000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(train.representation.cpu().numpy(), train.labels.cpu().numpy())
        weight, bias = torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_)
        iterations = int(model.n_iter_[0])
        return Classifier(weight.double(), bias.double(), True, iterations, iterations < 1000)

    def call(operands: Operands) -> Outcome:
        fitting, judging = split(operands.train, seed=0)
        strength, _, _ = search_strength(
            lambda strength, _: classifier(fitting, strength), judging, accuracy
        )
        scores = classifier(operands.train, strength).scores(operands.test.representation)
        return Outcome(accuracy(scores, operands.test.labels), strength)

    return call


def make_operands(case: ProbeCase, device: torch.device) -> Operands:
    """Classes as clouds of different overlap, in directions of very different length."""
    generator = torch.Generator().manual_seed(0)
    count = case.images + case.images // 5
    labels = torch.randint(case.classes, (count,), generator=generator)
    centres = torch.randn(case.classes, case.width, generator=generator)
    noise = torch.randn(count, case.width, generator=generator)
    lengths = torch.arange(1, case.width + 1).float().pow(-0.7)
    axes, _ = torch.linalg.qr(torch.randn(case.width, case.width, generator=generator))
    mean = torch.randn(case.width, generator=generator)
    x = ((0.2 * centres[labels] + noise) * lengths) @ axes + mean

    def part(begin: int, end: int) -> Features:
        rows = x[begin:end]
        embedding = torch.nn.functional.normalize(rows, dim=1)
        keys = tuple(str(row) for row in range(begin, end))
        return Features(embedding, rows, labels[begin:end], keys).to(device)

    return Operands(part(0, case.images), part(case.images, count))


def outcome(expected: Tensor, result: Outcome) -> Mapping[str, float | None]:
    """What was found: not errors, but the cells that show that both do the same."""
    return {"accuracy": result.value, "strength": result.strength}


def gradient_work(case: ProbeCase) -> Work:
    """One gradient: features read twice, scores written and read once."""
    features, scores = case.images * case.width, case.images * case.classes
    return Work(2.0, 4 * (2 * features + 2 * scores), 2, 4 * scores)


PROVIDERS = (
    Provider("fastclip", fastclip, module="fastclip.eval.linear_probe", needs_cuda=False),
    Provider(
        "scikit-learn", scikit_learn, "sklearn", "scikit-learn", "scikit-learn", needs_cuda=False
    ),
)
SETS = {
    "tiny": (ProbeCase(300, 24, 5),),
    "small": (ProbeCase(10_000, 512, 100),),
}
SETS["all"] = SETS["small"]

BENCHMARK = Benchmark(
    name="probe",
    case_type=ProbeCase,
    providers=PROVIDERS,
    sets=SETS,
    variants=(Variant("one gradient", gradient_work),),
    operands=make_operands,
    expected=lambda case, operands: operands.test.labels,
    errors=outcome,
    error_columns=("accuracy", "strength"),
    counted_units=lambda case: 2,
)

if __name__ == "__main__":
    finish(main(BENCHMARK))
