"""Progress bars on standard error, when that is a terminal."""

import os
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], total: int, description: str, done: int = 0) -> Iterator[T]:
    """The items, counted on a bar with rate and time left; of several processes the first has one.

    Args:
        items: what is left to do.
        total: how many there are with those that are done.
        description: what is done with them.
        done: how many were done before.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.speed:.1f}/s" if task.speed else "", style="progress.data.speed")

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), Rate(), TimeLeft())
    shown = console.is_terminal and os.environ.get("RANK", "0") == "0"
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)
