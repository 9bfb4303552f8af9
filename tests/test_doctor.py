"""The report is complete without anything but torch, and says what is missing."""

from __future__ import annotations

import pytest

from fastclip import doctor as module
from fastclip.doctor import doctor, format_report, version_of


def test_report_names_versions_devices_and_parts() -> None:
    report = doctor()
    names = {finding.name for finding in report.versions}
    assert {"fastclip", "python", "torch", "triton", "deepspeed", "nvidia-dali-cuda130"} <= names
    parts = {finding.name: finding for finding in report.parts}
    assert {"losses", "training engine", "tokenizer", "image decoding"} <= set(parts)
    assert all(finding.note for finding in report.parts)
    text = format_report(report)
    assert text.count("\n\n") == 2
    assert f"{version_of('torch')}" in text


def test_missing_parts_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version_of", lambda name: None)

    def missing() -> list[str]:
        raise FileNotFoundError("install npm")

    monkeypatch.setattr(module, "npm_command", missing)
    parts = {finding.name: finding for finding in doctor().parts}
    assert "pip install" in parts["training engine"].note
    assert parts["demo data"].note == "install npm"
    assert "not installed" in format_report(doctor())
