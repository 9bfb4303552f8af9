"""Pairs balanced by queries, as CLIP's data set was made and MetaCLIP describes it.

The first pass counts in how many pairs each query occurs, the second keeps a pair if one of its
queries keeps it: each does with the probability T / max(count, T), T being the pairs wanted for a
query. A pair in which no query occurs is left out. Whether a pair is kept depends on the seed, its
queries and what is in it, not on where it lies: the same pairs in other shards, in another order or
by another number of processes give the same.

Each pass leaves a file for every shard that it is through with, in `.balance` in the output folder,
so that a run that was killed goes on at the next shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastclip.data.curator import TOTALS, Curator, Job
from fastclip.data.index import Sample, ShardIndex, index_shards
from fastclip.data.metadata_queries import check_queries
from fastclip.data.phrases import can_occur
from fastclip.data.rewriting import alone, begin, end_with_parent, write_whole
from fastclip.data.shards import local_shards

logger = logging.getLogger("fastclip")

PER_QUERY = 20_000
"""As in CLIP's data set of 400 million pairs."""

_VERSION = 1
_SECONDS_BETWEEN_LINES = 30

Task = tuple[int, list[Sample]] | tuple[int, list[Sample], str]


@dataclass(frozen=True)
class BalanceSummary:
    """What became of the pairs."""

    shards: int
    written: int
    """Shards in the output folder; none is written for a shard of which no pair is kept."""

    pairs: int
    """Samples with image and caption."""

    unusable: int
    """Samples among the index's that were left out, each named in the log when it was counted."""

    unmatched: int
    """Pairs in whose captions no query occurs."""

    kept: int
    queries: int
    head: int
    """Queries that occur in more than `per_query` pairs, which are thinned out."""

    tail: int
    """Those that occur in at most as many, all of which are kept."""

    absent: int
    """Those that occur in none."""

    per_query: int
    seed: int
    queries_hash: str


def balance(
    pattern: str,
    queries: Sequence[str],
    out: Path,
    *,
    per_query: int = PER_QUERY,
    seed: int = 0,
    caption_key: str = "txt",
    workers: int = 1,
) -> BalanceSummary:
    """Write those of the pairs in some shards that balancing keeps, or go on writing them.

    For each shard one of the same name is written (with a number before it where names repeat), in
    which keys, members' bytes and the spelling of their extensions are unchanged. Beside them come
    `balance.json`, the summary with a histogram of the counts, and `counts.tsv`: query, count,
    probability.

    Args:
        pattern: the shards, local ones; see `expand_shards`.
        queries: as `read_queries` gives them.
        out: an empty folder, or one that was begun with the same arguments; it is made.
        per_query: T, in pairs.
        seed: from 0 to 2**64 - 1; another one keeps other pairs.
        caption_key: "txt" or "json:field"; of several captions, each is looked at.
        workers: processes. Several are started anew, so a script that asks for them needs the usual
            ``if __name__ == "__main__"``.

    Raises:
        ValueError: an argument is not as said; the folder was begun with other arguments or
            shards, or is not empty (what differs is named); a shard has changed since it was
            counted, or cannot be read.
        FileNotFoundError: there are no such shards.
        ChildProcessError: a worker died. The same call goes on.
    """
    _check(queries, per_query, seed, caption_key, workers)
    shards = local_shards(pattern)
    index = index_shards(pattern, needs=("txt",) if caption_key == "txt" else ("json",))
    index.log_problems()
    names = _names(shards)
    job = Job(list(queries), per_query, seed, caption_key, out)
    _begin(job, shards, index.sizes)
    never = sum(not can_occur(query) for query in queries)
    if never:
        logger.warning(
            "%d of %d queries can never be found: their punctuation touches a word",
            never,
            len(queries),
        )
    numbers = range(len(names))
    with alone(job.work, job.out, "balancing"), _Pool(job, workers) as pool:
        rest = [n for n in numbers if not job.counted(n).is_file()]
        pool.run(Curator.count, "counted", len(rest), ((n, _samples(index, n)) for n in rest))
        totals, counts = _add_up(job, len(names))
        write_whole(job.counts, lambda file: np.save(file, counts))
        rest = [n for n in numbers if not job.is_kept(n, names[n])]
        tasks = ((n, _samples(index, n), names[n]) for n in rest)
        pool.run(Curator.keep, "written", len(rest), tasks)
    kept = [json.loads(job.kept(n).read_bytes())["kept"] for n in numbers]
    summary = BalanceSummary(
        shards=len(names),
        written=sum(n > 0 for n in kept),
        pairs=totals["pairs"],
        unusable=totals["unusable"],
        unmatched=totals["unmatched"],
        kept=sum(kept),
        queries=len(queries),
        head=int((counts > per_query).sum()),
        tail=int(((counts > 0) & (counts <= per_query)).sum()),
        absent=int((counts == 0).sum()),
        per_query=per_query,
        seed=seed,
        queries_hash=_hash(queries),
    )
    _report(job, summary, counts)
    return summary


def _check(
    queries: Sequence[str], per_query: int, seed: int, caption_key: str, workers: int
) -> None:
    check_queries(queries)
    if per_query < 1:
        raise ValueError(f"per_query is a positive number of pairs, not {per_query}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is between 0 and 2**64 - 1, not {seed}")
    if caption_key != "txt" and not (caption_key.startswith("json:") and caption_key[5:]):
        raise ValueError(f"caption_key is txt or json:field, not {caption_key!r}")
    if workers < 1:
        raise ValueError(f"workers is a positive number of processes, not {workers}")


def _names(shards: Sequence[Path]) -> list[str]:
    """Names for the shards that are written."""
    names = [shard.name for shard in shards]
    # Two that a file system without case takes for one repeat as well.
    repeat = max(Counter(map(str.casefold, names)).values()) > 1
    return [f"{n:06d}-{name}" for n, name in enumerate(names)] if repeat else names


def _begin(job: Job, shards: Sequence[Path], sizes: Sequence[int]) -> None:
    """Make the output folder, or see that it was begun with this job.

    Raises:
        ValueError: it was not.
    """
    for shard in shards:
        if shard.resolve().parent == job.out.resolve():
            raise ValueError(f"{job.out} holds the shards to balance: name another output folder")
    settings: dict[str, Any] = {
        "version": _VERSION,
        "queries": f"{len(job.queries)} of hash {_hash(job.queries)}",
        "per_query": job.per_query,
        "seed": job.seed,
        "caption_key": job.caption_key,
        "shards": len(shards),
    }
    inputs = [
        f"{shard.name}: {shard.stat().st_size} bytes, {size} samples"
        for shard, size in zip(shards, sizes, strict=True)
    ]
    begin(job.work, job.out, settings, inputs)


def _samples(index: ShardIndex, shard: int) -> list[Sample]:
    return [index[number] for number in index.numbers(shard)]


def _add_up(job: Job, shards: int) -> tuple[dict[str, int], NDArray[np.int64]]:
    """`TOTALS` of all shards, and how many pairs each query occurs in, int64 [queries]."""
    totals = np.zeros(len(TOTALS), np.int64)
    counts = np.zeros(len(job.queries), np.int64)
    for number in range(shards):
        with np.load(job.counted(number)) as counted:
            totals += counted["totals"]
            counts[counted["ids"]] += counted["counts"]
    return dict(zip(TOTALS, totals.tolist(), strict=True)), counts


def _hash(queries: Sequence[str]) -> str:
    content = "\n".join(queries).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _report(job: Job, summary: BalanceSummary, counts: NDArray[np.int64]) -> None:
    digits = np.array([len(str(count)) for count in counts.tolist()])
    histogram = {"0": summary.absent} | {
        f"{10 ** (n - 1)} to {10**n - 1}": int(((digits == n) & (counts > 0)).sum())
        for n in range(1, int(digits.max()) + 1)
    }
    content = json.dumps({**asdict(summary), "queries_by_count": histogram}, indent=1).encode()
    write_whole(job.out / "balance.json", lambda file: file.write(content))
    lines = ["query\tcount\tprobability\n"]
    lines += [
        f"{query}\t{count}\t{job.per_query / max(count, job.per_query):.6g}\n"
        for query, count in zip(job.queries, counts.tolist(), strict=True)
    ]
    table = "".join(lines).encode("utf-8", "surrogatepass")
    write_whole(job.out / "counts.tsv", lambda file: file.write(table))


class _Pool:
    """Runs a curator's methods on shards, in this process or in several."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers = job, workers
        self._curator: Curator | None = None
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def run(
        self,
        method: Callable[..., list[str] | None],
        what: str,
        count: int,
        tasks: Iterator[Task],
    ) -> None:
        """Do all tasks, and log what each leaves out, and from time to time how many are done."""
        said = time.monotonic()
        try:
            for done, left_out in enumerate(self._results(method, tasks), 1):
                for reason in left_out or ():
                    logger.warning("left out %s", reason)
                if time.monotonic() - said > _SECONDS_BETWEEN_LINES or done == count:
                    said = time.monotonic()
                    logger.info("%d of %d shard(s) %s", done, count, what)
        except BrokenProcessPool:
            raise ChildProcessError(
                f"one of {self._workers} worker processes died, perhaps for lack of memory: the "
                "same call goes on, with fewer workers if need be"
            ) from None

    def _results(
        self, method: Callable[..., list[str] | None], tasks: Iterator[Task]
    ) -> Iterator[list[str] | None]:
        if self._workers == 1:
            for task in tasks:
                if self._curator is None:  # a run that is complete needs none
                    self._curator = Curator(self._job)
                yield method(self._curator, *task)
            return
        if self._executor is None:
            # A fork of a process with threads, such as torch's, may never wake up.
            self._executor = ProcessPoolExecutor(
                self._workers, get_context("spawn"), _start, (self._job,)
            )
        running: set[Future[list[str] | None]] = set()
        for task in tasks:
            running.add(self._executor.submit(_work, method, task))
            if len(running) > 2 * self._workers:  # lists of samples are made when they are needed
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


_curator: Curator | None = None
"""A worker process's."""


def _start(job: Job) -> None:
    global _curator
    end_with_parent()
    _curator = Curator(job)


def _work(method: Callable[..., list[str] | None], task: Task) -> list[str] | None:
    return method(_curator, *task)
