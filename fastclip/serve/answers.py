"""What the page asks of an index and its model: plain data in, plain data out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from torch import Tensor

from fastclip.models.clip import bounded_exp
from fastclip.search.encoder import Encoder
from fastclip.search.index import SearchIndex
from fastclip.search.records import Found, Record
from fastclip.serve.errors import RequestError
from fastclip.serve.thumbnails import Thumbnails, draw_thumbnail
from fastclip.serve.uploads import Uploads

MAX_TEXT = 1000
"""Characters of a query, a class or a template."""

MAX_CLASSES = 200
MAX_RESULTS = 200
DEFAULT_RESULTS = 48
_UPLOAD_SIZE = 320
_EXAMPLES = 24
"""Images of the index that the page shows before anything is asked."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=MAX_TEXT)]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search, whatever the query is."""

    k: int = DEFAULT_RESULTS
    """Results wanted."""

    exact: bool = False
    """Compare with every image, also where there are lists."""

    filters: Mapping[str, str] = field(default_factory=dict)
    """Values that fields have to have."""


class ZeroShotQuestion(BaseModel):
    """Which of some classes an image shows, by their names alone."""

    model_config = ConfigDict(extra="forbid", strict=True)

    classes: Annotated[list[Text], Field(min_length=2, max_length=MAX_CLASSES)]
    template: Text = "{}"
    """With {} for a class's name."""

    number: Annotated[int, Field(ge=0)] | None = None
    """Of an image of the index. Or:"""

    image: Annotated[str, Field(max_length=64)] | None = None
    """The token of one that was sent."""

    @model_validator(mode="after")
    def _fits(self) -> ZeroShotQuestion:
        if (self.number is None) == (self.image is None):
            raise ValueError("name one image: number, of the index, or image, that was sent")
        if self.template.count("{}") != 1:
            raise ValueError("the template holds exactly one {}, for a class's name")
        repeated = next((n for i, n in enumerate(self.classes) if n in self.classes[:i]), None)
        if repeated is not None:
            raise ValueError(f"the class {repeated!r} occurs twice")
        return self


class Answers:
    """Answers from one index and the model that made it. For any number of threads.

    Attributes:
        thumbnails: of the index's images.
        uploads: images that were sent.
        version: changes when the index does; 16 hex digits.
    """

    def __init__(self, index: SearchIndex, encoder: Encoder) -> None:
        self.index = index
        self.encoder = encoder
        self.thumbnails = Thumbnails(index.image)
        self.uploads = Uploads(
            encoder.image_bytes, lambda content: draw_thumbnail(content, _UPLOAD_SIZE)
        )
        parts = [part.sha256 for part in index.description.parts]
        known = repr((index.info.model_digest, parts)).encode()
        self.version = hashlib.blake2b(known, digest_size=8).hexdigest()
        model = encoder.model
        self._scale = float(bounded_exp(model.logit_scale.detach(), model.config.max_logit_scale))

    def info(self) -> dict[str, Any]:
        """What the page has to know before anything is searched."""
        info = self.index.info
        return {
            "count": info.count,
            "embed_dim": info.embed_dim,
            "model": self.encoder.name,
            "model_digest": info.model_digest,
            "logit_scale": self._scale,
            "fields": {name: list(values) for name, values in info.fields.items()},
            "approximate": info.vectors.kind != "flat",
            "recall": info.vectors.recall_images,
            "version": self.version,
            "examples": [self.describe(number) for number in self._examples()],
            "limits": {"text": MAX_TEXT, "classes": MAX_CLASSES, "results": MAX_RESULTS},
        }

    def by_text(self, text: str, options: SearchOptions) -> dict[str, Any]:
        """The images nearest to a text.

        Raises:
            RequestError: the text is blank, or the options do not fit the index.
        """
        if not text.strip():
            raise RequestError(400, "the text to search for is empty")
        begin = time.perf_counter()
        feature = self.encoder.texts([text.strip()])[0]
        return self._search(feature, options, begin)

    def by_content(self, content: bytes, options: SearchOptions) -> dict[str, Any]:
        """The images nearest to one that is sent, and that one's token.

        Raises:
            RequestError: see `Uploads.add`; or the options do not fit the index.
        """
        begin = time.perf_counter()
        upload = self.uploads.add(content)
        return {"image": upload.token, **self._search(upload.feature, options, begin)}

    def by_upload(self, token: str, options: SearchOptions) -> dict[str, Any]:
        """As `by_content`, of an image that was sent before.

        Raises:
            RequestError: it is not kept; or the options do not fit the index.
        """
        begin = time.perf_counter()
        return self._search(self.uploads.get(token).feature, options, begin)

    def similar(self, number: int, options: SearchOptions) -> dict[str, Any]:
        """The images nearest to one of the index, which is not among them.

        Raises:
            RequestError: there is none of that number, or the options do not fit the index.
        """
        record = self.record(number)
        begin = time.perf_counter()
        feature = F.normalize(self.index.features([number])[0], dim=0)
        found = self._search(feature, options, begin, without=number)
        return {"query": _as_json(record), **found}

    def zero_shot(self, question: ZeroShotQuestion) -> dict[str, Any]:
        """Probabilities of classes, the likeliest first (arXiv 2103.00020, section 3.1).

        The softmax of the similarities times the model's logit scale.

        Raises:
            RequestError: there is no such image.
        """
        begin = time.perf_counter()
        if question.number is not None:
            self.record(question.number)
            image = F.normalize(self.index.features([question.number])[0], dim=0)
        else:
            image = self.uploads.get(question.image or "").feature
        texts = self.encoder.texts([question.template.replace("{}", c) for c in question.classes])
        similarities = texts @ image
        probabilities = (self._scale * similarities).double().softmax(dim=0)
        order = probabilities.argsort(descending=True, stable=True).tolist()
        return {
            "classes": [
                {
                    "name": question.classes[place],
                    "probability": float(probabilities[place]),
                    "similarity": float(similarities[place]),
                }
                for place in order
            ],
            "logit_scale": self._scale,
            "milliseconds": _since(begin),
        }

    def describe(self, number: int) -> dict[str, Any]:
        """A record of the index.

        Raises:
            RequestError: there is none of that number.
        """
        return _as_json(self.record(number))

    def record(self, number: int) -> Record:
        """Of the index.

        Raises:
            RequestError: there is none of that number (404).
        """
        if not 0 <= number < self.index.info.count:
            raise RequestError(404, f"there is no image {number}")
        return self.index.record(number)

    def _examples(self) -> list[int]:
        """Numbers spread over the index, the same ones each time."""
        count = self.index.info.count
        shown = min(count, _EXAMPLES)
        return [count * place // shown for place in range(shown)]

    def _search(
        self, feature: Tensor, options: SearchOptions, begin: float, *, without: int | None = None
    ) -> dict[str, Any]:
        wanted = options.k + (without is not None)
        try:
            (found,) = self.index.search(
                feature[None], wanted, exact=options.exact, filters=options.filters or None
            )
        except ValueError as error:  # a filter that the index does not have
            raise RequestError(400, str(error)) from None
        kept = [each for each in found if each.record.number != without][: options.k]
        return {
            "results": [_found_as_json(each) for each in kept],
            "milliseconds": _since(begin),
        }


def _since(begin: float) -> float:
    return round(1000 * (time.perf_counter() - begin), 2)


def _found_as_json(found: Found) -> dict[str, Any]:
    return {"score": found.score, **_as_json(found.record)}


def _as_json(record: Record) -> dict[str, Any]:
    """Without the folders that the shard lies in, which are nobody's business."""
    return {
        "number": record.number,
        "key": _encodable(record.key),
        "shard": _encodable(record.shard.replace("\\", "/").rpartition("/")[2]),
        "caption": record.caption,
        "fields": dict(record.fields),
        "width": record.width,
        "height": record.height,
    }


def _encodable(text: str) -> str:
    """A file's name may hold bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()
