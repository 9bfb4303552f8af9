"""Shards and indices that somebody else made, carelessly or not."""

from __future__ import annotations

import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from fastclip import cli
from fastclip.data.config import DataConfig
from fastclip.data.decode import BadSampleError, open_image
from fastclip.data.eval_loader import eval_batches
from fastclip.data.index import Problem, index_shards
from fastclip.data.indexing import build_index
from fastclip.data.loader import TrainLoader
from fastclip.data.plan import Mixture
from fastclip.data.shard_table import index_path, load_summary
from fastclip.distributed.runtime import Runtime
from fastclip.run import check_agreement
from fastclip.tokenizer import Tokenizer
from shards import sample, write_shards, write_tar

PAIRS = [sample(number) for number in range(6)]
TOKENIZER = Tokenizer(context_length=16)


def _add(tar: tarfile.TarFile, name: str, content: bytes, **pax: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.pax_headers = pax
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_leading_dot_does_not_part_a_sample_at_any_length(tmp_path: Path, kind: int) -> None:
    """`tar cf x.tar .` writes such names, and headers of 100 bytes end between jpeg and txt."""
    with tarfile.open(tmp_path / "a.tar", "w", format=kind) as tar:
        for length in range(85, 110):
            stem = f"./{'x' * length}"
            _add(tar, f"{stem}.jpeg", b"image")
            _add(tar, f"{stem}.txt", b"text")
    index = index_shards(str(tmp_path))
    assert [len(index[n].key) for n in range(len(index))] == list(range(85, 110))
    assert not index.problems


def test_a_size_in_a_pax_record_alone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            _add(tar, name, b"abc", **({"size": "3"} if name == "a.png" else {}))
    content = bytearray(path.read_bytes())
    at = content.index(b"a.png", content.index(b"size=3"))
    content[at + 124 : at + 136] = b"00000000000\0"
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    path.write_bytes(content)
    index = index_shards(str(path))
    assert [index[n].key for n in range(len(index))] == ["b"]
    assert [problem.kind for problem in index.problems] == ["unsupported member", "missing image"]
    build_index(str(path), workers=0)  # and it does not end the work on the others


@pytest.mark.timeout(20)
@pytest.mark.parametrize("records", [b"9" * 5000 + b" path=x\n", b"6 a=b\n" * 300_000])
def test_hostile_pax_records_cost_little(tmp_path: Path, records: bytes) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        member = tarfile.TarInfo("header")
        member.type, member.size = tarfile.XHDTYPE, len(records)
        tar.addfile(member, io.BytesIO(records))
        for name in ("a.png", "a.txt"):
            _add(tar, name, b"x")
    assert len(index_shards(str(tmp_path))) == 1


def test_a_glob_does_not_mean_the_indices(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", PAIRS)
    for _ in range(3):
        report = build_index(f"{tmp_path}/*", workers=0)
        assert (report.shards, report.samples, report.repeated_images) == (1, 6, 0)
    assert len(index_shards(f"{tmp_path}/*")) == 6


def test_shards_of_other_names_have_indices_of_their_own(tmp_path: Path) -> None:
    paths = [write_tar(tmp_path / f"part.{n}", [PAIRS[n], PAIRS[n + 2]]) for n in range(2)]
    build_index(f"{tmp_path}/part.?", workers=0)
    assert [index_path(path).name for path in paths] == ["part.0.fcidx", "part.1.fcidx"]
    index = index_shards(f"{tmp_path}/part.?")
    assert [index[n].key for n in range(4)] == ["000000", "000002", "000001", "000003"]
    index_path(paths[0]).rename(index_path(paths[1]))
    assert load_summary(paths[1]) is None  # it is the other's


def _broken(path: Path, change: Any) -> None:
    """Let `change` at the index's entry and columns."""
    file = index_path(path)
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    entry = json.loads(header["__metadata__"]["fastclip_index"])
    columns = load_file(file)
    entry = change(entry, columns) or entry
    save_file(columns, file, metadata={"fastclip_index": json.dumps(entry)})


CHANGES: list[Any] = [
    lambda e, c: [1],
    lambda e, c: "x",
    lambda e, c: e.update(usable=[]),
    lambda e, c: e.update(usable={}),
    lambda e, c: e.update(usable=dict.fromkeys(e["usable"], "3")),
    lambda e, c: e.update(usable=dict.fromkeys(e["usable"], 10**30)),
    lambda e, c: e.update(samples="6"),
    lambda e, c: e.update(problems=[{"a": 1}]),
    lambda e, c: c.update(places=c["places"].astype(float)),
    lambda e, c: c.update(places=c["places"][:3]),
    lambda e, c: c["places"].__setitem__((2, 0), -9),
    lambda e, c: c["places"].__setitem__((2, 1), -9),
    lambda e, c: c.update(key_ends=c["key_ends"][::-1].copy()),
    lambda e, c: c["key_ends"].__setitem__(1, 1 << 40),
    lambda e, c: c.update(key_ends=c["key_ends"].astype(np.float64)),
    lambda e, c: c.update(extensions=np.full(6, 200, np.uint8)),
    lambda e, c: c.update(extensions=c["extensions"][:, None].copy()),
    lambda e, c: c.update(flags=c["flags"][:2].copy()),
    lambda e, c: c.__delitem__("keys"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_lies_is_one_clear_error(tmp_path: Path, change: Any) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    build_index(str(path), workers=0)

    def changed(entry: dict[str, Any], columns: dict[str, Any]) -> object:
        found = change(entry, columns)
        return found if isinstance(found, (list, str)) else None

    _broken(path, changed)
    with pytest.raises(ValueError, match=r"a\.fcidx (is no index|cannot be read).*make it anew"):
        index_shards(str(path))[0]
    assert build_index(str(path), workers=0, anew=True).samples == 6


def test_an_index_that_vanishes_during_a_run_is_walked_for(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 24, 8)
    build_index(str(shards), workers=0)
    index = index_shards(str(shards))
    for path in shards.glob("*.fcidx"):
        path.unlink()
    assert [index[n].key for n in range(24)] == [f"{n:06d}" for n in range(24)]


def _loader(train: str, batch_size: int, **options: Any) -> TrainLoader:
    return TrainLoader(
        DataConfig(train=train, **options),
        image_size=16,
        tokenizer=TOKENIZER,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        seed=0,
    )


def test_a_shard_that_vanishes_with_its_index_costs_its_samples_alone(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 40, 10)
    build_index(str(shards), workers=0)
    with _loader(str(shards), 4, max_bad_fraction=1.0) as loader:
        for suffix in ("tar", "fcidx"):
            (shards / f"00002.{suffix}").unlink()
        keys = Counter(key for _ in range(20) for key in next(loader).keys)
        assert loader.report() == {"unreadable": 10}
    assert not {f"{n:06d}" for n in range(20, 30)} & set(keys)


def test_sources_too_small_for_their_weight_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [(f"a{n:03d}", sample(n)[1]) for n in range(40)])
    write_tar(tmp_path / "b.tar", [(f"b{n:03d}", sample(n)[1]) for n in range(4)])
    train = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    with pytest.raises(ValueError, match=r"b\.tar has 4 usable pairs.*up to 17 are its"):
        _loader(train, 32, weights=(1, 1))
    with _loader(train, 32, weights=(16, 1)) as loader:
        for _ in range(20):
            assert max(Counter(next(loader).keys).values()) <= 2  # where an epoch ends


def test_replacements_come_from_the_same_source(tmp_path: Path) -> None:
    rows = [(f"b{n:03d}", sample(n)[1]) for n in range(20)]
    for _, members in rows[:10]:
        members["png"] = b"broken"
    write_tar(tmp_path / "a.tar", [(f"a{n:03d}", sample(n)[1]) for n in range(40)])
    write_tar(tmp_path / "b.tar", rows)
    train = f"{tmp_path}/a.tar::{tmp_path}/b.tar"
    with _loader(train, 8, weights=(3, 1), max_bad_fraction=1.0) as loader:
        for _ in range(20):
            assert Counter(key[0] for key in next(loader).keys) == {"a": 6, "b": 2}


def test_large_weights_are_reduced_or_refused() -> None:
    small, large = (Mixture([[50], [9]], w, seed=1) for w in ((3, 1), (3_000_000, 1_000_000)))
    assert [small(n) for n in range(100)] == [large(n) for n in range(100)]
    with pytest.raises(ValueError, match=r"add up to more than 10,000"):
        Mixture([[50], [9]], (30_000_000, 1), seed=1)


def test_ranks_that_see_other_data_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime.__new__(Runtime)
    object.__setattr__(runtime, "rank", 0)
    object.__setattr__(runtime, "device", None)
    seen: list[list[int]] = []

    def gather(own: list[int], device: object) -> list[list[int]]:
        del device
        return [own, *seen]

    monkeypatch.setattr("fastclip.run.all_gather_integers", gather)
    seen[:] = [[0x01234567, 0x89ABCDEF, 128]]
    check_agreement("0123456789abcdef", 128, runtime)
    seen[:] = [[0x01234567, 0x89ABCDE0, 200]]
    with pytest.raises(ValueError, match=r"rank 1 finds other data than rank 0 \(200 and 128"):
        check_agreement("0123456789abcdef", 128, runtime)


def test_evaluation_turns_images_as_training_does(tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:20] = 255
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(out, "JPEG", quality=95, exif=exif.tobytes())
    rows = [("a", {"jpg": out.getvalue(), "txt": b"x"})]
    index = index_shards(str(write_tar(tmp_path / "a.tar", rows)))
    common = {"image_size": 8, "batch_size": 1}
    for turned in (False, True):
        (batch,) = eval_batches(index, **common, apply_orientation=turned)
        image = batch.images[0, 0].float()
        above, right = (
            image[:4].mean() - image[4:].mean(),
            image[:, 4:].mean() - image[:, :4].mean(),
        )
        assert (above > 200) != turned
        assert (right > 200) == turned


def test_only_the_formats_of_shards_are_opened() -> None:
    encapsulated = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(BadSampleError, match="not an image"):
        open_image(encapsulated)


def test_small_things() -> None:
    error = pickle.loads(pickle.dumps(BadSampleError("kind", "reason")))
    assert (error.kind, error.reason) == ("kind", "reason")
    assert "\n" not in str(Problem("a.tar", "x\nfastclip: error: fake", "kind", "reason"))
    with pytest.raises(ValueError, match="from 1 to 178956970"):
        DataConfig(train="a", max_pixels=10**9)
    with pytest.raises(ValueError, match=r"in \[0\.0001, 1\]"):
        DataConfig(train="a", crop_scale=(1e-16, 1.0))


@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "DIR", "--workers", "-3"],
        ["index", "DIR", "--max-pixels", "0"],
        ["queries", "--corpus", "DIR/a.tar", "--out", "DIR/q", "--pmi", "nan"],
        ["queries", "--corpus", "DIR/a.tar", "--out", "DIR/q", "--pmi", "1e6"],
        ["queries", "--corpus", "DIR/a.tar", "--out", "DIR/q", "--caption-key", "foo"],
    ],
)
def test_numbers_that_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    write_tar(tmp_path / "a.tar", PAIRS)
    given = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
    assert cli.main(["data", *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fastclip: error: ")
    assert "Traceback" not in error


def test_the_limit_of_pixels_is_this_calls(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", PAIRS)
    for limit, oversized in ((10_000, 0), (100, 6), (10_000, 0)):
        report = build_index(str(path), max_pixels=limit, workers=0)
        assert sum(p.kind == "oversized image" for p in report.problems) == oversized


@pytest.mark.timeout(120)
def test_an_interrupt_is_one_line(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 60, 1)
    for shard in list(shards.glob("*.tar")):
        for copy in range(40):
            (shards / f"{shard.stem}-{copy}.tar").write_bytes(shard.read_bytes())
    # A shell's background jobs ignore interrupts, and so would what they start.
    script = (
        "import signal, sys; from fastclip import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    words = ["data", "index", str(shards), "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *words], stderr=subprocess.PIPE, text=True
    )
    while not any(shards.glob("*.fcidx")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == "fastclip: interrupted; what was finished is kept"
