"""How long captions are, as tokens with start and end, counted with `fastclip.tokenizer`."""

from __future__ import annotations

import torch

DEMO = {
    3: 3052, 4: 5068, 5: 4020, 6: 1385, 7: 644, 8: 263, 9: 169, 10: 54, 11: 86, 12: 5, 13: 5,
    15: 1, 16: 1,
}  # fmt: skip
"""The training pairs of ``fastclip data demo``: names of pictures."""

WEB = {
    7: 1525, 8: 2085, 9: 2582, 10: 3275, 11: 3861, 12: 4790, 13: 5432, 14: 5890, 15: 6054,
    16: 6427, 17: 6257, 18: 6221, 19: 5893, 20: 5586, 21: 5096, 22: 4561, 23: 3974, 24: 3556,
    25: 3134, 26: 2671, 27: 2388, 28: 1844, 29: 1585, 30: 1221, 31: 1067, 32: 771, 33: 590,
    34: 463, 35: 337, 36: 230, 37: 170, 38: 133, 39: 102, 40: 61, 41: 58, 42: 41, 43: 22, 44: 10,
}  # fmt: skip
"""The corpus "web" of `benchmarks.captions`, made to be like alt texts; the longest 37 left out."""


def draw(name: str, count: int, context_length: int, seed: int = 0) -> list[int]:
    """Lengths of `count` captions: of "demo" or "web" at random, or "dense", all as long as can be.

    Raises:
        ValueError: there are no such captions.
    """
    if name == "dense":
        return [context_length] * count
    if name not in ("demo", "web"):
        raise ValueError(f"captions are demo, web or dense, not {name!r}")
    histogram = DEMO if name == "demo" else WEB
    chances = torch.tensor(list(histogram.values()), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
    lengths = list(histogram)
    return [min(lengths[i], context_length) for i in drawn.tolist()]
