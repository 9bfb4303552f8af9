"""Batches of images decoded and resized by NVIDIA DALI, on the CPU or with the GPU's JPEG decoder.

The sole importer of nvidia.dali. The pixels are those of `fastclip.data.decode` within rounding:
what DALI reads otherwise than Pillow (transparency, 16 bits, CMYK, animations) `takes` refuses.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastclip.data.transforms import Box

DaliDevice = Literal["cpu", "mixed"]

_REFUSED = "not a JPEG, PNG or WebP that DALI decodes as Pillow does"
_CUBIC_SUPPORT = 2.0
"""Source pixels on either side that a bicubic value depends on, when nothing is scaled down."""

_GEOMETRY = ("starts", "ends", "sizes", "later_starts", "later_ends")
"""The region and the output of the first resize, the region of the second."""

_EXIF_OR_XMP = 0xE1
_JPEG_SKIPPED = frozenset((*range(0xE0, 0xF0), 0xC4, 0xDB, 0xDD, 0xFE))
"""JPEG's segments of applications' data, tables and comments."""


def takes(content: bytes, *, apply_orientation: bool = False) -> bool:
    """Whether DALI gives this image the pixels that Pillow gives it; see `image_size`."""
    return image_size(content, apply_orientation=apply_orientation) is not None


def image_size(content: bytes, *, apply_orientation: bool = False) -> tuple[int, int] | None:
    """Width and height in pixels, None for an image that is better left to another decoder.

    Only markers are read: the answer says nothing about damage between them. Taken are complete
    JPEG files in 8 bits of grey or YCbCr, PNG in 8 bits of grey or RGB without transparency, and
    plain lossy WebP. Everything else DALI refuses or decodes otherwise, or nobody has compared.

    Args:
        apply_orientation: refuse what may carry EXIF or XMP data, for callers that would turn the
            image by it.
    """
    if content.startswith(b"\xff\xd8\xff"):
        size = _jpeg_size(content, apply_orientation)
    elif content.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _png_size(content, apply_orientation)
    elif content.startswith(b"RIFF"):
        size = _webp_size(content)
    else:
        size = None
    return size if size is not None and min(size) > 0 else None


class _Input(NamedTuple):
    content: bytes
    box: Box
    width: int
    height: int


class DaliDecoder:
    """Cuts boxes out of images and resizes them, a batch at a time, as Pillow would.

    For one thread at a time; it need not be the thread that made it. The GIL is free while DALI
    works. One image that cannot be decoded costs its own place in the batch and nothing else.

    Args:
        size: side of the squares given, in pixels.
        batch_size: most images of a call.
        device: "cpu", or "mixed" for the GPU's JPEG decoder (PNG and WebP are decoded on the CPU
            there, too) and a resize on the GPU.
        device_id: number of the GPU, as torch counts; by default its current one.
        threads: CPU threads of DALI's own.
        fancy_upsampling: interpolate the chroma of JPEG as libjpeg does, not nvJPEG's nearest
            neighbour; it makes a difference on the GPU alone.

    Raises:
        ImportError: nvidia.dali is not installed.
        ValueError: "mixed" without a GPU, a GPU for "cpu", or a number that is no count.
    """

    def __init__(
        self,
        size: int,
        *,
        batch_size: int,
        device: DaliDevice,
        device_id: int | None = None,
        threads: int = 2,
        fancy_upsampling: bool = True,
    ) -> None:
        for name, count in (("size", size), ("batch_size", batch_size), ("threads", threads)):
            if count < 1:
                raise ValueError(f"{name} is at least 1, not {count}")
        if device not in ("cpu", "mixed"):
            raise ValueError(f"DALI's device is cpu or mixed, not {device!r}")
        if device == "cpu" and device_id is not None:
            raise ValueError(f"device_id={device_id} is for device='mixed', not 'cpu'")
        if device == "mixed" and not torch.cuda.is_available():
            raise ValueError(
                "device='mixed' decodes on a GPU and torch sees none: set device='cpu', or a "
                "decoder other than DALI"
            )
        if device == "mixed" and device_id is None:
            device_id = torch.cuda.current_device()
        self.size = size
        self.batch_size = batch_size
        self.device: DaliDevice = device
        self.device_id = device_id
        self.threads = threads
        self.fancy_upsampling = fancy_upsampling
        self._closed = False
        self._pipeline: Any = self._build(batch_size)

    def decode(
        self, contents: Sequence[bytes], boxes: Sequence[Box]
    ) -> tuple[Tensor, dict[int, str]]:
        """Decode a batch.

        On the GPU the pixels are ready for work that is queued on the calling thread's current
        CUDA stream; nothing waits for them on the host. For another stream, let that wait for an
        event of this one and call `record_stream`.

        Args:
            contents: at least one and at most `batch_size` encoded images. Their pixels are not
                limited here: refuse oversized ones by `image_size`.
            boxes: what to cut out of each, in pixels of the image as it is stored.

        Returns:
            uint8 [len(contents), 3, size, size], a view of interleaved RGB, on the CPU or on the
            GPU, in memory that is the caller's.
            For each position that could not be decoded (its pixels are 0) the reason.

        Raises:
            ValueError: too many images, none, or not as many boxes.
            RuntimeError: DALI fails and no image is to blame for it; or the decoder is closed.
        """
        if self._closed:
            raise RuntimeError("the decoder is closed")
        if not 0 < len(contents) == len(boxes) <= self.batch_size:
            raise ValueError(
                f"{len(contents)} images and {len(boxes)} boxes: there is one box for each, and "
                f"there are 1 to {self.batch_size}"
            )
        reasons: dict[int, str] = {}
        places: list[int] = []
        inputs: list[_Input] = []
        for place, (content, box) in enumerate(zip(contents, boxes, strict=True)):
            size = image_size(content)
            if size is None:
                reasons[place] = _REFUSED
            elif not _inside(box, *size):
                reasons[place] = f"the box {box} is not inside its {size[0]}×{size[1]} pixels"
            else:
                places.append(place)
                inputs.append(_Input(content, box, *size))
        pixels: list[Tensor] = []
        if inputs:
            if self._pipeline is None:
                self._pipeline = self._build(self.batch_size)
            error: RuntimeError | None = None
            try:
                pixels = [self._run(self._pipeline, inputs)]
            except RuntimeError as raised:
                error = raised.with_traceback(None)  # its frames hold the pipeline
            if error is not None:
                self._pipeline = None  # DALI calls it invalid
                pixels, failed = self._one_by_one(inputs, error)
                reasons |= {places[position]: reason for position, reason in failed.items()}
                places = [place for place in places if place not in reasons]
        if not reasons:
            images = pixels[0]
        else:
            device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
            shape = (len(contents), self.size, self.size, 3)
            images = torch.zeros(shape, dtype=torch.uint8, device=device)
            if places:
                images[torch.tensor(places, device=device)] = torch.cat(pixels)
        return images.permute(0, 3, 1, 2), dict(sorted(reasons.items()))

    def close(self) -> None:
        """Stop DALI's threads and free its memory; batches given stay valid."""
        self._closed = True
        self._pipeline = None

    def _build(self, batch_size: int) -> Any:
        """The graph: decode, resize along one axis, resize along the other."""
        try:
            from nvidia.dali import fn, types
            from nvidia.dali.pipeline import Pipeline
        except ImportError as error:
            raise ImportError(
                f"decoding by DALI needs nvidia.dali ({error}): pip install 'fastclip-torch[dali]'"
            ) from error
        pipeline: Any = Pipeline(
            batch_size=batch_size,
            num_threads=self.threads,
            device_id=self.device_id,
            prefetch_queue_depth=1,  # a call's input is its own output's
        )
        functions: Any = fn  # their stubs know too little
        kinds: Any = types
        cubic = {"interp_type": kinds.INTERP_CUBIC, "antialias": True}
        with pipeline:
            encoded = functions.external_source(name="encoded", dtype=kinds.UINT8, ndim=1)
            starts, ends, sizes, later_starts, later_ends = (
                functions.external_source(name=name, dtype=kinds.FLOAT, ndim=1)
                for name in _GEOMETRY
            )
            pixels = functions.decoders.image(
                encoded,
                device=self.device,
                output_type=kinds.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=self.fancy_upsampling,
                affine=False,  # every rank's threads would be tied to the same cores
            )
            # Pillow resizes along one axis, rounds to 8 bits, then along the other. One resize of
            # both would round once: 30 times as far from Pillow's pixels.
            pixels = functions.resize(pixels, size=sizes, roi_start=starts, roi_end=ends, **cubic)
            pixels = functions.resize(
                pixels,
                size=[self.size, self.size],
                roi_start=later_starts,
                roi_end=later_ends,
                **cubic,
            )
            pipeline.set_outputs(pixels)
        pipeline.build()
        return pipeline

    def _run(self, pipeline: Any, inputs: Sequence[_Input]) -> Tensor:
        """uint8 [len(inputs), size, size, 3]."""
        geometry = np.stack([_geometry(one, self.size) for one in inputs], axis=1)
        stream = None if self.device_id is None else torch.cuda.current_stream(self.device_id)
        (output,) = pipeline.run(
            stream,
            encoded=[np.frombuffer(one.content, np.uint8) for one in inputs],
            **dict(zip(_GEOMETRY, geometry, strict=True)),
        )
        # A copy, on the GPU by the GPU: DALI's buffer would go back to DALI's pool in the order of
        # this stream alone, whatever record_stream says about others.
        return torch.from_dlpack(output.as_tensor()).clone()

    def _one_by_one(
        self, inputs: Sequence[_Input], error: RuntimeError
    ) -> tuple[list[Tensor], dict[int, str]]:
        """Pixels [1, size, size, 3] of the good ones, and by position what is wrong with others.

        DALI says that a batch failed, not reliably for which image.

        Raises:
            RuntimeError: all are good, or a perfect image fails as well.
        """
        pipeline = self._build(1)
        pixels, failed = [], {}
        for position, one in enumerate(inputs):
            try:
                pixels.append(self._run(pipeline, [one]))
            except RuntimeError as own:
                failed[position] = _reason(own)
                pipeline = self._build(1)
        if not failed:
            raise RuntimeError(
                f"DALI decodes each of {len(inputs)} images and not the batch of them "
                f"({_reason(error)}): set a smaller batch, or a decoder other than DALI"
            ) from error
        if not pixels:
            try:
                self._run(pipeline, [_perfect_image()])
            except RuntimeError as own:
                raise RuntimeError(
                    f"DALI decodes nothing ({_reason(own)}): set a decoder other than DALI"
                ) from error
        return pixels, failed


def _inside(box: Box, width: int, height: int) -> bool:
    left, upper, right, lower = box
    return 0 <= left < right <= width and 0 <= upper < lower <= height  # False for NaN


def _perfect_image() -> _Input:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return _Input(out.getvalue(), (0.0, 0.0, 8.0, 8.0), 8, 8)


def _geometry(image: _Input, size: int) -> NDArray[np.float32]:
    """What the two resizes need of an image: [5, 2], pairs of (row, column) as in _GEOMETRY."""
    left, upper, right, lower = image.box
    begin, end, kept_begin, kept_end, extent = left, right, upper, lower, image.height
    # Pillow's choice of the axis, since its version 13.
    columns_first = image.height > size and image.height - size > 2 * (image.width - size)
    if columns_first:
        begin, end, kept_begin, kept_end, extent = upper, lower, left, right, image.width
    # The first resize keeps the other axis, but only what the second will look at.
    reach = _CUBIC_SUPPORT * max(1.0, (kept_end - kept_begin) / size) + 1
    first = max(0, math.floor(kept_begin - reach))
    last = min(extent, math.ceil(kept_end + reach))
    pairs = np.array(
        [
            (first, begin),
            (last, end),
            (last - first, size),
            (kept_begin - first, 0),
            (kept_end - first, size),
        ],
        dtype=np.float32,
    )
    return pairs[:, ::-1] if columns_first else pairs


def _reason(error: RuntimeError) -> str:
    """DALI's message without the traceback of the graph's definition."""
    lines = str(error).rpartition("encountered:")[2].splitlines()
    told = [line.strip(" :") for line in lines if line.strip() and "no longer valid" not in line]
    return f"DALI: {told[0] if told else error}"


def _jpeg_size(content: bytes, apply_orientation: bool) -> tuple[int, int] | None:
    if content.find(b"\xff\xd9", -64) < 0:  # cut off; a little garbage behind the end is usual
        return None
    frame = b""
    adobe_transform = 1  # YCbCr
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        marker = content[at + 1]
        if marker == 0xFF:  # a filling byte
            at += 1
            continue
        segment = content[at + 4 : at + 2 + int.from_bytes(content[at + 2 : at + 4])]
        if marker == 0xDA:  # the entropy-coded data begin
            return _frame_size(frame, adobe_transform)
        if marker in (0xC0, 0xC1, 0xC2):  # Huffman-coded: baseline, extended, progressive
            frame = segment
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            adobe_transform = segment[11]
        elif marker not in _JPEG_SKIPPED or (marker == _EXIF_OR_XMP and apply_orientation):
            return None
        at += 4 + len(segment)
    return None


def _frame_size(frame: bytes, adobe_transform: int) -> tuple[int, int] | None:
    """Of a JPEG frame header, if it is 8 bits of grey or of YCbCr in a usual sampling."""
    if len(frame) < 9 or frame[0] != 8 or len(frame) != 6 + 3 * frame[5]:
        return None
    if frame[5] == 3:
        usual = frame[7] in (0x11, 0x21, 0x22) and frame[10] == frame[13] == 0x11
        names = (frame[6], frame[9], frame[12])  # "RGB" says that it is that
        if not usual or names not in ((1, 2, 3), (0, 1, 2)) or adobe_transform != 1:
            return None
    elif frame[5] != 1:
        return None
    return int.from_bytes(frame[3:5]), int.from_bytes(frame[1:3])


def _png_size(content: bytes, apply_orientation: bool) -> tuple[int, int] | None:
    depth, colours, interlaced = content[24:25], content[25:26], content[28:29]
    if depth != b"\x08" or colours not in (b"\0", b"\2") or interlaced != b"\0":
        return None
    if not content.endswith(b"IEND\xaeB`\x82"):
        return None
    texts = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
    if apply_orientation and any(name in content for name in texts):
        return None
    at = 8
    while (name := content[at + 4 : at + 8]) != b"IDAT":
        if len(name) < 4 or name in (b"tRNS", b"acTL"):  # a transparent colour, an animation
            return None
        at += 12 + int.from_bytes(content[at : at + 4])
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def _webp_size(content: bytes) -> tuple[int, int] | None:
    if content[8:16] != b"WEBPVP8 " or content[23:26] != b"\x9d\x01\x2a":
        return None
    if len(content) < 30 or int.from_bytes(content[4:8], "little") + 8 > len(content):
        return None
    width, height = content[26:28], content[28:30]
    return int.from_bytes(width, "little") & 0x3FFF, int.from_bytes(height, "little") & 0x3FFF
