"""The plan's numbers against counts made another way: torch's FLOP counter, loops over chunks."""

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
    assert counter.get_total_flops() / CASE.unit == planned.units == 4
    assert plan.stored(CASE).units == 3  # a product of four is not computed again
    assert plan.recompute(Case(64, 16, part="forward")).units == 1


def test_units_of_open_clip() -> None:
    pytest.importorskip("open_clip")
    assert _units(peers.open_clip_contrastive(CASE)) == plan.materialized(CASE).units
    assert _units(peers.open_clip_sigmoid(CASE), -10.0) == plan.materialized_sigmoid(CASE).units


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("normalize", [False, True])
def test_traffic_and_launches_chunk_by_chunk(
    world: int, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(4096, 512, "bf16", normalize=normalize, world=world)
    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 4096 * 384)
    budget = 2 * case.pairs * case.rows // 2  # of all exponentials, a half
    rows, columns, dims = case.rows, case.pairs, case.dims
    recompute = stored = half = launches = 0
    tower, wide = 2 * dims, 4 * dims  # bytes of a feature vector and of its gradient
    for first in range(0, rows, 384):
        c = min(384, rows - first)
        tiles = -(-c // 128) * (columns // 128)
        features = tower * (c + columns)
        # A maximum and a sum for each row and each column of a tile; a last tile may be narrower.
        partial = 8 * (c * columns // 128) + 8 * columns * tiles // (columns // 128)
        d_rows = tower * columns + wide * c
        d_columns = tower * c + wide * columns * (1 if first == 0 else 2)
        g = 2 * c * columns
        common = features + 2 * partial + 3 * g + d_rows + d_columns
        recompute += common + features
        stored += common + 2 * g
        half += common + (2 * g if (first + c) * columns * 2 <= budget else features)
        launches += 4
    pairs = 2 * rows * (3 * tower + wide + (2 * tower if normalize else 0))
    assert plan.recompute(case).bytes_moved == recompute + pairs
    assert plan.stored(case).bytes_moved == stored + pairs
    assert plan.two_pass(budget)(case).bytes_moved == half + pairs
    assert plan.recompute(case).launches == plan.stored(case).launches == launches


def test_budget_keeps_whole_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK_ELEMENTS", 1000 * 256)
    case = Case(1000, 64)
    row = 2 * 1000
    kept = [plan.kept_rows(case, rows * row) for rows in (0, 255, 256, 600, 999, 1000, 5000)]
    assert kept == [0, 0, 256, 512, 768, 1000, 1000]
    assert plan.two_pass(512 * row)(case).units == pytest.approx(3.488)
    assert plan.kept_rows(Case(1000, 64, "fp32"), 1000 * row) == 256


def test_memory_and_floor_of_the_headline() -> None:
    case = Case(65_536, 768)
    gradients = 2 * 65_536 * 768 * 4
    chunk = 4_096 * 65_536 * 2
    assert plan.recompute(case).extra_bytes == gradients + chunk
    assert plan.stored(case).extra_bytes == gradients + chunk + 2 * 65_536**2
    copies = 2 * 65_536 * 768 * 2
    normalized = plan.recompute(Case(65_536, 768, normalize=True))
    assert normalized.extra_bytes == gradients + chunk + copies
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

    assert plan.CHUNK_ELEMENTS == contrastive.CHUNK_ELEMENTS
    assert tiling.tiling(torch.bfloat16, 90).block_n == plan.TILE
    case = Case(20_000, 64)
    for budget in (0, 1 << 28, 1 << 29, 1 << 40):
        kept = contrastive.kept_rows(case.rows, case.pairs, torch.bfloat16, budget)
        assert plan.kept_rows(case, budget) == kept
