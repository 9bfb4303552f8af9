"""Further pictures for the demo, from two Debian packages: Tux Paint's stamps and Open Clip Art."""

from __future__ import annotations

import functools
import html
import io
import logging
import re
import shutil
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from fastclip.data.decode import to_rgb
from fastclip.data.demo_sources import Picture, draw_svg
from fastclip.data.shard_writer import sha256

logger = logging.getLogger("fastclip")


@dataclass(frozen=True)
class DebianPackage:
    """One package of a Debian release, for all architectures."""

    name: str
    version: str
    archive: str
    sha256: str
    licence: str
    about: str


DEBIAN_PACKAGES = (
    DebianPackage(
        "tuxpaint-stamps-default",
        "2022.06.04-1",
        "tuxpaint-stamps-default_2022.06.04-1_all.deb",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
        "GPL-2.0-or-later",
        "Tux Paint's stamps: photographs and drawings, a sentence each",
    ),
    DebianPackage(
        "openclipart-svg",
        "1:0.18+dfsg-19",
        "openclipart-svg_1%3a0.18+dfsg-19_all.deb",
        "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
        "public domain",
        "Open Clip Art",
    ),
)

LANGUAGES = (
    *("cs", "da", "de", "el", "es", "fi", "fr", "hu", "id", "it"),
    *("ja", "ka", "ko", "nl", "pl", "pt", "ru", "sv", "uk"),
)
"""Of the 77 languages that stamps are named in, those of nearly every stamp, in six scripts."""

_NO_PICTURES = ("shapes", "special", "decorations", "logos")  # gradients, arrows, ornaments
_TITLE = re.compile(rb"<dc:title[^>]*>([^<]*)</dc:title>")
_KEYWORD = re.compile(rb"<rdf:li[^>]*>([^<]+)</rdf:li>")
_TRANSLATION = re.compile(r"(\w+)\.utf8=(.*)")
_NUMBERED = re.compile(r"[\s_-]*\d+$")


def debian_pictures(downloads: Path) -> list[Picture]:
    """All pictures with a usable text; downloads 186 MB the first time.

    Raises:
        FileNotFoundError: apt-get or dpkg-deb is missing.
        ValueError: a package could not be fetched, or is not the one known.
    """
    roots = {package.name: unpack(package, downloads) for package in DEBIAN_PACKAGES}
    stamps = roots["tuxpaint-stamps-default"] / "usr/share/tuxpaint/stamps"
    clipart = roots["openclipart-svg"] / "usr/share/openclipart/svg"
    return [*_stamps(stamps), *_clipart(clipart)]


def unpack(package: DebianPackage, downloads: Path) -> Path:
    """The folder of a package's files, fetched into `downloads` where it is not there yet.

    Raises:
        FileNotFoundError: apt-get or dpkg-deb is missing.
        ValueError: the package could not be fetched, or is not the one known.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FileNotFoundError(
                f"{tool} is needed for --full: run on Debian or Ubuntu, or leave --full out"
            )
    path = downloads / package.archive
    if not path.is_file() or sha256(path) != package.sha256:
        logger.info("fetching %s %s", package.name, package.version)
        _run(["apt-get", "download", f"{package.name}={package.version}"], downloads)
        if not path.is_file() or sha256(path) != package.sha256:
            raise ValueError(f"{path} is not the {package.name} that this fastclip knows")
    target = downloads / package.name
    if not target.is_dir():
        partial = downloads / f".{package.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        _run(["dpkg-deb", "--extract", str(path.resolve()), str(partial.resolve())], downloads)
        partial.rename(target)
    return target


def _run(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(
            f"{' '.join(command)} failed; the package lists may be old (apt-get update), or this "
            f"release may carry another version:\n{done.stderr.strip()[-1000:]}"
        )


def caption_fields(lines: Sequence[str]) -> dict[str, str]:
    """A stamp's names in `LANGUAGES`, as json fields: {"caption_de": "Ein Blaureiher", ...}.

    Args:
        lines: of the stamp's text, such as ``de.utf8=Ein Blaureiher.``.
    """
    named = (_TRANSLATION.fullmatch(line) for line in lines)
    texts = {match[1]: _sentence(match[2]) for match in named if match is not None}
    return {f"caption_{name}": texts[name] for name in LANGUAGES if texts.get(name)}


def _stamps(root: Path) -> Iterator[Picture]:
    for text in sorted(root.rglob("*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        label = _sentence(lines[0]) if lines else ""
        image = next(
            (f for f in (text.with_suffix(s) for s in (".png", ".svg")) if f.is_file()), None
        )
        if label and image is not None:
            yield Picture(
                key=f"tuxpaint-{_key(root, text)}",
                label=label,
                source="tuxpaint-stamps-default",
                style="stamp",
                extension="png",
                draw=functools.partial(_draw_file, image),
                licence="GPL-2.0-or-later",
                group=text.relative_to(root).parts[0],
                more=caption_fields(lines[1:]),
            )


def _clipart(root: Path) -> Iterator[Picture]:
    for image in sorted(root.rglob("*.svg")):
        group = image.relative_to(root).parts[0]
        content = image.read_bytes()
        title = _TITLE.search(content)
        label = _NUMBERED.sub("", _text(title[1])) if title else ""
        if group in _NO_PICTURES or not 3 <= len(label) <= 100 or "clipart by" in label.lower():
            continue
        yield Picture(
            key=f"openclipart-{_key(root, image)}",
            label=label,
            source="openclipart-svg",
            style="clip art",
            extension="png",
            draw=functools.partial(_draw_file, image),
            licence="public domain",
            keywords=tuple(filter(None, (_text(word) for word in _KEYWORD.findall(content)))),
            group=group,
        )


def _draw_file(path: Path, size: int) -> bytes:
    if path.suffix == ".svg":
        return draw_svg(path.read_bytes(), size)
    with Image.open(path) as image:
        picture = to_rgb(image)
    picture.thumbnail((size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG")
    return encoded.getvalue()


def _key(root: Path, path: Path) -> str:
    name = str(path.relative_to(root).with_suffix(""))
    # Names that differ in case or punctuation only stay apart by their sums.
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{zlib.crc32(name.encode()):08x}"


def _sentence(text: str) -> str:
    return text.strip().rstrip(".")


def _text(raw: bytes) -> str:
    return " ".join(html.unescape(raw.decode("utf-8", "replace")).replace("_", " ").split())
