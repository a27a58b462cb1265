"""The report of a run.

`report.json` is a `Report`; its JSON schema ships in the package (`report.schema.json`). A key that was not measured is null, never absent.
Ratios are candidate over baseline. Times are milliseconds per batch, memory is bytes.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from secateurs.files import read_form

__all__ = [
    "Accuracy",
    "ArenaSettings",
    "BudgetRow",
    "Certificate",
    "DeviceMemory",
    "Environment",
    "Estimate",
    "FitsTest",
    "Latency",
    "LatencyRatio",
    "MemoryViews",
    "Pairs",
    "Parity",
    "PassRecord",
    "PlannedMemory",
    "Ratios",
    "Report",
    "Side",
    "Skipped",
    "TargetFigures",
    "TargetRatios",
    "Trial",
    "Variant",
    "report_schema",
]

Status = Literal["pass", "fail", "undecided"]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="null")


class Skipped(_Form):
    """Something that was not pruned, and why."""

    where: str
    reason: str


class Certificate(_Form):
    """The measured difference between the pruned network and the masked original.

    Attributes:
        max_abs: largest absolute difference of any output.
        scale: largest absolute output of the masked original.
        tolerance: share of how much an output varies over the examples, that it may differ by.
        worst: largest difference of any number as a share of what is allowed for it; null where it was not measured.
        batch_sizes: the batch sizes it was measured on.
    """

    max_abs: float
    scale: float
    tolerance: float = 1e-4
    worst: float | None = None
    batch_sizes: list[int] = Field(default_factory=list)

    @property
    def share(self) -> float:
        """`worst`; without it, `max_abs` as a share of what `scale` allows."""
        if self.worst is not None or self.max_abs == 0.0:
            return self.worst or 0.0
        return self.max_abs / (self.tolerance * self.scale) if self.scale else math.inf

    @property
    def holds(self) -> bool:
        """Whether every difference is finite and within what is allowed."""
        return self.share <= 1.0


class Estimate(_Form):
    """A measured value with its 95 % interval."""

    value: float
    ci95: tuple[float, float] | None = None


class LatencyRatio(Estimate):
    """A ratio of latencies with the candidate's own latency, milliseconds: what a budget may ask about while it is measured."""

    candidate_ms: Estimate | None = None


class Accuracy(_Form):
    """A metric on the evaluation data, measured on the exported file.

    Attributes:
        value: of the metric; null where it is NaN or infinite.
        ci95: exact interval, where the metric counts examples.
        n: examples.
        metric: its name.
    """

    value: float | None
    ci95: tuple[float, float] | None = None
    n: int
    metric: str

    @field_validator("value")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else value


class Latency(_Form):
    """Milliseconds per batch; a percentile is null where there are too few runs for it.

    Attributes:
        p50: median over the runs of all processes.
        p95: from 40 runs on.
        p99: from 200 runs on.
        n: runs.
        cv: standard deviation of the runs over their mean: the noise.
        processes: fresh processes that made the runs.
        p50_ci95: Student's interval of the geometric mean of the processes' medians.
    """

    p50: float
    p95: float | None = None
    p99: float | None = None
    n: int
    cv: float
    processes: int | None = None
    p50_ci95: tuple[float, float] | None = None


class PlannedMemory(_Form):
    """What the planned peak of the arena is made of, bytes; its chunks are larger than what lies in them.

    Attributes:
        tensor_bytes: the most that tensors take at any node.
        scratch_bytes: the largest scratch of any kernel.
        packed_bytes: weights in the kernels' own order.
        constant_bytes: small constants that are copied into the arena.
        live_bytes: what tensors take while each node runs, in order of execution.
        peak_node: operator and name of the first node at which they take the most.
    """

    tensor_bytes: int
    scratch_bytes: int
    packed_bytes: int
    constant_bytes: int
    live_bytes: list[int] = Field(default_factory=list)
    peak_node: str | None = None


class FitsTest(_Form):
    """Memory limits under which the file just runs, one per repeat, and how far these are apart; bytes."""

    limit_bytes: list[int]
    spread_bytes: int


class DeviceMemory(_Form):
    """Memory of an accelerator beyond a one-node model's, bytes.

    Attributes:
        arena_bytes: peak of onnxruntime's arena on the device.
        used_bytes: what the driver counts on the device.
    """

    arena_bytes: int | None = None
    used_bytes: int | None = None


class ArenaSettings(_Form):
    """How onnxruntime took memory: from its arena, and by the pattern of an earlier run."""

    memory_arena: bool
    memory_pattern: bool


class MemoryViews(_Form):
    """The views of one file's memory beside each other: what they are made of, how far they are apart, and how they were taken.

    Attributes:
        planned: parts of `activation_bytes_planned`.
        planned_minus_profiled: of the arena's peak, bytes.
        measured_minus_profiled: what the process takes beside the arena's peak, bytes: weights, inputs and the graph, and
            what the memory pattern holds twice.
        fits_minus_profiled: the same of the memory limit, bytes.
        fits: repeats of the fits-test.
        device: of an accelerator.
        settings: arena and memory pattern of each view: `planned`, `profiled`, `measured`, `fits`.
        reasons: why a view has no figure, or an approximate one, by the view's name.
    """

    planned: PlannedMemory | None = None
    planned_minus_profiled: int | None = None
    measured_minus_profiled: int | None = None
    fits_minus_profiled: int | None = None
    fits: FitsTest | None = None
    device: DeviceMemory | None = None
    settings: dict[str, ArenaSettings] = Field(default_factory=dict)
    reasons: dict[str, str] = Field(default_factory=dict)


class TargetFigures(_Form):
    """What was measured of one file on one target.

    Attributes:
        provider: the execution provider asked for.
        provider_obtained: the one that took most of the time.
        threads: intra-op threads.
        batch_size: examples per run.
        sequence_length: size of dynamic axes other than the batch; null where it was not asked for.
        latency_ms: of a run.
        session_ms: median time to create a session.
        first_run_ms: median time of a session's first run.
        peak_memory_bytes: peak of anonymous memory over a one-node model's.
        resident_memory_bytes: the same of the resident set.
        proportional_memory_bytes: the same of the proportional set (PSS) after the runs, which has no recorded peak.
        activation_bytes_planned: peak of the arena, predicted from the graph.
        activation_bytes_profiled: peak of the arena, counted by onnxruntime.
        fits_bytes: smallest memory limit under which every repeat still ran, beyond what a one-node model takes.
        memory: how these views were taken, and how far they are apart.
        nodes_per_provider: nodes of the optimised graph on each provider.
        time_per_provider: share of the nodes' time on each provider.
        accuracy: of this file on this target.
    """

    provider: str
    provider_obtained: str | None = None
    threads: int
    batch_size: int
    sequence_length: int | None = None
    latency_ms: Latency | None = None
    session_ms: float | None = None
    first_run_ms: float | None = None
    peak_memory_bytes: int | None = None
    resident_memory_bytes: int | None = None
    proportional_memory_bytes: int | None = None
    activation_bytes_planned: int | None = None
    activation_bytes_profiled: int | None = None
    fits_bytes: int | None = None
    memory: MemoryViews | None = None
    nodes_per_provider: dict[str, int] | None = None
    time_per_provider: dict[str, float] | None = None
    accuracy: Accuracy | None = None

    @property
    def label(self) -> str:
        """Name of the target: budget rows and tables go by it."""
        length = "" if self.sequence_length is None else f" length {self.sequence_length}"
        threads = "" if self.threads == 1 else f" threads {self.threads}"
        return f"{self.provider} batch {self.batch_size}{length}{threads}"


class Side(_Form):
    """Baseline or candidate."""

    file: str | None = None
    exporter: str | None = None
    opset: int | None = None
    params: int | None = None
    macs: int | None = None
    weight_bytes: int | None = None
    artifact_bytes: int | None = None
    accuracy: Accuracy | None = None
    targets: list[TargetFigures] = Field(default_factory=list)


class Pairs(_Form):
    """Examples on which baseline and candidate differ: what an exact paired test needs; scaled down where many examples are repeated.

    Attributes:
        lost: only the baseline is right.
        gained: only the candidate is right.
        n: all examples.
    """

    lost: int
    gained: int
    n: int


class TargetRatios(_Form):
    """Candidate over baseline on one target."""

    latency_p50: Estimate | None = None
    peak_memory: float | None = None
    fits: float | None = None
    accuracy_drop: Estimate | None = None
    accuracy_pairs: Pairs | None = None
    agreement: float | None = None
    agreement_per_output: dict[str, float] | None = None


class Ratios(_Form):
    """Candidate over baseline."""

    params: float | None = None
    macs: float | None = None
    artifact_bytes: float | None = None
    targets: list[TargetRatios] = Field(default_factory=list)


class Variant(_Form):
    """One of the files that quantisation leads to.

    Attributes:
        name: `dense`, `pruned`, `quantised`, or `pruned and quantised`.
        ships: whether the verdict is about this file.
        side: its figures.
        ratios: to the dense file, measured beside it; null for the dense file itself.
    """

    name: str
    ships: bool
    side: Side
    ratios: Ratios | None = None


class PassRecord(_Form):
    """What one pass did."""

    name: str
    settings: dict[str, Any]
    edits: int
    skipped: list[Skipped] = Field(default_factory=list)
    certificate: Certificate | None = None
    seconds: float
    details: dict[str, Any] = Field(default_factory=dict)


class Trial(_Form):
    """One network that a search tried, judged on validation data before any training at the end.

    Attributes:
        number: from 1.
        blocks: blocks to bypass by the pass whose depth is searched.
        target: cost that the pass whose width is searched could leave, candidate / baseline; null where it was left out.
        edits: blocks and groups from which something was removed, by all passes.
        cost_ratio: of the cost that is searched for.
        macs_ratio: of MACs.
        params_ratio: of parameters.
        latency_ratio: of the latency on the first target, as its cost model predicts it; null where it predicts none.
        validation: the metric; null where it is not finite.
        drop: how much worse than the baseline.
        drop_ci95: exact interval of the paired drop, where the metric counts examples.
        lost: examples that only the baseline gets right.
        gained: examples that only this network gets right.
        n: all examples.
        accepted: whether `budget.accuracy_drop` holds.
        chosen: whether this is the network that ships.
        plan: file of its plan, inside the output folder.
        seconds: to make and judge it.
        reasons: why it was not accepted, and what could not be removed.
    """

    number: int
    blocks: int
    target: float | None = None
    edits: int
    cost_ratio: float
    macs_ratio: float
    params_ratio: float
    latency_ratio: float | None = None
    validation: float | None = None
    drop: float | None = None
    drop_ci95: tuple[float, float] | None = None
    lost: int | None = None
    gained: int | None = None
    n: int | None = None
    accepted: bool
    chosen: bool = False
    plan: str | None = None
    seconds: float
    reasons: list[str] = Field(default_factory=list)


class Parity(_Form):
    """Agreement of the exported file with the torch network.

    Attributes:
        max_abs: largest absolute difference of any output.
        max_rel: the same as a share of the output's largest absolute value.
        tolerance: the share of how far an output's values differ that was allowed, besides rounding.
        worst: the largest share of what was allowed that an entry differs by; null in reports of earlier versions.
        batch_sizes: where they were compared.
        sequence_lengths: the length at each of these sizes; empty where the example's was kept.
    """

    max_abs: float
    max_rel: float
    tolerance: float
    worst: float | None = None
    batch_sizes: list[int]
    sequence_lengths: list[int] = Field(default_factory=list)


class BudgetRow(_Form):
    """One ceiling and whether it holds."""

    name: str
    target: str | None = None
    limit: float
    measured: float | None
    ci95: tuple[float, float] | None = None
    status: Status
    reason: str | None = None


class Environment(_Form):
    """What the figures were measured with."""

    versions: dict[str, str]
    cpu: str
    threads: int
    seed: int
    git: str | None = None


class Report(_Form):
    """The whole report; `report.json` is this, as JSON.

    Attributes:
        digest: hash of the recipe, weights, data and factory that it is about; null where there is no recipe.
    """

    schema_version: Literal[1] = 1
    verdict: Status
    reasons: list[str] = Field(default_factory=list)
    baseline: Side = Field(default_factory=Side)
    candidate: Side = Field(default_factory=Side)
    ratios: Ratios = Field(default_factory=Ratios)
    passes: list[PassRecord] = Field(default_factory=list)
    trials: list[Trial] = Field(default_factory=list)
    parity: Parity | None = None
    budget: list[BudgetRow] = Field(default_factory=list)
    variants: list[Variant] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    environment: Environment
    digest: str | None = None
    seconds: float | None = None

    def to_json(self) -> str:
        """Return the report as indented JSON text."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report that anybody may have written.

        Raises:
            UserError: it cannot be read, is too large, or is no report.
        """
        return read_form(path, cls, "report")


def report_schema() -> dict[str, Any]:
    """Return the JSON schema that ships in the package."""
    text = importlib.resources.files("secateurs").joinpath("report.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
