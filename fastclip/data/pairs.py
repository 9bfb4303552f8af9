"""One pair of a training batch: a sample's crop and caption, or another's in its place.

What is drawn depends on (seed, epoch, sample) alone, never on threads or timing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.config import DataConfig
from fastclip.data.dali_rows import DaliRows
from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import Encoded, ImageDecoder, build_decoder
from fastclip.data.index import Sample, ShardIndex
from fastclip.data.plan import Mixture, Plan, mix
from fastclip.data.quarantine import Quarantine
from fastclip.data.reader import Members, caption_id, sentences
from fastclip.data.transforms import Box, random_crop

_MOST_REPLACEMENTS = 100
_FEWEST_SEEN = 200  # before that, a fraction of bad samples says little


@dataclass(frozen=True)
class Pair:
    """What is left of a sample when its image is decoded."""

    key: str
    image: Encoded
    box: Box
    caption: str
    identity: int
    """Equal numbers are positives of each other."""
    metadata: dict[str, Any]
    decoded: bool = True
    """False where DALI is to decode the image."""


def host_decoder(config: DataConfig) -> ImageDecoder:
    """What decodes on the CPU: as set, and what DALI leaves.

    Raises:
        ImportError: see `build_decoder`.
    """
    return build_decoder(
        "auto" if config.decoder == "dali" else config.decoder,
        max_pixels=config.max_pixels,
        apply_orientation=config.apply_orientation,
        reduce_jpeg=config.reduce_jpeg,
    )


class PairMaker:
    """Callable that makes the pair of a place in the plan, for any number of threads."""

    def __init__(
        self,
        config: DataConfig,
        index: ShardIndex,
        plan: Plan | Mixture,
        decoder: ImageDecoder,
        dali: DaliRows | None,
        quarantine: Quarantine,
        seed: int,
    ) -> None:
        self.config = config
        self.index = index
        self._plan = plan
        self._quarantine = quarantine
        self._dali = dali
        self.seed = seed
        self._decoder = decoder

    def __call__(
        self, epoch: int, number: int, pixels: NDArray[np.uint8], defer: bool = False
    ) -> tuple[Pair, bool]:
        """The sample, or, where it cannot be used (and then True), another one that the same
        numbers choose.

        Args:
            epoch, number: from the plan.
            pixels: uint8 [size, size, 3] for the image.
            defer: leave an image to DALI that is DALI's.

        Raises:
            ValueError: too many samples cannot be used.
        """
        candidate = number
        for attempt in range(1, _MOST_REPLACEMENTS + 1):
            sample = self.index.stub(candidate)
            try:
                sample = self._sample(candidate)
                pair = self._pair(sample.key, Members(sample), epoch, candidate)
                if defer and self._dali is not None and self._dali.takes(pair.image):
                    pair = dataclasses.replace(pair, decoded=False)
                else:
                    self._decoder.decode(pair.image, pair.box, pixels)
            except BadSampleError as error:
                self._quarantine.bad(sample, error)
                self._check_fraction()
                first, count = self._plan.alike(number)
                candidate = first + mix(self.seed, epoch, number, 5, attempt) % count
                continue
            if pair.decoded:  # otherwise it is counted when DALI has decoded it, or not
                self._quarantine.good()
            return pair, attempt > 1
        raise ValueError(
            f"{_MOST_REPLACEMENTS} samples in a row cannot be used "
            f"({dict(self._quarantine.counts)}); see the messages above"
        )

    def _sample(self, number: int) -> Sample:
        try:
            return self.index[number]
        except OSError as error:  # its shard has vanished, and the index beside it
            raise BadSampleError("unreadable", str(error)) from None

    def _pair(self, key: str, members: Members, epoch: int, number: int) -> Pair:
        config = self.config
        texts = members.captions(config.caption_key)
        caption = texts[0]
        if config.sample_caption:
            caption = texts[mix(self.seed, epoch, number, 6) % len(texts)]
        if config.sample_sentence:
            parts = sentences(caption)
            caption = parts[mix(self.seed, epoch, number, 7) % len(parts)]
        metadata, identity = {}, 0
        if config.positives == "caption":
            identity = caption_id(caption)
        elif config.positives == "label":
            metadata = members.metadata()
            identity = metadata.get("label_id")
            if type(identity) is not int or not -(2**63) <= identity < 2**63:
                raise ValueError(
                    f"sample {key} has no whole number of 64 bits as label_id in its json, which "
                    "data.positives=label needs; use data.positives=caption or none"
                )
        image = self._decoder.open(members.image)
        box = random_crop(*image.size, config.crop_scale, self.seed, epoch, number)
        return Pair(key, image, box, caption, identity, metadata)

    def _check_fraction(self) -> None:
        bad = self._quarantine
        if bad.seen >= _FEWEST_SEEN and bad.fraction > self.config.max_bad_fraction:
            raise ValueError(
                f"{bad.failed} of {bad.seen} samples drawn cannot be used ({dict(bad.counts)}), "
                f"more than data.max_bad_fraction={self.config.max_bad_fraction}"
            )
