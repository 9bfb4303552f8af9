"""Configurations in open_clip's and Hugging Face's JSON, and what each layout cannot hold.

Whatever changes a feature and cannot be said in the other format, or in ours, is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastclip.models.config import (
    OPENAI_MEAN,
    OPENAI_STD,
    Activation,
    ClipConfig,
    ResNetConfig,
    TextConfig,
    ViTConfig,
)
from fastclip.models.interop_infer import mlp_ratio
from fastclip.models.interop_names import Layout

# What transformers' CLIPTextConfig and CLIPVisionConfig take for a key that a file leaves out.
_HUGGINGFACE_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_HUGGINGFACE_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Keys of open_clip's JSON that we understand, and values of others that change nothing.
_OPEN_CLIP_MODEL = {
    "embed_dim",
    "vision_cfg",
    "text_cfg",
    "quick_gelu",
    "init_logit_scale",
    "init_logit_bias",
    "custom_text",
}
_OPEN_CLIP_VISION = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
_OPEN_CLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
_OPEN_CLIP_HARMLESS = (
    ("pool_type", "tok"),
    ("pool_type", "argmax"),
    ("pos_embed_type", "learnable"),
    ("proj_type", "linear"),
    ("pad_id", 0),
    ("eos_id", 2),
)


def check_exportable(config: ClipConfig, layout: Layout) -> None:
    """Refuse a model that `layout` cannot describe; the message says what stands in the way."""
    vision, text = config.vision, config.text
    problems = []
    if layout != "fastclip" and config.projection != "linear":
        problems.append("an mlp projection")
    if layout in ("openai", "huggingface") and config.init_logit_bias is not None:
        problems.append("a logit bias")
    if layout == "huggingface" and isinstance(vision, ResNetConfig):
        problems.append("a ResNet image tower")
    same = isinstance(vision, ResNetConfig) or vision.activation == text.activation
    if layout in ("openai", "open_clip") and not same:
        problems.append("towers with different activations")
    if layout == "openai":
        problems += _against_openai(config)
    if problems:
        raise ValueError(
            f"the {layout} layout cannot hold {', '.join(problems)}; the fastclip layout can"
        )


def _against_openai(config: ClipConfig) -> list[str]:
    vision, text = config.vision, config.text
    vision_width = vision.feature_width if isinstance(vision, ResNetConfig) else vision.width
    transformers = [text] if isinstance(vision, ResNetConfig) else [text, vision]
    rules = {
        "an activation other than quick_gelu": text.activation != "quick_gelu",
        "heads of other than 64 channels": (
            vision_width != 64 * vision.heads or text.width != 64 * text.heads
        ),
        "an mlp_ratio other than 4": any(t.mlp_width != 4 * t.width for t in transformers),
        "another image_mean or image_std than OpenAI's": (
            (config.image_mean, config.image_std) != (OPENAI_MEAN, OPENAI_STD)
        ),
    }
    return [problem for problem, present in rules.items() if present]


def to_open_clip(config: ClipConfig) -> dict[str, Any]:
    """The content of ``open_clip_config.json``."""
    vision, text = config.vision, config.text
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size, "width": vision.width}
    if isinstance(vision, ResNetConfig):
        vision_cfg |= {
            "layers": list(vision.layers),
            "head_width": vision.feature_width // vision.heads,
        }
    else:
        vision_cfg |= {
            "layers": vision.layers,
            "head_width": vision.width // vision.heads,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.mlp_ratio,
        }
    model_cfg: dict[str, Any] = {
        "embed_dim": config.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": vision_cfg,
        "text_cfg": {
            "context_length": text.context_length,
            "vocab_size": text.vocab_size,
            "width": text.width,
            "heads": text.heads,
            "layers": text.layers,
            "mlp_ratio": text.mlp_ratio,
        },
    }
    if config.init_logit_bias is not None:
        model_cfg["init_logit_bias"] = config.init_logit_bias
    preprocess = {"mean": list(config.image_mean), "std": list(config.image_std)}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess}


def from_open_clip(content: Mapping[str, Any], where: str) -> ClipConfig:
    """Read ``open_clip_config.json``; an option that we do not have is an error naming it."""
    model = content.get("model_cfg", content)
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    for cfg, known in (
        (model, _OPEN_CLIP_MODEL),
        (vision, _OPEN_CLIP_VISION),
        (text, _OPEN_CLIP_TEXT),
    ):
        _refuse_unknown(cfg, known, where)
    activation: Activation = "quick_gelu" if model.get("quick_gelu", False) else "gelu"
    side = _square(vision.get("image_size", 224), where)
    head_width = vision.get("head_width", 64)
    if isinstance(vision.get("layers", 12), list):
        width = vision.get("width", 64)
        tower = ResNetConfig(
            image_size=side,
            layers=tuple(vision["layers"]),
            width=width,
            heads=width * 32 // head_width,
        )
    else:
        width = vision.get("width", 768)
        tower = ViTConfig(
            image_size=side,
            patch_size=vision.get("patch_size", 16),
            width=width,
            layers=vision.get("layers", 12),
            heads=width // head_width,
            mlp_ratio=float(vision.get("mlp_ratio", 4.0)),
            activation=activation,
        )
    preprocess = content.get("preprocess_cfg") or {}
    log_scale = model.get("init_logit_scale")
    return ClipConfig(
        embed_dim=model["embed_dim"],
        vision=tower,
        text=TextConfig(
            context_length=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408),
            width=text.get("width", 512),
            heads=text.get("heads", 8),
            layers=text.get("layers", 12),
            mlp_ratio=float(text.get("mlp_ratio", 4.0)),
            activation=activation,
        ),
        init_temperature=0.07 if log_scale is None else math.exp(-log_scale),
        init_logit_bias=model.get("init_logit_bias"),
        image_mean=tuple(preprocess.get("mean", OPENAI_MEAN)),
        image_std=tuple(preprocess.get("std", OPENAI_STD)),
    )


def _refuse_unknown(cfg: Mapping[str, Any], known: set[str], where: str) -> None:
    for key, value in cfg.items():
        # open_clip writes its options out; empty, zero and false switch an option off.
        if key not in known and value and (key, value) not in _OPEN_CLIP_HARMLESS:
            raise ValueError(f"{where}: fastclip's towers have no option {key}={value!r}")


def _square(size: Any, where: str) -> int:
    sides = size if isinstance(size, list) else [size]
    if len(set(sides)) != 1:
        raise ValueError(f"{where}: images are square in fastclip, not {size!r}")
    return sides[0]


def to_huggingface(config: ClipConfig) -> dict[str, Any]:
    """The content of a `transformers.CLIPModel`'s ``config.json``."""
    vision, text = config.vision, config.text
    assert isinstance(vision, ViTConfig)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.embed_dim,
        "logit_scale_init_value": -math.log(config.init_temperature),
        "text_config": {
            "model_type": "clip_text_model",
            "projection_dim": config.embed_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **_huggingface_transformer(text),
            # transformers pools at the largest id, as CLIP does, only when this is 2; otherwise at
            # the first such id, which is position 0 in a text without one. OpenAI's own files on
            # the hub carry these three values too.
            "eos_token_id": 2,
            "bos_token_id": 0,
            "pad_token_id": 1,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "projection_dim": config.embed_dim,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **_huggingface_transformer(vision),
        },
    }


def _huggingface_transformer(tower: ViTConfig | TextConfig) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": tower.activation,
        "layer_norm_eps": 1e-5,
    }


def to_huggingface_preprocessor(config: ClipConfig) -> dict[str, Any]:
    """The content of ``preprocessor_config.json``: bicubic resize, centre crop, normalisation."""
    side = config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(config.image_mean),
        "image_std": list(config.image_std),
    }


def from_huggingface(
    content: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str
) -> ClipConfig:
    """Read a CLIP's ``config.json`` and, where there is one, its ``preprocessor_config.json``."""
    if content.get("model_type") != "clip":
        raise ValueError(f"{where} describes a {content.get('model_type')!r} model, not a 'clip'")
    # Old files repeat a tower's settings under *_config_dict, which transformers prefers.
    text = _HUGGINGFACE_TEXT | _sections(content, "text_config")
    vision = _HUGGINGFACE_VISION | _sections(content, "vision_config")
    for tower in (text, vision):
        if tower["layer_norm_eps"] != 1e-5:
            raise ValueError(f"{where}: layer_norm_eps is 1e-5, not {tower['layer_norm_eps']}")
    return ClipConfig(
        embed_dim=content.get("projection_dim", 512),
        vision=ViTConfig(
            image_size=_square(vision["image_size"], where),
            patch_size=_square(vision["patch_size"], where),
            **_from_huggingface_transformer(vision),
        ),
        text=TextConfig(
            context_length=text["max_position_embeddings"],
            vocab_size=text["vocab_size"],
            **_from_huggingface_transformer(text),
        ),
        init_temperature=math.exp(-content.get("logit_scale_init_value", -math.log(0.07))),
        image_mean=tuple(preprocessor.get("image_mean", OPENAI_MEAN)),
        image_std=tuple(preprocessor.get("image_std", OPENAI_STD)),
    )


def _sections(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {**(content.get(name) or {}), **(content.get(f"{name}_dict") or {})}


def _from_huggingface_transformer(tower: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": tower["hidden_size"],
        "layers": tower["num_hidden_layers"],
        "heads": tower["num_attention_heads"],
        "mlp_ratio": mlp_ratio(tower["hidden_size"], tower["intermediate_size"]),
        "activation": tower["hidden_act"],
    }
