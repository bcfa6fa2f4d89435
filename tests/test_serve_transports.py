"""Calls as gRPC makes them, on the completion queue and on asyncio: given up, late, streamed, watched, cut off."""

import gc
import math
import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from bundle.log import captured
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc
from serve import answering, completion_queue, logs, pace, scheduler, wire
from serve import call as serve_call
from serve.client import Client
from serve.config import ServeConfig
from serve.errors import Cancelled, StartError
from serve.server import start
from tests.serve_bundles import counter, has_to_wait, identity

PATIENCE_S = 30
METHOD = "/inference.GRPCInferenceService/ModelInfer"


class Gate:
    """Stands in a model's way: each run says that it began, in which thread, and waits until it may go on."""

    def __init__(self, served):
        self.began = queue.Queue()
        self.opened = threading.Event()
        run = served.model.run

        def held(decoded, size):
            self.began.put(threading.current_thread().name)
            assert self.opened.wait(PATIENCE_S)
            return run(decoded, size)

        object.__setattr__(served.model, "run", held)


@pytest.fixture(params=["auto", "asyncio"])
def transport(request):
    return request.param


@pytest.fixture
def server(transport, tmp_path):
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    server = start(
        ServeConfig(
            (path,), port=0, device="cpu", threads=1, instances=1, max_streams=2, admin=True, transport=transport
        )
    )
    yield server
    if server._ready:
        server.stop(drain_s=0)


@pytest.fixture
def served(server):
    return server._repository.find("echo", "")


@pytest.fixture
def gate(served):
    gate = Gate(served)
    yield gate
    gate.opened.set()


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.address) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def echo(value=0.0, name="", rows=1):
    request = pb.ModelInferRequest(model_name="echo", id=name)
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 2])
    request.raw_input_contents.append(np.float32([value, value] * rows).tobytes())
    return request


def until(holds):
    """Wait for what no event tells."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


def failed(served, reason):
    return served.statistics.snapshot().failures[reason]


def idle(server):
    now = server._admission.snapshot()
    return (now.requests, now.bytes, now.streams) == (0, 0, 0)


def test_a_call_that_is_given_up_while_it_waits_is_not_run(server, stub, served, gate):
    """It is dropped at once, its bytes are in work no more, and the call that runs is answered."""
    running = stub.ModelInfer.future(echo(1))
    gate.began.get(timeout=PATIENCE_S)
    waiting = stub.ModelInfer.future(echo(2))
    until(lambda: served.scheduler.pending == 1)

    waiting.cancel()

    until(lambda: failed(served, "cancelled") == 1)
    gate.opened.set()
    assert running.result(PATIENCE_S).raw_output_contents[0] == np.float32([1, 1]).tobytes()
    assert gate.began.empty()
    until(lambda: idle(server))


def test_a_call_that_is_given_up_while_it_waits_has_been_in_no_stage(stub, served, gate, monkeypatch):
    """Logs and traces tell of a stage only when it began and ended."""
    told = queue.Queue()
    monkeypatch.setattr(logs, "logs_requests", lambda: True)
    monkeypatch.setattr(logs, "log_request", told.put)
    running = stub.ModelInfer.future(echo(1))
    gate.began.get(timeout=PATIENCE_S)
    waiting = stub.ModelInfer.future(echo(2))
    until(lambda: served.scheduler.pending == 1)

    waiting.cancel()

    assert told.get(timeout=PATIENCE_S).stages() == {}
    gate.opened.set()
    running.result(PATIENCE_S)
    stages = told.get(timeout=PATIENCE_S).stages()
    assert list(stages) == ["queue", "decode", "run", "encode"]
    assert all(start <= end for start, end in stages.values())


def test_a_run_that_is_longer_than_those_before_holds_nobody_up(tmp_path, transport):
    """Its thread takes the calls of all clients, which after many short runs it does not hand over; it is replaced."""
    path = tmp_path / "count.onnx"
    path.write_bytes(counter())
    server = start(ServeConfig((path,), port=0, device="cpu", threads=1, instances=1, transport=transport))
    with Client(server.address) as client, ThreadPoolExecutor() as pool:
        for _ in range(300):
            client.infer("count", {"n": np.array(0)})
        long = pool.submit(client.infer, "count", {"n": np.array(3_000_000)})
        until(lambda: has_to_wait(client, "count"))

        assert all(client.ready() for _ in range(20))

        assert not long.done()
        assert long.result()["count"] == 3_000_000
    server.stop(drain_s=0)


def test_a_call_whose_deadline_passes_while_it_waits_is_not_run(stub, served, gate):
    """The client gets DEADLINE_EXCEEDED, and the model never sees the request."""
    running = stub.ModelInfer.future(echo(1))
    gate.began.get(timeout=PATIENCE_S)

    with pytest.raises(grpc.RpcError) as late:
        stub.ModelInfer(echo(2), timeout=0.05)

    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    until(lambda: failed(served, "cancelled") + failed(served, "deadline") == 1)
    gate.opened.set()
    running.result(PATIENCE_S)
    assert gate.began.empty()


def test_a_request_that_does_not_arrive_is_given_up(channel, monkeypatch):
    """A client that opens a call and sends nothing does not hold it for ever."""
    monkeypatch.setattr(wire, "RECEIVE_S", 0)
    never = threading.Event()

    def silence():
        never.wait(PATIENCE_S)
        yield b""

    call = channel.stream_unary(METHOD).future(silence())

    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "did not arrive" in call.details()
    never.set()


def test_a_call_without_a_request_is_refused(channel):
    """The client has ended its side: there is nothing to wait for."""
    call = channel.stream_unary(METHOD).future(iter(()))

    assert call.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_is_answered_in_its_order(stub):
    """A bad request has its error in its place, and the stream goes on; more than a window of them pass."""
    count = 3 * wire.WINDOW
    requests = [echo(i, str(i)) if i % 5 else pb.ModelInferRequest(model_name="none", id=str(i)) for i in range(count)]

    answers = list(stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_S))

    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(count)]
    assert [bool(answer.error_message) for answer in answers] == [i % 5 == 0 for i in range(count)]
    assert answers[1].infer_response.parameters["triton_final_response"].bool_param


def test_an_error_ends_a_stream_that_asks_for_it(server, stub):
    """As the status of the call, after the answers before it; those that waited are dropped."""
    requests = [echo(1), pb.ModelInferRequest(model_name="none"), *[echo(2)] * 5]
    call = stub.ModelStreamInfer(iter(requests), metadata=[("triton_grpc_error", "true")], timeout=PATIENCE_S)

    assert len(next(call).infer_response.outputs) == 1
    with pytest.raises(grpc.RpcError) as ended:
        next(call)
    assert ended.value.code() is grpc.StatusCode.NOT_FOUND
    until(lambda: idle(server))


def test_no_more_than_a_window_of_a_stream_is_in_work(server, stub, served, gate):
    """The others are not read, however many the client sends, until answers have gone out."""
    call = stub.ModelStreamInfer(iter([echo(i) for i in range(wire.WINDOW + 50)]), timeout=PATIENCE_S)
    gate.began.get(timeout=PATIENCE_S)
    until(lambda: server._admission.snapshot().requests >= wire.WINDOW)

    assert server._admission.snapshot().requests <= wire.WINDOW + 2
    gate.opened.set()
    assert len(list(call)) == wire.WINDOW + 50


def test_a_stream_that_is_given_up_drops_what_waits(server, stub, served, gate):
    """What was begun ends, the rest is never run, and the stream counts no more."""
    call = stub.ModelStreamInfer(iter([echo(i) for i in range(5)]))
    gate.began.get(timeout=PATIENCE_S)
    until(lambda: served.scheduler.pending == 4)

    call.cancel()

    until(lambda: failed(served, "cancelled") == 4)
    gate.opened.set()
    until(lambda: idle(server))


def test_a_stream_cancels_its_requests_without_its_lock(server, stub, served, gate, monkeypatch):
    """Who is told of that may be another stream, which has a lock of its own."""
    if not isinstance(server._transport, completion_queue.Transport):
        pytest.skip("has no locks")
    owned, cancel = [], answering.Work.cancel

    def watched(work):
        owned.append(work._answered.__self__._lock._is_owned())
        cancel(work)

    monkeypatch.setattr(answering.Work, "cancel", watched)
    answers = stub.ModelStreamInfer(iter([echo(1), echo(2)]))
    gate.began.get(timeout=PATIENCE_S)
    until(lambda: served.scheduler.pending == 1)

    answers.cancel()

    until(lambda: len(owned) == 2)
    assert owned == [False, False]


def test_a_full_stream_that_is_given_up_leaves_nothing_waiting(server, stub, served, gate):
    """Also the request that was read last, for which there was no place among the others."""
    call = stub.ModelStreamInfer(iter([echo(i) for i in range(2 * wire.WINDOW)]))
    gate.began.get(timeout=PATIENCE_S)
    read = wire.WINDOW if isinstance(server._transport, completion_queue.Transport) else wire.WINDOW + 2
    until(lambda: server._admission.snapshot().requests == read)

    call.cancel()

    until(lambda: failed(served, "cancelled") == read - 1)
    gate.opened.set()
    until(lambda: idle(server))
    assert gate.began.empty()


@pytest.mark.parametrize("given_up", [True, False])
def test_a_stream_that_has_ended_is_forgotten(server, stub, given_up):
    """With its answers, also those that nobody has taken, which the garbage collector might find much later."""
    if not isinstance(server._transport, completion_queue.Transport):
        pytest.skip("has no such objects")
    gc.collect()
    gc.disable()
    try:
        call = stub.ModelStreamInfer(iter([echo(rows=1 << 14)] * wire.WINDOW), timeout=PATIENCE_S)
        next(call)
        if given_up:
            until(lambda: server._admission.snapshot().requests > 1)
            call.cancel()
        else:
            list(call)
        until(lambda: not _left())
    finally:
        gc.enable()


def _left():
    return [each for each in gc.get_objects() if type(each) in (serve_call.Stream, answering.Work)]


@pytest.mark.parametrize("shared", [0, 1000])
@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_while_a_large_request_is_read_other_calls_are_answered(server, stub, monkeypatch, method, shared):
    """The thread that takes the events leaves them to the other one; asyncio has one thread for all."""
    if not isinstance(server._transport, completion_queue.Transport):
        pytest.skip("one thread")
    request = echo()
    monkeypatch.setattr(answering, "_LARGE", request.ByteSize() - 1)
    if shared:
        del request.raw_input_contents[:]
        request.inputs[0].parameters["shared_memory_byte_size"].int64_param = shared
        monkeypatch.setattr(answering, "_LARGE", shared)
    reading, read, begin = threading.Event(), threading.Event(), server._service.begin

    def slow(*arguments):
        reading.set()
        assert read.wait(PATIENCE_S)
        return begin(*arguments)

    monkeypatch.setattr(server._service, "begin", slow)
    streamed = method == "ModelStreamInfer"
    ask = stub.ModelStreamInfer if streamed else stub.ModelInfer.future
    call = ask(iter([request]) if streamed else request, timeout=PATIENCE_S)
    assert reading.wait(PATIENCE_S)

    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S / 3).ready
    read.set()
    if shared:  # of which nothing is there
        assert next(call).error_message if streamed else call.code() is grpc.StatusCode.INVALID_ARGUMENT
    else:
        assert next(call).infer_response.outputs if streamed else call.result().outputs


def test_reflection_reads_a_question_when_its_last_answer_was_taken(server, channel, monkeypatch):
    """A client that asks and does not read makes the server hold one answer."""
    unsent = set()
    if isinstance(server._transport, completion_queue.Transport):
        send = serve_call.Stream.send

        def watched(stream, message):
            unsent.add(stream.unsent)
            send(stream, message)

        monkeypatch.setattr(serve_call.Stream, "send", watched)
    question = reflection_pb2.ServerReflectionRequest(file_containing_symbol=wire.SERVICE.full_name)
    ask = channel.stream_stream(wire.REFLECTION, reflection_pb2.ServerReflectionRequest.SerializeToString)

    answers = list(ask(iter([question] * 200), timeout=PATIENCE_S))

    assert len(answers) == 200
    assert len(set(answers)) == 1
    assert unsent <= {0}


def test_health_of_a_name_that_is_too_long_is_not_told(channel):
    """Names that are watched are kept, and anybody may watch."""
    health, request = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service="x" * 5000)

    for call in (health.Check.future(request, timeout=PATIENCE_S), health.Watch(request, timeout=PATIENCE_S)):
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "at most 4096 bytes" in call.details()


def test_health_is_watched(server, channel):
    """Every change is told to all who watch, also of a model that is not there yet, and with a long name."""
    watch, name = health_pb2_grpc.HealthStub(channel).Watch, "x" * 4000
    states = health_pb2.HealthCheckResponse
    first, second, unknown = (watch(health_pb2.HealthCheckRequest(service=name)) for name in ("echo", "echo", name))

    assert [next(call).status for call in (first, second)] == [states.SERVING] * 2
    assert next(unknown).status == states.SERVICE_UNKNOWN
    server._transport.set_health("echo", False)
    server._transport.set_health(name, True)
    assert [next(call).status for call in (first, second)] == [states.NOT_SERVING] * 2
    assert next(unknown).status == states.SERVING
    server._transport.set_stopping()
    assert next(unknown).status == states.NOT_SERVING


def test_who_watches_is_told_also_when_another_one_has_left(server, channel):
    """Of the same model; who has left is forgotten."""
    watch, states = health_pb2_grpc.HealthStub(channel).Watch, health_pb2.HealthCheckResponse
    calls = [watch(health_pb2.HealthCheckRequest(service="echo"), timeout=PATIENCE_S) for _ in range(3)]
    assert [next(call).status for call in calls] == [states.SERVING] * 3
    watching = server._transport._health._watching

    calls[0].cancel()
    until(lambda: len(watching["echo"]) == 2)

    server._transport.set_health("echo", False)
    assert [next(call).status for call in calls[1:]] == [states.NOT_SERVING] * 2
    for call in calls[1:]:
        call.cancel()
    until(lambda: "echo" not in watching)


def test_calls_given_up_at_random_leave_nothing_behind(server, stub):
    """Half of three hundred calls are cancelled at any moment of theirs; every other one is answered."""
    calls = [stub.ModelInfer.future(echo(i), timeout=PATIENCE_S) for i in range(300)]
    for call in calls[::2]:
        call.cancel()

    answers = [call.result().raw_output_contents[0] for call in calls[1::2]]

    assert answers == [np.float32([i, i]).tobytes() for i in range(1, 300, 2)]
    until(lambda: idle(server))
    if isinstance(server._transport, completion_queue.Transport):
        until(lambda: not server._transport._calls.open)


def test_changes_that_wait_hold_up_no_other(server, stub, monkeypatch):
    """An unload waits for the calls of its model to end."""
    began, ended = queue.Queue(), threading.Event()
    monkeypatch.setattr(server._repository, "unload", lambda *change: began.put(change) or ended.wait(PATIENCE_S))
    unload = stub.RepositoryModelUnload.future
    calls = [unload(pb.RepositoryModelUnloadRequest(model_name="echo"), timeout=PATIENCE_S) for _ in range(20)]
    for _ in calls:
        began.get(timeout=PATIENCE_S)

    stub.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="echo"), timeout=PATIENCE_S)

    assert not any(call.done() for call in calls)
    ended.set()
    assert all(call.result() == pb.RepositoryModelUnloadResponse() for call in calls)


@pytest.mark.parametrize("change", ["load", "unload"])
def test_a_change_that_is_given_up_before_its_turn_is_not_made(server, stub, monkeypatch, change):
    """Other changes take long, and whoever gave up may have asked for the opposite meanwhile."""
    repository, began, outcome = server._repository, threading.Event(), Future()
    make = getattr(repository, change)

    def late(name, given_up):
        began.set()
        until(given_up)
        try:
            make(name, given_up)
        except Exception as error:
            outcome.set_exception(error)
            raise
        outcome.set_result(None)

    monkeypatch.setattr(repository, change, late)
    if change == "load":
        call = stub.RepositoryModelLoad.future(pb.RepositoryModelLoadRequest(model_name="echo"))
    else:
        call = stub.RepositoryModelUnload.future(pb.RepositoryModelUnloadRequest(model_name="echo"))
    assert began.wait(PATIENCE_S)

    call.cancel()

    with pytest.raises(Cancelled):
        outcome.result(PATIENCE_S)
    assert repository.names() == ["echo"]


def test_an_answer_waits_for_no_request_that_does_not_come(stub, channel):
    """Answers are sent together with those of other calls only while there is something to be done for these."""
    never = threading.Event()
    silent = channel.stream_unary(METHOD).future(iter(lambda: never.wait(PATIENCE_S) or b"", None))

    for value in range(20):
        assert stub.ModelInfer(echo(value), timeout=PATIENCE_S / 3).raw_output_contents[0]

    silent.cancel()
    never.set()


def test_a_call_is_answered_whatever_becomes_of_its_log_and_trace(stub, served, gate, monkeypatch):
    """An error in what tells of a call neither leaves its client waiting nor ends the thread."""

    def broken(**facts):
        raise RuntimeError("broken")

    gate.opened.set()
    monkeypatch.setattr(logs, "logs_requests", lambda: True)
    monkeypatch.setattr(logs, "log_request", broken)
    for _ in range(3):
        call = stub.ModelInfer.future(echo(), timeout=PATIENCE_S)
        assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INTERNAL)

    monkeypatch.undo()
    assert stub.ModelInfer(echo(), timeout=PATIENCE_S).model_name == "echo"


def test_answers_of_the_thread_that_takes_the_events_are_sent_together():
    """Up to so many, or when no call is left; those of any other thread at once."""
    sent, together = [], serve_call._TOGETHER
    core = SimpleNamespace(start_server_batch=lambda operations, tag: sent.append(tag))
    calls = serve_call.Calls()
    calls.open.update(["another", "last"])

    calls.send("one", core, (), "of another thread")
    calls.lead(threading.get_ident())
    for number in range(together - 1):
        calls.send("one", core, (), number)
    assert sent == ["of another thread"]
    calls.send("one", core, (), together - 1)
    assert sent[1:] == list(range(together))

    calls.send("another", core, (), "held")
    assert sent[-1] == together - 1
    calls.send("last", core, (), "last")
    assert sent[-2:] == ["held", "last"]
    assert not calls.held


def test_a_call_is_open_until_its_last_batch_has_begun():
    """When none is open the queue may be shut down, and gRPC ends the process where a batch begins after that."""
    calls, open_then = serve_call.Calls(), []
    calls.open.add("one")

    def begin(operations, tag):
        open_then.append(set(calls.open))
        raise ValueError("cannot begin")

    with pytest.raises(ValueError, match="cannot begin"):
        calls.send("one", SimpleNamespace(start_server_batch=begin), (), "of another thread")

    assert open_then == [{"one"}]
    assert not calls.open


def test_streams_that_bring_enough_wait_for_a_look_at_the_sockets():
    """Else the queue never is empty, and nobody else is heard."""
    began, in_turn = [], serve_call._IN_TURN
    calls = serve_call.Calls()
    calls.lead(threading.get_ident())

    for number in range(in_turn + 2):
        calls.receive(lambda number=number: began.append(number))

    assert began == list(range(in_turn - 1))
    assert calls.held
    calls.resume()
    assert began == list(range(in_turn + 2))
    assert not calls.held


def test_a_server_stops_with_calls_of_every_kind_open(server, stub, channel, gate):
    """A run, one that waits, a stream, a watch and a call without a request: all are ended, none hangs."""
    health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
    next(health)
    never = threading.Event()
    calls = [stub.ModelInfer.future(echo(1)), stub.ModelInfer.future(echo(2)), stub.ModelStreamInfer(iter([echo(3)]))]
    calls.append(channel.stream_unary(METHOD).future(iter(lambda: never.wait(PATIENCE_S) or b"", None)))
    gate.began.get(timeout=PATIENCE_S)
    until(lambda: server._admission.snapshot().requests == 3)

    stopping = threading.Thread(target=server.stop, kwargs={"drain_s": 0})
    stopping.start()
    with pytest.raises(grpc.RpcError):  # after the news that nothing is served any more
        list(health)
    assert {call.code() for call in [*calls, health]} <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}
    gate.opened.set()  # a run cannot be cut off
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
    never.set()


def test_short_requests_run_in_the_thread_of_the_completion_queue(server, stub, served, monkeypatch):
    """One thread takes all events, and runs what they bring; on asyncio it is a thread of the model's."""
    monkeypatch.setattr(scheduler, "HAND_OVER_NS", math.inf)  # so that all are short, however busy the machine
    monkeypatch.setattr(pace, "_LONG_NS", math.inf)
    gate = Gate(served)
    gate.opened.set()
    for _ in range(40):
        stub.ModelInfer(echo())

    threads = [gate.began.get_nowait() for _ in range(40)]

    inline = isinstance(server._transport, completion_queue.Transport)
    assert set(threads[4:]) <= ({"grpc-0", "grpc-1"} if inline else {"run-echo"})
    assert not inline or len(set(threads[4:])) == 1


def test_while_a_thread_of_the_completion_queue_runs_a_model_the_other_takes_the_events(server, stub, served):
    """A run that takes long begins in the thread that received it; other calls are answered, the next one waits."""
    gate = Gate(served)
    first = stub.ModelInfer.future(echo())
    thread = gate.began.get(timeout=PATIENCE_S)
    second = stub.ModelInfer.future(echo())

    assert stub.ServerReady(pb.ServerReadyRequest(), timeout=PATIENCE_S).ready
    until(lambda: server._admission.snapshot().requests == 2)
    assert thread.startswith("grpc-" if isinstance(server._transport, completion_queue.Transport) else "run-echo")
    gate.opened.set()
    assert first.result(PATIENCE_S).raw_output_contents == second.result(PATIENCE_S).raw_output_contents


def test_a_grpcio_without_the_completion_queue_is_served_by_asyncio(tmp_path, monkeypatch, pytestconfig):
    """auto says why it chose so; whoever insists is told the way out."""
    if pytestconfig.getoption("asyncio"):
        pytest.skip("nothing is chosen")
    path = tmp_path / "echo.onnx"
    path.write_bytes(identity(np.float32, [None, 2]))
    monkeypatch.setattr(completion_queue.cygrpc, "ReceiveMessageOperation", lambda: None)

    with captured() as logs:
        server = start(ServeConfig((path,), port=0, device="cpu", threads=1))
    server.stop(drain_s=0)
    chosen = next(entry for entry in logs if entry["event"] == "transport chosen")
    assert chosen["transport"] == "asyncio"
    assert grpc.__version__ in chosen["because"]
    with pytest.raises(StartError, match="--transport asyncio"):
        start(ServeConfig((path,), port=0, device="cpu", threads=1, transport="completion-queue"))
