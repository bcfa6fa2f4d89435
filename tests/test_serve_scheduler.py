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
from serve.errors import Cancelled, Closed, QueueFull, TimedOut
from serve.queue import Job, Policy
from tests.scheduling import PATIENCE_S, Asked, Doubler


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


def test_a_full_queue_refuses_at_once(busy):
    """One more than may wait is refused and counted; those that wait are answered."""
    model, scheduler = busy(max_queue=2)
    asked = [Asked(value).by(scheduler) for value in (1, 2)]

    with pytest.raises(QueueFull, match="Exceeds maximum queue size: 2 requests wait for model 'doubler'"):
        Asked(3).by(scheduler)

    model.let_go()
    assert [each.answer() for each in asked] == [2, 4]
    assert scheduler.snapshot().failures["rejected"] == 1


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
    assert not scheduler.try_inline(Asked(2).job, lambda short: True)
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
    inline = threading.Thread(target=scheduler.try_inline, args=(Asked(1).job, lambda short: True))
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
                if not (self._chance.random() < 0.1 and self._scheduler.try_inline(job, lambda short: True)):
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
