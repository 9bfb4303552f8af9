"""Weights of four layouts: there and back unchanged, equal features in the library they are for."""

from __future__ import annotations

import dataclasses
import json

import open_clip
import pytest
import torch

from fastclip.models.clip import Clip
from fastclip.models.config import ViTConfig
from fastclip.models.interop import (
    export_weights,
    load_weights,
)
from fastclip.models.interop_infer import infer_config
from fastclip.models.interop_names import (
    detect_layout,
    from_fastclip,
    to_fastclip,
)
from interop_models import PAIRS, RESNET, TEXT, VIT, build, features, inputs, peer_features


@pytest.mark.parametrize(("config", "layout"), PAIRS)
def test_names_there_and_back(config, layout):
    weights = build(config).state_dict()
    theirs = from_fastclip(weights, layout)
    found = detect_layout(theirs)
    assert found == ("open_clip" if layout == "openai" else layout)
    back = to_fastclip({f"module.{name}": tensor for name, tensor in theirs.items()}, found)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())
    assert all(back[name].shape == tensor.shape for name, tensor in weights.items())


@pytest.mark.parametrize(("config", "layout"), PAIRS)
def test_an_export_reads_back_equal(config, layout, tmp_path):
    model = build(config)
    export_weights(model, config, tmp_path / "new" / "folder", layout)
    loaded = load_weights(tmp_path / "new" / "folder")
    assert loaded.layout == layout
    assert loaded.config is not None
    temperature = loaded.config.init_temperature
    assert temperature == pytest.approx(config.init_temperature, rel=1e-12)
    assert dataclasses.replace(loaded.config, init_temperature=0.07) == config
    assert loaded.state_dict.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(("config", "layout"), [p for p in PAIRS if p.values[1] != "fastclip"])
def test_the_target_library_computes_equal_features(config, layout, tmp_path):
    model = build(config)
    if layout == "openai":  # OpenAI's code, and open_clip's reader of it, round weights to fp16
        rounded = {n: t.half().float() for n, t in model.state_dict().items()}
        model.load_state_dict(rounded)
    export_weights(model, config, tmp_path, layout)
    images, tokens = inputs(config)
    with torch.no_grad():
        ours = features(model, images, tokens)
        theirs = peer_features(layout, tmp_path, images, tokens)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= 2e-6 * other.norm()


def test_gelu_odd_heads_statistics_and_bias_survive_in_open_clip(tmp_path):
    config = dataclasses.replace(
        VIT,
        vision=ViTConfig(
            image_size=21, patch_size=7, width=33, layers=1, heads=3, mlp_ratio=3.1,
            activation="gelu",
        ),
        text=dataclasses.replace(TEXT, width=26, heads=2, activation="gelu", mlp_ratio=2.5),
        init_logit_bias=-10.0,
        image_mean=(0.5, 0.5, 0.5),
    )  # fmt: skip
    model = build(config)
    export_weights(model, config, tmp_path, "open_clip")
    loaded = load_weights(tmp_path).config
    assert loaded == config
    images, tokens = inputs(config)
    with torch.no_grad():
        for mine, other in zip(
            features(model, images, tokens),
            peer_features("open_clip", tmp_path, images, tokens),
            strict=True,
        ):
            assert (mine - other).norm() <= 2e-6 * other.norm()


def test_open_clips_custom_text_layout_is_read():
    model = build(VIT)
    plain = from_fastclip(model.state_dict(), "open_clip")
    text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_proj")
    custom = {"text." + n if n.startswith(text) else n: t for n, t in plain.items()}
    custom["text.attn_mask"] = torch.zeros(11, 11)
    peer = open_clip.CustomTextCLIP(
        20,
        {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2},  # pyright: ignore
        {"context_length": 11, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2},  # pyright: ignore
    )
    assert peer.state_dict().keys() == custom.keys() - {"text.attn_mask"}
    assert detect_layout(custom) == "open_clip"
    back = to_fastclip(custom, "open_clip")
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())
    assert back.keys() == model.state_dict().keys()


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_configuration_is_inferred_from_shapes(config):
    weights = Clip(config).state_dict()
    assert infer_config(weights, activation="quick_gelu") == config
    odd = dataclasses.replace(config, text=dataclasses.replace(TEXT, width=48, heads=3))
    weights = Clip(odd).state_dict()
    with pytest.raises(ValueError, match="text_heads"):
        infer_config(weights, activation="quick_gelu")
    assert infer_config(weights, activation="quick_gelu", text_heads=3) == odd
    mlp = dataclasses.replace(config, projection="mlp", init_logit_bias=-2.0)
    assert infer_config(Clip(mlp).state_dict(), activation="quick_gelu") == mlp
    del weights["text.positional_embedding"]
    with pytest.raises(ValueError, match=r"lack text\.positional_embedding"):
        infer_config(weights, activation="quick_gelu", text_heads=3)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("open_clip", {"model_cfg.vision_cfg.timm_model_name": "vit_base"}, "timm_model_name"),
        ("open_clip", {"model_cfg.text_cfg.no_causal_mask": True}, "no_causal_mask"),
        ("open_clip", {"model_cfg.vision_cfg.image_size": [32, 64]}, "square"),
        ("huggingface", {"model_type": "siglip"}, "siglip"),
        ("huggingface", {"vision_config.hidden_act": "relu"}, "activation"),
        ("huggingface", {"text_config.layer_norm_eps": 1e-6}, "layer_norm_eps"),
        ("fastclip", {"vision.depth": 3}, "depth"),
    ],
)
def test_foreign_options_are_errors(layout, change, message, tmp_path):
    export_weights(build(VIT), VIT, tmp_path, layout)
    names = {"open_clip": "open_clip_config.json", "huggingface": "config.json"}
    file = tmp_path / names.get(layout, "model.json")
    document = json.loads(file.read_text())
    for path, value in change.items():
        *parents, last = path.split(".")
        section = document
        for parent in parents:
            section = section[parent]
        section[last] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path)


def test_defaults_that_open_clip_writes_out_are_understood(tmp_path):
    export_weights(build(VIT), VIT, tmp_path, "open_clip")
    file = tmp_path / "open_clip_config.json"
    document = json.loads(file.read_text())
    document["model_cfg"]["vision_cfg"] |= {"pool_type": "tok", "ls_init_value": None}
    document["model_cfg"]["text_cfg"] |= {"pool_type": "argmax", "no_causal_mask": False}
    file.write_text(json.dumps(document))
    assert load_weights(tmp_path).config == VIT


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (RESNET, "huggingface", "ResNet"),
        (dataclasses.replace(VIT, projection="mlp"), "open_clip", "mlp projection"),
        (dataclasses.replace(VIT, init_logit_bias=-10.0), "huggingface", "logit bias"),
        (dataclasses.replace(VIT, init_logit_bias=-10.0), "openai", "logit bias"),
        (
            dataclasses.replace(VIT, text=dataclasses.replace(TEXT, activation="gelu")),
            "open_clip",
            "different activations",
        ),
        (
            dataclasses.replace(RESNET, text=dataclasses.replace(TEXT, activation="gelu")),
            "openai",
            "quick_gelu",
        ),
        (
            dataclasses.replace(VIT, text=dataclasses.replace(TEXT, heads=2)),
            "openai",
            "64 channels",
        ),
        (dataclasses.replace(VIT, image_mean=(0.5, 0.5, 0.5)), "openai", "image_mean"),
        (VIT, "onnx", "fastclip, openai"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(config, layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_weights(Clip(config), config, tmp_path, layout)
    assert not list(tmp_path.iterdir())


def test_exports_do_not_overwrite_and_fit_their_configuration(tmp_path):
    model = build(VIT)
    export_weights(model.state_dict(), VIT, tmp_path, "fastclip")
    with pytest.raises(FileExistsError, match="empty directory"):
        export_weights(model, VIT, tmp_path, "fastclip")
    with pytest.raises(ValueError, match=r"do not fit.*missing visual\.attnpool"):
        export_weights(model, RESNET, tmp_path / "other", "fastclip")
