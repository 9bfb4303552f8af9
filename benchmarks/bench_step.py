"""A whole training step, ours beside open_clip's: ``python -m benchmarks.bench_step``.

Forward of both towers, loss, backward, AdamW; the same weights and pairs for all, on the device
already (ours gets uint8 pixels and normalises them, open_clip gets them normalised). TFLOP/s count
both towers over all 77 positions and all blocks, whatever a provider leaves out (``--plan`` says
how much that is). A provider whose first loss is not the expected one gets no times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Provider, finish, main
from benchmarks.plan import Variant, Work
from benchmarks.steps import FastclipStep, OpenClipStep, Operands, StepCase, flops, new_model
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
    # On the device: the largest batch is 40 GB, minutes of one core's random numbers.
    generator = torch.Generator(device).manual_seed(1)
    images = torch.empty((case.batch, 3, side, side), dtype=torch.uint8, device=device)
    for few in images.split(1024):
        few.random_(0, 256, generator=generator)
    generator = torch.Generator().manual_seed(1)
    end = config.text.vocab_size - 1
    tokens = torch.randint(1, end - 1, (case.batch, context), generator=generator).int()
    lengths = torch.tensor(case.lengths())
    columns = torch.arange(context)
    tokens[columns >= lengths[:, None]] = 0
    tokens[torch.arange(case.batch), lengths - 1] = end
    return Operands(images, tokens.to(device))


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


def whole(case: StepCase) -> bool:
    """Whether a step is one batch, which every provider can do."""
    return case.micro_batches == 1


def studied(case: StepCase) -> bool:
    """Where each saving and engine is timed alone: of the large models, one is enough."""
    return whole(case) and case.model not in ("ViT-B-16", "ViT-L-14", "RN50")


def updates(case: StepCase) -> bool:
    """Where engines differ."""
    return studied(case) and case.part == "step"


def plain(case: StepCase) -> bool:
    """What open_clip's training loop does."""
    return whole(case) and not case.patch_dropout


def _ours(name: str, accepts: Callable[[StepCase], bool]) -> Provider:
    return Provider(name, fastclip(**_OURS[name]), needs_cuda=False, accepts=accepts)


def _open_clip(name: str, *, compiled: bool) -> Provider:
    return Provider(
        name, open_clip(compiled=compiled), "open_clip", "open_clip_torch", "open_clip_torch",
        needs_cuda=False, accepts=plain,
    )  # fmt: skip


_UPDATES: dict[str, Any] = {"needs_cuda": False, "accepts": updates}
_DEEPSPEED: dict[str, Any] = _UPDATES | {"module": "deepspeed", "install": "deepspeed"}
PROVIDERS = (
    # The comparison first: an interrupted run has measured what matters most.
    _ours("fastclip", lambda case: True),
    _open_clip("open_clip-compiled", compiled=True),
    Provider("fastclip-compiled", fastclip(compiled="blocks"), needs_cuda=False),
    _open_clip("open_clip", compiled=False),
    _ours("fastclip-padded", whole),
    _ours("fastclip-all-rows", studied),
    _ours("fastclip-padded-all-rows", studied),
    Provider("fastclip-towers", fastclip(compiled="towers"), needs_cuda=False, accepts=studied),
    Provider("fastclip-graphs", fastclip(compiled="towers", cuda_graphs=True), accepts=studied),
    Provider("fastclip-unguarded", fastclip(engine="unguarded"), **_UPDATES),
    Provider("fastclip-zero-0", fastclip(engine="zero-0"), **_DEEPSPEED),
    Provider("fastclip-zero-1", fastclip(engine="zero-1"), **_DEEPSPEED),
)

FITTING = {"ViT-B-32": 1024, "ViT-B-16": 512, "ViT-L-14": 128}
"""Pairs that every provider can hold in 80 GB: open_clip keeps 42, 110 and 320 MB of a pair in
bfloat16, ours 25, 82 and 285 (40, 91 and 300 with all 77 positions), beside 3 to 7 GB of states."""

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
    "small": tuple(StepCase(model, batch) for model, batch in FITTING.items()),
    "dense": tuple(StepCase(model, batch, "dense") for model, batch in FITTING.items()),
    "grid": tuple(
        StepCase(model, batch // part, captions)
        for model, batch in {**FITTING, "RN50": 512}.items()
        for part in (1, 2)
        for captions in ("demo", "web", "dense")
    ),
    "large_batch": tuple(
        StepCase(model, 32_768, micro_batches=32_768 // FITTING[model])
        for model in ("ViT-B-32", "ViT-B-16")
    ),
    # Pixels stay on the device, up to 40 GB: what is left is enough for half a micro-batch.
    "maximum": tuple(
        StepCase("ViT-B-16", batch, micro_batches=2 * batch // FITTING["ViT-B-16"])
        for batch in (131_072, 262_144)
    ),
    "patch_dropout": (StepCase("ViT-B-16", FITTING["ViT-B-16"], patch_dropout=0.5),),
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
    finish(main(BENCHMARK))
