"""Contradictory settings stop a run before it reads its data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from fastclip import cli, nvidia_apex, run
from fastclip.config import apply_overrides
from fastclip.distributed.runtime import Runtime
from fastclip.engine import deepspeed as deepspeed_engine
from fastclip.recipes.smoke import smoke


@pytest.fixture
def no_tar(tmp_path: Path) -> Path:
    """Shards that exist and hold nothing: whoever looks into them says "no usable sample"."""
    path = tmp_path / "shard.tar"
    path.write_bytes(b"not a tar" * 1000)
    return path


def _train(data: Path, *overrides: str) -> int:
    settings = [
        f"run.directory={data.parent / 'run'}",
        "run.device=cpu",
        "run.steps=4",
        "optim.warmup_steps=1",
        *overrides,
    ]
    return cli.main(["train", "smoke", "--data", str(data), *settings])


def test_the_data_are_the_last_to_be_looked_at(
    no_tar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train(no_tar) == 1
    assert "no usable sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.kind=siglip"], "needs model.init_logit_bias"),
        (["optim.warmup_steps=4"], "not shorter than the run's 4 steps"),
        (["run.cuda_graphs=true"], "run.cuda_graphs needs run.compile"),
        (["run.global_batch_size=7", "run.micro_batches=2"], "is not divisible"),
        (["engine.deepspeed_json=gone.json"], "no such file: gone.json"),
        (["optim.algorithm=muon", "engine.zero_stage=0"], "needs engine.zero_stage 1, 2 or 3"),
        (["data.text=padded", "data.pack_to_multiple=64"], "is for data.text=packed, not padded"),
        (["data.pack_to_multiple=0"], "data.pack_to_multiple is at least 1, not 0"),
    ],
)
def test_contradictions(
    no_tar: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert _train(no_tar, *overrides) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.micro_batches=2"], "needs run.micro_batches=1, not 2"),
        (["run.micro_batches=auto"], "needs run.micro_batches=1, not auto"),
        (["run.activation_checkpointing_text=full"], "does not go with"),
        (["engine.backend=deepspeed", "engine.zero_stage=3"], "engine.zero_stage below 3"),
    ],
)
def test_what_cuda_graphs_would_overwrite(
    no_tar: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    graphs = ["run.compile=blocks", "run.cuda_graphs=true", "run.global_batch_size=4"]
    config = apply_overrides(smoke(str(no_tar)), [*graphs, *overrides])
    gpu = Runtime(rank=0, local_rank=0, world_size=1, device=torch.device("cuda"), backend="gloo")
    monkeypatch.setattr(run, "check_engine", lambda *_: None)
    with pytest.raises(ValueError, match=re.escape(message)):
        run.check_settings(config, gpu)
    run.check_settings(apply_overrides(smoke(str(no_tar)), [*graphs, "engine.zero_stage=3"]), gpu)


def test_a_wrong_key_for_deepspeed(no_tar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = no_tar.with_name("deepspeed.json")
    settings.write_text(json.dumps({"zero_optimisation": {}}))
    assert _train(no_tar, f"engine.deepspeed_json={settings}") == 1
    assert "did you mean 'zero_optimization'?" in capsys.readouterr().err


def test_what_is_not_installed(
    no_tar: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nvidia_apex, "find_optimizer", lambda name: None)
    assert _train(no_tar, "optim.implementation=apex") == 1
    assert "needs NVIDIA's apex" in capsys.readouterr().err

    def missing(who: str) -> None:
        raise ImportError(f"{who} needs DeepSpeed")

    monkeypatch.setattr(deepspeed_engine, "_deepspeed", missing)
    assert _train(no_tar, "engine.backend=deepspeed") == 1
    assert "engine.backend=deepspeed, needs DeepSpeed" in capsys.readouterr().err
