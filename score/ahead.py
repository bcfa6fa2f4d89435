"""Stages that work side by side, each a little ahead of the one that it works for."""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class _End:
    """Of the items; with the error that ended them."""

    error: BaseException | None


def ahead(items: Iterable[T], depth: int, name: str, *, join: bool = True) -> Iterator[T]:
    """The items, made by a thread of their own, of which at most `depth` wait or are being made.

    When this generator is closed, the thread closes `items` after the one it is at, and ends.

    Args:
        items: a generator, or what else makes them; it is used by that thread alone.
        depth: at least 1.
        name: of the thread.
        join: wait for the thread; not when an item may be long in coming.
    """
    made: SimpleQueue[T | _End] = SimpleQueue()
    slots, stopped = threading.Semaphore(depth), threading.Event()
    thread = threading.Thread(target=_make, args=(items, made, slots, stopped), name=name, daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            slots.release()  # the next one is made while this one is worked on
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        slots.release()
        if join:
            thread.join()


def _make(
    items: Iterable[T], made: "SimpleQueue[T | _End]", slots: threading.Semaphore, stopped: threading.Event
) -> None:
    iterator = iter(items)
    end = _End(None)
    try:
        slots.acquire()
        while not stopped.is_set():
            made.put(next(iterator))
            slots.acquire()
    except StopIteration:
        pass
    except BaseException as error:  # whoever waits for the items raises it
        end = _End(error)
    finally:
        if isinstance(iterator, Iterator) and hasattr(iterator, "close"):
            iterator.close()
        made.put(end)
