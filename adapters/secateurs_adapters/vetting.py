"""A first try of a file that nobody vouches for: load it and run it once, in a process with limits on memory and time.

A damaged or hostile file may ask for more memory than there is, run for hours or crash the runtime. The first try finds out before anything
else is built from the file, and tells how long a run takes and at which sizes the file runs at all.

Run as `python -m secateurs_adapters.vetting REQUEST.json` this module is the process that tries the file.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import DataError, SecateursError
from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.session import CPU, Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from secateurs.interfaces import Artifact
    from secateurs.settings import TargetSettings

__all__ = ["Limits", "Vetted", "limits_for", "vet_file"]

LENGTHS = (16, 32, 64, 224)
"""Sizes of dynamic axes other than the batch that are tried in turn, where none is asked for."""
RUNS = 3
"""Runs: the memory pattern takes its memory at the second, and the shortest tells the time."""
_MIB = 2**20
_PER_THREAD = 192 * _MIB
"""Address space that another thread reserves without using it."""


@dataclass(frozen=True)
class Limits:
    """What a file may take at the first try.

    Attributes:
        seconds: for loading it and running it a few times.
        memory_bytes: address space beyond that of an idle process; not limited where the system cannot or the provider maps device memory.
    """

    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class Vetted:
    """What the first try found.

    Attributes:
        batch_size: the size that the file fixes, else the one asked for.
        sequence_length: size of dynamic axes other than the batch; None where there are none, or 16 does.
        run_ms: shortest run.
    """

    batch_size: int
    sequence_length: int | None
    run_ms: float


def limits_for(artifact: Artifact, *, seconds: float | None = None, memory_mib: int | None = None) -> Limits:
    """Return limits that grow with a file: 10 s and 1 s per MiB; 512 MiB and 8 times the size of all its files.

    Args:
        artifact: the file.
        seconds: replaces the first.
        memory_mib: replaces the second, MiB.
    """
    size = artifact.artifact_bytes
    return Limits(
        seconds=10 + size / _MIB if seconds is None else seconds,
        memory_bytes=512 * _MIB + 8 * size if memory_mib is None else memory_mib * _MIB,
    )


def vet_file(
    artifact: Artifact, settings: TargetSettings, limits: Limits, *, adopt_batch: bool = False, seed: int = 0
) -> Vetted:
    """Load and run a file in a process of its own, within limits.

    Args:
        artifact: the file.
        settings: provider, threads, batch size, sequence length.
        limits: of the process.
        adopt_batch: take the batch size that the file fixes, instead of refusing another.
        seed: of the inputs.

    Raises:
        DataError: the file cannot be loaded or run, or takes more than the limits.
        ProviderError: the provider refuses it.
    """
    request = {
        "file": str(artifact.path.resolve()),
        "provider": settings.provider,
        "options": settings.options,
        "threads": settings.threads,
        "batch_size": settings.batch_size,
        "adopt_batch": adopt_batch,
        "lengths": [settings.sequence_length] if settings.sequence_length is not None else list(LENGTHS),
        "memory_bytes": limits.memory_bytes + (settings.threads - 1) * _PER_THREAD
        if settings.provider == CPU
        else None,
        "seed": seed,
    }
    allowed = f"{limits.memory_bytes / _MIB:.0f} MiB and {limits.seconds:.0f} s"
    try:
        answer = in_fresh_process("secateurs_adapters.vetting", request, seconds=limits.seconds)
    except DataError as error:
        if "alloc" not in str(error).lower() and "memory" not in str(error):
            raise
        raise DataError(f"{error} It may take {allowed}; `--memory-limit` and `--time-limit` allow more.") from None
    except SecateursError as error:
        if error.exit_code == DataError.exit_code:
            raise
        raise DataError(
            f"{str(artifact.path)!r} does not run in a process of its own, where it may take {allowed}: {error} Check the file; "
            "`--memory-limit` and `--time-limit` allow more."
        ) from None
    return Vetted(answer["batch_size"], answer["length"], answer["run_ms"])


def _vet_here(request: dict[str, Any]) -> Mapping[str, Any]:
    if request["memory_bytes"] is not None:
        _limit_memory(request["memory_bytes"])
    options = SessionOptions(
        provider=request["provider"], threads=request["threads"], provider_options=request["options"]
    )
    session = Session(Path(request["file"]), options)
    fixed = session.fixed_batch()
    size = fixed if request["adopt_batch"] and fixed is not None else request["batch_size"]
    asked = request["lengths"]
    lengths: list[int | None] = asked if session.signature.has_lengths() else asked[:1]
    refusal: DataError | None = None
    for length in lengths:
        try:
            taken = _run(session, size, length, request["seed"])
        except DataError as error:
            refusal = refusal or error
            continue
        return {"batch_size": size, "length": None if length == LENGTHS[0] == asked[0] else length, "run_ms": taken}
    assert refusal is not None
    raise refusal


def _run(session: Session, size: int, length: int | None, seed: int) -> float:
    feeds = seeded_inputs(session, size, seed, length)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def _limit_memory(more: int) -> None:
    """Limit the address space to what it is now and `more` bytes, and leave no core file; does nothing where the system has no limits."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    serve(_vet_here, sys.argv[1:])
