"""Images and questions that are sent: read up to a limit, judged by content, kept for a while."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request
from torch import Tensor

from fastclip.data.decode import BadSampleError, open_image
from fastclip.serve.errors import RequestError

MAX_IMAGE_BYTES = 10 * 1024 * 1024
MAX_IMAGE_PIXELS = 50_000_000
"""Judged by the header: a few kilobytes may decode to gigabytes."""

_DROPPED_BYTES = 32 * 1024 * 1024
_BODY_SECONDS = 30.0
"""For a body to arrive."""

_UPLOADS_KEPT = 256
"""A feature and a thumbnail each: some 10 MB in all."""

_KINDS = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")


async def read_body(request: Request, limit: int, what: str) -> bytes:
    """A request's body, of which no more than `limit` bytes are ever held.

    What is a little too long is read to its end and dropped: who is cut off while sending may never
    see why.

    Raises:
        RequestError: it is longer (413), whatever its Content-Length says, or does not arrive
            (408).
    """
    size = 0
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= limit:
                    body += part
                elif size > limit + _DROPPED_BYTES:
                    break
    except TimeoutError:
        reason = f"{what} did not arrive in {_BODY_SECONDS:.0f} seconds"
        raise RequestError(408, reason, hang_up=True) from None
    if size > limit:
        raise RequestError(
            413,
            f"{what} has more than {_shown(limit)}",
            hang_up=size > limit + _DROPPED_BYTES,
        )
    return bytes(body)


async def read_image(request: Request) -> bytes:
    """The image that is a request's body.

    Raises:
        RequestError: it is too long (413), or not called an image (415).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    called_image = kind.startswith("image/") or kind == "application/octet-stream"
    if kind == "image/svg+xml" or not called_image:
        raise RequestError(415, f"{kind or 'a body without a type'} is not searched: send {_KINDS}")
    return await read_body(request, MAX_IMAGE_BYTES, "the image")


def check_image(content: bytes) -> None:
    """Read an image's header.

    Raises:
        RequestError: there are 0 bytes or they are damaged (400), of no kind that is read (415),
            or would decode to more than `MAX_IMAGE_PIXELS` (413).
    """
    if not content:
        raise RequestError(400, "the image is empty: the file has 0 bytes")
    try:
        open_image(content, max_pixels=MAX_IMAGE_PIXELS).close()
    except BadSampleError as error:
        if error.kind == "oversized image":
            raise RequestError(
                413, f"the image has more than {MAX_IMAGE_PIXELS // 1_000_000} megapixels"
            ) from None
        known = content.startswith(_SIGNATURES) or content[8:12] == b"WEBP"
        if not known:
            raise RequestError(415, f"the file is not an image that is read: {_KINDS}") from None
        raise RequestError(400, "the image is damaged: its header cannot be read") from None


def _shown(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 1 << 20 else f"{count >> 10} KiB"


@dataclass(frozen=True)
class Upload:
    """What is kept of an image that was sent."""

    token: str
    """Its name from now on."""

    feature: Tensor
    """fp32 [D] of unit length."""

    thumbnail: bytes
    """WebP."""


class Uploads:
    """The latest images that were sent, in memory only. For any number of threads.

    A token is a keyed hash of the content, so that the same image has one token and nobody can
    guess another's.
    """

    def __init__(self, encode: Callable[[bytes], Tensor], draw: Callable[[bytes], bytes]) -> None:
        self._encode = encode
        self._draw = draw
        self._key = secrets.token_bytes(32)
        self._kept: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, content: bytes) -> Upload:
        """Encode an image and keep what it is searched by.

        Raises:
            RequestError: see `check_image`; or its pixels cannot be decoded (400).
        """
        check_image(content)
        token = hashlib.blake2b(content, key=self._key, digest_size=16).hexdigest()
        with self._lock:
            known = self._kept.get(token)
        if known is None:
            try:
                known = Upload(token, self._encode(content), self._draw(content))
            except (ValueError, BadSampleError) as error:
                raise RequestError(400, f"the image is damaged: {error}") from None
        with self._lock:
            self._kept[token] = known
            self._kept.move_to_end(token)
            while len(self._kept) > _UPLOADS_KEPT:
                self._kept.popitem(last=False)
        return known

    def get(self, token: str) -> Upload:
        """An image that was sent.

        Raises:
            RequestError: it is not kept, or never was (404).
        """
        with self._lock:
            known = self._kept.get(token)
            if known is None:
                raise RequestError(404, "the image is not kept any more: send it again")
            self._kept.move_to_end(token)
        return known
