"""Where a file's nodes run: how many on which execution provider, and what share of the time they take there.

onnxruntime gives the nodes that a provider cannot take to the CPU without a word. Which node went where is recorded when the session is
built; the time is that of onnxruntime's profile, over the runs after the first. A provider that fuses nodes runs them as one; the loop
around a subgraph counts with what runs inside.

Run as `python -m secateurs_adapters.placement REQUEST.json` this module is the measuring process.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from secateurs.settings import TargetSettings

__all__ = ["Placement", "find_placement", "place", "violation"]

RUNS = 5
"""Profiled runs after the first."""


@dataclass(frozen=True)
class Placement:
    """Which providers run a file.

    Attributes:
        obtained: the provider that takes most of the time, or most nodes where time is not known.
        nodes: how many nodes each provider runs; None where this onnxruntime does not tell.
        time: share of the nodes' time on each provider; None where this onnxruntime does not tell.
    """

    obtained: str
    nodes: Mapping[str, int] | None
    time: Mapping[str, float] | None


def place(path: Path, settings: TargetSettings, *, seed: int = 0) -> Placement:
    """Run a file in a fresh process and find out which providers its nodes ran on.

    Args:
        path: the file.
        settings: provider, options, threads, batch size.
        seed: of the inputs.

    Raises:
        SecateursError: the process failed.
    """
    request = {
        "file": str(path.resolve()),
        "provider": settings.provider,
        "options": settings.options,
        "threads": settings.threads,
        "batch_size": settings.batch_size,
        "length": settings.sequence_length,
        "seed": seed,
    }
    answer = in_fresh_process("secateurs_adapters.placement", request)
    return find_placement(answer["nodes"], answer["events"], answer["registered"])


def find_placement(
    nodes: Mapping[str, int] | None, events: Sequence[tuple[str, str, float]], registered: str
) -> Placement:
    """Sum up what a session and its profile say.

    Args:
        nodes: how many nodes were assigned to each provider, where the session tells.
        events: name, provider and microseconds of every node that ran.
        registered: the session's first provider.
    """
    spent: dict[str, float] = {}
    names: dict[str, set[str]] = {}
    for name, provider, duration in events:
        spent[provider] = spent.get(provider, 0.0) + duration
        names.setdefault(provider, set()).add(name)
    total = sum(spent.values())
    time = {provider: value / total for provider, value in sorted(spent.items())} if total > 0 else None
    counted = dict(nodes) if nodes is not None else {provider: len(found) for provider, found in names.items()} or None
    known: Mapping[str, float] = time or counted or {}
    return Placement(max(known, key=lambda name: known[name]) if known else registered, counted, time)


def violation(side: str, placement: Placement, settings: TargetSettings) -> str | None:
    """Return why a claim about the provider cannot stand: too much of the file ran elsewhere; None where it can.

    Args:
        side: `baseline` or `candidate`.
        placement: where it ran.
        settings: the provider asked for, and the share that may run elsewhere.
    """
    asked, allowed = settings.provider, settings.allow_elsewhere
    nodes, time = placement.nodes, placement.time
    if nodes is None and time is None:
        return (
            None
            if asked == placement.obtained == "CPUExecutionProvider"
            else f"this onnxruntime does not tell where the nodes of the {side} ran"
        )
    elsewhere = {name: count for name, count in (nodes or {}).items() if name != asked}
    total = sum((nodes or {}).values())
    share = 1.0 - time.get(asked, 0.0) if time is not None else sum(elsewhere.values()) / max(total, 1)
    if share <= allowed and (allowed > 0 or not elsewhere):
        return None
    if placement.obtained != asked:
        return f"the {side} was asked to run on {asked} but ran on {placement.obtained}"
    listed = ", ".join(f"{count} on {name}" for name, count in sorted(elsewhere.items()))
    spent = "" if time is None else f", with {share:.2%} of the time"
    return (
        f"{sum(elsewhere.values())} of {total} nodes of the {side} did not run on {asked}: {listed}{spent}; `allow_elsewhere` is "
        f"{allowed:g}"
    )


def _measure_here(request: dict[str, Any]) -> Mapping[str, Any]:
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        options = SessionOptions(
            provider=request["provider"],
            threads=request["threads"],
            provider_options=request["options"],
            record_assignment=True,
            profile=Path(folder) / "profile",
        )
        session = Session(Path(request["file"]), options)
        feeds = seeded_inputs(session, request["batch_size"], request["seed"], request["length"])
        for _ in range(1 + RUNS):
            session.run(feeds)
        events = session.end_profiling()
    later = events[len(events) // (1 + RUNS) :]
    return {
        "nodes": session.nodes_per_provider(),
        "registered": session.provider_obtained(),
        "events": [
            (f"{event['op_name']} {event['node_index']}", event["provider"], event["duration_us"])
            for event in later
            if event.get("provider")
        ],
    }


if __name__ == "__main__":
    serve(_measure_here, sys.argv[1:])
