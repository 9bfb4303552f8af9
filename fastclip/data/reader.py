"""One sample from its shard: bytes, caption, label."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import replace
from typing import Any

from fastclip.data.decode import BadSampleError
from fastclip.data.index import Sample
from fastclip.data.storage import FILES

WHOLE_FILE = 0
"""Offset of an image that is a file of its own: in a tar, a header stands before every member."""

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")


def is_caption_key(key: object) -> bool:
    """Whether `key` says where captions are: "txt" or "json:field"."""
    return key == "txt" or (isinstance(key, str) and key.startswith("json:") and key != "json:")


def check_caption_key(key: str, name: str) -> None:
    """Raise ValueError, calling it `name`, unless `key` says where captions are."""
    if key == "json:":
        raise ValueError(f"{name}=json: lacks the field's name: json:caption")
    if not is_caption_key(key):
        raise ValueError(f"{name} is txt or json:field, not {key!r}")


def read_captions(sample: Sample, caption_key: str) -> list[str]:
    """As `Members.captions`, without reading the image."""
    return Members(replace(sample, image=(-1, 0))).captions(caption_key)


class Members:
    """The members of one sample, read from its shard, or an image that is a file of its own.

    Attributes:
        image: the encoded bytes.

    Raises:
        BadSampleError: the shard cannot be read there any more, or the json is not an object.
    """

    def __init__(self, sample: Sample) -> None:
        if sample.image[0] == WHOLE_FILE:
            self.image, self._caption, self._metadata = _read_file(sample), b"", b""
            return
        places = (sample.image, sample.caption, sample.metadata)
        self.image, self._caption, self._metadata = FILES.read(sample.shard, places)

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


def _read_file(sample: Sample) -> bytes:
    path, (_, size) = str(sample.shard), sample.image
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                raise BadSampleError("unreadable", f"{path} is not what it was when it was listed")
            return file.read(size)
    except OSError as error:
        raise BadSampleError("unreadable", f"{path}: {error.strerror}") from None


def sentences(caption: str) -> list[str]:
    """A caption's sentences (ConVIRT samples one of them)."""
    return [part.strip() for part in _SENTENCE.split(caption) if part.strip()]


def caption_id(caption: str) -> int:
    """63 bits that equal captions share, whatever their case and spacing."""
    folded = " ".join(caption.lower().split())
    digest = hashlib.blake2b(folded.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
