"""The process of one model: runs its recipe and writes its result; see `serve`.

Started as `python -m secateurs_adapters.zoo.worker REQUEST FD`, or forked by `nursery`. FD is a pipe that nobody writes
to: when it closes, whoever watched over this process is gone, and the process and all that it started end at once.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from secateurs.errors import SecateursError
from secateurs_adapters.zoo.results import Figures, Job, Result

if TYPE_CHECKING:
    from secateurs.interfaces import Measurement, Target
    from secateurs.report import Report
    from secateurs.settings import TargetSettings

__all__ = ["WAITING", "end_with", "serve"]

WAITING = "waiting to measure"
"""The stage in which time does not count."""
_ALLOCATOR = ("can't allocate memory", "bad_alloc", "CUDA out of memory")


def end_with(life: int) -> None:
    """End this process and its group as soon as the other end of the pipe `life` is closed."""

    def watch() -> None:
        os.read(life, 1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="secateurs-life", daemon=True).start()


def serve(request: Path) -> None:
    """Run the job of a request and write its result; one that is there already stays.

    A crash leaves no result: whoever watches says so.
    """
    began = time.perf_counter()
    job = Job.model_validate_json(request.read_bytes())
    # Held by the system for as long as this process lives: an orphan of a killed zoo is never met at work.
    with FileLock(job.lock):
        if job.result() is None:
            clock = _Clock(job)
            result = _work(job, clock)
            result.seconds = time.perf_counter() - began - clock.waited
            result.waited_seconds = clock.waited
            result.peak_rss_bytes = _peak()
            job.keep(result)
            clock.says("done")


class _Clock:
    """Says what the process is doing, and adds up how long it waited and worked."""

    def __init__(self, job: Job) -> None:
        self._path = job.stage_path
        self.waited = 0.0

    def says(self, stage: str) -> None:
        self._path.write_text(stage, encoding="utf-8")

    def wait(self, lock: FileLock) -> None:
        self.says(WAITING)
        began = time.perf_counter()
        lock.acquire()
        self.waited += time.perf_counter() - began
        self.says("measuring")


class _InTurn:
    """A target that measures while no other model of a zoo on this machine does; otherwise as the target itself."""

    def __init__(self, target: Target, clock: _Clock) -> None:
        self._target, self._clock = target, clock
        owner = os.getuid() if hasattr(os, "getuid") else "all"
        self._lock = FileLock(Path(tempfile.gettempdir()) / f"secateurs-measuring-{owner}.lock")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def check(self, settings: TargetSettings) -> None:
        self._target.check(settings)

    def measure(self, *arguments: Any, **options: Any) -> Measurement:
        self._clock.wait(self._lock)
        try:
            return self._target.measure(*arguments, **options)
        finally:
            self._lock.release()
            self._clock.says("pruning")


def _work(job: Job, clock: _Clock) -> Result:
    """Run the recipe; whatever it raises is its result."""
    clock.says("starting")
    began: list[float] = []
    try:
        report = _run(job, clock, lambda: began.append(time.perf_counter()))
    except SecateursError as error:
        result = _out_of_memory(job, error) or job.ended("error", [str(error)], kind=type(error).__name__)
    except MemoryError as error:
        result = job.ended("out-of-memory", [f"an allocation failed: {error or 'MemoryError'}"], kind="MemoryError")
    except BaseException as error:  # whatever a stranger's network raises is the result of this model alone
        traceback.print_exc()
        said = f"{type(error).__name__}: {error}; the whole traceback is in the log"
        result = _out_of_memory(job, error) or job.ended("error", [said], kind=type(error).__name__)
    else:
        result = job.ended(report.verdict, _reasons(report), figures=Figures.of(report))
    if began:
        result.work_seconds = time.perf_counter() - began[0] - clock.waited
    return result


def _run(job: Job, clock: _Clock, begins: Callable[[], None]) -> Report:
    import torch

    from secateurs import runner
    from secateurs.manager import create_manager
    from secateurs.plain_yaml import read_yaml
    from secateurs.recipe import parse_recipe

    torch.set_num_threads(job.threads)
    begins()
    clock.says("pruning")
    recipe = parse_recipe(read_yaml(job.recipe, "the recipe"), folder=job.directory)
    prepared = runner.prepare(recipe, create_manager())
    prepared = replace(prepared, targets=[(_InTurn(target, clock), settings) for target, settings in prepared.targets])
    # The folder is this key's alone; what a killed process left is gone on with as far as it can be.
    left = any((job.folder / name).exists() for name in (".secateurs/state.json", "report.json"))
    return runner.run(prepared, job.folder, resume=left, overwrite=not left)


def _reasons(report: Report) -> list[str]:
    """Return why a report does not pass."""
    rows = [
        f"{row.name}{f' on {row.target}' if row.target else ''}: "
        f"{'nothing was measured' if row.measured is None else f'measured {row.measured:.4g}'}, allowed {row.limit:g}"
        f"{f' ({row.reason})' if row.reason else ''}"
        for row in report.budget
        if row.status != "pass"
    ]
    return [*report.reasons, *rows]


def _out_of_memory(job: Job, error: BaseException | None) -> Result | None:
    """Return the result of an allocation that failed, where an error or what it came from says so."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text for words in _ALLOCATOR):
            said = f"an allocation failed: {text.splitlines()[0] if text else 'MemoryError'}"
            return job.ended("out-of-memory", [said], kind=type(error).__name__)
        error = error.__cause__ or error.__context__
    return None


def _peak() -> int | None:
    """Return the largest resident set of this process in bytes, where the system tells."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    serve(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the result is written: threads and exit handlers of a stranger's network do not keep the zoo waiting
