"""DALI's memory over many batches, in a process of its own.

The allocator of a process that has run other tests moves by more than the bound.
"""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_memory_stays_flat() -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    gains = [int(word) for word in done.stdout.split()]
    # A leak gains in each part; an allocator that takes an arena more does so once.
    assert sorted(gains)[1] < 32 << 20, gains


def gained() -> list[int]:
    """Bytes that 70 batches have added to this process, three times."""
    from test_dali import BATCH, PHOTOGRAPHS, SIZE, _boxes, _damaged, _file

    from fastclip.data.dali import DaliDecoder

    decoder = DaliDecoder(SIZE, batch_size=BATCH, device="cpu")
    contents = [_file(kind, 500, 400) for kind in PHOTOGRAPHS][:BATCH]
    contents[3] = _damaged(contents[3])
    boxes = _boxes(500, 400)
    pages = []
    for number in range(231):
        # Every tenth fails and is decoded one by one by pipelines made for it.
        count = BATCH if number % 10 == 0 else 3
        _, reasons = decoder.decode(contents[:count], boxes[:count])
        assert len(reasons) == (number % 10 == 0)
        if number % 70 == 20:
            gc.collect()
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    return [(b - a) * os.sysconf("SC_PAGE_SIZE") for a, b in itertools.pairwise(pages)]


if __name__ == "__main__":
    print(*gained())
