"""Approximate search by faiss: features in lists, of which the nearest few are looked through.

The lists are those of k-means (an inverted file), their entries 8 bits a dimension; the best of
them are compared again by the stored features. faiss's own files are not used, as reading one
trusts it: the arrays are kept as safetensors, checked, and given to faiss in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

TRAINED_PER_LIST = 40
"""Features that k-means is given for each list."""

_ITERATIONS = 10
_SEED = 1234
_AT_A_TIME = 32_768


def find_faiss() -> Any:
    """The module faiss.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss  # pyright: ignore[reportMissingImports, reportMissingTypeStubs]
    except ImportError as error:
        raise ImportError(
            f"approximate search needs faiss ({error}): pip install 'fastclip-torch[search]', or "
            "embed with --vectors flat"
        ) from None
    return faiss


class Lists:
    """Features in lists. For any number of threads.

    Args:
        centroids: fp32 [L, D], of unit length.
        ranges: fp32 [2, D], the least value of each dimension and the span of its 256 steps.
        ends: int64 [L], where each list ends among the entries.
        numbers: int32 [N], records in the order of the lists.
        codes: uint8 [N, D], their features.
    """

    def __init__(
        self, centroids: Tensor, ranges: Tensor, ends: Tensor, numbers: Tensor, codes: Tensor
    ) -> None:
        faiss = find_faiss()
        self.lists, dim = centroids.shape
        self._faiss = faiss
        self._index = _empty_index(faiss, self.lists, dim)
        self._index.quantizer.add(np.ascontiguousarray(centroids.numpy()))
        faiss.copy_array_to_vector(ranges.numpy().reshape(-1), self._index.sq.trained)
        self._index.is_trained = True
        begin = 0
        for number, end in enumerate(ends.tolist()):
            if end > begin:
                ids = numbers[begin:end].numpy().astype(np.int64)
                part = np.ascontiguousarray(codes[begin:end].numpy())
                self._index.invlists.add_entries(
                    number, end - begin, faiss.swig_ptr(ids), faiss.swig_ptr(part)
                )
            begin = end
        self._index.ntotal = len(numbers)

    def candidates(self, queries: Tensor, count: int, probes: int) -> NDArray[np.int64]:
        """Records that are probably among each query's nearest; [M, count], -1 where none is left.

        Args:
            queries: fp32 [M, D] of unit length.
            count: how many.
            probes: lists that are looked through for them.
        """
        parameters = self._faiss.SearchParametersIVF(nprobe=min(probes, self.lists))
        _, numbers = self._index.search(
            np.ascontiguousarray(queries.numpy()), count, params=parameters
        )
        return numbers


def list_count(count: int) -> int:
    """Lists for so many records: a query's centroids and its entries then cost alike."""
    return max(1, min(round(4 * count**0.5), count // TRAINED_PER_LIST, 65_536))


def build_lists(parts: Sequence[Tensor], path: Path) -> Lists:
    """Sort features into lists, and write these to `path`, whole or not at all.

    The same features give the same file on the same machine.

    Args:
        parts: of unit length, fp16 or fp32 [n, D], numbered on from part to part.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = find_faiss()
    count, dim = sum(len(part) for part in parts), parts[0].shape[1]
    lists = list_count(count)
    index = _empty_index(faiss, lists, dim)
    index.cp.niter, index.cp.seed, index.cp.spherical = _ITERATIONS, _SEED, True
    index.train(_sample(parts, count, lists * TRAINED_PER_LIST))
    for chunk in _chunks(parts):
        index.add(chunk)
    sizes = [index.invlists.list_size(number) for number in range(lists)]
    numbers = np.empty(count, np.int32)
    codes = np.empty((count, index.code_size), np.uint8)
    begin = 0
    for number, size in enumerate(sizes):
        if size:
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
            part = faiss.rev_swig_ptr(index.invlists.get_codes(number), size * index.code_size)
            numbers[begin : begin + size] = ids
            codes[begin : begin + size] = part.reshape(size, -1)
        begin += size
    trained = faiss.vector_to_array(index.sq.trained).reshape(2, dim)
    centroids = index.quantizer.reconstruct_n(0, lists)
    del index
    tensors = {
        "centroids": torch.from_numpy(centroids),
        "ranges": torch.from_numpy(trained.copy()),
        "ends": torch.from_numpy(np.cumsum(sizes, dtype=np.int64)),
        "numbers": torch.from_numpy(numbers),
        "codes": torch.from_numpy(codes),
    }
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    return Lists(**tensors)


def load_lists(path: Path, *, count: int, embed_dim: int) -> Lists:
    """Read what `build_lists` wrote.

    Raises:
        ImportError: faiss is not installed.
        FileNotFoundError, ValueError: it is not there, or not of so many records.
    """
    try:
        tensors = load_file(path)
        _check(tensors, count, embed_dim)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is not there: make it anew with fastclip embed --vectors ivf"
        ) from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and index.json's entry of it, or make the "
            "index anew with fastclip embed"
        ) from None
    return Lists(**tensors)


def _check(tensors: dict[str, Tensor], count: int, embed_dim: int) -> None:
    """Everything that faiss would trust."""
    lists = len(tensors["ends"])
    expected = {
        "centroids": (torch.float32, (lists, embed_dim)),
        "ranges": (torch.float32, (2, embed_dim)),
        "ends": (torch.int64, (lists,)),
        "numbers": (torch.int32, (count,)),
        "codes": (torch.uint8, (count, embed_dim)),
    }
    if tensors.keys() != expected.keys():
        raise ValueError("it holds other arrays")
    for name, (dtype, shape) in expected.items():
        if tensors[name].dtype != dtype or tensors[name].shape != shape:
            raise ValueError(f"its {name} are {tensors[name].dtype} {list(tensors[name].shape)}")
    ends = tensors["ends"].numpy()
    if not lists or (np.diff(ends, prepend=0) < 0).any() or ends[-1] != count:
        raise ValueError("its lists overlap")
    numbers = tensors["numbers"].numpy()
    if numbers.min() < 0 or (np.bincount(numbers, minlength=count) != 1).any():
        raise ValueError("a record is not in it once")
    if not tensors["centroids"].isfinite().all() or not tensors["ranges"].isfinite().all():
        raise ValueError("its centroids are no numbers")


def _empty_index(faiss: Any, lists: int, dim: int) -> Any:
    return faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(dim),
        dim,
        lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
        False,  # entries are features themselves, not what is left of them beside the centroid
    )


def _sample(parts: Sequence[Tensor], count: int, most: int) -> NDArray[np.float32]:
    """Features drawn without repetition, in their order."""
    rng = np.random.default_rng(_SEED)
    chosen = np.sort(rng.choice(count, min(count, most), replace=False))
    found, first = [], 0
    for part in parts:
        own = chosen[np.searchsorted(chosen, first) : np.searchsorted(chosen, first + len(part))]
        found.append(part[torch.from_numpy(own - first)].float())
        first += len(part)
    return torch.cat(found).numpy()


def _chunks(parts: Sequence[Tensor]) -> Iterator[NDArray[np.float32]]:
    for part in parts:
        for chunk in part.split(_AT_A_TIME):
            if len(chunk):
                yield chunk.float().numpy()
