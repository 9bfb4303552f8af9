"""The data path's tables: from rows, newest first; and peers that are compared decode alike."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_table
from benchmarks.image_peers import IMAGE_PEERS
from benchmarks.loader_peers import READERS

STAMP = {
    "commit": "0123456789abcdef", "dirty": "False", "device": "cpu (x86_64, 2 threads)",
    "python": "3.11.7", "version": "1.0", "note": "", "kilobytes": "", "mean_error": "",
}  # fmt: skip


def _row(**cells: str) -> dict[str, str]:
    return {**STAMP, "date": "2030-01-01", "cores": "1", "part": "decode", "case": "small", **cells}


def test_no_rows_are_no_table() -> None:
    assert data_table.section([], []) == ""


def test_the_newest_rows_become_lines() -> None:
    rows = [
        _row(provider="fastclip", per_second="1000", ours_over_it="1", kilobytes="29.3"),
        _row(provider="other", per_second="9", ours_over_it="7", date="2029-01-01"),
        _row(provider="other", per_second="300", ours_over_it="3.3333", mean_error="0.125"),
        _row(provider="absent", per_second="", ours_over_it=""),
        _row(provider="fastclip", part="load", cores="2", per_second="2", ours_over_it="1"),
    ]
    text = data_table.section(rows, [])
    assert "| | small, 29 kB |" in text
    assert "| fastclip | 1,000/s |" in text
    assert "| other 1.0 | 3.33× (mean error 0.12) |" in text
    assert "absent" not in text
    assert "| | small, 2 core(s) |" in text
    assert "commit 0123456789, 2030-01-01." in text


def test_matching_has_its_own_table() -> None:
    common = {"corpus": "captions", "queries": "500000", "bytes": "52.5"}
    rows = [
        _row(provider="fastclip", per_second="1234567", ours_over_it="1", **common),
        _row(provider="pyahocorasick", per_second="80000", ours_over_it="15.4", **common),
    ]
    text = data_table.section([], rows)
    assert "Which of 500,000 queries" in text
    assert "| fastclip | 1.23 M/s |" in text
    assert "| pyahocorasick 1.0 | 15.4× |" in text


@pytest.mark.parametrize("name", ["fastclip", "fastclip-reduced", "fastclip-pillow"])
def test_our_ways_decode_alike(name: str) -> None:
    out = io.BytesIO()
    Image.effect_noise((300, 260), 60).convert("RGB").save(out, "JPEG")
    box = (10.5, 3.25, 240.0, 232.75)
    ways = {peer.name: peer for peer in IMAGE_PEERS}
    found, expected = (
        ways[which].build()(out.getvalue(), box) for which in (name, "fastclip-pillow")
    )
    assert found is not None
    assert expected is not None
    assert np.array_equal(found, expected)


def test_every_reader_is_named_once() -> None:
    assert len({peer.name for peer in READERS}) == len(READERS)
