"""Running jobs on a Ray cluster; the only file that imports Ray.

A Ray task watches over one model as a thread of `run_here` does: it starts the model's process on its node, with the same
limits. The zoo's folder and every path of the recipes are to lie on a file system that all nodes see under the same name.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from secateurs.errors import PluginError, UserError, first_line
from secateurs_adapters.zoo.executors import INTERVAL, Tick
from secateurs_adapters.zoo.keys import environment_digest
from secateurs_adapters.zoo.launch import Launcher, launcher
from secateurs_adapters.zoo.results import Job, Result
from secateurs_adapters.zoo.supervise import supervise

__all__ = ["run_on_ray"]

LOCAL = "local"
_STORE = 100 * 2**20
"""Bytes of the object store of a local cluster; results are small."""


def run_on_ray(
    jobs: Sequence[Job],
    *,
    address: str,
    workers: int,
    warm: bool,
    threads: int,
    done: Callable[[Job, Result], None],
    tick: Tick,
) -> None:
    """Run jobs on a cluster until all have a result, as `run_here` does on this machine.

    Args:
        jobs: what to run.
        address: of the cluster, or `local` for one that is started here and ended afterwards.
        workers: how many at a time on a local cluster; an existing one runs as many as it has cores for.
        warm: as for `run_here`.
        threads: of torch; on an existing cluster, each model takes so many cores.
        done: told of every result.
        tick: called twice a second.

    Raises:
        PluginError: Ray is not installed.
        UserError: there is no cluster at the address.
    """
    ray = _connect(address, workers)
    # A task that Ray loses with its node is a crash; one that the model's process breaks is not the task's.
    cores = 1 if address == LOCAL else threads
    task = ray.remote(num_cpus=cores, max_retries=max(job.retries for job in jobs), retry_exceptions=False)(_watch_over)
    waiting = {task.remote(job.model_dump_json(), warm, threads): job for job in jobs}
    try:
        while waiting:
            for reference in ray.wait(list(waiting), timeout=INTERVAL)[0]:
                job = waiting.pop(reference)
                done(job, _result(ray, reference, job))
            tick()
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _connect(address: str, workers: int) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise PluginError("`--ray` needs Ray, which is not installed; pip install 'secateurs[ray]'.") from None
    own: dict[str, Any] = (
        {"num_cpus": workers, "include_dashboard": False, "object_store_memory": _STORE} if address == LOCAL else {}
    )
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"no Ray cluster answers at {address!r}: {first_line(error)} Give the address of a running one, or `--ray local`."
        ) from None
    return ray


def _watch_over(text: str, warm: bool, threads: int) -> str:
    """Run one job on the node where Ray put this task."""
    job = Job.model_validate_json(text)
    if not job.output.is_dir():
        raise UserError(f"this node does not see the zoo's folder {str(job.output)!r}; put it on a shared file system.")
    if environment_digest() != job.environment:
        raise UserError("this node has other versions of Secateurs or of its libraries than where the zoo was started.")
    return supervise(job, _launcher(warm, threads)).model_dump_json()


@functools.cache
def _launcher(warm: bool, threads: int) -> Launcher:
    """Return the launcher of this Ray worker, which serves many tasks; it ends with the worker."""
    return launcher(warm=warm, threads=threads)


def _result(ray: Any, reference: Any, job: Job) -> Result:
    """Return what a task found. What went wrong in the cluster and not in the model is not kept: a resumed zoo tries again."""
    try:
        result = Result.model_validate_json(ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", error)
        return job.ended("error", [f"it could not be started: {cause}"], kind=type(cause).__name__)
    except ray.exceptions.RayError as error:
        return job.ended(
            "crashed", [f"Ray lost the task that watched over it: {first_line(error)}"], kind=type(error).__name__
        )
    if job.result() is None:
        job.keep(result)
    return result
