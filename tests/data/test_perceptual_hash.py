"""The hash against its definition and on changed pictures; the search against comparing all."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from fastclip.data import perceptual_hash as module
from fastclip.data.index import index_shards
from fastclip.data.perceptual_hash import (
    HASH_BITS,
    LARGEST_RADIUS,
    HammingIndex,
    Hashes,
    hamming,
    hash_samples,
    perceptual_hash,
)
from fastclip.data.pixels import PixelReader
from pictures import COPIES, encoded, mirrored, scene
from shards import write_tar

SCENES = 60


def _pixels(content: bytes) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(content)).convert("RGB")
    return np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def hashes() -> Hashes:
    return perceptual_hash(np.stack([_pixels(encoded(scene(n))) for n in range(SCENES)]))


def test_bits_are_signs_of_low_frequencies() -> None:
    fft = pytest.importorskip("scipy.fft")
    pixels = _pixels(encoded(scene(3)))
    red, green, blue = np.moveaxis(pixels.astype(np.float64), 2, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    coefficients = fft.dctn(luma, norm="ortho")
    order = sorted(
        ((u, v) for u in range(16) for v in range(16)), key=lambda f: (f[0] ** 2 + f[1] ** 2, f)
    )
    expected = [coefficients[place] > 3 for place in order[1:97]]
    for colour in (0.564 * (blue - luma), 0.713 * (red - luma)):
        coefficients = fft.dctn(colour, norm="ortho")
        expected += [coefficients[place] > 3 for place in order[:16]]
    bits = np.unpackbits(perceptual_hash(pixels[None]).view(np.uint8))
    assert (bits != np.array(expected)).sum() <= 1  # one may lie at the edge of the dead zone


@pytest.mark.parametrize("change", COPIES)
def test_copies_are_near(hashes: Hashes, change: str) -> None:
    copies = [_pixels(COPIES[change](scene(number))) for number in range(SCENES)]
    distances = hamming(perceptual_hash(np.stack(copies)), hashes)
    assert (distances <= 20).mean() >= 0.95


def test_others_and_mirrored_ones_are_far(hashes: Hashes) -> None:
    between = hamming(hashes[:, None], hashes[None])[~np.eye(SCENES, dtype=bool)]
    assert between.min() > LARGEST_RADIUS
    assert 50 < between.mean() < 70  # half of the bits
    turned = np.stack([_pixels(mirrored(scene(number))) for number in range(SCENES)])
    assert hamming(perceptual_hash(turned), hashes).min() > LARGEST_RADIUS


def test_noise_does_not_reach_the_bits_of_a_plain_image() -> None:
    plain = np.full((1, 32, 32, 3), 200, np.uint8)
    noisy = plain + np.random.default_rng(0).integers(-1, 2, plain.shape).astype(np.uint8)
    assert hamming(perceptual_hash(plain), perceptual_hash(noisy))[0] <= 2


def _clustered(draws: np.random.Generator, count: int) -> Hashes:
    """Hashes that crowd around a few, as those of real images do, with many distances."""
    centres = draws.integers(0, 2, (7, HASH_BITS))
    flips = draws.random((count, HASH_BITS)) < draws.uniform(0, 0.25, (count, 1))
    bits = centres[draws.integers(0, 7, count)] ^ flips
    return np.packbits(bits.astype(np.uint8), axis=1).view(np.uint64)


@pytest.mark.parametrize("radius", [0, 1, 6, 7, 8, 13, 20, 31])
@pytest.mark.parametrize("pieces", [False, True])
def test_search_finds_what_comparing_all_finds(
    radius: int, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pieces:
        monkeypatch.setattr(module, "_QUERIES_AT_A_TIME", 100)
        monkeypatch.setattr(module, "_PAIRS_AT_A_TIME", 50)
    draws = np.random.default_rng(radius)
    stored, queries = _clustered(draws, 200), _clustered(draws, 230)
    queries[:20] = stored[:20]
    distances = hamming(queries[:, None], stored[None])
    rows, columns = np.nonzero(distances <= radius)
    found = HammingIndex(stored, radius).near(queries)
    np.testing.assert_array_equal(found[0], rows)
    np.testing.assert_array_equal(found[1], columns)
    np.testing.assert_array_equal(found[2], distances[rows, columns])
    assert len(rows) >= 20


def test_search_of_nothing_and_among_nothing() -> None:
    nothing = np.zeros((0, 2), np.uint64)
    some = np.ones((3, 2), np.uint64)
    for stored, queries in ((nothing, some), (some, nothing), (nothing, nothing)):
        assert [len(part) for part in HammingIndex(stored, 20).near(queries)] == [0, 0, 0]


@pytest.mark.parametrize("radius", [-1, LARGEST_RADIUS + 1])
def test_a_radius_that_is_none(radius: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 31 bits, not {radius}"):
        HammingIndex(np.zeros((1, 2), np.uint64), radius)


def test_samples_are_hashed_in_order_and_broken_ones_named(tmp_path: Path) -> None:
    files = [encoded(scene(number), "PNG") for number in range(70)]
    files[40] = b"no image"
    write_tar(tmp_path / "0.tar", [(f"{n:03d}", {"png": file}) for n, file in enumerate(files)])
    index = index_shards(str(tmp_path), needs=())
    with PixelReader(workers=3) as reader:
        hashes, usable = hash_samples(reader, index, range(5, 70))
        assert reader.bad.counts == {"broken image": 1}
    assert np.flatnonzero(~usable).tolist() == [35]
    good = [number for number in range(5, 70) if number != 40]
    expected = perceptual_hash(np.stack([_pixels(files[number]) for number in good]))
    np.testing.assert_array_equal(hashes[usable], expected)
    assert not hashes[35].any()
