"""The FLOP model against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastclip.flops import (
    loss_flops,
    peak_flops,
    peak_flops_by_name,
    text_flops,
    training_flops_per_sample,
    vision_flops,
)
from fastclip.models.clip import Clip
from fastclip.models.presets import preset


@pytest.mark.parametrize(
    "name", ["ViT-Nano-8", "RN-Nano", "RN50", "RN50x4", "ViT-B-32", "ViT-L-14"]
)
def test_forward_equals_torchs_count(name: str) -> None:
    config = preset(name)
    # Shapes without storage; attention in the form whose products the counter knows.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        model = Clip(config).eval()
        images = torch.empty(2, 3, config.vision.image_size, config.vision.image_size)
        tokens = torch.zeros(2, config.text.context_length, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.visual(images)
        assert vision_flops(config, last_row=True) * 2 == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.text(tokens)
        assert text_flops(config, last_row=True) * 2 == pytest.approx(
            counter.get_total_flops(), rel=0.01
        )


def test_training_is_three_forwards_and_short_texts_cost_less() -> None:
    config = preset("ViT-B-32")
    whole = training_flops_per_sample(config)
    assert whole == pytest.approx(3 * (vision_flops(config) + text_flops(config)))
    short = training_flops_per_sample(config, 16)
    assert short == pytest.approx(3 * (vision_flops(config) + text_flops(config, 16)))
    assert short < whole
    assert loss_flops(100, 8) == 8 * 100 * 100 * 8


def test_peaks_of_devices() -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    assert peak_flops_by_name("NVIDIA H200", "bf16") == 989.5e12
    assert peak_flops_by_name("NVIDIA H100 80GB HBM3", "fp16") == 989.5e12
    assert peak_flops_by_name("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops_by_name("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_by_name("Some other device", "bf16") is None
