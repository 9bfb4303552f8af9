"""Images as they lie in a folder, one file each, as samples like those of shards."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastclip.data.index import Sample
from fastclip.data.reader import WHOLE_FILE
from fastclip.data.shard_table import IMAGE_EXTENSIONS, Problem

logger = logging.getLogger("fastclip")

_NAMED = 20
"""Problems that are logged by name; the others are counted."""


class FolderIndex:
    """The images below a folder, at any depth, in the order of their paths.

    A sample's key is its path from the folder, with /. Files and folders whose names begin with a
    dot do not belong to the images. Links are followed, wherever they lead, but for one that leads
    back into a folder that contains it.

    Attributes:
        folder: where the keys start.
        problems: every other file, and what cannot be reached.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[Problem] = []
        found = sorted(self._walk(folder, "", ()))
        self.keys = [key for _, key, _ in found]
        self._sizes = np.array([size for *_, size in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        key = self.keys[number]
        nothing = (-1, 0)
        return Sample(
            shard=self.folder / key,
            key=key,
            image=(WHOLE_FILE, int(self._sizes[number])),
            caption=nothing,
            metadata=nothing,
            extension=_extension(key),
        )

    def log_problems(self) -> None:
        """Say once what was left out: the first problems by name, and the counts."""
        for problem in self.problems[:_NAMED]:
            logger.warning("%s", problem)
        if self.problems:
            counts = Counter(problem.kind for problem in self.problems)
            listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            logger.warning("left out of %s: %s", self.folder, listed)

    def _walk(
        self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[list[str], str, int]]:
        """(the key's parts, key, size in bytes) of each image."""
        about = folder.stat()
        identity = (about.st_dev, about.st_ino)
        if identity in above:
            self._leave_out(prefix.rstrip("/"), "looped link", "leads to a folder that contains it")
            return
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            if not above:
                raise
            self._leave_out(prefix.rstrip("/"), "unreadable", str(error.strerror))
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            key = prefix + entry.name
            try:
                if entry.is_dir():
                    yield from self._walk(folder / entry.name, key + "/", (*above, identity))
                elif _extension(key) not in IMAGE_EXTENSIONS:
                    self._leave_out(key, "no image", f"not one of .{', .'.join(IMAGE_EXTENSIONS)}")
                elif not entry.is_file():
                    self._leave_out(key, "unreadable", "neither a file nor a link to one")
                else:
                    yield key.split("/"), key, entry.stat().st_size
            except OSError as error:
                self._leave_out(key, "unreadable", str(error.strerror))

    def _leave_out(self, key: str, kind: str, reason: str) -> None:
        self.problems.append(Problem(self.folder.name, key, kind, reason))


def index_folder(folder: Path) -> FolderIndex:
    """The images below `folder`.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no image.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    index = FolderIndex(folder)
    if not len(index):
        first = f" First: {index.problems[0]}" if index.problems else ""
        raise ValueError(
            f"{folder} holds no image (a file ending in .{', .'.join(IMAGE_EXTENSIONS)}).{first}"
        )
    return index


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].removeprefix(".").lower()
