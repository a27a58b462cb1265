"""Watching over one model: its process is started, timed, weighed, ended if it takes too much, and started again if it crashes."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from secateurs.files import write_text
from secateurs_adapters.zoo.launch import Launcher, Started
from secateurs_adapters.zoo.results import Job, Result, Status
from secateurs_adapters.zoo.worker import WAITING

__all__ = ["Stopped", "supervise"]

POLL = 0.05
"""Seconds between two looks at a process."""
_FAMILY = 1.0
"""Seconds between two searches for the processes that it started."""


class Stopped(Exception):  # noqa: N818 - no error: somebody asked for it
    """The zoo was told to stop while a model ran; its result is open."""


def supervise(job: Job, launcher: Launcher, stop: Callable[[], bool] = lambda: False) -> Result:
    """Run a job to its result, which is written to its file; crashes are tried again, errors are not.

    A result that is there already is returned.

    Args:
        job: with its limits.
        launcher: starts its processes.
        stop: asked all the time; true ends the process and gives up.

    Raises:
        Stopped: `stop` said so.
    """
    for path in (job.log, job.request, job.result_path, job.folder):
        path.parent.mkdir(parents=True, exist_ok=True)
    if (found := job.result()) is not None:
        return found
    for attempt in range(1, job.retries + 2):
        job = job.model_copy(update={"attempt": attempt})
        write_text(job.request, job.model_dump_json())
        job.stage_path.unlink(missing_ok=True)  # before the start: the process may tell its stage at once
        end = _watch(launcher.start(job), job, stop)
        if (found := job.result()) is not None:
            return found
        if end.status != "crashed":
            break
    result = job.ended(
        end.status,
        [end.reason],
        seconds=end.seconds,
        waited_seconds=end.waited,
        peak_rss_bytes=end.peak or None,
    )
    job.keep(result)
    job.stage_path.write_text("done", encoding="utf-8")
    return result


@dataclass(frozen=True)
class _End:
    """How a process ended that left no result."""

    status: Status
    reason: str
    seconds: float
    waited: float
    peak: int


def _watch(process: Started, job: Job, stop: Callable[[], bool]) -> _End:
    """Wait for a process, and end it when it breaks a limit."""
    scale = _Scale(process.pid)
    began = last = time.monotonic()
    waited = 0.0

    def end(status: Status, reason: str) -> _End:
        return _End(status, reason, last - began - waited, waited, scale.peak)

    try:
        while (code := process.wait(POLL)) is None:
            if stop():
                raise Stopped
            now = time.monotonic()
            waited += now - last if job.stage == WAITING else 0.0
            last = now
            held = scale.weigh()
            if job.memory_mib is not None and held > job.memory_mib * 2**20:
                return end(
                    "out-of-memory",
                    f"it held {held / 2**20:.0f} MiB while {job.stage or 'starting'}; `memory_mib` allows {job.memory_mib}",
                )
            if last - began - waited > job.timeout:
                return end(
                    "timeout",
                    f"it took longer than `timeout` allows, {job.timeout:g} s; it was {job.stage or 'starting'}",
                )
    finally:
        process.kill()
    last = time.monotonic()
    return end("crashed", f"its process {_ending(code)} while {job.stage or 'starting'}; see the log")


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} and no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}" + (", perhaps by the system for want of memory" if code == -signal.SIGKILL else "")


class _Scale:
    """Adds up the resident memory of a process and of those that it started.

    Pages that they share count more than once.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._pid = pid
        self._family: list[psutil.Process] = []
        self._looked = 0.0

    def weigh(self) -> int:
        """Return the bytes that are held now."""
        now = time.monotonic()
        if not self._family or now - self._looked > _FAMILY:
            self._looked = now
            self._family = _family(self._pid)
        held = sum(_resident(process) for process in self._family)
        self.peak = max(self.peak, held)
        return held


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
