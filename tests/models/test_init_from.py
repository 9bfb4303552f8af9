"""Starting from trained weights: every layout, other image sizes, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastclip.models.clip import Clip
from fastclip.models.interop import (
    export_weights,
    init_from,
    load_weights,
    resample_positions,
)
from fastclip.models.interop_names import (
    from_fastclip,
)
from interop_models import RESNET, TEXT, VIT, build, features, inputs


@pytest.mark.parametrize("layout", ["openai", "open_clip", "huggingface"])
def test_fine_tuning_starts_from_any_layout(layout, tmp_path):
    model = build(VIT)
    export_weights(model, VIT, tmp_path, layout)
    other = Clip(VIT).eval()
    init_from(other, tmp_path)
    images, tokens = inputs(VIT)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            features(other, images, tokens), features(model, images, tokens), strict=True
        )
    )


@pytest.mark.parametrize("side", [16, 48, 64])
def test_another_image_size_resamples_as_open_clip_does(side, tmp_path):
    model = build(VIT)
    export_weights(model, VIT, tmp_path, "fastclip")
    larger = dataclasses.replace(VIT, vision=dataclasses.replace(VIT.vision, image_size=side))
    fine_tuned = Clip(larger)
    init_from(fine_tuned, tmp_path)
    weights = from_fastclip(model.state_dict(), "open_clip")
    peer = open_clip.CLIP(
        20,
        {"image_size": side, "patch_size": 8, "width": 128, "layers": 2},  # pyright: ignore
        {"context_length": 11, "vocab_size": 60, "width": 64, "heads": 1, "layers": 2},  # pyright: ignore
    )
    open_clip.model.resize_pos_embed(weights, peer)
    got = fine_tuned.state_dict()["visual.positional_embedding"]
    assert torch.allclose(got, weights["visual.positional_embedding"], atol=1e-7)


def test_a_resnets_attention_pool_is_resampled_too(tmp_path):
    export_weights(build(RESNET), RESNET, tmp_path, "fastclip")
    larger = dataclasses.replace(RESNET, vision=dataclasses.replace(RESNET.vision, image_size=96))
    model = Clip(larger)
    init_from(model, tmp_path)
    assert model.state_dict()["visual.attnpool.positional_embedding"].shape == (10, 128)


def test_resampling_keeps_the_class_row_and_constants():
    embedding = torch.full((17, 5), 3.0)
    embedding[0] = 7.0
    resampled = resample_positions(embedding, 50)
    assert torch.equal(resampled[0], embedding[0])
    assert torch.allclose(resampled[1:], torch.full((49, 5), 3.0))
    with pytest.raises(ValueError, match="1 \\+ a square"):
        resample_positions(embedding, 51)


def _without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if key != name}


def test_weights_of_either_loss_start_the_other(tmp_path, caplog):
    caplog.set_level(logging.INFO, "fastclip")
    sigmoid = dataclasses.replace(VIT, init_logit_bias=-10.0)
    for config, other, name in ((VIT, sigmoid, "softmax"), (sigmoid, VIT, "sigmoid")):
        model, trained = Clip(other), build(config)
        export_weights(trained, config, tmp_path / name, "fastclip")
        init_from(model, tmp_path / name)
        common = trained.state_dict().keys() & model.state_dict().keys()
        assert all(torch.equal(model.state_dict()[n], trained.state_dict()[n]) for n in common)
        assert model.logit_bias is None or model.logit_bias.item() == -10.0
    assert "has no logit_bias: the model's own is taken" in caplog.text
    assert "has a logit_bias, which the model does without" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: _without(w, "ln_final.bias"), r"missing text\.ln_final\.bias"),
        (lambda w: {**w, "visual.ls.gamma": torch.ones(1)}, r"left over visual\.ls\.gamma"),
        (
            lambda w: {**w, "ln_final.bias": torch.ones(3)},
            r"text\.ln_final\.bias is \[3\] and should be \[64\]",
        ),
    ],
)
def test_init_from_lists_what_does_not_fit(change, message, tmp_path, caplog):
    weights = from_fastclip(build(VIT).state_dict(), "open_clip")
    weights = {name: tensor.contiguous() for name, tensor in change(weights).items()}
    save_file(weights, tmp_path / "weights.safetensors")
    model = Clip(VIT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with (
        caplog.at_level(logging.WARNING, "fastclip"),
        pytest.raises(ValueError, match=message),
    ):
        init_from(model, tmp_path / "weights.safetensors")
    assert "does not say" in caplog.text
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": dataclasses.replace(VIT.vision, heads=4)}, r"vision\.heads is 2 there and 4"),
        ({"text": dataclasses.replace(TEXT, activation="gelu")}, r"text\.activation"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "image_mean"),
        ({"image_std": (0.5, 0.5, 0.5)}, "image_std"),
    ],
)
def test_init_from_refuses_what_shapes_do_not_show(change, message, tmp_path):
    export_weights(build(VIT), VIT, tmp_path, "huggingface")
    with pytest.raises(ValueError, match=message):
        init_from(Clip(dataclasses.replace(VIT, **change)), tmp_path)


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "pytorch_model.bin"])
def test_torch_files_are_read_without_running_code(name, tmp_path):
    weights = from_fastclip(build(VIT).state_dict(), "open_clip")
    half = {n: t.half() if t.is_floating_point() else t for n, t in weights.items()}
    torch.save({"epoch": 3, "state_dict": half, "optimizer": {"lr": 0.1}}, tmp_path / name)
    loaded = load_weights(tmp_path / name)
    assert loaded.layout == "open_clip"
    assert loaded.config is None
    assert {tensor.dtype for tensor in loaded.state_dict.values()} == {torch.float32}
    init_from(Clip(VIT), tmp_path / name)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a pickle ran",))


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    torch.save({"state_dict": _Harmful()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_weights(tmp_path / "weights.pt")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_needs_permission(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self, model: Clip) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterDict()
            self.visual = model.visual
            self.text = model.text
            self.logit_scale = model.logit_scale

        def forward(self, x: Tensor) -> Tensor:
            return x

    file = tmp_path / "ViT.pt"
    model = build(VIT)
    torch.jit.trace(Holder(model), torch.zeros(1)).save(file)  # pyright: ignore
    with pytest.raises(ValueError, match="allow_torchscript=True"):
        load_weights(file)
    loaded = load_weights(file, allow_torchscript=True)
    assert loaded.layout == "fastclip"
    assert all(torch.equal(loaded.state_dict[n], t) for n, t in model.state_dict().items())


def test_unreadable_sources_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_weights(tmp_path / "nothing.pt")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        load_weights(tmp_path)
    for name, content, message in (
        ("a.safetensors", b"\x00" * 20, "safetensors"),
        ("a.pt", b"not a torch file", "more than tensors, or is broken"),
        ("a.onnx", b"", "weights are in"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_weights(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="no state dict"):
        load_weights(tmp_path / "list.pt")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: .*conv\.weight"):
        load_weights(tmp_path / "other.safetensors")
