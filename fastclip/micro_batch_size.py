"""How many micro-batches a rank's share of the batch needs, so that activations fit in memory.

What a forward pass keeps for backward grows linearly with its pairs: two small passes tell how much
a pair needs. Texts are measured at the whole context length, since no batch's can be longer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from fastclip.models.clip import Clip

logger = logging.getLogger("fastclip")

_SHARE = 0.9
"""Of the free memory that may be planned with: allocators lose some to fragments."""

_FEATURE_BYTES = 32
"""A number of the features, of both towers and their gradients, in fp32 and the loss's operands."""


@dataclass(frozen=True)
class Need:
    """Bytes that a step keeps on its device."""

    per_pair: float
    """Activations of one pair of a micro-batch, at the most."""

    fixed: float
    """Whatever the micro-batches are: pixels of the batch, optimiser states, gradients, features,
    the loss's budget."""


def find_micro_batches(
    model: Clip,
    batch_size: int,
    *,
    loss_budget: int,
    optimizer_bytes: int = 12,
    free: int | None = None,
) -> int:
    """The fewest equal micro-batches of `batch_size` pairs that fit; at most one pair each.

    Args:
        model: on its device, in training mode, with its precision set.
        batch_size: pairs of this rank.
        loss_budget: bytes that the loss may keep.
        optimizer_bytes: of a parameter, for its gradient and statistics; counted whole on each
            rank, as without sharding.
        free: bytes to plan with; None asks the device.

    Raises:
        ValueError: not even micro-batches of one pair fit.
    """
    if model.has_batch_norm:
        logger.info("micro-batches: 1, since BatchNorm's statistics are those of the whole batch")
        return 1
    device = model.logit_scale.device
    if free is None:
        free = free_memory(device)
    need = measure(model, batch_size, loss_budget, optimizer_bytes)
    room = free * _SHARE - need.fixed
    for parts in range(1, batch_size + 1):
        if batch_size % parts == 0 and need.per_pair * (batch_size // parts) <= room:
            break
    else:
        raise ValueError(
            f"a pair's activations ({need.per_pair / 2**20:.0f} MiB) and what a step keeps beside "
            f"them ({need.fixed / 2**30:.1f} GiB) do not fit into {free / 2**30:.1f} GiB of free "
            "memory: recompute activations (run.activation_checkpointing_visual and _text), use "
            "engine.precision=bf16, or more ranks with engine.zero_stage=3"
        )
    logger.info(
        "micro-batches: %d of %d pairs (%.1f MiB of activations a pair, %.1f GiB beside them, "
        "%.1f GiB free)",
        parts,
        batch_size // parts,
        need.per_pair / 2**20,
        need.fixed / 2**30,
        free / 2**30,
    )
    return parts


def measure(model: Clip, batch_size: int, loss_budget: int, optimizer_bytes: int = 12) -> Need:
    """From forward passes of one and of three pairs."""
    few, more = (kept_bytes(model, pairs) for pairs in (1, 3))
    per_pair = max((more - few) / 2, 0.0)
    side = model.config.vision.image_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = (
        few
        - per_pair
        + batch_size * 3 * side**2  # the pixels
        + trained * optimizer_bytes
        + batch_size * model.config.embed_dim * _FEATURE_BYTES
        + loss_budget
    )
    return Need(per_pair + _recomputed_block(model, per_pair), fixed)


def _recomputed_block(model: Clip, per_pair: float) -> float:
    """Bytes a pair of the one block that is there at a time where blocks are computed anew."""
    largest = 0.0
    for tower in (model.visual, model.text):
        if not tower.recompute:
            continue
        tower.recompute = False
        try:
            few, more = (kept_bytes(model, pairs) for pairs in (1, 3))
        finally:
            tower.recompute = True
        spared = (more - few) / 2 - per_pair
        largest = max(largest, spared / len(tower.blocks))  # pyright: ignore[reportArgumentType]
    return largest


def kept_bytes(model: Clip, pairs: int) -> int:
    """What a forward pass of `pairs` keeps for its backward pass, parameters not counted."""
    config = model.config
    device = model.logit_scale.device
    side = config.vision.image_size
    images = torch.zeros(pairs, 3, side, side, dtype=torch.uint8, device=device)
    tokens = torch.zeros(pairs, config.text.context_length, dtype=torch.int32, device=device)
    tokens[:, -1] = config.text.vocab_size - 1
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed address would be counted once for two tensors

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.forward(images, tokens)
    del output
    return sum(kept.values())


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on a GPU; of a host's memory, its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached
    from fastclip.distributed.collectives import world_size

    return psutil.virtual_memory().available // world_size()
