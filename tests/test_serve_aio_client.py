"""The asyncio client: what tasks and event loops add. That it answers as the other does is in test_serve_client*.py."""

import asyncio
import inspect
import threading

import grpc
import pytest

from serve.client import Client
from serve.client.aio import AioClient
from serve.errors import ServerError
from tests.protocol_server import serving


@pytest.fixture
def server():
    with serving() as server:
        yield server


async def _one_and_no_more():
    yield ["a"]
    await asyncio.Event().wait()


def public(kind):
    """Names, and what each takes."""
    return {
        name: [(each.name, each.kind, each.default) for each in inspect.signature(member).parameters.values()]
        for name, member in inspect.getmembers(kind, callable)
        if not name.startswith("_") or name == "__init__"
    }


def test_both_clients_are_of_one_design():
    """The same calls with the same arguments."""
    assert public(AioClient) == public(Client)


def test_calls_of_many_tasks_run_side_by_side(server):
    """The server answers none before it has all of them."""
    server.together = threading.Barrier(5)

    async def ask():
        async with AioClient(server.address) as client:
            return await asyncio.gather(*(client.predict("m", [str(i)]) for i in range(5)))

    assert [answer["text"][0, 0] for answer in asyncio.run(ask())] == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("raws", [["a"], ["a", "b", "c"]], ids=["one request", "several"])
def test_a_cancelled_task_cancels_its_calls(server, raws):
    """The server does not go on working for nobody."""
    server.together = threading.Barrier(2)

    async def ask():
        async with AioClient(server.address, max_rows=1, parallel=1) as client:
            task = asyncio.create_task(client.predict("m", raws))
            await asyncio.to_thread(server.inferring.wait, 10)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(server.ended.wait, 10)

    asyncio.run(ask())


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.infer("m", {}),
        lambda client: client.predict("m", ["a", "b", "c"]),
        lambda client: anext(client.stream("m", _one_and_no_more())),
    ],
    ids=["infer", "predict", "stream"],
)
def test_calls_of_a_client_that_is_closed_fail(server, call):
    """They are no cancelled tasks, which a group of tasks takes for no error."""
    server.together = threading.Barrier(2)
    server.refuses = lambda request: server.inferring.set() or server.together.wait(10)

    async def ask():
        client = AioClient(server.address, max_rows=1)
        async with asyncio.TaskGroup() as group:
            group.create_task(call(client))
            await asyncio.to_thread(server.inferring.wait, 10)
            await client.close()

    with pytest.raises(ExceptionGroup) as failed:
        asyncio.run(ask())
    (refused,) = failed.value.exceptions
    assert isinstance(refused, ServerError)
    assert refused.code is grpc.StatusCode.CANCELLED


def test_a_watch_of_a_client_that_is_closed_fails(server):
    """As its other calls."""

    async def ask():
        client = AioClient(server.address)
        changes = client.watch()
        await anext(changes)
        next_change = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)  # so that it waits
        await client.close()
        await next_change

    with pytest.raises(ServerError) as refused:
        asyncio.run(ask())
    assert refused.value.code is grpc.StatusCode.CANCELLED


def test_the_batches_of_a_stream_may_be_asynchronous(server):
    """Such as the frames of a camera that are awaited."""

    async def batches():
        for text in ("a", "b"):
            await asyncio.sleep(0)
            yield [text]

    async def ask():
        async with AioClient(server.address) as client:
            return [answer["text"].item() async for answer in client.stream("m", batches())]

    assert asyncio.run(ask()) == [b"a", b"b"]


def test_a_stream_does_not_hold_up_the_loop(server):
    """Other tasks get their answers between those of the stream."""

    async def ask():
        async with AioClient(server.address) as client:
            answers = client.stream("m", ([str(i)] for i in range(3)))
            await anext(answers)
            assert await client.ready()
            return 1 + len([answer async for answer in answers])

    assert asyncio.run(ask()) == 3


def test_a_client_is_made_where_its_loop_runs():
    """Elsewhere its calls would wait for ever."""
    with pytest.raises(RuntimeError, match="no running event loop"):
        AioClient("127.0.0.1:1")


def test_nobody_there_is_a_server_error():
    """As of the other client."""

    async def ask():
        async with AioClient("127.0.0.1:1", attempts=1) as client:
            assert not await client.ready()
            await client.infer("m", {})

    with pytest.raises(ServerError) as refused:
        asyncio.run(ask())
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE
