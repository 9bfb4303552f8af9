"""Images of an evaluation that were trained on (arXiv 2103.00020, section 5 and appendix C).

Near-duplicates are found in two stages. A perceptual hash of every training image is compared with
those of the evaluation's, exactly; what is near is a candidate. Two numbers then decide: the cosine
of the images' embeddings, and the correlation of their pixels.

The paper has an embedding that was trained for the purpose, to tell an image from all others, and a
threshold chosen for each data set by looking at the pairs found, so that nearly all are right. A
CLIP model's features are near for two pictures of one thing, the nearer the better it knows the
thing: alone they would take lookalikes for copies, and of the images that the model classifies
right more than of the others. Hence the correlation. The thresholds are to be confirmed by eye, and
every candidate is reported with all its numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.data.hash_cache import HashCache
from fastclip.data.index import ShardIndex
from fastclip.data.perceptual_hash import HammingIndex
from fastclip.data.pixels import PixelReader, whole
from fastclip.data.transforms import centre_crop
from fastclip.eval.correlation import SIDE, aligned_correlation
from fastclip.eval.intervals import binomial_p_value, clopper_pearson

INTERVAL_CONFIDENCE = 0.995
"""The paper's."""

SIGNIFICANT = 0.05
"""Divided by the number of tests (Bonferroni)."""

_PAIRS_AT_A_TIME = 64
"""Candidates whose images are decoded, embedded and compared together."""

Embed = Callable[[Tensor], Tensor]
"""Images, uint8 [B, 3, R, R], to unit-length features [B, D] on the CPU."""


@dataclass(frozen=True, kw_only=True)
class DuplicateSearch:
    """What counts as the same image."""

    radius: int = 20
    """Bits of 128 in which the hashes of candidates may differ. At 20, 96 % of photographs with
    5 % of each side cut off are candidates, and all that were encoded or resized again."""

    correlation: float = 0.97
    """Least correlation of two images' pixels; see `aligned_correlation`. All copies that
    were encoded or resized again reach 0.97, nine in ten of those with 5 % of each side cut off,
    four in five of those brightened by 30 %, and few that were turned by 3 degrees."""

    cosine: float = -1.0
    """Least cosine of their embeddings; -1 reports it, and leaves the decision to the pixels. What
    copies reach depends on the model: one trained on drawings over white may see a darkened copy
    as something else."""

    candidates: int = 16
    """Compared for each test image: those with the nearest hashes."""

    def __post_init__(self) -> None:
        for name, value in (("cosine", self.cosine), ("correlation", self.correlation)):
            if not -1 <= value <= 1:
                raise ValueError(f"a {name} is from -1 to 1, not {value}")
        if self.candidates < 1:
            raise ValueError(f"candidates is at least 1, not {self.candidates}")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A test image and the training image nearest to it: of those with a near hash, the duplicate
    (or where there is none, the other) with the greatest correlation."""

    test: int
    """Number of the sample in the test index."""

    train: int
    """Number of the sample in the training index."""

    hamming: int
    cosine: float
    correlation: float
    duplicate: bool
    """Whether cosine and correlation reach the thresholds."""


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """What was found for one set of test images."""

    pairs: list[Pair]
    """One for each test image that has a candidate, in the order of the test images."""

    train_images: int
    """Hashed."""

    test_images: int
    """Hashed."""

    unreadable: int
    """Training and test images that could not be decoded, and are left out."""

    beyond: int
    """Candidates that were not compared, as others' hashes were nearer."""


def find_duplicates(
    train: ShardIndex,
    test: ShardIndex,
    embed: Embed,
    *,
    search: DuplicateSearch,
    reader: PixelReader,
    cache: HashCache,
    image_size: int,
) -> Duplicates:
    """Look for each test image among the training images.

    Memory: the test images' hashes with their index (48 bytes an image) and some megabytes of the
    training images' hashes, which are read from `cache` in turn; no pixels but a batch's.

    Args:
        train, test: from `index_shards`; one list may be both, then an image is its own duplicate.
        embed: gives the features that are compared.
        reader: decodes the candidates.
        cache: where the hashes are kept.
        image_size: pixels, as `embed` takes them: the centre square.

    Raises:
        OSError, ValueError: see `HashCache.blocks`.
    """
    test_numbers, test_hashes = cache.all(test)
    stored = HammingIndex(test_hashes, search.radius)
    found = np.zeros((3, 0), np.int64)  # test row, training number, distance
    seen = beyond = 0
    for numbers, hashes in cache.blocks(train):
        seen += len(numbers)
        rows, tests, distances = stored.near(hashes)
        found = np.concatenate([found, np.stack([tests, numbers[rows], distances])], axis=1)
        found, dropped = _nearest(found, search.candidates)
        beyond += dropped
    found[0] = test_numbers[found[0]]
    best: dict[int, Pair] = {}
    for first in range(0, found.shape[1], _PAIRS_AT_A_TIME):
        part = found[:, first : first + _PAIRS_AT_A_TIME]
        for pair in _compare(part, train, test, embed, search, reader, image_size):
            known = best.get(pair.test)
            if known is None or _rank(pair) > _rank(known):
                best[pair.test] = pair
    return Duplicates(
        pairs=[best[number] for number in sorted(best)],
        train_images=seen,
        test_images=len(test_numbers),
        unreadable=len(train) + len(test) - seen - len(test_numbers),
        beyond=beyond,
    )


def _rank(pair: Pair) -> tuple[bool, float]:
    return pair.duplicate, pair.correlation


def _nearest(found: NDArray[np.int64], candidates: int) -> tuple[NDArray[np.int64], int]:
    """Each test image's candidates with the least distances, and how many others there were."""
    found = found[:, np.lexsort((found[1], found[2], found[0]))]
    starts = np.searchsorted(found[0], found[0], "left")
    kept = np.arange(found.shape[1]) - starts < candidates
    return found[:, kept], int((~kept).sum())


def _compare(
    found: NDArray[np.int64],
    train: ShardIndex,
    test: ShardIndex,
    embed: Embed,
    search: DuplicateSearch,
    reader: PixelReader,
    image_size: int,
) -> Iterator[Pair]:
    """What the pixels of some candidates (test number, training number, distance) say."""
    features, pixels, rows = [], [], []
    for index, numbers in ((test, found[0]), (train, found[1])):
        some, places = np.unique(numbers, return_inverse=True)
        squares, _ = reader.read(index, some.tolist(), image_size, centre_crop)
        wholes, _ = reader.read(index, some.tolist(), SIDE, whole)
        features.append(embed(torch.from_numpy(squares).permute(0, 3, 1, 2))[places])
        pixels.append(torch.from_numpy(wholes).permute(0, 3, 1, 2))
        rows.append(torch.from_numpy(places))
    cosines = (features[0] * features[1]).sum(dim=1).tolist()
    correlations = aligned_correlation(pixels[0], pixels[1], torch.stack(rows)).tolist()
    for (number, other, distance), cosine, correlation in zip(
        found.T.tolist(), cosines, correlations, strict=True
    ):
        yield Pair(
            test=number,
            train=other,
            hamming=distance,
            cosine=cosine,
            correlation=correlation,
            duplicate=cosine >= search.cosine and correlation >= search.correlation,
        )


@dataclass(frozen=True, kw_only=True)
class OverlapAnalysis:
    """What the overlap of one task with the training data did to its accuracy (section 5)."""

    task: str
    images: int
    overlapping: int
    accuracy_all: float
    accuracy_clean: float | None
    """Of the images without a duplicate; None if each has one."""

    accuracy_overlap: float | None
    """Of the others; None if there are none."""

    interval: tuple[float, float] | None
    """Clopper and Pearson's 99.5 % interval of `accuracy_overlap`."""

    p_value: float | None
    """Of the overlapping images being classified at least as well if their accuracy were that of
    the clean ones: one-tailed binomial test. None where one of the two sets is empty."""

    @property
    def overlap(self) -> float:
        """Fraction of the images that have a duplicate."""
        return self.overlapping / self.images

    @property
    def all_minus_clean(self) -> float | None:
        """By how much the overlap raises the accuracy that is reported: the paper's main number."""
        return None if self.accuracy_clean is None else self.accuracy_all - self.accuracy_clean

    @property
    def difference(self) -> tuple[float, float, float] | None:
        """Accuracy on overlapping minus that on clean images, with its interval's ends."""
        if self.accuracy_clean is None or self.accuracy_overlap is None or self.interval is None:
            return None
        clean = self.accuracy_clean
        return self.accuracy_overlap - clean, self.interval[0] - clean, self.interval[1] - clean


def analyse_overlap(
    task: str, correct: NDArray[np.bool_], overlaps: NDArray[np.bool_]
) -> OverlapAnalysis:
    """Compare a task's accuracies.

    Args:
        task: its name.
        correct: [images] whether each was classified right.
        overlaps: [images] whether each has a duplicate among the training images.

    Raises:
        ImportError: scipy is not installed.
        ValueError: there is no image.
    """
    images, overlapping = len(correct), int(overlaps.sum())
    if not images or len(overlaps) != images:
        raise ValueError(f"task {task}: {images} results of {len(overlaps)} images")
    right, right_overlapping = int(correct.sum()), int(correct[overlaps].sum())
    clean = (right - right_overlapping) / (images - overlapping) if overlapping < images else None
    interval = p_value = None
    if overlapping:
        interval = clopper_pearson(right_overlapping, overlapping, confidence=INTERVAL_CONFIDENCE)
        if clean is not None:
            p_value = binomial_p_value(right_overlapping, overlapping, clean)
    return OverlapAnalysis(
        task=task,
        images=images,
        overlapping=overlapping,
        accuracy_all=right / images,
        accuracy_clean=clean,
        accuracy_overlap=right_overlapping / overlapping if overlapping else None,
        interval=interval,
        p_value=p_value,
    )


def significance_level(analyses: Sequence[OverlapAnalysis]) -> float:
    """Below which a p-value is significant: `SIGNIFICANT` over the number of tests made."""
    return SIGNIFICANT / max(1, sum(analysis.p_value is not None for analysis in analyses))
