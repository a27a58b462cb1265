r"""The fits-test: the smallest memory limit under which a file still loads and runs.

A process that imported onnxruntime and ran a one-node model forks one child per probe. The child limits its address space (`RLIMIT_AS`) to
what it has and L bytes more, loads the file, runs it and ends; L is bisected. One thread, arena on, memory pattern off: stacks of threads
count as address space, and the pattern takes its memory twice. A whole bisection is repeated in several fresh parents, both files in each, the
order alternating; the figure is the largest of the limits found, under which every repeat ran.

Probes are forked, not started afresh, for two reasons. A fork takes as long as the run itself, about a tenth of a fresh process. And a process
that has not run anything before loads libraries on the way: under a limit that is just large enough for these, a file that fits fails, so
that there is no smallest limit to bisect. The C library's heap is told to take memory in steps of 16 KiB and to keep nothing in reserve
(glibc's `mallopt`), so that the figure is what the file needs and not what an earlier allocation left over: the spread between
repeats on ResNet-20 fell from 700 KiB to 16 at the most.

Run as `python -m secateurs_adapters.fits REQUEST.json` this module is the parent; it then imports numpy and onnxruntime only.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import DataError
from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.session import HOST_PROVIDERS, Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from typing import NoReturn

    from secateurs.settings import TargetSettings

__all__ = ["FitsFigures", "find_fits", "smallest"]

RUNS = 2
"""Runs under a limit: what is only needed once is needed at the first."""
RESOLUTION = 16 * 1024
"""Bytes; a thousandth of the limit where that is more."""
_MOST = 1 << 44
"""Bytes that are tried at the most."""
_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(RESOLUTION),
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "PYTHONHASHSEED": "0",
}
_STATM = Path("/proc/self/statm")
_FITS, _FAILS = 0, 1


@dataclass(frozen=True)
class FitsFigures:
    """The limits that were found for one file.

    Attributes:
        limits: bytes beyond what onnxruntime with a one-node model takes, one per repeat; empty where none was found.
        reason: why none was found; empty otherwise.
    """

    limits: tuple[int, ...] = ()
    reason: str = ""

    @property
    def fits_bytes(self) -> int | None:
        """The limit under which every repeat ran, bytes."""
        return max(self.limits, default=None)

    @property
    def spread_bytes(self) -> int | None:
        """Largest minus smallest limit of the repeats, bytes."""
        return max(self.limits) - min(self.limits) if self.limits else None


def find_fits(paths: Sequence[Path], settings: TargetSettings, *, seed: int = 0) -> list[FitsFigures]:
    """Find the smallest memory limit of each file, `settings.memory_repeats` times.

    Args:
        paths: the files.
        settings: provider, batch size, sequence length, repeats; always one thread.
        seed: of the inputs.

    Returns:
        One entry per file, in order.

    Raises:
        SecateursError: a process failed, or a file does not run without a limit either.
    """
    if settings.provider not in HOST_PROVIDERS:
        reason = f"a limit on the process's memory does not bound the device memory of {settings.provider}"
        return [FitsFigures(reason=reason) for _ in paths]
    found: list[list[int]] = [[] for _ in paths]
    for repeat in range(settings.memory_repeats):
        order = range(len(paths)) if repeat % 2 == 0 else range(len(paths) - 1, -1, -1)
        request = {
            "files": [str(paths[number].resolve()) for number in order],
            "provider": settings.provider,
            "options": settings.options,
            "batch_size": settings.batch_size,
            "length": settings.sequence_length,
            "seed": seed,
        }
        answer = in_fresh_process("secateurs_adapters.fits", request, environment=_HEAP)
        if answer["reason"]:
            return [FitsFigures(reason=answer["reason"]) for _ in paths]
        for number, limit in zip(order, answer["limits"], strict=True):
            found[number].append(int(limit))
    return [FitsFigures(tuple(limits)) for limits in found]


def smallest(fits: Callable[[int], bool], start: int, resolution: int = RESOLUTION) -> int:
    """Return the smallest limit that fits, to the resolution or a thousandth, for a condition that holds from some limit on.

    Args:
        fits: whether a limit, bytes, is enough.
        start: where to begin, bytes.
        resolution: bytes.

    Raises:
        DataError: no limit is enough.

    >>> smallest(lambda limit: limit >= 100_000, 4096, 1024)
    100352
    """
    low, high = 0, start
    while not fits(high):
        low, high = high, 2 * high
        if high > _MOST:
            raise DataError(f"the file runs without a memory limit, but not within {low} bytes; its runs differ.")
    while high - low > max(resolution, high // 1024):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _find_here(request: dict[str, Any]) -> Mapping[str, Any]:
    """Find the limits of the files in this process, which must not have run anything else."""
    reason = _why_not()
    if reason:
        return {"limits": [], "reason": reason}
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        base = Path(folder) / "base.onnx"
        base.write_bytes(ONE_NODE)
        _run(base, {**request, "batch_size": 1, "length": None})
    return {"limits": [_limit_of(Path(file), request) for file in request["files"]], "reason": ""}


def _limit_of(path: Path, request: Mapping[str, Any]) -> int:
    start = time.perf_counter()
    if not _probe(path, request, None, None):
        raise DataError(f"{str(path)!r} does not run in a process of its own, without a memory limit; check the file.")
    seconds = math.ceil(5 + 20 * (time.perf_counter() - start))
    return smallest(lambda limit: _probe(path, request, limit, seconds), 16 * RESOLUTION)


def _probe(path: Path, request: Mapping[str, Any], limit: int | None, seconds: int | None) -> bool:
    """Return whether a child of this process runs the file within a limit, bytes.

    Raises:
        DataError: it takes longer than `seconds`.
    """
    child = os.fork()
    if child == 0:
        _try(path, request, limit, seconds)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        raise DataError(
            f"{str(path)!r} did not end within {seconds} s under a memory limit of {limit} bytes; leave `fits` out."
        )
    return os.waitstatus_to_exitcode(status) == _FITS


def _try(path: Path, request: Mapping[str, Any], limit: int | None, seconds: int | None) -> NoReturn:
    """Run the file within a limit, and end this process with the answer; a crash for want of memory is a no."""
    code = _FAILS
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.alarm(seconds or 0)
        if limit is not None:
            _limit(limit)
        _run(path, request)
        code = _FITS
    finally:
        os._exit(code)


def _run(path: Path, request: Mapping[str, Any]) -> None:
    options = SessionOptions(
        provider=request["provider"], threads=1, provider_options=request["options"], memory_pattern=False
    )
    session = Session(path, options)
    feeds = seeded_inputs(session, request["batch_size"], request["seed"], request["length"])
    for _ in range(RUNS):
        session.run(feeds)


def _limit(more: int) -> None:
    """Limit the address space of this process to what it is now and `more` bytes; no core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    now = int(_STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = now + more if most == resource.RLIM_INFINITY else min(now + more, most)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, most))


def _why_not() -> str:
    """Return why this system has no fits-test; empty where it has."""
    try:
        import resource
    except ImportError:
        return "this system has no limits on a process's memory (RLIMIT_AS)"
    if not (hasattr(resource, "RLIMIT_AS") and hasattr(os, "fork") and _STATM.exists()):
        return "the fits-test needs RLIMIT_AS, fork and /proc"
    child = os.fork()
    if child == 0:
        code = _FITS
        try:
            _limit(1 << 20)
            bytearray(64 << 20)
        except MemoryError:
            code = _FAILS
        finally:
            os._exit(code)
    held = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == _FITS
    return "this system does not enforce limits on a process's memory (RLIMIT_AS)" if held else ""


if __name__ == "__main__":
    serve(_find_here, sys.argv[1:])
