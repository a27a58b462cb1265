"""The verdict over figures that a device took: `result.json` of a bundle, tied by hash to the files that it is about.

The result comes from elsewhere, so its form is checked to the last value before any of it is used.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateurs.errors import DataError
from secateurs.files import parse_form, read_file
from secateurs.interfaces import Measurement, ratio
from secateurs.intervals import binomial_interval, paired_difference_interval
from secateurs.proof import prove
from secateurs.report import Accuracy, Environment, Estimate, Pairs, TargetFigures, TargetRatios
from secateurs.settings import TargetSettings
from secateurs_adapters.artifact import read_artifact
from secateurs_adapters.bundle import MANIFEST
from secateurs_adapters.latency import LatencyFigures, latency_result
from secateurs_adapters.metrics import accuracy
from secateurs_adapters.placement import Placement, find_placement, violation

if TYPE_CHECKING:
    from secateurs.budget import Budget
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact, Metric, ProgressEvent
    from secateurs.report import Report

__all__ = ["MeasuredTarget", "Result", "judge_result", "read_result"]

LARGEST = 64 * 2**20
"""Bytes of a result or a manifest that are read."""
Text = Annotated[str, Field(max_length=300, pattern=r"^[^\x00-\x1f\x7f\[\]]*$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,64}$")]
Count = Annotated[int, Field(ge=0, le=2**40)]
Positive = Annotated[float, Field(gt=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1e30)]
Sides = Literal["baseline", "candidate"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Timed(_Form):
    """One file in one process, milliseconds."""

    session_ms: Positive
    first_run_ms: Positive
    samples_ms: list[Positive] = Field(min_length=2, max_length=100_000)


class TimedBoth(_Form):
    """Both files in one process."""

    baseline: Timed
    candidate: Timed


class Peak(_Form):
    """Memory of one process, bytes; null where the system does not tell."""

    anonymous: Count | None
    resident: Count | None
    reason: Text


class Peaks(_Form):
    """Memory of processes that ran a one-node model, the baseline and the candidate."""

    base: list[Peak] = Field(min_length=1, max_length=1000)
    baseline: list[Peak] = Field(min_length=1, max_length=1000)
    candidate: list[Peak] = Field(min_length=1, max_length=1000)


class Correctness(_Form):
    """Differences from the recorded outputs; null where one is not finite."""

    max_abs: Share | None
    max_rel: Share | None
    outputs: dict[str, Share | None] = Field(max_length=10_000)
    holds: bool


class Right(_Form):
    """Right answers of both files on the same examples."""

    n: Annotated[int, Field(ge=1, le=2**31)]
    baseline_right: Count
    candidate_right: Count
    lost: Count
    gained: Count

    @model_validator(mode="after")
    def _adds_up(self) -> Right:
        fits = self.lost <= self.baseline_right <= self.n and self.gained <= self.candidate_right <= self.n
        if not fits or self.baseline_right - self.candidate_right != self.lost - self.gained:
            raise ValueError("right answers, losses and gains do not add up")
        if self.lost + self.gained > self.n or self.baseline_right + self.gained > self.n:
            raise ValueError("more answers than examples")
        return self


class Placed(_Form):
    """Where one file's nodes ran: how many, and microseconds, per provider."""

    nodes: dict[Name, Count] = Field(max_length=100)
    microseconds: dict[Name, Annotated[float, Field(ge=0, le=1e15)]] = Field(max_length=100)
    registered: Name


class Result(_Form):
    """`result.json`, as `measure.py` writes it."""

    schema_version: Literal[1]
    manifest_sha256: Sha256
    provider: Name
    threads: Annotated[int, Field(ge=1, le=4096)]
    batch_size: Annotated[int, Field(ge=1, le=2**31)]
    environment: dict[Text, Text] = Field(max_length=50)
    correctness: dict[Sides, Correctness] = Field(min_length=2)
    accuracy: Right | None
    latency: list[TimedBoth] = Field(min_length=5, max_length=1000)
    memory: Peaks
    placement: dict[Sides, Placed] = Field(min_length=2)
    seconds: Annotated[float, Field(ge=0, le=1e9)]


class _File(_Form):
    sha256: Sha256
    bytes: Count


class _Manifest(BaseModel):
    """What a verdict needs of `manifest.json`."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    schema_version: Literal[1]
    models: dict[Sides, str] = Field(min_length=2)
    labels: str | None
    examples: Count
    batch_size: Count
    sequence_length: Annotated[int, Field(ge=1)] | None
    tolerance: Annotated[float, Field(ge=0)]
    provider: Text | None = None
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    files: dict[str, _File]


def read_result(path: Path) -> Result:
    """Read and check `result.json`.

    Raises:
        DataError: it is missing, is no such file, or holds values that cannot be.
    """
    found: Result = _read(path, Result)
    return found


def judge_result(
    path: Path,
    *,
    baseline: Path | None,
    candidate: Path | None,
    budget: Budget,
    allow_elsewhere: float = 0.0,
) -> Report:
    """Judge the figures of a device by a budget.

    Args:
        path: `result.json`.
        baseline: the file before; None takes the bundle's.
        candidate: the file after; None takes the bundle's.
        budget: the ceilings.
        allow_elsewhere: share of the time that may have passed on other providers.

    Raises:
        DataError: the result is malformed, belongs to another bundle, or the files are not those that were measured.
    """
    result = read_result(path)
    folder, manifest = _manifest(path, baseline, result)
    given = {"baseline": baseline or folder / manifest.models["baseline"]}
    given["candidate"] = candidate or folder / manifest.models["candidate"]
    artifacts = {side: read_artifact(file) for side, file in given.items()}
    for side, artifact in artifacts.items():
        _same_file(side, artifact, manifest)
    if result.batch_size != manifest.batch_size or (result.accuracy is None) != (manifest.labels is None):
        raise DataError(f"{str(path)!r} does not fit its bundle: other batch size or labels; measure again.")
    if result.accuracy is not None and result.accuracy.n != manifest.examples:
        raise DataError(
            f"{str(path)!r} counts {result.accuracy.n} examples, its bundle {manifest.examples}; measure again."
        )
    settings = TargetSettings(
        provider=result.provider,
        threads=result.threads,
        batch_size=result.batch_size,
        sequence_length=manifest.sequence_length,
        allow_elsewhere=allow_elsewhere,
    )
    target = MeasuredTarget(result, manifest.tolerance)
    report = prove(
        artifacts["baseline"],
        artifacts["candidate"],
        [(target, settings)],
        budget=budget,
        evaluation=None,
        metric=accuracy,
    )
    versions = dict(result.environment)
    cpu = f"{versions.pop('cpu', '')} ({versions.pop('cores', '?')} logical cores)"
    report.environment = Environment(versions=versions, cpu=cpu, threads=result.threads, seed=0)
    report.seconds = result.seconds
    report.notes += _other_conditions(result, manifest)
    return report


def _other_conditions(result: Result, manifest: _Manifest) -> list[str]:
    """Say where the device measured otherwise than the bundle was made for."""
    pairs = (
        ("provider", result.provider, manifest.provider),
        ("threads", result.threads, manifest.threads),
    )
    return [
        f"{what}: {got} on the device, though the bundle was made for {meant}; `python measure.py` without `--{what}` takes that"
        for what, got, meant in pairs
        if meant not in (None, got)
    ]


class MeasuredTarget:
    """Implements `secateurs.interfaces.Target` with figures that a device took.

    Args:
        result: of the device.
        tolerance: largest difference from the recorded outputs.
    """

    def __init__(self, result: Result, tolerance: float) -> None:
        self._result, self._tolerance = result, tolerance

    def check(self, settings: TargetSettings) -> None:
        """Accept everything: the device has measured already."""

    def measure(
        self,
        baseline: Artifact,  # noqa: ARG002 - tied by hash before
        candidate: Artifact,  # noqa: ARG002
        settings: TargetSettings,
        *,
        evaluation: Dataset | None,  # noqa: ARG002
        metric: Metric,
        decided: Callable[[Estimate], bool] | None = None,  # noqa: ARG002
        progress: Callable[[ProgressEvent], None] | None = None,  # noqa: ARG002
    ) -> Measurement:
        """Return the device's figures in the form of a measurement; see `Target.measure`."""
        result = self._result
        latency = latency_result([process.model_dump() for process in result.latency])
        placed = {side: _placement(result.placement[side]) for side in result.placement}
        first = self._figures("baseline", settings, latency.baseline, placed["baseline"])
        second = self._figures("candidate", settings, latency.candidate, placed["candidate"])
        drop, pairs = None, None
        if result.accuracy is not None:
            first.accuracy, second.accuracy, drop, pairs = _accuracies(result.accuracy, metric.name)
        ratios = TargetRatios(
            latency_p50=latency.ratio,
            peak_memory=ratio(second.peak_memory_bytes, first.peak_memory_bytes),
            accuracy_drop=drop,
            accuracy_pairs=pairs,
        )
        reasons = [reason for side in placed if (reason := violation(side, placed[side], settings)) is not None]
        notes = [f"memory: {reason}" for reason in {peak.reason for peak in result.memory.base} if reason]
        notes.append(
            "measured on the device by measure.py; more processes (`--processes`) narrow the latency's interval"
        )
        return Measurement(first, second, ratios, (*reasons, *self._wrong()), tuple(notes))

    def _wrong(self) -> list[str]:
        """Return why the outputs on the device are not those of the files."""
        found = []
        for side, one in sorted(self._result.correctness.items()):
            if one.max_rel is None or one.max_rel > self._tolerance or not one.holds:
                share = (
                    "by more than can be told"
                    if one.max_rel is None
                    else f"by {one.max_rel:.3g} of their largest value"
                )
                found.append(
                    f"the {side}'s outputs on the device differ from those recorded {share}; allowed is {self._tolerance:g}"
                )
        return found

    def _figures(
        self, side: Sides, settings: TargetSettings, latency: LatencyFigures, placed: Placement
    ) -> TargetFigures:
        memory = self._result.memory
        peaks = {"baseline": memory.baseline, "candidate": memory.candidate}[side]
        return TargetFigures(
            provider=settings.provider,
            provider_obtained=placed.obtained,
            threads=settings.threads,
            batch_size=settings.batch_size,
            sequence_length=settings.sequence_length,
            latency_ms=latency.latency,
            session_ms=latency.session_ms,
            first_run_ms=latency.first_run_ms,
            peak_memory_bytes=_above([p.anonymous for p in peaks], [p.anonymous for p in memory.base]),
            resident_memory_bytes=_above([p.resident for p in peaks], [p.resident for p in memory.base]),
            nodes_per_provider=None if placed.nodes is None else dict(placed.nodes),
            time_per_provider=None if placed.time is None else dict(placed.time),
        )


def _accuracies(right: Right, name: str) -> tuple[Accuracy, Accuracy, Estimate, Pairs]:
    sides = [
        Accuracy(value=hits / right.n, ci95=binomial_interval(hits, right.n), n=right.n, metric=name)
        for hits in (right.baseline_right, right.candidate_right)
    ]
    interval = paired_difference_interval(right.lost, right.gained, right.n)
    drop = Estimate(value=(right.lost - right.gained) / right.n, ci95=interval)
    return sides[0], sides[1], drop, Pairs(lost=right.lost, gained=right.gained, n=right.n)


def _placement(placed: Placed) -> Placement:
    return find_placement(
        placed.nodes or None, [("", name, spent) for name, spent in placed.microseconds.items()], placed.registered
    )


def _above(values: list[int | None], base: list[int | None]) -> int | None:
    """Return the median over processes, above that of the one-node model."""
    known, ground = ([v for v in found if v is not None] for found in (values, base))
    return max(0, int(statistics.median(known) - statistics.median(ground))) if known and ground else None


def _manifest(path: Path, baseline: Path | None, result: Result) -> tuple[Path, _Manifest]:
    """Find the manifest that the result is tied to: beside the result, or beside the baseline."""
    folders = [path.parent, *([] if baseline is None else [baseline.parent])]
    there = [folder for folder in folders if (folder / MANIFEST).is_file()]
    if not there:
        raise DataError(
            f"there is no {MANIFEST} beside {str(path)!r}, so nothing ties the figures to files; put the result back into its bundle, or give "
            "the bundle's BASELINE.onnx and CANDIDATE.onnx."
        )
    for folder in there:
        if hashlib.sha256(_content(folder / MANIFEST)).hexdigest() == result.manifest_sha256:
            manifest: _Manifest = _read(folder / MANIFEST, _Manifest)
            outside = [
                name
                for name in manifest.models.values()
                if PureWindowsPath(name).anchor or ".." in PureWindowsPath(name).parts
            ]
            if outside:
                raise DataError(
                    f"{str(folder / MANIFEST)!r} names {outside[0]!r}, outside its folder; make the bundle again."
                )
            return folder, manifest
    raise DataError(f"{str(path)!r} was measured with another bundle than that in {str(there[0])!r}; take its own.")


def _same_file(side: str, artifact: Artifact, manifest: _Manifest) -> None:
    """Refuse files that are not those of the bundle, external data included."""
    main = Path(manifest.models[side])  # type: ignore[index]
    for number, (name, digest) in enumerate(artifact.sha256.items()):
        known = manifest.files.get(main.as_posix() if number == 0 else (main.parent / name).as_posix())
        if known is None or known.sha256 != digest:
            raise DataError(
                f"{str(artifact.path.parent / name)!r} is not the {side} that was measured: its hash is not that in the bundle's {MANIFEST}."
            )


def _content(path: Path) -> bytes:
    return read_file(path, "result of a bundle", DataError, limit=LARGEST)


def _read(path: Path, form: type[BaseModel]) -> Any:
    try:
        return parse_form(_content(path), form, repr(str(path)), DataError)
    except DataError as error:
        raise DataError(f"{error} Give what `measure.py` wrote, as it is.") from None
