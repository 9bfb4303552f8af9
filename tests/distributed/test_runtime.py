"""Where a process stands: alone, launched, or launched by halves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastclip.distributed import launcher
from fastclip.distributed.collectives import any_rank
from fastclip.distributed.runtime import Runtime, initialise, shutdown

LAUNCHER = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # whichever is free
}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    yield
    shutdown()


def test_alone_without_a_launcher() -> None:
    runtime = initialise("cpu")
    assert runtime == Runtime(
        rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), backend="gloo"
    )
    assert runtime.is_main
    assert dist.is_initialized()
    assert any_rank(True)
    assert initialise("cpu") == runtime  # again changes nothing
    shutdown()
    assert not dist.is_initialized()
    shutdown()


def test_whole_launcher_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHER.items():
        monkeypatch.setenv(name, value)
    runtime = initialise("cpu")
    assert (runtime.rank, runtime.local_rank, runtime.world_size) == (0, 0, 1)
    assert dist.get_world_size() == 1


@pytest.mark.parametrize(
    ("said", "here"), [({}, 8), ({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "2"}, 2)]
)
def test_ranks_of_this_machine_are_torchruns_or_deepspeeds(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], here: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**LAUNCHER, "WORLD_SIZE": "8", "RANK": "5", **said}.items():
        monkeypatch.setenv(name, value)
    assert launcher.place() == (5, 0, 8, here)
    assert launcher.launched()
    assert not launcher.is_main_process()


@pytest.mark.parametrize("present", [("RANK",), ("WORLD_SIZE",), ("RANK", "WORLD_SIZE")])
def test_half_a_launcher_is_an_error(
    monkeypatch: pytest.MonkeyPatch, present: tuple[str, ...]
) -> None:
    for name in present:
        monkeypatch.setenv(name, LAUNCHER[name])
    missing = ", ".join(name for name in LAUNCHER if name not in present)
    with pytest.raises(ValueError, match=f"lacks {missing}: start fastclip by"):
        initialise("cpu")
    assert not dist.is_initialized()


def test_another_ranks_runtime_is_not_the_main_one() -> None:
    runtime = Runtime(
        rank=1, local_rank=0, world_size=2, device=torch.device("cpu"), backend="gloo"
    )
    assert not runtime.is_main


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device is auto, cpu or cuda, not 'gpu'"):
        initialise("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA device; use device=cpu"):
        initialise("cuda")
    assert not dist.is_initialized()
