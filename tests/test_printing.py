"""What comes from data cannot move a terminal's cursor, forge a line or end the program."""

from __future__ import annotations

import logging

import pytest

from fastclip import cli
from fastclip.eval.table import columns
from fastclip.printing import printable, printable_lines


def test_control_characters_are_shown_as_unknown() -> None:
    hostile = "k\x1b]0;title\x07\n\r\t\u202e\udcff é–"
    assert printable(hostile) == "k�]0;title�   �� é–"
    assert printable_lines("a\n\tb\x1b\r") == "a\n\tb� "
    assert "\x1b" not in columns([["data set"], ["\x1b[31mred"]])


def test_the_log_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0  # sets up the log
    logging.getLogger("fastclip").warning("left out %s", "\x1b[31mred")
    assert capsys.readouterr().err == "left out �[31mred\n"


def test_errors_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "no\x1brun"]) == 1
    assert "\x1b" not in capsys.readouterr().err
