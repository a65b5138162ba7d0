"""Shows a progress bar for long work on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from harness.cli.options import to_terminal

_PATIENCE_S = 2.0  # what takes longer shows how far it is


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback (done, of), which shows a bar on a terminal after some seconds."""
    bar = Progress(
        TextColumn("{task.completed}/{task.total} {task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=None)
    start = time.monotonic()

    def advance(done: int, of: int) -> None:
        if to_terminal() and not bar.live.is_started and time.monotonic() - start > _PATIENCE_S:
            bar.start()
        bar.update(task, completed=done, total=of)

    try:
        yield advance
    finally:
        bar.stop()
