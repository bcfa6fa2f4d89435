"""Events: what is told of them, to whom."""

import json
import sys

import pytest

from bundle.log import captured, configure, log


@pytest.fixture(autouse=True)
def _as_before():
    """What these tests configure ends with them."""
    yield
    configure()


def test_what_is_bound_is_in_every_event():
    """A field that is said again replaces the bound one; the log that was bound stays as it was."""
    told = log.bind(model="a", version=1)
    with captured() as events:
        told.info("loaded", version=2)
        log.warning("slow")

    assert events == [
        {"event": "loaded", "level": "info", "model": "a", "version": 2},
        {"event": "slow", "level": "warning"},
    ]


def test_a_text_from_elsewhere_makes_no_field_and_no_line_of_its_own(capsys):
    """Whatever is no plain word is shown as Python writes it."""
    configure()
    log.info("request", id="a level=error\nready", path="/tmp/x")

    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(r"id='a level=error\nready' path=/tmp/x")


def test_what_is_not_wanted_is_not_told_but_captured(capsys):
    """A level that is switched off reaches nobody; a test sees every event."""
    configure(wanted=lambda level: level == "error")
    log.info("started")
    log.error("failed")
    with captured() as events:
        log.info("started")

    assert capsys.readouterr().err.count("\n") == len(events) == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_an_exception_is_told_with_its_traceback(capsys, as_json):
    """The one that is being handled, without being named."""
    configure(json=as_json)
    try:
        raise ValueError("of this")
    except ValueError:
        log.exception("not loaded")

    assert "ValueError: of this" in capsys.readouterr().err


def test_what_json_cannot_hold_is_written_as_python_writes_it(capsys):
    """No value makes a line fail."""
    configure(json=True)
    log.info("ready", kinds={1j})

    assert json.loads(capsys.readouterr().err)["kinds"] == "{1j}"


def test_a_terminal_has_colours_and_a_file_has_none(capsys, monkeypatch):
    """Escape sequences in a file are noise."""
    log.info("ready")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.info("ready")

    file, terminal = capsys.readouterr().err.splitlines()
    assert ("\x1b" in file, "\x1b" in terminal) == (False, True)
