"""The tokenizer on a GPU: texts in, rows of ids in the GPU's memory out, the same as the host's.

::

    tokenizer = CudaTokenizer()
    tokenizer(["a photo of a cat", "a diagram"])  # int64 [2, 77] on the GPU

A warp does a text (csrc/warp_row.h). Texts that have to be rewritten first (entities, mojibake,
marks that Unicode composes), or that are longer than 1024 bytes, come back as indices: the native
tokenizer does them on the host, and their rows are put in place.
"""

from __future__ import annotations

import threading
import unicodedata
from typing import TYPE_CHECKING

import torch

from fastclip.tokenizer.backends import NativeBackend
from fastclip.tokenizer.texts import (
    ID_DTYPES,
    NativeTexts,
    TextInput,
    as_native,
    check_context_length,
)
from fastclip.tokenizer.vocabulary import MERGES_PATH, Dialect, check_dialect, check_truncate

if TYPE_CHECKING:
    from fastclip.tokenizer import _cuda

__all__ = ["CudaTokenizer"]

_LARGEST = 2**31 - 1  # bytes of a batch: offsets are int32
_NOT_BUILT = (
    "the CUDA tokenizer was not built: it needs nvcc (on PATH, or under CUDA_HOME) when fastclip "
    "is installed; FASTCLIP_CUDA=1 pip install --force-reinstall --no-deps fastclip-torch shows "
    "what is missing, and fastclip.tokenizer.Tokenizer gives the same ids on the host"
)


class CudaTokenizer:
    """OpenAI's and open_clip's tokenizer (``clean="lower"``) for texts by the thousand.

    Each call works on the current stream, and waits for it, to learn which texts are the host's:
    once where none is. One instance may serve several threads; their calls take turns.

    Args:
        context_length: as in `Tokenizer`, and so are `dialect`, `truncate` and `threads`, the last
            two also for the texts that the host does.
        device: the GPU, "cuda" or "cuda:1".
        strict: hand texts with characters of a newer Unicode version to Python.

    Raises ImportError if it was not built, RuntimeError without a GPU, and ValueError for a setting
    outside these.
    """

    def __init__(
        self,
        context_length: int = 77,
        dialect: Dialect = "openai",
        truncate: bool = True,
        *,
        device: str | torch.device = "cuda",
        strict: bool = False,
        threads: int | None = None,
    ) -> None:
        check_context_length(context_length)
        check_dialect(dialect)
        check_truncate(truncate)
        self.context_length = context_length
        self.dialect: Dialect = dialect
        self.truncate = truncate
        self.device, self._encoder = _open(torch.device(device), strict)
        self._host = NativeBackend(dialect, strict=strict, threads=threads)
        self._turn = threading.Lock()
        self._data = self._offsets = torch.empty(0)

    def __call__(self, texts: TextInput, context_length: int | None = None) -> torch.Tensor:
        """Token rows, int64 [B, context_length] on the GPU. Texts and errors as `Tokenizer`'s."""
        return self._encode(texts, context_length, torch.int64)[0]

    def encode_batch(self, texts: TextInput) -> tuple[torch.Tensor, torch.Tensor]:
        """Token rows and their lengths, int32 [B, context_length] and int32 [B], on the GPU."""
        return self._encode(texts, None, torch.int32)

    def encode_utf8(
        self,
        data: torch.Tensor,
        offsets: torch.Tensor,
        context_length: int | None = None,
        dtype: torch.dtype = torch.int32,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and lengths of texts that lie in one piece, the way without a copy on the host.

        Args:
            data: uint8 [N], UTF-8; in pinned memory or on the GPU.
            offsets: int32 [B + 1]: text i is ``data[offsets[i]:offsets[i + 1]]``. Wherever it lies.
            context_length: overrides the tokenizer's own for this call.
            dtype: of the ids: int32, int64 or uint16.

        Raises as `enqueue_utf8`, and ValueError for offsets that lead out of the data, bytes that
        are not UTF-8, and (without `truncate`) a text that is too long.
        """
        rows, lengths, refused = self.enqueue_utf8(data, offsets, context_length, dtype)
        which = _numbers(refused)
        if which:
            data, offsets = data.cpu(), offsets.cpu()
            self._finish(_texts_inside(data, offsets), which, rows, lengths)
        return rows, lengths

    def enqueue_utf8(
        self,
        data: torch.Tensor,
        offsets: torch.Tensor,
        context_length: int | None = None,
        dtype: torch.dtype = torch.int32,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The GPU's part of `encode_utf8`, which does not wait, and can be captured in a graph.

        A graph holds addresses: keep this tokenizer and the captured tensors as long as the graph.

        Returns:
            rows and lengths as there, where the length of a text that is left to the host is 0 and
            its row unspecified; and int32 [1 + B]: how many these are, then which, in any order.

        Raises TypeError or ValueError for other tensors.
        """
        if dtype not in ID_DTYPES:
            raise TypeError(f"ids are int32, int64 or uint16, not {dtype}")
        _check_vector("data", data, torch.uint8)
        _check_vector("offsets", offsets, torch.int32)
        if len(offsets) == 0 or max(len(offsets), len(data)) > _LARGEST:
            raise ValueError(
                f"there is one offset more than texts, and at most {_LARGEST} of them and of bytes "
                f"of data; here are {len(offsets)} and {len(data)}"
            )
        if context_length is None:
            context_length = self.context_length
        check_context_length(context_length)
        if context_length > _LARGEST:
            raise ValueError(f"context_length is {context_length}, more than {_LARGEST}")
        count = len(offsets) - 1
        data = data.to(self.device, non_blocking=True)
        offsets = offsets.to(self.device, non_blocking=True)
        rows = torch.empty(count, context_length, dtype=dtype, device=self.device)
        lengths = torch.empty(count, dtype=torch.int32, device=self.device)
        refused = torch.empty(1 + count, dtype=torch.int32, device=self.device)
        self._encoder.encode(
            data=data.data_ptr(),
            size=len(data),
            offsets=offsets.data_ptr(),
            count=count,
            rows=rows.data_ptr(),
            context_length=context_length,
            id_bytes=rows.element_size(),
            lengths=lengths.data_ptr(),
            refused=refused.data_ptr(),
            truncate=self.truncate,
            stream=_stream(self.device),
        )
        return rows, lengths, refused

    def _encode(
        self, texts: TextInput, context_length: int | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = as_native(texts)
        with self._turn:
            rows, lengths, refused = self.enqueue_utf8(*self._stage(batch), context_length, dtype)
            which = _numbers(refused)  # waits, so that the staging memory is free again
        if which:
            self._finish(batch, which, rows, lengths)
        return rows, lengths

    def _stage(self, batch: NativeTexts) -> tuple[torch.Tensor, torch.Tensor]:
        """The texts in one piece, in pinned memory that the next call uses again."""
        size = batch.texts.utf8_size()
        if size > _LARGEST:
            raise ValueError(f"the texts are {size} bytes, more than {_LARGEST}; split the batch")
        if len(self._data) < size or len(self._offsets) < len(batch) + 1:
            pinned = self.device.type == "cuda"
            self._data = torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=pinned)
            room = len(batch) + len(batch) // 4 + 1
            self._offsets = torch.empty(room, dtype=torch.int32, pin_memory=pinned)
        batch.texts.write_utf8(self._data.data_ptr(), self._offsets.data_ptr())
        return self._data[:size], self._offsets[: len(batch) + 1]

    def _finish(
        self, batch: NativeTexts, which: list[int], rows: torch.Tensor, lengths: torch.Tensor
    ) -> None:
        """Do the texts that the GPU has refused."""
        few = torch.empty(len(which), rows.shape[1], dtype=rows.dtype)
        their_lengths = torch.empty(len(which), dtype=torch.int32)
        self._host.fill(batch.select(which), few, their_lengths, self.truncate, which)
        places = torch.tensor(which, device=self.device)
        _indexable(rows).index_copy_(0, places, _indexable(few).to(self.device))
        lengths.index_copy_(0, places, their_lengths.to(self.device))


def _open(device: torch.device, strict: bool) -> tuple[torch.device, _cuda.Encoder]:
    try:
        from fastclip.tokenizer import _cuda
    except ImportError as error:
        raise ImportError(_NOT_BUILT) from error
    if device.type != "cuda":
        raise ValueError(f"device is a CUDA device, not {device}")
    if not torch.cuda.is_available():
        raise RuntimeError(
            "the CUDA tokenizer needs a CUDA device and torch sees none; "
            "fastclip.tokenizer.Tokenizer gives the same ids on the host"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    version = int(unicodedata.unidata_version.split(".")[0])
    encoder = _cuda.Encoder(MERGES_PATH.read_bytes(), version, strict, index)
    return torch.device("cuda", index), encoder


def _check_vector(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a tensor, not {type(tensor).__name__}")
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise TypeError(
            f"{name} is a contiguous vector of {dtype}, not {list(tensor.shape)} of {tensor.dtype}"
        )


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _numbers(refused: torch.Tensor) -> list[int]:
    """Which texts were refused, in ascending order."""
    count = int(refused[0])
    return sorted(refused[1 : 1 + count].tolist()) if count else []


def _texts_inside(data: torch.Tensor, offsets: torch.Tensor) -> NativeTexts:
    """Raises ValueError for a text that is not inside the data, naming the first."""
    from fastclip.tokenizer import _native

    begins, ends = offsets[:-1], offsets[1:]
    outside = ((begins < 0) | (ends < begins) | (ends > len(data))).nonzero()
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"texts[{first}] is bytes {int(begins[first])} to {int(ends[first])} by its offsets, "
            f"and the data has {len(data)}"
        )
    read = _native.Texts.from_offsets_32
    return NativeTexts(read(data.data_ptr(), offsets.data_ptr(), len(begins)), (data, offsets))


def _indexable(ids: torch.Tensor) -> torch.Tensor:
    return ids.view(torch.int16) if ids.dtype == torch.uint16 else ids
