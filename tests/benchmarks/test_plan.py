"""The plan's numbers against counts made another way: torch's FLOP counter, loops over blocks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peers, plan, stripes
from benchmarks.cases import Case
from benchmarks.losses import Loss, make_operands

CASE = Case(64, 16, "fp32")


def _in_place_flop(
    this: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], **_: object
) -> int:
    return 2 * a[0] * a[1] * b[1]


def _counter() -> FlopCounterMode:
    # torch counts a product that is added in place only when told how.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place_flop})


def _units(loss: Loss, bias: float | None = None) -> float:
    leaves = [x for x in make_operands(CASE, bias, torch.device("cpu")) if x is not None]
    with _counter() as counter:
        loss(*leaves).backward()
    return counter.get_total_flops() / CASE.unit


@pytest.mark.parametrize("loss", ["contrastive", "sigmoid"])
def test_units_are_what_the_passes_multiply(loss: str) -> None:
    if loss == "contrastive":
        step, planned = stripes.contrastive(CASE, "reference", 0), plan.recompute(CASE)
        operands = make_operands(CASE, None, torch.device("cpu"))
    else:
        step, planned = stripes.sigmoid(CASE, "reference"), plan.sigmoid(CASE)
        operands = make_operands(CASE, -10.0, torch.device("cpu"))
    with _counter() as counter:
        step(operands)
    assert (
        counter.get_total_flops() / CASE.unit
        == planned.units
        == (4 if loss == "contrastive" else 3)
    )
    assert plan.stored(CASE).units == 3  # a product of four is not computed again
    assert plan.recompute(Case(64, 16, part="forward")).units == 1


def test_units_of_open_clip() -> None:
    pytest.importorskip("open_clip")
    assert _units(peers.open_clip_contrastive(CASE)) == plan.materialized(CASE).units
    assert _units(peers.open_clip_sigmoid(CASE), -10.0) == plan.materialized_sigmoid(CASE).units


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_traffic_and_launches_block_by_block(
    world: int, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(4096, 512, "bf16", normalize=normalize, world=world)
    monkeypatch.setattr(plan, "BLOCK_ELEMENTS", 384 * 384)
    budget = 2 * case.pairs * case.rows // 2  # of all exponentials, a half
    rows, columns, dims = case.rows, case.pairs, case.dims
    recompute = stored = half = held = 0
    launches = [4, 5, 5]  # prepare, summary, scale, finish; dots of the products with kept ones
    tower, wide = 2 * dims, 4 * dims  # bytes of a feature vector and of its gradient
    for top in range(0, rows, 384):
        for left in range(0, columns, 384):
            h, w = min(384, rows - top), min(384, columns - left)
            features = tower * (h + w)
            # A maximum and a sum for each row and each column of a tile; a last one may be smaller.
            partial = 8 * (h * -(-w // 128) + w * -(-h // 128))
            d_rows = tower * w + wide * h * (1 if left == 0 else 2)
            d_columns = tower * h + wide * w * (1 if top == 0 else 2)
            g = 2 * h * w
            common = features + 2 * partial + 3 * g + d_rows + d_columns
            held += g
            recompute += common + features
            stored += common + 2 * g
            half += common + (2 * g if held <= budget else features)
            kept = (False, True, held <= budget)
            launches = [n + (7 if k else 6) for n, k in zip(launches, kept, strict=True)]
    pairs = 2 * rows * (3 * tower + wide + (2 * tower if normalize else 0))
    variants = (plan.recompute, plan.stored, plan.two_pass(budget))
    planned = [variant(case) for variant in variants]
    assert [work.bytes_moved for work in planned] == [
        recompute + pairs,
        stored + pairs,
        half + pairs,
    ]
    assert [work.launches for work in planned] == launches


def test_a_small_batch_is_ten_launches() -> None:
    assert plan.recompute(Case(8192, 768)).launches == 10


def test_budget_keeps_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_ELEMENTS", 256 * 256)
    case = Case(600, 64)
    shapes = [h * w for h in (256, 256, 88) for w in (256, 256, 88)]
    for count in range(10):
        size = sum(shapes[:count])
        assert plan.kept_elements(case, 2 * size) == size
        assert plan.kept_elements(case, 2 * size + 2 * shapes[0] - 1) >= size
        assert plan.kept_elements(case, 2 * size - 1) < max(size, 1)
    assert plan.two_pass(2 * 65_536)(case).units == pytest.approx(4 - 65_536 / 360_000)
    assert plan.kept_elements(Case(600, 64, "fp32"), 2 * 65_536) == 0
    assert plan.kept_elements(Case(600, 64, "fp16"), 1 << 30) == 0


def test_memory_and_floor_of_the_headline() -> None:
    case = Case(65_536, 768)
    gradients = 2 * 65_536 * 768 * 4
    block = 16_384 * 16_384 * 2
    assert plan.recompute(case).extra_bytes == gradients + block
    assert plan.stored(case).extra_bytes == gradients + block + 2 * 65_536**2
    copies = 2 * 65_536 * 768 * 2
    normalized = plan.recompute(Case(65_536, 768, normalize=True))
    assert normalized.extra_bytes == gradients + block + copies
    # 4u at 800 TFLOP/s; the traffic takes less.
    assert plan.recompute(case).floor_ms(800, 3.0, case.unit) == pytest.approx(32.98, abs=0.01)
    assert plan.inf_cl(case).floor_ms(800, 3.0, case.unit) == pytest.approx(164.9, abs=0.1)
    # With little memory bandwidth the traffic is the floor.
    work = plan.recompute(case)
    assert work.bytes_moved is not None
    assert work.floor_ms(800, 0.1, case.unit) == pytest.approx(work.bytes_moved / 1e8)


def test_peers_that_pad_pay_for_it() -> None:
    assert plan.memeff(Case(64, 512)).units == 5
    assert plan.memeff(Case(64, 768)).units == pytest.approx(5 + 2 / 3)
    assert plan.memeff(Case(64, 1152)).units == 6


def test_constants_are_the_kernels() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from fastclip.kernels import contrastive, tiling

    assert plan.BLOCK_ELEMENTS == contrastive.BLOCK_ELEMENTS
    assert tiling.tiling(torch.bfloat16, 90).block_n == plan.TILE
    assert tiling.tiling(torch.bfloat16, 90, narrow=True).block_n == plan.SIGMOID_TILE
    for case in (Case(20_000, 64), Case(100_000, 64, world=8), Case(300, 64)):
        shape = (case.rows, case.pairs)
        assert len(tiling.blocks(*shape, plan.BLOCK_ELEMENTS)) == plan.blocks(case).count
        for budget in (0, 1 << 28, 1 << 29, 1 << 40):
            kept = contrastive.kept_elements(*shape, torch.bfloat16, budget)
            assert plan.kept_elements(case, budget) == kept
