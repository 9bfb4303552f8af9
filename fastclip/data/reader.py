"""One sample from its shard: bytes, caption, label, pixels."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.decode import BadSampleError, decode, open_image
from fastclip.data.index import Sample
from fastclip.data.transforms import centre_crop

logger = logging.getLogger("fastclip")

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")


class BadSamples:
    """Counts samples that could not be used, and names each once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._named: set[tuple[Path, str]] = set()
        self.counts: Counter[str] = Counter()
        self.seen = 0
        self.failed = 0

    def good(self) -> None:
        with self._lock:
            self.seen += 1

    def bad(self, sample: Sample, error: BadSampleError) -> None:
        """Count `sample`, and log it when it is the first time."""
        identity = (sample.shard, sample.key)
        with self._lock:
            self.seen += 1
            self.failed += 1
            first = identity not in self._named
            self._named.add(identity)
            if first:
                self.counts[error.kind] += 1
        if first:
            logger.warning("left out %s: %s: %s", sample.shard.name, sample.key, error)

    @property
    def total(self) -> int:
        """Different samples that could not be used."""
        return len(self._named)

    @property
    def fraction(self) -> float:
        """Unusable among all samples seen, each counted as often as it was drawn.

        (Different ones over draws would shrink with every epoch, whatever the damage.)
        """
        return self.failed / self.seen if self.seen else 0.0


class Members:
    """The members of one sample, read from its shard.

    Raises:
        BadSampleError: the shard cannot be read there any more, or the json is not an object.
    """

    def __init__(self, sample: Sample) -> None:
        try:
            descriptor = os.open(sample.shard, os.O_RDONLY)
            try:
                self.image, self._caption, self._metadata = (
                    _read(descriptor, place)
                    for place in (sample.image, sample.caption, sample.metadata)
                )
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSampleError("unreadable", f"{sample.shard}: {error.strerror}") from None

    def metadata(self) -> dict[str, Any]:
        """The json member; {} when there is none."""
        if not self._metadata:
            return {}
        try:
            value = json.loads(self._metadata)
        except (ValueError, RecursionError) as error:  # nested too deeply
            raise BadSampleError("broken metadata", f"not valid JSON: {error}") from None
        if not isinstance(value, dict):
            raise BadSampleError("broken metadata", "the json member is not an object")
        return value

    def captions(self, caption_key: str) -> list[str]:
        """The texts under `caption_key` ("txt" or "json:field"), at least one.

        Raises:
            BadSampleError: there is none, it is empty, or it is not UTF-8.
        """
        if caption_key == "txt":
            try:
                texts: Any = self._caption.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadSampleError("broken caption", f"not UTF-8: {error}") from None
        else:
            texts = self.metadata().get(caption_key.removeprefix("json:"))
        texts = [texts] if isinstance(texts, str) else texts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadSampleError("missing caption", f"no text under {caption_key}")
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise BadSampleError("missing caption", f"empty text under {caption_key}")
        return texts


def _read(descriptor: int, place: tuple[int, int]) -> bytes:
    offset, size = place
    if offset < 0:
        return b""
    content = os.pread(descriptor, size, offset)
    if len(content) < size:
        raise BadSampleError("unreadable", "the shard is shorter than it was when indexed")
    return content


def sentences(caption: str) -> list[str]:
    """A caption's sentences (ConVIRT samples one of them)."""
    return [part.strip() for part in _SENTENCE.split(caption) if part.strip()]


def caption_id(caption: str) -> int:
    """63 bits that equal captions share, whatever their case and spacing."""
    folded = " ".join(caption.lower().split())
    digest = hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def evaluation_pixels(content: bytes, size: int) -> NDArray[np.uint8]:
    """Centre square of an image, [size, size, 3]."""
    image = open_image(content)
    return decode(image, centre_crop(*image.size), size)
