"""The tables of search and probes: ours, and over it each other's time; the newest rows."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from benchmarks import eval_table, report
from benchmarks.bench_probe import BENCHMARK, ProbeCase
from benchmarks.bench_search import COLUMNS, KEY, Case
from benchmarks.record import Record, read_rows

STAMP = {
    "commit": "0123456789abcdef", "dirty": False, "date": "2030-01-02T00:00:00+00:00",
    "device": "cpu", "python": "3.12.1", "torch": "2.11.0",
}  # fmt: skip


def test_searches_stand_beside_ours(tmp_path: Path) -> None:
    record = Record(tmp_path / "search.csv", COLUMNS, KEY)
    row = {
        **STAMP, **asdict(Case(1_000_000)), "k": 10, "version": "1", "build_s": 243.2,
        "build_rss_mb": 2512.0, "rss_mb": 1600.0, "recall_images": 0.9715, "recall_texts": 0.957,
    }  # fmt: skip
    record.write({**row, "provider": "numpy", "median_ms": 80.0})
    record.write({**row, "provider": "fastclip", "median_ms": 8.0})
    failed = dict.fromkeys(("recall_images", "recall_texts", "build_s", "rss_mb"), "")
    record.write({**row, **failed, "provider": "faiss-flat", "error": "MemoryError: no room"})
    record.write({**row, "provider": "numpy", "count": 5, "median_ms": 1.0})  # ours is not there
    other = {"device": "another", "provider": "reference-topk", "median_ms": 1.0}
    record.write({**row, **other})  # nor on that machine
    record.write({**row, "commit": "new", "date": "2031", "provider": "fastclip", "error": "OOM"})
    text = report.tables(tmp_path)
    assert "The 10 nearest of 1,000,000 features of width 512" in text
    assert "cpu, Python 3.12.1, torch 2.11.0, commit 0123456789, 2030-01-02." in text
    ours = "| fastclip 1 | 8 ms | 0.972 | 0.957 | 243 s | 2.51 GB | 1.60 GB |"
    assert text.index(ours) < text.index("| numpy 1 | 10× | 0.972 | 0.957 | 243 s |")
    assert "| faiss-flat 1 | MemoryError | – | – | – | 2.51 GB | – |" in text
    assert "(jitter 0.5)" in text
    assert "reference-topk" not in text
    assert "nearest of 5 " not in text


def test_probes_stand_beside_ours(tmp_path: Path) -> None:
    record = Record(tmp_path / "probe.csv", BENCHMARK.columns, BENCHMARK.key)
    row = {**STAMP, **asdict(ProbeCase(10_000, 512, 100)), "version": "1", "strength": 1e-3}
    old = {"commit": "old", "date": "2029"}
    record.write({**row, **old, "provider": "fastclip", "median_ms": 1.0, "accuracy": 0.1})
    record.write({**row, "provider": "fastclip", "median_ms": 20_000.0, "accuracy": 0.5})
    record.write({**row, "provider": "scikit-learn", "median_ms": 3e5, "accuracy": 0.499})
    text = report.tables(tmp_path)
    assert "10,000 images × 512, 100 classes" in text
    assert "| fastclip 1 | 20 s | 50.00% | 0.001 |" in text
    assert "| scikit-learn 1 | 15× | 49.90% | 0.001 |" in text


def test_without_our_rows_there_is_no_table(tmp_path: Path) -> None:
    assert not eval_table.section([], [])
    record = Record(tmp_path / "probe.csv", BENCHMARK.columns, BENCHMARK.key)
    record.write({**STAMP, **asdict(ProbeCase(10, 5, 2)), "provider": "scikit-learn"})
    assert not eval_table.section([], read_rows(tmp_path / "probe.csv"))
