"""What callers hand in: texts in any of their usual containers, and buffers for the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

if TYPE_CHECKING:
    from fastclip.tokenizer import _native

TextInput: TypeAlias = "str | Sequence[str | bytes] | Any"
"""A text, a list or tuple of texts (str, or bytes of UTF-8), a one-dimensional NumPy array (of
bytes, str or objects), or an Arrow array of strings."""

ID_DTYPES = (torch.int32, torch.int64, torch.uint16)
_SHOWN_CHARACTERS = 60  # of an offending text, in an error message


def check_context_length(context_length: int) -> None:
    """Raises TypeError for anything but an int, ValueError for one below 3."""
    if isinstance(context_length, bool) or not isinstance(context_length, int):
        raise TypeError(f"context_length is an int, not {type(context_length).__name__}")
    if context_length < 3:
        raise ValueError(
            f"context_length is {context_length}; a row holds SOT, at least one token, and EOT, "
            "so it is at least 3"
        )


def as_sequence(texts: TextInput) -> Sequence[str | bytes]:
    """The texts one by one. Raises TypeError for anything but texts, ValueError for a null."""
    if isinstance(texts, str):
        return (texts,)
    if _is_from(texts, "pyarrow"):
        batch = _string_array(texts).to_pylist()
    elif _is_from(texts, "numpy"):
        batch = _text_array(texts).tolist()
    else:
        _refuse_other_than_sequences(texts)
        batch = tuple(texts)
    for index, text in enumerate(batch):
        if not isinstance(text, (str, bytes)):
            raise TypeError(f"texts[{index}] is {type(text).__name__}, not str or bytes")
    return batch


class NativeTexts:
    """Texts as the native tokenizer reads them: in place, in the memory of their owner."""

    def __init__(self, texts: _native.Texts, owner: object = None) -> None:
        self.texts = texts
        self._owner = owner  # kept alive; a list's texts are, by references of their own

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> NativeTexts:
        """Some of the texts, in the order asked for."""
        return NativeTexts(self.texts.select(indices), self._owner)


def as_native(texts: TextInput) -> NativeTexts:
    """Raises TypeError for anything but texts, ValueError for a null."""
    from fastclip.tokenizer import _native

    if isinstance(texts, str):
        return NativeTexts(_native.Texts.from_sequence((texts,)))
    if type(texts) is list or type(texts) is tuple:
        return NativeTexts(_native.Texts.from_sequence(texts))
    if _is_from(texts, "pyarrow"):
        array = _string_array(texts)
        _, offsets, data = array.buffers()
        wide = str(array.type).startswith("large_")
        if len(array) == 0 or offsets is None:
            return NativeTexts(_native.Texts.from_sequence(()))
        read = _native.Texts.from_offsets_64 if wide else _native.Texts.from_offsets_32
        start = offsets.address + array.offset * (8 if wide else 4)
        place = 0 if data is None else data.address
        return NativeTexts(read(place, start, len(array)), array)
    if _is_from(texts, "numpy"):
        array = _text_array(texts)
        if array.dtype.kind != "S":
            return NativeTexts(_native.Texts.from_sequence(array.tolist()))
        cells = array if array.flags.c_contiguous else array.copy()
        read = _native.Texts.from_cells(cells.ctypes.data, cells.itemsize, len(cells))
        return NativeTexts(read, cells)
    _refuse_other_than_sequences(texts)
    return NativeTexts(_native.Texts.from_sequence(tuple(texts)))


def _is_from(value: object, package: str) -> bool:
    """Whether a value's type is of a package, without importing that package."""
    return type(value).__module__.split(".")[0] == package


def _refuse_other_than_sequences(texts: object) -> None:
    if isinstance(texts, (bytes, bytearray, memoryview)) or not isinstance(texts, Sequence):
        raise TypeError(
            f"texts is a str or a sequence of str, not {type(texts).__name__}; "
            "put a single bytes into a list, and turn other collections into one"
        )


def _string_array(texts: Any) -> Any:
    array = texts.combine_chunks() if hasattr(texts, "combine_chunks") else texts
    kind = str(getattr(array, "type", type(texts).__name__))
    if kind == "string_view":
        array, kind = array.cast("string"), "string"
    if kind not in ("string", "large_string", "binary", "large_binary"):
        raise TypeError(f"texts is an Arrow array of strings, not of {kind}")
    if array.null_count:
        index = array.is_null().to_pylist().index(True)
        raise ValueError(f"texts[{index}] is null; fill the nulls or drop them")
    return array


def _text_array(texts: Any) -> Any:
    if getattr(texts, "ndim", None) != 1 or texts.dtype.kind not in "SUO":
        raise TypeError(
            "texts is a one-dimensional NumPy array of bytes, str or objects, not "
            f"{getattr(texts, 'dtype', type(texts).__name__)} {list(getattr(texts, 'shape', ()))}"
        )
    return texts


def decoded(text: str | bytes, index: int) -> str:
    """One text as str. Raises ValueError for bytes that are not UTF-8."""
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(index, error.start) from None


def not_utf8(index: int, place: int) -> ValueError:
    return ValueError(
        f"texts[{index}] is not UTF-8: byte {place} belongs to no character; decode it with the "
        'encoding it has, or with errors="replace"'
    )


def too_long(index: int, text: str, tokens: int, context_length: int) -> ValueError:
    return ValueError(
        f"texts[{index}] ({_beginning(text)}) has {tokens} tokens, SOT and EOT included, and the "
        f"context length is {context_length}; shorten the text, raise context_length, or set "
        "truncate=True to cut it"
    )


def _beginning(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…")


def as_destination(out: Any, count: int, context_length: int) -> torch.Tensor:
    """A caller's buffer as a tensor over the same memory.

    Raises TypeError for what is no tensor or NumPy array of a fitting type, ValueError for one of
    another shape, one that is not contiguous, read-only, or not in the host's memory.
    """
    if _is_from(out, "numpy"):
        if out.dtype.kind not in "iu" or f"torch.{out.dtype.name}" not in map(str, ID_DTYPES):
            raise TypeError(f"out holds int32, int64 or uint16, not {out.dtype}")
        if not out.flags.writeable:
            raise ValueError("out is read-only; pass a copy")
        if not out.flags.c_contiguous:
            raise ValueError("out is not C-contiguous; pass numpy.ascontiguousarray(out)")
        out = torch.from_numpy(out)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"out is a torch tensor or a NumPy array, not {type(out).__name__}")
    if out.dtype not in ID_DTYPES:
        raise TypeError(f"out holds int32, int64 or uint16, not {out.dtype}")
    if out.device.type != "cpu":
        raise ValueError(f"out is on {out.device}; tokenize into pinned memory, then copy")
    if tuple(out.shape) != (count, context_length):
        raise ValueError(
            f"out is {list(out.shape)}; {count} texts of context length {context_length} need "
            f"[{count}, {context_length}]"
        )
    if not out.is_contiguous():
        raise ValueError("out is not contiguous; pass out.contiguous()")
    return out
