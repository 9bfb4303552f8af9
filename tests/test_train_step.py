"""Every parameter's gradient on 1–4 ranks and every ZeRO stage equals the single process's.

The reference is plain torch in fp64: the whole batch in one process, the whole similarity matrix,
autograd. (In fp32, torch's own BatchNorm would differ from it by more than the bound.) What is
compared comes from AdamW's first moment after the first step: what the optimiser received after
DeepSpeed averaged it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastclip.data.batch import Batch
from fastclip.engine import build_engine
from fastclip.models.attention import AttentionConfig
from fastclip.models.clip import Clip
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig, ViTConfig
from fastclip.models.layers import convert_sync_batch_norm
from fastclip.tokenizer.packing import PackedTokens
from fastclip.train_step import LossConfig, TrainStep
from ranks import run_ranks
from small_towers import Place, engine_config

BETA1 = 0.9
PLAIN_LOSS = LossConfig()
TEXT = TextConfig(context_length=8, vocab_size=96, width=32, heads=2, layers=2)
VIT = ClipConfig(
    embed_dim=24,
    vision=ViTConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2),
    text=TEXT,
)
RESNET = ClipConfig(
    embed_dim=24,
    vision=ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=8, heads=4),
    text=TEXT,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison; `pairs` are per rank, and the same in total for the reference."""

    name: str
    model: ClipConfig
    pairs: tuple[int, ...]
    loss: LossConfig = PLAIN_LOSS
    micro_batches: int = 1
    several_positives: bool = False
    temperature: float | None = None
    freeze_visual: bool = False
    packed: bool = False


def _cases(world_size: int) -> list[Case]:
    equal = (6,) * world_size
    unequal = tuple(range(3, 3 + world_size))
    # The same twelve pairs whatever the ranks: gradients through BatchNorm and ReLU are sums that
    # cancel, and how many digits of them fp32 keeps depends on the batch.
    twelve = (12 // world_size,) * world_size
    twelve_unequal = {1: (12,), 2: (5, 7), 3: (2, 4, 6), 4: (1, 3, 3, 5)}[world_size]
    siglip = dataclasses.replace(VIT, init_logit_bias=-3.0)
    return [
        Case("ViT, packed, 3 micro-batches, several positives", VIT, equal, LossConfig(), 3, True,
             packed=True),
        Case("ViT, label smoothing, at scale 100", VIT, equal, LossConfig(label_smoothing=0.1),
             temperature=math.log(100.0)),
        Case("ViT, above the bound of the scale", VIT, equal, temperature=4.7),
        Case("ViT, packed, unequal ranks", VIT, unequal, packed=True),
        Case("ViT, SigLIP, 2 micro-batches", siglip, equal, LossConfig(kind="siglip"), 2),
        Case("ViT, locked image tower", VIT, equal, freeze_visual=True),
        Case("ResNet, SyncBatchNorm", RESNET, twelve),
        Case("ResNet, SyncBatchNorm, unequal ranks", RESNET, twelve_unequal),
    ]  # fmt: skip


def _model(case: Case) -> Clip:
    torch.manual_seed(1)
    model = Clip(case.model)
    with torch.no_grad():
        for parameter in model.parameters():  # nothing stays zero, every gradient is alive
            parameter.add_(0.02 * torch.randn_like(parameter))
        if case.temperature is not None:
            model.logit_scale.fill_(case.temperature)
    model.freeze(vision=case.freeze_visual, text=False)
    return model


def _batch(case: Case, rows: slice) -> Batch:
    total = sum(case.pairs)
    generator = torch.Generator().manual_seed(2)
    shape = (total, 3, case.model.vision.image_size, case.model.vision.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 95, (total, 8), dtype=torch.int32, generator=generator)
    lengths = torch.randint(3, 9, (total,), dtype=torch.int32, generator=generator)
    for row, length in enumerate(lengths.tolist()):
        tokens[row, length - 1] = 95
        tokens[row, length:] = 0
    ids = torch.arange(total) // 2 if case.several_positives else None
    names = tuple(str(i) for i in range(total))[rows]
    part = len(names) // case.micro_batches
    packed = tuple(PackedTokens.pack(few) for few in tokens[rows].split(part))
    return Batch(
        images=images[rows],
        tokens=tokens[rows],
        lengths=lengths[rows],
        ids=None if ids is None else ids[rows],
        keys=names,
        captions=names,
        metadata=({},) * len(names),
        packed=packed if case.packed else None,
    )


def _naive_loss(case: Case, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None, ids):
    logits = scale * image @ text.T
    same = torch.eye(len(image)).bool() if ids is None else ids[:, None] == ids[None, :]
    same = same.to(image.dtype)
    if case.loss.kind == "siglip":
        assert bias is not None
        return -F.logsigmoid((2 * same - 1) * (logits + bias)).sum() / len(image)
    target = same / same.sum(1, keepdim=True)
    smoothing = case.loss.label_smoothing
    target = (1 - smoothing) * target + smoothing / len(image)
    rows = -(target * logits.log_softmax(1)).sum(1).mean()
    columns = -(target * logits.T.log_softmax(1)).sum(1).mean()
    return (rows + columns) / 2


def _reference(case: Case) -> tuple[float, dict[str, Tensor]]:
    model = _model(case).train().double()
    model.set_attention(AttentionConfig(last_row=False))
    batch = _batch(case, slice(None))
    output = model(batch.images, batch.tokens)
    loss = _naive_loss(
        case,
        output.image_features,
        output.text_features,
        output.logit_scale,
        output.logit_bias,
        batch.ids,
    )
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradients


def _step(runtime: Any, case: Case, place: Place) -> tuple[float, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_optimizer_state

    first = sum(case.pairs[: runtime.rank])
    model = convert_sync_batch_norm(_model(case), None)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(BETA1, 0.98))
    engine = build_engine(
        model.train(),
        optimizer,
        engine_config(place, precision="fp32"),
        runtime,
        micro_batch_size=2,
        micro_batches=case.micro_batches,
    )
    step = TrainStep(engine, case.loss, micro_batches=case.micro_batches)
    result = step(_batch(case, slice(first, first + case.pairs[runtime.rank])))
    moments = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if engine.zero_stage == 0:
            moment = optimizer.state[parameter]["exp_avg"]
        else:
            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        assert moment is not None
        moments[name] = moment.clone() / (1 - BETA1)
    loss = float(result.loss)
    engine.close()
    return loss, moments


def _errors_on_ranks(
    runtime: Any, places: tuple[Place, ...]
) -> list[tuple[str, Place, float, float]]:
    rows = []
    for case in _cases(runtime.world_size):
        expected_loss, expected = _reference(case)
        whole = math.sqrt(sum(float(g.norm()) ** 2 for g in expected.values()))
        for place in places:
            loss, gradients = _step(runtime, case, place)
            assert gradients.keys() == expected.keys()
            worst = max(
                float((gradients[n] - g).norm()) / max(float(g.norm()), 1e-6 * whole)
                for n, g in expected.items()
            )
            rows.append((case.name, place, abs(loss - expected_loss) / expected_loss, worst))
    return rows


@pytest.mark.parametrize(
    ("world_size", "places"),
    [
        (1, ("plain", 0, 1, 2, 3)),
        (2, (0, 1, 2, 3)),
        (3, (1, 3)),
        (4, (1, 3)),
        pytest.param(3, (0, 2), marks=pytest.mark.slow),
        pytest.param(4, (0, 2), marks=pytest.mark.slow),
    ],
)
def test_gradients_equal_the_single_process(world_size, places, tmp_path):
    for rows in run_ranks(_errors_on_ranks, world_size, tmp_path, places):
        for name, place, loss_error, gradient_error in rows:
            print(f"W={world_size} {place} {name}: {loss_error:.1e} {gradient_error:.1e}")
            assert loss_error < 1e-5, (name, place)
            assert gradient_error < 1e-5, (name, place)


def _recover(runtime: Any, places: tuple[Place, ...]) -> list[list[float]]:
    """For each engine, the logit scales of steps that begin above the temperature's bound."""
    case = Case("above the bound", VIT, (6,) * runtime.world_size, temperature=4.7)
    batch = _batch(case, slice(6 * runtime.rank, 6 * runtime.rank + 6))
    scales = []
    for place in places:
        model = _model(case)
        model.visual.requires_grad_(False)
        model.text.requires_grad_(False)
        engine = build_engine(
            model.train(),
            torch.optim.AdamW([model.logit_scale], lr=0.05, weight_decay=0.0),
            engine_config(place, precision="fp32"),
            runtime,
            micro_batch_size=6,
        )
        step = TrainStep(engine, PLAIN_LOSS)
        scales.append([float(step(batch).logit_scale) for _ in range(8)])
        engine.close()
    return scales


@pytest.mark.parametrize(("world_size", "places"), [(1, ("plain", 0, 1, 2, 3)), (2, (0, 1, 2, 3))])
def test_temperature_recovers_from_above_its_bound(world_size, places, tmp_path):
    for rows in run_ranks(_recover, world_size, tmp_path, places):
        for scales in rows:
            assert scales[0] == scales[1] == pytest.approx(100.0)  # e^4.7 and e^4.65 are beyond
            assert scales[-1] < 90.0
            assert scales == sorted(scales, reverse=True)
