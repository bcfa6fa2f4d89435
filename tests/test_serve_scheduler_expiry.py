import math
import time

import pytest

from serve.errors import Cancelled, DeadlineExceeded, TimedOut
from tests.scheduling import Asked, Doubler


@pytest.mark.parametrize(
    ("policy", "own"),
    [
        ({"timeout_s": 0.01}, None),
        ({"timeout_s": 0.01}, 1000.0),
        ({"timeout_s": 1000.0}, 0.01),
        ({}, 0.01),
        ({"timeout_s": 0.01, "timeout_override": False}, 1000.0),
    ],
)
def test_a_queue_timeout_is_noticed_while_the_model_runs(busy, policy, own):
    """The shorter of the policy's and the request's own timeout holds, and nothing needs to end for it."""
    model, scheduler = busy(**policy)

    with pytest.raises(TimedOut, match="Request timeout expired"):
        Asked(1, timeout_s=own).by(scheduler).answer()

    assert model.blocked
    assert scheduler.pending == 0
    assert scheduler.snapshot().failures["timeout"] == 1


def test_a_request_cannot_lengthen_or_add_a_timeout_that_is_not_its_to_set(busy):
    """Without the override its own timeout is not looked at."""
    model, scheduler = busy(timeout_override=False)
    asked = Asked(1, timeout_s=1e-6).by(scheduler)
    with pytest.raises(TimedOut):  # of another model, later than 1 µs
        Asked(1, timeout_s=0.01).by(busy()[1]).answer()

    model.let_go()

    assert asked.answer() == 2


def test_an_earlier_deadline_is_noticed_before_a_later_one(busy):
    """Whoever sleeps for the first deadline wakes for one that came later and ends earlier."""
    _, scheduler = busy()
    later = Asked(1, deadline=time.monotonic() + 1000).by(scheduler)
    with pytest.raises(TimedOut):  # so it is slept for
        Asked(2, timeout_s=0.01).by(scheduler).answer()

    with pytest.raises(DeadlineExceeded, match="nothing was run"):
        Asked(3, deadline=time.monotonic() + 0.01).by(scheduler).answer()

    assert not later.outcome.done()


def test_what_timed_out_may_be_delayed_instead(busy):
    """It runs after all that have not timed out, and before what is on a lower level."""
    model, scheduler = busy(levels=2, default_level=1, delays_timed_out=True)
    delayed = Asked(1, timeout_s=0.001).by(scheduler)
    others = [Asked(2).by(scheduler), Asked(3, level=2).by(scheduler)]
    with pytest.raises(DeadlineExceeded):  # later than the timeout
        Asked(4, timeout_s=0.001, deadline=time.monotonic() + 0.02).by(scheduler).answer()

    model.let_go()

    assert [each.answer() for each in [delayed, *others]] == [2, 4, 6]
    assert model.runs == [[0], [2], [1], [3]]


def test_expired_work_never_reaches_the_model(schedule):
    """A request whose deadline has passed already is dropped, whoever gets to it first, and counted."""
    model = Doubler()
    scheduler = schedule(model)
    inline = Asked(1, deadline=time.monotonic())
    assert scheduler.try_inline(inline.job, lambda short: True)
    queued = Asked(2, deadline=time.monotonic()).by(scheduler)

    for each in (inline, queued):
        with pytest.raises(DeadlineExceeded):
            each.answer()

    assert Asked(3).by(scheduler).answer() == 6
    assert model.runs == [[3]]
    assert scheduler.snapshot().failures["deadline"] == 2


def test_a_deadline_that_passes_while_decoding_drops_the_request_alone(busy):
    """What is late after decoding is not part of the run; its neighbours are."""
    model, scheduler = busy(max_batch=4)
    late, well = Asked(1, deadline=time.monotonic() + 1000), Asked(2)
    decode = model.decode

    def slow_decode(arrays):
        late.job.deadline = 0.0  # as if it had taken that long
        return decode(arrays)

    model.decode = slow_decode
    late.by(scheduler)
    well.by(scheduler)

    model.let_go()

    assert well.answer() == 4
    with pytest.raises(DeadlineExceeded):
        late.answer()
    assert model.runs == [[0], [2]]


def test_a_delay_that_no_clock_will_reach_ends_with_a_full_batch(schedule, busy):
    """Who waits for the first request's company is there when it comes."""
    scheduler = schedule(Doubler(), max_batch=2, max_delay_s=1e13)
    first = Asked(1).by(scheduler)
    with pytest.raises(TimedOut):  # of another model, later than the wait for company begins
        Asked(2, timeout_s=0.01).by(busy()[1]).answer()

    second = Asked(3).by(scheduler)

    assert (first.answer(), second.answer()) == (2, 6)


@pytest.mark.parametrize("options", [{"deadline": math.inf}, {"deadline": 1e300}, {"timeout_s": 2**63 / 1e6}])
def test_times_that_no_clock_will_reach_are_no_limit(busy, options):
    """Requests with absurd deadlines and timeouts are answered, and the others' are still noticed."""
    model, scheduler = busy()
    asked = Asked(1, **options).by(scheduler)
    with pytest.raises(TimedOut):
        Asked(2, timeout_s=0.01).by(scheduler).answer()

    model.let_go()

    assert asked.answer() == 2


def test_a_request_that_waits_can_be_cancelled(busy):
    """It ends at once, is counted, and its neighbours run without it; once is enough."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value).by(scheduler) for value in (1, 2, 3)]
    for _ in range(2):
        scheduler.cancel(asked[1].job)

    with pytest.raises(Cancelled):
        asked[1].answer()

    model.let_go()
    assert (asked[0].answer(), asked[2].answer()) == (2, 6)
    assert model.runs == [[0], [1, 3]]
    assert scheduler.snapshot().failures["cancelled"] == 1


def test_a_request_that_runs_or_has_ended_is_not_cancelled(schedule):
    """Then cancelling does nothing."""
    model = Doubler(blocked=True)
    scheduler = schedule(model)
    asked = Asked(1).by(scheduler)
    model.await_run()

    scheduler.cancel(asked.job)
    model.let_go()

    assert asked.answer() == 2
    scheduler.cancel(asked.job)
    assert scheduler.snapshot().failed == 0
