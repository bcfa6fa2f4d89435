"""How long a request is expected to take."""

import math

import pytest

from serve.pace import Pace

SHORT = 50_000


@pytest.fixture
def known():
    pace = Pace()
    for _ in range(16):
        pace.saw(100, SHORT)
    return pace


def test_nothing_is_expected_of_the_first_requests():
    """Before a few have been seen, any may take for ever."""
    assert Pace().expect_ns(1) == math.inf


def test_a_request_is_expected_to_take_as_long_as_those_before(known):
    """Of their size; a larger one takes longer in proportion, a smaller one no less."""
    assert known.expect_ns(100) == known.expect_ns(1) == SHORT
    assert known.expect_ns(400) == 4 * SHORT


def test_what_was_held_up_does_not_count(known):
    """Up to three of four requests may have waited for a core, and the expectation stays."""
    for _ in range(11):
        known.saw(100, 40 * SHORT)

    assert known.expect_ns(100) == SHORT


def test_a_model_that_has_become_slow_is_found_out(known):
    """After as many slow requests as are looked at."""
    for _ in range(16):
        known.saw(100, 40 * SHORT)

    assert known.expect_ns(100) == 40 * SHORT


def test_after_a_long_request_nothing_is_expected_for_a_while(known):
    """Time may depend on what is in a tensor, and one such request must not be followed by a row of them."""
    known.saw(100, 40_000_000)
    for _ in range(250):
        assert known.expect_ns(100) == math.inf
        known.saw(100, SHORT)
    for _ in range(4):
        known.saw(100, SHORT)

    assert known.expect_ns(100) == SHORT
