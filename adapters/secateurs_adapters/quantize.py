"""Quantisation of an exported file through onnxruntime: 8-bit weights, with activations in 8 bits too.

`static` inserts quantise and dequantise nodes around the operators (QDQ), with ranges of activations taken from
calibration data; `dynamic` takes the ranges at run time, and suits transformers and recurrent networks. A quantised
file does not do exactly what the network does: it is judged by accuracy, not by parity.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from secateurs.errors import DataError, ExportError, first_line
from secateurs_adapters.artifact import placed, write_sidecar
from secateurs_adapters.export import CHECKED_BATCHES, SINGLE_FILE_BYTES, quiet
from secateurs_adapters.parity import resample
from secateurs_adapters.session import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact
    from secateurs.settings import QuantiseSettings

__all__ = ["DynamicQuantiser", "StaticQuantiser"]

Array = npt.NDArray[Any]

_BATCH = 16
"""Calibration examples per run."""
_TYPES = {"int8": quantization.QuantType.QInt8, "uint8": quantization.QuantType.QUInt8}
_METHODS = {
    "minmax": quantization.CalibrationMethod.MinMax,
    "entropy": quantization.CalibrationMethod.Entropy,
    "percentile": quantization.CalibrationMethod.Percentile,
}
_DYNAMIC = ("Attention", "EmbedLayerNormalization", "Gather", "LSTM", "MatMul")
"""What `dynamic` quantises unless asked for others. Convolutions in integers without fixed ranges are slow on CPUs."""
_QUANTISED = ("Integer", "QLinear", "Quantize", "QGemm", "QAttention")
"""Parts of the names of operators that work on, or make, integers."""


class StaticQuantiser:
    """Implements `secateurs.interfaces.Converter`: ranges of activations from calibration data."""

    def __call__(self, artifact: Artifact, path: Path, *, settings: QuantiseSettings, examples: Dataset) -> Artifact:
        """Quantise a file; see `Converter`."""
        reader = _Reader(Session(artifact.path), examples.take(np.arange(min(settings.samples, len(examples)))))

        def quantise(source: Path, target: Path) -> None:
            quantization.quantize_static(
                str(source),
                str(target),
                reader,
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=settings.operators,
                per_channel=settings.per_channel,
                reduce_range=settings.reduce_range,
                activation_type=_TYPES[settings.activations],
                weight_type=_TYPES[settings.weights],
                nodes_to_exclude=list(settings.exclude),
                use_external_data_format=_large(artifact),
                calibrate_method=_METHODS[settings.calibrate],
                # Weights have their zero at zero, without which a scale per channel is not allowed.
                extra_options={"WeightSymmetric": True},
            )

        return _converted(quantise, artifact, path, settings, examples)


class DynamicQuantiser:
    """Implements `secateurs.interfaces.Converter`: ranges of activations at run time, no calibration."""

    def __call__(self, artifact: Artifact, path: Path, *, settings: QuantiseSettings, examples: Dataset) -> Artifact:
        """Quantise a file; see `Converter`."""

        def quantise(source: Path, target: Path) -> None:
            quantization.quantize_dynamic(
                str(source),
                str(target),
                op_types_to_quantize=list(settings.operators or _DYNAMIC),
                per_channel=settings.per_channel,
                reduce_range=settings.reduce_range,
                weight_type=_TYPES[settings.weights],
                nodes_to_exclude=list(settings.exclude),
                use_external_data_format=_large(artifact),
            )

        return _converted(quantise, artifact, path, settings, examples)


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Gives the calibration examples in batches, as onnxruntime asks for them."""

    def __init__(self, session: Session, examples: Dataset) -> None:
        self._feeds = session.feeds(examples.inputs)
        self._size = session.fixed_batch() or _BATCH
        self._count = len(examples) if session.fixed_batch() is None else len(examples) // self._size * self._size
        self._next = 0

    def get_next(self) -> dict[str, Array] | None:
        """Return the next batch, or None after the last."""
        if self._next >= self._count:
            return None
        start, self._next = self._next, min(self._next + self._size, self._count)
        return {name: array[start : self._next] for name, array in self._feeds.items()}


def _converted(
    quantise: Any, artifact: Artifact, path: Path, settings: QuantiseSettings, examples: Dataset
) -> Artifact:
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as name:
        folder = Path(name)
        source, written = folder / "prepared.onnx", folder / path.name
        try:
            with quiet(), _errors_only():
                _prepare(artifact, source)
                quantise(source, written)
        except Exception as error:  # onnxruntime's exceptions have no common base class
            said = first_line(error)[:300]
            raise ExportError(
                f"{artifact.path.name!r} cannot be quantised ({type(error).__name__}: {said}). Exclude the nodes in question with "
                "`quantise.exclude`, give `quantise.operators`, or use the other `quantise.mode`."
            ) from error
        counts = _integer_nodes(written)
        if not counts:
            raise ExportError(
                f"nothing of {artifact.path.name!r} was quantised by mode {settings.mode!r}; leave `quantise.operators` out, or use "
                "the other `quantise.mode`."
            )
        made = {
            "of": artifact.path.name,
            "sha256": dict(artifact.sha256),
            "settings": settings.model_dump(),
            "nodes": counts,
            "difference": _difference(artifact.path, written, examples),
        }
        found = placed(written, path, exporter=artifact.exporter)
    write_sidecar(found, made)
    return found


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Keep native warnings about graphs that quantisation builds on its way off the terminal."""
    onnxruntime.set_default_logger_severity(3)
    try:
        yield
    finally:
        onnxruntime.set_default_logger_severity(2)  # onnxruntime's default


def _prepare(artifact: Artifact, path: Path) -> None:
    """Write the file with all shapes inferred and its batch norms folded, as quantisation wants it."""
    options = {"auto_merge": True, "save_as_external_data": _large(artifact), "all_tensors_to_one_file": True}
    try:
        quant_pre_process(str(artifact.path), str(path), **options)
    except Exception:  # symbolic inference does not know every operator; quantisation then goes without
        quant_pre_process(str(artifact.path), str(path), skip_symbolic_shape=True, **options)


def _large(artifact: Artifact) -> bool:
    return artifact.weight_bytes > SINGLE_FILE_BYTES


def _integer_nodes(path: Path) -> dict[str, int]:
    """Return how often each operator that works on integers occurs."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return dict(Counter(node.op_type for node in graph.node if any(part in node.op_type for part in _QUANTISED)))


def _difference(original: Path, quantised: Path, examples: Dataset) -> float:
    """Return the largest difference of the first outputs, as a share of the original's largest value.

    Raises:
        ExportError: the quantised file does not run, or returns values that are not finite or of another shape.
    """
    before, worst = Session(original), 0.0
    for seed, size in enumerate(CHECKED_BATCHES):
        batch = resample(examples, before.fixed_batch() or size, seed)
        truth = before.run(before.feeds(batch.inputs))
        try:
            after = Session(quantised)
            got = after.run(after.feeds(batch.inputs))
        except DataError as error:
            raise ExportError(
                f"the quantised file does not run: {error} Exclude operators with `quantise.operators`."
            ) from None
        name = next(iter(truth))
        if got[name].shape != truth[name].shape or not np.isfinite(got[name].astype(np.float64)).all():
            raise ExportError(
                f"output {name!r} of the quantised file is not finite, or has shape {got[name].shape} instead of {truth[name].shape}; "
                "use the other `quantise.mode`, or exclude nodes with `quantise.exclude`."
            )
        gap = np.abs(truth[name].astype(np.float64) - got[name].astype(np.float64)).max()
        worst = max(worst, float(gap / max(np.abs(truth[name].astype(np.float64)).max(), np.finfo(np.float64).tiny)))
    return worst
