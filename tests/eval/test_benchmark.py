"""The benchmark against numbers worked out by hand; its failures, comparisons, table and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluating import evaluator
from fastclip.benchmark_run import Benchmark, evaluate_datasets
from fastclip.distributed.runtime import Runtime
from fastclip.eval import benchmark, layout
from fastclip.eval.benchmark import Protocol, Row, run_benchmark
from fastclip.eval.benchmark_table import format_rows
from fastclip.eval.datasets import paper_datasets
from fastclip.eval.layout import find_datasets
from fastclip.eval.prompts import fill
from fastclip.models.clip import Clip
from fastclip.models.interop import export_weights
from fastclip.models.presets import preset
from fastclip.tokenizer import Tokenizer
from labelled_sets import describe, write_folders, write_labelled
from ranks import run_ranks
from shards import COLOURS, SHAPES, evaluation_pixels, picture

ALONE = Runtime.alone(torch.device("cpu"))
TEMPLATES = ["{}", "a photo of something {}."]


def _model() -> Clip:
    torch.manual_seed(3)
    config = preset("ViT-Nano-8")
    vision = dataclasses.replace(config.vision, layers=1)
    text = dataclasses.replace(config.text, layers=1)
    return Clip(dataclasses.replace(config, vision=vision, text=text)).eval()


def _run(
    runtime: Runtime, root: Path, protocol: Protocol, compared: str | None = None
) -> list[Row]:
    rows = run_benchmark(
        evaluator(_model(), runtime),
        root,
        names=find_datasets(root),
        protocol=protocol,
        preset=compared,
        same_scale=compared == "ViT-B-32",
    )
    for row in rows:
        row.seconds = 0.0
        if row.linear_probe is not None:
            row.linear_probe = dataclasses.replace(row.linear_probe, seconds=0.0)
    return rows


def _write(root: Path) -> None:
    """Class folders with other numbers of images each, one file broken; and a set of shards."""
    colours = COLOURS[:3]
    for count, colour in enumerate(colours, start=2):
        write_folders(root / "colours" / "test", (colour,), images=count)
    write_folders(root / "colours" / "train", colours, images=6)
    (root / "colours" / "test" / "red" / "broken.jpg").write_bytes(b"no image")
    (root / "colours" / "test" / "red" / "notes.txt").write_text("x")
    describe(root / "colours", metric="mean_per_class", templates=TEMPLATES)
    write_labelled(
        root / "several" / "test", [{"label": ["a", "c"]}, {"label": ["b"]}, {"label": "c"}]
    )
    describe(root / "several", metric="map_11_point", classes=["a", "b", "c"])


def test_zero_shot_is_the_definition(tmp_path: Path) -> None:
    _write(tmp_path)
    colours, several = _run(ALONE, tmp_path, Protocol())
    model, tokenizer = _model(), Tokenizer(context_length=32)
    names = sorted(COLOURS[:3])
    recalls = []
    with torch.no_grad():
        weights = []
        for name in names:
            prompts = [model(tokens=tokenizer(t)).text_features for t in fill(TEMPLATES, name)]
            weights.append(F.normalize(torch.cat(prompts).mean(0), dim=0))
        for count, colour in enumerate(COLOURS[:3], start=2):
            right = 0
            for number in range(count):
                pixels = evaluation_pixels(picture(colour, SHAPES[number % 4], number % 13), 64)
                image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
                scores = torch.stack(weights) @ model(images=image).image_features[0]
                right += names[int(scores.argmax())] == colour
            recalls.append(right / count)
    assert colours.zero_shot is not None
    assert colours.zero_shot.value == pytest.approx(sum(recalls) / 3)
    assert colours.zero_shot.low <= colours.zero_shot.value <= colours.zero_shot.high
    assert (colours.images, colours.classes, colours.left_out) == (9, 3, 2)
    assert colours.top5 is None  # of three classes
    assert several.zero_shot is not None
    assert 0 < several.zero_shot.value <= 1
    assert not colours.failures
    assert not several.failures


def test_ranks_agree_with_one_process(tmp_path: Path) -> None:
    _write(tmp_path)
    alone = _run(ALONE, tmp_path, Protocol())
    for rows in run_ranks(_run, 2, tmp_path.parent, tmp_path, Protocol()):
        assert rows == alone


def test_probes_learn_what_zero_shot_does_not_know(tmp_path: Path) -> None:
    _write(tmp_path)
    protocol = Protocol(linear_probe=True, shots=(1, 2), repeats=2)
    colours, several = _run(ALONE, tmp_path, protocol)
    assert colours.train_images == 18
    assert colours.linear_probe is not None
    assert colours.linear_probe.value > 0.8
    assert colours.few_shot is not None
    assert list(colours.few_shot) == [1, 2]
    assert colours.few_shot[2].mean > 0.5
    assert several.failures == ["probes: there is no split train to fit probes to"]
    assert several.zero_shot is not None
    table = format_rows([colours, several], None)
    assert table.splitlines()[0].split()[-3:] == ["probe", "1-shot", "2-shot"]
    assert "several failed: probes: there is no split train" in table


def test_one_failure_does_not_stop_the_others(tmp_path: Path) -> None:
    _write(tmp_path)
    (tmp_path / "food101" / "test").mkdir(parents=True)
    write_labelled(tmp_path / "mnist" / "test", [{"label": "0"}, {"label": "eleven"}])
    food, mnist, colours, several = _run(ALONE, tmp_path, Protocol())
    assert "holds neither class folders" in food.failures[0]
    assert "sample 0001 has label='eleven'" in mnist.failures[0]
    assert food.zero_shot is mnist.zero_shot is None
    assert not colours.failures
    assert not several.failures


def test_comparisons_are_honest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_labelled(tmp_path / "mnist" / "test", [{"label": str(n)} for n in range(10)])
    write_labelled(tmp_path / "mnist" / "train", [{"label": n % 10} for n in range(20)])
    protocol = Protocol(linear_probe=True)
    (row,) = _run(ALONE, tmp_path, protocol, "ViT-L-14")
    assert row.paper is not None
    assert (row.paper.zero_shot, row.paper.linear_probe) == pytest.approx((0.872, 0.992))
    assert row.zero_shot_differs == (
        "data: 10 test images, the paper's 10,000",
        "scale: this model is no ViT-L-14",
    )
    assert "data: 20 training images, the paper's 60,000" in row.linear_probe_differs
    table = format_rows([row], "ViT-L-14")
    assert "≠ data, scale" in table.splitlines()[1]
    assert "mnist: data: 10 test images, the paper's 10,000" in table

    paper = dataclasses.replace(paper_datasets()["mnist"], test=10)
    monkeypatch.setattr(layout, "paper_datasets", lambda: {"mnist": paper})
    (row,) = _run(ALONE, tmp_path, protocol, "ViT-B-32")
    assert row.zero_shot_differs == ()
    assert row.linear_probe_differs == ("data: 20 training images, the paper's 60,000",)
    line = format_rows([row], "ViT-B-32").splitlines()[1]
    assert line.count("≠ data") == 1
    assert row.top5 is not None


def test_mode_and_random_numbers_are_left_alone(tmp_path: Path) -> None:
    write_labelled(tmp_path / "mnist" / "test", [{"label": n} for n in range(3)])
    model = _model().train()
    state = torch.get_rng_state()
    run_benchmark(
        evaluator(model, ALONE),
        tmp_path,
        names=["mnist"],
        protocol=Protocol(),
        preset=None,
        same_scale=False,
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluate_datasets_writes_what_it_measured(tmp_path: Path) -> None:
    root = tmp_path / "sets"
    _write(root)
    write_labelled(root / "mnist" / "test", [{"label": n} for n in range(3)])
    model = _model()
    export_weights(model, model.config, tmp_path / "model", layout="fastclip")
    protocol = Protocol(shots=(1,), repeats=2)
    found = evaluate_datasets(
        tmp_path / "model", root, only=["mnist", "colours"], protocol=protocol, device="cpu"
    )
    assert found.preset is None  # no model of the paper's has this architecture
    assert found.failed  # mnist has no split train
    assert found.is_main
    assert "2 data set(s), zero-shot " in found.table()
    assert found.table().endswith("1 failed")
    found.write_json(tmp_path / "out" / "results.json")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    mnist, colours = content["rows"]
    assert mnist["dataset"] == "mnist"
    assert mnist["failures"]
    assert not mnist["comparable"]
    assert colours["zero_shot"]["value"] == pytest.approx(_value(found, 1))
    assert set(colours["few_shot"]) == {"1"}
    assert content["protocol"]["shots"] == [1]

    compared = evaluate_datasets(
        tmp_path / "model", root, only=["mnist"], protocol=Protocol(), preset="RN50", device="cpu"
    )
    assert not compared.same_scale
    assert not compared.failed
    assert "RN50: zero-shot" in compared.table()


def test_an_interrupted_benchmark_leaves_what_it_has_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, results = tmp_path / "sets", tmp_path / "results.json"
    for name in ("a", "b", "c"):
        write_folders(root / name / "test", images=2)
        describe(root / name)
    model = _model()
    export_weights(model, model.config, tmp_path / "model", layout="fastclip")
    opened = layout.open_dataset

    def interrupted(root: Path, name: str, *rest: Any) -> Any:
        if name == "c":
            raise KeyboardInterrupt
        return opened(root, name, *rest)

    monkeypatch.setattr(benchmark, "open_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_datasets(
            tmp_path / "model", root, protocol=Protocol(), device="cpu", results=results
        )
    rows = json.loads(results.read_text())["rows"]
    assert [row["dataset"] for row in rows] == ["a", "b"]
    assert all(row["zero_shot"] for row in rows)


def _value(found: Benchmark, row: int) -> float:
    measured = found.rows[row].zero_shot
    assert measured is not None
    return measured.value


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not 'ViT-B32' \(did you mean ViT-B-32\?\)"):
        evaluate_datasets(tmp_path, tmp_path, protocol=Protocol(), preset="ViT-B32")
    with pytest.raises(FileNotFoundError, match="holds no data set"):
        evaluate_datasets(tmp_path, tmp_path, protocol=Protocol())
    describe(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint"):
        evaluate_datasets(tmp_path, tmp_path, protocol=Protocol(), device="cpu")
