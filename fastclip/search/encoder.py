"""A trained model as what a search needs of it: unit-length features of texts and of images."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastclip.config import load_config, to_dict
from fastclip.data.decode import BadSampleError
from fastclip.data.decoders import build_decoder
from fastclip.data.transforms import centre_crop
from fastclip.distributed.runtime import is_on_cuda
from fastclip.evaluate import load_trained, run_folder
from fastclip.models.clip import Clip
from fastclip.tokenizer import Tokenizer

MAX_QUERY_PIXELS = 50_000_000
"""Of an image that is searched with: its pixels take three bytes each while it is decoded."""

MAX_QUERY_BYTES = 64 << 20
_TEXTS_AT_A_TIME = 256
_LONGEST_QUERY = 20_000
"""Characters of a text; what is beyond the context length is cut off by the tokenizer anyway."""


class Encoder:
    """Features by a run's or checkpoint's model. For any number of threads.

    Attributes:
        name: of the run and checkpoint, for people.
        path: the checkpoint's folder.
        digest: of the configuration and the weights, whatever files they lie in: 64 hex digits.
        embed_dim: length D of a feature.
        image_size: pixels of a side that images are cut and resized to.
        apply_orientation: whether images are turned as their EXIF data says, as in training.

    Raises:
        FileNotFoundError, ValueError: there is no such model or device, or it is damaged.
    """

    def __init__(self, model_path: Path, *, device: str = "cpu") -> None:
        model, self.path = load_trained(model_path)
        self.path = self.path.resolve()
        self.device = torch.device("cuda" if is_on_cuda(device) else "cpu")
        self.digest = model_digest(model)
        self.model = model.to(self.device)
        config = model.config
        self.embed_dim = config.embed_dim
        self.image_size = config.vision.image_size
        self.tokenizer = Tokenizer(context_length=config.text.context_length)
        self.apply_orientation, self.name = False, self.path.name
        try:
            run = run_folder(self.path)
        except FileNotFoundError:
            pass  # a checkpoint that was copied out of its run
        else:
            self.name = f"{run.name}/{self.path.name}"
            data = load_config(run / "config.json").data
            self.apply_orientation = data.apply_orientation
        self._decoder = build_decoder(
            "auto", max_pixels=MAX_QUERY_PIXELS, apply_orientation=self.apply_orientation
        )
        self._lock = threading.Lock()

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, fp32 [N, D] of unit length on the CPU.

        Raises:
            ValueError: a text is blank or far too long.
        """
        for number, text in enumerate(texts):
            if not text.strip():
                raise ValueError(f"text {number + 1} to search for is empty")
            if len(text) > _LONGEST_QUERY:
                raise ValueError(
                    f"text {number + 1} to search for has {len(text)} characters; at most "
                    f"{_LONGEST_QUERY} are read"
                )
        found = [torch.empty(0, self.embed_dim)]
        for first in range(0, len(texts), _TEXTS_AT_A_TIME):
            part = list(texts[first : first + _TEXTS_AT_A_TIME])
            tokens, lengths = self.tokenizer.encode_batch(part)
            tokens = tokens[:, : int(lengths.max())].to(self.device)
            with self._lock, torch.no_grad():
                features = self.model(tokens=tokens).text_features
            found.append(features.cpu())
        return torch.cat(found)

    def image_bytes(self, content: bytes) -> Tensor:
        """The feature of an encoded image, fp32 [D] of unit length on the CPU.

        Raises:
            ValueError: it is empty, no image, damaged, or more than may be decoded; says which.
        """
        if len(content) > MAX_QUERY_BYTES:
            raise ValueError(
                f"the image has {len(content):,} bytes; at most {MAX_QUERY_BYTES:,} are read"
            )
        return self.features(torch.from_numpy(self.thumbnail(content, self.image_size))[None])[0]

    def images(self, contents: Sequence[bytes]) -> Tensor:
        """As `image_bytes` of each, fp32 [N, D]."""
        found = [self.image_bytes(content) for content in contents]
        return torch.stack(found) if found else torch.empty(0, self.embed_dim)

    def thumbnail(self, content: bytes, size: int) -> np.ndarray:
        """The centre square of an encoded image as the model sees it, uint8 [size, size, 3].

        Raises:
            ValueError: see `image_bytes`.
        """
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            image = self._decoder.open(content)
            self._decoder.decode(image, centre_crop(*image.size), pixels)
        except BadSampleError as error:
            raise ValueError(f"the image cannot be used: {error}") from None
        return pixels

    def features(self, pixels: Tensor) -> Tensor:
        """Features of decoded images, fp32 [N, D] of unit length on the CPU.

        Args:
            pixels: uint8 [N, R, R, 3] with the model's R.
        """
        batch = pixels.permute(0, 3, 1, 2).to(self.device)
        with self._lock, torch.no_grad():
            return self.model(images=batch).image_features.cpu()


def model_digest(model: Clip) -> str:
    """SHA-256 of a model's configuration and weights, 64 hex digits."""
    digest = hashlib.sha256(json.dumps(to_dict(model.config), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(content.numpy()))
    return digest.hexdigest()
