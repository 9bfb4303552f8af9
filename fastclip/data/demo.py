"""The demo's data: real image–text pairs from packages that every registry mirror carries.

Emoji in nine drawing styles with their CLDR names, flags in four, game icons, photographs of foods,
handwritten digits. Whole drawing styles are held out, so that zero-shot accuracy is measured on
renderings that training has never seen; so are one in twenty captions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastclip.data.demo_debian import DEBIAN_PACKAGES, debian_pictures
from fastclip.data.demo_packages import PACKAGES, fetch
from fastclip.data.demo_sources import (
    DIGIT_WORDS,
    EMOJI_STYLES,
    FLAG_STYLES,
    Picture,
    country_names,
    digit_pictures,
    emoji_pictures,
    flag_pictures,
    food_pictures,
    game_icon_pictures,
    read_emoji,
)
from fastclip.data.shard_writer import sha256, write_shard

logger = logging.getLogger("fastclip")

FORMAT_VERSION = 1
HELD_OUT_STYLES = ("fluent-emoji-flat", "fxemoji", "flagpack")
TRAIN_DIGITS_PER_CLASS = 100
SAMPLES_PER_SHARD = 2048
_HELD_OUT_CAPTIONS = 20  # one in so many


def build_demo(directory: Path, *, size: int = 80, full: bool = False) -> None:
    """Build the demo's shards in `directory`; a complete set that is there already is kept.

    ===========================  ==================================================================
    train/                       what is trained on
    test-captions/               the same styles, captions that are not in train/
    test-digits/                 the same digits, by other hands
    style-fluent-emoji-flat/,    drawing styles of which nothing is in train/
    style-fxemoji/,
    style-flagpack/
    classes/                     names for zero-shot classification
    SOURCES.md, manifest.json    where everything comes from, under which licence; sums
    ===========================  ==================================================================

    The same packages and settings give the same bytes. A build that was killed starts again with
    the packages it had fetched.

    Args:
        size: of the drawings' squares and the photographs' shorter sides, in pixels.
        full: add the pictures of Debian packages (needs apt-get and dpkg-deb).

    Raises:
        FileNotFoundError: npm (or apt-get) is not installed.
        ValueError: a package could not be fetched or is not the one known.
        ImportError: pyvips, which draws, is not installed.
    """
    settings = {"format_version": FORMAT_VERSION, "size": size, "full": full}
    if _is_complete(directory, settings):
        logger.info("the demo's data is complete in %s", directory)
        return
    _require_pyvips()
    downloads = directory / "downloads"
    fetch(downloads)
    pictures = list(_npm_pictures(downloads))
    if full:
        pictures += debian_pictures(downloads)
    labels = sorted({picture.label for picture in pictures})
    label_ids = {label: number for number, label in enumerate(labels)}
    splits: dict[str, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda each: _hash(each.key)):
        splits.setdefault(_split(picture), []).append(picture)

    building = directory / ".building"
    shutil.rmtree(building, ignore_errors=True)
    sums: dict[str, str] = {}
    counts: dict[str, int] = {}
    for split, members in sorted(splits.items()):
        logger.info("drawing %6d pictures of %s", len(members), split)
        written, counts[split] = _write_split(building, split, members, label_ids, size)
        sums |= written
    classes = building / "classes"
    classes.mkdir()
    for name, content in _classes(downloads).items():
        _write_json(classes / f"{name}.json", content)
    (building / "SOURCES.md").write_text(_sources(pictures), encoding="utf-8")
    for path in sorted(building.iterdir()):
        target = directory / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    building.rmdir()
    manifest = {
        **settings,
        "labels": len(labels),
        "pairs": counts,
        "pairs_by_style": dict(sorted(Counter(p.style for p in pictures).items())),
        "packages": {package.name: package.version for package in PACKAGES},
        "sha256": sums,
    }
    _write_json(directory / "manifest.json", manifest)  # last: this is what makes it complete
    logger.info("%s: %s", directory, ", ".join(f"{n} {split}" for split, n in counts.items()))


def _npm_pictures(downloads: Path) -> Iterator[Picture]:
    emoji = read_emoji(downloads)
    for style in EMOJI_STYLES:
        yield from emoji_pictures(downloads, emoji, style)
    for style in FLAG_STYLES:
        yield from flag_pictures(downloads, country_names(emoji), style)
    yield from game_icon_pictures(downloads)
    yield from food_pictures(downloads)
    yield from digit_pictures(downloads)


def _split(picture: Picture) -> str:
    if picture.style in HELD_OUT_STYLES:
        return f"style-{picture.style}"
    if picture.source == "mnist":  # ten labels: all of them are trained on
        return "train" if picture.more["number"] < TRAIN_DIGITS_PER_CLASS else "test-digits"
    held_out = _hash(picture.label) % _HELD_OUT_CAPTIONS == 0
    return "test-captions" if held_out else "train"


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write_split(
    building: Path, split: str, pictures: list[Picture], label_ids: dict[str, int], size: int
) -> tuple[dict[str, str], int]:
    """Sums of the shards written, and how many pairs are in them."""
    folder = building / split
    folder.mkdir(parents=True)
    sums = {}

    debian = {package.name for package in DEBIAN_PACKAGES}

    def members(picture: Picture) -> tuple[str, dict[str, bytes]] | None:
        try:
            image = picture.draw(size)
        except Exception as error:  # whatever a drawing library raises
            if picture.source in debian:  # thousands of hand-made files; some cannot be read
                logger.warning("left out %s: %s", picture.key, str(error).splitlines()[0])
                return None
            raise ValueError(f"{picture.source}: cannot draw {picture.key}: {error}") from error
        about = {
            "label": picture.label,
            "label_id": label_ids[picture.label],
            "source": picture.source,
            "style": picture.style,
            "keywords": list(picture.keywords),
            "group": picture.group,
            "subgroup": picture.subgroup,
            "licence": picture.licence,
        }
        return picture.key, {
            picture.extension: image,
            "txt": picture.label.encode(),
            "json": json.dumps(about, ensure_ascii=False).encode(),
        }

    count = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for first in range(0, len(pictures), SAMPLES_PER_SHARD):
            drawn = pool.map(members, pictures[first : first + SAMPLES_PER_SHARD])
            samples = [sample for sample in drawn if sample is not None]
            path = folder / f"{first // SAMPLES_PER_SHARD:05d}.tar"
            sums[f"{split}/{path.name}"] = write_shard(path, samples)
            count += len(samples)
    return sums, count


def _classes(downloads: Path) -> dict[str, dict[str, Any]]:
    emoji = read_emoji(downloads)
    return {
        "emoji": {"label_field": "label", "classes": [each.label for each in emoji]},
        "flags": {"label_field": "label", "classes": sorted(country_names(emoji).values())},
        "digits": {
            "label_field": "label",
            "classes": [f"handwritten digit {word}" for word in DIGIT_WORDS],
        },
        "emoji-groups": {
            "label_field": "group",
            "classes": sorted({each.group for each in emoji}),
        },
        "emoji-subgroups": {
            "label_field": "subgroup",
            "classes": sorted({each.subgroup for each in emoji}),
        },
    }


def _sources(pictures: list[Picture]) -> str:
    counts = Counter(picture.source for picture in pictures)
    debian = [package for package in DEBIAN_PACKAGES if package.name in counts]
    lines = [
        "# Where these pictures and texts come from",
        "",
        "Built on this machine from packages that their registries distribute. The works stay",
        "under their own licences: read them before you pass anything on. Some ask for attribution",
        "or for sharing alike; where the food photographs come from, their package does not say.",
        "",
        "| package | version | what | by | licence | pictures |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {package.name} | {package.version} | {package.about} | {package.author} | "
        f"{package.licence} | {counts.get(package.name, 0) or 'texts'} |"
        for package in PACKAGES
    ]
    lines += [
        f"| {package.name} (Debian) | {package.version} | {package.about} | see its copyright file "
        f"| {package.licence} | {counts[package.name]} |"
        for package in debian
    ]
    return "\n".join(lines) + "\n"


def _is_complete(directory: Path, settings: dict[str, Any]) -> bool:
    path = directory / "manifest.json"
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return False
    if any(manifest.get(name) != value for name, value in settings.items()):
        return False
    packages = {package.name: package.version for package in PACKAGES}
    return manifest.get("packages") == packages and all(
        (directory / name).is_file() and sha256(directory / name) == expected
        for name, expected in manifest["sha256"].items()
    )


def _require_pyvips() -> None:
    try:
        import pyvips  # noqa: F401
    except (ImportError, OSError) as error:
        raise ImportError(
            "drawing the demo's pictures needs pyvips: pip install 'fastclip-torch[demo]' "
            f"({error})"
        ) from None


def _write_json(path: Path, content: object) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
