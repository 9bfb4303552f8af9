"""Resharding: the same pairs in fewer bytes, and none lost unsaid."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastclip.data.config import DataConfig
from fastclip.data.index import index_shards
from fastclip.data.loader import TrainLoader
from fastclip.data.reshard import reshard
from fastclip.data.reshard_plan import repetitions
from fastclip.data.resharder import Job, unique_keys
from fastclip.data.shard_table import index_path
from fastclip.tokenizer import Tokenizer
from resharding import PAIRS, Pair, contents, dropped, encoded, keys, opened, scene, write_input
from shards import sample


def test_samples_are_grouped_anew_and_small_images_copied(tmp_path: Path) -> None:
    pairs: list[Pair] = [*PAIRS, ("extra", {**PAIRS[0][1], "mp3": b"is not copied"})]
    summary = reshard(
        str(write_input(tmp_path / "in", pairs)), tmp_path / "out", short=40, samples_per_shard=16
    )
    shards = contents(tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").glob("*.tar"))] == [
        "00000.tar", "00001.tar", "00002.tar",
    ]  # fmt: skip
    flat = [member for shard in shards for member in shard]
    expected = [
        f"{key}.{name}" for key, members in pairs for name in ("jpg", "txt", "json")
        if name in members
    ]  # fmt: skip
    assert [name for name, _ in flat] == expected
    assert len({name.partition(".")[0] for name, _ in shards[0]}) == 16
    given = {f"{key}.{name}": part for key, members in pairs for name, part in members.items()}
    for name, content in flat:
        if not name.endswith(".jpg") or min(opened(given[name]).size) <= 40:
            assert content == given[name]
        else:
            assert min(opened(content).size) == 40
    assert (summary.samples, summary.written, summary.shards_written) == (41, 41, 3)
    assert (summary.copied, summary.shrunk, summary.renamed, summary.dropped) == (15, 26, 0, {})
    assert summary.image_bytes_before == sum(len(members["jpg"]) for _, members in pairs)
    assert summary.image_bytes_after == sum(len(c) for name, c in flat if name.endswith(".jpg"))
    told = json.loads((tmp_path / "out/reshard.json").read_text())
    assert (told["written"], told["arguments"]["short"]) == (41, 40)
    assert (tmp_path / "out/00000.tar").read_bytes()[257:265] == b"ustar  \0"  # GNU's
    for suffix in (".idx", ".fcidx"):
        assert len(list((tmp_path / "out").glob(f"*{suffix}"))) == 3
    assert index_shards(str(tmp_path / "out")).sizes == [16, 16, 9]


def test_repetitions_are_left_out(tmp_path: Path) -> None:
    a, b = PAIRS[0][1]["jpg"], PAIRS[1][1]["jpg"]
    pairs: list[Pair] = [
        ("no", {"jpg": a}),  # what cannot be used hides nothing
        ("a", {"jpg": a, "txt": b"one"}),
        ("b", {"jpg": b, "txt": b"one"}),
        ("c", {"jpg": a, "txt": b"two"}),
        ("d", {"jpg": b, "txt": b"one", "json": b"{}"}),
        ("e", {"jpg": a, "txt": b"one"}),
    ]
    shards = str(write_input(tmp_path / "in", pairs, 2))
    kept = {"none": "abcde", "images": "ab", "pairs": "abc"}
    for dedup, expected in kept.items():
        out = tmp_path / dedup
        summary = reshard(shards, out, short=30, dedup=dedup)  # type: ignore[arg-type]
        assert "".join(keys(out)) == expected
        repeated = {f"repeated {dedup[:-1]}": 5 - len(expected)} if dedup != "none" else {}
        assert summary.dropped == {"missing caption": 1} | repeated
        assert "".join(key for key, _ in dropped(out)[1:]) == "abcde".translate(
            {ord(key): None for key in expected}
        )


def test_equal_hashes_of_other_sizes_are_others() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 40, 3000, dtype=np.uint64) + np.uint64(2**63)
    sizes = rng.integers(0, 3, 3000).astype(np.uint32)
    seen: set[tuple[int, int]] = set()
    for value, size, again in zip(hashes, sizes, repetitions(hashes, sizes), strict=True):
        assert again == ((int(value), int(size)) in seen)
        seen.add((int(value), int(size)))
    assert len(repetitions(hashes[:0], sizes[:0])) == 0
    assert not repetitions(hashes[:1], sizes[:1]).any()


def test_every_sample_is_written_or_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = dict(PAIRS[1][1])
    whole = good["jpg"]
    cut = whole[: len(whole) // 2]
    large = encoded(scene(200, 150))
    pairs: list[Pair] = [
        *PAIRS[:5],
        ("cut", {**good, "jpg": cut}),
        ("html", {**good, "jpg": b"<html>"}),
        ("untold", {"jpg": whole, "json": b"{}"}),
        ("blank", {**good, "txt": b" \n"}),
        ("latin", {**good, "txt": b"\xff\xfe"}),
        ("large", {**good, "jpg": large}),
        ("text", {"txt": b"is no sample"}),
        *PAIRS[5:9],
    ]
    shards = write_input(tmp_path / "in", pairs, 6)
    with caplog.at_level(logging.WARNING, "fastclip"):
        summary = reshard(
            str(shards), tmp_path / "out", short=30, samples_per_shard=4, max_pixels=29_999
        )
    expected = [
        ("cut", "broken image"), ("html", "broken image"), ("untold", "missing caption"),
        ("blank", "missing caption"), ("latin", "broken caption"), ("large", "oversized image"),
    ]  # fmt: skip
    assert dropped(tmp_path / "out") == expected
    assert summary.dropped == dict(Counter(kind for _, kind in expected))
    assert (summary.samples, summary.written) == (15, 9)
    # The one found broken when it was decoded leaves its shard smaller and moves no other.
    assert index_shards(str(tmp_path / "out")).sizes == [4, 3, 2]
    assert "text: missing image" in caplog.text
    assert "left out 2 missing caption" not in caplog.text
    assert "1 broken caption, 2 broken image, 2 missing caption, 1 oversized" in caplog.text
    line = json.loads((tmp_path / "out/dropped.jsonl").read_text().splitlines()[0])
    assert line["shard"] == str(shards / "in000.tar")
    offset = line["offset"]
    assert Path(line["shard"]).read_bytes()[offset : offset + len(cut)] == cut

    untold = reshard(str(shards), tmp_path / "images", short=30, needs=())
    assert untold.dropped == {"broken image": 2}
    both = reshard(str(shards), tmp_path / "both", short=30, needs=("json", "txt"))
    assert both.dropped["missing metadata"] == 5
    copied = reshard(str(shards), tmp_path / "copied", short=0)
    assert "cut" in keys(tmp_path / "copied")
    assert (copied.shrunk, copied.written) == (0, copied.copied)
    flat = dict(member for shard in contents(tmp_path / "copied") for member in shard)
    assert all(flat[f"{key}.jpg"] == dict(pairs)[key]["jpg"] for key in keys(tmp_path / "copied"))


def test_a_shard_of_which_nothing_can_be_used_is_not_written(tmp_path: Path) -> None:
    broken = PAIRS[1][1]["jpg"][:700]
    pairs: list[Pair] = [(k, {**m, "jpg": broken} if n < 4 else m) for n, (k, m) in
                         enumerate(PAIRS[:6])]  # fmt: skip
    shards = write_input(tmp_path / "in", pairs)
    summary = reshard(str(shards), tmp_path / "out", short=30, samples_per_shard=4)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["00001.tar"]
    assert (summary.written, summary.shards_written) == (2, 1)
    nothing = write_input(tmp_path / "nothing", pairs[:4])
    assert reshard(str(nothing), tmp_path / "none", short=30).dropped == {"broken image": 4}
    assert len(dropped(tmp_path / "none")) == 4
    with pytest.raises(ValueError, match="none of 4 samples can be used"):
        reshard(str(nothing), tmp_path / "new", needs=("json",), max_pixels=1)
    assert not (tmp_path / "new").exists()


def test_shuffling_is_a_permutation(tmp_path: Path) -> None:
    shards = str(write_input(tmp_path / "in", PAIRS))
    for name, seed in (("a", 7), ("b", 7), ("c", 8), ("d", None)):
        reshard(shards, tmp_path / name, short=0, samples_per_shard=11, shuffle=seed)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    assert a == b
    assert a != c != d != a
    assert keys(tmp_path / "d") == [key for key, _ in PAIRS]
    flat = [sorted(member for shard in shards for member in shard) for shards in (a, c, d)]
    assert flat[0] == flat[1] == flat[2]
    for shard in a:  # members of a sample lie together, the image first
        names = [name.partition(".") for name, _ in shard]
        assert [kind for _, _, kind in names if kind == "jpg"] == ["jpg"] * len(
            {key for key, _, _ in names}
        )
        starts = [key for key, _, kind in names if kind == "jpg"]
        assert list(dict.fromkeys(key for key, _, _ in names)) == starts


def test_equal_keys_get_suffixes_where_they_meet(tmp_path: Path) -> None:
    assert unique_keys(["a", "a", "a-2", "a", "b", "a-2"]) == [
        "a", "a-3", "a-2", "a-4", "b", "a-2-2",
    ]  # fmt: skip
    assert len(set(unique_keys(["x"] * 20_000 + ["x-5", "x-7"]))) == 20_002
    first = write_input(tmp_path / "one", [("k", PAIRS[0][1]), ("l", PAIRS[1][1])])
    second = write_input(tmp_path / "two", [("m", PAIRS[2][1]), ("k", PAIRS[3][1])])
    pattern = f"{first}::{second}"
    summary = reshard(pattern, tmp_path / "out", short=0)
    assert keys(tmp_path / "out") == ["k", "l", "m", "k-2"]
    assert dict(contents(tmp_path / "out")[0])["k-2.jpg"] == PAIRS[3][1]["jpg"]
    assert (summary.written, summary.renamed) == (4, 1)
    apart = reshard(pattern, tmp_path / "apart", short=0, samples_per_shard=2)
    assert (keys(tmp_path / "apart"), apart.renamed) == (["k", "l", "m"], 0)


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x"])
def test_names_that_lead_out_of_the_folder_are_left_out(tmp_path: Path, key: str) -> None:
    pairs: list[Pair] = [(key, PAIRS[0][1]), ("a..b/c", PAIRS[1][1]), ("größe", PAIRS[2][1])]
    summary = reshard(str(write_input(tmp_path / "in", pairs)), tmp_path / "out", short=30)
    assert summary.dropped == {"unsafe name": 1}
    assert dropped(tmp_path / "out") == [(key, "unsafe name")]
    assert [name for name, _ in contents(tmp_path / "out")[0]] == [
        "a..b/c.jpg", "a..b/c.txt", "a..b/c.json", "größe.jpg", "größe.txt",
    ]  # fmt: skip


def test_long_and_broken_names_survive(tmp_path: Path) -> None:
    names = ["folder/" + "k" * 150, b"caf\xe9".decode("utf-8", "surrogateescape")]
    pairs: list[Pair] = [(name, PAIRS[n][1]) for n, name in enumerate(names)]
    reshard(str(write_input(tmp_path / "in", pairs)), tmp_path / "out", short=30)
    assert keys(tmp_path / "out") == names


def test_names_sort_as_the_shards_do(tmp_path: Path) -> None:
    few, many = (
        Job([], np.zeros(1, np.int64), count, tmp_path, 256, 90, 10, False, 1)
        for count in (1_000_000, 1_000_001)
    )
    assert (few.count, few.name(0), few.name(99_999)) == (100_000, "00000.tar", "99999.tar")
    assert (many.count, many.name(0), many.name(100_000)) == (100_001, "000000.tar", "100000.tar")


def test_training_reads_what_was_written(tmp_path: Path) -> None:
    pairs = [sample(number) for number in range(24)]
    shards = write_input(tmp_path / "in", pairs)
    reshard(str(shards), tmp_path / "out", short=48, samples_per_shard=10, shuffle=0)
    assert index_path(tmp_path / "out/00000.tar").is_file()
    pixels: dict[str, dict[str, np.ndarray]] = {}
    for folder in (shards, tmp_path / "out"):
        with TrainLoader(
            DataConfig(train=str(folder)), image_size=24, tokenizer=Tokenizer(context_length=32),
            batch_size=8, rank=0, world_size=1, seed=0,
        ) as loader:  # fmt: skip
            batches = [next(loader) for _ in range(3)]
        found = pixels[folder.name] = {}
        for batch in batches:
            found.update(zip(batch.keys, batch.images.numpy().astype(int), strict=True))
            for key, caption in zip(batch.keys, batch.captions, strict=True):
                assert caption.encode() == dict(pairs)[key]["txt"]
    assert pixels["in"].keys() == pixels["out"].keys() == dict(pairs).keys()
    distances = [np.abs(pixels["in"][key] - pixels["out"][key]).mean() for key, _ in pairs]
    assert max(distances) < 6
