"""Nearest of a million features, one query at a time: ``python -m benchmarks.bench_search``.

Features are a mixture with a falling spectrum, as embeddings of images are; half the queries lie
among them, as other images do, half beside them, as texts do. Every provider builds in a process of
its own and searches in another, whose memory is counted as a whole, Python and torch included. The
recall is of the 10 nearest by an exhaustive search in fp32; of equally near ones each counts.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import record
from fastclip.ops.similarity import similarity_topk
from fastclip.search.exact import search_exact
from fastclip.search.probes import CANDIDATES, choose_probes, gather, rerank
from fastclip.search.vectors import build_lists, find_faiss, load_lists

COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "version", "count", "dim", "jitter", "k", "build_s",
    "build_rss_mb", "load_s", "bytes", "rss_mb", "median_ms", "p20_ms", "p80_ms", "queries",
    "recall_images", "recall_texts", "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "provider", "count", "dim", "jitter", "k")
K = 10
QUERIES = 200
"""Of each kind."""

_PART = 4096
_SAME = 1e-6
_HELD_OUT = 300
"""Of each kind, other ones, that probes are chosen by."""

Search = Callable[[Tensor], NDArray[np.int64]]
"""From one query, fp32 [1, D], to its 10 nearest."""


@dataclass(frozen=True)
class Case:
    """Features to search."""

    count: int
    dim: int = 512
    jitter: float = 0.5
    """Distance of a feature from its centre; centres have length 1."""


@dataclass(frozen=True)
class Provider:
    """One way to search."""

    build: Callable[[list[Tensor], Path, Tensor, Tensor], None]
    """From the parts and held-out images and texts to files in a folder."""

    load: Callable[[list[Tensor], Path], Search]
    distribution: str = "fastclip-torch"


def _nothing(parts: list[Tensor], folder: Path, images: Tensor, texts: Tensor) -> None:
    """What needs no preparation."""


def _fastclip_build(parts: list[Tensor], folder: Path, images: Tensor, texts: Tensor) -> None:
    del images  # it takes some of the features
    lists = build_lists(parts, folder / "lists.safetensors")
    chosen = np.linspace(0, sum(map(len, parts)) - 1, _HELD_OUT).astype(np.int64)
    probes, _ = choose_probes(lists, lists.lists, parts, gather(parts, chosen), texts)
    (folder / "probes.json").write_text(json.dumps(probes))


def _fastclip_load(parts: list[Tensor], folder: Path) -> Search:
    count, dim = sum(map(len, parts)), parts[0].shape[1]
    lists = load_lists(folder / "lists.safetensors", count=count, embed_dim=dim)
    probes = json.loads((folder / "probes.json").read_text())

    def search(query: Tensor) -> NDArray[np.int64]:
        found = lists.candidates(query, K * CANDIDATES, probes)
        return rerank(parts, query[0], found[0], K)[1]

    return search


def _exact_load(parts: list[Tensor], folder: Path) -> Search:
    del folder
    return lambda query: search_exact(parts, query, K)[1][0].numpy()


def _reference_load(parts: list[Tensor], folder: Path) -> Search:
    del folder
    keys = torch.cat([part.float() for part in parts])
    return lambda query: similarity_topk(query, keys, K, normalize=False)[1][0].numpy()


def _numpy_load(parts: list[Tensor], folder: Path) -> Search:
    del folder
    keys = torch.cat([part.float() for part in parts]).numpy()

    def search(query: Tensor) -> NDArray[np.int64]:
        scores = keys @ query[0].numpy()
        best = np.argpartition(-scores, K)[:K]
        return best[np.argsort(-scores[best])]

    return search


def _faiss_provider(make: Callable[[Any, int, int], Any], parameters: Sequence[Any]) -> Provider:
    """An index of faiss whose candidates are compared again as ours are; the first of the
    parameters that reaches the recall is taken, as ours are chosen."""

    def build(parts: list[Tensor], folder: Path, images: Tensor, texts: Tensor) -> None:
        faiss = find_faiss()
        count, dim = sum(map(len, parts)), parts[0].shape[1]
        index = make(faiss, count, dim)
        if not index.is_trained:
            step = max(1, count // 160_000)
            index.train(torch.cat([part[::step].float() for part in parts]).numpy())
        for part in parts:
            index.add(part.float().numpy())
        faiss.write_index(index, str(folder / "index.faiss"))
        chosen = parameters[-1]
        for chosen in parameters if len(parameters) > 1 else ():
            search = _faiss_search(faiss, index, parts, chosen)
            if min(_recall(parts, search, q)[0] for q in (images, texts)) >= 0.95:
                break
        (folder / "parameter.json").write_text(json.dumps(chosen))

    def load(parts: list[Tensor], folder: Path) -> Search:
        faiss = find_faiss()
        index = faiss.read_index(str(folder / "index.faiss"))
        chosen = json.loads((folder / "parameter.json").read_text())
        return _faiss_search(faiss, index, parts, chosen)

    return Provider(build, load, "faiss-cpu")


def _faiss_search(faiss: Any, index: Any, parts: list[Tensor], parameter: Any) -> Search:
    if parameter is None:
        return lambda query: index.search(query.numpy(), K)[1][0]
    effort, candidates = parameter
    if isinstance(index, faiss.IndexHNSW):
        settings = faiss.SearchParametersHNSW(efSearch=max(effort, candidates))
    else:
        settings = faiss.SearchParametersIVF(nprobe=effort)

    def search(query: Tensor) -> NDArray[np.int64]:
        _, found = index.search(query.numpy(), candidates, params=settings)
        return rerank(parts, query[0], found[0], K)[1]

    return search


def _ivf(kind: str) -> Callable[[Any, int, int], Any]:
    def make(faiss: Any, count: int, dim: int) -> Any:
        lists = round(4 * count**0.5)
        index = faiss.index_factory(dim, f"IVF{lists},{kind}", faiss.METRIC_INNER_PRODUCT)
        index.cp.spherical = True
        return index

    return make


def _hnsw(faiss: Any, count: int, dim: int) -> Any:
    del count
    kind = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexHNSWSQ(dim, kind, 24, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 80
    return index


_EFFORTS = [
    (probes, candidates) for probes in (8, 16, 32, 64, 128, 256) for candidates in (40, 400)
]

PROVIDERS = {
    "fastclip": Provider(_fastclip_build, _fastclip_load),
    "fastclip-exact": Provider(_nothing, _exact_load),
    "reference-topk": Provider(_nothing, _reference_load),
    "numpy": Provider(_nothing, _numpy_load, "numpy"),
    "faiss-flat": _faiss_provider(
        lambda faiss, count, dim: faiss.IndexFlatIP(dim), [None]
    ),
    "faiss-ivf-fp16": _faiss_provider(_ivf("SQfp16"), _EFFORTS),
    "faiss-ivf-pq128": _faiss_provider(_ivf("PQ128x4fs"), _EFFORTS),
    "faiss-hnsw-sq8": _faiss_provider(_hnsw, _EFFORTS),
}  # fmt: skip


def make_case(case: Case, folder: Path) -> None:
    """Write the parts, the queries and the score that each query's 10 nearest reach."""
    rng = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, case.dim + 1).float().rsqrt()

    def draw(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, case.dim, generator=rng) * spectrum, dim=1)

    centres = draw(max(1, case.count // 50))
    gap = F.normalize(torch.randn(1, case.dim, generator=rng), dim=1)

    def near(rows: int) -> Tensor:
        chosen = torch.randint(len(centres), (rows,), generator=rng)
        return F.normalize(centres[chosen] + case.jitter * draw(rows), dim=1)

    parts = []
    for number, first in enumerate(range(0, case.count, _PART)):
        features = near(min(_PART, case.count - first)).half()
        save_file({"features": features}, folder / f"{number:06d}.safetensors")
        parts.append(features)
    queries = {
        "images": near(QUERIES),
        "texts": F.normalize(near(QUERIES) + 0.8 * gap, dim=1),
        "held_images": near(_HELD_OUT),
        "held_texts": F.normalize(near(_HELD_OUT) + 0.8 * gap, dim=1),
    }
    least = {
        f"least_{name}": search_exact(parts, q, K)[0][:, -1].clone() for name, q in queries.items()
    }
    save_file(queries | least, folder / "queries.safetensors")


def load_case(folder: Path) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The parts, mapped into memory, and the queries."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.stem.isdigit())
    parts = [load_file(path)["features"] for path in files]
    return parts, load_file(folder / "queries.safetensors")


def _recall(
    parts: list[Tensor], search: Search, queries: Tensor, least: Tensor | None = None
) -> tuple[float, list[float]]:
    """Share of the nearest that are found, and milliseconds of each search."""
    if least is None:
        least = search_exact(parts, queries, K)[0][:, -1]
    right, times = 0, []
    for number, query in enumerate(queries.split(1)):
        begin = time.perf_counter()
        found = search(query)
        times.append(1e3 * (time.perf_counter() - begin))
        scores = gather(parts, np.asarray(found)) @ query[0]
        right += int((scores >= least[number] - _SAME).sum())
    return right / len(queries) / K, times


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def child(step: str, name: str, folder: Path) -> dict[str, object]:
    """What one process measures: "build" or "search"."""
    parts, queries = load_case(folder)
    provider = PROVIDERS[name]
    own = folder / name
    own.mkdir(exist_ok=True)
    begin = time.perf_counter()
    if step == "build":
        provider.build(parts, own, queries["held_images"], queries["held_texts"])
        cells: dict[str, object] = {"build_s": time.perf_counter() - begin}
        return cells | {"build_rss_mb": _peak_mb(), "bytes": _bytes(own) or _bytes(folder)}
    search = provider.load(parts, own)
    cells = {"load_s": time.perf_counter() - begin}
    for query in queries["held_texts"][:20].split(1):
        search(query)
    times = []
    for kind in ("images", "texts"):
        recall, own_times = _recall(parts, search, queries[kind], queries[f"least_{kind}"])
        cells[f"recall_{kind}"] = recall
        times += own_times
    times.sort()
    return cells | {
        "rss_mb": _peak_mb(),
        "median_ms": times[len(times) // 2],
        "p20_ms": times[len(times) // 5],
        "p80_ms": times[-1 - len(times) // 5],
        "queries": len(times),
    }


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def measure(name: str, folder: Path) -> dict[str, object]:
    """Cells of a row; what went wrong as `error`."""
    cells: dict[str, object] = {}
    for step in ("build", "search"):
        command = [sys.executable, "-m", "benchmarks.bench_search", "--child", step, name]
        done = subprocess.run(
            [*command, str(folder)], capture_output=True, text=True, cwd=record.ROOT, check=False
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            return {**cells, "error": lines[-1][:200]}
        cells |= json.loads(done.stdout.splitlines()[-1])
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", nargs="+", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--jitter", nargs="+", type=float, default=[0.5, 1.0])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        step, name, folder = arguments.child
        print(json.dumps(child(step, name, Path(folder))))
        return
    stamp = record.stamp(arguments.commit, arguments.dirty, torch.device("cpu"))
    file = record.Record(arguments.out / "search.csv", COLUMNS, KEY)
    cases = [Case(c, arguments.dim, j) for c in arguments.counts for j in arguments.jitter]
    for case in cases:
        key = {**asdict(stamp), **asdict(case), "k": K}
        names = [n for n in arguments.providers if not file.has({**key, "provider": n})]
        random.Random(0).shuffle(names)
        if not names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            make_case(case, Path(scratch))
            for name in names:
                cells = measure(name, Path(scratch))
                version = record.version_of(PROVIDERS[name].distribution)
                file.write(
                    {**stamp.columns(), **key, "provider": name, "version": version, **cells}
                )
                print(f"{case} | {name}: {_summary(cells)}", flush=True)


def _summary(cells: dict[str, Any]) -> str:
    if "error" in cells:
        return str(cells["error"])
    return (
        f"{cells['median_ms']:.2f} ms, recall {cells['recall_images']:.3f} of images "
        f"{cells['recall_texts']:.3f} of texts, built in {cells['build_s']:.0f} s with "
        f"{cells['build_rss_mb']:.0f} MB, {cells['bytes'] / 1e6:.0f} MB, loaded in "
        f"{cells['load_s']:.1f} s, {cells['rss_mb']:.0f} MB while searching"
    )


if __name__ == "__main__":
    main()
