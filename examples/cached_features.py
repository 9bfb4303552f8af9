"""A batch that does not fit into memory at once, exact: cached features (arXiv 2101.06983).

    pip install fastclip-torch
    python examples/cached_features.py

Features of all micro-batches are computed without a graph, the loss is evaluated once, and a second
forward of each micro-batch carries the gradients of its features on. The result is compared with
the step on the whole batch.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fastclip.losses import clip_loss, clip_loss_and_grads

BATCH, MICRO, TOLERANCE = 48, 12, 1e-4


class Towers(nn.Module):
    """Two small encoders and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(40, 64), nn.GELU(), nn.Linear(64, 16))
        self.text = nn.Sequential(nn.Linear(30, 64), nn.GELU(), nn.Linear(64, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        return self.image(images), self.text(texts)


def cached_backward(model: Towers, images: Tensor, texts: Tensor) -> Tensor:
    """Backward of the whole batch's loss, one micro-batch in memory at a time."""
    batches = list(zip(images.split(MICRO), texts.split(MICRO), strict=True))
    with torch.no_grad():
        features = [torch.cat(x) for x in zip(*(model(*batch) for batch in batches), strict=True)]
    scale = model.logit_scale.exp()
    # normalize=True: the gradients are those of the raw features.
    loss, gradients = clip_loss_and_grads(features[0], features[1], scale.detach(), normalize=True)
    d_image = gradients.d_image_features.split(MICRO)
    d_text = gradients.d_text_features.split(MICRO)
    for batch, d_a, d_b in zip(batches, d_image, d_text, strict=True):
        torch.autograd.backward(model(*batch), (d_a, d_b))
    scale.backward(gradients.d_logit_scale)  # once: it belongs to the batch, not to its parts
    return loss


def main() -> None:
    torch.manual_seed(0)
    model = Towers()
    whole = copy.deepcopy(model)
    images, texts = torch.randn(BATCH, 40), torch.randn(BATCH, 30)
    loss = cached_backward(model, images, texts)
    image_features, text_features = whole(images, texts)
    scale = whole.logit_scale.exp()
    expected = clip_loss(image_features, text_features, scale, normalize=True)
    expected.backward()
    if abs(float(loss) - float(expected.detach())) > TOLERANCE:
        raise SystemExit("the losses differ")
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        if float((mine.grad - theirs.grad).norm()) > TOLERANCE * float(theirs.grad.norm()):
            raise SystemExit(f"{name}: the gradients differ")
    print(f"ok: {BATCH // MICRO} micro-batches, loss {float(loss):.6f}, all gradients equal")


if __name__ == "__main__":
    main()
