"""Measuring: rows are written, not repeated, and failures are rows. Times are never judged."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import accuracy, harness, losses, peers, plan, record
from benchmarks.bench_contrastive import BENCHMARK as CONTRASTIVE
from benchmarks.bench_sigmoid import BENCHMARK as SIGMOID
from benchmarks.cases import Case
from benchmarks.harness import Benchmark, Provider
from benchmarks.losses import Definition, Operands, Result, Step, autograd_step, make_operands
from loss_oracles import clip_expected, siglip_expected

CPU = torch.device("cpu")
CASE = Case(12, 8, "fp32")


def _plain(case: Case) -> Step:
    return autograd_step(peers.plain_contrastive, case)


def _out_of_memory(case: Case) -> Step:
    raise torch.OutOfMemoryError("tried to allocate 8 GiB")


def _broken(case: Case) -> Step:
    raise ValueError(f"cannot do {case.pairs}\npairs")


def _own(name: str, build: object = _plain, **changes: object) -> Provider:
    return replace(Provider(name, _plain, needs_cuda=False), build=build, **changes)  # pyright: ignore[reportArgumentType]


def _benchmark(*providers: Provider) -> Benchmark:
    return replace(CONTRASTIVE, providers=providers, sets={"tiny": (CASE,)})


def _main(benchmark: Benchmark, out: Path, *more: str) -> list[dict[str, str]]:
    arguments = ["--cases", "tiny", "--device", "cpu", "--seconds", "0.001", "--out", str(out)]
    assert harness.main(benchmark, [*arguments, "--commit", "abc", *more]) == 0
    return record.read_rows(out / "contrastive.csv")


def test_a_row_says_what_was_measured_on_what(tmp_path: Path) -> None:
    (row,) = _main(_benchmark(_own("plain", distribution="torch")), tmp_path)
    assert tuple(row) == CONTRASTIVE.columns
    assert (row["commit"], row["dirty"], row["provider"]) == ("abc", "False", "plain")
    assert (row["pairs"], row["dims"], row["dtype"], row["scale"]) == ("12", "8", "fp32", "14.3")
    assert row["version"] == record.version_of("torch") == torch.__version__
    assert float(row["median_ms"]) > 0
    assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
    assert float(row["gradient_error"]) < 1e-6
    assert float(row["loss_error"]) < 1e-6
    assert row["peak_bytes"] == row["matmul_share"] == row["error"] == ""
    counted = 4 * 2 * 12 * 12 * 8 / float(row["median_ms"]) / 1e9
    assert float(row["tflops"]) == pytest.approx(counted, rel=1e-4)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted(case: Case) -> Step:
        calls.append("first")
        return _plain(case)

    def interrupted(case: Case) -> Step:
        raise KeyboardInterrupt

    first = _own("first", counted)
    with pytest.raises(KeyboardInterrupt):
        _main(_benchmark(first, _own("second", interrupted)), tmp_path)
    rows = _main(_benchmark(first, _own("second")), tmp_path)
    assert [row["provider"] for row in rows] == ["first", "second"]
    assert calls == ["first"]
    # Other files are another measurement, and so is another commit.
    assert len(_main(_benchmark(first), tmp_path, "--dirty")) == 3
    assert len(_main(_benchmark(first), tmp_path, "--commit", "def")) == 4


def test_what_goes_wrong_is_the_row(tmp_path: Path) -> None:
    providers = _own("large", _out_of_memory), _own("broken", _broken), _own("good")
    rows = _main(_benchmark(*providers), tmp_path)
    assert [row["error"] for row in rows] == ["OOM", "ValueError: cannot do 12", ""]
    assert [row["median_ms"] == "" for row in rows] == [True, True, False]


class _Cyclic:
    """A step that only the garbage collector frees, as an engine with hooks is."""

    def __init__(self, case: Case) -> None:
        self.me, self.step = self, _plain(case)

    def __call__(self, operands: Operands) -> Result:
        return self.step(operands)

    def close(self) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_provider_is_gone_when_the_next_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch._dynamo, "reset", lambda: None)  # it collects garbage, too
    built: list[weakref.ref[_Cyclic]] = []

    def cyclic(case: Case) -> Step:
        step = _Cyclic(case)
        built.append(weakref.ref(step))
        return step

    def after(case: Case) -> Step:
        assert [step() for step in built] == [None]
        return _plain(case)

    rows = _main(_benchmark(_own("cyclic", cyclic), _own("after", after)), tmp_path)
    assert [row["error"] for row in rows] == ["", ""]


def test_what_fails_while_it_ends_costs_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error")

    class Wrong(_Cyclic):
        def __call__(self, operands: Operands) -> Result:
            raise ValueError("says more")

    monkeypatch.setattr(torch._dynamo, "reset", lost)
    rows = _main(_benchmark(_own("unclosed", _Cyclic), _own("wrong", Wrong)), tmp_path)
    assert [row["median_ms"] != "" for row in rows] == [True, False]
    assert [row["error"] for row in rows] == ["", "ValueError: says more"]
    assert "unclosed: not closed: RuntimeError: CUDA error" in capsys.readouterr().out


def test_what_killed_the_process_is_not_tried_again(tmp_path: Path) -> None:
    code = f"""
import os, sys
from dataclasses import replace
from benchmarks import harness
from benchmarks.bench_contrastive import BENCHMARK
from benchmarks.cases import Case

deadly = harness.Provider("deadly", lambda case: os._exit(9), needs_cuda=False)
benchmark = replace(BENCHMARK, providers=(deadly,), sets={{"tiny": (Case(12, 8, "fp32"),)}})
arguments = ["--cases", "tiny", "--device", "cpu", "--commit", "abc", "--out", {str(tmp_path)!r}]
harness.main(benchmark, arguments)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=record.ROOT, check=False)
    assert done.returncode == 9
    assert record.read_rows(tmp_path / "contrastive.csv") == []
    # Here with a provider that would run.
    for _ in range(2):
        rows = _main(_benchmark(_own("deadly"), _own("next")), tmp_path)
        assert [row["provider"] for row in rows] == ["deadly", "next"]
        assert [row["error"] for row in rows] == [harness.HUNG, ""]


def test_a_lost_device_ends_the_process_at_once(tmp_path: Path) -> None:
    code = """
import atexit, os
from benchmarks import harness
atexit.register(os.abort)
print("the last line")
harness.finish({status})
"""
    for status in (harness.RESUME, 2):
        done = subprocess.run(
            [sys.executable, "-c", code.format(status=status)],
            cwd=record.ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.stdout == "the last line\n"
        assert (done.returncode == status) == (status == harness.RESUME)


def test_providers_that_are_slow_in_large_cases_are_left_out_there() -> None:
    for benchmark in (CONTRASTIVE, SIGMOID):
        slow = [p for p in benchmark.providers if p.name in ("reference", "inf-cl")]
        sizes = {case.pairs: {p.accepts(case) for p in slow} for case in benchmark.sets["ceiling"]}
        assert sizes == {131_072: {True}, 262_144: {False}, 524_288: {False}, 1_048_576: {False}}


def test_operands_that_do_not_fit_are_rows_too(tmp_path: Path) -> None:
    benchmark = replace(_benchmark(_own("plain")), operands=lambda *_: _out_of_memory(CASE))
    (row,) = _main(benchmark, tmp_path)
    assert row["error"] == "OOM: the operands alone"


def test_nan_is_an_error_and_not_a_small_one(tmp_path: Path) -> None:
    def poisoned(case: Case) -> Step:
        return lambda operands: Result(*(x * float("nan") for x in _plain(case)(operands)))  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]

    (row,) = _main(_benchmark(_own("poisoned", poisoned)), tmp_path)
    assert row["gradient_error"] == row["loss_error"] == "nan"


def test_a_lost_device_ends_the_run_after_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "alive", lambda device: False)
    benchmark = _benchmark(_own("first", _broken), _own("second"))
    arguments = ["--cases", "tiny", "--device", "cpu", "--out", str(tmp_path), "--commit", "abc"]
    assert harness.main(benchmark, arguments) == harness.RESUME
    assert len(record.read_rows(tmp_path / "contrastive.csv")) == 1


def test_absent_peers_are_named_with_the_command_that_installs_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = _own("peer", module="no_such_package", install="no-such-package==1")
    cuda = _own("gpu", needs_cuda=True)
    assert _main(_benchmark(absent, cuda, _own("plain")), tmp_path)[0]["provider"] == "plain"
    printed = capsys.readouterr().out
    assert "peer: not installed (pip install no-such-package==1)" in printed
    assert "gpu: needs a CUDA device" in printed


def test_reference_and_open_clip_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    for benchmark in (CONTRASTIVE, SIGMOID):
        arguments = ["--cases", "tiny", "--device", "cpu", "--seconds", "0.001"]
        arguments += ["--providers", "reference", "open_clip", "--out", str(tmp_path)]
        assert harness.main(benchmark, [*arguments, "--commit", "abc"]) == 0
        rows = record.read_rows(tmp_path / f"{benchmark.name}.csv")
        assert {row["provider"] for row in rows} == {"reference", "open_clip"}
        assert {row["error"] for row in rows} == {""}
        for row in rows:
            if row["part"] == "step" and row["world"] == "1":
                assert float(row["gradient_error"]) < 1e-5, row


def test_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plan", "--cases", "headline", "--out", str(tmp_path / "out")]
    assert harness.main(CONTRASTIVE, arguments) == 0
    assert "N=65536, D=768" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("definition", [losses.CONTRASTIVE, losses.SIGMOID])
def test_expectations_are_those_of_autograd_in_fp64(
    definition: Definition, normalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 4 * 21)
    monkeypatch.setattr(accuracy, "FULL_SAMPLE", 10)
    monkeypatch.setattr(accuracy, "SAMPLE", 7)
    case = Case(21, 8, "fp32", scale=20.0, normalize=normalize)
    operands = make_operands(case, definition.bias, CPU)
    image, text = operands.image, operands.text
    leaves = [x.detach().double().requires_grad_() for x in (image, text)]
    x, y = (F.normalize(leaf) if normalize else leaf * 1 for leaf in leaves)
    if definition.bias is None:
        oracle = clip_expected(x, y, 20.0)
    else:
        oracle = siglip_expected(x, y, 20.0, definition.bias)
    wanted = torch.autograd.grad((x, y), leaves, (oracle.d_image, oracle.d_text))
    expected = losses.expectation(definition, case, operands)
    assert expected.loss == pytest.approx(float(oracle.loss), rel=1e-12)
    assert expected.sample.tolist() == [0, 3, 6, 9, 12, 15, 18]
    errors = accuracy.errors(expected, oracle.loss, *wanted)
    assert errors.gradient is not None
    assert errors.gradient < 1e-12


def test_stripes_compute_rank_zeros_rows() -> None:
    """The stripe's gradient of its rows: with all columns' sums from those rows alone."""
    case = Case(24, 8, "fp32", world=4)
    operands = make_operands(case, None, CPU)
    by_name = {provider.name: provider for provider in CONTRASTIVE.providers}
    result = by_name["reference"].build(case)(operands)
    assert result.d_image is not None
    assert result.d_image.shape == (6, 8)
    assert result.d_image.isfinite().all()


def test_record_drops_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    rows = record.Record(path, ("a", "b"), ("a",))
    rows.write({"a": "x", "b": "two\nlines"})
    with path.open("a") as file:
        file.write("y,th")
    again = record.Record(path, ("a", "b"), ("a",))
    assert again.rows == [{"a": "x", "b": "two lines"}]
    assert again.has({"a": "x"})
    assert not again.has({"a": "y"})
    again.write({"a": "y"})
    assert list(csv.reader(path.open())) == [["a", "b"], ["x", "two lines"], ["y", ""]]


def test_a_cpu_is_named(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3 GHz\nflags\t: avx2\n")
    assert record.cpu_model(cpuinfo) == "Fast CPU @ 3 GHz"
    assert record.cpu_model(tmp_path / "absent") == platform.machine()
    name = record.device_name(CPU)
    assert name.startswith("cpu (")  # tables know a CPU's rows by it
    assert f"{record.cpu_model()}, {os.cpu_count()} cores, " in name


def test_a_gpus_state_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    versions, absent = record.gpu_state().splitlines()
    assert versions == f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    assert absent == "nvidia-smi: not found"
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *throttle*) echo no such field; exit 2;; esac\necho "$@"\n'
    )
    program.chmod(0o755)
    said = record.gpu_state().splitlines()[1]
    assert said.startswith("--query-gpu=name,driver_version,clocks.sm,")
    assert said.endswith(",clocks_event_reasons.active,memory.total --format=csv")


def test_record_refuses_other_columns(tmp_path: Path) -> None:
    record.Record(tmp_path / "rows.csv", ("a",), ("a",))
    with pytest.raises(ValueError, match="other columns"):
        record.Record(tmp_path / "rows.csv", ("a", "b"), ("a",))
    with pytest.raises(ValueError, match="no such columns: c"):
        record.Record(tmp_path / "rows.csv", ("a",), ("a",)).write({"a": 1, "c": 2})


def test_a_tree_without_git_must_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "git", lambda *_: None)
    arguments = ["--cases", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert harness.main(CONTRASTIVE, arguments) == 2
    assert "give --commit HASH" in capsys.readouterr().err
    assert record.stamp("abc", True, CPU).dirty


def test_cases_are_checked() -> None:
    with pytest.raises(ValueError, match="dtype is"):
        Case(8, 8, "int8")
    with pytest.raises(ValueError, match="world divides pairs"):
        Case(10, 8, world=4)
    for benchmark in (CONTRASTIVE, SIGMOID):
        assert set(benchmark.sets["small"]) <= set(benchmark.sets["all"])
        assert len(plan.table(benchmark.sets["all"], benchmark.variants, 800, 3)) > 0
