"""The scaling experiment end to end on a tiny family: compute, children, resumption, results."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastclip.config import TrainConfig, save_config
from fastclip.data.config import DataConfig
from fastclip.engine.config import EngineConfig
from fastclip.eval.retrieval import RetrievalTask
from fastclip.eval.suite import EvalConfig
from fastclip.eval.zero_shot import ZeroShotTask
from fastclip.evaluate import evaluate
from fastclip.experiments import scaling_runs
from fastclip.experiments.scaling_family import (
    Member,
    member_config,
    recipe,
    text_lengths,
)
from fastclip.experiments.scaling_groups import GroupTask, group_error, label_groups
from fastclip.experiments.scaling_report import format_report, run_scaling
from fastclip.experiments.scaling_runs import Training, held, train_once
from fastclip.flops import executed_flops_per_sample
from fastclip.models.config import ClipConfig, ResNetConfig, TextConfig
from fastclip.optim import OptimConfig
from fastclip.recipes import RECIPES
from fastclip.tokenizer import Tokenizer
from shards import sample, write_shards, write_tar

IMAGES, BATCH = 36, 12


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _tiny(width: int) -> Member:
    return Member(
        name=f"w{width}",
        model=ClipConfig(
            embed_dim=16,
            vision=ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=width, heads=width),
            text=TextConfig(context_length=8, width=8 * width, heads=2, layers=1),
        ),
    )


def _base(folder: Path) -> TrainConfig:
    if not (folder / "shards").exists():
        write_shards(folder)
    shards = str(folder / "shards")
    return TrainConfig(
        model=_tiny(2).model,
        data=DataConfig(train=shards, workers=1),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
        engine=EngineConfig(zero_stage=0, precision="fp32"),
        eval=EvalConfig(
            zero_shot=(
                ZeroShotTask(
                    name="shapes",
                    shards=shards,
                    classes=str(folder / "classes.json"),
                    templates=("a {}",),
                ),
            ),
            retrieval=(RetrievalTask(name="pairs", shards=shards),),
            workers=1,
        ),
        run=dataclasses.replace(
            RECIPES["smoke"](shards).run,
            global_batch_size=BATCH,
            log_every_steps=1,
            checkpoint_every_steps=1,
            device="cpu",
        ),
    )


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainConfig, str]:
    """Four models: the smallest trained for three steps with two seeds, the others long ago."""
    folder = tmp_path_factory.mktemp("scaling")
    base, out = _base(folder), folder / "out"
    members = [_tiny(8), dataclasses.replace(_tiny(2), seeds=2), _tiny(4), _tiny(6)]
    for width in (4, 6, 8):
        _finish(base, out, width, 1 / width)
    measured, fits = run_scaling(members, base, out, images=IMAGES)
    return out, base, format_report(measured, fits)


def _finish(base: TrainConfig, out: Path, width: int, error: float) -> None:
    """What a training that ended leaves behind."""
    run = out / f"w{width}-seed0"
    run.mkdir(parents=True)
    config = member_config(base, _tiny(width), 0, images=IMAGES, directory=run)
    save_config(config, run / "recipe.json")
    training = Training(
        seed=0,
        seconds=2.0,
        errors={"shapes": error},
        test_images={"shapes": 48},
        retrieval={"pairs/image_to_text_r1": 0.5, "pairs/text_to_image_r1": 0.25},
    )
    (run / "result.json").write_text(json.dumps(dataclasses.asdict(training)))


def test_compute_is_what_flops_says(experiment: tuple[Path, TrainConfig, str]) -> None:
    out, base, _ = experiment
    content = json.loads((out / "scaling.json").read_text())
    captions = [sample(number)[1]["txt"].decode() for number in range(48)]
    _, lengths = Tokenizer(context_length=8).encode_batch(captions)
    assert text_lengths(base) == lengths.tolist()
    for one, width in zip(content["models"], (2, 4, 6, 8), strict=True):
        flops = executed_flops_per_sample(_tiny(width).model, lengths.tolist())
        assert one["name"] == f"w{width}"
        assert one["flops_per_image"] == pytest.approx(flops)
        assert one["flops"] == pytest.approx(flops * IMAGES)
        assert one["learning_rate"] == pytest.approx(1e-3 * (16 / width) ** 0.5)
    span = content["models"][-1]["flops"] / content["models"][0]["flops"]
    assert content["compute_span"] == pytest.approx(span)


def test_errors_are_those_of_the_runs(experiment: tuple[Path, TrainConfig, str]) -> None:
    out, _, table = experiment
    content = json.loads((out / "scaling.json").read_text())
    assert [len(one["trainings"]) for one in content["models"]] == [2, 1, 1, 1]
    smallest = content["models"][0]
    for training in smallest["trainings"]:
        metrics, _ = evaluate(out / f"w2-seed{training['seed']}", [])
        error = 1 - metrics["zero_shot/shapes/top1"]
        assert training["errors"] == {"shapes": pytest.approx(error)}
        recall = training["retrieval"]["pairs/image_to_text_r1"]
        assert recall == pytest.approx(metrics["retrieval/pairs/image_to_text_r1"])
        assert training["test_images"] == {"shapes": 48}
        assert training["seconds"] > 0
    mean = sum(training["mean_error"] for training in smallest["trainings"]) / 2
    assert smallest["mean_error"] == pytest.approx(mean)
    assert [one["mean_error"] for one in content["models"][1:]] == [1 / 4, 1 / 6, 1 / 8]
    for one in content["models"]:
        assert f"{one['mean_error']:.2%}" in table
    assert "image tower's width 2 to 8" in table
    assert "images 36 throughout" in table
    assert "Without w8 the others predict" in table
    assert content["saturating"] is None


def test_table_and_figures_are_files(experiment: tuple[Path, TrainConfig, str]) -> None:
    out, _, table = experiment
    assert Image.open(out / "scaling.png").width > 800
    assert (out / "scaling.txt").read_text() == f"{table}\n"
    assert (out / "scaling.svg").read_text().startswith("<?xml")


def test_what_is_finished_is_not_trained_again(
    experiment: tuple[Path, TrainConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, base, _ = experiment
    config = recipe(str(out / "w2-seed1" / "recipe.json"))

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", never)
    with held(out) as lock:
        training = train_once(config, None, lock)
        content = json.loads((out / "scaling.json").read_text())
        assert training.errors == content["models"][0]["trainings"][1]["errors"]
        longer = member_config(base, _tiny(2), 1, images=48, directory=out / "w2-seed1")
        with pytest.raises(ValueError, match=r"w2-seed1.recipe\.json is of a training with other"):
            train_once(longer, None, lock)


def test_a_run_without_its_last_evaluation_is_named(
    experiment: tuple[Path, TrainConfig, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = experiment
    run = out / "w2-seed0"
    result, metrics = run / "result.json", run / "metrics.jsonl"
    kept, before = result.read_text(), metrics.read_text()
    lines = before.splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if "eval/" not in line))
    result.unlink()
    # Nothing is left to train: the process would end at once.
    monkeypatch.setattr(scaling_runs, "_run_child", lambda *arguments: None)
    with (
        held(out) as lock,
        pytest.raises(ValueError, match="seed0 has no evaluation of its"),
    ):
        train_once(recipe(str(run / "recipe.json")), None, lock)
    metrics.write_text(before)
    with held(out) as lock:
        training = train_once(recipe(str(run / "recipe.json")), None, lock)
    assert training == Training(**json.loads(kept))
    assert result.read_text() == kept


def test_a_stopped_experiment_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    """The whole launch gets SIGTERM amid a training; the next one does not begin anew."""
    out = tmp_path / "out"
    config = member_config(_base(tmp_path), _tiny(2), 0, images=BATCH * 4000, directory=out / "run")
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=1))
    code = (
        "import sys; from pathlib import Path\n"
        "from fastclip.experiments.scaling_family import recipe\n"
        "from fastclip.experiments.scaling_runs import held, train_once\n"
        "with held(Path(sys.argv[2])) as lock:\n"
        "    train_once(recipe(sys.argv[1]), None, lock)\n"
    )
    (out / "run").mkdir(parents=True)
    wanted = tmp_path / "wanted.json"
    save_config(config, wanted)
    process = subprocess.Popen([sys.executable, "-c", code, str(wanted), str(out)])
    checkpoints = out / "run" / "checkpoints"
    _wait_for(lambda: any(checkpoints.glob("step-*")), process)
    with pytest.raises(OSError, match="another process still trains in"), held(out):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    log = (out / "run" / "train.log").read_text()
    assert "stopped by a signal at step" in log
    reached = max(int(path.name.split("-")[1]) for path in checkpoints.glob("step-*"))
    assert 0 < reached < 4000

    shorter = dataclasses.replace(
        config, run=dataclasses.replace(config.run, steps=reached + 2, log_every_steps=1)
    )
    save_config(shorter, out / "run" / "recipe.json")
    with held(out) as lock:
        training = train_once(shorter, None, lock)
    log = (out / "run" / "train.log").read_text()
    assert f"at step {reached}\n" in log[log.index("resuming from") :]
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, reached + 3))
    assert set(training.errors) == {"shapes"}


def _wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, "the process ended early"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failing_child_is_told_in_its_own_words(tmp_path: Path) -> None:
    base = _base(tmp_path)
    base = dataclasses.replace(
        base, data=dataclasses.replace(base.data, train=str(tmp_path / "no"))
    )
    config = member_config(base, _tiny(2), 0, images=IMAGES, directory=tmp_path / "out" / "run")
    with (
        held(tmp_path / "out") as lock,
        pytest.raises(ChildProcessError, match=r"ended with status 1; train\.log says: .*no"),
    ):
        train_once(config, None, lock)
    assert not (tmp_path / "out" / "run" / "result.json").exists()


def test_what_cannot_be_an_experiment(tmp_path: Path) -> None:
    base = _base(tmp_path)
    with pytest.raises(ValueError, match="at least 4 models, not 2"):
        run_scaling([_tiny(2), _tiny(4)], base, tmp_path / "out", images=IMAGES)
    without = dataclasses.replace(base, eval=EvalConfig())
    with pytest.raises(ValueError, match="needs a zero-shot task"):
        run_scaling([_tiny(2)] * 4, without, tmp_path / "out", images=IMAGES)
    trimmed = dataclasses.replace(base, data=dataclasses.replace(base.data, text="trimmed"))
    with pytest.raises(ValueError, match="take packed"):
        text_lengths(trimmed)
    padded = dataclasses.replace(base, data=dataclasses.replace(base.data, text="padded"))
    assert text_lengths(padded) == [8]


def test_a_law_in_the_errors_is_found(tmp_path: Path) -> None:
    """Six models on a line, the largest of them 10 % above it."""
    base, out, widths = _base(tmp_path), tmp_path / "out", (2, 4, 6, 8, 10, 12)
    lengths = text_lengths(base)
    for width in widths:
        flops = executed_flops_per_sample(_tiny(width).model, lengths) * IMAGES
        error = 0.5 * (flops / 1e9) ** -0.1
        _finish(base, out, width, error * (1.1 if width == 12 else 1.001 ** (width % 4)))
    measured, fits = run_scaling([_tiny(width) for width in widths], base, out, images=IMAGES)
    held_out = fits.held_out
    assert held_out.fit.exponent == pytest.approx(0.1, abs=0.002)
    assert held_out.measured == pytest.approx(1.1 * held_out.predicted, rel=0.01)
    assert not held_out.inside
    assert format_report(measured, fits).splitlines()[-2].endswith(": outside.")
    assert fits.floor is not None
    assert "do not fall" not in format_report(measured, fits)
    content = json.loads((out / "scaling.json").read_text())
    assert content["largest_held_out"]["inside"] is False
    assert content["saturating"]["supported"] == fits.floor.supported


def test_measurements_without_a_line_are_kept(tmp_path: Path) -> None:
    base, out = _base(tmp_path), tmp_path / "out"
    for width, error in ((2, 1.0), (4, 0.5), (6, 0.4), (8, 0.3)):
        _finish(base, out, width, error)
    with pytest.raises(ValueError, match=r"model 1 \(.* FLOP\): an error of 1 "):
        run_scaling([_tiny(width) for width in (2, 4, 6, 8)], base, out, images=IMAGES)
    content = json.loads((out / "scaling.json").read_text())
    assert [one["mean_error"] for one in content["models"]] == [1.0, 0.5, 0.4, 0.3]
    assert "fit" not in content


def test_groups_are_those_of_the_best_label(experiment: tuple[Path, TrainConfig, str]) -> None:
    """With a group for each label the error is the task's own; with one for all it is none."""
    out, _, _ = experiment
    data = out.parent
    errors = {}
    for kind in ("own", "all"):
        rows = []
        for number in range(48):
            key, members = sample(number)
            about = json.loads(members["json"])
            group = about["label"] if kind == "own" else "shape"
            rows.append((key, members | {"json": json.dumps(about | {"group": group}).encode()}))
        (data / kind).mkdir()
        write_tar(data / kind / "0.tar", rows)
        task = GroupTask(
            name="groups",
            shards=str(data / kind),
            classes=str(data / "classes.json"),
            known=(str(data / kind),),
        )
        errors[kind] = group_error(out / "w2-seed0", task, batch_size=7, workers=1)
    metrics, _ = evaluate(
        out / "w2-seed0", ["eval.zero_shot=" + json.dumps([_bare(data)]), "eval.retrieval=[]"]
    )
    own = 1 - metrics["zero_shot/shapes/top1"]
    assert errors == {"own": (pytest.approx(own), 48), "all": (0.0, 48)}
    missing = dataclasses.replace(task, known=(str(data / "shards"),))
    assert label_groups(missing) == {}
    with pytest.raises(ValueError, match="an image whose label has no group"):
        group_error(out / "w2-seed0", missing, batch_size=7, workers=1)
    clash = dataclasses.replace(task, known=(str(data / "own"), str(data / "all")))
    with pytest.raises(ValueError, match="is of group 'shape', and elsewhere of"):
        label_groups(clash)


def _bare(data: Path) -> dict[str, Any]:
    shards, classes = str(data / "shards"), str(data / "classes.json")
    return {"name": "shapes", "shards": shards, "classes": classes, "templates": ["{}"]}
