"""docs/memory.md: what a step keeps on each device: ``python -m benchmarks.memory_table``.

Bytes of parameters, gradients and optimiser by formula (tests compare it with what the engines
hold), activations counted from what autograd saves in a forward pass in bfloat16 on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.record import ROOT
from fastclip.engine.config import AUTOCAST_DTYPES
from fastclip.micro_batch_size import kept_bytes
from fastclip.models.clip import Clip
from fastclip.models.config import Recompute, ResNetConfig
from fastclip.models.presets import preset

PATH = ROOT / "docs" / "memory.md"
MODELS = ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16", "ViT-L-14",
          "ViT-L-14-336")  # fmt: skip
RANKS = (8, 64)
POLICIES: tuple[Recompute, ...] = ("none", "selective", "full")

TEXT = """# Memory

Made by `python -m benchmarks.memory_table`; edit that.

## Parameters, gradients, optimiser

Bytes for each of P parameters on each of W ranks, AdamW, parameters in fp32:

| engine | weights | gradients | master copy | statistics | sum |
|---|---:|---:|---:|---:|---:|
| plain (one rank), ZeRO 0 | 4 | 4 | – | 8 | 16 |
| ZeRO 1 | 4 | 4 | 4/W | 8/W | 8 + 12/W |
| ZeRO 2 | 4 | 4/W | 4/W | 8/W | 4 + 16/W |
| ZeRO 3 | 4/W | 4/W | 4/W | 8/W | 20/W |
| `optim.algorithm=compact_adamw` (plain, ZeRO 0) | 2 | 2 | – | 4 | 8 |

DeepSpeed's sharded optimisers keep a copy of the weights of their own, so that on one rank they
need more than the plain engine, not less. To it come buffers whatever the model is: 0.4 GB in
stages 1 and 2 (`reduce_bucket_size` and `allgather_bucket_size`, 50 million elements each), 0.2 GB
and more in stage 3.

GiB on a rank:

{states}

**Which stage.** On one rank none: `engine.backend=auto` takes the plain engine whatever
`engine.zero_stage` says. On several, 1 is the recipes' choice: with it all of the paper's models
fit, and gradients are reduced while the backward pass runs. 0, where the host need not wait for the
device, is the demo's, and what LAMB, `compact_adamw` and `engine.outlier_factor` need. 2 and 3 are
for models whose sum above would leave too little of a device to activations: on 80 GB that begins
at some 5 billion parameters.

How DeepSpeed reduces gradients is written out in `fastclip/engine/config.py` and can be changed by
`engine.deepspeed_json`: buckets of 50 million elements, reduced while the backward pass runs
(`overlap_comm`, stages 1 to 3), in the gradients' dtype, averaged over ranks; stage 0 reduces after
the backward pass.

## Activations

MiB that a pair of a micro-batch keeps for the backward pass, in bfloat16, text of all 77 tokens, by
`run.activation_checkpointing_visual` and `_text`. `run.micro_batches=auto` measures this at the
start and takes the fewest micro-batches that fit.

{activations}

"selective" computes normalisations and activations anew and repeats no matrix product; "full" the
blocks, a third more work. A ResNet has no "selective"; its text tower does.
"""


def parameters(model: str) -> int:
    """Of a preset, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in Clip(preset(model)).parameters())


def state_bytes(stage: int, ranks: int) -> float:
    """Of a parameter on a rank: weight, gradient, master copy, statistics."""
    return {0: 16.0, 1: 8 + 12 / ranks, 2: 4 + 16 / ranks, 3: 20 / ranks}[stage]


def states_table() -> str:
    """A line for each model."""
    heads = [f"ZeRO {s}, {w} ranks" for w in RANKS for s in (1, 2, 3)]
    lines = [
        "| | P, million | plain, ZeRO 0 | " + " | ".join(heads) + " | compact |",
        "|---|" + "---:|" * (3 + len(heads)),
    ]
    for model in MODELS:
        count = parameters(model)
        each = [16.0, *(state_bytes(s, w) for w in RANKS for s in (1, 2, 3)), 8.0]
        cells = [f"{count / 1e6:.0f}", *(f"{count * b / 2**30:.2f}" for b in each)]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def activations_table() -> str:
    """A line for each model; some minutes."""
    lines = ["| | " + " | ".join(POLICIES) + " |", "|---|" + "---:|" * len(POLICIES)]
    # A process for each, since CPU kernels keep what they have allocated for the largest.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for name, cells in zip(MODELS, pool.map(activations, MODELS), strict=True):
            print(name, *cells, file=sys.stderr, flush=True)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def activations(name: str) -> list[str]:
    """Of a model, MiB by policy."""
    model = Clip(preset(name)).train()
    model.autocast_dtype = AUTOCAST_DTYPES["bf16"]
    cells = []
    for policy in POLICIES:
        resnet = isinstance(model.config.vision, ResNetConfig)
        model.set_activation_checkpointing(
            vision="none" if resnet and policy == "selective" else policy, text=policy
        )
        few, more = (kept_bytes(model, pairs) for pairs in (1, 3))
        cells.append(f"{(more - few) / 2 / 2**20:.1f}")
    return cells


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    text = TEXT.format(states=states_table(), activations=activations_table())
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
