"""Budgets: hard ceilings on what ships, and the verdict over them.

A row fails when the measured value breaks its limit, and is undecided, which is no pass, when the noise does not allow to say. Accuracy is
gated on the point drop unless `accuracy_confidence` asks for a statistical gate. A limit on something that was not measured is undecided,
never passed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from secateurs.errors import BudgetError, unknown_name
from secateurs.intervals import paired_difference_interval
from secateurs.report import Accuracy, BudgetRow, Estimate, Ratios, Side, Status, TargetFigures, TargetRatios

__all__ = ["MIB", "Budget", "accuracy_row", "judge", "parse_budget", "verdict"]

MIB = 1024 * 1024


class Budget(BaseModel):
    """The ceilings of a run; a limit that is None is not checked. A device stands for limits, which `secateurs.devices.fill_in` puts in."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    device: str | None = Field(
        None, description="device whose profile sets the limits on memory and size that are not given"
    )
    memory_share: float | None = Field(
        None, gt=0, le=1, description="share of the device's RAM that the network may take; 0.25 if not given"
    )
    accuracy_drop: float | None = Field(
        None, ge=0, le=1, description="largest drop of the metric, a fraction (0.01 is one point)"
    )
    accuracy_confidence: float | None = Field(
        None, gt=0.5, lt=1, description="gate on the exact interval's upper end at this confidence"
    )
    latency_ratio: float | None = Field(None, gt=0, description="largest candidate / baseline latency (p50)")
    latency_ms: float | None = Field(None, gt=0, description="largest p50 of the candidate, milliseconds per batch")
    peak_memory_mib: float | None = Field(None, gt=0, description="largest measured peak memory of the candidate, MiB")
    peak_memory_ratio: float | None = Field(None, gt=0, description="largest candidate / baseline measured peak memory")
    fits_mib: float | None = Field(
        None, gt=0, description="largest memory limit that the candidate needs to run under, MiB"
    )
    artifact_mib: float | None = Field(None, gt=0, description="largest size of all files that ship, MiB")
    artifact_ratio: float | None = Field(
        None, gt=0, description="largest candidate / baseline size of all files that ship"
    )
    macs_ratio: float | None = Field(None, gt=0, description="largest candidate / baseline MACs")
    parameters_ratio: float | None = Field(None, gt=0, description="largest candidate / baseline parameters")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "device":  # which Python counts as 0 or 1
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return value


def parse_budget(data: Mapping[str, Any] | None) -> Budget:
    """Read a budget, with the nearest known name for an unknown limit.

    Raises:
        BudgetError: an unknown limit, a value outside what it allows, or one that says more of a limit that is not given.
    """
    data = dict(data or {})
    for key in data:
        if key not in Budget.model_fields:
            raise BudgetError(unknown_name("budget", str(key), Budget.model_fields))
    if data.get("memory_share") is not None and data.get("device") is None:
        raise BudgetError(
            "`budget.memory_share` is a share of a device's RAM; give `device` too, or `peak_memory_mib`."
        )
    if data.get("accuracy_confidence") is not None and data.get("accuracy_drop") is None:
        raise BudgetError(
            "`budget.accuracy_confidence` says how surely `accuracy_drop` is kept, and limits nothing by itself; give `accuracy_drop` too, or "
            "leave it out."
        )
    try:
        return Budget(**data)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        about = Budget.model_fields[name].description
        raise BudgetError(f"`budget.{name}`: {first['msg']} (got {first['input']!r}); it is the {about}.") from None


def judge(budget: Budget, candidate: Side, ratios: Ratios) -> list[BudgetRow]:
    """Compare what was measured with the budget, one row per limit and target."""
    rows = [
        _row("artifact_mib", None, budget.artifact_mib, _scaled(candidate.artifact_bytes, MIB)),
        _row("artifact_ratio", None, budget.artifact_ratio, ratios.artifact_bytes),
        _row("macs_ratio", None, budget.macs_ratio, ratios.macs),
        _row("parameters_ratio", None, budget.parameters_ratio, ratios.params),
    ]
    if not candidate.targets:
        rows += _target_rows(budget, None, None, TargetRatios())
    for figures, target_ratios in zip(candidate.targets, ratios.targets, strict=True):
        rows += _target_rows(budget, figures.label, figures, target_ratios)
    return [row for row in rows if row is not None]


def _target_rows(
    budget: Budget, label: str | None, figures: TargetFigures | None, ratios: TargetRatios
) -> list[BudgetRow | None]:
    latency = figures.latency_ms if figures else None
    typical = None if latency is None else Estimate(value=latency.p50, ci95=latency.p50_ci95)
    processes = None if latency is None else latency.processes
    peak = figures.peak_memory_bytes if figures else None
    return [
        accuracy_row(budget, label, ratios, figures.accuracy if figures else None),
        _interval_row("latency_ratio", label, budget.latency_ratio, ratios.latency_p50, processes),
        _interval_row("latency_ms", label, budget.latency_ms, typical, processes),
        _row("peak_memory_mib", label, budget.peak_memory_mib, _scaled(peak, MIB)),
        _row("peak_memory_ratio", label, budget.peak_memory_ratio, ratios.peak_memory),
        _row("fits_mib", label, budget.fits_mib, _scaled(figures.fits_bytes if figures else None, MIB)),
    ]


def _scaled(value: int | None, unit: int) -> float | None:
    return None if value is None else value / unit


def _row(name: str, target: str | None, limit: float | None, measured: float | None) -> BudgetRow | None:
    if limit is None:
        return None
    status: Status = "undecided" if measured is None else "pass" if measured <= limit else "fail"
    reason = "not measured" if measured is None else None
    return BudgetRow(name=name, target=target, limit=limit, measured=measured, status=status, reason=reason)


def _interval_row(
    name: str, target: str | None, limit: float | None, measured: Estimate | None, processes: int | None
) -> BudgetRow | None:
    """Decide by the interval: pass if all of it is allowed, fail if none of it is, else undecided."""
    if limit is None or measured is None:
        return _row(name, target, limit, None)
    low, high = measured.ci95 or (measured.value, measured.value)
    status: Status = "pass" if high <= limit else "fail" if low > limit else "undecided"
    over = "" if processes is None else f" over {processes} processes"
    reason = f"the limit lies inside the 95 % interval{over}: raise `max_processes`, or quieten the machine"
    return BudgetRow(
        name=name,
        target=target,
        limit=limit,
        measured=measured.value,
        ci95=(low, high),
        status=status,
        reason=reason if status == "undecided" else None,
    )


def accuracy_row(
    budget: Budget, target: str | None, ratios: TargetRatios, accuracy: Accuracy | None = None
) -> BudgetRow | None:
    """Gate on the point drop, or on the exact paired interval at the confidence asked for; None without a limit.

    Args:
        budget: the ceilings.
        target: where it was measured.
        ratios: the drop, and the pairs behind it.
        accuracy: of the candidate; one that is not finite fails.
    """
    limit, drop, pairs = budget.accuracy_drop, ratios.accuracy_drop, ratios.accuracy_pairs
    if limit is not None and accuracy is not None and accuracy.value is None:
        reason = f"{accuracy.metric} of the candidate is not finite"
        return BudgetRow(name="accuracy_drop", target=target, limit=limit, measured=None, status="fail", reason=reason)
    if limit is None or drop is None:
        return _row("accuracy_drop", target, limit, None)
    if budget.accuracy_confidence is None:
        # One example more or less must not turn on the rounding of a division.
        status: Status = "pass" if drop.value <= limit + 1e-9 else "fail"
        return BudgetRow(
            name="accuracy_drop", target=target, limit=limit, measured=drop.value, ci95=drop.ci95, status=status
        )
    if pairs is None:
        row = _row("accuracy_drop", target, limit, drop.value)
        assert row is not None
        return row.model_copy(
            update={
                "status": "undecided",
                "reason": "this metric has no exact interval; leave `accuracy_confidence` out",
            }
        )
    low, high = paired_difference_interval(pairs.lost, pairs.gained, pairs.n, budget.accuracy_confidence)
    status = "pass" if high <= limit else "fail" if low > limit else "undecided"
    reason = f"the {budget.accuracy_confidence:g} interval is [{low:.4f}, {high:.4f}]; more examples narrow it"
    return BudgetRow(
        name="accuracy_drop",
        target=target,
        limit=limit,
        measured=drop.value,
        ci95=drop.ci95,
        status=status,
        reason=None if status == "pass" else reason,
    )


def verdict(rows: Sequence[BudgetRow], reasons: Sequence[str] = ()) -> Status:
    """Return the overall verdict: fail if anything failed or there is another reason to, else undecided if anything is, else pass."""
    if reasons or any(row.status == "fail" for row in rows):
        return "fail"
    return "undecided" if any(row.status == "undecided" for row in rows) else "pass"
