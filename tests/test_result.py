"""How a command gives its result to people."""

import sys
from io import StringIO

import pytest
from rich.rule import Rule

from edgeward.result import give


class Terminal(StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 200])
@pytest.mark.parametrize(("out", "shown"), [(StringIO, lambda columns: 120), (Terminal, lambda columns: columns)])
def test_a_terminal_gets_its_own_width_and_all_else_120_columns(monkeypatch, columns, out, shown):
    """A table fits into a narrow terminal, and uses a wide one; a log or a pipe is the same on every machine."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out())

    give(None, Rule(), json=False)

    assert sys.stdout.getvalue().count("─") == shown(columns)
