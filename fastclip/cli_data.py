"""The command line's verbs under ``fastclip data``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_data_verbs(verbs: Any) -> None:
    """Add ``data`` and what stands below it; `verbs` is what argparse's `add_subparsers` gives."""
    data = verbs.add_parser("data", help="make, look through and choose data sets")
    below = data.add_subparsers(required=True, metavar="what")

    index = below.add_parser("index", help="look through shards; write what is in them beside them")
    index.add_argument("shards", help="a folder, glob, {00000..00042}.tar, several joined by ::")
    index.add_argument("--workers", type=int, help="processes; default: one for each processor")
    index.add_argument("--max-pixels", type=int, help="images of more are reported as oversized")
    index.add_argument("--anew", action="store_true", help="also shards that have their index")
    index.add_argument("--report", type=Path, help="also write the report to this file, as JSON")
    index.set_defaults(run=_index)

    queries = below.add_parser("queries", help="make the queries that pairs are balanced by")
    queries.add_argument("--wordnet", type=Path, help="WordNet's folder, or one of its files")
    queries.add_argument(
        "--corpus", nargs="+", default=[], metavar="FILE", help="text, text.gz, or shards' captions"
    )
    queries.add_argument("--titles", type=Path, help="lines of a title, a tab, and its views")
    queries.add_argument("--out", type=Path, required=True)
    queries.add_argument("--maximum", type=int, default=500_000, help="queries; the paper's number")
    queries.add_argument(
        "--unigram-count", type=int, default=100, help="words at least as frequent"
    )
    queries.add_argument("--pmi", type=float, default=30.0, help="of pairs of words, in bits")
    queries.add_argument("--bigram-count", type=int, default=1, help="pairs at least as frequent")
    queries.add_argument("--views", type=int, default=70, help="titles with at least as many")
    queries.add_argument("--caption-key", default="txt", help="as data.caption_key")
    queries.set_defaults(run=_queries)

    balance = below.add_parser("balance", help="keep pairs balanced by queries, as the paper's set")
    balance.add_argument("shards", help="as for index")
    balance.add_argument("--queries", type=Path, required=True, help="one a line, or a JSON list")
    balance.add_argument("--out", type=Path, required=True, help="folder of the shards written")
    balance.add_argument("--per-query", type=int, default=20_000, help="pairs kept of each query")
    balance.add_argument("--seed", type=int, default=0)
    balance.add_argument("--caption-key", default="txt", help="as data.caption_key")
    balance.add_argument("--workers", type=int, default=1, help="processes")
    balance.set_defaults(run=_balance)

    reshard = below.add_parser(
        "reshard", help="write shards anew: smaller images, no repetitions, other groups"
    )
    reshard.add_argument("shards", help="as for index; local ones")
    reshard.add_argument("--out", type=Path, required=True, help="folder of the shards written")
    reshard.add_argument(
        "--short", type=int, default=256, help="pixels of the short side at most; 0 copies images"
    )
    reshard.add_argument("--quality", type=int, default=90, help="of images made smaller, as JPEG")
    reshard.add_argument(
        "--dedup", choices=("none", "images", "pairs"), default="none", help="keep the first only"
    )
    reshard.add_argument(
        "--needs", nargs="*", default=["txt"], metavar="txt|json", help="what a sample must have"
    )
    reshard.add_argument("--samples-per-shard", type=int, default=10_000)
    reshard.add_argument("--shuffle", type=int, metavar="SEED", help="permute all samples")
    reshard.add_argument(
        "--apply-orientation", action="store_true", help="turn images as their EXIF data say"
    )
    reshard.add_argument("--max-pixels", type=int, help="images of more are left out")
    reshard.add_argument("--workers", type=int, default=1, help="processes")
    reshard.set_defaults(run=_reshard)

    demo = below.add_parser("demo", help="real image–text pairs from package registries")
    demo.add_argument("directory", type=Path)
    demo.add_argument("--full", action="store_true", help="add the Debian packages' pictures")
    demo.set_defaults(run=_demo)

    synthetic = below.add_parser("synthetic", help="random pairs for benchmarks")
    synthetic.add_argument("directory", type=Path)
    synthetic.add_argument("--pairs", type=int, required=True)
    synthetic.add_argument("--image-size", type=int, default=256, help="pixels")
    synthetic.add_argument("--seed", type=int, default=0)
    synthetic.set_defaults(run=_synthetic)


def _index(options: argparse.Namespace) -> int:
    from fastclip.data.decode import MAX_PIXELS
    from fastclip.data.indexing import build_index, format_report, write_report

    report = build_index(
        options.shards,
        max_pixels=MAX_PIXELS if options.max_pixels is None else options.max_pixels,
        workers=options.workers,
        anew=options.anew,
    )
    print(format_report(report))
    if options.report is not None:
        write_report(report, options.report)
    return 0


def _queries(options: argparse.Namespace) -> int:
    from fastclip.data.metadata_queries import build_queries, write_queries

    found = build_queries(
        wordnet=options.wordnet,
        corpus=options.corpus,
        titles=options.titles,
        maximum=options.maximum,
        unigram_count=options.unigram_count,
        pmi=options.pmi,
        bigram_count=options.bigram_count,
        views=options.views,
        caption_key=options.caption_key,
    )
    write_queries(options.out, found)
    print(f"{options.out}: {len(found):,} queries")
    return 0


def _balance(options: argparse.Namespace) -> int:
    from fastclip.data.balance import balance
    from fastclip.data.metadata_queries import read_queries

    summary = balance(
        options.shards,
        read_queries(options.queries),
        options.out,
        per_query=options.per_query,
        seed=options.seed,
        caption_key=options.caption_key,
        workers=options.workers,
    )
    print(
        f"{options.out}: {summary.kept:,} of {summary.pairs:,} pairs kept, "
        f"{summary.unmatched:,} without a query, {summary.unusable:,} unusable; "
        f"{summary.head:,} queries thinned out"
    )
    return 0


def _reshard(options: argparse.Namespace) -> int:
    from fastclip.data.decode import MAX_PIXELS
    from fastclip.data.reshard import reshard

    summary = reshard(
        options.shards,
        options.out,
        short=options.short,
        quality=options.quality,
        dedup=options.dedup,
        needs=options.needs,
        samples_per_shard=options.samples_per_shard,
        shuffle=options.shuffle,
        apply_orientation=options.apply_orientation,
        max_pixels=MAX_PIXELS if options.max_pixels is None else options.max_pixels,
        workers=options.workers,
    )
    left_out = sum(summary.dropped.values())
    print(
        f"{options.out}: {summary.written:,} of {summary.samples:,} samples in "
        f"{summary.shards_written:,} shards, {summary.shrunk:,} images made smaller; "
        f"{left_out:,} left out, named in dropped.jsonl; images of "
        f"{summary.image_bytes_before / 1e9:.2f} GB are {summary.image_bytes_after / 1e9:.2f} GB"
    )
    return 0


def _demo(options: argparse.Namespace) -> int:
    from fastclip.data.demo import build_demo

    build_demo(options.directory, full=options.full)
    return 0


def _synthetic(options: argparse.Namespace) -> int:
    from fastclip.data.synthetic import build_synthetic

    build_synthetic(
        options.directory, options.pairs, image_size=options.image_size, seed=options.seed
    )
    return 0
