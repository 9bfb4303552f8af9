"""Whole trainings: both trainers for real, rows, going on, what equal time means."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_training, gpu_suite, record, training_peers
from benchmarks.bench_training import COLUMNS, KEY, Case, Provider, equal_time_steps
from benchmarks.training_peers import TimedBatches
from fastclip.recipes.gpu_demo import HELD_OUT
from shards import sample, write_shards, write_tar

CPU = torch.device("cpu")
PAIRS = 48


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the recipe takes it: coloured shapes, trained on and asked for."""
    root = tmp_path_factory.mktemp("data")
    write_shards(root, pairs=PAIRS).rename(root / "train")
    (root / "classes").mkdir()
    for name in ("emoji", "flags"):
        (root / "classes" / f"{name}.json").write_text((root / "classes.json").read_text())
    for style in HELD_OUT:
        (root / f"style-{style}").mkdir()
        write_tar(root / f"style-{style}" / "0.tar", [sample(number) for number in range(24)])
    return root


def _case(**changes: object) -> Case:
    values = {
        "pairs": PAIRS, "model": "ViT-Nano-8", "precision": "fp32", "batch": 16, "epochs": 2,
        "learning_rate": 5e-4, "workers": 1, "seed": 0,
    }  # fmt: skip
    return Case(**{**values, **changes})  # pyright: ignore[reportArgumentType]


def _main(data: Path, out: Path, *more: str) -> tuple[int, list[dict[str, str]]]:
    arguments = ["--device", "cpu", "--commit", "abc", "--data", str(data), "--out", str(out)]
    status = bench_training.main([*arguments, *more])
    return status, record.read_rows(out / "training.csv")


def _check(row: dict[str, str]) -> None:
    assert row["error"] == ""
    assert int(row["samples"]) == int(row["steps"]) * 16
    seconds, timed = (
        float(row["seconds"]),
        int(row["steps"]) - int(row["steps"]) // 10 - (int(row["steps"]) < 10),
    )
    assert float(row["samples_per_second"]) == pytest.approx(timed * 16 / seconds, rel=1e-4)
    assert 0 <= float(row["wait_share"]) <= 1
    assert float(row["first_seconds"]) > 0
    assert float(row["memory_gib"]) > 0.05
    assert row["mfu"] == ""
    assert 0 < float(row["final_loss"]) < math.log(16)
    accuracies = json.loads(row["accuracies"])
    assert list(accuracies) == list(HELD_OUT)
    mean = sum(accuracies.values()) / len(accuracies)
    assert float(row["mean_accuracy"]) == pytest.approx(mean, rel=1e-4)


def test_ours_trains_once(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough to learn the shapes: chance is 1 in 24.
    more = ("--providers", "fastclip", "--epochs", "20", "--learning-rate", "2e-3")
    status, rows = _main(data, tmp_path, *more)
    assert status == 0
    (row,) = rows
    _check(row)
    assert row["steps"] == "60"
    assert float(row["mean_accuracy"]) > 0.3
    assert "60 steps" in capsys.readouterr().out
    monkeypatch.setattr(bench_training, "measure", lambda *_: pytest.fail("measured again"))
    assert _main(data, tmp_path, *more) == (0, rows)
    assert "fastclip     16     1      960" in capsys.readouterr().out


def test_open_clips_trains_on_the_same_and_ours_for_as_long(data: Path, tmp_path: Path) -> None:
    if lacking := training_peers.missing():
        pytest.skip(f"open_clip's trainer lacks {', '.join(lacking)}")
    status, rows = _main(
        data, tmp_path, "--providers", "fastclip", "open_clip", "fastclip-equal-time"
    )
    assert status == 0
    assert [row["provider"] for row in rows] == ["fastclip", "open_clip", "fastclip-equal-time"]
    for row in rows:
        _check(row)
    ours, theirs, equal = rows
    assert ours["steps"] == theirs["steps"] == "9"
    rates = (float(row["samples_per_second"]) for row in (ours, theirs))
    assert int(equal["steps"]) == equal_time_steps(_case(epochs=3), *rates)
    # Their weights are read as what they are: chance is 1 in 24.
    assert float(theirs["mean_accuracy"]) > 0.15


def test_what_fails_is_a_row_and_the_others_are_measured(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = Provider("wrong", extra=("run.no_such_field=1",))
    equal = Provider("equal", equal_time=True)
    monkeypatch.setattr(bench_training, "PROVIDERS", (wrong, equal, Provider("fastclip")))
    status, rows = _main(data, tmp_path, "--epochs", "1")
    assert status == 0
    assert [row["provider"] for row in rows] == ["wrong", "fastclip"]
    assert "run.no_such_field does not exist" in rows[0]["error"]
    log = Path(rows[0]["error"].partition("(see ")[2].removesuffix(")"))
    assert log.parent == tmp_path / "training"
    assert "run.no_such_field" in log.read_text()
    assert rows[0]["samples_per_second"] == rows[0]["mean_accuracy"] == ""
    assert rows[1]["error"] == ""
    assert "equal: needs the rates of fastclip and open_clip" in capsys.readouterr().out


def test_the_suite_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (part,) = (part for part in gpu_suite.PARTS if part.name == "training")
    assert part.stamped
    assert not part.by_default
    seen: list[Case] = []
    monkeypatch.setattr(bench_training, "run", lambda cases, *_: seen.extend(cases) or 0)
    monkeypatch.setattr(bench_training, "index_shards", lambda *_, **__: range(14_000))
    ((_, _, _, *arguments),) = part.commands
    arguments += ["--out", str(tmp_path), "--commit", "abc", "--device", "cpu"]
    assert bench_training.main(arguments) == 0
    assert [(case.batch, case.seed) for case in seen] == [
        (batch, seed) for batch in (1024, 8192) for seed in range(3)
    ]
    assert all(case.batch * case.steps >= 30 * case.pairs for case in seen)


def test_a_training_that_hangs_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(RuntimeError, match="not ready after 1 s"):
        training_peers.run_logged(command, tmp_path / "log", 1)


def test_what_is_missing_is_said(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_peers, "NEEDED", ("json", "no_such_module"))
    monkeypatch.setattr(record, "version_of", lambda name: "1.0.2")
    assert _main(data, tmp_path, "--providers", "open_clip") == (0, [])
    said = capsys.readouterr().out
    assert "open_clip: no no_such_module, webdataset before 1.0" in said
    assert "(pip install open_clip_torch 'webdataset<=0.2.86' pandas)" in said
    assert _main(tmp_path / "nowhere", tmp_path)[0] == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "theirs", "steps"),
    [
        (300.0, 100.0, 18),  # 2 epochs, 3 times as fast: 6 epochs of 3 steps
        (299.0, 100.0, 15),  # rounded down to whole epochs
        (100.0, 300.0, 3),  # slower: one epoch all the same
    ],
)
def test_equal_time(ours: float, theirs: float, steps: int) -> None:
    assert equal_time_steps(_case(), ours, theirs) == steps


def test_steps_are_shared_evenly_by_workers() -> None:
    assert _case(epochs=3).steps == 9
    assert _case(epochs=3, workers=4).steps == 12
    assert _case(epochs=3, batch=32, workers=1).steps == 5
    # A batch of two thirds of the pairs: an epoch is one step, and not none.
    assert equal_time_steps(_case(batch=32, epochs=1), 1.0, 10.0) == 1


def test_a_training_of_one_step_is_refused(data: Path, tmp_path: Path) -> None:
    case = _case()
    cells = bench_training.measure(Provider("fastclip"), case, 1, data, CPU, tmp_path / "log", 60)
    assert "the first is not timed" in str(cells["error"])


def test_both_are_told_the_same(data: Path, tmp_path: Path) -> None:
    case = _case(seed=7, learning_rate=3e-4, workers=2)
    training = bench_training.prepare(case, 30, data, CPU, tmp_path)
    command = training_peers.open_clip_command(training, ("--torchcompile",))
    options = dict(
        word[2:].split("=", 1) for word in command if word.startswith("--") and "=" in word
    )
    config = training.config
    assert options["batch-size"] == str(config.run.global_batch_size) == "16"
    assert options["train-num-samples"] == "480"
    assert options["warmup"] == str(config.optim.warmup_steps) == "3"
    assert float(options["lr"]) == config.optim.learning_rate == 3e-4
    assert float(options["wd"]) == config.optim.weight_decay
    assert float(options["beta2"]) == config.optim.beta2
    assert float(options["grad-clip-norm"]) == config.engine.gradient_clipping == 1
    assert options["seed"] == str(config.run.seed) == "7"
    assert options["precision"] == "fp32"
    assert len(options["train-data"].split("::")) == 3
    assert f"scale={config.data.crop_scale}" in command
    assert command[-1] == "--torchcompile"
    model = json.loads((tmp_path / "models" / "fastclip-benchmark.json").read_text())
    assert model["vision_cfg"]["width"] == 96
    ours = training_peers.fastclip_command(training, ("run.compile=blocks",))
    assert {"run.seed=7", "optim.learning_rate=0.0003", "eval.zero_shot=[]"} <= set(ours)


def test_figures_leave_the_first_window_out(data: Path, tmp_path: Path) -> None:
    training = bench_training.prepare(_case(), 25, data, CPU, tmp_path)
    assert training.skipped == 2
    windows = [(10, 5.0, 0.9, None), (20, 1.0, 0.5, None), (25, 2.0, 0.1, None)]
    lines = [
        {"step": step, "step_seconds": seconds, "data_wait": wait, "mfu": mfu,
         "memory_gib": step / 10, "loss": "nan" if step == 25 else 1.0}
        for step, seconds, wait, mfu in windows
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = training_peers.fastclip_figures(training)
    assert (figures.steps, figures.seconds, figures.first_seconds) == (15, 20.0, 50.0)
    assert figures.wait_share == pytest.approx(0.3)
    assert figures.mfu is None
    assert figures.memory_gib == 2.5
    assert figures.final_loss is not None
    assert math.isnan(figures.final_loss)
    for line in lines:
        line["mfu"] = line["data_wait"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_peers.fastclip_figures(training).mfu == pytest.approx(0.3)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:2]))
    with pytest.raises(RuntimeError, match="not all steps"):
        training_peers.fastclip_figures(training)


def test_the_clock_is_of_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(training_peers.time, "perf_counter", lambda: now[0])

    class Loader:
        num_batches, num_samples = 4, 64

        def __iter__(self):
            for number in range(self.num_batches):
                now[0] += 1  # a wait
                yield number

    batches = TimedBatches(Loader(), skipped=1)
    assert batches.num_samples == 64
    seen = []
    for number in batches:
        seen.append(number)
        now[0] += 100 if number == 0 else 3  # a step, the first with a compilation
    assert seen == [0, 1, 2, 3]
    report = batches.report()
    assert report["first_seconds"] == 101
    assert report["seconds"] == 12
    assert report["wait_share"] == pytest.approx(3 / 12)
    assert (report["steps"], report["all_steps"]) == (3, 4)


def test_the_table_is_over_seeds(tmp_path: Path) -> None:
    rows = record.Record(tmp_path / "training.csv", COLUMNS, KEY)
    stamp = record.Stamp("abc", False, "some  GPU")
    cases = [_case(seed=seed, learning_rate=1e-3 / 3) for seed in (0, 1)]
    assert bench_training.table(rows, stamp, cases) == ""
    for provider, rate, accuracy in (("fastclip", 3000, 0.5), ("open_clip", 1500, 0.4)):
        for case in cases:
            rows.write(
                {
                    **stamp.columns(), "provider": provider, **vars(case), "samples": 96,
                    "samples_per_second": rate + 100 * case.seed, "wait_share": 0.25,
                    "mean_accuracy": accuracy + 0.02 * case.seed,
                }
            )  # fmt: skip
    failed = {**stamp.columns(), "provider": "open_clip-compiled", **vars(cases[0]), "error": "OOM"}
    rows.write(failed)
    ours, theirs = bench_training.table(rows, stamp, cases).splitlines()[1:]
    shown = " ".join(ours.split())
    assert shown == "fastclip 16 2 96 3,050 ± 71 1.97 25% 51.00 ± 1.41 % +10.00"
    assert theirs.split()[-1] == "+0.00"
    other = [_case(seed=0, learning_rate=1e-3)]
    assert bench_training.table(rows, stamp, other) == ""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried')", "CUDA out of"),
        ("raise KeyError('fname')", "KeyError: 'fname'"),
        ("print('first'); print('last'); raise SystemExit(1)", "exit status 1: last"),
        ("raise SystemExit(1)", "exit status 1: no output"),
    ],
)
def test_an_error_is_found_in_the_output(code: str, said: str, tmp_path: Path) -> None:
    # What libraries log when the process ends.
    later = "import atexit; atexit.register(lambda: print('[0] cache_misses: 0'));"
    command = [sys.executable, "-c", (later if "Error(" in code else "") + code]
    with pytest.raises(RuntimeError, match=said):
        training_peers.run_logged(command, tmp_path / "log", 60)
