"""Samples that cannot be used: counted, named once, written to a file; and an epoch's balance."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from fastclip.data.decode import BadSampleError
from fastclip.data.index import Sample
from fastclip.printing import printable

logger = logging.getLogger("fastclip")


class Quarantine:
    """Counts samples that could not be used, and names each once. For any number of threads.

    Args:
        path: a file of one JSON object a line (shard, offset of the image in bytes, key, kind,
            reason), which goes on where an earlier launch left it; None for none.

    Attributes:
        counts: different samples by kind of damage.
        seen, failed: how often any sample was drawn, and one that could not be used.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()
        self.seen = 0
        self.failed = 0
        self._lock = threading.Lock()
        self._named: set[tuple[str, str]] = set()
        self._written = set(_entries(path)) if path is not None else set()

    def good(self) -> None:
        """Count a sample that was used."""
        with self._lock:
            self.seen += 1

    def bad(self, sample: Sample, error: BadSampleError) -> None:
        """Count `sample`; log and write it when it is the first time."""
        identity = (str(sample.shard), sample.key)
        with self._lock:
            self.seen += 1
            self.failed += 1
            first = identity not in self._named
            if first:
                self._named.add(identity)
                self.counts[error.kind] += 1
                self._write(identity, sample, error)
        if first:
            where = f"{sample.shard.name}: {printable(sample.key)}"
            logger.warning("left out %s: %s", where, printable(str(error)))

    def _write(self, identity: tuple[str, str], sample: Sample, error: BadSampleError) -> None:
        if self.path is None or identity in self._written:
            return
        self._written.add(identity)
        entry = {
            "shard": str(sample.shard),
            "offset": sample.image[0],
            "key": sample.key,
            "kind": error.kind,
            "reason": error.reason,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    @property
    def total(self) -> int:
        """Different samples that could not be used."""
        return len(self._named)

    @property
    def fraction(self) -> float:
        """Unusable among all samples seen, each counted as often as it was drawn.

        (Different ones over draws would shrink with every epoch, whatever the damage.)
        """
        return self.failed / self.seen if self.seen else 0.0


def _entries(path: Path) -> Iterable[tuple[str, str]]:
    """What an earlier launch has written; a line that a kill cut off is ended."""
    if not path.is_file():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            yield entry["shard"], entry["key"]
        except (ValueError, KeyError, TypeError):
            continue


class Balance:
    """Checks that nothing is lost: of each epoch, planned = delivered + replaced.

    Counted are the places of one rank's share, from where it began or was resumed.

    Args:
        samples: of an epoch.
        batch_size: of this rank.
        rank, world_size: which share of each global batch.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.restart(0)

    def restart(self, position: int) -> None:
        """Begin to count at `position` of the stream."""
        self._begin = position
        self._delivered: defaultdict[int, int] = defaultdict(int)
        self._replaced: defaultdict[int, int] = defaultdict(int)

    def add(self, positions: Iterable[int], replaced: Iterable[bool]) -> None:
        """Count the places of a batch, and which of them hold another sample than planned."""
        for position, other in zip(positions, replaced, strict=True):
            counted = self._replaced if other else self._delivered
            counted[position // self.samples] += 1

    def close_epochs(self, position: int) -> list[str]:
        """One line for each epoch that ends before `position`.

        Raises:
            RuntimeError: the numbers contradict each other: samples were lost or repeated.
        """
        lines = []
        ended = [epoch for epoch in {*self._delivered, *self._replaced}
                 if (epoch + 1) * self.samples <= position]  # fmt: skip
        for epoch in sorted(ended):
            delivered, replaced = self._delivered.pop(epoch, 0), self._replaced.pop(epoch, 0)
            first = max(epoch * self.samples, self._begin)
            planned = self._share((epoch + 1) * self.samples) - self._share(first)
            if planned != delivered + replaced:
                raise RuntimeError(
                    f"epoch {epoch}: {planned} samples were planned, {delivered} delivered and "
                    f"{replaced} replaced: the loader has lost or repeated some"
                )
            since = "" if first == epoch * self.samples else f" since place {first:,}"
            lines.append(
                f"epoch {epoch}{since}: {planned:,} samples planned for this rank = "
                f"{delivered:,} delivered + {replaced:,} replaced"
            )
        return lines

    def _share(self, position: int) -> int:
        """This rank's places before `position`."""
        batches, rest = divmod(position, self.world_size * self.batch_size)
        own = min(max(rest - self.rank * self.batch_size, 0), self.batch_size)
        return batches * self.batch_size + own
