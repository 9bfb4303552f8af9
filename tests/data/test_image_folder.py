"""Folders of images: order, links, what is left out, and the way to evaluation batches."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from fastclip.data.decode import BadSampleError
from fastclip.data.eval_loader import eval_batches
from fastclip.data.image_folder import FolderIndex, index_folder
from fastclip.data.reader import Members
from shards import evaluation_pixels, picture


def _write(path: Path, colour: str = "red") -> bytes:
    content = picture(colour, "circle", 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


def test_order_is_that_of_the_paths(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.PNG", "a b/x.jpeg", "a/z/1.webp", "a/1.jpg", "a.tif"):
        _write(tmp_path / name)
    index = index_folder(tmp_path)
    assert index.keys == ["a/1.jpg", "a/z/1.webp", "a b/x.jpeg", "a.tif", "b/10.PNG", "b/2.png"]
    assert [index[number].key for number in range(len(index))] == index.keys
    assert index[4].extension == "png"
    assert index.problems == []


def test_batches_hold_the_pixels_of_the_files(tmp_path: Path) -> None:
    contents = [_write(tmp_path / f"{n}.png", colour) for n, colour in enumerate(("red", "blue"))]
    (tmp_path / "2.jpg").write_bytes(b"no image at all")
    contents.append(_write(tmp_path / "3.png", "green"))
    batches = list(
        eval_batches(
            index_folder(tmp_path),
            image_size=16,
            batch_size=3,
        )
    )
    assert [batch.keys for batch in batches] == [("0.png", "1.png"), ("3.png",)]
    images = [image for batch in batches for image in batch.images]
    for image, content in zip(images, contents, strict=True):
        expected = evaluation_pixels(content, 16)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)
    assert batches[0].metadata == ({}, {})


def test_other_files_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path / "a.png")
    (tmp_path / "read me.txt").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    (tmp_path / ".cache").mkdir()
    _write(tmp_path / ".cache" / "b.png")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    index = index_folder(tmp_path)
    assert index.keys == ["a.png"]
    assert [(p.key, p.kind) for p in index.problems] == [
        ("gone.png", "unreadable"),
        ("pipe.jpg", "unreadable"),
        ("read me.txt", "no image"),
    ]
    with caplog.at_level(logging.WARNING):
        index.log_problems()
    assert "read me.txt: no image: not one of .jpg" in caplog.text
    assert "2 unreadable, 1 no image" in caplog.text


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    _write(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "root"
    _write(root / "cat" / "b.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root)
    (root / "wolf").symlink_to(tmp_path / "elsewhere")  # a second name, no circle
    index = index_folder(root)
    assert index.keys == ["cat/b.png", "dog/a.png", "wolf/a.png"]
    assert [(p.key, p.kind) for p in index.problems] == [("cat/again", "looped link")]


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    _write(tmp_path / "a.png")
    _write(tmp_path / "b.png")
    index = index_folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"other")
    (tmp_path / "b.png").unlink()
    for number, reason in enumerate(("not what it was", "No such file")):
        with pytest.raises(BadSampleError, match=reason):
            Members(index[number])


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    _write(tmp_path / os.fsdecode(b"gr\xfc\xdfe.png"))
    index = index_folder(tmp_path)
    assert Members(index[0]).image == picture("red", "circle", 3)


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        index_folder(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"holds no image .* First: .*notes\.txt"):
        index_folder(tmp_path)
    assert len(FolderIndex(tmp_path)) == 0
