"""Counts calls of operators while it is entered."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorCounts(TorchDispatchMode):
    """How often operators of these names (``aten::mm``) were called, overloads together."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.name().partition(".")[0] in self.names
        return func(*args, **(kwargs or {}))
