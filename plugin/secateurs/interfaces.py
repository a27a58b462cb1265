"""What a plugin's model loader, data source, exporter, target, metric and cost model look like.

These are protocols and plain records: a plugin implements them without importing anything heavy, and registers the implementation through
the hooks of `secateurs.hookspecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from secateurs.data import Dataset
from secateurs.report import Estimate, Parity, TargetFigures, TargetRatios

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from secateurs.groups import Group
    from secateurs.settings import TargetSettings

__all__ = [
    "Artifact",
    "Converter",
    "CostModel",
    "DatasetLoader",
    "Exporter",
    "Measurement",
    "Metric",
    "ModelLoader",
    "ProgressEvent",
    "StructureCost",
    "StructureCostModel",
    "Target",
    "WidthMultiple",
    "ratio",
    "width_multiple",
]


@dataclass(frozen=True)
class Artifact:
    """An exported file with what is known about it.

    Attributes:
        path: the main file.
        files: every file that ships, the main one included.
        opset: the opset really found in the file.
        inputs: names of the graph inputs, in order.
        outputs: names of the graph outputs, in order.
        weight_bytes: bytes of the initialisers.
        artifact_bytes: bytes of all `files`.
        sha256: hash of each file, by name.
        exporter: which exporter wrote it; empty for a file that was given.
        parity: agreement with the torch network, where there was one.
        ir_version: of the ONNX format; 0 where it is not known.
        notes: what has to be said about the file, for the report.
    """

    path: Path
    files: tuple[Path, ...]
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_bytes: int
    artifact_bytes: int
    sha256: Mapping[str, str]
    exporter: str = ""
    parity: Parity | None = None
    ir_version: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """Baseline beside candidate on one target, measured in the same run.

    Attributes:
        baseline: figures of the baseline file.
        candidate: figures of the candidate file.
        ratios: candidate over baseline.
        violations: reasons why no claim about this target can stand, for example a silent provider fallback.
        notes: what the report has to say beside the figures, for example why one is missing.
    """

    baseline: TargetFigures
    candidate: TargetFigures
    ratios: TargetRatios
    violations: tuple[str, ...] = field(default=())
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class ProgressEvent:
    """One step of a long task: `done` of `total` steps of `task`, with a word on the current one."""

    task: str
    done: int
    total: int
    detail: str = ""


class ModelLoader(Protocol):
    """Builds a network from one entry of a recipe's `model` section."""

    def __call__(self, value: str, *, arguments: Mapping[str, Any], weights: Path | None, folder: Path) -> nn.Module:
        """Return the network in evaluation mode.

        Args:
            value: what stands behind the loader's key, for example `package.module:function` behind `factory`.
            arguments: keyword arguments of the constructor.
            weights: a safetensors file to load strictly; None keeps what the loader gives.
            folder: the recipe's folder.

        Raises:
            ModelError: it cannot be built, or the weights do not fit.
        """


class DatasetLoader(Protocol):
    """Reads one data source; `settings` is an instance of the pydantic model registered with it, or None where there is none."""

    def __call__(self, settings: Any) -> Dataset:
        """Return the examples.

        Raises:
            DataError: the source is missing, malformed or empty.
        """


class Exporter(Protocol):
    """Writes a network as one ONNX file and proves that the file does the same."""

    def __call__(self, model: nn.Module, example: Dataset, path: Path, *, opset: int) -> Artifact:
        """Export `model`, called with the inputs of `example`, to `path`, with a dynamic first axis.

        Raises:
            ExportError: it cannot be exported, the opset is not the one asked for, or the file disagrees with the network.
        """


class Converter(Protocol):
    """Makes another file of an exported one: with fixed shapes, or quantised."""

    def __call__(self, artifact: Artifact, path: Path, *, settings: Any, examples: Dataset) -> Artifact:
        """Convert a file and check what was written.

        Args:
            artifact: the file; it is not changed.
            path: where the other goes; written whole or not at all.
            settings: `EdgeSettings` for `fixed-shapes`, `QuantiseSettings` for `quantise-...`.
            examples: calibration data.

        Raises:
            ExportError: it cannot be converted, or does not run.
        """


class Metric(Protocol):
    """A figure of merit of predictions."""

    name: str
    higher_is_better: bool

    def per_example(self, outputs: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
        """Return whether each example is right, or None where the metric is not a mean over examples."""

    def value(self, outputs: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        """Return the metric over all examples; `outputs` is the network's first output, examples on the first axis."""


@dataclass(frozen=True)
class WidthMultiple:
    """A number of channels whose multiples a target's kernels like, and why."""

    channels: int
    reason: str


class Target(Protocol):
    """Where and how a file is run and measured; registered under the name of its execution provider.

    A target may also have `width_multiple(settings: TargetSettings) -> WidthMultiple`: what passes round widths to where `round_to` is `auto`.
    """

    def check(self, settings: TargetSettings) -> None:
        """Refuse what cannot be measured here, before any work is done.

        Raises:
            ProviderError: the provider is not available; the message lists those that are.
        """

    def measure(
        self,
        baseline: Artifact,
        candidate: Artifact,
        settings: TargetSettings,
        *,
        evaluation: Dataset | None,
        metric: Metric,
        decided: Callable[[Estimate], bool] | None = None,
        progress: Callable[[ProgressEvent], None] | None = None,
    ) -> Measurement:
        """Measure both files; without evaluation data, `agreement` of the outputs on seeded inputs replaces accuracy.

        Args:
            baseline: the file before.
            candidate: the file after.
            settings: provider, threads, batch size, repeats.
            evaluation: labelled examples.
            metric: computed on them.
            decided: whether a latency ratio settles the verdict; while it does not, take more repeats up to the stated limit.
            progress: told of every step.
        """


class CostModel(Protocol):
    """The cost of a structure, for allocation: a number that pruning should lower."""

    def __call__(self, model: nn.Module, example: Dataset) -> Mapping[str, float]:
        """Return the cost of each module, by qualified name; the total is their sum.

        A module's cost must be proportional to the product of its widths, as MACs and parameters are.
        """


class StructureCost(Protocol):
    """The cost of one network at any widths.

    Attributes:
        additive: whether it is a sum over layers, each of which depends on its own widths alone; otherwise it is taken as a black box.
    """

    additive: bool

    def __call__(self, keep: Mapping[str, int]) -> float:
        """Return the cost of the whole network when `keep[root]` units of each group stay; absent groups keep all."""


@runtime_checkable
class StructureCostModel(Protocol):
    """A cost that is no sum of products of widths: latency and peak memory on a target, for example.

    Registered beside the cost models of the other kind; it has these two methods instead of a call.
    """

    def total(self, model: nn.Module, example: Dataset, target: TargetSettings) -> float:
        """Return the cost of a network.

        Args:
            model: the network; it is not changed.
            example: inputs for tracing.
            target: provider, threads, batch size and sequence length for which the cost is asked.

        Raises:
            ProviderError: the provider is not available.
            ExportError: the network cannot be brought to the target.
        """

    def structure(
        self, model: nn.Module, example: Dataset, groups: Sequence[Group], target: TargetSettings
    ) -> StructureCost:
        """Return the cost of a network at any widths of its groups; arguments and errors as for `total`."""


def width_multiple(target: Target | None, settings: TargetSettings) -> WidthMultiple:
    """Return what a target says of the widths it likes; 1 where it says nothing."""
    ask = getattr(target, "width_multiple", None)
    if ask is None:
        return WidthMultiple(1, f"nothing is known of the widths that {settings.provider} likes")
    found: WidthMultiple = ask(settings)
    return found


def ratio(candidate: float | None, baseline: float | None) -> float | None:
    """Return candidate over baseline, or None where either was not measured."""
    return None if candidate is None or not baseline else candidate / baseline
