"""What the launcher says of this process: the sole reader of its environment. Needs no torch."""

from __future__ import annotations

import os

_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether deepspeed or torchrun has started this process."""
    return "RANK" in os.environ


def is_main_process() -> bool:
    """Whether this is rank 0, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def check_alone(what: str) -> None:
    """Raise ValueError if a launcher has started several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{what} is one process: start it without a launcher")


def place() -> tuple[int, int, int, int]:
    """Rank, rank on this machine, ranks, ranks on this machine.

    Raises:
        ValueError: the launcher's variables are set in part.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1, 1
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise ValueError(
            f"the environment names a rank but lacks {', '.join(missing)}: start fastclip by "
            "deepspeed or torchrun, which set all of them, or unset RANK and WORLD_SIZE"
        )
    rank, local_rank, ranks = (int(os.environ[name]) for name in _VARIABLES[:3])
    # torchrun's name, and deepspeed's; without either, all ranks are here.
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return rank, local_rank, ranks, int(here) if here else ranks
