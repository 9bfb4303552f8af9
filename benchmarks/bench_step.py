"""A whole training step, ours beside open_clip's: ``python -m benchmarks.bench_step``.

Forward of both towers, loss, backward, AdamW; the same weights and pairs for all, on the device
already (ours gets uint8 pixels and normalises them, open_clip gets them normalised). TFLOP/s count
both towers over all 77 positions and all blocks, whatever a provider leaves out (``--plan`` says
how much that is). A provider whose first loss is not the expected one gets no times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Provider, main
from benchmarks.plan import Variant, Work
from benchmarks.steps import FastclipStep, OpenClipStep, Operands, StepCase, flops, new_model
from fastclip.engine.config import AUTOCAST_DTYPES
from fastclip.flops import executed_flops_per_sample
from fastclip.models.attention import AttentionConfig

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}
"""Of the first loss, relative to fp32's."""


Step = Callable[[Operands], Tensor]
"""One step; its loss before the update."""


def make_operands(case: StepCase, device: torch.device) -> Operands:
    """Random pixels, and random tokens of the captions' lengths."""
    config = case.config
    side, context = config.vision.image_size, config.text.context_length
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, 3, side, side)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
    end = config.text.vocab_size - 1
    tokens = torch.randint(1, end - 1, (case.batch, context), generator=generator).int()
    lengths = torch.tensor(case.lengths())
    columns = torch.arange(context)
    tokens[columns >= lengths[:, None]] = 0
    tokens[torch.arange(case.batch), lengths - 1] = end
    dtype = AUTOCAST_DTYPES[case.precision] or torch.float32
    mean, std = (torch.tensor(x, device=device) for x in (config.image_mean, config.image_std))
    pixels = torch.cat(
        [
            ((few / 255 - mean[:, None, None]) / std[:, None, None]).to(dtype)
            for few in images.split(256)
        ]
    )
    return Operands(images, pixels, tokens.to(device))


@torch.no_grad()
def expected(case: StepCase, operands: Operands) -> tuple[float, float]:
    """The first loss, computed plainly in fp32, and how far from it a result may be."""
    model = new_model(case).to(operands.images.device).train()
    model.set_attention(AttentionConfig(impl="sdpa", last_row=False))
    if case.part == "text":
        parts = [model(tokens=t, normalize=False).text_features for t in operands.tokens.split(256)]
        loss = torch.cat(parts).square().mean()
    else:
        # In one piece: the statistics of BatchNorm are the whole batch's.
        size = case.batch if model.has_batch_norm else 256
        pairs = zip(operands.images.split(size), operands.tokens.split(size), strict=True)
        outputs = [model(images, tokens) for images, tokens in pairs]
        image = torch.cat([output.image_features for output in outputs])
        text = torch.cat([output.text_features for output in outputs])
        logits = outputs[0].logit_scale * image @ text.T
        target = torch.arange(case.batch, device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    # With patches dropped, the loss of so many pairs is still near.
    return float(loss), 0.2 if case.patch_dropout else TOLERANCE[case.precision]


def errors(expected: tuple[float, float], result: Tensor) -> Mapping[str, float | None]:
    """Relative error of the first loss.

    Raises:
        RuntimeError: it is above the tolerance.
    """
    right, tolerance = expected
    error = abs(float(result) - right) / abs(right)
    if not error <= tolerance:
        raise RuntimeError(f"the loss is {float(result):.6g}, not {right:.6g}")
    return {"loss_error": error}


def fastclip(**options: Any) -> Callable[[StepCase], Step]:
    """Our step with these options of `FastclipStep`."""
    return lambda case: FastclipStep(case, **options)


def open_clip(*, compiled: bool) -> Callable[[StepCase], Step]:
    """open_clip's, eager or compiled."""
    return lambda case: OpenClipStep(case, compiled=compiled)


def work(*, packed: bool, last_row: bool) -> Callable[[StepCase], Work]:
    """Share of the dense arithmetic that is executed."""

    def of(case: StepCase) -> Work:
        lengths = case.lengths() if packed else None
        executed = case.batch * flops(
            case.config,
            case.part,
            executed_flops_per_sample,
            text_lengths=lengths,
            last_row=last_row,
        )
        return Work(units=executed / case.unit)

    return of


_OURS = {
    "fastclip": {"packed": True, "last_row": True},
    "fastclip-padded": {"packed": False, "last_row": True},
    "fastclip-all-rows": {"packed": True, "last_row": False},
    "fastclip-padded-all-rows": {"packed": False, "last_row": False},
}
_UPDATES: dict[str, Any] = {"needs_cuda": False, "accepts": lambda case: case.part == "step"}
_DEEPSPEED: dict[str, Any] = _UPDATES | {"module": "deepspeed", "install": "deepspeed"}
PROVIDERS = (
    Provider("fastclip-compiled", fastclip(compiled="blocks"), needs_cuda=False),
    Provider("fastclip-towers", fastclip(compiled="towers"), needs_cuda=False),
    Provider("fastclip-graphs", fastclip(compiled="towers", cuda_graphs=True)),
    *(Provider(name, fastclip(**savings), needs_cuda=False) for name, savings in _OURS.items()),
    Provider("fastclip-unguarded", fastclip(engine="unguarded"), **_UPDATES),
    Provider("fastclip-zero-0", fastclip(engine="zero-0"), **_DEEPSPEED),
    Provider("fastclip-zero-1", fastclip(engine="zero-1"), **_DEEPSPEED),
    *(
        Provider(
            "open_clip-compiled" if compiled else "open_clip",
            open_clip(compiled=compiled),
            module="open_clip",
            distribution="open_clip_torch",
            install="open_clip_torch",
            needs_cuda=False,
        )
        for compiled in (False, True)
    ),
)

SETS: dict[str, tuple[StepCase, ...]] = {
    "tiny": (StepCase("ViT-Nano-8", 8, "web", "fp32"), StepCase("RN-Nano", 8, "demo", "fp32")),
    "cpu": (
        StepCase("ViT-B-32", 16, "demo", "fp32", part="text"),
        StepCase("ViT-B-32", 16, "web", "fp32", part="text"),
        StepCase("RN-Nano/77", 256, "demo", "fp32", part="text"),
        StepCase("RN-Nano/77", 256, "demo", "fp32"),
        StepCase("RN-Nano", 256, "demo", "fp32"),
        StepCase("ViT-B-32", 16, "web", "fp32"),
        StepCase("ViT-B-32", 16, "dense", "fp32"),
    ),
    "small": (
        StepCase("ViT-B-32", 2048),
        StepCase("ViT-B-16", 1024),
        StepCase("ViT-L-14", 224),
    ),
    "dense": (
        StepCase("ViT-B-32", 2048, "dense"),
        StepCase("ViT-B-16", 1024, "dense"),
        StepCase("ViT-L-14", 224, "dense"),
    ),
    "grid": tuple(
        StepCase(model, batch, captions)
        for model, batches in (
            ("ViT-B-32", (1024, 2048, 4096)),
            ("ViT-B-16", (512, 1024)),
            ("ViT-L-14", (224, 448)),
            ("RN50", (512, 1024)),
        )
        for batch in batches
        for captions in ("demo", "web", "dense")
    ),
    "large_batch": (
        StepCase("ViT-B-32", 32_768, micro_batches=16),
        StepCase("ViT-B-16", 32_768, micro_batches=32),
    ),
    # As large as fits: pixels stay on the device.
    "maximum": tuple(
        StepCase("ViT-B-16", batch, micro_batches=batch // 1024) for batch in (131_072, 262_144)
    ),
    "patch_dropout": (StepCase("ViT-B-16", 1024, patch_dropout=0.5),),
}

BENCHMARK = Benchmark(
    name="step",
    case_type=StepCase,
    providers=PROVIDERS,
    sets=SETS,
    variants=tuple(Variant(name, work(**savings)) for name, savings in _OURS.items()),
    operands=make_operands,
    expected=expected,
    errors=errors,
    error_columns=("loss_error",),
    counted_units=lambda case: 1,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
