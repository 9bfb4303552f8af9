"""Packed texts hold what the rows do up to their ends, shortest first."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fastclip.tokenizer import EOT, Tokenizer
from fastclip.tokenizer.packing import PackedTokens

TEXTS = ["a photo of a cat", "", "dog", "a", "cat", "the quick brown fox " * 30]


def unpacked(packed: PackedTokens) -> list[list[int]]:
    starts = packed.segments.starts.tolist()
    texts = [packed.ids[a:b].tolist() for a, b in pairwise(starts)]
    return [texts[place] for place in packed.places.tolist()]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_text_is_there_up_to_its_end(dtype: torch.dtype):
    rows, lengths = Tokenizer().encode_batch(TEXTS)
    packed = PackedTokens.pack(rows.to(dtype))
    expected = [row[:length].tolist() for row, length in zip(rows, lengths, strict=True)]
    assert unpacked(packed) == expected
    assert packed.ids.dtype == packed.positions.dtype == packed.segments.starts.dtype == torch.int32
    assert packed.segments.lengths == tuple(sorted(lengths.tolist()))
    assert packed.segments.groups == ((1, 2), (3, 3), (1, 7), (1, 77))
    assert packed.segments.bound == 128
    assert len(packed) == len(TEXTS)
    counted = [p for length in packed.segments.lengths for p in range(length)]
    assert packed.positions.tolist() == counted


def test_the_first_end_counts():
    rows = torch.zeros(2, 10, dtype=torch.int32)
    rows[0, :4] = torch.tensor([EOT - 1, 5, EOT, 7])
    rows[0, 6] = EOT
    rows[1, :2] = torch.tensor([EOT - 1, EOT])
    assert unpacked(PackedTokens.pack(rows)) == [[EOT - 1, 5, EOT], [EOT - 1, EOT]]


@pytest.mark.parametrize("multiple", [2, 63, 64, 65, 1024])
def test_filled_up_to_a_multiple(multiple: int):
    rows, _ = Tokenizer().encode_batch(TEXTS)
    plain = PackedTokens.pack(rows)
    shapes = set()
    for dropped in range(4):
        packed = PackedTokens.pack(rows[dropped:], multiple=multiple)
        assert packed.ids.numel() % multiple == 0
        starts, lengths = packed.segments.starts, packed.segments.lengths
        assert starts.diff().tolist() == list(lengths)
        assert starts[-1] == packed.ids.numel() == packed.positions.numel()
        assert len(packed) == len(packed.lengths) == len(rows) - dropped
        fill = lengths[len(packed) :]
        assert all(1 <= length <= 64 for length in fill)
        assert list(fill) == sorted(fill, reverse=True)
        assert sum(fill) <= multiple + len(fill) - 1
        assert packed.segments.bound == 128
        shapes.add(len(starts) - len(packed))
    assert len(shapes) == 1  # however many tokens are missing
    filled = PackedTokens.pack(rows, multiple=multiple)
    assert filled.lengths == plain.segments.lengths
    assert torch.equal(filled.ids[: plain.ids.numel()], plain.ids)
    assert filled.ids[plain.ids.numel() :].sum() == 0


def test_no_texts():
    packed = PackedTokens.pack(torch.zeros(0, 77, dtype=torch.int32))
    assert len(packed) == packed.ids.numel() == packed.places.numel() == 0
    assert packed.segments.starts.tolist() == [0]
    assert packed.segments.groups == ()


@pytest.mark.parametrize(
    "rows", [torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3), torch.zeros(2, 3, 4).int()]
)
def test_other_tensors_are_refused(rows: torch.Tensor):
    with pytest.raises(TypeError, match="token rows are int32 or int64"):
        PackedTokens.pack(rows)
