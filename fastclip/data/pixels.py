"""Pixels of samples by their numbers, for what looks at single images and not at a stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import build_decoder
from fastclip.data.index import ShardIndex
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import Members
from fastclip.data.remote import stop_with
from fastclip.data.transforms import Box

_AT_A_TIME = 32
"""Images that a thread decodes for one call: long enough that handing them over costs nothing."""


def whole(width: int, height: int) -> Box:
    """All of an image: its aspect ratio is lost."""
    return (0.0, 0.0, float(width), float(height))


class PixelReader:
    """Decodes images of shards in a few threads.

    Args:
        workers: threads.
        apply_orientation: turn images as their EXIF data says.

    Attributes:
        bad: counts and names the images that cannot be decoded.
        settings: what the pixels depend on beside the images.
    """

    def __init__(self, *, workers: int, apply_orientation: bool = False) -> None:
        self.bad = Quarantine()
        self._decoder = build_decoder("auto", apply_orientation=apply_orientation)
        self._quick = build_decoder("auto", apply_orientation=apply_orientation, reduce_jpeg=True)
        self.settings = f"{self._decoder.name}, apply_orientation={apply_orientation}"
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(workers, "fastclip-pixels", stop_with, (self._stop,))

    def read(
        self,
        index: ShardIndex,
        numbers: Sequence[int],
        size: int,
        crop: Callable[[int, int], Box],
        *,
        quick: bool = False,
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The images of the samples `numbers`, in their order.

        Args:
            size: pixels of each side.
            crop: the box of an image of a width and height; see `fastclip.data.transforms`.
            quick: let large JPEGs be decoded at a fraction of their size; the pixels differ a
                little.

        Returns:
            RGB [len(numbers), size, size, 3], and which of them could be decoded; the others are
            black.
        """
        decoder = self._quick if quick else self._decoder
        pixels = np.zeros((len(numbers), size, size, 3), np.uint8)
        usable = np.zeros(len(numbers), np.bool_)

        def fill(first: int) -> None:
            for row in range(first, min(first + _AT_A_TIME, len(numbers))):
                sample = index[numbers[row]]
                try:
                    image = decoder.open(Members(sample).image)
                    decoder.decode(image, crop(*image.size), pixels[row])
                except BadSampleError as error:
                    self.bad.bad(sample, error)
                    pixels[row] = 0
                else:
                    usable[row] = True

        list(self._pool.map(fill, range(0, len(numbers), _AT_A_TIME)))
        return pixels, usable

    def close(self) -> None:
        """Stop the threads; who is interrupted need not wait for shards on other machines."""
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PixelReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
