"""What one does with a run: evaluate, draw, export, start another one from its weights."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastclip.evaluate import evaluate, load_trained
from fastclip.run_report import write_report
from fastclip.tokenizer import Tokenizer
from peers import CLIPModel
from shards import write_shards


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def _fastclip(*arguments: str, ranks: int = 1) -> str:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [*launch, "fastclip", *arguments]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_shards(folder)
    return folder


@pytest.mark.parametrize("change", ["model.vision.image_size=32", "run.steps=3", "optim=1"])
def test_a_trained_model_is_not_changed_by_overrides(run: Path, change: str) -> None:
    for verb in (evaluate, lambda path, overrides: write_report(path, None, overrides)):
        with pytest.raises(ValueError, match=f"{change}: a trained model is evaluated as it was"):
            verb(run, [change])


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, sharded parameters, evaluated twice on the way."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    task = {
        "name": "shapes",
        "shards": str(data / "shards"),
        "classes": str(data / "classes.json"),
        "templates": ["a {}", "{}"],
    }
    pairs = {"name": "pairs", "shards": str(data / "shards")}
    _fastclip(
        "train",
        "smoke",
        f"--data={data / 'shards'}",
        f"run.directory={folder}",
        f"eval.zero_shot={json.dumps([task])}",
        f"eval.retrieval={json.dumps([pairs])}",
        "eval.batch_size=7",
        "engine.zero_stage=3",
        "model.vision.layers=1",
        "model.text.layers=1",
        "optim.warmup_steps=2",
        "run.steps=12",
        "run.global_batch_size=24",
        "run.evaluate_every_steps=6",
        "run.device=cpu",
        ranks=2,
    )
    return folder


def _evaluations(run: Path) -> dict[int, dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        for row in rows
        if any(key.startswith("eval/") for key in row)
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_evaluating_afterwards_gives_the_loops_numbers(
    run: Path, tmp_path: Path, ranks: int
) -> None:
    in_loop = _evaluations(run)
    assert list(in_loop) == [6, 12]
    assert in_loop[12]["zero_shot/shapes/images"] == 48
    printed = _fastclip(
        "eval", str(run), "eval.batch_size=10", "--device=cpu",
        f"--json={tmp_path / 'numbers.json'}", ranks=ranks,
    )  # fmt: skip
    assert json.loads((tmp_path / "numbers.json").read_text()) == pytest.approx(in_loop[12])
    assert printed.count("zero-shot") == 1  # rank 0 alone speaks
    assert "4.17%" in printed  # chance among 24


def test_pictures_are_drawn(run: Path) -> None:
    printed = _fastclip("show", str(run))
    for name in ("learning_curve.png", "contact_sheet_shapes.png"):
        assert name in printed
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_the_report_is_one_file(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "some" / "report.html"
    assert str(out) in _fastclip("report", str(run), f"--out={out}", "--device=cpu")
    page = out.read_text()
    numbers = _evaluations(run)[12]
    for figure in (
        f"{numbers['zero_shot/shapes/top1']:.2%}",
        f"{numbers['retrieval/pairs/image_to_text_r5']:.2%}",
        f"{numbers['retrieval/pairs/text_to_image_r1']:.2%}",
        "<td>48</td>",  # images
        torch.__version__,
        "12 steps of 24 pairs on 2 rank(s)",
        "&#34;zero_stage&#34;: 3",
    ):
        assert figure in page
    assert page.count("<svg") >= 9  # four of training, three of evaluations, two or more of speed
    sources = re.findall(r"(?:src|href)=[\"']([^\"']*)", page)
    assert len(sources) > 20
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"https?:|@import|url\((?!#)", page)


def test_events_and_config_lie_beside_the_run(run: Path) -> None:
    assert list((run / "tensorboard").iterdir())
    config = json.loads((run / "config.json").read_text())
    assert config["engine"]["zero_stage"] == 3
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-00000012"


def test_exported_weights_load_in_transformers(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _fastclip("export", str(run), str(out), "--layout=huggingface")
    theirs = CLIPModel.from_pretrained(out).eval()
    ours, _ = load_trained(run)
    tokens = Tokenizer(context_length=32)(["a red circle", "blue bar"])
    with torch.no_grad():
        expected = theirs.text_model(input_ids=tokens).pooler_output
        expected = theirs.text_projection(expected)
        features = ours(tokens=tokens, normalize=False).text_features
    assert features is not None
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_another_run_starts_from_the_weights(run: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuned"
    _fastclip(
        "train",
        "smoke",
        f"--data={data / 'shards'}",
        f"run.directory={folder}",
        f"run.init_from={run / 'checkpoints' / 'step-00000012'}",
        "run.freeze_visual=true",
        "model.vision.layers=1",
        "model.text.layers=1",
        "optim.warmup_steps=0",
        "optim.text_lr_scale=0.1",
        "run.steps=2",
        "run.global_batch_size=24",
        "run.device=cpu",
        "run.tensorboard=false",
    )
    before = load_file(run / "checkpoints" / "step-00000012" / "model.safetensors")
    after = load_file(folder / "checkpoints" / "step-00000002" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any(name.startswith("visual.") for name in changed)  # the tower was locked
    differences = [float((before[n] - after[n]).abs().max()) for n in changed if "text" in n]
    assert max(differences) < 2 * 5e-4 * 0.1 * 1.5  # two updates at a tenth of the rate
