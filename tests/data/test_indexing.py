"""The index beside the shards: what it says, when it is believed, and what it costs."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastclip import cli
from fastclip.data import index as index_module
from fastclip.data.index import index_shards
from fastclip.data.indexing import build_index, format_report
from fastclip.data.reader import Members
from fastclip.data.shard_table import (
    index_path,
    load_summary,
    load_table,
    save_table,
    scan_shard,
)
from shards import sample, write_shards, write_tar

PAIRS = [sample(number) for number in range(6)]


def _jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "red").save(out, "JPEG", exif=exif.tobytes())
    return out.getvalue()


def _varied() -> list[tuple[str, dict[str, bytes]]]:
    whole = _jpeg(40, 30)
    return [
        ("a", {"jpg": whole, "txt": b"one"}),
        ("b", {"jpg": whole, "txt": b"one", "json": b"{}"}),
        ("c", {"jpg": whole, "txt": b"other"}),
        ("d", {"jpg": _jpeg(50, 20, 6), "txt": b" \n"}),
        ("e", {"jpg": whole[:-30], "txt": b"\xff\xfe"}),
        ("f", {"png": b"<html>", "txt": b"x"}),
        ("g", {"png": PAIRS[0][1]["png"]}),
        ("h", {"txt": b"no image"}),
        ("dir/k l", {"PNG": PAIRS[1][1]["png"], "txt": "größe".encode()}),
    ]


def test_the_index_says_what_the_walk_says(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 40, 16)
    write_tar(shards / "varied.tar", _varied())
    for needs in (("txt",), ("json", "txt"), ("json",), ()):
        for path in shards.glob("*.fcidx"):
            path.unlink()
        walked = index_shards(str(shards), needs=needs)
        build_index(str(shards), workers=0)
        read = index_shards(str(shards), needs=needs)
        assert all(shard.scanned is None for shard in read._shards)
        assert read.hash == walked.hash
        assert read.sizes == walked.sizes
        assert [read[n] for n in range(len(read))] == [walked[n] for n in range(len(walked))]
        assert read.problems == walked.problems


def test_what_the_report_tells(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _varied())
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % 512)
    path.write_bytes(content + b"\xa5" * 2048 + bytes(1024))
    report = build_index(str(path), max_pixels=1100, workers=0)
    assert report.samples == 8
    assert report.usable == {"": 8, "txt": 7, "json": 1, "json+txt": 1}
    assert report.codecs == {"jpeg": 5, "png": 2, "none": 1}
    assert report.turned == 1
    assert report.short_sides == (20, 30, 72)
    assert report.repeated_images == 2
    assert report.repeated_pairs == 1
    assert report.lost_bytes == 2048 + 1024
    assert sorted((p.key, p.kind) for p in report.problems if p.key) == [
        ("a", "oversized image"), ("b", "oversized image"), ("c", "oversized image"),
        ("d", "missing caption"), ("dir/k l", "oversized image"), ("e", "broken caption"),
        ("e", "oversized image"), ("e", "truncated image"), ("f", "broken image"),
        ("g", "oversized image"), ("h", "missing image"),
    ]  # fmt: skip
    text = format_report(report, most=1)
    assert "a.tar: a: oversized image" in text
    assert "… and 5 more" in text
    assert "bytes lost to damaged headers or cut shards: 3,072" in text


def test_columns_are_of_the_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", _varied())
    build_index(str(path), workers=0)
    table = load_table(path)
    assert table.keys == ["a", "b", "c", "d", "e", "f", "g", "dir/k l"]
    assert table.columns["widths"].tolist() == [40, 40, 40, 50, 40, 0, 72, 72]
    assert table.columns["orientations"].tolist() == [1, 1, 1, 6, 1, 1, 1, 1]
    assert table.columns["flags"].tolist() == [0, 0, 0, 8, 4 | 16, 1, 0, 0]
    index = index_shards(str(path))
    assert [index[n].extension for n in (0, 5, 6)] == ["jpg", "png", "png"]


def test_dali_reads_its_index(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    path = write_tar(tmp_path / "a.tar", [PAIRS[0], *_varied(), *PAIRS[1:]])
    _damage(path, "000003.txt")
    build_index(str(path), workers=0)
    samples = 1 + 8 + 5

    functions: Any = fn  # their stubs know too little
    kinds: Any = types
    pipeline: Any = Pipeline(batch_size=samples, num_threads=1, device_id=None)
    with pipeline:
        members = functions.readers.webdataset(
            paths=[str(path)],
            index_paths=[str(path.with_suffix(".idx"))],
            ext=["jpg;png", "txt"],
            dtypes=[kinds.UINT8, kinds.UINT8],
            missing_component_behavior="empty",
        )
        pipeline.set_outputs(*members)
    images, captions = pipeline.run()
    index = index_shards(str(path), needs=())
    assert len(index) == samples
    for number in range(samples):
        sample_ = Members(index[number])
        assert np.array(images[number]).tobytes() == sample_.image
        assert np.array(captions[number]).tobytes() == sample_._caption


def _damage(path: Path, member: str) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(member.encode())
    content[at : at + 512] = bytes(512)
    path.write_bytes(content)


def test_an_index_is_made_once_and_anew_when_the_shard_changes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    build_index(str(path), workers=0)
    made = index_path(path).stat().st_mtime_ns
    build_index(str(path), workers=0)
    assert index_path(path).stat().st_mtime_ns == made
    build_index(str(path), workers=0, anew=True)
    assert index_path(path).stat().st_mtime_ns != made
    write_tar(path, PAIRS[:4])
    assert build_index(str(path), workers=0).samples == 4
    path.with_suffix(".idx").unlink()
    build_index(str(path), workers=0)
    assert path.with_suffix(".idx").is_file()
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    left = [tmp_path / f".a{suffix}.123.partial" for suffix in (".fcidx", ".idx")]
    busy, other = tmp_path / ".a.fcidx.124.partial", tmp_path / ".ab.txt.123.partial"
    for file in (*left, busy, other):
        file.write_bytes(b"begun")
    for file in (*left, other):
        os.utime(file, (0, 0))
    build_index(str(path), workers=0)
    assert sorted(tmp_path.glob(".*")) == sorted([busy, other])


def test_an_index_of_another_shard_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    build_index(str(path), workers=0)
    write_tar(path, [sample(number) for number in range(40)])
    index = index_shards(str(path))
    assert len(index) == 40
    index.log_problems()
    assert "1 index file(s) are of other shards than lie there now" in caplog.text
    copied = shutil.copy(path, tmp_path / "b.tar")  # a copy has other times and is the same
    build_index(str(copied), workers=0)
    os.utime(copied, ns=(0, 0))
    assert index_shards(str(copied))._shards[0].scanned is None


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, b"\x10" + bytes(7) + b'{"a": "b"}      ', bytes(100)]
)
def test_what_is_no_index(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    index_path(path).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.fcidx is no index of fastclip .*make it anew"):
        index_shards(str(path))
    assert build_index(str(path), workers=0).samples == 6  # as the message says


def test_a_cut_index_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    build_index(str(path), workers=0)
    whole = index_path(path).read_bytes()
    index_path(path).write_bytes(whole[:-20])
    with pytest.raises(ValueError, match=r"a\.fcidx is no index .*it is cut off.*make it anew"):
        index_shards(str(path))
    assert build_index(str(path), workers=0).samples == 6
    assert len(index_shards(str(path))) == 6


def test_an_index_of_another_version_is_passed_over(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    build_index(str(path), workers=0)
    content = index_path(path).read_bytes()
    index_path(path).write_bytes(content.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    assert load_summary(path) is None
    assert len(index_shards(str(path))) == 6


def test_tables_are_read_when_needed_and_not_all_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path, 60, 6)
    build_index(str(shards), workers=0)
    monkeypatch.setattr(index_module, "_TABLES_KEPT", 3)
    index = index_shards(str(shards))
    assert not index._tables
    expected = [f"{n:06d}" for n in range(60)]
    assert [index[n].key for n in range(60)] == expected
    assert [index[n].key for n in range(59, -1, -1)] == expected[::-1]
    assert len(index._tables) == 3


@pytest.mark.timeout(120)
def test_ten_thousand_shards_are_known_without_reading_them(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", PAIRS[:2])
    summary, table = scan_shard(path)
    save_table(path, summary, table)
    for number in range(1, 10_000):
        shard = tmp_path / f"{number:05d}.tar"
        os.link(path, shard)
        save_table(shard, summary, table)
    begin = time.perf_counter()
    index = index_shards(str(tmp_path))
    first = Members(index[12_345]).image
    print(f"10,000 shards known in {time.perf_counter() - begin:.2f} s")
    assert len(index) == 20_000
    assert all(shard.scanned is None for shard in index._shards)
    assert first == PAIRS[1][1]["png"]
    assert len(index._tables) == 1


def test_several_processes_give_the_same(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 40, 8)
    alone = build_index(str(shards), workers=0)
    first = [path.read_bytes() for path in sorted(shards.glob("*.fcidx"))]
    assert build_index(str(shards), workers=2, anew=True) == alone
    assert [path.read_bytes() for path in sorted(shards.glob("*.fcidx"))] == first


def test_a_size_that_hides_the_rest_costs_its_own_sample(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    content = bytearray(path.read_bytes())
    at = content.index(b"000002.txt")
    content[at + 124 : at + 136] = b"77777777777\0"  # 8 GiB
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    index = index_shards(str(path))
    assert [index[n].key for n in range(len(index))] == [k for k, _ in PAIRS if k != "000002"]
    assert index.problems[0].kind == "damaged header"
    assert "000002.txt is said to have 8589934591 bytes" in index.problems[0].reason


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "a.tar", _varied())
    report = tmp_path / "report.json"
    assert (
        cli.main(["data", "index", str(tmp_path), "--workers", "0", "--report", str(report)]) == 0
    )
    assert "1 shards, 0.00 GB, 8 images" in capsys.readouterr().out
    assert json.loads(report.read_text())["usable"]["txt"] == 7
    assert cli.main(["data", "index", str(tmp_path / "none")]) == 1
    assert "no file matches" in capsys.readouterr().err
