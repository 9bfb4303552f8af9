"""The similarity operators' benchmark: runs, errors, counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_similarity, harness, record
from benchmarks.bench_similarity import BENCHMARK, SimilarityCase

CPU = torch.device("cpu")


def test_it_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(tmp_path)]
    assert harness.main(BENCHMARK, arguments) == 0
    rows = record.read_rows(tmp_path / "similarity.csv")
    assert {row["error"] for row in rows} == {""}
    assert "torch" in {row["provider"] for row in rows}
    for row in rows:
        assert float(row["value_error"]) < 1e-6
        assert row["missed"] == ("0" if row["k"] == "5" else "")


def test_wrong_values_and_missed_keys_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_similarity, "SAMPLE", 3)
    monkeypatch.setattr(bench_similarity, "CHUNK_KEYS", 7)
    case = SimilarityCase(10, 20, 8, "fp32", k=2)
    operands = bench_similarity.make_operands(case, CPU)
    expected = bench_similarity.expected(case, operands)
    assert expected.sample.tolist() == [0, 3, 6]
    values, indices = bench_similarity.plain(case)(operands)
    assert indices is not None
    right = bench_similarity.errors(expected, (values, indices))
    assert right["value_error"] == pytest.approx(0, abs=1e-6)
    assert right["missed"] == 0
    indices[3, 1] = next(key for key in range(20) if key not in expected.indices[1])  # pyright: ignore[reportOptionalSubscript]
    wrong = bench_similarity.errors(expected, (1.5 * values, indices))
    assert wrong["value_error"] == pytest.approx(0.5, rel=1e-5)
    assert wrong["missed"] == pytest.approx(1 / 6)


def test_the_matrix_is_the_traffic() -> None:
    case = SimilarityCase(1000, 2000, 64)
    fused, plain = bench_similarity.fused_work(case), bench_similarity.plain_work(case)
    assert fused.bytes_moved == 3000 * 64 * 2 + 1000 * 2000 * 4
    assert plain.bytes_moved == 3 * 3000 * 64 * 2 + 1000 * 2000 * (2 + 2 + 4)
    top = SimilarityCase(1000, 2000, 64, k=10)
    assert bench_similarity.fused_work(top).extra_bytes == 1000 * 10 * (4 + 8)
