"""Between loss and next step the host reads nothing from the device; what DeepSpeed reads."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from fastclip.data.batch import Batch
from fastclip.distributed.runtime import Runtime
from fastclip.engine import build_engine
from fastclip.losses import clip_loss
from fastclip.models.clip import Clip, ClipOutput
from fastclip.models.presets import preset
from fastclip.tokenizer.packing import PackedTokens
from fastclip.train_step import LossConfig, TrainStep
from operator_counts import OperatorCounts
from ranks import run_ranks
from small_towers import Place, engine_config

# Operators that would make the host wait for a GPU.
READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select")


def _loss(output: ClipOutput) -> torch.Tensor:
    assert output.image_features is not None
    assert output.text_features is not None
    return clip_loss(output.image_features, output.text_features, output.logit_scale)


def _reads(runtime: Runtime, place: Place, precision: str) -> int:
    """Of a third step's backward and update."""
    torch.manual_seed(0)
    model = Clip(preset("ViT-Nano-8")).train()
    engine = build_engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        engine_config(place, precision=precision, gradient_clipping=1.0),
        runtime,
        micro_batch_size=4,
    )
    side = model.config.vision.image_size
    images = torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(1, 255, (4, 8))
    found = 0
    for _ in range(3):
        output = engine.forward(images, tokens)
        loss = _loss(output)
        with OperatorCounts(*READS) as reads:
            engine.backward(loss)
            engine.step()
        found = reads.number
    engine.close()
    return found


def _all_reads(runtime: Runtime) -> dict[tuple[Place, str], int]:
    places: tuple[Place, ...] = ("plain", 0, 1, 2, 3)
    return {(p, how): _reads(runtime, p, how) for p in places for how in ("fp32", "fp16")}


def test_the_plain_engine_reads_nothing_and_deepspeeds_reads_are_counted(tmp_path):
    (found,) = run_ranks(_all_reads, 1, tmp_path)
    for (place, precision), count in found.items():
        print(f"{place} {precision}: {count} reads a step")
    assert found["plain", "fp32"] == found["plain", "fp16"] == 0
    assert found[0, "fp32"] == found[0, "fp16"] == 0
    # Of the DeepSpeed that pyproject.toml pins; with another, the README's sentence changes too.
    fp32 = [found[stage, "fp32"] for stage in (1, 2, 3)]
    assert fp32 == [3, 3, 2]
    assert [found[stage, "fp16"] for stage in (1, 2, 3)] == [count + 1 for count in fp32]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_whole_step_on_the_plain_engine_waits_for_nothing(precision):
    device = torch.device("cuda")
    torch.manual_seed(0)
    model = Clip(preset("ViT-Nano-8")).train().to(device)
    runtime = Runtime(rank=0, local_rank=0, world_size=1, device=device, backend="nccl")
    engine = build_engine(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
        engine_config("plain", precision=precision, gradient_clipping=1.0, outlier_factor=10.0),
        runtime,
        micro_batch_size=4,
        micro_batches=2,
    )
    side = model.config.vision.image_size
    images = torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8)
    tokens = torch.randint(1, 255, (8, 8), dtype=torch.int32)
    tokens[:, -1] = model.config.text.vocab_size - 1
    batch = Batch(
        images=images,
        tokens=tokens,
        lengths=torch.full((8,), 8, dtype=torch.int32),
        ids=None,
        keys=(),
        captions=(),
        metadata=(),
        packed=tuple(PackedTokens.pack(part) for part in tokens.tensor_split(2)),
    ).to(device)
    step = TrainStep(engine, LossConfig(), micro_batches=2)
    for _ in range(3):
        step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(result.info.applied)


def _waits(runtime: Runtime) -> dict[int, int]:
    del runtime
    os.environ["DS_ACCELERATOR"] = "cuda"  # `ranks` asks for CPUs, and DeepSpeed is not yet here
    device = torch.device("cuda")
    alone = Runtime(rank=0, local_rank=0, world_size=1, device=device, backend="gloo")
    counts = {}
    for stage in (0, 1, 2, 3):
        model = Clip(preset("ViT-Nano-8")).train().to(device)
        engine = build_engine(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True),
            engine_config(stage, precision="bf16"),
            alone,
            micro_batch_size=4,
        )
        side = model.config.vision.image_size
        images = torch.zeros(4, 3, side, side, dtype=torch.uint8, device=device)
        tokens = torch.full((4, 8), model.config.text.vocab_size - 1, device=device)
        for _ in range(3):
            output = engine.forward(images, tokens)
            loss = _loss(output)
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine.backward(loss)
                engine.step()
            torch.cuda.set_sync_debug_mode("default")
            counts[stage] = sum("synchroniz" in str(w.message) for w in caught)
        engine.close()
    return counts


@pytest.mark.gpu
def test_deepspeeds_waits_are_counted(tmp_path):
    pytest.importorskip("deepspeed")
    (counts,) = run_ranks(_waits, 1, tmp_path)
    print("waits for the device in a step's backward and update, by ZeRO stage:", counts)
    assert counts[0] == 0
