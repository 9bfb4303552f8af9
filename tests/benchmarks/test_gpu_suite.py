"""The suite's parts: limits, states, going on, the closing line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_suite, record
from benchmarks.gpu_suite import PARTS, Part


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


def test_the_default_set_fits_its_limit() -> None:
    assert sum(part.seconds for part in PARTS if part.by_default) <= gpu_suite.LONGEST
    assert all(part.seconds <= gpu_suite.LONGEST for part in PARTS)
    with pytest.raises(SystemExit):
        gpu_suite.main(["--limit", "601"])


def test_kernels_pass_their_check_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
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
