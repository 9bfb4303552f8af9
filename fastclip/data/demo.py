"""The demo's data: real image–text pairs from packages that every registry mirror carries.

Emoji in nine drawing styles with their CLDR names, flags in four, game icons, photographs of foods,
handwritten digits. Whole drawing styles are held out, so that zero-shot accuracy is measured on
renderings that training has never seen; so are one in twenty captions, and one in twenty drawings
whose concept and whose style are both trained on. Words drawn as pictures are for evaluation only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastclip.data.demo_debian import DEBIAN_PACKAGES, LANGUAGES, debian_pictures
from fastclip.data.demo_packages import PACKAGES, fetch
from fastclip.data.demo_rendered import rendered_pictures
from fastclip.data.demo_sources import (
    EMOJI_STYLES,
    FLAG_STYLES,
    FOODS,
    Picture,
    country_names,
    digit_pictures,
    emoji_pictures,
    flag_pictures,
    food_pictures,
    game_icon_pictures,
    read_emoji,
    stable_hash,
)
from fastclip.data.demo_suite import classes, datasets
from fastclip.data.shard_writer import sha256, write_shard

logger = logging.getLogger("fastclip")

FORMAT_VERSION = 3
HELD_OUT_STYLES = ("fluent-emoji-flat", "fxemoji", "flagpack")
TRAIN_DIGITS_PER_CLASS = 100
SAMPLES_PER_SHARD = 2048
# One in so many is held out:
_CAPTIONS = 20
_DRAWINGS = 20
_FOODS = 4
_STAMPS = 5


def build_demo(directory: Path, *, size: int = 80, full: bool = False) -> None:
    """Build the demo's shards in `directory`; a complete set that is there already is kept.

    ===========================  ==================================================================
    train/                       what is trained on
    test-captions/               the same styles, captions that are not in train/
    test-seen-styles/,           emoji and flags of which both caption and style are in train/, but
    test-seen-flags/             not together
    test-digits/                 the same ten digits, other pictures
    test-foods/                  photographs of foods, for classification by group
    test-tux-paint/              stamps with captions in many languages, none in train/; only `full`
    style-fluent-emoji-flat/,    drawing styles of which nothing is in train/
    style-fxemoji/,
    style-flagpack/
    classes/                     names for zero-shot classification
    suite/                       evaluation sets for ``fastclip eval --datasets``; two with pictures
                                 of their own, of words and of short judgements
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
    splits = split_pictures(pictures) | rendered_pictures()
    everything = [picture for members in splits.values() for picture in members]
    labels = sorted({picture.label for picture in everything})
    label_ids = {label: number for number, label in enumerate(labels)}

    building = directory / ".building"
    shutil.rmtree(building, ignore_errors=True)
    counts: dict[str, int] = {}
    for split, members in sorted(splits.items()):
        logger.info("drawing %6d pictures of %s", len(members), split)
        counts[split] = _write_split(building / split, members, label_ids, size)
    for name, content in classes(read_emoji(downloads), everything).items():
        _write_json(building / "classes" / f"{name}.json", content)
    for name, content in datasets(full=full).items():
        _write_json(building / "suite" / name / "dataset.json", content)
    (building / "SOURCES.md").write_text(_sources(everything), encoding="utf-8")
    files = sorted(path for path in building.rglob("*") if path.is_file())
    sums = {path.relative_to(building).as_posix(): sha256(path) for path in files}
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
        "pairs_by_style": dict(sorted(Counter(p.style for p in everything).items())),
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


def split_pictures(pictures: Iterable[Picture]) -> dict[str, list[Picture]]:
    """The pictures of each split, in an order that neither their sets nor their names decide.

    Some drawings and photographs occur under several names (one flag of two countries, one goat for
    all its parts). Those of test-seen-styles/, test-seen-flags/ and test-foods/ are not in train/
    under another name.
    """
    ordered = sorted(pictures, key=lambda each: stable_hash(each.key))
    splits: dict[str, list[Picture]] = {}
    drawings = [each for each in ordered if _is_drawing(each) and _split(each) == "train"]
    trained = Counter(each.label for each in drawings)
    copies = Counter(each.original for each in drawings)
    photographs: dict[str | None, dict[bytes, int]] = {}
    for picture in ordered:
        split = _split(picture)
        if split == "train" and picture.source == FOODS:
            # Counted within each group, so that every group that is tested is trained on, too.
            numbers = photographs.setdefault(picture.group, {})
            number = numbers.setdefault(picture.original, len(numbers) + 1)
            split = "test-foods" if number % _FOODS == 0 else "train"
        elif split == "train" and _is_drawing(picture):
            chosen = stable_hash(picture.key) % _DRAWINGS == 0
            if chosen and trained[picture.label] > 1 and copies[picture.original] == 1:
                trained[picture.label] -= 1
                is_flag = picture.style in FLAG_STYLES
                split = "test-seen-flags" if is_flag else "test-seen-styles"
        splits.setdefault(split, []).append(picture)
    return splits


def _is_drawing(picture: Picture) -> bool:
    """Whether it is one of several drawings of the same emoji or flag."""
    return picture.style in EMOJI_STYLES + FLAG_STYLES


def _split(picture: Picture) -> str:
    """Where its style and its caption alone would put a picture."""
    if picture.style in HELD_OUT_STYLES:
        return f"style-{picture.style}"
    if picture.source == "mnist":  # ten labels: all of them are trained on
        return "train" if picture.more["number"] < TRAIN_DIGITS_PER_CLASS else "test-digits"
    number = stable_hash(picture.label)
    # Each language is asked about the same stamps.
    translated = all(f"caption_{language}" in picture.more for language in LANGUAGES)
    if picture.style == "stamp" and number % _STAMPS == 0 and translated:
        return "test-tux-paint"
    return "test-captions" if number % _CAPTIONS == 0 else "train"


def _write_split(
    folder: Path, pictures: list[Picture], label_ids: dict[str, int], size: int
) -> int:
    """Write a split's shards; how many pairs are in them."""
    folder.mkdir(parents=True)
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
            **picture.more,
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
            write_shard(folder / f"{first // SAMPLES_PER_SHARD:05d}.tar", samples)
            count += len(samples)
    return count


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
    lines.append(
        f"| Pillow | as installed | words and sentences drawn here in Aileron, the font within it "
        f"| Sora Sagano | CC0-1.0 | {counts['Pillow']} |"
    )
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
