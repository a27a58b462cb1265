"""The edge variant of a file: every shape fixed, and onnxruntime's own format beside it.

Accelerators such as NNAPI, CoreML and QNN take few or no nodes of a graph whose sizes are free.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx

from secateurs.errors import DataError, ExportError, first_line
from secateurs.rounding import ROUNDING_STEPS, distance, largest, scales, shares
from secateurs_adapters.artifact import placed, write_sidecar
from secateurs_adapters.export import quiet
from secateurs_adapters.parity import TOLERANCE, resample
from secateurs_adapters.session import Session

if TYPE_CHECKING:
    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact
    from secateurs.settings import EdgeSettings

__all__ = ["FixedShapes"]

Array = npt.NDArray[Any]

CHECKS = 2
"""Batches on which both files are compared."""


class FixedShapes:
    """Implements `secateurs.interfaces.Converter`: the same graph at one batch size and one length."""

    def __call__(self, artifact: Artifact, path: Path, *, settings: EdgeSettings, examples: Dataset) -> Artifact:
        """Write the variant, and with `settings.ort` the same in onnxruntime's format with its list of operators.

        Raises:
            ExportError: the file fixes another size already, a size stays free, or the variant disagrees with the file.
        """
        batches = [_batch(examples, settings, seed) for seed in range(CHECKS)]
        feeds, expected = _answers(artifact, batches)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as name:
            folder = Path(name)
            written = folder / path.name
            _write(artifact, written, feeds[0], expected)
            difference = _difference(written, feeds, expected)
            made = {
                "of": artifact.path.name,
                "sha256": dict(artifact.sha256),
                "settings": settings.model_dump(),
                "difference": difference,
                "mobile": _mobile(written),
            }
            beside = _ort(written) if settings.ort else []
            for file in beside:
                if file.suffix == ".ort":
                    made["ort_difference"] = _difference(file, feeds, expected)
            made["beside"] = {
                file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
                for file in beside
            }
            for file in beside:
                file.replace(path.parent / file.name)
            found = placed(written, path, exporter=artifact.exporter)
        write_sidecar(found, made)
        return found


def _answers(artifact: Artifact, batches: list[Dataset]) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """Return what the file is fed with, and what it gives."""
    session = Session(artifact.path)
    try:
        feeds = [session.feeds(batch.inputs) for batch in batches]
        return feeds, [session.run(one) for one in feeds]
    except DataError as error:
        raise ExportError(
            f"`export.edge` asks for sizes that {artifact.path.name!r} does not take: {error} Use those that the file "
            "fixes, or leave `sequence_length` out."
        ) from None


def _batch(examples: Dataset, settings: EdgeSettings, seed: int) -> Dataset:
    drawn = resample(examples, settings.batch_size, seed)
    return drawn if settings.sequence_length is None else drawn.at_length(settings.sequence_length)


def _write(artifact: Artifact, path: Path, feeds: dict[str, Array], expected: list[dict[str, Array]]) -> None:
    from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_input_shape_fixed

    model = onnx.load(str(artifact.path))
    for name, array in feeds.items():
        make_input_shape_fixed(model.graph, name, list(array.shape))
    fix_output_shapes(model)
    for value in model.graph.output:
        shapes = {one[value.name].shape for one in expected}
        if len(shapes) == 1:  # inference gives up where a shape is computed; it is known from the runs
            for dim, size in zip(value.type.tensor_type.shape.dim, shapes.pop(), strict=False):
                dim.dim_value = size
    external = len(artifact.files) > 1
    onnx.save(model, str(path), save_as_external_data=external, location=f"{path.name}.data" if external else None)


def _difference(path: Path, feeds: list[dict[str, Array]], expected: list[dict[str, Array]]) -> float:
    """Return the largest difference from what the original file gave, as a share of an output's largest value.

    Raises:
        ExportError: the file does not run, or an output differs by more than its spread and rounding explain.
    """
    worst = beyond = 0.0
    try:
        session = Session(path)
        free = [spec.name for spec in session.inputs if not all(isinstance(size, int) for size in spec.shape)]
        obtained = [session.run(one) for one in feeds]
    except DataError as error:
        raise ExportError(f"the variant with fixed shapes does not run: {error} Leave out `export.edge`.") from None
    if free:
        raise ExportError(f"the inputs {free} keep a free size; leave out `export.edge`, or use another exporter.")
    for truth, got in zip(expected, obtained, strict=True):
        for name, value in truth.items():
            if not value.size:
                continue
            before, after = value.astype(np.float64), got[name].astype(np.float64)
            scale, gap = largest(before), float(distance(before, after).max())
            worst = max(worst, gap / scale if scale else gap)
            step = ROUNDING_STEPS * float(np.finfo(value.dtype).eps) if value.dtype.kind == "f" else 0.0
            beyond = max(beyond, float(shares(before, after, TOLERANCE, min(step, 0.1), *scales([before])).max()))
    if not beyond <= 1.0:
        raise ExportError(
            f"{path.name!r} disagrees with the file that it was made of: by {worst:.3g} of the largest output, {beyond:.3g} times what is "
            "allowed; leave out `export.edge`."
        )
    return worst


def _ort(path: Path) -> list[Path]:
    """Write a file in onnxruntime's format, and the list of its operators; no optimisation that one processor alone can run."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    try:
        with quiet():
            convert_onnx_models_to_ort(path, path.parent, [OptimizationStyle.Fixed])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(
            f"{path.name!r} cannot be written in onnxruntime's format: {first_line(error)}. Leave out `export.edge.ort`."
        ) from None
    return [path.with_suffix(".ort"), path.with_suffix(".required_operators.config")]


def _mobile(path: Path) -> dict[str, dict[str, int]]:
    """Return how many nodes two phones' accelerators would take by onnxruntime's own lists, and in how many parts."""
    from onnxruntime.tools.mobile_helpers import usability_checker

    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    found = {
        "NNAPI": usability_checker.check_nnapi_partitions(model, True),
        "CoreML": usability_checker.check_coreml_partitions(model, True, "coreml_supported_mlprogram_ops.md"),
    }
    return {
        name: {"nodes": one.num_nodes, "supported": one.num_supported_nodes, "partitions": one.num_partitions}
        for name, one in found.items()
    }
