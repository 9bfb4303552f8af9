"""How far two images show the same pixels, whatever was cut off at the edges of one of them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 32
"""Pixels of each side of the images that are compared."""

_ZOOMS = (0.9, 0.925, 0.95, 0.975)
_PLACES = (0.0, 0.5, 1.0)
_CONTRASTS = 1.6
"""Factor up to which copies may differ in contrast: beyond it, what is white and peach would agree
with what is white and orange."""


def aligned_correlation(first: Tensor, second: Tensor, pairs: Tensor) -> Tensor:
    """Greatest correlation of one image's pixels with those of a part of the other, fp32 [pairs].

    The parts are the whole and 36 boxes of 90 to 97.5 % of its sides, at its corners, edges and
    middle. Brightness does not count, nor contrast up to a factor of 1.6 (with more, the two do not
    correlate); colour does: the three channels are one vector. A grey image without contrast
    correlates with nothing (0) but itself; of one in a single colour, the hue alone counts.

    Args:
        first, second: uint8 [M, 3, 32, 32] and [N, 3, 32, 32], the whole of each image.
        pairs: int64 [2, pairs], rows of `first` and of `second`.
    """
    (one, spread), (other, spreads) = (_standardised(_parts(x.float())) for x in (first, second))
    best = []
    for some in pairs.split(64, dim=1):  # each image's parts are half a megabyte
        left, right = some
        forth = _correlated(one[left, :1], other[right], spread[left, :1], spreads[right])
        back = _correlated(other[right, :1], one[left], spreads[right, :1], spread[left])
        same = (first[left] == second[right]).flatten(1).all(dim=1)
        best.append(torch.maximum(forth, back).masked_fill(same, 1.0))
    return torch.cat(best)


def _correlated(whole: Tensor, parts: Tensor, spread: Tensor, spreads: Tensor) -> Tensor:
    """Greatest correlation [B] of images [B, 1, values] and parts of others [B, parts, values]."""
    alike = torch.maximum(spread, spreads) <= _CONTRASTS * torch.minimum(spread, spreads)
    return ((whole * parts).sum(dim=2) * alike).amax(dim=1)


def _parts(images: Tensor) -> Tensor:
    """Each image and its boxes, resized to the image's size, [B, 37, 3, R, R]."""
    parts = [images]
    for zoom, down, across in itertools.product(_ZOOMS, _PLACES, _PLACES):
        # The box's centre, in coordinates from -1 to 1.
        y, x = ((2 * place - 1) * (1 - zoom) for place in (down, across))
        theta = torch.tensor([[zoom, 0, x], [0, zoom, y]]).expand(len(images), 2, 3)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        parts.append(F.grid_sample(images, grid, padding_mode="border", align_corners=False))
    return torch.stack(parts, dim=1)


def _standardised(images: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of mean 0 and norm 1 [B, parts, values], and the norm that they had [B, parts]."""
    flat = images.flatten(2)
    flat = flat - flat.mean(dim=2, keepdim=True)
    return F.normalize(flat, dim=2, eps=1e-3), flat.norm(dim=2)
