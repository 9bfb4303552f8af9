"""Where results go, checked before anything is computed."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(path: Path, option: str) -> None:
    """Raises ValueError unless `path` is a folder, or one that can be made."""
    for place in (path, *path.parents):
        if os.path.lexists(place):
            if not place.is_dir():
                raise ValueError(f"{option} needs a folder, and {place} is none: name another")
            return


def check_sheet(path: Path) -> None:
    """Raises ValueError unless a contact sheet can be written to `path`."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"a contact sheet is a PNG, and {path} does not end in .png")
    if path.is_dir():
        raise ValueError(f"--sheet is a file, and {path} is a folder: name another")
    check_folder(path.parent, "--sheet")
