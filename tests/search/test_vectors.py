"""Lists by faiss: their recall, their file, and what a file that was tampered with may do."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastclip.search.exact import search_exact
from fastclip.search.probes import choose_probes, gather, probes_for, rerank
from fastclip.search.vectors import Lists, build_lists, find_faiss, list_count, load_lists

pytest.importorskip("faiss")

COUNT, DIM = 4000, 16


def _clustered(rows: int, seed: int) -> Tensor:
    centres = F.normalize(torch.randn(60, DIM, generator=torch.Generator().manual_seed(0)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(60, (rows,), generator=generator)
    noise = torch.randn(rows, DIM, generator=generator)
    return F.normalize(centres[chosen] + 0.1 * noise, dim=1)


@pytest.fixture(scope="module")
def parts() -> list[Tensor]:
    return list(_clustered(COUNT, 1).half().split(1500))


@pytest.fixture(scope="module")
def made(parts: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> tuple[Lists, Path]:
    path = tmp_path_factory.mktemp("lists") / "vectors.safetensors"
    return build_lists(parts, path), path


def test_all_lists_find_what_the_exact_search_does(
    made: tuple[Lists, Path], parts: list[Tensor]
) -> None:
    queries = _clustered(20, 2)
    expected, numbers = search_exact(parts, queries, 10)
    found = made[0].candidates(queries, 40, made[0].lists)
    for query, row, scores, own in zip(queries, found, expected, numbers, strict=True):
        ours, ranked = rerank(parts, query, row, 10)
        torch.testing.assert_close(ours, scores)
        assert ranked.tolist() == own.tolist()


def test_the_file_holds_the_same_lists(made: tuple[Lists, Path], parts: list[Tensor]) -> None:
    lists, path = made
    loaded, queries = load_lists(path, count=COUNT, embed_dim=DIM), _clustered(20, 3)
    for probes in (1, 5):
        ours = loaded.candidates(queries, 30, probes)
        np.testing.assert_array_equal(ours, lists.candidates(queries, 30, probes))
    again = path.with_name("again.safetensors")
    build_lists(parts, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(load_file(path)["numbers"].tolist()) == list(range(COUNT))


def test_fewer_than_asked_for_are_marked(made: tuple[Lists, Path]) -> None:
    (row,) = made[0].candidates(_clustered(1, 4), COUNT, 1)
    there = row[row >= 0]
    assert 0 < len(there) < COUNT
    assert len(set(there.tolist())) == len(there)


def test_probes_are_as_many_as_the_recall_needs(
    made: tuple[Lists, Path], parts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastclip.search.probes._LEAST_PROBES", 1)
    lists, images = made[0], gather(parts, np.arange(0, COUNT, 40))
    texts = F.normalize(torch.randn(100, DIM, generator=torch.Generator().manual_seed(8)), dim=1)
    few, easy = choose_probes(lists, lists.lists, parts, images, texts[:0])
    many, recall = choose_probes(lists, lists.lists, parts, images, texts)
    assert easy.keys() == {"images"}
    assert recall.keys() == {"images", "texts"}
    assert min(recall.values()) >= 0.95
    assert few < many <= lists.lists  # texts that lie beside all images are harder
    found = lists.candidates(texts, 40, many)
    _, numbers = search_exact(parts, texts, 10)
    shares = [
        len({*rerank(parts, query, row, 10)[1].tolist()} & {*own.tolist()}) / 10
        for query, row, own in zip(texts, found, numbers, strict=True)
    ]
    assert np.mean(shares) == pytest.approx(recall["texts"])


def test_a_recall_out_of_reach_is_told(
    parts: list[Tensor], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind:
        def candidates(self, queries: Tensor, count: int, probes: int) -> Any:
            return np.zeros((len(queries), count), np.int64) - 1

    monkeypatch.setattr("fastclip.search.probes.logger.propagate", True)
    images = gather(parts, np.arange(5))
    probes, recall = choose_probes(Blind(), 20, parts, images, images[:0])
    assert probes == 20
    assert recall == {"images": 0.0}
    assert "reach a recall of" in caplog.text


@pytest.mark.parametrize(("k", "probes"), [(1, 8), (10, 8), (11, 16), (1000, 800)])
def test_more_results_need_more_lists(k: int, probes: int) -> None:
    assert probes_for(k, 8) == probes


@pytest.mark.parametrize(("count", "lists"), [(1, 1), (79, 1), (400, 10), (1_000_000, 4000)])
def test_list_count(count: int, lists: int) -> None:
    assert list_count(count) == lists


def _repeat(tensors: dict[str, Tensor]) -> None:
    tensors["numbers"][0] = tensors["numbers"][1]


def _negative(tensors: dict[str, Tensor]) -> None:
    tensors["numbers"][0] = -1


def _beyond(tensors: dict[str, Tensor]) -> None:
    tensors["numbers"][0] = COUNT


def _overlap(tensors: dict[str, Tensor]) -> None:
    tensors["ends"][1] = 0


def _too_long(tensors: dict[str, Tensor]) -> None:
    tensors["ends"][-1] += 1


def _broken(tensors: dict[str, Tensor]) -> None:
    tensors["centroids"][0, 0] = float("nan")


def _narrow(tensors: dict[str, Tensor]) -> None:
    tensors["codes"] = tensors["codes"][:, 1:].contiguous()


def _absent(tensors: dict[str, Tensor]) -> None:
    del tensors["ranges"]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (_repeat, "a record is not in it once"),
        (_negative, "a record is not in it once"),
        (_beyond, "a record is not in it once"),
        (_overlap, "its lists overlap"),
        (_too_long, "its lists overlap"),
        (_broken, "its centroids are no numbers"),
        (_narrow, r"its codes are torch.uint8 \[4000, 15\]"),
        (_absent, "it holds other arrays"),
    ],
)
def test_files_made_to_mislead_are_refused(
    made: tuple[Lists, Path], tmp_path: Path, tamper: Callable[[dict[str, Tensor]], None],
    message: str,
) -> None:  # fmt: skip
    tensors = {name: tensor.clone() for name, tensor in load_file(made[1]).items()}
    tamper(tensors)
    save_file(tensors, tmp_path / "vectors.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lists(tmp_path / "vectors.safetensors", count=COUNT, embed_dim=DIM)


def test_a_file_that_is_cut_off_or_absent(made: tuple[Lists, Path], tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    with pytest.raises(FileNotFoundError, match="--vectors ivf"):
        load_lists(path, count=COUNT, embed_dim=DIM)
    for content in (b"", made[1].read_bytes()[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is damaged"):
            load_lists(path, count=COUNT, embed_dim=DIM)


def test_faiss_and_torch_live_together(made: tuple[Lists, Path], parts: list[Tensor]) -> None:
    # Both bring an OpenMP of their own: products by one, searches by the other, in turn.
    queries = _clustered(30, 9)
    first = made[0].candidates(queries, 10, 4)
    for _ in range(20):
        product = torch.randn(256, 256) @ torch.randn(256, 256)
        assert product.isfinite().all()
        np.testing.assert_array_equal(made[0].candidates(queries, 10, 4), first)


def test_without_faiss_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def absent(name: str, *arguments: Any) -> Any:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return original(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"fastclip-torch\[search\].*--vectors flat"):
        find_faiss()
