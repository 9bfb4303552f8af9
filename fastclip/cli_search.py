"""The command line's verbs around content-based image search."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_search_verbs(verbs: Any) -> None:
    """Add ``embed``, ``search``, ``serve``; `verbs` is what argparse's `add_subparsers` gives."""
    embed = verbs.add_parser("embed", help="make shards' images searchable by a trained model")
    embed.add_argument("shards", help="a folder, glob, {00000..00042}.tar, several joined by ::")
    embed.add_argument("--model", type=Path, required=True, help="a run's folder or a checkpoint")
    embed.add_argument("--out", type=Path, required=True, metavar="INDEX", help="folder; added to")
    embed.add_argument("--batch-size", type=int, default=64)
    embed.add_argument("--workers", type=int, default=2, help="threads that decode images")
    embed.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    embed.add_argument(
        "--vectors",
        default="auto",
        choices=("auto", "flat", "ivf"),
        help="flat compares all; ivf, for more than 100,000 images, the nearest lists",
    )
    embed.add_argument(
        "--dtype", default="float16", choices=("float16", "float32"), help="of stored features"
    )
    embed.add_argument(
        "--fields",
        nargs="*",
        default=["label", "style", "group"],
        help="of the json member, to filter by (default: label style group)",
    )
    embed.add_argument("--caption-key", default="txt", help="as data.caption_key")
    embed.set_defaults(run=_embed)

    search = verbs.add_parser("search", help="find images by a text or by another image")
    search.add_argument("index", type=Path, help="folder that fastclip embed wrote")
    search.add_argument("queries", nargs="+", metavar="query", help="a text, or an image's file")
    search.add_argument("--k", type=int, default=10, help="results for each query")
    kind = search.add_mutually_exclusive_group()
    kind.add_argument("--text", action="store_const", const="text", dest="kind")
    kind.add_argument("--image", action="store_const", const="image", dest="kind")
    search.add_argument("--exact", action="store_true", help="compare with every image")
    search.add_argument(
        "--filter", action="append", default=[], metavar="FIELD=VALUE", help="e.g. style=noto"
    )
    search.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="with {} for a text that is searched for; several are averaged",
    )
    search.add_argument("--model", type=Path, help="where the index's model is now")
    search.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    search.add_argument("--shards-root", type=Path, help="where the shards are now")
    search.add_argument("--sheet", type=Path, help="also draw a contact sheet, a PNG")
    search.add_argument("--json", action="store_true", help="print one JSON object for each query")
    search.set_defaults(run=_search, kind="auto")

    serve = verbs.add_parser("serve", help="search an index in the browser")
    serve.add_argument("index", type=Path, help="folder that fastclip embed wrote")
    serve.add_argument("--model", type=Path, help="where the index's model is now")
    serve.add_argument("--shards-root", type=Path, help="where the shards are now")
    serve.add_argument("--host", default="127.0.0.1", help="to listen on; the page has no login")
    serve.add_argument("--port", type=int, default=8000, help="0: any free one")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name by which the server is addressed",
    )
    serve.set_defaults(run=_serve)


def _embed(options: argparse.Namespace) -> int:
    from fastclip.search.embed import EmbedSettings, embed

    settings = EmbedSettings(
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        vectors=options.vectors,
        dtype=options.dtype,
        fields=tuple(dict.fromkeys(options.fields)),
        caption_key=options.caption_key,
    )
    made = embed(options.shards, options.model, options.out, settings)
    print(
        f"{options.out}: {made.count:,} images of {len(made.shards):,} shards, "
        f"{made.quarantined:,} left out"
    )
    return 0


def _search(options: argparse.Namespace) -> int:
    import json

    from fastclip.search.index import SearchIndex
    from fastclip.search.outputs import check_sheet
    from fastclip.search.query import (
        as_json,
        draw_found,
        format_found,
        open_encoder,
        parse_filters,
        query_features,
        read_query,
    )

    if options.sheet is not None:
        check_sheet(options.sheet)
    filters = parse_filters(options.filter)
    queries = [read_query(word, options.kind) for word in options.queries]
    index = SearchIndex.open(options.index, shards_root=options.shards_root)
    encoder = open_encoder(index, options.model, device=options.device)
    features = query_features(encoder, queries, options.template or ("{}",))
    rows = index.search(features, options.k, exact=options.exact, filters=filters)
    for query, found in zip(queries, rows, strict=True):
        if options.json:
            print(json.dumps(as_json(query, found)))
        else:
            print(format_found(query, found, filters))
    if options.sheet is not None:
        draw_found(index, encoder, list(zip(queries, rows, strict=True)), options.sheet)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from fastclip.serve.app import serve

    serve(
        options.index,
        model=options.model,
        shards_root=options.shards_root,
        host=options.host,
        port=options.port,
        allow_hosts=options.allow_host,
    )
    return 0
