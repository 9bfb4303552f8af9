"""`overlap` on a small model's run: what it writes, and what it says of planted copies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from PIL import Image

from evaluating import evaluator
from fastclip.distributed.runtime import initialise, shutdown
from fastclip.eval.overlap import DuplicateSearch, OverlapAnalysis
from fastclip.eval.zero_shot import ZeroShotTask, zero_shot
from fastclip.evaluate import load_trained
from fastclip.experiments.overlap import add_overlap_verb, format_overlap, run_overlap
from fastclip.provenance import commit
from pictures import COPIES, encoded, scene
from shards import write_tar
from small_runs import write_run

COPIED, OTHERS = 6, 10


def _sample(key: str, image: bytes, label: str) -> tuple[str, dict[str, bytes]]:
    return key, {"jpg": image, "txt": b"x", "json": json.dumps({"label": label}).encode()}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    (folder / "train").mkdir()
    for shard in range(2):
        rows = [_sample(f"t{n}", encoded(scene(n)), "a") for n in range(10 * shard, 10 * shard + 8)]
        write_tar(folder / "train" / f"{shard}.tar", rows)
    copies = [_sample(f"copy{n}", COPIES["smaller"](scene(n)), "ab"[n % 2]) for n in range(COPIED)]
    others = [_sample(f"new{n}", encoded(scene(500 + n)), "ab"[n % 2]) for n in range(OTHERS)]
    for name, rows in (("some", [*others[:5], *copies, *others[5:]]), ("none", others)):
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", rows)
    classes = folder / "classes.json"
    classes.write_text(json.dumps({"label_field": "label", "classes": ["a", "b"]}))
    tasks = tuple(
        ZeroShotTask(name=name, shards=str(folder / name), classes=str(classes), templates=("{}",))
        for name in ("some", "none")
    )
    return write_run(folder / "run", train=str(folder / "train"), tasks=tasks)


@pytest.fixture(scope="module")
def analyses(run: Path) -> list[OverlapAnalysis]:
    return run_overlap(run, run.parent / "out", search=DuplicateSearch(), device="cpu")


def test_planted_copies_are_reported(run: Path, analyses: list[OverlapAnalysis]) -> None:
    assert [(one.task, one.images, one.overlapping) for one in analyses] == [
        ("some", COPIED + OTHERS, COPIED),
        ("none", OTHERS, 0),
    ]
    report = json.loads((run.parent / "out" / "overlap.json").read_text())
    some, none = report["tasks"]
    found = {pair["test"]: pair for pair in some["pairs"] if pair["duplicate"]}
    assert {key: pair["train"] for key, pair in found.items()} == {
        f"copy{n}": f"t{n}" for n in range(COPIED)
    }
    assert found["copy0"]["train_shard"].endswith("train/0.tar")
    assert all(pair["hamming"] <= 20 and pair["correlation"] > 0.97 for pair in found.values())
    assert none["p_value"] is None
    assert report["significance_level"] == 0.05
    assert report["search"]["radius"] == 20
    assert report["provenance"]["commit"] == commit()
    assert (run.parent / "out" / "overlap.txt").read_text() == f"{format_overlap(analyses)}\n"


@pytest.mark.parametrize("name", ["some", "none"])
def test_accuracy_is_that_of_the_evaluation(
    run: Path, analyses: list[OverlapAnalysis], name: str
) -> None:
    model, _ = load_trained(run)
    task = ZeroShotTask(
        name=name,
        shards=str(run.parent / name),
        classes=str(run.parent / "classes.json"),
        templates=("{}",),
    )
    runtime = initialise("cpu")
    try:
        numbers = zero_shot(
            evaluator(model, runtime, batch_size=4),
            task,
        )
    finally:
        shutdown()
    one = next(one for one in analyses if one.task == name)
    assert one.accuracy_all == numbers["top1"]


def test_pictures_and_hashes_are_left(run: Path, analyses: list[OverlapAnalysis]) -> None:
    out = run.parent / "out"
    assert Image.open(out / "overlap.png").width > 800
    assert Image.open(out / "pairs_some.png").height > 6 * 100
    assert not (out / "pairs_none.png").exists()
    assert len(list((out / "hashes").iterdir())) == 4


def test_the_table_marks_nothing_that_chance_explains(analyses: list[OverlapAnalysis]) -> None:
    lines = format_overlap(analyses).splitlines()
    assert lines[1].startswith("some")
    assert "6 (37.50%)" in lines[1]
    assert lines[2].split()[-1] == "-"
    assert "for 1 test(s)" in lines[3]


def test_the_verb_takes_its_options(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_overlap_verb(parser.add_subparsers())
    words = ["overlap", str(run), "eval.batch_size=3", "--task=some", f"--out={tmp_path}"]
    train = f"--train={run.parent / 'train' / '0.tar'}"
    options = parser.parse_args([*words, train, "--radius=31", "--correlation=0.5"])
    assert options.run(options) == 0
    assert "6 (37.50%)" in capsys.readouterr().out
    report = json.loads((tmp_path / "overlap.json").read_text())
    assert report["search"] == {
        "radius": 31,
        "correlation": 0.5,
        "cosine": -1.0,
        "candidates": 16,
    }
    options = parser.parse_args(["overlap", str(run), "--task=one", f"--out={tmp_path}"])
    with pytest.raises(ValueError, match=r"no zero-shot task 'one' in eval\.zero_shot: some, none"):
        options.run(options)
