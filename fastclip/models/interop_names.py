"""Parameter names of CLIP in four projects, and the ways between them and ours.

OpenAI and open_clip share their names; open_clip's models with a "custom" text tower put ``text.``
before that tower's. Hugging Face's `CLIPModel` keeps queries, keys and values apart. Every
conversion is a renaming, a transposition or a (de)concatenation, so it applies to gradients too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Layout = Literal["fastclip", "openai", "open_clip", "huggingface"]
LAYOUTS: tuple[Layout, ...] = ("fastclip", "openai", "open_clip", "huggingface")

# Whole numbers that OpenAI's archives carry beside the weights.
OPENAI_CONSTANTS = ("input_resolution", "context_length", "vocab_size")

_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile
_PLAIN_TEXT = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
_CONSTANT_BUFFERS = ("attn_mask", "position_ids")


@dataclass(frozen=True)
class _Names:
    """How another project names our parameters."""

    replace: tuple[tuple[str, str], ...]
    """Pieces of a name, ours and theirs, applied in this order from ours to theirs."""

    split: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Pieces that are one tensor of ours and several of theirs, concatenated along dimension 0."""

    transposed: tuple[tuple[str, str], ...] = ()
    """Whole names of matrices that they store the other way round."""


_BLOCK = (
    (".blocks.", ".transformer.resblocks."),
    (".attn.qkv.", ".attn.in_proj_"),
    (".attn.out.", ".attn.out_proj."),
    (".mlp.fc.", ".mlp.c_fc."),
    (".mlp.proj.", ".mlp.c_proj."),
)
_OPENAI_VIT = _Names(
    replace=(*_BLOCK, ("visual.patch_embedding.", "visual.conv1.")),
    transposed=(("visual.proj.weight", "visual.proj"), ("text.proj.weight", "text_projection")),
)
_OPENAI_RESNET = _Names(
    replace=(
        *_BLOCK,
        ("visual.attnpool.query.", "visual.attnpool.q_proj."),
        ("visual.attnpool.out.", "visual.attnpool.c_proj."),
    ),
    split=(("visual.attnpool.key_value.", ("visual.attnpool.k_proj.", "visual.attnpool.v_proj.")),),
    transposed=(("text.proj.weight", "text_projection"),),
)
_HUGGINGFACE = _Names(
    replace=(
        ("visual.blocks.", "vision_model.encoder.layers."),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.patch_embedding.", "vision_model.embeddings.patch_embedding."),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
        ("visual.ln_pre.", "vision_model.pre_layrnorm."),
        ("visual.ln_post.", "vision_model.post_layernorm."),
        ("visual.proj.", "visual_projection."),
        ("text.blocks.", "text_model.encoder.layers."),
        ("text.token_embedding.", "text_model.embeddings.token_embedding."),
        ("text.positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("text.ln_final.", "text_model.final_layer_norm."),
        ("text.proj.", "text_projection."),
        (".ln_1.", ".layer_norm1."),
        (".ln_2.", ".layer_norm2."),
        (".attn.out.", ".self_attn.out_proj."),
        (".mlp.fc.", ".mlp.fc1."),
        (".mlp.proj.", ".mlp.fc2."),
    ),
    split=((".attn.qkv.", (".self_attn.q_proj.", ".self_attn.k_proj.", ".self_attn.v_proj.")),),
)


def detect_layout(state_dict: Mapping[str, object]) -> Layout:
    """Whose names these are.

    OpenAI's and open_clip's weights have the same names; they count as OpenAI's when they carry the
    constants of its archives.

    Raises:
        ValueError: the names are nobody's; the message shows some.
    """
    names = [_unwrapped(name) for name in state_dict]
    if any(name.startswith("text.blocks.") for name in names):
        return "fastclip"
    if any(name.startswith("text_model.encoder.layers.") for name in names):
        return "huggingface"
    if any(name.startswith(("transformer.resblocks.", "text.transformer.")) for name in names):
        return "openai" if OPENAI_CONSTANTS[0] in names else "open_clip"
    raise ValueError(
        "these are not a CLIP's weights in fastclip's, OpenAI's, open_clip's or Hugging Face's "
        f"layout; they begin with {', '.join(sorted(names)[:4]) or 'nothing'}"
    )


def to_fastclip(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Weights (or gradients) under our names, floating point in fp32, the logit scale of shape [1].

    A name that the layout does not know stays as it is, for the caller to refuse.
    """
    theirs = {_unwrapped(name): tensor for name, tensor in state_dict.items()}
    theirs = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in theirs.items()
        if name not in OPENAI_CONSTANTS and name.rpartition(".")[2] not in _CONSTANT_BUFFERS
    }
    if layout in ("openai", "open_clip"):
        theirs = {
            "text." + name if name.startswith(_PLAIN_TEXT) else name: tensor
            for name, tensor in theirs.items()
        }
        if "text.text_projection" in theirs:
            theirs["text_projection"] = theirs.pop("text.text_projection")
    ours = theirs if layout == "fastclip" else _convert_in(theirs, _names(layout, theirs))
    for name in ("logit_scale", "logit_bias"):
        if name in ours:
            ours[name] = ours[name].reshape(1)
    return ours


def from_fastclip(state_dict: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our weights (or gradients) under another project's names; the scale becomes a scalar."""
    if layout == "fastclip":
        return dict(state_dict)
    names = _names(layout, state_dict)
    transposed = dict(names.transposed)
    theirs: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if name in transposed:
            theirs[transposed[name]] = tensor.T
            continue
        for one, several in names.split:
            if one in name:
                parts = zip(several, tensor.chunk(len(several)), strict=True)
                theirs.update(
                    {_replace(name.replace(one, part), names.replace): t for part, t in parts}
                )
                break
        else:
            theirs[_replace(name, names.replace)] = tensor
    if layout in ("openai", "open_clip"):
        theirs = {name.removeprefix("text."): tensor for name, tensor in theirs.items()}
    for name in ("logit_scale", "logit_bias"):
        if name in theirs:
            theirs[name] = theirs[name].reshape(())
    return theirs


def _convert_in(theirs: Mapping[str, Tensor], names: _Names) -> dict[str, Tensor]:
    back = tuple((their, our) for our, their in reversed(names.replace))
    transposed = {their: our for our, their in names.transposed}
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        if name in transposed:
            ours[transposed[name]] = tensor.T
            continue
        parts = next((p for p in names.split if any(part in name for part in p[1])), None)
        if parts is None:
            ours[_replace(name, back)] = tensor
        elif parts[1][0] in name:
            one, several = parts
            wanted = [name.replace(several[0], part) for part in several]
            missing = [part for part in wanted if part not in theirs]
            if missing:
                raise ValueError(f"the weights lack {', '.join(missing)}")
            fused = torch.cat([theirs[part] for part in wanted])
            ours[_replace(name.replace(several[0], one), back)] = fused
    return ours


def _names(layout: Layout, state_dict: Mapping[str, object]) -> _Names:
    if layout == "huggingface":
        return _HUGGINGFACE
    # "visual.conv1" is a ViT's patch embedding and a ResNet's first convolution.
    return _OPENAI_VIT if "visual.class_embedding" in state_dict else _OPENAI_RESNET


def _replace(name: str, pieces: tuple[tuple[str, str], ...]) -> str:
    for before, after in pieces:
        name = name.replace(before, after)
    return name


def _unwrapped(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    return name
