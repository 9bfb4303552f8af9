"""The native tokenizer against the Python one: ``python -m benchmarks.check_tokenizer``.

Half a million lines of 170 languages, each raw and in seven distorted forms, both dialects.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import torch

from benchmarks import captions
from fastclip.tokenizer import Tokenizer
from fastclip.tokenizer.vocabulary import Dialect

CHUNK = 4000


def wrong_in(job: tuple[int, list[str]]) -> list[str]:
    """The texts of a chunk whose rows differ, with one thread or four."""
    number, lines = job
    dialects: tuple[Dialect, ...] = ("openai", "open_clip")
    dialect = dialects[number % 2]
    texts = [form for line in lines for form in captions.distortions(line)]
    expected = Tokenizer(256, dialect, backend="python")(texts)
    wrong = torch.zeros(len(texts), dtype=torch.bool)
    for threads in (1, 4):
        rows = Tokenizer(256, dialect, backend="native", threads=threads)(texts)
        wrong |= (rows != expected).any(1)
    return [f"{dialect}: {texts[i]!a}" for i in wrong.nonzero().flatten().tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpora", type=Path, default=Path("demo/captions"), help="folder")
    parser.add_argument("--lines", type=int, help="of each kind; default: all")
    parser.add_argument("--processes", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captions.fetch(arguments.corpora)
    lines = [
        *islice(captions.glosses(arguments.corpora), arguments.lines),
        *islice(captions.emoji_names(arguments.corpora), arguments.lines),
        *islice(captions.corpus("web", arguments.corpora), arguments.lines),
    ]
    jobs = [
        (i, lines[start : start + CHUNK]) for i, start in enumerate(range(0, len(lines), CHUNK))
    ]
    begin = time.perf_counter()
    wrong: list[str] = []
    with Pool(arguments.processes) as pool:
        for found in pool.imap_unordered(wrong_in, jobs):
            wrong += found
    forms = sum(1 for _ in captions.distortions(""))
    minutes = (time.perf_counter() - begin) / 60
    print(f"{len(lines)} lines in {forms} forms, {minutes:.1f} min: {len(wrong)} with other ids")
    print("\n".join(wrong[:50]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
