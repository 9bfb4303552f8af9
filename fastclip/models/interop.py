"""Weights of OpenAI, open_clip and Hugging Face: read, start from, write.

Reads .safetensors and torch files (never a pickle's code), and directories as each project lays
them out. Everything comes in under our names in fp32; `fastclip.models.interop_names` has the
renaming alone.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig, ViTConfig, from_dict, to_dict
from fastclip.models.interop_config import (
    check_exportable,
    from_huggingface,
    from_open_clip,
    to_huggingface,
    to_huggingface_preprocessor,
    to_open_clip,
)
from fastclip.models.interop_infer import infer_config
from fastclip.models.interop_names import (
    LAYOUTS,
    Layout,
    detect_layout,
    from_fastclip,
    to_fastclip,
)

logger = logging.getLogger("fastclip")

# Configuration and weights of a directory, in the order in which they are looked for.
_CONFIG_FILES: dict[Layout, str] = {
    "fastclip": "model.json",
    "open_clip": "open_clip_config.json",
    "huggingface": "config.json",
}
_WEIGHT_FILES: dict[Layout, tuple[str, ...]] = {
    "fastclip": ("model.safetensors",),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    "huggingface": ("model.safetensors", "pytorch_model.bin"),
    "openai": ("model.safetensors",),
}
_HUGGINGFACE_PREPROCESSOR = "preprocessor_config.json"
_TENSOR_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class LoadedWeights(NamedTuple):
    """What `load_weights` found."""

    state_dict: dict[str, Tensor]
    """fp32 tensors on the CPU, under our names."""

    layout: Layout
    """The layout they were stored in."""

    config: ClipConfig | None
    """None when neither a configuration file nor OpenAI's conventions say what the model is."""


def load_weights(path: str | Path, *, allow_torchscript: bool = False) -> LoadedWeights:
    """Read a CLIP's weights in any layout.

    Args:
        path: a .safetensors, .pt, .pth or .bin file, or a directory with weights and configuration
            as fastclip, open_clip or transformers write it.
        allow_torchscript: read OpenAI's TorchScript archives. Loading one executes code from the
            file: allow it for files you trust.

    Raises:
        FileNotFoundError: nothing is there, or a directory holds no weights we know.
        ValueError: the file is broken, needs `allow_torchscript`, or holds another kind of model.
    """
    path = Path(path)
    if path.is_dir():
        return _load_directory(path, allow_torchscript)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights at {path}")
    raw = _read_tensors(path, allow_torchscript)
    try:
        layout = detect_layout(raw)
        state_dict = to_fastclip(raw, layout)
        # OpenAI's nine models share their activation and the width of a head.
        config = infer_config(state_dict, activation="quick_gelu") if layout == "openai" else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return LoadedWeights(state_dict, layout, config)


def init_from(model: Clip, path: str | Path, *, allow_torchscript: bool = False) -> None:
    """Start `model` from trained weights in any layout.

    A model for another image size gets the positional embedding of its patches resampled (bicubic,
    anti-aliased, as open_clip does), and a logit bias is left out or begun with as the model has
    it; everything else must fit exactly.

    Raises:
        ValueError: tensors are missing, left over or of another shape, or the weights were trained
            with other heads, activations or image statistics; the message lists them.
        FileNotFoundError: as `load_weights`.
    """
    loaded = load_weights(path, allow_torchscript=allow_torchscript)
    if loaded.config is None:
        logger.warning(
            "%s does not say with which activations, heads and image statistics its weights were "
            "trained; the model's own are taken",
            path,
        )
    else:
        _check_same_function(model.config, loaded.config, path)
    state_dict = dict(loaded.state_dict)
    wanted = model.state_dict()
    for name in ("visual.positional_embedding", "visual.attnpool.positional_embedding"):
        if name in wanted and name in state_dict:
            state_dict[name] = resample_positions(state_dict[name], wanted[name].shape[0])
    _settle_logit_bias(state_dict, wanted, path)
    problems = _differences(state_dict, wanted)
    if problems:
        raise ValueError(f"{path} does not fit the model: {'; '.join(problems)}")
    model.load_state_dict(state_dict)


def _settle_logit_bias(
    state_dict: dict[str, Tensor], wanted: Mapping[str, Tensor], path: str | Path
) -> None:
    """The sigmoid loss's bias is no part of the towers: weights of either loss start the other."""
    name = "logit_bias"
    if name in wanted and name not in state_dict:
        logger.info("%s has no logit_bias: the model's own is taken", path)
        state_dict[name] = wanted[name]
    elif name in state_dict and name not in wanted:
        logger.info("%s has a logit_bias, which the model does without", path)
        del state_dict[name]


def resample_positions(embedding: Tensor, positions: int) -> Tensor:
    """Resample the positional embedding [1 + g·g, C] of a square grid to 1 + G·G `positions`.

    The first row, which belongs to no place in the image, stays.
    """
    rows = embedding.shape[0]
    if rows == positions:
        return embedding
    old, new = math.isqrt(rows - 1), math.isqrt(positions - 1)
    if old * old != rows - 1 or new * new != positions - 1:
        raise ValueError(
            f"positional embeddings of {rows} and {positions} rows are not 1 + a square"
        )
    grid = embedding[1:].T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True)
    return torch.cat([embedding[:1], grid.reshape(-1, new * new).T])


def export_weights(
    model: Clip | Mapping[str, Tensor],
    config: ClipConfig,
    directory: str | Path,
    layout: Layout,
) -> None:
    """Write weights (safetensors, fp32) and configuration so that another library can load them.

    =============  ===========================================================================
    layout         how to load the directory
    =============  ===========================================================================
    fastclip       `load_weights`, `init_from`
    open_clip      ``open_clip.create_model_and_transforms("local-dir:DIRECTORY")``
    huggingface    ``transformers.CLIPModel.from_pretrained("DIRECTORY")``
    openai         ``clip.model.build_model(safetensors.torch.load_file("…/model.safetensors"))``
    =============  ===========================================================================

    Args:
        model: the model, or its whole state dict.
        config: the model's configuration.
        directory: made if need be; existing exports in it are not overwritten.
        layout: whose.

    Raises:
        ValueError: the layout cannot hold this model, or the weights do not fit `config`.
        FileExistsError: the directory has an export already.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is one of {', '.join(LAYOUTS)}, not {layout!r}")
    check_exportable(config, layout)
    state_dict = model.state_dict() if isinstance(model, Clip) else model
    with torch.device("meta"):
        problems = _differences(state_dict, Clip(config).state_dict())
    if problems:
        raise ValueError(f"the weights do not fit the configuration: {'; '.join(problems)}")

    directory = Path(directory)
    weights = directory / _WEIGHT_FILES[layout][0]
    documents: dict[str, Any] = {}
    if layout == "fastclip":
        documents = {_CONFIG_FILES[layout]: to_dict(config)}
    elif layout == "open_clip":
        documents = {_CONFIG_FILES[layout]: to_open_clip(config)}
    elif layout == "huggingface":
        documents = {
            _CONFIG_FILES[layout]: to_huggingface(config),
            _HUGGINGFACE_PREPROCESSOR: to_huggingface_preprocessor(config),
        }
    for file in (weights, *(directory / name for name in documents)):
        if file.exists():
            raise FileExistsError(f"{file} exists; export into an empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = from_fastclip(state_dict, layout)
    if layout == "openai":
        tensors |= {
            "input_resolution": torch.tensor(config.vision.image_size),
            "context_length": torch.tensor(config.text.context_length),
            "vocab_size": torch.tensor(config.text.vocab_size),
        }
    # safetensors refuses views that share memory; transformers asks for the format's name.
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    for name, document in documents.items():
        (directory / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _load_directory(directory: Path, allow_torchscript: bool) -> LoadedWeights:
    for layout, names in _WEIGHT_FILES.items():
        description = _CONFIG_FILES.get(layout)
        if description is not None and not (directory / description).is_file():
            continue
        for name in names:
            if (directory / name).is_file():
                loaded = load_weights(directory / name, allow_torchscript=allow_torchscript)
                if description is None:
                    return loaded
                return loaded._replace(config=_read_config(directory, layout))
    raise FileNotFoundError(
        f"{directory} holds no CLIP: expected model.safetensors with model.json (fastclip), "
        "open_clip_model.safetensors with open_clip_config.json (open_clip), model.safetensors or "
        "pytorch_model.bin with config.json (transformers; not in several shards), or "
        "model.safetensors alone (OpenAI); of a fastclip run, give checkpoints/step-…"
    )


def _read_config(directory: Path, layout: Layout) -> ClipConfig:
    file = directory / _CONFIG_FILES[layout]
    content = _read_json(file)
    try:
        if layout == "fastclip":
            return from_dict(content, str(file))
        if layout == "open_clip":
            return from_open_clip(content, str(file))
        preprocessor = directory / _HUGGINGFACE_PREPROCESSOR
        statistics = _read_json(preprocessor) if preprocessor.is_file() else {}
        return from_huggingface(content, statistics, str(file))
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}") from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold one JSON object")
    return content


def _read_tensors(file: Path, allow_torchscript: bool) -> dict[str, Tensor]:
    if file.suffix not in _TENSOR_SUFFIXES:
        raise ValueError(f"{file}: weights are in {', '.join(_TENSOR_SUFFIXES)} files")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from None
    if _is_torchscript(file):
        if not allow_torchscript:
            raise ValueError(
                f"{file} is a TorchScript archive, as OpenAI publishes its weights. Loading one "
                "executes code from the file, so fastclip does it only when told that the file is "
                "trusted: pass allow_torchscript=True, or convert it once with "
                "state = torch.jit.load(FILE, map_location='cpu').state_dict() and "
                "safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, "
                "'weights.safetensors')"
            )
        content: Any = torch.jit.load(file, map_location="cpu").state_dict()
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{file} holds more than tensors, or is broken, and was not read: {reason}"
            ) from None
    # open_clip's training checkpoints keep the weights beside optimiser and epoch.
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
        raise ValueError(f"{file} holds no state dict of named tensors")
    return dict(content)


def _is_torchscript(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _differences(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state_dict` from being loaded in place of `wanted`, one sentence each."""
    missing = sorted(set(wanted) - set(state_dict))
    left_over = sorted(set(state_dict) - set(wanted))
    problems = []
    if missing:
        problems.append(f"missing {', '.join(missing)}")
    if left_over:
        problems.append(f"left over {', '.join(left_over)}")
    for name in sorted(set(wanted) & set(state_dict)):
        have, want = list(state_dict[name].shape), list(wanted[name].shape)
        if have != want:
            problems.append(f"{name} is {have} and should be {want}")
    return problems


def _check_same_function(config: ClipConfig, trained: ClipConfig, path: str | Path) -> None:
    """Settings that shapes do not show and that would change every feature in silence."""
    ours, theirs = _invisible_settings(config), _invisible_settings(trained)
    problems = [
        f"{name} is {value!r} there and {ours[name]!r} in the model"
        for name, value in theirs.items()
        if name in ours and ours[name] != value
    ]
    if problems:
        raise ValueError(
            f"the weights of {path} were trained with other settings: {'; '.join(problems)}. "
            "Change the model's configuration."
        )


def _invisible_settings(config: ClipConfig) -> dict[str, object]:
    vision: ViTConfig | ResNetConfig = config.vision
    settings: dict[str, object] = {
        "vision.heads": vision.heads,
        "text.heads": config.text.heads,
        "text.activation": config.text.activation,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }
    if isinstance(vision, ViTConfig):
        settings["vision.activation"] = vision.activation
    return settings
