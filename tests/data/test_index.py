"""Walking shards: every way in which tars differ or break, and nothing lost in silence."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from fastclip.data.index import Problem, index_shards
from fastclip.data.shard_table import scan_shard
from fastclip.data.shards import expand_shards
from shards import sample, write_tar

PAIRS = [sample(number) for number in range(6)]
BLOCK = 512


def _keys(path: Path, needs: tuple[str, ...] = ("txt",)) -> tuple[list[str], list[str]]:
    keys, problems = _scan(path, needs)
    return keys, [problem.kind for problem in problems]


def _scan(path: Path, needs: tuple[str, ...] = ("txt",)) -> tuple[list[str], list[Problem]]:
    summary, table = scan_shard(path)
    usable = [table.keys[number] for number in table.usable(needs)]
    assert summary.count(needs) == len(usable)
    lacking = table.lacking(path.name, needs, summary.cut_key)
    return usable, [*summary.problems, *lacking]


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
    _, problems = _scan(path)
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
    write_tar(path, [PAIRS[n] for n in (1, 0, 2, 3, 4, 5)])  # as many, at other places
    assert index_shards(str(path)).hash != first


@pytest.mark.parametrize("which", ["000000.png", "000005.json"])
def test_a_zeroed_first_or_last_header(tmp_path: Path, which: str) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    _overwrite(path, _header_of(path, which), b"\0" * BLOCK)
    keys, problems = _scan(path, ("json", "txt"))
    lost = which.partition(".")[0]
    assert keys == [key for key, _ in PAIRS if key != lost]
    assert problems[0].kind == "damaged header"
    size = len(dict(PAIRS)[lost][which.partition(".")[2]])
    blocks = 1 + -(-size // BLOCK)
    if which == "000000.png":  # its content is said to be lost, to the byte
        assert problems[0].reason.startswith(f"{blocks * BLOCK} bytes from byte 0 on")


def test_two_zeroed_headers_do_not_end_a_shard_that_goes_on(tmp_path: Path) -> None:
    first = write_tar(tmp_path / "0.tar", PAIRS[:3]).read_bytes()
    second = write_tar(tmp_path / "1.tar", PAIRS[3:]).read_bytes()
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first + second)
    assert _keys(joined) == ([key for key, _ in PAIRS], ["damaged header"])


@pytest.mark.parametrize("size", [2 * BLOCK, 10240])
def test_a_tar_without_members(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(b"\0" * size)
    assert _keys(tmp_path / "a.tar") == ([], [])
    with pytest.raises(ValueError, match=r"1 shard\(s\), and no usable sample"):
        index_shards(str(tmp_path))


def test_cut_where_a_member_ends(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    path.write_bytes(path.read_bytes()[: _header_of(path, "000003.png")])
    keys, kinds = _keys(path)
    assert keys == ["000000", "000001", "000002"]  # what is whole is kept
    assert kinds == ["truncated shard"]


@pytest.mark.timeout(20)
def test_a_negative_size_does_not_send_the_walk_back(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            if name == "b.png":
                member.pax_headers = {"size": "-4000"}
            tar.addfile(member, io.BytesIO(b"abc"))
    assert _keys(tmp_path / "a.tar") == (["a"], ["damaged header", "missing image"])


def test_ustar_prefixes_and_the_oldest_headers(tmp_path: Path) -> None:
    stem = "p" * 90 + "/" + "q" * 60
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in (f"{stem}.png", f"{stem}.txt", "old.png", "old.txt"):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    for name in ("old.png", "old.txt"):  # as tars of 1979: no magic, and a type of zero
        offset = _header_of(path, name)
        block = bytearray(path.read_bytes()[offset : offset + BLOCK])
        block[156:157], block[257:] = b"\0", bytes(BLOCK - 257)
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        _overwrite(path, offset, bytes(block))
    assert _keys(path) == ([stem, "old"], [])


def test_a_size_in_base_256(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    whole = _keys(path)
    offset = _header_of(path, "000002.png")
    block = bytearray(path.read_bytes()[offset : offset + BLOCK])
    block[124:136] = b"\x80" + len(PAIRS[2][1]["png"]).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    _overwrite(path, offset, bytes(block))
    assert _keys(path) == whole


def test_problems_are_logged_by_name_and_summed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "0.tar", [*PAIRS[:2], ("lone", {"txt": b"x"}), ("other", {"txt": b"x"})])
    (tmp_path / "1.tar").touch()
    index_shards(str(tmp_path)).log_problems()
    said = [record.message for record in caplog.records]
    assert len(said) == 4
    assert said[0].startswith("0.tar: lone: missing image")
    assert said[2].startswith("1.tar: empty shard")
    assert said[3] == "left out of 2 shard(s): 2 missing image, 1 empty shard"


def test_numbers_find_their_shard_across_empty_ones(tmp_path: Path) -> None:
    for number, rows in enumerate([[], PAIRS[:2], [], PAIRS[2:5], PAIRS[5:]]):
        write_tar(tmp_path / f"{number}.tar", rows)
    index = index_shards(str(tmp_path))
    assert index.sizes == [0, 2, 0, 3, 1]
    found = [(index[n].shard.name, index[n].key[-1]) for n in range(len(index))]
    expected = [("1", "0"), ("1", "1"), ("3", "2"), ("3", "3"), ("3", "4"), ("4", "5")]
    assert found == [(f"{name}.tar", key) for name, key in expected]
