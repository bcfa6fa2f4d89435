import threading

import pytest

from serve.errors import QueueFull, TimedOut
from tests.scheduling import PATIENCE_S, Asked, Doubler


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


def test_free_instances_do_not_count_as_a_queue(schedule):
    """As many requests as there are instances and places are taken, however slowly the threads wake up."""
    model = Doubler(blocked=True)
    scheduler = schedule(model, max_queue=1, instances=3)
    asked = [Asked(value).by(scheduler) for value in (1, 2, 3, 4)]
    with pytest.raises(QueueFull):
        Asked(5).by(scheduler)

    model.let_go()

    assert [each.answer() for each in asked] == [2, 4, 6, 8]


def test_inline_runs_in_the_callers_thread(schedule):
    """An idle model runs a job without a thread, and counts it as any other."""
    model = Doubler()
    scheduler = schedule(model, max_batch=4)
    asked = Asked(1)

    assert scheduler.try_inline(asked.job, lambda short: True)

    assert asked.outcome.done()
    assert model.threads == [threading.current_thread()]
    assert (scheduler.snapshot().requests, scheduler.running, scheduler.pending) == (1, 0, 0)


def test_inline_refuses_unless_the_model_is_idle(busy, schedule):
    """A job that would wait for an instance, for others in the queue, or for others to join is left untouched."""
    _, taken = busy()
    delaying = schedule(Doubler(), max_batch=4, max_delay_s=10_000)

    assert not taken.try_inline(Asked(1).job, lambda short: True)
    assert not delaying.try_inline(Asked(1).job, lambda short: True)
    assert delaying.try_inline(Asked(1, key=None).job, lambda short: True)
    Asked(1).by(delaying)
    assert not delaying.try_inline(Asked(1, key=None).job, lambda short: True)


def test_a_long_inline_run_asks_its_thread_to_step_aside(schedule):
    """Nobody knows how long the first takes: its thread is asked, and where it cannot, the job is left untouched."""
    model = Doubler()
    scheduler = schedule(model)

    assert not scheduler.try_inline(Asked(1).job, lambda short: False)

    assert (model.runs, scheduler.running) == ([], 0)
    for _ in range(16):
        assert scheduler.try_inline(Asked(1).job, lambda short: True)
    assert scheduler.try_inline(Asked(1).job, lambda short: short)


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
    thread = threading.Thread(target=scheduler.try_inline, args=(Asked(1).job, lambda short: True))
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
