"""The paper's nine models (arXiv 2103.00020, Tables 19 and 20) and two small ones for a laptop.

`RN-Nano` and `ViT-Nano-8` see 64-pixel pictures and 32 tokens. They are sized so that two CPU cores
train them on a hundred thousand small drawings in an afternoon, and so that tests are quick.
"""

from __future__ import annotations

import difflib

from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig


def _resnet(
    embed_dim: int, image_size: int, layers: tuple[int, int, int, int], width: int, text_width: int
) -> ClipConfig:
    # The paper gives the pooled feature's width, 32 times the stem's, and heads of 64 channels.
    return ClipConfig(
        embed_dim=embed_dim,
        vision=ResNetConfig(
            image_size=image_size, layers=layers, width=width, heads=width * 32 // 64
        ),
        text=TextConfig(width=text_width, heads=text_width // 64),
    )


def _vit(
    embed_dim: int, image_size: int, patch_size: int, layers: int, width: int, text_width: int
) -> ClipConfig:
    return ClipConfig(
        embed_dim=embed_dim,
        vision=ViTConfig(
            image_size=image_size,
            patch_size=patch_size,
            width=width,
            layers=layers,
            heads=width // 64,
        ),
        text=TextConfig(width=text_width, heads=text_width // 64),
    )


_NANO_TEXT = TextConfig(context_length=32, width=128, heads=2, layers=3)

PRESETS: dict[str, ClipConfig] = {
    "RN50": _resnet(1024, 224, (3, 4, 6, 3), 64, 512),
    "RN101": _resnet(512, 224, (3, 4, 23, 3), 64, 512),
    "RN50x4": _resnet(640, 288, (4, 6, 10, 6), 80, 640),
    "RN50x16": _resnet(768, 384, (6, 8, 18, 8), 96, 768),
    "RN50x64": _resnet(1024, 448, (3, 15, 36, 10), 128, 1024),
    "ViT-B-32": _vit(512, 224, 32, 12, 768, 512),
    "ViT-B-16": _vit(512, 224, 16, 12, 768, 512),
    "ViT-L-14": _vit(768, 224, 14, 24, 1024, 768),
    "ViT-L-14-336": _vit(768, 336, 14, 24, 1024, 768),
    "RN-Nano": ClipConfig(
        embed_dim=256,
        vision=ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=16, heads=8),
        text=_NANO_TEXT,
    ),
    "ViT-Nano-8": ClipConfig(
        embed_dim=256,
        vision=ViTConfig(image_size=64, patch_size=8, width=96, layers=4, heads=3),
        text=_NANO_TEXT,
    ),
}


def preset(name: str) -> ClipConfig:
    """The configuration called `name`.

    Raises:
        ValueError: there is none; the message names the nearest and lists all.
    """
    if name not in PRESETS:
        lower = {known.lower(): known for known in PRESETS}
        near = difflib.get_close_matches(name.lower().replace("/", "-"), lower, n=1, cutoff=0.5)
        hint = f"; did you mean {lower[near[0]]!r}?" if near else "."
        raise ValueError(f"no preset is called {name!r}{hint} There are {', '.join(PRESETS)}.")
    return PRESETS[name]
