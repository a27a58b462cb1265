"""The views of a file's memory beside each other: planned, profiled and measured, and the fits-test where it is asked for.

Each view sees something else. *Planned* predicts onnxruntime's arena from the graph; *profiled* is what onnxruntime counts in it: with
the arena on and the memory pattern off, both are of the very same session's graph, so that a difference is a fault of the plan, not of the
order that a session gives to independent nodes. *Measured* is what the process takes, with the weights, the graph and the inputs, and with
the memory pattern, which onnxruntime has on by default. The *fits-test* is what it must be given.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import SecateursError
from secateurs.report import ArenaSettings, DeviceMemory, FitsTest, MemoryViews, PlannedMemory
from secateurs_adapters.device_memory import NVIDIA, measure_device
from secateurs_adapters.fits import FitsFigures, find_fits
from secateurs_adapters.fresh import in_fresh_process
from secateurs_adapters.memory import MemoryFigures, measure_memory, profile_memory
from secateurs_adapters.session import CPU, onnxruntime_version

if TYPE_CHECKING:
    from secateurs.interfaces import Artifact
    from secateurs.settings import TargetSettings

__all__ = ["Views", "plan_in_process", "take_views"]

PLAN_SECONDS = 120
"""After this long a file counts as one that cannot be planned."""
_LARGEST = 1 << 30
"""Bytes of a file that is still planned: onnxruntime writes the graph that it runs as one protobuf of less than 2 GiB."""
_SETTINGS = {
    "planned": ArenaSettings(memory_arena=True, memory_pattern=False),
    "profiled": ArenaSettings(memory_arena=True, memory_pattern=False),
    "measured": ArenaSettings(memory_arena=True, memory_pattern=True),
    "fits": ArenaSettings(memory_arena=True, memory_pattern=False),
}


@dataclass(frozen=True)
class Views:
    """The memory of one file, bytes; None where there is no figure, and then `memory.reasons` says why.

    Attributes:
        measured: of the process.
        profiled: peak of the arena, counted by onnxruntime.
        planned: peak of the arena, predicted from the graph.
        fits: smallest memory limit.
        memory: parts, differences, settings and reasons.
    """

    measured: MemoryFigures
    profiled: int | None
    planned: int | None
    fits: int | None
    memory: MemoryViews


def take_views(
    files: Sequence[Artifact],
    settings: TargetSettings,
    *,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Views]:
    """Take every view of each file's memory, in fresh processes.

    Args:
        files: baseline and candidate.
        settings: provider, threads, batch size, repeats, and whether the fits-test is asked for.
        seed: of the inputs.
        tell: told of every view.

    Returns:
        One entry per file, in order.

    Raises:
        SecateursError: a file cannot be run.
    """
    paths = [file.path for file in files]
    tell("memory")
    measured = measure_memory(paths, settings, seed=seed)
    tell("profile")
    inside = [_inside(file, settings, seed) for file in files]
    if settings.fits:
        tell("fits-test")
    fits = _fits(paths, settings, seed)
    return [_beside(*one, settings) for one in zip(paths, measured, inside, fits, strict=True)]


@dataclass(frozen=True)
class _Inside:
    """What happens in onnxruntime's arena."""

    profiled: int | None
    planned: int | None
    parts: PlannedMemory | None
    reason: str


def _inside(file: Artifact, settings: TargetSettings, seed: int) -> _Inside:
    """Profile a file, and plan the graph that the profiled session ran."""
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        written = Path(folder) / "runs.onnx"
        reason = _why_no_plan(file, settings)
        profiled = profile_memory(file.path, settings, seed=seed, written=None if reason else written)
        if profiled is None and not reason:
            reason = f"what kernels need is asked of onnxruntime's memory statistics, which {onnxruntime_version()} lacks; 1.28 has them"
        if reason:
            return _Inside(profiled, None, None, reason)
        try:
            plan = plan_in_process(file.path, settings, written)
        except SecateursError as error:
            return _Inside(profiled, None, None, str(error))
    if plan["unknown"]:
        listed = ", ".join(plan["unknown"])
        return _Inside(profiled, None, None, f"the scratch and the packed weights of {listed} are not known")
    peak = plan.pop("peak_bytes")
    del plan["unknown"]
    return _Inside(profiled, peak, PlannedMemory(**plan), "")


def _why_no_plan(file: Artifact, settings: TargetSettings) -> str:
    if settings.provider != CPU:
        return f"plans follow the kernels of {CPU}, not those of {settings.provider}"
    if file.artifact_bytes > _LARGEST:
        return f"the file has {file.artifact_bytes} bytes; at most {_LARGEST} are planned"
    return ""


def plan_in_process(path: Path, settings: TargetSettings, written: Path | None = None) -> dict[str, Any]:
    """Plan a file in a fresh process, since shapes are inferred and kernels are run for it.

    Args:
        path: the file.
        settings: provider, threads, batch size.
        written: the graph that a session wrote, in its order; None lets a session write one.

    Returns:
        `peak_bytes`, `unknown`, and the fields of `PlannedMemory`.

    Raises:
        SecateursError: it cannot be planned.
    """
    request = {
        "file": str(path.resolve()),
        "written": None if written is None else str(written),
        "provider": settings.provider,
        "options": settings.options,
        "threads": settings.threads,
        "batch_size": settings.batch_size,
        "length": settings.sequence_length,
    }
    return in_fresh_process("secateurs_adapters.planned", request, seconds=PLAN_SECONDS)


def _fits(paths: Sequence[Path], settings: TargetSettings, seed: int) -> list[FitsFigures]:
    if not settings.fits:
        reason = "not asked for: give the target `fits: true`, or the budget a limit `fits_mib`"
        return [FitsFigures(reason=reason) for _ in paths]
    try:
        return find_fits(paths, settings, seed=seed)
    except SecateursError as error:
        return [FitsFigures(reason=str(error)) for _ in paths]


def _beside(path: Path, measured: MemoryFigures, inside: _Inside, fits: FitsFigures, settings: TargetSettings) -> Views:
    profiled = inside.profiled
    reasons = {"planned": inside.reason, "measured": measured.reason, "fits": fits.reason}
    if profiled is None:
        reasons["profiled"] = (
            f"onnxruntime {onnxruntime_version()} does not count the arena of {settings.provider} (it does since 1.28, on the CPU)"
        )
    device, reasons["device"] = _device(path, settings, profiled)
    return Views(
        measured,
        profiled,
        inside.planned,
        fits.fits_bytes,
        MemoryViews(
            planned=inside.parts,
            planned_minus_profiled=_minus(inside.planned, profiled),
            measured_minus_profiled=_minus(measured.peak_memory_bytes, profiled),
            fits_minus_profiled=_minus(fits.fits_bytes, profiled),
            fits=FitsTest(limit_bytes=list(fits.limits), spread_bytes=fits.spread_bytes or 0) if fits.limits else None,
            device=device,
            settings=dict(_SETTINGS),
            reasons={view: reason for view, reason in reasons.items() if reason},
        ),
    )


def _device(path: Path, settings: TargetSettings, profiled: int | None) -> tuple[DeviceMemory | None, str]:
    """Return what an NVIDIA GPU holds; None, and no reason, for other providers."""
    if settings.provider not in NVIDIA:
        return None, ""
    try:
        used, reason = measure_device(path, settings), ""
    except SecateursError as error:
        used, reason = None, str(error)
    return DeviceMemory(arena_bytes=profiled, used_bytes=used), reason


def _minus(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one - other
