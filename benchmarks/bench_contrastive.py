"""The softmax contrastive loss beside its peers: ``python -m benchmarks.bench_contrastive``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import losses, peers, plan, stripes
from benchmarks.cases import CONTRASTIVE_SETS, Case
from benchmarks.harness import Provider, finish, main
from benchmarks.losses import Loss, Step, autograd_step, moderate, whole
from fastclip.losses import clip_loss
from fastclip.ops.dispatch import Impl

GIB = 1 << 30
EVERYTHING = 1 << 50
"""A budget in bytes that no case exceeds."""


def fastclip(impl: Impl, budget: int = 0) -> Callable[[Case], Step]:
    """This project's loss; features of any length are brought to unit length by the kernels.

    Args:
        budget: bytes for exponentials kept from the first pass; 0 computes them again.
    """

    def build(case: Case) -> Step:
        if case.world > 1:
            return stripes.contrastive(case, impl, budget)

        def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
            return clip_loss(
                image, text, scale, normalize=case.normalize, memory_budget=budget, impl=impl
            )

        return autograd_step(loss, case, normalizes=True)

    return build


def _from_loss(build: Callable[[Case], Loss]) -> Callable[[Case], Step]:
    return lambda case: autograd_step(build(case), case)


def _compiled_open_clip(case: Case) -> Loss:
    return peers.compiled(peers.open_clip_contrastive(case))


def _open_clip(case: Case) -> Step:
    if case.world > 1:
        return peers.open_clip_stripe(case)
    return autograd_step(peers.open_clip_contrastive(case), case)


def _in_part(budget: int) -> Callable[[Case], bool]:
    """Whether a budget keeps some of the exponentials and not all."""
    return lambda case: 0 < plan.kept_elements(case, budget) < case.rows * case.pairs


def _some(case: Case) -> bool:
    """Whether exponentials are kept at all."""
    return plan.kept_elements(case, EVERYTHING) > 0


# Module, distribution, pip's arguments.
OPEN_CLIP = ("open_clip", "open_clip_torch", "open_clip_torch")
CCE = ("cut_cross_entropy", "cut-cross-entropy", "cut-cross-entropy==25.1.1")

PROVIDERS = (
    Provider("fastclip", fastclip("triton"), graph=True),
    Provider("fastclip-stored", fastclip("triton", EVERYTHING), accepts=_some, graph=True),
    Provider("fastclip-2gib", fastclip("triton", 2 * GIB), accepts=_in_part(2 * GIB)),
    Provider("fastclip-8gib", fastclip("triton", 8 * GIB), accepts=_in_part(8 * GIB)),
    Provider("reference", fastclip("reference"), needs_cuda=False, accepts=moderate),
    Provider(
        "torch-compile", _from_loss(lambda case: peers.compiled(peers.plain_contrastive)),
        "torch", "torch", "torch", accepts=whole,
    ),
    Provider("open_clip", _open_clip, *OPEN_CLIP, needs_cuda=False),
    Provider("open_clip-compile", _from_loss(_compiled_open_clip), *OPEN_CLIP, accepts=whole),
    Provider("memeff", _from_loss(peers.memeff), "memeff", "memeff", "memeff", accepts=whole),
    Provider(
        "cut-cross-entropy", _from_loss(peers.cut_cross_entropy(None)), *CCE, accepts=whole
    ),
    Provider(
        "cut-cross-entropy-filtered", _from_loss(peers.cut_cross_entropy("auto")), *CCE,
        accepts=lambda case: case in CONTRASTIVE_SETS["accuracy"],
    ),
    # Last, since an illegal access in a kernel ends the run.
    Provider(
        "inf-cl", _from_loss(peers.inf_cl), "inf_cl", "inf-cl", "inf-cl",
        accepts=lambda case: whole(case) and moderate(case),
    ),
)  # fmt: skip

BENCHMARK = losses.benchmark(
    "contrastive", losses.CONTRASTIVE, PROVIDERS, CONTRASTIVE_SETS, plan.CONTRASTIVE
)

if __name__ == "__main__":
    finish(main(BENCHMARK))
