"""Lists of shards: what they mean, and that one which means nothing is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastclip.data.shards import expand_shards


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a/000.tar", "a/001.tar", "b/000.tar", "b/001.tar", "a/notes.txt", "odd[1].tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a/000.tar", "a/001.tar"]),
        ("a/001.tar", ["a/001.tar"]),
        ("a/*", ["a/000.tar", "a/001.tar", "a/notes.txt"]),
        ("?/000.tar", ["a/000.tar", "b/000.tar"]),
        ("a/{000..001}.tar", ["a/000.tar", "a/001.tar"]),
        ("a/00{0..1}.tar", ["a/000.tar", "a/001.tar"]),
        ("[ab]/{000..001}.tar", ["a/000.tar", "a/001.tar", "b/000.tar", "b/001.tar"]),
        ("a/0{0..0}{0..1}.tar", ["a/000.tar", "a/001.tar"]),
        ("b::a/000.tar", ["a/000.tar", "b/000.tar", "b/001.tar"]),
        ("file://a::file://b/000.tar", ["a/000.tar", "a/001.tar", "b/000.tar"]),
        ("a::a/*.tar", ["a/000.tar", "a/001.tar"]),  # nothing twice
        ("odd[1].tar", ["odd[1].tar"]),  # a file's own name comes before its meaning as a glob
    ],
)
def test_patterns(folder: Path, pattern: str, names: list[str]) -> None:
    assert [str(path) for path in expand_shards(pattern)] == names


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("", ValueError, "no shards given"),
        ("c/*.tar", FileNotFoundError, r"no file matches c/\*\.tar"),
        ("a::c", FileNotFoundError, "no file matches c"),
        ("a/{000..002}.tar", FileNotFoundError, r"no file a/002\.tar \(from a/\{000\.\.002\}"),
        ("a/{1..0}.tar", ValueError, "runs backwards"),
        ("a/{0..99999}{00..99}.tar", ValueError, "mean more than 1,000,000 shards"),
        ("a::", ValueError, "between :: is empty"),
        ("::a", ValueError, "between :: is empty"),
        ("pipe:cat a.tar", ValueError, "pipe:cat …: commands from settings are not run; give the"),
        ("a::nothing://host/a.tar", ValueError, "fsspec knows no nothing://"),
    ],
)
def test_patterns_that_mean_nothing(
    folder: Path, pattern: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        expand_shards(pattern)


def test_a_folder_without_shards_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"the folder {tmp_path} holds no \*\.tar"):
        expand_shards(str(tmp_path))
