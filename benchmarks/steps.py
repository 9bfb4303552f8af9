"""One training step of each way: ours under each engine, and open_clip's."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import caption_lengths
from fastclip.data.batch import Batch
from fastclip.engine import EngineConfig, PlainEngine, build_engine
from fastclip.engine.config import AUTOCAST_DTYPES
from fastclip.engine.step_guard import StepInfo
from fastclip.flops import training_flops_per_sample
from fastclip.models.attention import AttentionConfig
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, Compiled
from fastclip.models.presets import preset
from fastclip.optim import OptimConfig, build_optimizer, parameter_groups
from fastclip.tokenizer.packing import PackedTokens
from fastclip.train_step import LossConfig, TrainStep

LEARNING_RATE = 1e-6

EngineName = Literal["plain", "zero-0", "zero-1", "unguarded"]
"""Plain PyTorch; DeepSpeed at a stage; plain without the guard (no norm, no check)."""


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
        return self.batch * flops(self.config, self.part, training_flops_per_sample)

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

    tokens: Tensor
    """int32 [B, context length], zero-padded."""


def flops(config: ClipConfig, part: str, count: Callable[..., float], **options: Any) -> float:
    """`count` of a pair, or what the text adds to it."""
    if part == "step":
        return count(config, **options)
    from fastclip.flops import vision_flops

    last_row = {k: v for k, v in options.items() if k == "last_row"}
    return count(config, **options) - 3 * vision_flops(config, **last_row)


@functools.cache
def runtime(device: str) -> Any:
    """This process as the only rank."""
    from fastclip.distributed.runtime import initialise

    return initialise(device)


class Unguarded(PlainEngine):
    """What the guard costs is what this one saves."""

    def _update(self) -> StepInfo:
        self.optimizer.step()
        self.optimizer.zero_grad()
        device = self.runtime.device
        return StepInfo(torch.zeros((), device=device), torch.ones((), device=device).bool())


class FastclipStep:
    """Our step, as training runs it on one rank or under another engine."""

    def __init__(
        self,
        case: StepCase,
        *,
        packed: bool = True,
        last_row: bool = True,
        compiled: Compiled = "none",
        cuda_graphs: bool = False,
        engine: EngineName = "plain",
    ) -> None:
        place = runtime("auto")
        self.case, self.packed = case, packed
        self.multiple = 1024 if cuda_graphs else 1
        model = new_model(case).to(place.device).train()
        model.set_attention(AttentionConfig(last_row=last_row))
        model.set_patch_dropout(case.patch_dropout)
        model.compile_parts(compiled, cuda_graphs=cuda_graphs)
        config = OptimConfig(learning_rate=LEARNING_RATE)
        optimizer = build_optimizer(parameter_groups(model, config), config, place.device)
        assert isinstance(optimizer, torch.optim.Optimizer)
        settings = EngineConfig(precision=case.precision)
        if engine.startswith("zero-"):
            settings = dataclasses.replace(
                settings,
                backend="deepspeed",
                zero_stage=int(engine[-1]),  # pyright: ignore[reportArgumentType]
            )
        build = functools.partial(build_engine, micro_batch_size=case.batch // case.micro_batches)
        if engine == "unguarded":
            build = Unguarded
        self.engine = build(model, optimizer, settings, place, micro_batches=case.micro_batches)
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
        packed = tuple(PackedTokens.pack(few, multiple=self.multiple) for few in rows.split(part))
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
        self._pixels: Tensor | None = None
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
            if self._pixels is None:
                self._pixels = normalised(operands.images, self.case.config, self.dtype)
            output = self.model(self._pixels, operands.tokens.long())
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


def normalised(images: Tensor, config: ClipConfig, dtype: torch.dtype | None) -> Tensor:
    """Pixels as open_clip takes them, made a few at a time: fp32 is four times the bytes."""
    pixels = torch.empty_like(images, dtype=dtype or torch.float32)
    mean, std = (
        torch.tensor(numbers, device=images.device)[:, None, None]
        for numbers in (config.image_mean, config.image_std)
    )
    for few, made in zip(images.split(256), pixels.split(256), strict=True):
        made.copy_((few / 255 - mean) / std)
    return pixels


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
