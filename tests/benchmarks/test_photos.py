"""Photographs that cannot be fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import bench_loader, photos


def test_without_a_network_it_is_said_what_to_bring_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(package: object, downloads: Path) -> Path:
        raise ValueError("apt-get download failed")

    monkeypatch.setattr(photos, "unpack", offline)
    monkeypatch.setattr(bench_loader.torch, "set_num_threads", lambda threads: None)
    arguments = ["--work", str(tmp_path), "--out", str(tmp_path), "--commit", "abc"]
    assert bench_loader.main(arguments) == 2
    said = capsys.readouterr().err
    assert "apt-get download failed" in said
    assert f"bring {tmp_path / 'downloads'} along" in said
