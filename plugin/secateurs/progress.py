"""Progress for people: a bar on a terminal, a line now and then where there is none, nothing in CI."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secateurs import hookimpl, processes
from secateurs.terminal import escape

if TYPE_CHECKING:
    from secateurs.interfaces import ProgressEvent
    from secateurs.manager import Manager

__all__ = ["PAUSE", "progress_bar"]

PAUSE = 30.0
"""Seconds between two lines where there is no terminal; what takes less is silent."""


@contextmanager
def progress_bar(manager: Manager) -> Iterator[Any]:
    """Show progress on the standard error while a block works, fed by the hook `secateurs_progress`.

    A bar with the time left on a terminal; at most a line every half minute where there is none, such as in a log; nothing in CI, where `CI` is
    set.

    Args:
        manager: whose plugins hear of every step, and where the bar is one of them meanwhile.

    Yields:
        What takes each `ProgressEvent`.
    """
    if not processes.is_main():
        yield lambda _: None
        return
    console, quiet = Console(stderr=True), bool(os.environ.get("CI"))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_interactive,
    )
    shown = None if quiet else _Lines(console) if bar.disable else _Bar(bar)
    if shown is not None:
        manager.register(shown, name="secateurs-progress-bar")
    try:
        with bar:
            yield lambda event: manager.hook.secateurs_progress(event=event)
    finally:
        if shown is not None:
            manager.unregister(shown)


class _Bar:
    """Draws progress events as one line per task, the current one last."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, Any] = {}

    @hookimpl
    def secateurs_progress(self, event: ProgressEvent) -> None:
        """Show an event."""
        if event.task not in self._tasks:
            for task in self._tasks.values():
                self._bar.update(task, visible=False)
            self._tasks[event.task] = self._bar.add_task(event.task, total=event.total, detail="")
        self._bar.update(
            self._tasks[event.task], completed=event.done, total=event.total, detail=event.detail, visible=True
        )


class _Lines:
    """Prints a progress event where the last line, or the beginning, is `PAUSE` seconds ago."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, time.monotonic()

    @hookimpl
    def secateurs_progress(self, event: ProgressEvent) -> None:
        """Show an event."""
        if time.monotonic() - self._last < PAUSE:
            return
        self._last = time.monotonic()
        text = f"{event.task}: {event.done} of {event.total} {event.detail}"
        self._console.print(escape(text.rstrip()), soft_wrap=True)
