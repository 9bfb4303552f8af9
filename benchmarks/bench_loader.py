"""Images and samples a second, ours beside other loaders: ``python -m benchmarks.bench_loader``.

decode: from a JPEG's bytes to the pixels of a crop, one core's processor time; the pixels are first
compared with Pillow's. read: members out of shards, undecoded, one core. load: whole training
batches, elapsed time, on one core and on two. gpu: batches that end on a GPU, elapsed time, on all
cores of its host; not part of a run unless it is asked for. start: the first batch out of ten
thousand shards; memory over epochs.

In every round the providers run in an order drawn anew: ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.image_peers import IMAGE_PEERS, SIZE, Decode
from benchmarks.loader_peers import (
    GPU_BATCH,
    READERS,
    LoaderPeer,
    loaders,
    loaders_onto,
    ours,
)
from benchmarks.photos import photo_sets
from fastclip.data.decoders import PillowDecoder
from fastclip.data.indexing import build_index
from fastclip.data.shard_table import save_table, scan_shard
from fastclip.data.shard_writer import write_shard
from fastclip.data.transforms import Box, random_crop

COLUMNS = (
    *record.STAMP_COLUMNS, "part", "provider", "version", "note", "case", "kilobytes", "cores",
    "rounds", "per_second", "p20", "p80", "ours_over_it", "mean_error", "max_error", "memory_mb",
    "seconds", "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "part", "provider", "case", "cores")
OURS = "fastclip"
PARTS = ("decode", "read", "load", "start")
"""By default; "gpu" is the fifth."""
SCALE = (0.9, 1.0)
MOST_MEAN_ERROR, MOST_ERROR = 0.02, 4
"""Of ours from Pillow's pixels, of 255: beyond, no speed is reported."""


class Bench:
    """Writes the rows of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device("cpu")
        self.stamp = record.stamp(options.commit, options.dirty, self.device)
        self.file = record.Record(options.out / "loader.csv", COLUMNS, KEY)
        self.rounds: int = options.rounds
        self.work: Path = options.work
        self.sets = photo_sets(options.work / "downloads")

    def on(self, device: torch.device) -> Bench:
        """The same, for rows of another device."""
        other = copy.copy(self)
        other.device = device
        other.stamp = record.stamp(self.stamp.commit, self.stamp.dirty, device)
        return other

    def rows(
        self,
        part: str,
        case: str,
        cores: int,
        rates: Mapping[str, list[float]],
        cells: Mapping[str, Mapping[str, object]],
    ) -> None:
        """One row for each provider of a case."""
        print(f"\n{part}: {case}, {cores} core(s)")
        for name, values in rates.items():
            median, ordered = statistics.median(values), sorted(values)
            ratio = statistics.median(a / b for a, b in zip(rates[OURS], values, strict=True))
            self.write(
                part,
                name,
                case,
                cores,
                rounds=len(values),
                per_second=median,
                p20=ordered[len(values) // 5],
                p80=ordered[-1 - len(values) // 5],
                ours_over_it=ratio,
                **cells[name],
            )
            errors = cells[name].get("mean_error")
            print(
                f"  {name:20s} {median:10,.0f}/s  ours is {ratio:6.2f}x"
                + (f"  mean error {errors:.3f}" if isinstance(errors, float) else "")
            )

    def write(self, part: str, provider: str, case: str, cores: int, **cells: object) -> None:
        """One row."""
        self.file.write(
            {
                **self.stamp.columns(),
                "part": part,
                "provider": provider,
                "case": case,
                "cores": cores,
                **cells,
            }
        )

    def failed(self, part: str, name: str, case: str, cores: int, error: Exception) -> None:
        """A provider that does not run here."""
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        self.write(part, name, case, cores, error=text)
        print(f"  {name}: {text}")

    def shards(self, name: str, count: int) -> Path:
        """A folder of shards of one set's images with captions, indexed, made once."""
        folder = self.work / f"{name}-{count}"
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}")
            shutil.rmtree(partial, ignore_errors=True)
            images = self.sets[name]
            partial.mkdir(parents=True)
            for first in range(0, count, 1024):
                samples = []
                for number in range(first, min(first + 1024, count)):
                    caption = f"photograph {number} of something that is nice to look at"
                    members = {"jpg": images[number % len(images)], "txt": caption.encode()}
                    samples.append((f"{number:08d}", members))
                write_shard(partial / f"{first // 1024:05d}.tar", samples)
            partial.rename(folder)
        build_index(str(folder), workers=0)
        return folder


def _rates(
    runners: Mapping[str, Callable[[int], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Samples a second of each runner in each round; a runner gets the round's number."""
    rng = random.Random(0)
    found: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(rounds + 1):
        for name in rng.sample(list(runners), len(runners)):
            begin = clock()
            samples = runners[name](number)
            seconds = clock() - begin
            if number:  # the first round warms up
                found[name].append(samples / seconds)
    return found


def decode(bench: Bench) -> None:
    """Part decode."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for case, images in bench.sets.items():
        few = images[:128]
        pillow = PillowDecoder()
        boxes = [random_crop(*pillow.open(c).size, SCALE, 0, 0, n) for n, c in enumerate(few)]
        runners, cells = {}, {}
        for peer in IMAGE_PEERS:
            try:
                one = peer.build()
                errors = _errors(one, few, boxes)
            except Exception as error:
                bench.failed("decode", peer.name, case, 1, error)
                continue
            if peer.name == OURS and (errors[0] > MOST_MEAN_ERROR or errors[1] > MOST_ERROR):
                raise SystemExit(f"{case}: {errors} from Pillow's pixels: no speed is reported")
            runners[peer.name] = _all(one, few, boxes)
            mean, most = errors if errors[1] >= 0 else (None, None)
            cells[peer.name] = {
                "version": record.version_of(peer.distribution),
                "note": peer.note,
                "kilobytes": statistics.fmean(map(len, few)) / 1e3,
                "mean_error": mean,
                "max_error": most,
            }
        bench.rows("decode", case, 1, _rates(runners, bench.rounds, time.process_time), cells)


def _errors(one: Decode, images: Sequence[bytes], boxes: Sequence[Box]) -> tuple[float, int]:
    """Mean and largest difference from Pillow's pixels; -1 where the boxes are the peer's own."""
    pillow = PillowDecoder()
    expected = np.empty((SIZE, SIZE, 3), dtype=np.uint8)
    means, most = [], 0
    for content, box in zip(images, boxes, strict=True):
        pillow.decode(pillow.open(content), box, expected)
        found = one(content, box)
        if found is None:
            return -1.0, -1
        difference = np.abs(found.astype(np.int16) - expected)
        means.append(float(difference.mean()))
        most = max(most, int(difference.max()))
    return statistics.fmean(means), most


def _all(one: Decode, images: Sequence[bytes], boxes: Sequence[Box]) -> Callable[[int], int]:
    def run(number: int) -> int:
        del number
        for content, box in zip(images, boxes, strict=True):
            one(content, box)
        return len(images)

    return run


def read(bench: Bench) -> None:
    """Part read."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for case in ("small", "shrunk"):
        folder = bench.shards(case, 8192)
        runners, cells = {}, {}
        for peer in READERS:
            runner = _epoch(peer, folder)
            try:
                runner(0)
            except Exception as error:
                bench.failed("read", peer.name, case, 1, error)
                continue
            runners[peer.name] = runner
            cells[peer.name] = _about(peer)
        rates = _rates(runners, bench.rounds, time.perf_counter)
        bench.rows("read", case, 1, rates, cells)


def _epoch(peer: LoaderPeer, folder: Path) -> Callable[[int], int]:
    def run(number: int) -> int:
        del number
        return sum(peer.samples(folder))

    return run


def _about(peer: LoaderPeer) -> dict[str, object]:
    version = record.version_of(peer.distribution) if peer.distribution else ""
    return {"version": version, "note": peer.note}


def load(bench: Bench) -> None:
    """Part load; the same loaders on one core and on two, so that their ratio is the scaling."""
    every = sorted(os.sched_getaffinity(0))
    for case in ("small", "shrunk"):
        folder = bench.shards(case, 2048)
        for cores in (1, 2):
            if len(every) < cores:
                print(f"load on {cores} cores: this machine has {len(every)}")
                continue
            os.sched_setaffinity(0, set(every[:cores]))
            _streaks(bench, "load", case, cores, loaders(cores), folder, window=256)
        os.sched_setaffinity(0, set(every))


def gpu(bench: Bench) -> None:
    """Part gpu."""
    bench = bench.on(torch.device("cuda"))
    cores = len(os.sched_getaffinity(0))
    for case in ("small", "shrunk"):
        folder = bench.shards(case, 8192)
        peers = loaders_onto(bench.device, cores)
        _streaks(bench, "gpu", case, cores, peers, folder, window=4 * GPU_BATCH)


def _streaks(
    bench: Bench,
    part: str,
    case: str,
    cores: int,
    loaders: Sequence[LoaderPeer],
    folder: Path,
    window: int,
) -> None:
    """Rows of loaders, each three times, in an order drawn anew."""
    peers = {peer.name: peer for peer in loaders}
    rates: dict[str, list[float]] = {name: [] for name in peers}
    rng = random.Random(0)
    # One at a time: what a loader prepares ahead would fall into the next one's time.
    for _ in range(3):
        for name in rng.sample(list(peers), len(peers)):
            if name not in rates:
                continue
            try:
                rates[name] += _streak(peers[name], folder, bench.rounds, window)
            except Exception as error:
                bench.failed(part, name, case, cores, error)
                del rates[name]
    bench.rows(part, case, cores, rates, {name: _about(peers[name]) for name in rates})


def _streak(peer: LoaderPeer, folder: Path, rounds: int, window: int) -> list[float]:
    """Samples a second over some windows of that many samples, the first ones left out."""
    stream, rates = peer.samples(folder), []
    for number in range(rounds + 4):
        begin, samples = time.perf_counter(), 0
        while samples < window:
            samples += next(stream)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # copies and decoding that are still under way
        if number >= 4:
            rates.append(samples / (time.perf_counter() - begin))
    stream.close()
    return rates


def start(bench: Bench) -> None:
    """Part start."""
    few = bench.shards("shrunk", 64)
    many = bench.work / "shards-10000"
    if not many.is_dir():
        partial = bench.work / ".shards-10000"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        summary, table = scan_shard(few / "00000.tar")
        for number in range(10_000):
            shard = partial / f"{number:05d}.tar"
            os.link(few / "00000.tar", shard)
            save_table(shard, summary, table)
        partial.rename(many)
    seconds = []
    for _ in range(bench.rounds):
        begin = time.perf_counter()
        with ours(many, workers=2, batch_size=64) as loader:
            next(loader)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds)
    bench.write("start", OURS, "10,000 shards, first batch", 2, seconds=median, rounds=len(seconds))
    print(f"\nstart: first batch of 64 out of 10,000 shards in {median:.2f} s")
    folder = bench.shards("small", 8192)
    with ours(folder, workers=2) as loader:
        marks = []
        for number in range(3 * 8192 // 64):
            next(loader)
            if number % 32 == 31:
                marks.append(_resident())
    growth = max(marks[-4:]) - max(marks[:4])
    bench.write("start", OURS, "memory gained over 3 epochs", 2, memory_mb=growth)
    print(f"start: {growth:+.1f} MB over 3 epochs, {max(marks):.0f} MB at most")


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "gpu"), default=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", type=Path, default=Path("demo/loader"), help="for shards")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    options = parser.parse_args(arguments)
    if "gpu" in options.parts and not torch.cuda.is_available():
        print("--parts gpu needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    try:
        bench = Bench(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    parts: dict[str, Any] = {
        "decode": decode, "read": read, "load": load, "gpu": gpu, "start": start,
    }  # fmt: skip
    cores = os.sched_getaffinity(0)
    for name in options.parts:
        parts[name](bench)
        os.sched_setaffinity(0, cores)
    return 0


if __name__ == "__main__":
    sys.exit(main())
