"""Running jobs on this machine: so many at a time, each in a process of its own."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from secateurs_adapters.zoo.launch import Launcher, launcher
from secateurs_adapters.zoo.results import Job, Result
from secateurs_adapters.zoo.supervise import supervise

__all__ = ["Tick", "available_cores", "run_here"]

Tick = Callable[[], None]
INTERVAL = 0.5
"""Seconds between two calls of `tick`."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def run_here(
    jobs: Sequence[Job], *, workers: int, warm: bool, threads: int, done: Callable[[Job, Result], None], tick: Tick
) -> None:
    """Run jobs on this machine, in their order, until all have a result.

    Args:
        jobs: what to run.
        workers: how many at a time.
        warm: fork from a process that has imported everything, instead of starting an interpreter for each.
        threads: of torch, in each process.
        done: told of every result, in this thread.
        tick: called in this thread twice a second.

    Raises:
        BaseException: whatever `done` or `tick` raises, or Ctrl-C; the processes that run are ended first.
    """
    stop, own, opened = threading.Event(), threading.local(), list[Launcher]()

    def work(job: Job) -> Result:
        if not hasattr(own, "launcher"):
            own.launcher = launcher(warm=warm, threads=threads)
            opened.append(own.launcher)
        return supervise(job, own.launcher, stop.is_set)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="secateurs-zoo")
    waiting: dict[Future[Result], Job] = {pool.submit(work, job): job for job in jobs}
    try:
        while waiting:
            for future in wait(waiting, INTERVAL, return_when=FIRST_COMPLETED).done:
                done(waiting.pop(future), future.result())
            tick()
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
        for one in opened:
            one.close()
