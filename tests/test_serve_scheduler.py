import math
import random
import sys
import threading
import time
import weakref
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest

from bundle.errors import BadInput
from serve.errors import Cancelled, Closed, DeadlineExceeded, QueueFull, TimedOut
from serve.scheduler import Job, Policy, Scheduler
from serve.statistics import Statistics

PATIENCE_S = 30  # after which a test has failed; none waits for that long


class Doubler:
    """Doubles; what is below zero cannot be decoded, the run fails with a 13 and the encoder with a 26."""

    name = "doubler"

    def __init__(self, *, blocked=False):
        self.blocked = blocked
        self.runs = []
        self.sizes = []
        self.threads = []
        self.entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def decode(self, arrays):
        value = int(arrays["x"][0])
        if value < 0:
            raise BadInput(f"{value} is below 0")
        return value

    def run(self, decoded, size):
        self.runs.append(list(decoded))
        self.sizes.append(size)
        self.threads.append(threading.current_thread())
        self.entered.release()
        if self.blocked:
            assert self._gate.acquire(timeout=PATIENCE_S)
        if 13 in decoded:
            raise RuntimeError("13")
        return [2 * value for value in decoded]

    def encode(self, result):
        if result == 52:
            raise RuntimeError("52")
        return {"y": np.array([result])}

    def await_run(self):
        """Return when one more run has begun."""
        assert self.entered.acquire(timeout=PATIENCE_S)

    def let_go(self):
        """Let all runs end, now and from now on."""
        self.blocked = False
        self._gate.release(1000)


class Asked:
    """A job and its outcome."""

    def __init__(self, value, *, rows=1, key="any", **options):
        self.outcome = Future()
        self.job = Job({"x": np.full(rows, value)}, rows, key, self.outcome.set_result, **options)

    def by(self, scheduler):
        scheduler.submit(self.job)
        return self

    def answer(self):
        outcome = self.outcome.result(PATIENCE_S)
        if isinstance(outcome, Exception):
            raise outcome
        return int(outcome["y"][0])


@pytest.fixture
def schedule():
    """Makes schedulers, and closes them."""
    made = []

    def make(model, **policy):
        scheduler = Scheduler(model, Policy(**policy), statistics := Statistics())
        made.append((model, scheduler))
        scheduler.snapshot = statistics.snapshot
        return scheduler

    yield make
    for model, scheduler in made:
        model.let_go()
        assert scheduler.close(PATIENCE_S)


@pytest.fixture
def busy(schedule):
    """Makes schedulers whose one instance is in a run, and the run's model."""

    def make(**policy):
        model = Doubler(blocked=True)
        scheduler = schedule(model, **policy)
        Asked(0, key=None).by(scheduler)
        model.await_run()
        return model, scheduler

    return make


def test_a_request_is_answered(schedule):
    """A request that comes alone runs at once, and its four stages follow one another."""
    asked = Asked(21)

    assert asked.by(schedule(Doubler(), max_batch=8)).answer() == 42

    times = asked.job.times
    assert 0 < times.queued <= times.started <= times.decoded <= times.ran <= times.ended


def test_requests_that_wait_are_joined(busy):
    """What came while the model ran is run together, in order, up to the rows that are allowed."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value).by(scheduler) for value in range(1, 7)]

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6, 8, 10, 12]
    assert model.runs == [[0], [1, 2, 3, 4], [5, 6]]


def test_rows_are_what_is_limited(busy):
    """A request that does not fit goes into the next run; one that is larger than the limit runs alone."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value, rows=rows).by(scheduler) for value, rows in [(1, 3), (2, 3), (3, 1), (4, 9)]]

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6, 8]
    assert model.runs == [[0], [1, 3], [2], [4]]


@pytest.mark.parametrize("keys", [("a", "b"), (None, None)])
def test_only_requests_of_one_key_are_joined(busy, keys):
    """Requests of different keys, or of none, run apart."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value, key=key).by(scheduler) for value, key in enumerate(keys, 1)]

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4]
    assert model.runs == [[0], [1], [2]]


def test_without_batching_every_request_runs_alone(busy):
    """A limit of one row joins nothing."""
    model, scheduler = busy()
    asked = [Asked(value).by(scheduler) for value in (1, 2)]

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4]
    assert model.runs == [[0], [1], [2]]


def test_a_batch_waits_for_its_delay(schedule):
    """With nobody else to join, a request runs alone when its delay is over, and not before."""
    asked = Asked(1).by(schedule(Doubler(), max_batch=4, max_delay_s=0.02))

    assert asked.answer() == 2
    assert asked.job.times.started - asked.job.times.queued >= 20_000_000


@pytest.mark.parametrize(
    ("policy", "values", "last"),
    [
        ({"max_batch": 3}, [1, 2, 3], {}),
        ({"max_batch": 8, "preferred": (4, 3)}, [1, 2, 3], {}),
        ({"max_batch": 8}, [1, 2], {"key": "other"}),
        ({"max_batch": 8}, [1, 2], {"rows": 8}),
        ({"max_batch": 8}, [1], {"key": None}),
        ({"max_batch": 8}, [1], {"timeout_s": 1000.0}),
    ],
    ids=["full", "preferred", "other key", "does not fit", "never joined", "would expire"],
)
def test_a_batch_does_not_wait_in_vain(schedule, policy, values, last):
    """Full, followed by what cannot join, or with a member that would not outlive it: the delay is cut short."""
    model = Doubler()
    scheduler = schedule(model, max_delay_s=10_000, **policy)
    *before, final = values

    asked = [Asked(value).by(scheduler) for value in before] + [Asked(final, **last).by(scheduler)]

    assert asked[0].answer() == 2


def test_runs_are_padded_to_the_next_size(busy):
    """A run is given the smallest allowed size that holds it, none if there is none, or without a batch axis."""
    model, scheduler = busy(max_batch=8, sizes=(2, 4))
    asked = [Asked(value, rows=rows, key=rows).by(scheduler) for value, rows in [(1, 2), (2, 3), (3, 5)]]
    asked.append(Asked(4, key=None).by(scheduler))

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6, 8]
    assert model.sizes == [None, 2, 4, None, None]


def test_instances_run_at_the_same_time(schedule):
    """Two instances are in two runs at once, and a third request waits."""
    model = Doubler(blocked=True)
    scheduler = schedule(model, instances=2)
    asked = [Asked(value).by(scheduler) for value in (1, 2, 3)]
    model.await_run()
    model.await_run()

    assert (scheduler.running, scheduler.pending) == (2, 1)

    model.let_go()
    assert [each.answer() for each in asked] == [2, 4, 6]


def test_what_is_left_is_run_by_another_instance(schedule):
    """A request that ends the wait of a batch that it cannot join runs beside it, not after it."""
    model = Doubler(blocked=True)
    scheduler = schedule(model, instances=2, max_batch=4, max_delay_s=10_000)
    asked = [Asked(1).by(scheduler)]
    assert Asked(0).by(schedule(Doubler(), max_batch=2, max_delay_s=0.02)).answer() == 0  # now both threads wait
    asked.append(Asked(2, rows=4).by(scheduler))

    model.await_run()
    model.await_run()

    model.let_go()
    assert [each.answer() for each in asked] == [2, 4]


def test_higher_priority_runs_first(busy):
    """1 is the highest; who asks for none has the default; on one level the order is that of arrival."""
    model, scheduler = busy(levels=3, default_level=2)
    asked = [Asked(10 * level + n, level=level).by(scheduler) for n, level in enumerate([3, 0, 1, 2, 3, 1])]

    model.let_go()

    assert [each.answer() for each in asked] == [60, 2, 24, 46, 68, 30]
    assert model.runs[1:] == [[12], [15], [1], [23], [30], [34]]


@pytest.mark.parametrize("level", [-1, 4, 2**63])
def test_a_priority_that_is_not_there_is_refused(schedule, level):
    """A level beyond the lowest is an error, and counted."""
    scheduler = schedule(Doubler(), levels=3, default_level=2)

    with pytest.raises(BadInput, match=rf"priority is {level}; expected 1 .* to 3"):
        Asked(1, level=level).by(scheduler)

    assert scheduler.snapshot().failures["bad_input"] == 1


def test_without_levels_priority_means_nothing(schedule):
    """A client may send a priority to a model that has none."""
    assert Asked(1, level=7).by(schedule(Doubler())).answer() == 2


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


def test_levels_may_have_policies_of_their_own(busy):
    """The length of the queue and its timeout are those of the level."""
    single = {2: Policy(max_queue=1), 3: Policy(timeout_s=0.01)}
    model, scheduler = busy(levels=3, default_level=1, by_level=single)
    asked = [Asked(value, level=level).by(scheduler) for value, level in [(1, 0), (2, 1), (3, 2)]]
    with pytest.raises(QueueFull):
        Asked(4, level=2).by(scheduler)
    with pytest.raises(TimedOut):
        Asked(5, level=3).by(scheduler).answer()

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6]


def test_expired_work_never_reaches_the_model(schedule):
    """A request whose deadline has passed already is dropped, whoever gets to it first, and counted."""
    model = Doubler()
    scheduler = schedule(model)
    inline = Asked(1, deadline=time.monotonic())
    assert scheduler.try_inline(inline.job, lambda: True)
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


def test_a_full_queue_refuses_at_once(busy):
    """One more than may wait is refused and counted; those that wait are answered."""
    model, scheduler = busy(max_queue=2)
    asked = [Asked(value).by(scheduler) for value in (1, 2)]

    with pytest.raises(QueueFull, match="Exceeds maximum queue size: 2 requests wait for model 'doubler'"):
        Asked(3).by(scheduler)

    model.let_go()
    assert [each.answer() for each in asked] == [2, 4]
    assert scheduler.snapshot().failures["rejected"] == 1


def test_free_instances_do_not_count_as_a_queue(schedule):
    """As many requests as there are instances and places are taken, however slowly the threads wake up."""
    model = Doubler(blocked=True)
    scheduler = schedule(model, max_queue=1, instances=3)
    asked = [Asked(value).by(scheduler) for value in (1, 2, 3, 4)]
    with pytest.raises(QueueFull):
        Asked(5).by(scheduler)

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6, 8]


def test_bad_input_fails_alone(busy):
    """What cannot be decoded is not part of the run, and the others are answered."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value).by(scheduler) for value in (1, -2, 3)]
    model.let_go()

    with pytest.raises(BadInput, match="-2 is below 0"):
        asked[1].answer()

    assert (asked[0].answer(), asked[2].answer()) == (2, 6)
    assert model.runs == [[0], [1, 3]]
    assert scheduler.snapshot().failures["bad_input"] == 1


def test_nobody_fails_for_a_neighbour(busy):
    """When a run fails with several requests, each runs alone, and only the culprit fails."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value).by(scheduler) for value in (1, 13, 3)]
    model.let_go()

    with pytest.raises(RuntimeError, match="13"):
        asked[1].answer()

    assert (asked[0].answer(), asked[2].answer()) == (2, 6)
    assert model.runs == [[0], [1, 13, 3], [1], [13], [3]]
    snapshot = scheduler.snapshot()
    assert (snapshot.requests, snapshot.runs, snapshot.failures["error"]) == (3, 3, 1)


def test_an_answer_that_cannot_be_encoded_fails_alone(busy):
    """The others of the run get theirs."""
    model, scheduler = busy(max_batch=4)
    asked = [Asked(value).by(scheduler) for value in (1, 26)]
    model.let_go()

    with pytest.raises(RuntimeError, match="52"):
        asked[1].answer()

    assert asked[0].answer() == 2


def test_a_model_that_loses_a_result_fails(schedule):
    """A run that does not give one result for each request is an error, never silence."""
    model = Doubler()
    model.run = lambda decoded, size: []

    with pytest.raises(AssertionError, match="0 results for 1 requests"):
        Asked(1).by(schedule(model)).answer()


def test_order_can_be_kept(schedule):
    """With preserve_order the first request is told its outcome first, though others end before it."""
    model = Doubler(blocked=True)
    scheduler = schedule(model, instances=2, preserve_order=True)
    told = []
    asked = [Asked(value) for value in (1, 2, 3)]
    for each in asked:
        each.outcome.add_done_callback(lambda outcome: told.append(outcome))
    asked[0].by(scheduler)
    model.await_run()
    for each in asked[1:]:
        each.by(scheduler)
    model.await_run()

    scheduler.cancel(asked[2].job)
    assert not asked[2].outcome.done()

    model.let_go()
    assert asked[1].answer() == 4
    with pytest.raises(Cancelled):
        asked[2].answer()
    assert told == [each.outcome for each in asked]


def test_closing_runs_what_waits(busy):
    """New requests are refused, those that wait are run without delay, and the threads end."""
    model, scheduler = busy(max_batch=4, max_delay_s=10_000, instances=2)
    threads = [thread for thread in threading.enumerate() if thread.name.endswith("-doubler")]
    asked = Asked(1, key="waits for others").by(scheduler)
    closing = Future()
    thread = threading.Thread(target=lambda: closing.set_result(scheduler.close(PATIENCE_S)))
    thread.start()
    model.let_go()

    assert asked.answer() == 2
    assert closing.result(PATIENCE_S)
    with pytest.raises(Closed):
        Asked(2).by(scheduler)
    assert not scheduler.try_inline(Asked(2).job, lambda: True)
    for each in [thread, *threads]:
        each.join(PATIENCE_S)
        assert not each.is_alive()
    assert scheduler.snapshot().failed == 0


def test_closing_ends_in_time(busy):
    """When the time to drain is over, those that wait are told so, and those that run go on."""
    model, scheduler = busy()
    asked = Asked(1).by(scheduler)

    assert not scheduler.close(0)

    with pytest.raises(Closed, match="'doubler' is being unloaded"):
        asked.answer()
    assert scheduler.running == 1
    model.let_go()
    assert scheduler.close(PATIENCE_S)
    assert (scheduler.snapshot().requests, scheduler.snapshot().failures["rejected"]) == (1, 1)


def test_closing_ends_threads_beside_an_inline_run(schedule):
    """A thread that waits for the inline run to end is not left behind."""
    model = Doubler(blocked=True)
    scheduler = schedule(model)
    inline = threading.Thread(target=scheduler.try_inline, args=(Asked(1).job, lambda: True))
    inline.start()
    model.await_run()
    before = set(threading.enumerate())
    asked = Asked(2).by(scheduler)
    started = set(threading.enumerate()) - before

    assert not scheduler.close(0.01)

    with pytest.raises(Closed):
        asked.answer()
    assert len(started) == 2
    for thread in started:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    model.let_go()
    inline.join(PATIENCE_S)


def test_a_caller_that_fails_harms_nobody(schedule):
    """An exception out of `done` is logged, and the next request is answered."""
    scheduler = schedule(Doubler())
    failing = Job({"x": np.array([1])}, 1, None, lambda outcome: 1 / 0)

    scheduler.submit(failing)

    assert Asked(2).by(scheduler).answer() == 4


def test_done_may_use_the_scheduler(schedule):
    """`done` is called outside of every lock: it may submit, cancel and count."""
    scheduler = schedule(Doubler())
    second = Asked(2)

    def done(outcome):
        second.by(scheduler)
        scheduler.cancel(job)
        assert scheduler.running

    job = Job({"x": np.array([1])}, 1, None, done)
    scheduler.submit(job)

    assert second.answer() == 4


def test_inline_runs_in_the_callers_thread(schedule):
    """An idle model runs a job without a thread, and counts it as any other."""
    model = Doubler()
    scheduler = schedule(model, max_batch=4)
    asked = Asked(1)

    assert scheduler.try_inline(asked.job, lambda: True)

    assert asked.outcome.done()
    assert model.threads == [threading.current_thread()]
    assert (scheduler.snapshot().requests, scheduler.running, scheduler.pending) == (1, 0, 0)


def test_inline_refuses_unless_the_model_is_idle(busy, schedule):
    """A job that would wait for an instance, for others in the queue, or for others to join is left untouched."""
    _, taken = busy()
    delaying = schedule(Doubler(), max_batch=4, max_delay_s=10_000)

    assert not taken.try_inline(Asked(1).job, lambda: True)
    assert not delaying.try_inline(Asked(1).job, lambda: True)
    assert delaying.try_inline(Asked(1, key=None).job, lambda: True)
    Asked(1).by(delaying)
    assert not delaying.try_inline(Asked(1, key=None).job, lambda: True)


@pytest.mark.parametrize(
    ("ns", "runs"), [(10_000, [[0], [1, 2, 3]]), (2_000_000, [[0], [1], [2], [3]]), (None, [[0], [1], [2], [3]])]
)
def test_where_the_policy_says_so_only_short_requests_are_joined(busy, ns, runs):
    """Those of which nobody knows how long they take run alone, as do long ones."""
    model, scheduler = busy(max_batch=4, joins_short=True)
    for _ in range(16 if ns else 0):
        scheduler._pace.saw(1, ns)
    asked = [Asked(value).by(scheduler) for value in (1, 2, 3)]
    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6]
    assert model.runs == runs


def test_a_long_inline_run_asks_its_thread_to_step_aside(schedule):
    """Nobody knows how long the first takes: its thread is asked, and where it cannot, the job is left untouched."""
    model = Doubler()
    scheduler = schedule(model)

    assert not scheduler.try_inline(Asked(1).job, lambda: False)

    assert (model.runs, scheduler.running) == ([], 0)
    for _ in range(16):
        assert scheduler.try_inline(Asked(1).job, lambda: True)
    assert scheduler.try_inline(Asked(1).job, lambda: pytest.fail("it is known to be short"))


class Pair(Doubler):
    """With a second way to run, which is there from the second time that it is asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.asked = 0
        self.beside_runs = []

    def beside(self):
        self.asked += 1
        return self._run_beside if self.asked > 1 else None

    def _run_beside(self, decoded, size):
        self.beside_runs.append(list(decoded))
        return self.run(decoded, size)


def test_a_request_without_company_takes_all_instances(schedule):
    """One after the other they run with all threads, and the second way is never asked for."""
    model = Pair()
    scheduler = schedule(model, instances=2, splits=True)

    for value in range(4):
        assert Asked(value).by(scheduler).answer() == 2 * value

    assert (model.asked, model.beside_runs) == (0, [])


def test_requests_with_company_run_side_by_side(schedule):
    """One that comes while another runs waits for it; from then on two run at once, one thread each."""
    model = Pair(blocked=True)
    model.asked = 1
    scheduler = schedule(model, instances=2, splits=True)
    first = Asked(0, key=None).by(scheduler)
    model.await_run()
    others = [Asked(value, key=None).by(scheduler) for value in (1, 2, 3)]

    assert (scheduler.running, scheduler.pending) == (1, 3)
    model.let_go()
    model.blocked = True
    for _ in others[:2]:
        model.await_run()
    model.let_go()

    assert [each.answer() for each in (first, *others)] == [0, 2, 4, 6]
    assert sorted(model.beside_runs) == [[1], [2], [3]]


def test_while_there_is_no_second_way_runs_take_turns(schedule):
    """All threads, one run at a time; then side by side."""
    model = Pair(blocked=True)
    scheduler = schedule(model, instances=2, splits=True)
    asked = [Asked(0, key=None).by(scheduler)]
    model.await_run()
    asked += [Asked(value, key=None).by(scheduler) for value in (1, 2)]
    model._gate.release()
    model.await_run()

    assert (scheduler.running, scheduler.pending, model.beside_runs) == (1, 1, [])
    model.let_go()
    assert [each.answer() for each in asked] == [0, 2, 4]
    assert model.beside_runs == [[2]]


def test_an_inline_run_takes_an_instance(schedule):
    """Meanwhile a queued job waits, and it runs as soon as the inline run has ended."""
    model = Doubler(blocked=True)
    scheduler = schedule(model)
    thread = threading.Thread(target=scheduler.try_inline, args=(Asked(1).job, lambda: True))
    thread.start()
    model.await_run()
    asked = Asked(2).by(scheduler)
    cancelled = Asked(3, timeout_s=0.01).by(scheduler)
    with pytest.raises(TimedOut):
        cancelled.answer()

    assert scheduler.pending == 1
    model.let_go()
    assert asked.answer() == 4
    thread.join(PATIENCE_S)


def test_an_idle_scheduler_holds_no_request(schedule):
    """When a request has ended nothing keeps its arrays: not the threads that wait for the next."""
    scheduler = schedule(Doubler(), max_batch=4)
    asked = Asked(1, deadline=time.monotonic() + 1000).by(scheduler)
    array = weakref.ref(asked.job.arrays["x"])
    assert asked.answer() == 2
    del asked

    assert Asked(2).by(scheduler).answer() == 4

    assert array() is None


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_overtaken_for_ever(busy, seed):
    """Whatever joins what, a request waits for no more runs than there were requests before it."""
    chance = random.Random(seed)
    model, scheduler = busy(max_batch=5)
    asked = [Asked(n, rows=chance.randrange(1, 7), key=chance.choice("abc")).by(scheduler) for n in range(100, 160)]

    model.let_go()

    assert [each.answer() for each in asked] == [2 * n for n in range(100, 160)]
    before = {value: number for number, run in enumerate(model.runs[1:]) for value in run}
    assert all(before[100 + place] <= place for place in range(60))
    assert len(model.runs) < 50


@pytest.fixture
def hectic():
    """Threads are interrupted a hundred times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


class Sender:
    """Sends jobs of every kind from a thread of its own, 20 at a time, and keeps account."""

    def __init__(self, scheduler, seed):
        self.taken, self.told = [], []
        self.refused = Counter()
        self._scheduler = scheduler
        self._chance = random.Random(seed)
        self._slots = threading.Semaphore(20)
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def _send(self):
        for number in range(700):
            assert self._slots.acquire(timeout=PATIENCE_S)
            job = self._job(number)
            try:
                if not (self._chance.random() < 0.1 and self._scheduler.try_inline(job, lambda: True)):
                    self._scheduler.submit(job)
                self.taken.append(number)
            except (QueueFull, BadInput, Closed) as error:
                self.refused[type(error)] += 1
                self._slots.release()
            if self._chance.random() < 0.2:
                self._scheduler.cancel(job)

    def _job(self, number):
        def done(outcome):
            self.told.append(number)
            self._slots.release()

        chance = self._chance
        return Job(
            {"x": np.array([chance.choice([1, 2, 3, 13, 26, -1])])},
            rows=chance.randrange(1, 4),
            key=chance.choice(["a", "b", None]),
            done=done,
            level=chance.choice([0, 1, 2, 3, 4]),
            timeout_s=chance.choice([None, 0.002]),
            deadline=chance.choice([None, time.monotonic() + chance.choice([0.0005, 5])]),
        )


@pytest.mark.parametrize(
    "policy",
    [{"max_batch": 4, "max_delay_s": 0.001, "instances": 2}, {"delays_timed_out": True}, {"preserve_order": True}],
    ids=["batches", "delays", "order"],
)
def test_every_request_ends_exactly_once(schedule, hectic, policy):
    """Whatever is cancelled, expires, fails or is cut off by the end: one outcome each, and the counts add up."""
    options = {"max_batch": 3, "instances": 3, "max_queue": 30, "levels": 3, "default_level": 2} | policy
    scheduler = schedule(Doubler(), **options)
    senders = [Sender(scheduler, seed) for seed in range(3)]
    senders[0].thread.join(PATIENCE_S)

    scheduler.close(0)
    for sender in senders:
        sender.thread.join(PATIENCE_S)
    assert scheduler.close(PATIENCE_S)

    for sender in senders:
        assert sorted(sender.told) == sender.taken
        assert not policy.get("preserve_order") or sender.told == sender.taken
    snapshot = scheduler.snapshot()
    assert snapshot.requests > 50
    assert snapshot.failures["cancelled"] > 10
    assert snapshot.requests + snapshot.failed == sum(
        len(sender.taken) + sender.refused[QueueFull] + sender.refused[BadInput] for sender in senders
    )
