"""How much is let in at the same time."""

import threading

import pytest

from serve.admission import Admission, Traffic
from serve.errors import Exhausted


@pytest.fixture
def admission():
    return Admission(max_bytes=100, max_streams=2)


def test_bytes_are_let_in_up_to_the_limit(admission):
    """The last byte that may be in work is let in, the next one is not, and what ended makes room."""
    with admission.request(60), admission.request(40):
        assert admission.snapshot().bytes == 100
        with pytest.raises(Exhausted, match="100 are in work"):
            admission.request(1)
        admission.request(0)

    admission.request(100)


def test_a_refused_request_is_counted_and_holds_nothing(admission):
    """What was refused leaves the bytes in work as they were."""
    admission.request(60)
    for _ in range(3):
        with pytest.raises(Exhausted):
            admission.request(41)

    counts = admission.snapshot()
    assert counts == Traffic(requests=1, bytes=60, streams=0, refused={"bytes": 3, "streams": 0})


def test_a_request_that_can_never_be_let_in_is_told_so(admission):
    """Trying again would not help one that is larger than all that may be in work."""
    with pytest.raises(Exhausted, match="smaller"):
        admission.request(101)


def test_streams_are_counted_by_themselves(admission):
    """Bytes in work leave room for streams, and streams are refused beyond their own limit."""
    admission.request(100)
    with admission.stream(), admission.stream():
        with pytest.raises(Exhausted, match="2 streams"):
            admission.stream()
        assert admission.snapshot().streams == 2

    assert admission.snapshot().streams == 0
    assert admission.snapshot().refused["streams"] == 1


def test_a_failing_request_gives_its_bytes_back(admission):
    """An exception ends a hold as the end of the call does."""
    with pytest.raises(ValueError, match="failed"), admission.request(100):
        raise ValueError("failed")

    assert admission.snapshot().bytes == 0


def test_a_hold_is_released_once(admission):
    """A callback and the end of the block may both release it."""
    hold = admission.request(30)
    with hold:
        hold.release()
    hold.release()

    assert admission.snapshot() == Admission(100, 2).snapshot()


def test_threads_never_hold_more_than_the_limit():
    """However many threads ask, the sum of what they hold stays within the limit and ends at nothing."""
    admission = Admission(max_bytes=3, max_streams=1)
    most = []

    def ask():
        for _ in range(300):
            try:
                with admission.request(1):
                    most.append(admission.snapshot().bytes)
            except Exhausted:
                pass

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert max(most) <= 3
    counts = admission.snapshot()
    assert (counts.requests, counts.bytes) == (0, 0)
    assert len(most) + counts.refused["bytes"] == 6 * 300
