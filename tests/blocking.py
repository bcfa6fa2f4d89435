"""AioClient behind the calls of Client, so that one test holds for both."""

import asyncio
import inspect
from contextlib import contextmanager

from serve.client.aio import AioClient


class BlockingAioClient:
    """Runs the event loop until each call is answered; generators and contexts are wrapped alike."""

    def __init__(self, *arguments, **options):
        self._loop = asyncio.new_event_loop()
        try:
            self._client = self._wait(self._make(arguments, options))
        except BaseException:
            self._loop.close()
            raise

    async def _make(self, arguments, options):
        return AioClient(*arguments, **options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._wait(self._client.close())
        self._wait(self._loop.shutdown_asyncgens())
        self._loop.close()

    def __getattr__(self, name):
        method = getattr(self._client, name)

        def call(*arguments, **options):
            made = method(*arguments, **options)
            if inspect.isasyncgen(made):
                return self._each(made)
            return self._within(made) if hasattr(made, "__aenter__") else self._wait(made)

        return call

    def _wait(self, awaitable):
        return self._loop.run_until_complete(awaitable)

    def _each(self, generator):
        try:
            while True:
                try:
                    yield self._wait(anext(generator))
                except StopAsyncIteration:
                    return
        finally:
            self._wait(generator.aclose())

    @contextmanager
    def _within(self, context):
        entered = self._wait(context.__aenter__())
        try:
            yield entered
        except BaseException as error:
            if not self._wait(context.__aexit__(type(error), error, error.__traceback__)):
                raise
        else:
            self._wait(context.__aexit__(None, None, None))
