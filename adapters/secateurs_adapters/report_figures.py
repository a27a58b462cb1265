"""Which figures a report has: of its passes, its search, its files and their memory.

What a pass tells in its details is checked before it is drawn; a pass that gives these names another meaning is drawn without figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from secateurs_adapters.figures import Group, Point, heat_map, memory_curve, scatter, unit_bars

if TYPE_CHECKING:
    from secateurs.report import PassRecord, Report, Side, Trial
    from secateurs_adapters.svg import Figure

__all__ = ["Details", "details_of", "figures_of_pass", "figures_of_report"]

_BLOCKS = 512
"""Blocks that are drawn at the most."""
Figures = Annotated[list[list[Annotated[float, Field(allow_inf_nan=False)] | None]], Field(max_length=_BLOCKS)]


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Units(_Lenient):
    root: str
    before: Annotated[int, Field(ge=0, le=2**40)]
    kept: Annotated[int, Field(ge=0, le=2**40)]
    reason: str = ""


class _Dropped(_Lenient):
    block: str
    reason: str = ""


class _Option(_Lenient):
    keep: Annotated[int, Field(ge=0, le=2**40)]
    kl: float | None = None


class _Round(_Lenient):
    edits: int
    accepted: bool
    validation: float | None = None


class Details(_Lenient):
    """What the page draws of a pass's details; other passes may tell other things."""

    blocks: list[str] = Field(default_factory=list)
    compared: list[str] | None = None
    cka: Figures = Field(default_factory=list)
    clusters: list[list[int]] = Field(default_factory=list)
    segments: list[list[str]] = Field(default_factory=list)
    dropped: list[_Dropped] = Field(default_factory=list)
    units: list[_Units] = Field(default_factory=list)
    divergences: dict[str, list[_Option]] = Field(default_factory=dict)
    rounds: list[_Round] = Field(default_factory=list)
    validation_before: float | None = None

    @property
    def names(self) -> list[str]:
        """Blocks of the rows of `cka`."""
        return self.blocks if self.compared is None else self.compared


def details_of(record: PassRecord) -> Details:
    """Return what can be drawn, without a similarity that is too large or not finite; nothing where a pass gave these names another meaning."""
    for left_out in ((), ("cka",)):
        try:
            return Details.model_validate(
                {name: value for name, value in record.details.items() if name not in left_out}
            )
        except ValidationError:
            continue
    return Details()


def figures_of_pass(details: Details) -> Iterator[Figure]:
    """Yield the similarity of the blocks, and the units that each group kept."""
    names, matrix = details.names, details.cka
    if matrix and len(names) == len(matrix) and all(len(row) == len(matrix) for row in matrix):
        boxes, kind = _boxes(details)
        dropped = {one.block: one.reason for one in details.dropped if one.block in names}
        yield heat_map(names, matrix, boxes, kind, dropped)
    groups = [Group(one.root, one.before, one.kept, one.reason) for one in details.units]
    told = {group.root for group in groups}
    for root, options in details.divergences.items():
        if root not in told and options:
            whole = max(options, key=lambda option: option.keep).keep
            groups.append(Group(root, whole, whole, _why_whole(options)))
    if groups:
        yield unit_bars(groups)


def _boxes(details: Details) -> tuple[list[list[int]], str]:
    """Return clusters or segments as runs of indices; those that are no runs of this matrix are left out."""
    place = {name: number for number, name in enumerate(details.names)}
    segments = [[place[name] for name in segment if name in place] for segment in details.segments]
    boxes, kind = (segments, "segments") if segments else (details.clusters, "clusters")
    return [
        box for box in boxes if box and box == list(range(box[0], box[-1] + 1)) and box[0] >= 0 and box[-1] < len(place)
    ], kind


def _why_whole(options: Sequence[_Option]) -> str:
    narrower = sorted((option for option in options if option.kl is not None), key=lambda option: -option.keep)[1:2]
    return "kept whole" + "".join(
        f": with {one.keep} units the output would diverge by {one.kl:.4g}" for one in narrower
    )


def _trial_point(trial: Trial, cost: float) -> Point | None:
    if trial.validation is None:
        return None
    low = high = None
    if trial.drop is not None and trial.drop_ci95 is not None:
        top = trial.validation + trial.drop
        low, high = top - trial.drop_ci95[1], min(top - trial.drop_ci95[0], 1.0)
    kind = "chosen" if trial.chosen else "accepted" if trial.accepted else "rejected"
    return Point(str(trial.number), cost, trial.validation, kind, "; ".join(trial.reasons), low, high)


def _search_figure(report: Report) -> Figure | None:
    """Draw every network that a search tried, beside the baseline: over predicted latency, or over the cost where one has none."""
    cost, ratios = "predicted latency", [trial.latency_ratio for trial in report.trials]
    if None in ratios:
        cost, ratios = _cost_name(report.trials), [trial.cost_ratio for trial in report.trials]
    drawn = [
        _trial_point(trial, ratio) for trial, ratio in zip(report.trials, ratios, strict=True) if ratio is not None
    ]
    points = [point for point in drawn if point is not None]
    if not points:
        return None
    dense = next((details_of(record).validation_before for record in report.passes), None)
    if dense is not None:
        points.insert(0, Point("dense", 1.0, dense, "baseline"))
    metric = report.baseline.accuracy.metric if report.baseline.accuracy else "metric"
    return scatter(
        "Every network that was tried",
        f"The {metric} on validation data against {cost}, candidate / baseline",
        f"{cost}, candidate / baseline",
        metric,
        points,
    )


def _cost_name(trials: Sequence[Trial]) -> str:
    if all(trial.cost_ratio == trial.macs_ratio for trial in trials):
        return "MACs"
    return "parameters" if all(trial.cost_ratio == trial.params_ratio for trial in trials) else "cost"


def _files_figure(report: Report) -> Figure | None:
    """Draw the metric of each measured file against its latency, on the first target."""
    sides: list[tuple[str, str, Side]] = [
        ("baseline", "baseline", report.baseline),
        ("candidate", "chosen", report.candidate),
    ]
    if report.variants:
        sides = [
            (one.name, "chosen" if one.ships else "baseline" if one.name == "dense" else "accepted", one.side)
            for one in report.variants
        ]
    points = []
    for name, kind, side in sides:
        target = side.targets[0] if side.targets else None
        if target is None or target.latency_ms is None or target.accuracy is None:
            return None
        found = target.accuracy
        if found.value is None:
            continue
        low, high = found.ci95 or (None, None)
        points.append(Point(name, target.latency_ms.p50, found.value, kind, f"{found.n} examples", low, high))
    metric = report.baseline.targets[0].accuracy.metric if report.baseline.targets[0].accuracy else "metric"
    return scatter(
        f"{metric.capitalize()} against latency",
        f"Each file on {report.baseline.targets[0].label}, on evaluation data",
        "latency p50, ms",
        metric,
        points,
    )


def _memory_figures(report: Report) -> Iterator[Figure]:
    for before, after in zip(report.baseline.targets, report.candidate.targets, strict=False):
        plans = [one.memory.planned if one.memory else None for one in (before, after)]
        first, second = plans
        if first is not None and second is not None and first.live_bytes and second.live_bytes:
            yield memory_curve(before.label, first.live_bytes, second.live_bytes, [first.peak_node, second.peak_node])


def figures_of_report(report: Report) -> Iterator[Figure]:
    """Yield the figures of the whole run: files measured, networks tried, memory over a run."""
    yield from (figure for figure in (_files_figure(report), _search_figure(report)) if figure is not None)
    yield from _memory_figures(report)
