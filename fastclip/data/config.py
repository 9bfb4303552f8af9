"""What is trained on, and how a pair is drawn from a sample."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal, get_args

from fastclip.data.decode import MAX_PIXELS, check_max_pixels
from fastclip.data.reader import check_caption_key
from fastclip.data.remote import configure

Decoder = Literal["auto", "native", "pillow", "dali"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and how a pair is drawn from a sample."""

    train: str
    """Shards: a folder, a glob, ``{00000..00042}.tar``, several joined by ``::``; here, or an
    address that fsspec knows: ``s3://bucket/folder``, ``https://host/{00000..00042}.tar``, …"""

    weights: tuple[int, ...] = ()
    """Of the sources that ``::`` joins, whole numbers: of so many pairs as they add up to, so many
    come from each. A source that runs out begins anew. Without: all shards are one set."""

    workers: int | Literal["auto"] = "auto"
    """Threads on each rank that read and decode, a few rows of a batch at a time. auto: the cores
    that this process may use, shared among the ranks of the machine, less one; 16 at most. (Where a
    launcher binds each rank to cores of its own, say how many.)"""

    prefetch_batches: int = 4
    """Batches prepared ahead."""

    cache_dir: str = ""
    """Where copies of shards on other machines are kept, on a disk of this one; all ranks share it.
    Without: ``fastclip/shards`` in XDG_CACHE_HOME or ~/.cache."""

    cache_gigabytes: float = 100.0
    """Those used longest ago are removed rather than that the copies take more than this, or more
    than the disk has. Less than the shards of 32768 samples makes some be fetched twice."""

    remote_retries: int = 5
    """Attempts after the first one to fetch a shard, after pauses of about 1, 2, 4, … s. After the
    last its samples count as bad for a minute."""

    remote_timeout_seconds: float = 60.0
    """An attempt fails when nothing has come for so long."""

    decoder: Decoder = "auto"
    """native: JPEG by libjpeg-turbo and our resize, the rest by Pillow; pillow: all by Pillow, the
    same pixels; dali: JPEG, PNG and WebP by NVIDIA's DALI on the GPU; auto: native where built."""

    reduce_jpeg: bool = False
    """Let native decode a JPEG of at least four times the pixels needed to half its size (or a
    quarter, …): faster for large photographs, and not quite the same pixels."""

    crop_scale: tuple[float, float] = (1.0, 1.0)
    """Range of a crop's area over the largest square's; (1, 1) is the paper's random crop."""

    caption_key: str = "txt"
    """Where the caption is: the txt member, or ``json:field`` (a text or a list of texts)."""

    sample_caption: bool = False
    """Of several captions in a list take a random one each time, not the first."""

    sample_sentence: bool = False
    """Take one random sentence of the caption (ConVIRT's augmentation, dropped by CLIP)."""

    positives: Literal["none", "caption", "label"] = "none"
    """Further positives of a pair: none, pairs with the same caption, or the same json label_id."""

    tokenizer: Literal["native", "python"] = "native"
    """The compiled tokenizer, or the Python one: the same ids, about 100 times slower."""

    text: Literal["packed", "trimmed", "padded"] = "packed"
    """Captions without padding, padded to the batch's longest one, or to the context length. All
    give the same features and gradients; packed computes least."""

    pack_to_multiple: int = 1
    """Fill up the tokens of packed captions to a multiple of this; run.cuda_graphs wants few
    numbers of them."""

    apply_orientation: bool = False
    """Turn images as their EXIF data says; open_clip and most others do not. (Turned ones have
    Pillow's pixels to within 3 of 255.)"""

    max_pixels: int = MAX_PIXELS
    """Larger images count as bad samples."""

    max_bad_fraction: float = 0.1
    """Stop with an error when more than this share of the samples seen cannot be used."""

    def threads(self, ranks_here: int = 1) -> int:
        """The number of workers.

        Args:
            ranks_here: ranks that share this machine's cores.
        """
        if self.workers != "auto":
            return self.workers
        # Beyond 16, what is left of Python holds them up.
        return min(max(len(os.sched_getaffinity(0)) // ranks_here - 1, 1), 16)

    def configure_remote(self) -> None:
        """Let this process fetch and keep remote shards as these settings say."""
        configure(
            self.cache_dir,
            self.cache_gigabytes,
            self.remote_retries,
            self.remote_timeout_seconds,
        )

    def __post_init__(self) -> None:
        if isinstance(self.workers, str) and self.workers != "auto":
            raise ValueError(f"data.workers is a number or auto, not {self.workers!r}")
        for name in ("prefetch_batches", "max_pixels", "pack_to_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is at least 1, not {getattr(self, name)}")
        if self.workers != "auto" and self.workers < 1:
            raise ValueError(f"data.workers is at least 1, not {self.workers}")
        check_max_pixels(self.max_pixels)
        for name in ("cache_gigabytes", "remote_timeout_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"data.{name} is more than 0, not {getattr(self, name)}")
        if self.remote_retries < 0:
            raise ValueError(f"data.remote_retries is at least 0, not {self.remote_retries}")
        if self.decoder not in get_args(Decoder):
            raise ValueError(
                f"data.decoder is {', '.join(get_args(Decoder))}, not {self.decoder!r}"
            )
        if self.reduce_jpeg and self.decoder not in ("auto", "native"):
            raise ValueError(f"data.reduce_jpeg is for data.decoder=native, not {self.decoder}")
        sources = len(self.train.split("::"))
        if self.weights and (len(self.weights) != sources or min(self.weights) < 1):
            raise ValueError(
                f"data.weights has a whole number from 1 on for each of the {sources} source(s) "
                f"in data.train, not {self.weights}"
            )
        low, high = self.crop_scale
        if not 1e-4 <= low <= high <= 1:
            raise ValueError(f"data.crop_scale is a range in [0.0001, 1], not {self.crop_scale}")
        check_caption_key(self.caption_key, "data.caption_key")
        if self.text not in ("packed", "trimmed", "padded"):
            raise ValueError(f"data.text is packed, trimmed or padded, not {self.text!r}")
        if self.text != "packed" and self.pack_to_multiple > 1:
            raise ValueError(
                f"data.pack_to_multiple={self.pack_to_multiple} is for data.text=packed, not "
                f"{self.text}"
            )
        if self.positives not in ("none", "caption", "label"):
            raise ValueError(f"data.positives is none, caption or label, not {self.positives!r}")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"data.max_bad_fraction is in [0, 1], not {self.max_bad_fraction}")
