"""Rows of a batch decoded by DALI, beside those that the CPU has decoded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastclip.data.dali import DaliDecoder, takes
from fastclip.data.decoders import Encoded
from fastclip.data.transforms import Box

logger = logging.getLogger("fastclip")


class DaliRows:
    """Decodes a loader's images by DALI: on `device` if that is a GPU. For any number of threads.

    Each thread has a decoder of its own and, on a GPU, a stream of its own, so that the work runs
    beside the training step's.

    Raises:
        ImportError: DALI is not installed.
    """

    def __init__(
        self, size: int, batch_size: int, device: torch.device, apply_orientation: bool
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.device = device
        self.apply_orientation = apply_orientation
        self._own = threading.local()
        self._lock = threading.Lock()
        self._decoders: list[DaliDecoder] = []
        if device.type == "cpu":
            logger.warning("data.decoder=dali on a CPU is slower than native: it is for a GPU")
        self._make(1).close()  # what is missing is missed now

    def takes(self, image: Encoded) -> bool:
        """Whether DALI gives this image the pixels that the contract asks for."""
        return takes(image.content, apply_orientation=self.apply_orientation)

    def fill(
        self, images: NDArray[np.uint8], rows: Mapping[int, tuple[Encoded, Box]]
    ) -> tuple[Tensor, torch.cuda.Event | None, dict[int, str]]:
        """A batch of which some rows are still to be decoded.

        Args:
            images: uint8 [B, size, size, 3], the other rows filled.
            rows: the images of the rest, by number of their row.

        Returns:
            uint8 [B, size, size, 3] on the device; on a GPU the event after which it is ready; the
            rows that DALI could not decode, with the reasons.
        """
        if not rows:
            return torch.from_numpy(images), None, {}
        contents = [image.content for image, _ in rows.values()]
        boxes = [box for _, box in rows.values()]
        numbers = list(rows)
        if self.device.type == "cpu":
            pixels, failed = self._decoder().decode(contents, boxes)
            images[numbers] = pixels.permute(0, 2, 3, 1).numpy()
            return torch.from_numpy(images), None, {numbers[n]: why for n, why in failed.items()}
        decoder = self._decoder()
        with torch.cuda.stream(self._own.stream):
            pixels, failed = decoder.decode(contents, boxes)
            batch = pixels.permute(0, 2, 3, 1)
            if len(numbers) < len(images):
                whole = batch.new_empty(images.shape)
                whole[torch.tensor(numbers, device=self.device)] = batch
                others = [row for row in range(len(images)) if row not in rows]
                self._put(whole, images, others)
                batch = whole
            ready = torch.cuda.Event()
            ready.record()
        return batch, ready, {numbers[n]: why for n, why in failed.items()}

    def replace(
        self, batch: Tensor, images: NDArray[np.uint8], rows: list[int]
    ) -> torch.cuda.Event | None:
        """Take rows of a batch that `fill` has given from `images` after all."""
        if batch.device.type == "cpu":
            batch[rows] = torch.from_numpy(images[rows])
            return None
        with torch.cuda.stream(self._own.stream):
            self._put(batch, images, rows)
            ready = torch.cuda.Event()
            ready.record()
        return ready

    def _put(self, batch: Tensor, images: NDArray[np.uint8], rows: list[int]) -> None:
        """Copy these rows of host memory into a batch on the device."""
        own = torch.from_numpy(images[rows]).to(self.device)
        batch[torch.tensor(rows, device=self.device)] = own

    def close(self) -> None:
        """Stop DALI's threads and free its memory."""
        with self._lock:
            for decoder in self._decoders:
                decoder.close()
            self._decoders.clear()

    def _decoder(self) -> DaliDecoder:
        own = self._own
        if not hasattr(own, "decoder"):
            own.decoder = self._make(self.batch_size)
            own.stream = None if self.device.type == "cpu" else torch.cuda.Stream(self.device)
            with self._lock:
                self._decoders.append(own.decoder)
        return own.decoder

    def _make(self, batch_size: int) -> DaliDecoder:
        gpu = self.device.type == "cuda"
        return DaliDecoder(
            self.size,
            batch_size=batch_size,
            device="mixed" if gpu else "cpu",
            device_id=self.device.index if gpu else None,
        )
