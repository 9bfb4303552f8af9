"""Captions a second, ours beside other tokenizers: ``python -m benchmarks.bench_tokenizer``.

In every round each tokenizer gets captions that none of them has seen, in an order drawn anew, so
that a busy machine slows all alike: the ratios are what to look at. One thread is measured in
processor time, several in elapsed time.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import captions, record
from benchmarks.tokenizer_peers import PROVIDERS, Encode, Provider, train_byte_level

COLUMNS = (
    *record.STAMP_COLUMNS, "provider", "version", "corpus", "bytes", "threads", "batch", "rounds",
    "per_second", "p20", "p80", "ours_over_it", "wrong_rows", "construct_ms", "memory_mb", "error",
)  # fmt: skip
KEY = ("commit", "dirty", "device", "provider", "corpus", "threads", "batch")
OURS = "fastclip"


@dataclass(frozen=True)
class Runner:
    """A provider at work."""

    provider: Provider
    prepare: Callable[[Sequence[str]], list[str]]
    encode: Encode


def measure(
    runners: Sequence[Runner], texts: Sequence[str], batch: int, rounds: int, threads: int
) -> dict[str, list[float]]:
    """Captions a second of each provider in each round; `texts` are used once."""
    clock = time.process_time if threads == 1 else time.perf_counter
    rng = random.Random(0)
    rates: dict[str, list[float]] = {runner.provider.name: [] for runner in runners}
    for number in range(rounds + 1):
        order = list(runners)
        rng.shuffle(order)
        chunk = texts[number * batch : (number + 1) * batch]
        for runner in order:
            few = chunk[: max(1, int(batch * runner.provider.share))]
            fresh = runner.prepare(few)
            begin = clock()
            runner.encode(fresh)
            seconds = clock() - begin
            if number:  # the first round warms up
                rates[runner.provider.name].append(len(fresh) / seconds)
    return rates


def wrong_rows(runner: Runner, texts: Sequence[str]) -> float | None:
    """The share of texts with other ids than OpenAI's code gives; None for another vocabulary."""
    if not runner.provider.comparable:
        return None
    expected = PROVIDERS["fastclip-python"].build(1)(list(texts))
    ends = expected == 49407  # some pad with EOT instead of zeros: compare up to the first one
    inside = ends.int().cumsum(1) - ends.int() == 0
    found = torch.as_tensor(runner.encode(list(texts))).to(torch.int64)
    return float(((found != expected) & inside).any(1).double().mean())


_COST = """
import resource, sys, time
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
from benchmarks.tokenizer_peers import PROVIDERS
provider = PROVIDERS[sys.argv[1]]
provider.load()
before, begin = resident(), time.process_time()
encode = provider.build(1)
ready = time.process_time()
encode(["a photo of a cat"])
print(1e3 * (ready - begin), (resident() - before) / 1e6)
"""


def cost(provider: Provider) -> tuple[float | None, float | None]:
    """Milliseconds to construct it, and megabytes that it then holds, in a fresh process."""
    return cost_of(_COST, provider.name)


def cost_of(code: str, *arguments: str) -> tuple[float | None, float | None]:
    """The two numbers that `code` prints in a fresh process; None for both where it fails."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=record.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return None, None
    milliseconds, megabytes = map(float, done.stdout.split()[-2:])
    return milliseconds, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("demo/captions"), help="folder")
    parser.add_argument("--only", nargs="+", choices=captions.CORPORA, default=captions.CORPORA)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, torch.get_num_threads()])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the CSV file")
    parser.add_argument("--commit", help="default: git's")
    parser.add_argument("--dirty", action="store_true")
    arguments = parser.parse_args()
    captions.fetch(arguments.corpora)
    if "gigatoken" in arguments.providers:
        train_byte_level(arguments.corpora)
    stamp = record.stamp(arguments.commit, arguments.dirty, torch.device("cpu"))
    file = record.Record(arguments.out / "tokenizer.csv", COLUMNS, KEY)
    torch.set_num_threads(1)
    costs = {name: cost(PROVIDERS[name]) for name in arguments.providers}
    for name in arguments.only:
        texts = captions.corpus(name, arguments.corpora)
        batch = min(arguments.batch, len(texts) // (arguments.rounds + 2))
        for threads in dict.fromkeys(arguments.threads):
            runners = []
            for provider_name in arguments.providers:
                provider = PROVIDERS[provider_name]
                cells = {
                    **stamp.columns(),
                    "provider": provider.name,
                    "version": record.version_of(provider.distribution),
                    "corpus": name,
                    "threads": threads,
                    "batch": batch,
                }
                if threads > 1 and not provider.threaded:
                    continue
                try:
                    encode = provider.build(threads)
                except Exception as error:
                    file.write({**cells, "error": f"{type(error).__name__}: {error}"[:200]})
                    print(f"  {provider.name}: {error}")
                    continue
                runners.append((Runner(provider, provider.prepare, encode), cells))
            rates = measure([r for r, _ in runners], texts, batch, arguments.rounds, threads)
            ours = rates.get(OURS)
            size = statistics.fmean(len(text.encode()) for text in texts[: 20 * batch])
            print(f"\n{name}, {size:.1f} bytes, {threads} thread(s), {batch} a call")
            for runner, cells in runners:
                values = sorted(rates[runner.provider.name])
                ratio = None
                if ours is not None:
                    pairs = zip(ours, rates[runner.provider.name], strict=True)
                    ratio = statistics.median(a / b for a, b in pairs)
                wrong = wrong_rows(runner, texts[-2000:]) if threads == 1 else None
                construct, memory = costs[runner.provider.name]
                median = statistics.median(values)
                file.write(
                    {
                        **cells,
                        "bytes": size,
                        "rounds": len(values),
                        "per_second": median,
                        "p20": values[len(values) // 5],
                        "p80": values[-1 - len(values) // 5],
                        "ours_over_it": ratio,
                        "wrong_rows": wrong,
                        "construct_ms": construct,
                        "memory_mb": memory,
                    }
                )
                print(
                    f"  {runner.provider.name:18s} {median:12,.0f}/s"
                    + ("" if ratio is None else f"  ours is {ratio:7.2f}x")
                    + ("" if wrong is None else f"  {wrong:7.2%} wrong")
                    + ("" if construct is None else f"  {construct:7.1f} ms to construct")
                    + ("" if memory is None else f"  {memory:6.1f} MB")
                )


if __name__ == "__main__":
    main()
