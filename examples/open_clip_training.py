"""open_clip's training step with its loss replaced: one import changes.

    pip install fastclip-torch open_clip_torch
    python examples/open_clip_training.py

Two copies of a small model see the same batches, one with each loss.
"""

from __future__ import annotations

import copy

import open_clip
import torch
from open_clip.loss import ClipLoss as OpenClipLoss
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor, nn

from fastclip.losses import ClipLoss  # instead of `from open_clip.loss import ClipLoss`

STEPS, BATCH, TOLERANCE = 4, 16, 1e-4


def train_step(
    model: nn.Module,
    loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    texts: Tensor,
) -> float:
    """One step as in open_clip's own training program, without its logging and scaler."""
    optimizer.zero_grad()
    output = model(images, texts)  # image_features, text_features, logit_scale
    losses = loss(**output, output_dict=True)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    optimizer.step()
    with torch.no_grad():
        model.get_parameter("logit_scale").clamp_(0, 4.6052)
    return float(total.detach())


def main() -> None:
    torch.manual_seed(0)
    theirs = open_clip.CLIP(
        embed_dim=32,
        vision_cfg=CLIPVisionCfg(image_size=32, layers=2, width=64, patch_size=8, head_width=32),
        text_cfg=CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=2, layers=2),
        output_dict=True,
    )
    ours = copy.deepcopy(theirs)
    pairs = {"open_clip": (theirs, OpenClipLoss()), "fastclip": (ours, ClipLoss())}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-3) for name, (model, _) in pairs.items()
    }
    for step in range(STEPS):
        images, texts = torch.randn(BATCH, 3, 32, 32), torch.randint(1, 100, (BATCH, 16))
        values = {
            name: train_step(model, loss, optimizers[name], images, texts)
            for name, (model, loss) in pairs.items()
        }
        print(f"step {step}: " + ", ".join(f"{name} {value:.6f}" for name, value in values.items()))
        if abs(values["open_clip"] - values["fastclip"]) > TOLERANCE:
            raise SystemExit(f"the losses differ by more than {TOLERANCE}")
    print(f"ok: {STEPS} steps, losses equal to {TOLERANCE}")


if __name__ == "__main__":
    main()
