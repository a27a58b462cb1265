"""Reports to draw: small and whole, with parts missing, and as large as they come."""

from __future__ import annotations

import math

from secateurs.report import (
    Accuracy,
    BudgetRow,
    Certificate,
    Environment,
    Estimate,
    Latency,
    MemoryViews,
    Parity,
    PassRecord,
    PlannedMemory,
    Ratios,
    Report,
    Side,
    Skipped,
    TargetFigures,
    TargetRatios,
    Trial,
)

HOSTILE = '</title><script>alert("1")</script><img src=x onerror=alert(2)>&amp;\x1b[2J'
LIVE = ([4096, 8192, 8192, 2048], [4096, 6144, 1024])
ENVIRONMENT = Environment(
    versions={"torch": "2.9", "onnxruntime": "1.23"}, cpu="a CPU", threads=1, seed=7, git="abc123"
)


def side(right: float, ms: float, peak: int, live: list[int]) -> Side:
    """Return what was measured of one file on one target."""
    planned = PlannedMemory(
        tensor_bytes=max(live),
        scratch_bytes=0,
        packed_bytes=0,
        constant_bytes=0,
        live_bytes=live,
        peak_node=f"Conv /n{live.index(max(live))}",
    )
    accuracy = Accuracy(value=right, ci95=(right - 0.02, min(right + 0.02, 1.0)), n=450, metric="accuracy")
    target = TargetFigures(
        provider="CPUExecutionProvider",
        threads=1,
        batch_size=1,
        latency_ms=Latency(p50=ms, n=40, cv=0.1),
        peak_memory_bytes=peak,
        memory=MemoryViews(planned=planned),
        accuracy=accuracy,
    )
    return Side(params=peak // 4, macs=peak * 10, artifact_bytes=peak, accuracy=accuracy, targets=[target])


def matrix(count: int) -> list[list[float | None]]:
    """Return a similarity that falls with the distance of two blocks."""
    return [[math.exp(-abs(i - j) / 8) for j in range(count)] for i in range(count)]


def trials(count: int) -> list[Trial]:
    """Return networks ever smaller; every third is rejected, the first is chosen."""
    return [
        Trial(
            number=n,
            blocks=n % 3,
            edits=n,
            cost_ratio=1 / (1 + n / 10),
            macs_ratio=1 / (1 + n / 10),
            params_ratio=0.5,
            latency_ratio=1 / (1 + n / 20),
            validation=1 - n / 300,
            drop=n / 300,
            drop_ci95=(n / 300 - 0.01, n / 300 + 0.02),
            accepted=n % 3 > 0,
            chosen=n == 1,
            seconds=1.0,
            reasons=[] if n % 3 else [f"drop {n / 300:.4f} is more than 0.03 allows"],
        )
        for n in range(1, count + 1)
    ]


def whole(name: str = "stage", blocks: int = 6, networks: int = 5) -> Report:
    """Return a report with every part.

    Args:
        name: start of every layer's name.
        blocks: rows of the heat map, and bars.
        networks: trials.
    """
    names = [f"{name}.{number}" for number in range(blocks)]
    half = blocks // 2
    depth = PassRecord(
        name="cka-cluster",
        settings={"threshold": 0.8, "note": name},
        edits=1,
        skipped=[Skipped(where=f"{name}.kept", reason=f"changes the shape of {name}")],
        certificate=Certificate(max_abs=1e-7, scale=4.0),
        seconds=2.0,
        details={
            "blocks": names,
            "cka": matrix(blocks),
            "clusters": [list(range(half)), list(range(half, blocks))],
            "dropped": [{"block": names[1], "reason": f"CKA 0.99 with {names[0]}"}],
            "rounds": [{"edits": 1, "accepted": True, "validation": 0.9}],
            "validation_before": 0.95,
        },
    )
    width = PassRecord(
        name="mi-nodes",
        settings={"target_macs": 0.5},
        edits=blocks,
        seconds=9.0,
        details={
            "units": [
                {"root": one, "before": 32 + number % 2, "kept": 8 + number % 9, "reason": f"least divergence of {one}"}
                for number, one in enumerate(names)
            ],
            "divergences": {
                f"{name}.head": [{"keep": 16, "kl": 0.0}, {"keep": 12, "kl": 0.25}],
                names[0]: [{"keep": 8, "kl": 0.0}],
            },
        },
    )
    return Report(
        verdict="pass",
        baseline=side(0.98, 0.05, 2**21, LIVE[0]),
        candidate=side(0.97, 0.03, 2**20, LIVE[1]),
        ratios=Ratios(
            params=0.5,
            macs=0.5,
            artifact_bytes=0.5,
            targets=[
                TargetRatios(
                    latency_p50=Estimate(value=0.6, ci95=(0.59, 0.61)),
                    peak_memory=0.5,
                    accuracy_drop=Estimate(value=0.01, ci95=(0.0, 0.02)),
                )
            ],
        ),
        passes=[depth, width],
        trials=trials(networks),
        parity=Parity(max_abs=1e-6, max_rel=1e-7, tolerance=1e-4, batch_sizes=[1, 3]),
        budget=[
            BudgetRow(name="macs_ratio", limit=0.5, measured=0.5, status="pass"),
            BudgetRow(
                name="accuracy_drop",
                target="CPUExecutionProvider batch 1",
                limit=0.02,
                measured=0.01,
                ci95=(0.0, 0.02),
                status="pass",
            ),
        ],
        notes=[f"a note on {name}"],
        environment=ENVIRONMENT,
        seconds=12.0,
    )


def odd() -> dict[str, Report]:
    """Return reports with parts missing, bad verdicts, figures that are not finite, and hundreds of everything."""
    full, limit = whole(), BudgetRow(name="latency_ratio", limit=0.8, measured=None, status="fail", reason="too slow")
    unknown = whole()
    unknown.passes[0].details["cka"][0][1] = None
    broken = whole()
    broken.passes[0].details["cka"][0][1] = math.nan
    broken.trials[0].validation = None
    return {
        "whole": full,
        "empty": Report(verdict="fail", environment=ENVIRONMENT),
        "without export": Report(verdict="undecided", passes=full.passes, environment=ENVIRONMENT),
        "failed": full.model_copy(update={"verdict": "fail", "reasons": ["nothing was pruned"], "budget": [limit]}),
        "undecided": full.model_copy(
            update={"verdict": "undecided", "budget": [limit.model_copy(update={"status": "undecided"})]}
        ),
        "unknown": unknown,
        "not finite": broken,
        "hostile": whole(HOSTILE),
        "long names": whole("a_very_long_name_without_a_place_to_break_it" * 6),
        "large": whole("model.encoder.layers", blocks=300, networks=200),
    }
