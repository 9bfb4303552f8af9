"""The peers and the table of cases that the tokenizer's tests share."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent


class Case(NamedTuple):
    category: str
    text: str
    expected: dict[str, Any]


class CaseTable(NamedTuple):
    versions: dict[str, str]
    cases: list[Case]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tokenizer_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def strip_vocabulary() -> ModuleType:
    return _script("strip_vocabulary")


@pytest.fixture(scope="session")
def case_table() -> CaseTable:
    table = json.loads((HERE / "cases.json").read_text())
    cases = []
    for record in table["cases"]:
        text = record.get("text")
        if text is None:
            text = "".join(map(chr, record["code_points"]))
        cases.append(Case(record["category"], text, record))
    return CaseTable(table["versions"], cases)


@pytest.fixture(scope="session")
def open_clip() -> ModuleType:
    """open_clip's tokenizer module."""
    module = _script("generate_cases").load_open_clip()
    if module is None:
        pytest.skip("open_clip is not installed, so there is no live tokenizer to compare with")
    return module


@pytest.fixture(scope="session")
def peer(open_clip: ModuleType) -> Any:
    """open_clip's tokenizer, the same code as OpenAI's but for the special tokens' spelling."""
    return open_clip.SimpleTokenizer()
