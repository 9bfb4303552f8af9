"""Balancing: which pairs stay, whatever the shards, the processes and the interruptions."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from fastclip.data import balance as balance_module
from fastclip.data.balance import balance
from fastclip.data.curator import Curator, draw, pair_identity
from fastclip.data.rewriting import alone
from shards import picture, write_tar

Pair = tuple[str, dict[str, bytes]]
TINY = picture("red", "bar", 0, size=8)
QUERIES = ["common", "often", "rare", "two words", "never", "Mr. Nobody"]


def make_pairs(count: int = 600) -> list[Pair]:
    """Most have "common", a third "often", a few "rare"; no two images are alike."""
    pairs = []
    for number in range(count):
        text = "" if number % 7 == 0 else "a common thing"
        text += ", often" if number % 3 == 0 and number % 7 else ""
        text += " and rare" if number % 97 == 1 else ""
        text += " two words" if number % 151 == 2 else ""
        members = {"png": TINY + b"%d" % number, "txt": (text or "nothing").encode()}
        if number % 2:
            members["json"] = json.dumps({"n": number}).encode()
        pairs.append((f"{number:05d}", members))
    return pairs


def write_input(folder: Path, pairs: list[Pair], per_shard: int) -> Path:
    folder.mkdir(parents=True)
    for first in range(0, len(pairs), per_shard):
        write_tar(folder / f"{first // per_shard:03d}.tar", pairs[first : first + per_shard])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All members of all shards."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                assert member.name not in found
                found[member.name] = file.read()
    return found


def everything(folder: Path) -> dict[str, str]:
    """A hash of each file that is handed over."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_kept_is_what_was_asked_for(tmp_path: Path) -> None:
    pairs = make_pairs()
    shards = write_input(tmp_path / "in", pairs, 64)
    summary = balance(str(shards), QUERIES, tmp_path / "out", per_query=40, seed=5)

    captions = {key: members["txt"].decode() for key, members in pairs}
    words = {key: set(text.replace(",", "").split()) for key, text in captions.items()}
    counts = {
        "common": sum("common" in w for w in words.values()),
        "often": sum("often" in w for w in words.values()),
        "rare": sum("rare" in w for w in words.values()),
        "two words": sum("two" in w for w in words.values()),
        "never": 0,
        "Mr. Nobody": 0,
    }
    expected: dict[str, bytes] = {}
    for key, members in pairs:
        identity = hashlib.blake2b(members["png"] + members["txt"], digest_size=8).digest()
        for query, count in counts.items():
            found = query.split()[0] in words[key]
            if found and draw(5, query, identity) / 2**64 < 40 / max(count, 40):
                expected |= {f"{key}.{name}": part for name, part in members.items()}
                break
    assert contents(tmp_path / "out") == expected
    kept = len({name.partition(".")[0] for name in expected})
    unmatched = sum(text == "nothing" for text in captions.values())
    assert (summary.pairs, summary.kept, summary.unmatched) == (600, kept, unmatched)
    assert (summary.head, summary.tail, summary.absent) == (2, 2, 2)
    assert (summary.shards, summary.written, summary.unusable) == (10, 10, 0)

    told = json.loads((tmp_path / "out/balance.json").read_text())
    assert told["kept"] == kept
    assert told["queries_by_count"] == {"0": 2, "1 to 9": 2, "10 to 99": 0, "100 to 999": 2}
    lines = (tmp_path / "out/counts.tsv").read_text().splitlines()
    assert lines[0] == "query\tcount\tprobability"
    assert lines[1:] == [f"{q}\t{n}\t{40 / max(n, 40):.6g}" for q, n in counts.items()]


def test_the_rate_is_the_probability(tmp_path: Path) -> None:
    """Within five standard deviations, for one query and for two that decide independently."""
    count, per_query = 3000, 600
    pairs: list[Pair] = [
        (f"{n:05d}", {"png": TINY + b"%d" % n, "txt": b"one" if n % 2 else b"one two"})
        for n in range(count)
    ]
    shards = write_input(tmp_path / "in", pairs, 1000)
    for seed in (0, 1):
        out = tmp_path / f"out{seed}"
        balance(str(shards), ["one", "two"], out, per_query=per_query, seed=seed)
        kept = Counter(int(name[:5]) % 2 for name in contents(out) if name.endswith(".png"))
        both = 1 - (1 - per_query / count) * (1 - per_query / (count / 2))
        for odd, rate in ((1, per_query / count), (0, both)):
            mean, spread = count / 2 * rate, math.sqrt(count / 2 * rate * (1 - rate))
            assert abs(kept[odd] - mean) < 5 * spread
    assert contents(tmp_path / "out0").keys() != contents(tmp_path / "out1").keys()


def test_draws_are_even_and_hang_on_everything() -> None:
    draws = [draw(0, "query", b"%08d" % n) / 2**64 for n in range(4000)]
    for tenth in range(10):
        share = sum(tenth <= 10 * value < tenth + 1 for value in draws)
        assert abs(share - 400) < 5 * math.sqrt(400 * 0.9)
    identity = pair_identity(b"image", ["text"])
    others = [
        draw(0, "query", identity),
        draw(1, "query", identity),
        draw(0, "querz", identity),
        draw(0, "query", pair_identity(b"imagf", ["text"])),
        draw(0, "query", pair_identity(b"image", ["texu"])),
        draw(0, "query", pair_identity(b"image", ["te", "xt"])),
    ]
    assert len(set(others)) == len(others)


def test_shards_order_and_processes_do_not_matter(tmp_path: Path) -> None:
    pairs = make_pairs()
    kept = []
    for number, (per_shard, workers) in enumerate(((600, 1), (64, 2), (7, 1))):
        shards = write_input(tmp_path / f"in{number}", pairs, per_shard)
        out = tmp_path / f"out{number}"
        balance(str(shards), QUERIES, out, per_query=40, workers=workers)
        kept.append(contents(out))
        random.Random(number).shuffle(pairs)
    assert 40 < len(kept[0]) < 600
    assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize("passed", [0, 3, 9, 10, 13, 19])
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: int) -> None:
    """Stopped inside any shard of either pass, it ends with the same bytes."""
    shards = write_input(tmp_path / "in", make_pairs(), 64)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    summary = balance(str(shards), QUERIES, straight, per_query=40)
    calls: list[tuple[str, int]] = []
    chosen = Curator.is_chosen

    class KilledError(Exception):
        pass

    def counting(method):
        def call(self, number, *arguments):
            if armed and len(calls) == passed:
                if method.__name__ == "count":
                    raise KilledError
                monkeypatch.setattr(Curator, "is_chosen", die)
            calls.append((method.__name__, number))
            return method(self, number, *arguments)

        return call

    def die(self, *arguments):
        if chosen(self, *arguments):
            raise KilledError
        return False

    armed = True
    count, keep = Curator.count, Curator.keep
    monkeypatch.setattr(Curator, "count", counting(count))
    monkeypatch.setattr(Curator, "keep", counting(keep))
    with pytest.raises(KilledError):
        balance(str(shards), QUERIES, stopped, per_query=40)
    assert not (stopped / "balance.json").exists()
    assert len(list(stopped.glob("*.tar"))) == max(0, passed - 10)
    armed = False
    monkeypatch.setattr(Curator, "is_chosen", chosen)
    assert balance(str(shards), QUERIES, stopped, per_query=40) == summary
    assert everything(stopped) == everything(straight)
    again = [call for call, times in Counter(calls).items() if times > 1]
    assert again == ([calls[passed]] if passed >= 10 else [])  # the one that was being written


def test_what_is_complete_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_input(tmp_path / "in", make_pairs(), 64)
    out = tmp_path / "out"
    summary = balance(str(shards), QUERIES, out, per_query=40)
    before = everything(out)
    (out / "004.tar").unlink()
    (out / "005.tar").write_bytes(b"")
    done = []
    keep = Curator.keep
    monkeypatch.setattr(Curator, "count", None)
    monkeypatch.setattr(
        Curator, "keep", lambda self, n, *rest: (done.append(n), keep(self, n, *rest))[1]
    )
    assert balance(str(shards), QUERIES, out, per_query=40) == summary
    assert everything(out) == before
    assert done == [4, 5]
    monkeypatch.undo()
    monkeypatch.setattr(Curator, "__init__", None)  # not even a matcher is made
    assert balance(str(shards), QUERIES, out, per_query=40) == summary


def test_a_shard_of_which_nothing_is_kept_is_not_written(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    empty: list[Pair] = [(key, {**members, "txt": b"nothing"}) for key, members in pairs[:10]]
    shards = write_input(tmp_path / "in", empty + pairs[10:], 10)
    summary = balance(str(shards), QUERIES, tmp_path / "out")
    assert summary.written == 1
    assert [path.name for path in (tmp_path / "out").glob("*.tar*")] == ["001.tar"]
    nothing = balance(str(shards), ["absent"], tmp_path / "none")
    assert (nothing.kept, nothing.unmatched, nothing.written) == (0, 20, 0)


def test_another_job_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    pairs = make_pairs(40)
    shards = write_input(tmp_path / "in", pairs, 10)
    out = tmp_path / "out"
    balance(str(shards), QUERIES, out, per_query=5)
    before = everything(out)

    def refused(message: str, queries: list[str] = QUERIES, **changed) -> None:
        with pytest.raises(ValueError, match=message):
            balance(str(shards), queries, out, **{"per_query": 5, **changed})
        assert everything(out) == before

    refused("begun otherwise: per_query was 5, now 6", per_query=6)
    refused("seed was 0, now 9", seed=9)
    refused("queries was 6 of hash .*, now 6 of hash", QUERIES[::-1])
    write_tar(shards / "002.tar", pairs[20:29])
    refused(r"a shard was 002\.tar: \d+ bytes, 10 samples, now 002\.tar: \d+ bytes, 9 samples")
    write_tar(shards / "002.tar", pairs[20:30])
    write_tar(shards / "004.tar", pairs[:1])
    refused("shards was 4, now 5")
    (shards / "004.tar").unlink()
    balance(str(shards), QUERIES, out, per_query=5)


def test_folders_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", make_pairs(10), 10)
    with pytest.raises(ValueError, match="holds the shards to balance"):
        balance(str(shards), QUERIES, shards)
    (tmp_path / "out").mkdir()
    shutil.copy(shards / "000.tar", tmp_path / "out" / "mine.tar")
    with pytest.raises(ValueError, match="shards of something else"):
        balance(str(shards), QUERIES, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        balance(str(tmp_path / "absent"), QUERIES, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_shard_that_changed_in_between_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(30)
    shards = write_input(tmp_path / "in", pairs, 10)
    keep = Curator.keep

    def change_first(self, number, *rest):
        text = pairs[11][1]["txt"]
        pairs[11][1]["txt"] = b"x" * len(text)
        write_tar(shards / "001.tar", pairs[10:20])
        return keep(self, number, *rest)

    monkeypatch.setattr(Curator, "keep", change_first)
    with pytest.raises(ValueError, match=r"001\.tar changed after it was counted"):
        balance(str(shards), QUERIES, tmp_path / "out")
    assert not (tmp_path / "out/001.tar").exists()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_members_keep_their_names_and_bytes(tmp_path: Path) -> None:
    long = "folder/" + "k" * 150
    pairs: list[Pair] = [
        ("a", {"json": b'{"x": 1}', "JPEG": b"no image at all", "Txt": b"common"}),
        (long, {"WebP": TINY, "txt": "common größe".encode()}),
        ("größe", {"png": TINY, "txt": b"common", "mp3": b"is not copied"}),
    ]
    shards = write_input(tmp_path / "in", pairs, 10)
    balance(str(shards), ["common"], tmp_path / "out")
    del pairs[2][1]["mp3"]
    assert contents(tmp_path / "out") == {
        f"{key}.{name}": part for key, members in pairs for name, part in members.items()
    }
    assert list(contents(tmp_path / "out"))[:3] == ["a.json", "a.JPEG", "a.Txt"]
    assert (tmp_path / "out/000.tar").read_bytes()[257:265] == b"ustar  \0"  # GNU's


def test_shards_of_equal_names_get_numbers(tmp_path: Path) -> None:
    pairs = make_pairs(20)
    write_input(tmp_path / "in/a", pairs[:10], 10)
    write_input(tmp_path / "in/b", pairs[10:], 10)
    balance(f"{tmp_path}/in/a::{tmp_path}/in/b", QUERIES, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == ["000000-000.tar", "000001-000.tar"]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/x", "a/.."])
def test_names_that_lead_out_of_the_folder_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    hostile: Pair = (f"{key}/y" if key.endswith("..") else key, make_pairs(2)[1][1])
    shards = write_input(tmp_path / "in", [hostile, *make_pairs(5)], 10)
    with caplog.at_level(logging.WARNING, "fastclip"):
        summary = balance(str(shards), QUERIES, tmp_path / "out")
    assert (summary.pairs, summary.unusable, summary.kept) == (5, 1, 4)
    assert f"left out 000.tar: {hostile[0]}: unsafe name" in caplog.text
    assert not any(".." in name or name.startswith("/") for name in contents(tmp_path / "out"))


def test_captions_in_json_several_of_them(tmp_path: Path) -> None:
    texts: list[object] = [["common", "rare"], "common", ["x"], 3, ["common", "common"], [""]]
    pairs: list[Pair] = [
        (f"{n}", {"png": TINY + b"%d" % n, "json": json.dumps({"text": text}).encode()})
        for n, text in enumerate(texts)
    ]
    shards = write_input(tmp_path / "in", pairs, 4)
    summary = balance(str(shards), QUERIES, tmp_path / "out", caption_key="json:text")
    assert (summary.pairs, summary.unusable, summary.unmatched, summary.kept) == (4, 2, 1, 3)
    counts = (tmp_path / "out/counts.tsv").read_text().splitlines()
    assert counts[1] == "common\t3\t1"  # once for each pair


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", make_pairs(10), 10)

    def refused(message: str, queries: list[str] = QUERIES, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            balance(str(shards), queries, tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    refused("per_query", per_query=0)
    refused("seed", seed=-1)
    refused("seed", seed=1 << 64)
    refused("workers", workers=0)
    refused("caption_key", caption_key="json:")
    refused("there are no queries", [])
    refused("query 2 is empty", ["a", ""])


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    shards = write_input(tmp_path / "in", make_pairs(10), 10)
    first = balance(str(shards), QUERIES, tmp_path / "out")
    job = balance_module.Job(QUERIES, 20_000, 0, "txt", tmp_path / "out")
    with alone(job.work, job.out, "balancing"), pytest.raises(ValueError, match="another process"):
        balance(str(shards), QUERIES, tmp_path / "out")
    assert balance(str(shards), QUERIES, tmp_path / "out") == first


def test_queries_that_cannot_occur_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_input(tmp_path / "in", make_pairs(10), 10)
    with caplog.at_level(logging.WARNING, "fastclip"):
        balance(str(shards), QUERIES, tmp_path / "out")
    assert "1 of 6 queries can never be found" in caplog.text
