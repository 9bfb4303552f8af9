"""Regenerate fastclip/tokenizer/bpe_merges.txt from the vocabulary file of an installed open_clip.

The published file lists 262,144 merges, of which CLIP uses the first 48,894. Only those are kept,
one a line, in rank order, each as ``left right``.

    python tests/tokenizer/strip_vocabulary.py [--source FILE.txt.gz] [--output FILE]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
from pathlib import Path

SOURCE_NAME = "bpe_simple_vocab_16e6.txt.gz"
SOURCE_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = 49_408 - 2 * 256 - 2  # the vocabulary less the bytes, the bytes at a word's end, SOT, EOT
CHECKED_IN = Path(__file__).parents[2] / "fastclip" / "tokenizer" / "bpe_merges.txt"


def installed_source() -> Path | None:
    """The vocabulary file inside the installed open_clip, which is located but not imported."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).with_name(SOURCE_NAME)


def strip(source: Path) -> bytes:
    """The merge table in use, as UTF-8. Raises ValueError when `source` is another file."""
    compressed = source.read_bytes()
    digest = hashlib.sha256(compressed).hexdigest()
    if digest != SOURCE_SHA256:
        raise ValueError(f"{source} has sha256 {digest}, not {SOURCE_SHA256}: another vocabulary")
    lines = gzip.decompress(compressed).decode("utf-8").split("\n")
    kept = lines[1 : MERGES + 1]  # the first line is a version comment
    return "".join(f"{line}\n" for line in kept).encode("utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, default=installed_source())
    parser.add_argument("--output", type=Path, default=CHECKED_IN)
    arguments = parser.parse_args()
    if arguments.source is None:
        parser.error(f"open_clip is not installed; name a {SOURCE_NAME} with --source")
    arguments.output.write_bytes(strip(arguments.source))


if __name__ == "__main__":
    main()
