"""Where this process stands among the others, and the process group."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastclip.distributed import launcher


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """One rank's place and device."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_world_size: int = 1
    """Ranks on this machine."""
    backend: str
    """"gloo" on CPUs, "nccl" on CUDA devices; "none" without a process group."""

    @classmethod
    def alone(cls, device: torch.device) -> Runtime:
        """One process that needs no process group."""
        return cls(rank=0, local_rank=0, world_size=1, device=device, backend="none")

    @property
    def is_main(self) -> bool:
        """True on rank 0, which writes files."""
        return self.rank == 0


def initialise(device: str = "auto", timeout_minutes: float = 30.0) -> Runtime:
    """Join the process group that the launcher describes, or make one of a single process.

    Raises:
        ValueError: the launcher's variables are set in part, or the device is not there.
    """
    on_cuda = is_on_cuda(device)
    rank, local_rank, world_size, local_world_size = launcher.place()
    where = torch.device("cpu")
    if on_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no CUDA device of its own: this machine has "
                f"{torch.cuda.device_count()}; start fewer ranks per machine"
            )
        where = torch.device("cuda", local_rank)
        torch.cuda.set_device(where)
    backend = "nccl" if on_cuda else "gloo"
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if launcher.launched():
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    return Runtime(
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
        device=where,
        backend=backend,
    )


def initialise_alone(device: str, what: str) -> Runtime:
    """`initialise`, for what one process does.

    Raises:
        ValueError: a launcher has started several ranks, or see `initialise`.
    """
    launcher.check_alone(what)
    return initialise(device)


def is_on_cuda(device: str) -> bool:
    """Whether "auto", "cpu" or "cuda" means a CUDA device.

    Raises:
        ValueError: it is none of these, or the device is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is auto, cpu or cuda, not {device!r}")
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise ValueError("device cuda was asked for and torch sees no CUDA device; use device=cpu")
    return there and device != "cpu"


def shutdown() -> None:
    """Leave the process group; safe to call when there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
