"""Recomputed activations change nothing: not a gradient, not a running statistic."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, Recompute, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.layers import SynchronizedBatchNorm2d, convert_sync_batch_norm
from fastclip.tokenizer.packing import PackedTokens
from operator_counts import OperatorCounts

TEXT = TextConfig(context_length=8, vocab_size=40, width=16, heads=2, layers=2)
VIT = ClipConfig(
    embed_dim=12,
    vision=ViTConfig(image_size=32, patch_size=8, width=24, layers=2, heads=2),
    text=TEXT,
)
RESNET = dataclasses.replace(
    VIT, vision=ResNetConfig(image_size=32, layers=(1, 2, 1, 1), width=4, heads=4)
)


def _step(
    model: Clip, packed: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(0, 40, (6, 8), generator=generator)
    output = model(images, PackedTokens.pack(tokens) if packed else tokens)
    logits = output.logit_scale * output.image_features @ output.text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(6)).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return gradients, dict(model.named_buffers())


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ViT", "ResNet", "synchronised ResNet"])
def test_activation_checkpointing_changes_nothing(kind, precision):
    plain = Clip(VIT if kind == "ViT" else RESNET)
    plain.autocast_dtype = precision
    if kind == "synchronised ResNet":
        convert_sync_batch_norm(plain)
    recomputing = copy.deepcopy(plain)
    recomputing.set_activation_checkpointing(vision="full", text="full")
    calls = []
    blocks = [
        m for m in recomputing.modules() if type(m).__name__ in ("ResidualBlock", "Bottleneck")
    ]
    for block in blocks:
        block.register_forward_hook(lambda m, i, o: calls.append(m))
    gradients, buffers = _step(plain)
    same_gradients, same_buffers = _step(recomputing)
    # The second forward pass of a block may stop before the hook, at the last tensor it needs.
    assert len(calls) >= len(blocks)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, same_gradients[name]), name
    for name, buffer in buffers.items():
        assert torch.equal(buffer, same_buffers[name]), name
    if kind != "ViT":
        assert int(same_buffers["visual.bn1.num_batches_tracked"]) == 1
        assert int(same_buffers["visual.layer2.1.bn2.num_batches_tracked"]) == 1


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("packed", [False, True])
def test_recomputing_what_is_cheap_changes_nothing(precision, activation, packed):
    vision, text = (dataclasses.replace(t, activation=activation) for t in (VIT.vision, VIT.text))
    plain = Clip(dataclasses.replace(VIT, vision=vision, text=text)).train()
    plain.autocast_dtype = precision
    recomputing = copy.deepcopy(plain)
    recomputing.set_activation_checkpointing(vision="selective", text="selective")
    products = []
    gradients = []
    for model in (plain, recomputing):
        with OperatorCounts("aten::mm", "aten::addmm", "aten::bmm") as counted:
            gradients.append(_step(model, packed)[0])
        products.append(counted.number)
    # But the last blocks' queries, which are those of one row and come before keys and values.
    assert products[1] == products[0] + 2 > 20
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_resnets_have_no_cheap_part():
    with pytest.raises(ValueError, match="a ResNet has full"):
        Clip(RESNET).set_activation_checkpointing(vision="selective", text="none")


@pytest.mark.parametrize(
    ("config", "how", "most"),
    [(VIT, "full", 0.7), (VIT, "selective", 0.7), (RESNET, "full", 0.7)],
)
def test_activation_checkpointing_stores_less(config, how, most):
    def saved(recompute: Recompute) -> int:
        model = Clip(config)
        text = recompute
        model.set_activation_checkpointing(vision=recompute, text=text)
        sizes: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.zeros(4, 3, 32, 32), torch.zeros(4, 8, dtype=torch.int64))
        return sum(sizes)

    print(f"{how}: {saved(how) / saved('none'):.2f}")
    assert saved(how) < most * saved("none")


def test_conversion_keeps_parameters_buffers_and_mode():
    model = Clip(RESNET).eval()
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = convert_sync_batch_norm(model)
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert converted is model
    assert before.keys() == after.keys()
    assert all(after[name] is value for name, value in before.items())
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 3 + 5 * 3 + 4
    assert all(type(norm) is SynchronizedBatchNorm2d and not norm.training for norm in norms)
    assert model.has_batch_norm


def test_one_value_per_channel_is_an_error():
    norm = SynchronizedBatchNorm2d(3)
    with pytest.raises(ValueError, match="more than one value"):
        norm(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ValueError, match="4D"):
        norm(torch.zeros(1, 3))
