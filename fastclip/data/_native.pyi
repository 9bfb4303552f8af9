from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SLACK: int

def read_members(
    descriptor: int, places: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
) -> tuple[bytes, bytes, bytes] | int: ...

class Resampler:
    def __init__(self, instructions: str = "") -> None: ...
    def resize(
        self,
        source: int,
        capacity: int,
        width: int,
        height: int,
        box: tuple[float, float, float, float],
        size: int,
        out: int,
    ) -> None: ...
    @property
    def instructions(self) -> str: ...

class PhraseTable:
    def __init__(self, phrases: Sequence[str]) -> None: ...
    def match(self, texts: Sequence[str], /) -> tuple[NDArray[np.int64], NDArray[np.int32]]: ...
    def __len__(self) -> int: ...
