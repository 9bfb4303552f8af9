"""The suite's parts: limits, states, going on, the closing line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite, record
from benchmarks.gpu_suite import PARTS, Part
from triton_support import skip_without_interpreter


def _python(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def _main(out: Path, parts: tuple[Part, ...], *more: str) -> tuple[int, list[dict[str, str]]]:
    status = gpu_suite.main(["--out", str(out), "--commit", "abc", *more], parts)
    return status, record.read_rows(out / "suite.csv")


def test_parts_end_in_states_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = (
        Part("good", (_python("print('fine')"),), 60),
        Part("bad", (_python("raise SystemExit(3)"), _python("print('not reached')")), 60),
        Part("slow", (_python("import time; time.sleep(60)"),), 1),
        Part("toolless", (("no-such-tool",),), 60, tool="no-such-tool"),
        Part("asked_for", (_python(""),), 60, by_default=False),
    )
    status, rows = _main(tmp_path, parts)
    assert status == 1
    assert [(row["part"], row["state"], row["status"]) for row in rows] == [
        ("good", "passed", "0"),
        ("bad", "failed", "3"),
        ("slow", "timed out", ""),
        ("toolless", "skipped", ""),
    ]
    printed = capsys.readouterr().out
    assert "fine" in printed
    assert "not reached" not in printed
    assert "4 parts: 1 failed, 1 passed, 1 skipped, 1 timed out" in printed.splitlines()[-1]


def test_what_passed_is_not_run_again(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    part = Part("once", (_python(f"open({str(marker)!r}, 'x')"),), 60)
    assert _main(tmp_path, (part,))[0] == 0
    assert _main(tmp_path, (part,))[0] == 0  # a second run of it would fail
    status, rows = _main(tmp_path, (part,), "--dirty")
    assert status == 1
    assert [row["state"] for row in rows] == ["passed", "failed"]


def test_a_benchmark_that_lost_the_device_is_started_again(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"""
import pathlib, sys
marker = pathlib.Path({str(marker)!r})
again = marker.exists()
marker.touch()
sys.exit(0 if again else {gpu_suite.RESUME})
"""
    assert _main(tmp_path, (Part("lost", (_python(code),), 60),))[0] == 0


def test_benchmarks_are_told_the_commit_and_the_folder(tmp_path: Path) -> None:
    code = f"""
import sys
assert sys.argv[1:] == ["--out", {str(tmp_path)!r}, "--commit", "abc", "--dirty"], sys.argv
"""
    part = Part("stamped", (_python(code),), 60, stamped=True)
    assert _main(tmp_path, (part,), "--dirty")[0] == 0


def test_parts_run_in_the_order_that_was_asked_for(tmp_path: Path) -> None:
    parts = tuple(Part(name, (_python(""),), 60) for name in ("a", "b", "c"))
    _, rows = _main(tmp_path, parts, "--part", "c", "a", "c")
    assert [row["part"] for row in rows] == ["c", "a"]


def test_other_peers_are_another_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "PEERS", ("torch", "no-such-peer"))
    assert gpu_suite.peers() == f"torch {torch.__version__}"
    part = Part("once", (_python(""),), 60)
    _main(tmp_path, (part,))
    monkeypatch.setattr(gpu_suite, "PEERS", ())
    _main(tmp_path, (part,))
    _, rows = _main(tmp_path, (part,))
    assert [row["peers"] for row in rows] == [f"torch {torch.__version__}", ""]


def test_no_part_takes_longer_than_a_call() -> None:
    assert all(part.seconds <= gpu_suite.LONGEST for part in PARTS)
    with pytest.raises(SystemExit):
        gpu_suite.main(["--limit", "601"])


@pytest.mark.parametrize("asked", [(), ("--part", "first", "cut", "late", "--total", "2")])
def test_all_parts_together_have_a_limit(
    asked: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu_suite, "LONGEST", 500 if asked else 2)
    monkeypatch.setattr(gpu_suite, "SHORTEST", 0.5)
    sleep = _python("import time; time.sleep(60)")
    parts = (
        Part("first", (_python(""),), 60),
        Part("cut", (sleep,), 30),  # is given what is left of two seconds
        Part("late", (sleep,), 30),
    )
    status, rows = _main(tmp_path, parts, *asked)
    assert status == 1
    assert [row["state"] for row in rows] == ["passed", "timed out", "not started"]
    assert float(rows[1]["seconds"]) < 20
    assert "late: not started: 0 s of 2 s are left" in capsys.readouterr().out


def test_at_its_limit_a_command_may_say_where_it_was(tmp_path: Path) -> None:
    code = "print('output')\nimport time\ntime.sleep(60)"  # seen although it was not flushed
    _, rows = _main(tmp_path, (Part("slow", (_python(code),), 2),))
    assert [row["state"] for row in rows] == ["timed out"]
    log = (tmp_path / "slow.log").read_text()
    assert log.startswith("output\n")
    assert "KeyboardInterrupt" in log


def test_a_command_that_ignores_its_interrupt_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_suite, "GRACE", 0.5)
    code = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: print("ignored"))
end = time.monotonic() + 30
while time.monotonic() < end:
    time.sleep(1)
print("survived")
"""
    _main(tmp_path, (Part("deaf", (_python(code),), 2),))
    assert (tmp_path / "deaf.log").read_text() == "ignored\n"


def test_output_is_not_held_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    code = "import os; print('before'); os._exit(0)"
    _main(tmp_path, (Part("sudden", (_python(code),), 60),))
    assert (tmp_path / "sudden.log").read_text() == "before\n"


def test_independent_commands_run_after_one_that_failed(tmp_path: Path) -> None:
    empty = ("python", "-c", "raise SystemExit(5)", "pytest")
    commands = (empty, _python("raise SystemExit(3)"), _python("print('reached')"))
    status, rows = _main(tmp_path, (Part("tests", commands, 60, independent=True),))
    assert status == 1
    assert [(row["state"], row["status"]) for row in rows] == [("failed", "3")]
    assert "reached" in (tmp_path / "tests.log").read_text()


def test_tools_are_found_where_cuda_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "cuda" / "bin" / "some-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho sanitized\n")
    tool.chmod(0o755)
    part = Part("sanitizer", (("some-sanitizer",),), 60, tool="some-sanitizer")
    assert _main(tmp_path, (part,))[1][-1]["state"] == "skipped"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert _main(tmp_path, (part,))[1][-1]["state"] == "passed"
    assert (tmp_path / "sanitizer.log").read_text() == "sanitized\n"


def test_the_gpus_state_stands_around_a_parts_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "gpu_state", lambda: "1980 MHz")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    _main(tmp_path, (Part("good", (_python("print('fine')"),), 60),))
    text = (tmp_path / "good.log").read_text()
    assert text == "[before] 1980 MHz\nfine\n[after] 1980 MHz\n"


def test_tests_are_named_by_files_that_mark_some_for_a_gpu() -> None:
    (part,) = (part for part in PARTS if part.name == "gpu_tests")
    files = [word for command in part.commands for word in command if word.startswith("tests/")]
    assert files
    for file in files:
        assert re.search(r"mark(s=pytest\.mark)?\.gpu", (record.ROOT / file).read_text()), file


def test_kernels_pass_their_check_in_the_interpreter(tmp_path: Path) -> None:
    skip_without_interpreter()
    code = """
import sys
from benchmarks import check_kernels
check_kernels.SHAPES = ((40, 32, True), (33, 48, False))
sys.exit(check_kernels.main())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "--out", str(tmp_path), "--commit", "abc"],
        cwd=record.ROOT,
        env={**gpu_suite.os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert " 0 above their limit" in done.stdout, done.stdout + done.stderr
    rows = record.read_rows(tmp_path / "check_kernels.csv")
    assert {row["passed"] for row in rows} == {"True"}
    assert {(row["pairs"], row["dtype"]) for row in rows} == {
        (pairs, dtype) for pairs in ("40", "33") for dtype in ("fp32", "fp16")
    }
    assert {"fastclip", "fastclip-stored"} <= {row["provider"] for row in rows}
