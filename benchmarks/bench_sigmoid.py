"""The sigmoid loss beside its peers: ``python -m benchmarks.bench_sigmoid``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from benchmarks import losses, peers, plan, stripes
from benchmarks.bench_contrastive import OPEN_CLIP
from benchmarks.cases import SIGMOID_SETS, Case
from benchmarks.harness import Provider, finish, main
from benchmarks.losses import Step, autograd_step, moderate, whole
from fastclip.losses import siglip_loss
from fastclip.ops.dispatch import Impl


def fastclip(impl: Impl) -> Callable[[Case], Step]:
    """This project's loss; features of any length are brought to unit length by the kernels."""

    def build(case: Case) -> Step:
        if case.world > 1:
            return stripes.sigmoid(case, impl)

        def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            return siglip_loss(image, text, scale, bias, normalize=case.normalize, impl=impl)

        return autograd_step(loss, case, normalizes=True)

    return build


def _open_clip(case: Case) -> Step:
    return autograd_step(peers.open_clip_sigmoid(case), case)


def _compiled(case: Case) -> Step:
    return autograd_step(peers.compiled(peers.plain_sigmoid), case)


def _siglip_kernel(case: Case) -> Step:
    if case.world > 1:
        return peers.siglip_kernel_stripe(case)
    return autograd_step(peers.siglip_kernel(case), case)


PROVIDERS = (
    Provider("fastclip", fastclip("triton"), graph=True),
    Provider("reference", fastclip("reference"), needs_cuda=False, accepts=moderate),
    Provider("torch-compile", _compiled, "torch", "torch", "torch", accepts=whole),
    Provider("open_clip", _open_clip, *OPEN_CLIP, needs_cuda=False, accepts=whole),
    Provider(
        "siglip-kernel", _siglip_kernel, "siglip_kernel", "siglip-kernel", "siglip-kernel",
        graph=True,
    ),
)  # fmt: skip

BENCHMARK = losses.benchmark("sigmoid", losses.SIGMOID, PROVIDERS, SIGMOID_SETS, plan.SIGMOID)

if __name__ == "__main__":
    finish(main(BENCHMARK))
