import threading

import pytest

from score.ahead import ahead


def test_items_come_in_their_order():
    """All of them, whichever stage is the slower."""
    assert list(ahead(ahead(iter(range(1000)), 1, "a"), 3, "b")) == list(range(1000))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_are_made_than_there_is_room_for(depth):
    """What nobody takes is not made: memory stays flat."""
    made, enough = [], threading.Event()

    def make():
        for number in range(100):
            made.append(number)
            if number + 1 == depth:
                enough.set()
            yield number

    items = ahead(make(), depth, "make")
    assert next(items) == 0
    assert enough.wait(10) or depth == 1
    items.close()
    assert len(made) <= depth + 1


def test_the_next_item_is_made_while_the_last_one_is_worked_on():
    """Stages overlap, also where only one item may wait."""
    again = threading.Event()

    def make():
        yield 1
        again.set()
        yield 2

    items = ahead(make(), 1, "make")
    assert next(items) == 1
    assert again.wait(10)
    assert list(items) == [2]


def test_an_error_arrives_after_the_items_before_it():
    """With the traceback of the thread that it was raised in."""

    def make():
        yield 1
        raise ZeroDivisionError("in the thread")

    items = ahead(ahead(make(), 2, "a"), 2, "b")
    assert next(items) == 1
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        next(items)


def test_closing_closes_every_stage():
    """Files are closed and threads have ended before the next statement."""
    closed = []

    def make():
        try:
            yield from range(1000)
        finally:
            closed.append(threading.current_thread().name)

    items = ahead(ahead(make(), 2, "first"), 2, "second")
    next(items)
    items.close()

    assert closed == ["first"]
    assert not {thread.name for thread in threading.enumerate()} & {"first", "second"}


def test_a_source_that_waits_does_not_hold_up_closing():
    """Units may be long in coming; whoever stops does not wait for the next."""
    go, ended = threading.Event(), threading.Event()

    def make():
        yield 1
        go.wait(30)
        ended.set()
        yield 2

    items = ahead(make(), 2, "make", join=False)
    assert next(items) == 1
    items.close()
    assert not ended.is_set()
    go.set()
    assert ended.wait(30)
