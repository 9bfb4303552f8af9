"""Checkpoints on disk: which one counts, how many are kept, and what damage is called."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fastclip import cli
from fastclip.checkpoint import find_resume_point
from fastclip.checkpoint_folder import complete_checkpoints, step_tag
from fastclip.config import load_config, to_dict
from fastclip.distributed.runtime import Runtime
from shards import write_shards

ALONE = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), backend="gloo")


def _train(data: Path, run: Path, *overrides: str) -> int:
    settings = (
        "model.vision.layers=1",
        "model.text.layers=1",
        "optim.warmup_steps=1",
        "run.global_batch_size=8",
        "run.checkpoint_every_steps=2",
        "run.keep_checkpoints=2",
        "run.log_every_steps=1",
        "run.tensorboard=false",
        "run.device=cpu",
        f"run.directory={run}",
    )
    return cli.main(["train", "smoke", f"--data={data}", *settings, *overrides])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data"), pairs=24)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    assert _train(data, run, "run.steps=6") == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _find(run: Path, tag: str | None = None):
    config = load_config(run / "config.json")
    return find_resume_point(run / "checkpoints", ALONE, 0, to_dict(config.model), tag)


def test_the_newest_are_kept_and_pointed_at(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert complete_checkpoints(checkpoints) == [step_tag(4), step_tag(6)]
    assert (checkpoints / "latest").read_text() == f"{step_tag(6)}\n"
    point = _find(run)
    assert point is not None
    assert (point.step, point.same_world, point.universal) == (6, True, False)
    older = _find(run, step_tag(4))
    assert older is not None
    assert older.step == 4
    with pytest.raises(FileNotFoundError, match=rf"there are: {step_tag(4)}, {step_tag(6)}"):
        _find(run, step_tag(5))


def test_half_written_checkpoints_do_not_count(run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / step_tag(6), checkpoints / f".partial-{step_tag(8)}")
    shutil.copytree(checkpoints / step_tag(6), checkpoints / step_tag(9))
    (checkpoints / step_tag(9) / "fastclip.json").unlink()
    point = _find(run)
    assert point is not None
    assert point.step == 6
    assert find_resume_point(run / "nowhere", ALONE, 1, {}) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.algorithm=muon"], "needs engine.zero_stage 1, 2 or 3"),
        (["optim.algorithm=muon", "engine.zero_stage=1"], "whose state muon cannot take over"),
        (["run.seed=9"], "set run.seed=0"),
        (["run.freeze_visual=true"], "set run.freeze_visual and run.freeze_text as then"),
        (["model.text.width=64"], "holds another model (model.text.width is 128 there and 64"),
    ],
)
def test_settings_that_do_not_continue_a_run(
    run: Path, data: Path, capsys: pytest.CaptureFixture, overrides: list[str], message: str
) -> None:
    assert _train(data, run, "run.steps=8", *overrides) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_damaged_files_are_named(run: Path, data: Path, capsys: pytest.CaptureFixture) -> None:
    newest = run / "checkpoints" / step_tag(6)
    state = newest / "optimizer.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    assert _train(data, run, "run.steps=8") == 1
    assert f"remove {newest} to resume from the checkpoint before it" in capsys.readouterr().err
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert cli.main(["show", str(run)]) == 1
    assert f"{weights} cannot be loaded" in capsys.readouterr().err
    (newest / "fastclip.json").write_text('{"step": ')
    assert _train(data, run, "run.steps=8") == 1
    assert f"{newest / 'fastclip.json'} is not valid JSON" in capsys.readouterr().err
    shutil.rmtree(newest)  # the way out that the message names
    assert _train(data, run, "run.steps=6") == 0


def test_a_resumed_run_writes_the_uninterrupted_ones_checkpoint(data: Path, tmp_path: Path) -> None:
    # Dropped patches come from the generators; loss scale and usual norm move at every step.
    moving = (
        "run.patch_dropout=0.5",
        "run.micro_batches=2",
        "engine.precision=fp16",
        "engine.initial_loss_scale=16",
        "engine.loss_scale_window=1",
        "engine.outlier_factor=10",
    )
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    assert _train(data, run, "run.steps=4", *moving) == 0
    (run / "checkpoints" / step_tag(4)).rename(uninterrupted)
    assert _train(data, run, "run.steps=4", *moving) == 0
    resumed = run / "checkpoints" / step_tag(4)
    names = sorted(path.name for path in uninterrupted.iterdir())
    assert sorted(path.name for path in resumed.iterdir()) == names
    pairs = {name: (resumed / name, uninterrupted / name) for name in names}
    assert [n for n, (a, b) in pairs.items() if a.read_bytes() != b.read_bytes()] == []
    meta = json.loads((resumed / "fastclip.json").read_text())
    assert meta["engine"]["loss_scale"]["value"] == 16 * 2**4
    assert meta["engine"]["guard"]["known"] == 4


@pytest.mark.parametrize(("minutes", "steps"), [(1e-9, [2, 4, 5]), (1e6, [5])])
def test_time_makes_log_steps_save(
    data: Path, tmp_path: Path, minutes: float, steps: list[int]
) -> None:
    settings = (
        f"run.checkpoint_every_minutes={minutes}",
        "run.checkpoint_every_steps=none",
        "run.log_every_steps=2",
        "run.keep_checkpoints=9",
    )
    assert _train(data, tmp_path / "run", "run.steps=5", *settings) == 0
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == list(map(step_tag, steps))


class _Harmful:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


SHARDED = ("engine.backend=deepspeed", "engine.zero_stage=1")


@pytest.fixture(scope="module")
def sharded(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sharded") / "run"
    assert _train(data, run, *SHARDED, "run.steps=2") == 0
    return run


@pytest.mark.parametrize(
    "name", ["rank-00000.pt", "mp_rank_00_model_states.pt", "*optim_states.pt"]
)
@pytest.mark.parametrize("engine", [SHARDED, ("engine.backend=plain",)], ids=["same", "other"])
def test_checkpoints_cannot_run_code(
    sharded: Path,
    tmp_path: Path,
    data: Path,
    capfd: pytest.CaptureFixture,
    name: str,
    engine: tuple[str, ...],
) -> None:
    run = Path(shutil.copytree(sharded, tmp_path / "run"))
    (path,) = (run / "checkpoints" / step_tag(2)).glob(name)
    torch.save({"module": _Harmful()}, path, pickle_module=pickle)
    assert _train(data, run, "run.steps=4", *engine) == 1
    output = capfd.readouterr()
    assert "code from a checkpoint ran" not in output.out + output.err
    assert "cannot be loaded" in output.err


def test_a_run_goes_on_with_another_adam(run: Path, data: Path) -> None:
    compact = ("optim.algorithm=compact_adamw", "engine.precision=bf16")
    assert _train(data, run, "run.steps=7", *compact) == 0
    assert _train(data, run, "run.steps=8", "optim.algorithm=lamb") == 0
    assert _train(data, run, "run.steps=9") == 0


def test_a_run_goes_on_under_another_engine(sharded: Path, tmp_path: Path, data: Path) -> None:
    run = Path(shutil.copytree(sharded, tmp_path / "run"))
    assert _train(data, run, "run.steps=4") == 0
    assert _train(data, run, "run.steps=6", "engine.backend=deepspeed", "engine.zero_stage=3") == 0
    assert complete_checkpoints(run / "checkpoints") == [step_tag(4), step_tag(6)]


def test_a_conversion_is_made_anew_for_a_new_checkpoint(
    sharded: Path, tmp_path: Path, data: Path
) -> None:
    run = Path(shutil.copytree(sharded, tmp_path / "run"))
    checkpoints = run / "checkpoints"
    assert _train(data, run, "run.steps=4") == 0  # converts what is sharded
    assert (checkpoints / f"{step_tag(2)}-universal").is_dir()
    for step in (2, 4):
        shutil.rmtree(checkpoints / step_tag(step))
    assert _train(data, run, *SHARDED, "run.steps=2") == 0
    assert not list(checkpoints.glob("*-universal"))


def test_a_run_begun_anew_keeps_its_own_checkpoints(run: Path, data: Path) -> None:
    checkpoints = run / "checkpoints"
    assert _train(data, run, "run.resume=false", "run.steps=2", "run.seed=5") == 0
    assert complete_checkpoints(checkpoints) == [step_tag(2)]
    assert (checkpoints / "latest").read_text() == f"{step_tag(2)}\n"
    # What was there is put aside, not thrown away.
    assert (checkpoints / f".superseded-{step_tag(6)}-1" / "model.safetensors").is_file()
    assert _train(data, run, "run.steps=3", "run.seed=5") == 0


@pytest.mark.parametrize("name", ["model.safetensors", "rank-00000.pt", "optimizer.safetensors"])
def test_missing_files_are_named(
    run: Path, data: Path, capsys: pytest.CaptureFixture, name: str
) -> None:
    newest = run / "checkpoints" / step_tag(6)
    (newest / name).unlink()
    assert _train(data, run, "run.steps=8") == 1
    error = capsys.readouterr().err
    assert f"remove {newest} to resume from the checkpoint before it" in error
    assert "Traceback" not in error


def test_newer_formats_are_refused(run: Path) -> None:
    path = run / "checkpoints" / step_tag(6) / "fastclip.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(ValueError, match="has format version 99"):
        _find(run)
