"""The benchmark's own parts, on a small case."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.bench_search import COLUMNS, Case, K, child, load_case, make_case
from fastclip.search.exact import search_exact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("case")
    make_case(Case(9000, 32), made)
    return made


def test_what_is_expected_is_the_exact_search(folder: Path) -> None:
    parts, queries = load_case(folder)
    assert [len(part) for part in parts] == [4096, 4096, 808]
    for kind in ("images", "texts"):
        scores, _ = search_exact(parts, queries[kind], K)
        assert scores[:, -1].tolist() == queries[f"least_{kind}"].tolist()


@pytest.mark.parametrize("name", ["fastclip", "fastclip-exact", "reference-topk", "faiss-flat"])
def test_a_provider_is_measured(folder: Path, name: str) -> None:
    pytest.importorskip("faiss")
    built, found = child("build", name, folder), child("search", name, folder)
    assert (built | found).keys() <= set(COLUMNS)
    exact = 0.94 if name == "fastclip" else 0.999
    assert found["recall_images"] >= exact  # pyright: ignore[reportOperatorIssue]
    assert found["recall_texts"] >= exact  # pyright: ignore[reportOperatorIssue]
