"""The zoo in the terminal: a live table while it runs, and the leaderboard at the end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from secateurs.printed import CLOSE
from secateurs.progress import PAUSE
from secateurs.terminal import escape
from secateurs_adapters.zoo.leaderboard import Row, counts, rows
from secateurs_adapters.zoo.results import Job, Result

__all__ = ["LiveTable", "leaderboard_table", "live_table"]

_RECENT = 8
"""Finished models that stay in view."""
_LOOK = 0.5
"""Seconds between two looks at what runs."""
_COLOURS = {"pass": "green", "undecided": "yellow", "not run": "dim"}


def leaderboard_table(found: Sequence[Row]) -> Table:
    """Return the rows as a table for the terminal, without the reasons."""
    table = Table(title=_summary(found), **CLOSE)
    table.add_column("model", overflow="fold")
    for heading in ("status", "target"):
        table.add_column(heading)
    for heading in ("MACs", "files", "accuracy", "drop", "latency", "memory", "s"):
        table.add_column(heading, justify="right")
    for row in found:
        accuracy = row.accuracy if row.accuracy is not None else row.agreement
        table.add_row(
            escape(row.name),
            _coloured(row.status),
            escape(row.target.replace("ExecutionProvider", "")),
            *(_number(value, ".3f") for value in (row.macs_ratio, row.artifact_ratio)),
            *(_number(value, ".4f") for value in (accuracy, row.accuracy_drop)),
            *(_number(value, ".3f") for value in (row.latency_ratio, row.peak_memory_ratio)),
            _number(row.seconds, ".1f"),
        )
    return table


class LiveTable:
    """What runs and what ended last, redrawn in place.

    Args:
        jobs: of the zoo.
        results: by key; the caller adds to it.
    """

    def __init__(self, jobs: Sequence[Job], results: Mapping[str, Result]) -> None:
        self._jobs, self._results = jobs, results
        self._seen: dict[str, float] = {}

    def __rich__(self) -> Table:
        table = Table(**CLOSE)
        for heading in ("model", "status", "s", "reason"):
            table.add_column(heading, overflow="ellipsis", no_wrap=True)
        finished = [self._results[job.key] for job in self._jobs if job.key in self._results]
        for result in finished[-_RECENT:]:
            reason = escape("; ".join(result.reasons))
            table.add_row(escape(result.name), _coloured(result.status), _number(result.seconds, ".1f"), reason)
        for job, stage in self.look():
            seconds = time.monotonic() - self._seen[job.key]
            table.add_row(escape(job.name), f"[cyan]{escape(stage)}[/]", f"{seconds:.0f}", "")
        table.title = self._told()
        return table

    def print(self, console: Console) -> None:
        """Print a line: how many models there are of each status, what runs, and how long the rest takes."""
        running = ", ".join(f"{job.name} ({stage})" for job, stage in self.look())
        console.print(escape(f"{self._told()}{'; now ' if running else ''}{running}"), soft_wrap=True)

    def look(self) -> list[tuple[Job, str]]:
        """Return what runs and how far it is, and remember since when: what is never seen to run does not count for the pace."""
        stages = [(job, job.stage) for job in self._jobs if job.key not in self._results]
        running = [(job, stage) for job, stage in stages if stage and stage != "done"]
        for job, _ in running:
            self._seen.setdefault(job.key, time.monotonic())
        return running

    def _told(self) -> str:
        return _summary(rows(self._jobs, self._results)) + self._left()

    def _left(self) -> str:
        """Say how long the models take that are left, at the pace of those that ended since this table is shown."""
        ended = sum(key in self._results for key in self._seen)
        left = sum(job.key not in self._results for job in self._jobs)
        if not ended or not left:
            return ""
        minutes, seconds = divmod(round((time.monotonic() - min(self._seen.values())) / ended * left), 60)
        return f"; about {minutes}:{seconds:02} left"


@contextmanager
def live_table(jobs: Sequence[Job], results: Mapping[str, Result]) -> Iterator[None]:
    """Show the zoo on the standard error while a block runs: a table on a terminal, a line every half minute elsewhere, nothing in CI."""
    console, table = Console(stderr=True), LiveTable(jobs, results)
    if os.environ.get("CI"):
        yield
    elif console.is_terminal:
        with Live(get_renderable=table.__rich__, console=console, refresh_per_second=1 / _LOOK, transient=True):
            yield
    else:
        with _meanwhile(table, console):
            yield


@contextmanager
def _meanwhile(table: LiveTable, console: Console) -> Iterator[None]:
    """Look at what runs as often as a terminal does, and print a line every `PAUSE` seconds, in a thread, while a block runs."""
    ended = threading.Event()

    def repeat() -> None:
        printed = time.monotonic()
        while not ended.wait(min(_LOOK, PAUSE)):
            table.look()
            if time.monotonic() - printed >= PAUSE:
                table.print(console)
                printed = time.monotonic()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _summary(found: Sequence[Row]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts(found).items())


def _coloured(status: str) -> str:
    return f"[{_COLOURS.get(status, 'red')}]{escape(status)}[/]"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
