"""A whole training step, ours beside open_clip's: ``python -m benchmarks.bench_step``.

Forward of both towers, loss, backward, AdamW; the same weights and pairs for all, on the device
already (ours gets uint8 pixels and normalises them, open_clip gets them normalised). TFLOP/s count
both towers over all 77 positions and all blocks, whatever a provider leaves out (``--plan`` says
how much that is). A provider whose first loss is not the expected one gets no times.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import caption_lengths
from benchmarks.harness import Benchmark, Provider, main
from benchmarks.plan import Variant, Work
from fastclip.data.batch import Batch
from fastclip.engine_config import AUTOCAST_DTYPES, EngineConfig
from fastclip.flops import executed_flops_per_sample, training_flops_per_sample
from fastclip.models.attention import AttentionConfig
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig
from fastclip.models.presets import preset
from fastclip.tokenizer.packing import PackedTokens

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}
"""Of the first loss, relative to fp32's."""

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class StepCase:
    """A model and what it is trained on."""

    model: str
    """A preset; "/77" behind it: with a context of 77 tokens."""

    batch: int
    captions: Literal["demo", "web", "dense"] = "web"
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    micro_batches: int = 1
    patch_dropout: float = 0.0
    part: Literal["step", "text"] = "step"
    """The step, or forward and backward of the text tower alone."""

    @property
    def config(self) -> ClipConfig:
        """Of the model."""
        name, _, context = self.model.partition("/")
        config = preset(name)
        if not context:
            return config
        text = dataclasses.replace(config.text, context_length=int(context))
        return dataclasses.replace(config, text=text)

    @property
    def unit(self) -> float:
        """FLOP of the step over all positions and all blocks."""
        return self.batch * _flops(self.config, self.part, training_flops_per_sample)

    def lengths(self) -> list[int]:
        """Of the captions, in tokens."""
        return caption_lengths.draw(self.captions, self.batch, self.config.text.context_length)

    def __str__(self) -> str:
        extras = [f"{self.micro_batches} micro-batches"] if self.micro_batches > 1 else []
        extras += [f"patch dropout {self.patch_dropout}"] if self.patch_dropout else []
        extras += ["text tower"] if self.part == "text" else []
        return ", ".join([self.model, f"{self.batch}", self.captions, self.precision, *extras])


class Operands(NamedTuple):
    """A batch on the device."""

    images: Tensor
    """uint8 [B, 3, R, R]."""

    pixels: Tensor
    """The same, normalised, in the step's precision."""

    tokens: Tensor
    """int32 [B, context length], zero-padded."""


Step = Callable[[Operands], Tensor]
"""One step; its loss before the update."""


@functools.cache
def runtime(device: str) -> Any:
    """This process as the only rank."""
    from fastclip.distributed.runtime import initialise

    return initialise(device)


class FastclipStep:
    """Our step under the engine that training has."""

    def __init__(
        self, case: StepCase, *, packed: bool, last_row: bool, compiled: bool = False
    ) -> None:
        from fastclip.engine import Engine
        from fastclip.optim import OptimConfig, build_optimizer, parameter_groups
        from fastclip.train_step import LossConfig, TrainStep

        place = runtime("auto")
        self.case, self.packed = case, packed
        model = new_model(case).to(place.device).train()
        model.set_attention(AttentionConfig(last_row=last_row))
        model.set_patch_dropout(case.patch_dropout)
        if compiled:
            model.compile_blocks()
        config = OptimConfig(learning_rate=LEARNING_RATE)
        optimizer = build_optimizer(parameter_groups(model, config), config, place.device)
        self.engine = Engine(
            model,
            optimizer,
            EngineConfig(zero_stage=0, precision=case.precision),
            place,
            micro_batch_size=case.batch // case.micro_batches,
            micro_batches=case.micro_batches,
        )
        self.step = TrainStep(self.engine, LossConfig(), micro_batches=case.micro_batches)
        self._batch: Batch | None = None

    def __call__(self, operands: Operands) -> Tensor:
        if self._batch is None:
            self._batch = self._made(operands)
        batch = self._batch
        if self.case.part == "step":
            return self.step(batch).loss
        tokens = batch.tokens if batch.packed is None else batch.packed[0]
        output = self.engine.module.forward(tokens=tokens, normalize=False)
        assert output.text_features is not None
        return text_loss(output.text_features, self.engine.module)

    def close(self) -> None:
        self.engine.close()

    def _made(self, operands: Operands) -> Batch:
        rows = operands.tokens.cpu()
        count = len(rows)
        part = count // self.case.micro_batches
        packed = tuple(PackedTokens.pack(few) for few in rows.split(part))
        return Batch(
            images=operands.images,
            tokens=rows,
            lengths=torch.zeros(count, dtype=torch.int32),
            ids=None,
            keys=(),
            captions=(),
            metadata=(),
            packed=packed if self.packed else None,
        ).to(operands.images.device)


class OpenClipStep:
    """open_clip's model and loss in its own training loop's order, with torch's fused AdamW."""

    def __init__(self, case: StepCase, *, compiled: bool) -> None:
        from benchmarks.torchvision_beside_cpu import declare_operators

        declare_operators()
        import open_clip
        from open_clip.loss import ClipLoss

        from fastclip.models.interop import export_weights

        if case.micro_batches > 1 or case.patch_dropout:
            raise ValueError("not timed with micro-batches or patch dropout")
        device = runtime("auto").device
        with tempfile.TemporaryDirectory() as folder:
            export_weights(new_model(case), case.config, Path(folder), layout="open_clip")
            model = open_clip.create_model(f"local-dir:{folder}").to(device).train()
        self.case = case
        self.parameters: Any = model
        self.model: Any = torch.compile(model) if compiled else model
        self.loss = ClipLoss()
        self.dtype = AUTOCAST_DTYPES[case.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=case.precision == "fp16")
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), eps=1e-6, fused=True
        )

    def __call__(self, operands: Operands) -> Tensor:
        device = operands.images.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype is not None):
            if self.case.part == "text":
                features = self.model.encode_text(operands.tokens.long())
                return text_loss(features, self.parameters)
            output = self.model(operands.pixels, operands.tokens.long())
            if isinstance(output, dict):
                output = output["image_features"], output["text_features"], output["logit_scale"]
            loss = self.loss(*output[:3])
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.parameters.logit_scale.clamp_(0, 4.6052)
        return loss.detach()


def text_loss(features: Tensor, model: torch.nn.Module) -> Tensor:
    """Backward of a scalar of the text features; gradients are thrown away."""
    loss = features.float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()


def new_model(case: StepCase) -> Clip:
    """The weights that all begin with."""
    torch.manual_seed(0)
    return Clip(case.config)


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


def fastclip(
    *, packed: bool = True, last_row: bool = True, compiled: bool = False
) -> Callable[[StepCase], Step]:
    """Our step with these savings."""
    return lambda case: FastclipStep(case, packed=packed, last_row=last_row, compiled=compiled)


def open_clip(*, compiled: bool) -> Callable[[StepCase], Step]:
    """open_clip's, eager or compiled."""
    return lambda case: OpenClipStep(case, compiled=compiled)


def _flops(config: ClipConfig, part: str, count: Callable[..., float], **options: Any) -> float:
    """`count` of a pair, or what the text adds to it."""
    if part == "step":
        return count(config, **options)
    from fastclip.flops import vision_flops

    last_row = {k: v for k, v in options.items() if k == "last_row"}
    return count(config, **options) - 3 * vision_flops(config, **last_row)


def work(*, packed: bool, last_row: bool) -> Callable[[StepCase], Work]:
    """Share of the dense arithmetic that is executed."""

    def of(case: StepCase) -> Work:
        lengths = case.lengths() if packed else None
        executed = case.batch * _flops(
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
_ENGINE: dict[str, Any] = {"needs_cuda": False, "module": "deepspeed", "install": "deepspeed"}
PROVIDERS = (
    Provider("fastclip-compiled", fastclip(compiled=True), **_ENGINE),
    *(Provider(name, fastclip(**savings), **_ENGINE) for name, savings in _OURS.items()),
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
