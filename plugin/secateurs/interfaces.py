"""What a plugin's model loader, data source, exporter, target, metric and cost model look like.

These are protocols and plain records: a plugin implements them without importing anything heavy, and registers the implementation through
the hooks of `secateurs.hookspecs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from secateurs.data import Dataset
from secateurs.report import Estimate, Parity, TargetFigures, TargetRatios

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from secateurs.settings import TargetSettings

__all__ = [
    "Artifact",
    "CostModel",
    "DatasetLoader",
    "Exporter",
    "Measurement",
    "Metric",
    "ModelLoader",
    "ProgressEvent",
    "Target",
    "ratio",
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


@dataclass(frozen=True)
class Measurement:
    """Baseline beside candidate on one target, measured in the same run.

    Attributes:
        baseline: figures of the baseline file.
        candidate: figures of the candidate file.
        ratios: candidate over baseline.
        violations: reasons why no claim about this target can stand, for example a silent provider fallback.
    """

    baseline: TargetFigures
    candidate: TargetFigures
    ratios: TargetRatios
    violations: tuple[str, ...] = field(default=())


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
    """Reads one data source; `settings` is an instance of the pydantic model registered with it."""

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


class Metric(Protocol):
    """A figure of merit of predictions."""

    name: str
    higher_is_better: bool

    def per_example(self, outputs: npt.NDArray[Any], labels: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
        """Return whether each example is right, or None where the metric is not a mean over examples."""

    def value(self, outputs: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
        """Return the metric over all examples; `outputs` is the network's first output, examples on the first axis."""


class Target(Protocol):
    """Where and how a file is run and measured; registered under the name of its execution provider."""

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


def ratio(candidate: float | None, baseline: float | None) -> float | None:
    """Return candidate over baseline, or None where either was not measured."""
    return None if candidate is None or not baseline else candidate / baseline
