"""Export through torch's dynamo exporter, proved on the file before it takes its name.

The network is traced with two examples and a free first axis, and the file is compared with it at two other batch
sizes. Operators, opset and outputs are checked on what was written, because the exporter may return normally after it
wrote something else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from secateurs.errors import DataError, ExportError
from secateurs.forward import tensors
from secateurs_adapters.artifact import read_artifact, write_sidecar
from secateurs_adapters.parity import check_parity, network_outputs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact

__all__ = ["DynamoExporter", "dynamo"]

TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)
"""Batch sizes of the parity check; a file that fixed the traced size, or the special size 1, fails at one of them."""
_NOISY_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "torch._dynamo", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class DynamoExporter:
    """Implements `secateurs.interfaces.Exporter` with `torch.onnx.export(dynamo=True)`.

    Outputs are called `output`, or `output_0`, `output_1`, ... where there are several; inputs keep the names of the
    example. A bfloat16 network is written as float32, which holds its weights exactly, since onnxruntime has no
    bfloat16 kernels on the CPU; the inputs of a half-precision network become half precision.

    Attributes:
        single_file_bytes: weights beyond this go to a second file, `model.onnx.data`; protobuf ends at 2 GB.
    """

    single_file_bytes: int = 1_500_000_000

    def __call__(self, model: nn.Module, example: Dataset, path: Path, *, opset: int) -> Artifact:
        """Export `model` to `path` with a free first axis, and prove that the file does the same; see `Exporter`.

        Args:
            model: the network, on any device and in any mode; it is not changed.
            example: examples whose names become the input names and whose rows the check draws from.
            path: where the file goes; written whole or not at all.
            opset: the ONNX opset, from 18 on without conversion.

        Raises:
            ExportError: it cannot be exported, the opset is not the one asked for, or the file disagrees with the
                network.
        """
        network = _detached(model)
        data = _fit(network, example)
        traced = data.take(np.arange(TRACED_BATCH) % len(data))
        count = len(network_outputs(network, traced))
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
            written = Path(folder) / path.name
            self._write(network, traced, written, opset, _output_names(count))
            found = _read(written)
            if found.opset != opset:
                raise ExportError(
                    f"opset {opset} was asked for, but the exporter wrote opset {found.opset}; use `opset: "
                    f"{found.opset}`, or the default 20."
                )
            parity = check_parity(written, network, data, CHECKED_BATCHES)
            # The data goes first: a main file never names weights that are not there.
            for file in reversed(found.files):
                file.replace(path.parent / file.relative_to(folder))
        artifact = replace(read_artifact(path), exporter="dynamo", parity=parity)
        write_sidecar(artifact)
        return artifact

    def _write(self, network: nn.Module, traced: Dataset, path: Path, opset: int, output_names: list[str]) -> None:
        # Another layout (images read channels last) would be traced into the graph, as gathers that no device needs.
        inputs = {name: value.contiguous() for name, value in tensors(traced).items()}
        size = sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))
        try:
            with _quiet(), torch.no_grad():
                torch.onnx.export(
                    network,
                    () if traced.keyword else tuple(inputs.values()),
                    str(path),
                    kwargs=inputs if traced.keyword else None,
                    input_names=list(inputs),
                    output_names=output_names,
                    dynamic_shapes=_free_batch(list(inputs), traced.keyword),
                    opset_version=opset,
                    external_data=size > self.single_file_bytes,
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:
            raise ExportError(_explain(error)) from error


dynamo = DynamoExporter()


def _detached(model: nn.Module) -> nn.Module:
    """Return a copy of the network on the CPU, in evaluation mode; bfloat16 becomes float32."""
    try:
        # What a module computes and keeps, as torch's weight_norm and prune do, is not a leaf and refuses to be copied.
        kept = [
            value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)
        ]
        memo: dict[int, object] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
        network = copy.deepcopy(model, memo).cpu().eval()
    except Exception as error:
        raise ExportError(
            f"the network cannot be copied ({type(error).__name__}: {_first_line(error)}); remove what copy.deepcopy "
            "refuses."
        ) from error
    return network.float() if torch.bfloat16 in _precisions(network) else network


def _precisions(network: nn.Module) -> set[torch.dtype]:
    return {tensor.dtype for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point()}


def _fit(network: nn.Module, example: Dataset) -> Dataset:
    """Return the example with half-precision inputs for a half-precision network."""
    if _precisions(network) != {torch.float16}:
        return example
    cast = {
        name: array.astype(np.float16) if array.dtype.kind == "f" else array for name, array in example.inputs.items()
    }
    return replace(example, inputs=cast)


def _output_names(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _free_batch(names: list[str], keyword: bool) -> dict[str, dict[int, str]] | tuple[dict[int, str], ...]:
    return {name: {0: "batch"} for name in names} if keyword else tuple({0: "batch"} for _ in names)


def _read(path: Path) -> Artifact:
    try:
        return read_artifact(path)
    except DataError as error:
        raise ExportError(f"the exporter wrote a file that cannot be read: {error}") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress, warnings and advice off the terminal; what goes wrong arrives as an exception."""
    loggers = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            for name in loggers:
                logging.getLogger(name).setLevel(logging.CRITICAL)
            yield
        finally:
            for name, level in loggers.items():
                logging.getLogger(name).setLevel(level)


def _explain(error: Exception) -> str:
    """Return cause and remedy of a failed export in one or two sentences."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = str(root)
    if "data-dependent" in text:
        places = re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s*(.+)', text)
        place = f" (`{places[-1][2].strip()}`, {Path(places[-1][0]).name} line {places[-1][1]})" if places else ""
        return (
            f"the network decides by the values of its data{place}, which a fixed graph cannot hold. Use `torch.where` "
            "or `torch.cond` for both branches, or move the decision out of `forward`."
        )
    operator = re.search(r"No ONNX function found for <\w+\(op='([^']+)'", text)
    if operator:
        return (
            f"the operator {operator[1]} has no ONNX form. Replace it in `forward` by operators that have one, or try "
            "a later `opset`."
        )
    if "static shape" in text or "specialized" in text or "Constraints violated" in text:
        return (
            f"the network fixes its batch size: {_first_line(root, 'inferred')} Look for a size that `forward` "
            "hard-codes, for example in `view(2, ...)`, and take it from `x.shape` instead."
        )
    return (
        f"torch cannot export the network ({type(root).__name__}: {_first_line(root)}). Change `forward` so that "
        f"`torch.export.export` accepts it."
    )


def _first_line(error: BaseException, containing: str = "") -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip() and containing in line]
    return (lines or [type(error).__name__])[0][:300]
