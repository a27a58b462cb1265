"""Memory of a file: measured on the process that runs it, and profiled inside onnxruntime.

*Measured*: a fresh process loads one file with onnxruntime's default arena and memory pattern, runs it, and reads its
own peak. The same process with a one-node model is subtracted, which leaves what the file needs: weights, packed
weights, activations, scratch, inputs and outputs. The peak is of anonymous memory, because file-backed pages are
mostly onnxruntime's own code, which the system may drop and share.

*Profiled*: the largest `mem_in_use_peak` of any node, from onnxruntime's profile with the arena on and the memory
pattern off, in a session of its own. It holds activations, packed weights and scratch, without the caller's inputs. It
counts the arena's chunks, which may be up to twice as large as the tensor in them (6.0 MB lie in a chunk of 8.4 MB).

Run as `python -m secateurs_adapters.memory REQUEST.json` this module is the measuring process; it then imports numpy
and onnxruntime only.
"""

from __future__ import annotations

import gc
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.session import HOST_PROVIDERS, Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from secateurs.settings import TargetSettings

__all__ = ["MemoryFigures", "measure_memory", "profile_memory"]

RUNS = 3
"""Runs per process; the memory pattern takes its memory at the second."""
_STATUS = Path("/proc/self/status")
_ROLLUP = Path("/proc/self/smaps_rollup")
_KIB = 1024


@dataclass(frozen=True)
class MemoryFigures:
    """What one file needs beyond a one-node model, bytes; None where it was not measured.

    Attributes:
        peak_memory_bytes: peak of anonymous memory.
        resident_memory_bytes: peak of the resident set, with file-backed pages.
        proportional_memory_bytes: proportional set (PSS) after the runs, the session still loaded: file-backed pages count
            by the share of this process, so it moves by megabytes when other processes that run onnxruntime come and go.
            The system records no peak of it.
        reason: why something was not measured, or how it was approximated; empty otherwise.
    """

    peak_memory_bytes: int | None
    resident_memory_bytes: int | None
    proportional_memory_bytes: int | None
    reason: str = ""


def measure_memory(paths: Sequence[Path], settings: TargetSettings, *, seed: int = 0) -> list[MemoryFigures]:
    """Measure each file in fresh processes of its own, medians over `settings.memory_repeats`, interleaved.

    Args:
        paths: the files.
        settings: provider, threads, batch size, repeats.
        seed: of the inputs.

    Returns:
        One entry per file, in order.

    Raises:
        SecateursError: a process failed.
    """
    if settings.provider not in HOST_PROVIDERS:
        reason = f"{settings.provider} keeps its tensors in device memory, which the process's own memory does not show"
        return [MemoryFigures(None, None, None, reason) for _ in paths]
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        base = Path(folder) / "base.onnx"
        base.write_bytes(ONE_NODE)
        files = [base, *(path.resolve() for path in paths)]
        answers: list[list[dict[str, Any]]] = [[] for _ in files]
        for _ in range(settings.memory_repeats):
            for file, found in zip(files, answers, strict=True):
                found.append(in_fresh_process("secateurs_adapters.memory", _request("resident", file, settings, seed)))
    keys = ("anonymous", "resident", "proportional")
    ground = [_median(answers[0], key) for key in keys]
    reason = str(answers[0][0]["reason"])
    figures = []
    for found in answers[1:]:
        peak, resident, proportional = (
            _above(_median(found, key), under) for key, under in zip(keys, ground, strict=True)
        )
        figures.append(MemoryFigures(peak, resident, proportional, reason))
    return figures


def profile_memory(path: Path, settings: TargetSettings, *, seed: int = 0, written: Path | None = None) -> int | None:
    """Return the peak of onnxruntime's arena during one run of the file, bytes.

    None where this onnxruntime does not report it (before 1.28).

    Args:
        path: the file.
        settings: provider, threads, batch size.
        seed: of the inputs.
        written: where the profiled session writes the graph that it runs; None writes nothing.
    """
    request = _request("profile", path.resolve(), settings, seed)
    request["written"] = None if written is None else str(written.resolve())
    peak = in_fresh_process("secateurs_adapters.memory", request)["peak"]
    return None if peak is None else int(peak)


def _request(task: str, path: Path, settings: TargetSettings, seed: int) -> dict[str, Any]:
    return {
        "task": task,
        "file": str(path),
        "provider": settings.provider,
        "options": settings.options,
        "threads": settings.threads,
        "batch_size": settings.batch_size,
        "length": settings.sequence_length,
        "seed": seed,
    }


def _median(answers: Sequence[Mapping[str, Any]], key: str) -> int | None:
    values = [answer[key] for answer in answers if answer[key] is not None]
    return int(statistics.median(values)) if values else None


def _above(value: int | None, base: int | None) -> int | None:
    return None if value is None or base is None else max(0, value - base)


def _measure_here(request: dict[str, Any]) -> Mapping[str, Any]:
    return _resident(request) if request["task"] == "resident" else _profile(request)


def _options(request: Mapping[str, Any], **more: Any) -> SessionOptions:
    return SessionOptions(
        provider=request["provider"], threads=request["threads"], provider_options=request["options"], **more
    )


def _run(session: Session, request: Mapping[str, Any], times: int) -> None:
    feeds = seeded_inputs(session, request["batch_size"], request["seed"], request["length"])
    for _ in range(times):
        session.run(feeds)


def _resident(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Load and run the file in this process and read its peak from the kernel, bytes."""
    gc.collect()
    reason = _reset_peak()
    session = Session(Path(request["file"]), _options(request))
    _run(session, request, RUNS)
    return _linux_peak(reason) if _STATUS.exists() else _portable_peak()


def _reset_peak() -> str:
    """Make the kernel forget the peak of the imports; return why it could not, if so."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return "the peak includes the imports, since the kernel does not let it be reset"
    return ""


def _linux_peak(reason: str) -> Mapping[str, Any]:
    fields = _fields(_STATUS)
    peak, anonymous, mapped, shared = (fields[key] for key in ("VmHWM", "RssAnon", "RssFile", "RssShmem"))
    return {
        "anonymous": max(anonymous, peak - mapped - shared),
        "resident": peak,
        "proportional": _fields(_ROLLUP).get("Pss"),
        "reason": reason,
    }


def _fields(file: Path) -> dict[str, int]:
    """Return the lines `name: number kB` of a file of the kernel's, in bytes; none where the system has no such file."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.endswith("kB") and ":" in line)
    return {name: int(value.split()[0]) * _KIB for name, value in pairs}


def _portable_peak() -> Mapping[str, Any]:
    """Read what psutil knows where there is no /proc: memory at the end instead of its peak."""
    try:
        import psutil
    except ImportError:
        return {
            "anonymous": None,
            "resident": None,
            "proportional": None,
            "reason": "memory needs /proc, or the package psutil",
        }
    process = psutil.Process()
    resident = getattr(process.memory_info(), "peak_wset", process.memory_info().rss)
    reason = (
        "memory that is the process's own at the end, not its peak: this system reports no peak of anonymous memory"
    )
    return {
        "anonymous": process.memory_full_info().uss,
        "resident": resident,
        "proportional": None,
        "reason": reason,
    }


def _profile(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Run the file once with the profiler on, and return the largest peak of any node's arena, bytes."""
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        written = Path(request["written"]) if request.get("written") else None
        options = _options(request, memory_pattern=False, profile=Path(folder) / "profile", optimised=written)
        session = Session(Path(request["file"]), options)
        _run(session, request, 1)
        nodes = session.end_profiling()
    peaks = [int(node.get("mem_in_use_peak", -1)) for node in nodes]
    return {"peak": max((peak for peak in peaks if peak >= 0), default=None)}


if __name__ == "__main__":
    serve(_measure_here, sys.argv[1:])
