"""What is left out of the towers' arithmetic changes nothing: padding, all but one last row."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from compared_towers import LENGTHS, model, pixels, plainly, run, token_rows, worst
from fastclip.models.attention import AttentionConfig, AttentionImpl, attend, choose
from fastclip.tokenizer.packing import PackedTokens, Segments


@pytest.mark.parametrize("last_row", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_texts_equal_padded_ones(last_row: bool, recompute: bool):
    rows = token_rows()
    clip = model()
    clip.set_attention(AttentionConfig(last_row=last_row))
    clip.set_activation_checkpointing(vision="none", text="full" if recompute else "none")
    error = worst(run(clip, PackedTokens.pack(rows)), plainly(tokens=rows))
    print(f"packed, last row {last_row}, recompute {recompute}: {error:.1e}")
    assert error < 1e-5


def test_packing_in_bf16_errs_no_more_than_padding():
    rows = token_rows()
    expected = plainly(tokens=rows)
    errors = []
    for tokens, last_row in ((rows, False), (PackedTokens.pack(rows), True)):
        clip = model()
        clip.autocast_dtype = torch.bfloat16
        clip.set_attention(AttentionConfig(last_row=last_row))
        errors.append(worst(run(clip, tokens), expected))
    print(f"bf16: padded {errors[0]:.1e}, packed {errors[1]:.1e}")
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("tower", ["text", "image"])
def test_one_row_of_the_last_block(tower: str):
    inputs = {"tokens": token_rows()} if tower == "text" else {"images": pixels()}
    error = worst(run(model(), inputs.get("tokens"), inputs.get("images")), plainly(**inputs))
    print(f"last row, {tower}: {error:.1e}")
    assert error < 1e-5


def test_one_text_and_none():
    clip = model()
    one = token_rows((5,))
    features = clip(tokens=PackedTokens.pack(one)).text_features
    torch.testing.assert_close(features, clip(tokens=one).text_features)
    none = clip(tokens=PackedTokens.pack(one[:0])).text_features
    assert none.shape == (0, 24)
    none.sum().backward()
    assert all(p.grad is not None for p in clip.text.parameters())


def test_bad_packed_texts_are_named():
    clip = model()
    rows = token_rows((5, 9))
    long = torch.cat([torch.ones(2, 90, dtype=torch.int32), rows], dim=1)
    with pytest.raises(ValueError, match=r"packed text has \d+ tokens, more than .* 77"):
        clip(tokens=PackedTokens.pack(long))
    rows[1, 3] = 96
    with pytest.raises(ValueError, match="from 0 to 95 in this model; the batch holds 96"):
        clip(tokens=PackedTokens.pack(rows))


def test_dropped_patches():
    clip = model()
    images = pixels()
    everything = clip(images=images).image_features
    clip.set_patch_dropout(0.5)
    seen = []
    visual: Any = clip.visual
    hook = visual.blocks[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].shape)
    )
    dropped = clip(images=images).image_features
    assert seen == [(len(LENGTHS), 9, 48)]  # the class token and 8 of 16 patches
    assert not torch.allclose(dropped, everything)
    clip.eval()
    torch.testing.assert_close(clip(images=images).image_features, everything)
    hook.remove()
    clip.train()
    clip.set_patch_dropout(0.99)  # one patch stays
    assert clip(images=images).image_features.isfinite().all()
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        clip.set_patch_dropout(1.0)


def test_patches_are_dropped_with_their_positions():
    """Equal to a tower that is shown the kept patches at their places."""
    clip = model()
    clip.set_patch_dropout(0.5)
    images = pixels()[:1]
    chance = torch.rand(1, 16, generator=torch.Generator().manual_seed(5))
    kept = chance.topk(8, dim=1).indices[0].sort().values
    state = torch.get_rng_state()
    torch.manual_seed(5)
    dropped = clip(images=images, normalize=False).image_features
    torch.set_rng_state(state)
    visual: Any = clip.visual
    patches = visual.patch_embedding(clip._pixels(images)).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(1, 1, -1), patches], 1)
    x = visual.ln_pre(x + visual.positional_embedding)[:, [0, *(kept + 1).tolist()]]
    for block in visual.blocks:
        x = block(x)
    torch.testing.assert_close(dropped, visual.proj(visual.ln_post(x[:, 0])))


def _operands(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> tuple[list[Tensor], Segments]:
    starts = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator().manual_seed(3)
    shape = (int(starts[-1]), 2, 32)
    made = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    return [x.requires_grad_() for x in made], Segments(starts, lengths)


def _attended_one_by_one(
    operands: list[Tensor], segments: Segments, causal: bool, single: bool
) -> Tensor:
    results = []
    starts = segments.starts.tolist()
    for begin, end in pairwise(starts):
        query, key, value = (x[None, begin:end] for x in operands)
        if single:
            query = query[:, -1:]
        results.append(attend(query, key, value, causal=causal and not single, impl="sdpa")[0])
    return torch.cat(results)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "tolerance"),
    [
        ("auto", "cpu", torch.float32, 1e-5),
        ("sdpa", "cpu", torch.float64, 1e-12),
        ("auto", "cpu", torch.bfloat16, 2e-2),
        pytest.param("auto", "cuda", torch.float32, 1e-5, marks=pytest.mark.gpu),
        pytest.param("varlen", "cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
        pytest.param("varlen", "cuda", torch.float16, 2e-3, marks=pytest.mark.gpu),
        pytest.param("xformers", "cuda", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
    ],
)
def test_packed_attention(
    impl: AttentionImpl,
    device: str,
    dtype: torch.dtype,
    tolerance: float,
    causal: bool,
    single: bool,
):
    if impl == "xformers":
        pytest.importorskip("xformers")
    operands, segments = _operands(device, dtype, (1, 1, 2, 5, 5, 5, 40, 77))
    reference = [x.detach().cpu().double().requires_grad_() for x in operands]
    expected = _attended_one_by_one(
        reference, Segments(segments.starts.cpu(), segments.lengths), causal, single
    )
    query = operands[0]
    if single:
        query = query.index_select(0, segments.starts[1:].long() - 1)
    result = attend(
        query, *operands[1:], causal=causal and not single, segments=segments, impl=impl
    )
    assert result.shape == query.shape
    expected.square().sum().backward()
    result.square().sum().backward()
    gradients = [(x.grad, y.grad) for x, y in zip(operands, reference, strict=True)]
    for ours, right in [(result, expected), *gradients]:
        assert ours is not None
        assert right is not None
        error = (ours.detach().cpu().double() - right).norm() / right.norm()
        assert error < tolerance


def test_what_cannot_run_here_is_refused():
    like = torch.zeros(4, 2, 32)
    assert choose("auto", like, packed=True) == choose("auto", like, packed=False) == "sdpa"
    for impl in ("varlen", "xformers"):
        with pytest.raises(ValueError, match=rf"attention\.impl={impl} runs on CUDA"):
            choose(impl, like, packed=True)
    with pytest.raises(ValueError, match=r"attention\.impl is auto, sdpa, varlen, xformers"):
        AttentionConfig(impl="flash")  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
def test_packed_towers_on_a_gpu():
    """Packed in bf16 by PyTorch's kernels: no further from fp64 than padded."""
    rows = token_rows()
    expected = plainly(tokens=rows)
    errors = []
    for tokens in (rows.cuda(), PackedTokens.pack(rows).to(torch.device("cuda"))):
        clip = model().cuda()
        clip.autocast_dtype = torch.bfloat16
        errors.append(worst(run(clip, tokens), expected))
    assert errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("multiple", [2, 64, 1000])
def test_filling_up_changes_nothing(multiple: int):
    rows = token_rows()
    packed = PackedTokens.pack(rows, multiple=multiple)
    assert packed.ids.numel() % multiple == 0
    for last_row in (False, True):
        clip = model()
        clip.set_attention(AttentionConfig(last_row=last_row))
        error = worst(run(clip, packed), plainly(tokens=rows))
        print(f"filled to {packed.ids.numel()}, last row {last_row}: {error:.1e}")
        assert error < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_no_sequence_is_no_work(packed: bool, monkeypatch: pytest.MonkeyPatch):
    """PyTorch's attention of an empty batch gives no tensor on some GPUs."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: None)
    shape = (0, 2, 8) if packed else (0, 5, 2, 8)
    segments = Segments(torch.zeros(1, dtype=torch.int32), ()) if packed else None
    query, key, value = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    result = attend(query, key, value, causal=True, segments=segments)
    assert result.shape == shape
    result.sum().backward()


def test_towers_of_nothing():
    clip = model()
    output = clip(pixels()[:0], PackedTokens.pack(token_rows()[:0]))
    assert output.image_features.shape == output.text_features.shape == (0, 24)
    (output.image_features.sum() + output.text_features.sum()).backward()
    assert all(p.grad is None or not p.grad.any() for p in clip.parameters())
