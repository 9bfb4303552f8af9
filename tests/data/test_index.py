"""Walking shards: every way in which tars differ or break, and nothing lost in silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from fastclip.data.index import index_shards, scan_shard
from fastclip.data.shards import expand_shards
from shards import sample, write_tar

PAIRS = [sample(number) for number in range(6)]
BLOCK = 512


def _keys(path: Path, needs: tuple[str, ...] = ("txt",)) -> tuple[list[str], list[str]]:
    rows, problems = scan_shard(path, needs=needs)
    return [key for key, _ in rows], [problem.kind for problem in problems]


def _header_of(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


def _overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_places_point_at_the_members(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    index = index_shards(str(path))
    content = path.read_bytes()
    assert [index[n].key for n in range(6)] == [key for key, _ in PAIRS]
    for number, (_, members) in enumerate(PAIRS):
        found = index[number]
        for place, extension in (
            (found.image, "png"),
            (found.caption, "txt"),
            (found.metadata, "json"),
        ):
            offset, size = place
            assert content[offset : offset + size] == members[extension]


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, tar_format: int) -> None:
    stems = ["d/" + "x" * 140, "größe-ß", "plain"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for stem in stems:
            for extension in ("PNG", "Txt"):  # the case of an extension does not matter
                member = tarfile.TarInfo(
                    f"./{stem}.{extension}" if stem == "plain" else f"{stem}.{extension}"
                )
                member.size = 3
                tar.addfile(member, io.BytesIO(b"abc"))
    assert _keys(tmp_path / "a.tar") == (stems, [])


def test_folders_links_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("d/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        tar.addfile(link)
        for name in ("d/._a.png", "d/a.png", "d/a.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    assert _keys(tmp_path / "a.tar") == (["d/a"], [])


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    apart = [(key, {e: m[e]}) for e in ("txt", "png") for key, m in PAIRS]
    assert _keys(write_tar(tmp_path / "a.tar", apart)) == ([key for key, _ in PAIRS], [])


def test_incomplete_samples_are_named(tmp_path: Path) -> None:
    rows = [
        ("a", {"png": b"x"}),
        ("b", {"txt": b"x"}),
        ("c", {"avif": b"x", "txt": b"x"}),
        ("d", {"jpg": b"x", "txt": b"x"}),
        ("d", {"png": b"y"}),
    ]
    path = write_tar(tmp_path / "a.tar", rows)
    keys, kinds = _keys(path)
    assert keys == ["d"]
    assert sorted(kinds) == [
        "duplicate member",
        "missing caption",
        "missing image",
        "unsupported image",
    ]
    assert _keys(path, ("json",))[1].count("missing metadata") == 2
    _, problems = scan_shard(path)
    assert all(str(problem).startswith("a.tar: ") for problem in problems)


@pytest.mark.parametrize("junk", [b"\xa5" * BLOCK, b"\0" * BLOCK])
def test_one_damaged_header_costs_its_own_sample_only(tmp_path: Path, junk: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    _overwrite(path, _header_of(path, "000002.png"), junk)
    keys, kinds = _keys(path)
    assert keys == ["000000", "000001", "000003", "000004", "000005"]
    assert kinds == ["damaged header", "missing image"]
    with tarfile.open(path) as tar, pytest.raises(KeyError):
        tar.getmember("000005.png")  # what other readers make of it


def test_a_header_whose_size_is_no_number_is_damaged(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    offset = _header_of(path, "000001.txt")
    block = bytearray(path.read_bytes()[offset : offset + BLOCK])
    block[124:136] = b"zzzzzzzzzzz\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    _overwrite(path, offset, bytes(block))
    keys, kinds = _keys(path)
    assert "000001" not in keys
    assert len(keys) == 5
    assert kinds == ["damaged header", "missing caption"]


def test_truncation_in_a_member_and_in_a_header(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    whole = path.read_bytes()
    header = _header_of(path, "000004.png")
    path.write_bytes(whole[: header + BLOCK + 10])
    assert _keys(path) == (["000000", "000001", "000002", "000003"], ["truncated shard"])
    path.write_bytes(whole[: header + 100])
    assert _keys(path) == (["000000", "000001", "000002", "000003"], ["truncated shard"])
    text = _header_of(path := write_tar(path, PAIRS), "000004.txt")
    path.write_bytes(whole[: text + BLOCK + 1])
    keys, kinds = _keys(path)
    assert keys == ["000000", "000001", "000002", "000003"]
    assert kinds == ["truncated shard"]  # one sample is lost, and it is counted once


def test_one_block_at_the_end_is_enough(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS[:1])
    path.write_bytes(path.read_bytes().rstrip(b"\0").ljust(4096, b"\0")[:4096])
    assert _keys(path)[0] == ["000000"]


def test_files_that_are_no_tars(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"<html>" * 500)
    assert _keys(tmp_path / "a.tar") == ([], ["empty shard"])
    assert _keys(tmp_path / "b.tar") == ([], ["not a tar"])
    with pytest.raises(ValueError, match=r"2 shard\(s\), and no usable sample \(an image and txt"):
        index_shards(str(tmp_path))


def test_a_list_that_matches_nothing(tmp_path: Path) -> None:
    write_tar(tmp_path / "00.tar", PAIRS)
    with pytest.raises(FileNotFoundError, match=r"no file .*01\.tar \(from"):
        index_shards(str(tmp_path / "{00..02}.tar"))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        index_shards(str(tmp_path / "*.tgz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.tar"):
        index_shards(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no shards given"):
        index_shards("")
    with pytest.raises(ValueError, match="only local files"):
        index_shards("s3://bucket/00.tar")


def test_lists_of_shards(tmp_path: Path) -> None:
    names = [f"{number:02d}.tar" for number in (0, 1, 2)] + ["x.tar"]
    for name in names:
        (tmp_path / name).touch()
    paths = [tmp_path / name for name in names]
    assert expand_shards(str(tmp_path)) == paths
    assert expand_shards(f"{tmp_path}/{{00..02}}.tar::{tmp_path}/x.tar") == paths
    assert expand_shards(f"{tmp_path}/?.tar::{tmp_path}/x.tar") == paths[3:]
    with pytest.raises(ValueError, match="runs backwards"):
        expand_shards(f"{tmp_path}/{{02..00}}.tar")


def test_hash_tells_shards_apart(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    first = index_shards(str(path)).hash
    assert index_shards(str(path)).hash == first
    write_tar(path, PAIRS[:5])
    assert index_shards(str(path)).hash != first
