"""Ways from a JPEG's bytes to 224 × 224 pixels, ours and others', for one core."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastclip.data.decoders import ImageDecoder, NativeDecoder, PillowDecoder
from fastclip.data.transforms import Box, centre_crop

SIZE = 224
Pixels = NDArray[np.uint8]

Decode = Callable[[bytes, Box | None], Pixels | None]
"""From an image and the box (None: the provider's own random crop) to uint8 [224, 224, 3]; None
where the pixels are not of that box."""


@dataclass(frozen=True)
class ImagePeer:
    """One way."""

    name: str
    distribution: str
    build: Callable[[], Decode]
    note: str = ""


def _decoder(make: Callable[[], ImageDecoder]) -> Callable[[], Decode]:
    def build() -> Decode:
        decoder = make()
        out = np.empty((SIZE, SIZE, 3), dtype=np.uint8)

        def decode(content: bytes, box: Box | None) -> Pixels:
            image = decoder.open(content)
            decoder.decode(image, box or centre_crop(*image.size), out)
            return out

        return decode

    return build


def _open_clip() -> Decode:
    """Its training transform, as its loader calls it: Pillow, a float tensor, normalised."""
    from benchmarks.torchvision_beside_cpu import declare_operators

    declare_operators()
    from open_clip.transform import image_transform

    transform: Any = image_transform(SIZE, is_train=True)

    def decode(content: bytes, box: Box | None) -> None:
        del box  # it draws its own, of 90 to 100 % of the area
        transform(Image.open(io.BytesIO(content)))

    return decode


def _simplejpeg_torch() -> Decode:
    """libjpeg-turbo and torch's antialiased resize of bytes; boxes of whole pixels only."""
    import simplejpeg

    buffer = np.empty(64 << 20, dtype=np.uint8)

    def decode(content: bytes, box: Box | None) -> Pixels:
        pixels = simplejpeg.decode_jpeg(content, "RGB", buffer=buffer)
        height, width, _ = pixels.shape
        left, upper, right, lower = map(round, box or centre_crop(width, height))
        image = torch.from_numpy(pixels)[upper:lower, left:right].permute(2, 0, 1)[None]
        resized = torch.nn.functional.interpolate(
            image, (SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False
        )
        return resized[0].permute(1, 2, 0).numpy()

    return decode


def _dali() -> Decode:
    """Ours by DALI on a CPU, which serves tests, one image a call."""
    from fastclip.data.dali import DaliDecoder, image_size

    decoder = DaliDecoder(SIZE, batch_size=1, device="cpu", threads=1)

    def decode(content: bytes, box: Box | None) -> Pixels:
        size = image_size(content)
        assert size is not None
        pixels, failed = decoder.decode([content], [box or centre_crop(*size)])
        assert not failed
        return pixels[0].permute(1, 2, 0).numpy()

    return decode


def _spdl() -> Decode:
    """SPDL: FFmpeg's decoder and resize, without a crop."""
    import spdl.io

    def decode(content: bytes, box: Box | None) -> None:
        del box
        packets = spdl.io.demux_image(content)
        frames = spdl.io.decode_packets(
            packets,
            filter_desc=spdl.io.get_filter_desc(
                packets, scale_width=SIZE, scale_height=SIZE, pix_fmt="rgb24"
            ),
        )
        spdl.io.to_numpy(spdl.io.convert_frames(frames))

    return decode


IMAGE_PEERS: Sequence[ImagePeer] = (
    ImagePeer("fastclip", "fastclip-torch", _decoder(NativeDecoder)),
    ImagePeer(
        "fastclip-reduced",
        "fastclip-torch",
        _decoder(lambda: NativeDecoder(reduce_jpeg=True)),
        "data.reduce_jpeg",
    ),
    ImagePeer("fastclip-pillow", "pillow", _decoder(PillowDecoder), "data.decoder=pillow"),
    ImagePeer("open_clip", "open_clip_torch", _open_clip, "Pillow, ToTensor, Normalize"),
    ImagePeer("simplejpeg+torch", "simplejpeg", _simplejpeg_torch),
    ImagePeer("fastclip-dali-cpu", "nvidia-dali-cuda130", _dali),
    ImagePeer("spdl", "spdl-io", _spdl, "scales without a crop"),
)
