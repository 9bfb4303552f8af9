"""What both losses share: checking their input, agreeing across ranks, open_clip's arguments."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fastclip.distributed.collectives import all_gather_integers, rank, world_size
from fastclip.kernels.reference import compute_dtype

logger = logging.getLogger("fastclip")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LossGradients(NamedTuple):
    """Gradients of a loss by the rank convention; dtypes and shapes are those of the inputs."""

    d_image_features: Tensor
    """[b, D]: world size × the global loss's gradient, so that averages over ranks are exact."""

    d_text_features: Tensor
    """[b, D], likewise."""

    d_logit_scale: Tensor
    """Like logit_scale: the gradient of the global loss, the same on every rank."""

    d_logit_bias: Tensor | None
    """Like logit_bias, the same on every rank; None without a bias."""


@dataclass(frozen=True)
class Ranks:
    """This rank's place in the global batch."""

    group: ProcessGroup | None
    sizes: list[int]
    """Pairs of each rank."""

    index: int

    @property
    def count(self) -> int:
        """Pairs of all ranks, N."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Index of this rank's first pair."""
        return sum(self.sizes[: self.index])


def agree(
    image_features: Tensor,
    text_features: Tensor,
    ids: Tensor | None,
    group: ProcessGroup | None,
    local: bool,
    ranks_alike: bool,
    *options: bool,
) -> Ranks:
    """Check the features here, then compare shapes, dtypes and options with the other ranks.

    Args:
        ranks_alike: take for granted that they are the same everywhere.

    Raises:
        TypeError, ValueError: the input does not fit. When ranks disagree, or one of them has bad
            input, every rank raises, so that none is left waiting.
    """
    problem = _problem(image_features, text_features, ids)
    if local or world_size(group) == 1:
        if problem is not None:
            raise problem
        sizes = [image_features.shape[0]]
        _check_not_empty(sizes)
        return Ranks(group, sizes, 0)
    if world_size(group) < 1:
        raise ValueError("this process is not in the loss's group: only its members may call")
    if ranks_alike:
        if problem is not None:
            raise problem
        sizes = [image_features.shape[0]] * world_size(group)
        _check_not_empty(sizes)
        return Ranks(group, sizes, rank(group))
    own = [0, 0, 0, 0, 0, 0, 1]
    if problem is None:
        shape = image_features.shape
        dtypes = (image_features.dtype, operand_dtype(image_features))
        flags = sum(1 << place for place, option in enumerate(options) if option)
        own = [*shape, *map(_DTYPES.index, dtypes), int(ids is not None), flags, 0]
    rows = all_gather_integers(own, image_features.device, group)
    if problem is not None:
        raise problem
    broken = [index for index, row in enumerate(rows) if row[-1]]
    if broken:
        raise ValueError(f"rank {broken[0]} got features that the loss refuses; see its error")
    for index, row in enumerate(rows):
        if row[1:5] != rows[0][1:5]:
            raise ValueError(
                f"ranks disagree: rank 0 has {_describe(rows[0])}, rank {index} has "
                f"{_describe(row)}; every rank passes the same dimension and dtype, and ids on "
                "all or on none"
            )
        if row[5] != rows[0][5]:
            raise ValueError(
                f"ranks disagree: rank {index} calls the loss with other options (normalize, ring) "
                "than rank 0"
            )
    sizes = [row[0] for row in rows]
    _check_not_empty(sizes)
    return Ranks(group, sizes, rank(group))


def _problem(image: Tensor, text: Tensor, ids: Tensor | None) -> Exception | None:
    if image.ndim != 2 or text.ndim != 2:
        return ValueError(
            f"features are [pairs, dims]; got {list(image.shape)} and {list(text.shape)}"
        )
    if image.shape != text.shape:
        return ValueError(
            f"image and text features pair up row by row; got {list(image.shape)} and "
            f"{list(text.shape)}"
        )
    if image.shape[1] == 0:
        return ValueError("features have no dimensions: [pairs, 0]")
    if image.dtype not in _DTYPES:
        return TypeError(f"features are floating point numbers, not {image.dtype}")
    if image.dtype != text.dtype:
        return TypeError(
            f"both towers' features have one dtype; got {image.dtype} and {text.dtype}"
        )
    if image.device != text.device:
        return ValueError(
            f"both towers' features are on one device; got {image.device} and {text.device}"
        )
    if ids is not None and (ids.dtype != torch.int64 or ids.shape != image.shape[:1]):
        return ValueError(
            f"ids are int64 [{image.shape[0]}], one per pair; got {ids.dtype} {list(ids.shape)}"
        )
    if ids is not None and ids.device != image.device:
        return ValueError(f"ids are on {ids.device}, the features on {image.device}")
    return None


def _check_not_empty(sizes: list[int]) -> None:
    if sum(sizes) == 0:
        raise ValueError("a contrastive loss needs at least one pair; all ranks together have none")


def _describe(row: list[int]) -> str:
    with_ids = "with" if row[4] else "without"
    autocast = "" if row[2] == row[3] else f" under autocast to {_DTYPES[row[3]]}"
    return f"D={row[1]} {_DTYPES[row[2]]}{autocast} {with_ids} ids"


def operand_dtype(features: Tensor) -> torch.dtype:
    """In which features are multiplied: autocast's dtype where it is on, as for any product."""
    device = features.device.type
    if features.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return features.dtype


def scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    """`value` as a tensor of shape [] or [1] on the features' device.

    Raises:
        ValueError: it has another shape.
    """
    if not isinstance(value, Tensor):
        dtype = compute_dtype(like.dtype)
        # A fill, not a copy from the host, which a CUDA graph could not capture.
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name} is one number, of shape [] or [1], not {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the features on {like.device}")
    return value


def check_module_arguments(
    group: ProcessGroup | None, rank_: int | None, world_size_: int | None, use_horovod: bool
) -> bool:
    """Check open_clip's constructor arguments against the group; True: the loss stays local.

    `world_size_` 1 means the batch at hand alone, as in open_clip, also where torch.distributed is
    initialised; None means the group, whatever its size.

    Raises:
        ValueError: they contradict each other or the process group.
    """
    if use_horovod:
        raise ValueError("use_horovod: fastclip communicates through torch.distributed only")
    if world_size_ is None:
        if rank_ is not None:
            raise ValueError(f"rank={rank_} was given without world_size")
        return False
    if world_size_ < 1 or not 0 <= (rank_ or 0) < world_size_:
        raise ValueError(f"rank={rank_} is not one of world_size={world_size_}")
    if world_size_ == 1:
        if group is not None and world_size(group) > 1:
            raise ValueError(f"world_size=1 contradicts a group of {world_size(group)} ranks")
        return True
    if not dist.is_initialized():
        raise ValueError(
            f"world_size={world_size_} needs torch.distributed to be initialised before the loss"
        )
    if world_size_ != world_size(group) or (rank_ is not None and rank_ != rank(group)):
        raise ValueError(
            f"rank={rank_} world_size={world_size_} do not describe this process: it is rank "
            f"{rank(group)} of {world_size(group)}"
        )
    return False


def refuse_second_derivative() -> None:
    """Raise in a backward pass that is itself to be differentiated.

    Without this, what depends on these gradients would count as constant, in silence.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "fastclip's losses have no second derivative: call backward or grad without "
            "create_graph=True"
        )


_said = False


def note_exact_gradients(gather_with_grad: bool) -> None:
    """Say once that the gradient crosses ranks although open_clip's flag asks for less."""
    global _said
    if gather_with_grad or _said:
        return
    _said = True
    logger.info(
        "gather_with_grad=False: fastclip's loss always carries the exact gradient across ranks"
    )
