"""Contrastive losses, exact on any number of ranks. Importing them needs torch alone."""

from fastclip.losses.clip import MEMORY_BUDGET, ClipLoss, clip_loss, clip_loss_and_grads
from fastclip.losses.common import LossGradients
from fastclip.losses.siglip import SigLipLoss, siglip_loss, siglip_loss_and_grads

__all__ = [
    "MEMORY_BUDGET",
    "ClipLoss",
    "LossGradients",
    "SigLipLoss",
    "clip_loss",
    "clip_loss_and_grads",
    "siglip_loss",
    "siglip_loss_and_grads",
]
