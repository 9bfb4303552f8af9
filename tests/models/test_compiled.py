"""Towers under torch.compile: the same numbers, and a bounded number of versions of the code."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch.nn.attention import varlen

from compared_towers import model, pixels, plainly, run, token_rows, worst
from fastclip.models import attention
from fastclip.tokenizer.packing import PackedTokens


def sequences(x: Tensor, starts: Tensor) -> list[Tensor]:
    """[T, H, d] to one [H, L, d] for each sequence."""
    return [part.transpose(0, 1) for part in x.tensor_split(starts[1:-1].long())]


def joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.transpose(0, 1) for part in parts])


def probabilities(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(dim=-1)


@torch.library.custom_op("fastclip_tests::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, key_starts: Tensor, causal: bool
) -> Tensor:
    """What PyTorch's packed kernels compute, sequence by sequence."""
    packed = zip(
        sequences(query, starts), sequences(key, key_starts), sequences(value, key_starts),
        strict=True,
    )  # fmt: skip
    return joined([probabilities(q, k, causal) @ v for q, k, v in packed])


@torch.library.custom_op("fastclip_tests::packed_attention_slopes", mutates_args=())
def packed_attention_slopes(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor,
    key_starts: Tensor, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    results: list[list[Tensor]] = [[], [], []]
    packed = zip(
        sequences(gradient, starts), sequences(query, starts), sequences(key, key_starts),
        sequences(value, key_starts), strict=True,
    )  # fmt: skip
    for g, q, k, v in packed:
        weights = probabilities(q, k, causal)
        slope = g @ v.mT
        slope = weights * (slope - (weights * slope).sum(dim=-1, keepdim=True))
        slope = slope * q.shape[-1] ** -0.5
        for result, part in zip(results, (slope @ k, slope.mT @ q, weights.mT @ g), strict=True):
            result.append(part)
    by_query, by_key, by_value = map(joined, results)
    return by_query, by_key, by_value


@packed_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@packed_attention_slopes.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object):
    operands = (query, key, value)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in operands)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.causal = inputs[5]


def _backward(ctx, gradient):
    return (*packed_attention_slopes(gradient, *ctx.saved_tensors, ctx.causal), None, None, None)


packed_attention.register_autograd(_backward, setup_context=_keep)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Code that stays eager because it has too many versions is an error."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize("parts", ["blocks", "towers"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_parts_compute_the_same(parts, recompute):
    rows = token_rows()
    clip = model()
    clip.set_activation_checkpointing(vision=recompute, text=recompute)
    clip.compile_parts(parts)
    assert worst(run(clip, PackedTokens.pack(rows)), plainly(tokens=rows)) < 1e-5
    clip.zero_grad()
    assert worst(run(clip, None, pixels()), plainly(images=pixels())) < 1e-5
    assert list(clip.state_dict()) == list(model().state_dict())


@pytest.mark.parametrize("parts", ["blocks", "towers"])
def test_a_run_compiles_a_bounded_number_of_versions(parts, monkeypatch):
    """Cached features, gradients, evaluation; on GPUs' way through packed attention."""

    def stand_in(query, key, value, starts, key_starts, longest, bound, *, window_size):
        return packed_attention(query, key, value, starts, key_starts, window_size == (-1, 0))

    def traced(graph, inputs, **_: object):
        return aot_eager(graph, inputs)

    monkeypatch.setattr(compile_fx, "compile_fx", traced)  # what is traced is judged, not its code
    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(
        attention, "choose", lambda impl, like, *, packed: "varlen" if packed else "sdpa"
    )
    draw = random.Random(0)

    def texts(count: int) -> PackedTokens:
        lengths = tuple(draw.randrange(1, 78) for _ in range(count))
        return PackedTokens.pack(token_rows(lengths), multiple=64)

    clip = model()
    clip.compile_parts(parts)
    rows = token_rows()
    assert worst(run(clip, PackedTokens.pack(rows)), plainly(tokens=rows)) < 1e-5
    images = pixels()
    versions = []
    for _ in range(8):
        packed = texts(len(images))
        with torch.no_grad():
            clip(images, packed)
        output = clip(images, packed)
        (output.image_features.sum() + output.text_features.sum()).backward()
        versions.append(counters["frames"]["ok"])
    assert versions[0] > 0
    assert len(set(versions[4:])) == 1
    clip.eval()
    with torch.no_grad():
        for count in (10, 7, 3, 5, 9, 2, 8):
            clip(images[:count], None)
            clip(None, texts(count))
            versions.append(counters["frames"]["ok"])
    assert len(set(versions[-3:])) == 1
    assert not counters["graph_break"]


@pytest.mark.gpu
@pytest.mark.parametrize("parts", ["blocks", "towers"])
def test_graphs_compute_the_same(parts):
    """In bf16, and no further from fp64 than eager; steps of other lengths in between."""
    rows = token_rows()
    expected = plainly(tokens=rows)
    errors = []
    for compiled in ("none", parts):
        torch._dynamo.reset()
        clip = model().cuda()
        clip.autocast_dtype = torch.bfloat16
        clip.compile_parts(compiled, cuda_graphs=True)
        for lengths in (None, None, (5, 6, 70), None, (2, 2), None):  # warm-up, record, replay
            clip.zero_grad()
            packed = PackedTokens.pack(token_rows(lengths) if lengths else rows, multiple=64)
            result = run(clip, packed.to(torch.device("cuda")))
        errors.append(worst(result, expected))
    assert errors[1] < 1.2 * errors[0]
