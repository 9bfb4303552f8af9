"""What is measured: shapes as data, in named sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

INITIAL_SCALE = 14.3
"""1/0.07, CLIP's temperature at the start of training; 100 is its bound."""


@dataclass(frozen=True)
class Case:
    """One problem; two rows are comparable when their cases are equal."""

    pairs: int
    """N, pairs over all ranks."""

    dims: int
    """D."""

    dtype: str = "bf16"
    """Of the features: bf16, fp16 or fp32."""

    scale: float = INITIAL_SCALE
    """Multiplies the cosines."""

    noise: float = 5.0
    """Length of what separates the text of a pair from its image, relative to the image: their
    cosine is about 1/√(1 + noise²), so that a small noise is a converged model."""

    normalize: bool = False
    """Features come at any length, and bringing them to unit length is part of the work."""

    part: Literal["step", "forward"] = "step"
    """A step is the loss and its gradients."""

    world: int = 1
    """Ranks that share the pairs; what is measured is one rank's rows against all columns, without
    communication."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {', '.join(DTYPES)}, not {self.dtype!r}")
        if min(self.pairs, self.dims, self.world) < 1 or self.pairs % self.world:
            raise ValueError(
                f"pairs, dims and world are at least 1 and world divides pairs, not "
                f"{self.pairs}, {self.dims} and {self.world}"
            )

    @property
    def rows(self) -> int:
        """b, rows of this rank."""
        return self.pairs // self.world

    @property
    def unit(self) -> int:
        """u = 2·b·N·D, FLOP of one product of the size of the similarity matrix."""
        return 2 * self.rows * self.pairs * self.dims

    @property
    def element_bytes(self) -> int:
        """Bytes of a feature."""
        return DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        extras = [f"noise {self.noise:g}"] if self.noise != 5.0 else []
        extras += ["normalise"] if self.normalize else []
        extras += ["forward"] if self.part == "forward" else []
        extras += [f"1/{self.world} of the rows"] if self.world > 1 else []
        return ", ".join(
            [f"N={self.pairs}", f"D={self.dims}", self.dtype, f"scale {self.scale:g}", *extras]
        )


def _sets(scale: float, **sets: tuple[Case, ...]) -> dict[str, tuple[Case, ...]]:
    """Both losses' sets, of which some are the same but for the scale; `all` is every case once."""
    wide = {
        "headline": (
            Case(65_536, 768, scale=scale),
            Case(65_536, 768, scale=100.0),
            Case(65_536, 768, scale=scale, normalize=True),
        ),
        "ceiling": (
            *(Case(pairs, 768, scale=scale) for pairs in (131_072, 262_144, 524_288)),
            Case(1_048_576, 512, scale=scale),
        ),
        "forward": tuple(
            Case(32_768, dims, scale=scale, part="forward") for dims in (512, 768, 1024)
        ),
        "stripe": tuple(
            Case(pairs, 768, scale=scale, world=8) for pairs in (65_536, 131_072, 262_144, 524_288)
        ),
        # Headline first: an interrupted run has measured what matters most.
        "small": (
            Case(65_536, 768, scale=scale),
            Case(8_192, 768, scale=scale),
            Case(32_768, 512, scale=scale),
            Case(32_768, 768, scale=scale),
            Case(32_768, 768, scale=scale, normalize=True),
        ),
        **sets,
    }
    union = dict.fromkeys(case for cases in wide.values() for case in cases)
    tiny = (
        Case(48, 16, "fp32", scale),
        Case(40, 24, "fp32", scale, normalize=True),
        Case(32, 16, "fp32", scale, part="forward"),
        Case(32, 16, "fp32", scale, world=4),
    )
    return {**wide, "all": tuple(union), "tiny": tiny}


CONTRASTIVE_SETS = _sets(
    INITIAL_SCALE,
    grid=tuple(
        Case(pairs, dims, scale=scale)
        for pairs in (8_192, 32_768, 65_536)
        for dims in (512, 768, 1024)
        for scale in (INITIAL_SCALE, 100.0)
    ),
    # From a loss near log N to a converged one; and the size at which skipped gradients show.
    accuracy=(
        Case(2_048, 512, noise=8.0),
        Case(2_048, 512, scale=100.0, noise=8.0),
        Case(2_048, 768, scale=100.0, noise=8.0),
        Case(2_048, 512, scale=100.0),
        Case(2_048, 512, scale=100.0, noise=2.0),
        Case(65_536, 768, noise=8.0),
    ),
)

SIGMOID_SETS = _sets(
    10.0,  # the paper's scale at the start of training
    grid=tuple(
        Case(pairs, dims, scale=10.0)
        for pairs in (8_192, 32_768, 65_536)
        for dims in (512, 768, 1024)
    ),
    accuracy=(
        Case(2_048, 512, scale=10.0, noise=8.0),
        Case(2_048, 512, scale=100.0, noise=8.0),
        Case(2_048, 512, scale=100.0, noise=2.0),
    ),
)
