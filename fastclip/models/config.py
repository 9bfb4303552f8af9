"""What a CLIP model is built from: one frozen dataclass per tower, composed in `ClipConfig`.

Sizes follow arXiv 2103.00020, Tables 19 and 20; `fastclip.models.presets` holds the paper's nine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Activation = Literal["quick_gelu", "gelu"]
Compiled = Literal["none", "blocks", "towers"]
Recompute = Literal["none", "selective", "full"]
Projection = Literal["linear", "mlp"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

_RESNET_STRIDE = 32  # stem 4, then three stages that halve the side
_BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """A Vision Transformer (arXiv 2010.11929) with CLIP's LayerNorm before the blocks."""

    image_size: int = 224
    """Side of the square input in pixels; a multiple of `patch_size`."""

    patch_size: int = 32
    """Side of a patch in pixels."""

    width: int = 768
    """Channels of a token."""

    layers: int = 12
    """Residual blocks."""

    heads: int = 12
    """Attention heads per block; a divisor of `width`."""

    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP over `width`."""

    activation: Activation = "quick_gelu"
    """The MLP's non-linearity; the paper's released weights use quick_gelu, x·sigmoid(1.702 x)."""

    def __post_init__(self) -> None:
        _check_positive(self, "image_size", "patch_size", "width", "layers", "heads")
        _check_transformer(self)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViTConfig.image_size={self.image_size} is not a multiple of "
                f"patch_size={self.patch_size}"
            )

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """CLIP's ResNet: three stem convolutions, anti-aliased strides, attention pooling."""

    image_size: int = 224
    """Side of the square input in pixels; a multiple of 32."""

    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    """Bottleneck blocks of the four stages."""

    width: int = 64
    """Channels after the stem; the pooled feature has 32 times as many."""

    heads: int = 32
    """Heads of the attention pooling; a divisor of 32·`width`."""

    def __post_init__(self) -> None:
        _check_positive(self, "image_size", "width", "heads")
        if len(self.layers) != 4 or not all(_is_int(n) and n > 0 for n in self.layers):
            raise ValueError(
                f"ResNetConfig.layers has four positive whole numbers, not {self.layers!r}"
            )
        if self.width % 2:
            raise ValueError(f"ResNetConfig.width={self.width} is odd; the stem halves it")
        if self.image_size % _RESNET_STRIDE:
            raise ValueError(
                f"ResNetConfig.image_size={self.image_size} is not a multiple of {_RESNET_STRIDE}"
            )
        if self.feature_width % self.heads:
            raise ValueError(
                f"ResNetConfig.heads={self.heads} does not divide the pooled feature's "
                f"{self.feature_width} channels"
            )

    @property
    def feature_width(self) -> int:
        """Channels of the last stage, which the attention pooling works on."""
        return self.width * 8 * _BOTTLENECK_EXPANSION

    @property
    def grid_size(self) -> int:
        """Positions along one side of the last stage's feature map."""
        return self.image_size // _RESNET_STRIDE


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The causal text transformer, read out at the end-of-text token."""

    context_length: int = 77
    """Most tokens of a text, start and end of text included."""

    vocab_size: int = 49408
    """Entries of the vocabulary; end of text is the last and must stay the largest id."""

    width: int = 512
    """Channels of a token."""

    heads: int = 8
    """Attention heads per block; a divisor of `width`."""

    layers: int = 12
    """Residual blocks."""

    mlp_ratio: float = 4.0
    """Hidden channels of a block's MLP over `width`."""

    activation: Activation = "quick_gelu"
    """The MLP's non-linearity; the paper's released weights use quick_gelu, x·sigmoid(1.702 x)."""

    def __post_init__(self) -> None:
        _check_positive(self, "context_length", "vocab_size", "width", "heads", "layers")
        _check_transformer(self)

    @property
    def mlp_width(self) -> int:
        """Hidden channels of a block's MLP."""
        return int(self.width * self.mlp_ratio)


VisionConfig = ViTConfig | ResNetConfig


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """A whole model: two towers, the space they meet in, and the temperature."""

    embed_dim: int
    """Channels of the shared embedding space."""

    vision: VisionConfig
    """The image tower."""

    text: TextConfig
    """The text tower."""

    init_temperature: float = 0.07
    """Temperature at the start; the learned parameter is the logarithm of its inverse."""

    max_logit_scale: float = 100.0
    """Upper bound of the inverse temperature (the paper's "prevent scaling the logits by more")."""

    init_logit_bias: float | None = None
    """Bias of the logits at the start, for the sigmoid loss (SigLIP: -10); None for no bias."""

    projection: Projection = "linear"
    """Map into the shared space: linear as in the paper, or ConVIRT's mlp with one ReLU."""

    image_mean: tuple[float, float, float] = OPENAI_MEAN
    """Mean of red, green and blue that is subtracted from pixels in [0, 1]."""

    image_std: tuple[float, float, float] = OPENAI_STD
    """Standard deviation that red, green and blue are then divided by."""

    def __post_init__(self) -> None:
        _check_positive(self, "embed_dim")
        if not isinstance(self.vision, ViTConfig | ResNetConfig):
            raise ValueError(
                f"ClipConfig.vision is a ViTConfig or a ResNetConfig, not {self.vision!r}"
            )
        if not isinstance(self.text, TextConfig):
            raise ValueError(f"ClipConfig.text is a TextConfig, not {self.text!r}")
        for name in ("init_temperature", "max_logit_scale"):
            if not _is_number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(
                    f"ClipConfig.{name} is a positive number, not {getattr(self, name)!r}"
                )
        if 1 / self.init_temperature > self.max_logit_scale:
            raise ValueError(
                f"ClipConfig.init_temperature={self.init_temperature} starts above "
                f"max_logit_scale={self.max_logit_scale}"
            )
        if self.init_logit_bias is not None and not _is_number(self.init_logit_bias):
            raise ValueError(
                f"ClipConfig.init_logit_bias is a number or None, not {self.init_logit_bias!r}"
            )
        _check_choice(self, "projection", get_args(Projection))
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(_is_number(value) for value in values):
                raise ValueError(f"ClipConfig.{name} has three numbers, not {values!r}")
        if not all(value > 0 for value in self.image_std):
            raise ValueError(f"ClipConfig.image_std is positive, not {self.image_std!r}")


def to_dict(config: ClipConfig) -> dict[str, Any]:
    """`config` as plain data for JSON; every object carries its class name as ``type``."""
    return _plain(config)


def from_dict(value: Mapping[str, Any], where: str = "model config") -> ClipConfig:
    """Rebuild the configuration that `to_dict` wrote; the two are equal in every field.

    Raises:
        ValueError: a field is missing, unknown or out of range; the message begins with `where`.
    """
    config = _rebuild(value, where)
    if not isinstance(config, ClipConfig):
        raise ValueError(f"{where} describes a {type(config).__name__}, not a ClipConfig")
    return config


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return list(value) if isinstance(value, tuple) else value


def _rebuild(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, Mapping):
        return value
    kinds = {kind.__name__: kind for kind in (ClipConfig, ViTConfig, ResNetConfig, TextConfig)}
    kind = kinds.get(value.get("type", "ClipConfig"))
    if kind is None:
        raise ValueError(f"{where}.type is one of {', '.join(kinds)}, not {value['type']!r}")
    fields = {k: _rebuild(v, f"{where}.{k}") for k, v in value.items() if k != "type"}
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _check_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_int(value) or value < 1:
            raise ValueError(
                f"{type(config).__name__}.{name} is a positive whole number, not {value!r}"
            )


def _check_transformer(config: ViTConfig | TextConfig) -> None:
    owner = type(config).__name__
    if config.width % config.heads:
        raise ValueError(f"{owner}.heads={config.heads} does not divide width={config.width}")
    if not _is_number(config.mlp_ratio) or config.mlp_width < 1:
        raise ValueError(f"{owner}.mlp_ratio is a positive number, not {config.mlp_ratio!r}")
    _check_choice(config, "activation", get_args(Activation))


def _check_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(config, name)
    if value not in choices:
        names = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(config).__name__}.{name} is {names}, not {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
