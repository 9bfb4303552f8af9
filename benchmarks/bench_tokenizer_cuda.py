"""Captions a second of the CUDA tokenizer: ``python -m benchmarks.bench_tokenizer_cuda``.

Captions become rows of int64 ids on the GPU in four ways: by the kernel with the text on the GPU
already ("kernel") or copied from pinned memory ("copy+kernel"), both replayed as a graph; by
`CudaTokenizer.encode_utf8`, which also waits and has the host do what the warps refuse ("call");
and, from a list of str, by the C++ tokenizer on all processors and a copy of the ids ("host").
Rows are compared with the host's first; a wrong one gives no rate.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import captions, record
from benchmarks.timing import Timing, time_calls, time_graph
from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.cuda import CudaTokenizer

COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "corpus", "bytes", "batch", "per_second", "p20", "p80",
    "runs", "host_rows", "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "provider", "corpus", "batch")


def in_one_piece(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """UTF-8 and offsets of the texts, pinned."""
    encoded = [text.encode() for text in texts]
    data = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
    ends = itertools.accumulate(map(len, encoded), initial=0)
    return data.pin_memory(), torch.tensor(list(ends), dtype=torch.int32).pin_memory()


def measure(texts: list[str], seconds: float) -> tuple[dict[str, Timing], float]:
    """Times of each provider, and the share of rows that are the host's.

    Raises RuntimeError if a row is wrong.
    """
    device = torch.device("cuda")
    ours = CudaTokenizer(device=device)
    host = Tokenizer(threads=len(os.sched_getaffinity(0)))
    data, offsets = in_one_piece(texts)
    on_gpu = data.to(device), offsets.to(device)
    rows, lengths = ours.encode_utf8(data, offsets, dtype=torch.int64)
    expected = host(texts)
    wrong = int((rows.cpu() != expected).any(1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {len(texts)} rows are wrong")
    refused = ours.enqueue_utf8(*on_gpu)[2]
    pinned = torch.empty_like(expected, pin_memory=True)

    def by_the_host() -> torch.Tensor:
        host(texts, out=pinned)
        copied = pinned.to(device, non_blocking=True)
        torch.cuda.synchronize()
        return copied

    def enqueue(data: torch.Tensor, offsets: torch.Tensor) -> Callable[[], object]:
        return lambda: ours.enqueue_utf8(data, offsets, dtype=torch.int64)

    del rows, lengths, expected
    timings = {
        "kernel": time_graph(enqueue(*on_gpu), device, seconds),
        "copy+kernel": time_graph(enqueue(data, offsets), device, seconds),
        "call": time_calls(
            lambda: ours.encode_utf8(data, offsets, dtype=torch.int64), device, seconds
        ),
        "host": time_calls(by_the_host, torch.device("cpu"), seconds),
    }
    return timings, int(refused[0]) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("demo/captions"), help="folder")
    parser.add_argument("--only", nargs="+", choices=captions.CORPORA, default=captions.CORPORA)
    parser.add_argument("--batches", nargs="+", type=int, default=[4096, 65_536, 1_048_576])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each figure")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    arguments = parser.parse_args()
    captions.fetch(arguments.corpora)
    stamp = record.stamp(arguments.commit, arguments.dirty, torch.device("cuda"))
    file = record.Record(arguments.out / "tokenizer_cuda.csv", COLUMNS, KEY)
    for name in arguments.only:
        corpus = captions.corpus(name, arguments.corpora)
        for batch in arguments.batches:
            texts = list(itertools.islice(itertools.cycle(corpus), batch))
            cells = {**stamp.columns(), "corpus": name, "batch": batch}
            try:
                timings, host_rows = measure(texts, arguments.seconds)
            except (RuntimeError, ImportError) as error:
                file.write({**cells, "provider": "call", "error": str(error)[:200]})
                raise
            size = sum(len(text.encode()) for text in texts) / batch
            print(f"\n{name}, {size:.1f} bytes, {batch} a call, {host_rows:.2%} the host's")
            for provider, timing in timings.items():
                rate = {
                    "per_second": 1e3 * batch / timing.median,
                    "p20": 1e3 * batch / timing.p80,
                    "p80": 1e3 * batch / timing.p20,
                }
                file.write(
                    {
                        **cells,
                        **rate,
                        "provider": provider,
                        "bytes": size,
                        "runs": timing.runs,
                        "host_rows": host_rows,
                    }
                )
                print(f"  {provider:12s} {rate['per_second'] / 1e6:10.2f} M/s")


if __name__ == "__main__":
    main()
