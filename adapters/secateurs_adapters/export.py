"""Export to ONNX, proved on the file before it takes its name; torch's dynamo exporter.

The network is traced with two examples and a free first axis, with a free length where it has one, and the file is
compared with it at two other batch sizes and lengths. Operators, opset and outputs are checked on what was written,
because an exporter may return normally after it wrote something else.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from secateurs.errors import DataError, ExportError, first_line
from secateurs.forward import tensors
from secateurs_adapters.artifact import placed, read_artifact, write_sidecar
from secateurs_adapters.export_settings import DynamoSettings
from secateurs_adapters.parity import check_parity, network_outputs, refuse_complex

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact

__all__ = ["DynamoExporter", "Traced", "dynamo", "explained", "export_checked", "quiet"]

TRACED_BATCH = 2
CHECKED_BATCHES = (1, 3)
"""Batch sizes of the parity check; a file that fixed the traced size, or the special size 1, fails at one of them."""
SINGLE_FILE_BYTES = 1_500_000_000
"""Weights beyond this go to a second file; protobuf ends at 2 GB."""


@dataclass(frozen=True)
class Traced:
    """What an exporter traces.

    Attributes:
        network: a copy on the CPU, in evaluation mode.
        inputs: two examples, by name.
        keyword: whether the network takes its inputs by name.
        output_names: of every tensor that it returns, in order.
        axes: the names of the free axes of each input, by position.
    """

    network: nn.Module
    inputs: Mapping[str, Tensor]
    keyword: bool
    output_names: list[str]
    axes: Mapping[str, dict[int, str]]

    def weight_bytes(self) -> int:
        """Return the bytes of parameters and buffers."""
        return sum(t.numel() * t.element_size() for t in (*self.network.parameters(), *self.network.buffers()))


Write = Callable[[Traced, Path, int], tuple[str, ...]]
"""Writes what is traced to a path, at an opset, and returns what has to be said about it."""


def export_checked(
    write: Write,
    model: nn.Module,
    example: Dataset,
    path: Path,
    *,
    exporter: str,
    opset: int,
    sequence: str = "fixed",
    by_name: bool = False,
) -> Artifact:
    """Write a network through an exporter and prove that the file does the same; see `Exporter`.

    Args:
        write: the exporter.
        model: the network, on any device and in any mode; it is not changed.
        example: examples whose names become the input names and whose rows the check draws from.
        path: where the file goes; written whole or not at all, with its sidecar.
        exporter: the name to record.
        opset: the ONNX opset that the file must have.
        sequence: `free` or `fixed` length of token inputs; `auto` is free where the network runs at other lengths and
            the file can be proved there, and says so in a note where it is not.
        by_name: compare outputs by name; see `check_parity`.

    Raises:
        ExportError: it cannot be exported, the opset is not the one asked for, or the file disagrees with the network.
    """
    network = _detached(model)
    data = _fit(network, example)
    attempt = partial(_attempt, write, network, data, path, exporter=exporter, opset=opset, by_name=by_name)
    lengths, notes = _free_lengths(network, data, sequence)
    if not lengths or sequence == "free":
        return attempt(lengths, notes)
    try:
        return attempt(lengths, notes)
    except ExportError as error:
        return attempt((), (f"the sequence length is fixed at {data.length}, as with a free one {error}",))


def _attempt(
    write: Write,
    network: nn.Module,
    data: Dataset,
    path: Path,
    lengths: tuple[int, ...],
    notes: tuple[str, ...],
    *,
    exporter: str,
    opset: int,
    by_name: bool,
) -> Artifact:
    """Write a file with a free length if there are lengths to prove it at, prove it, and put it in its place."""
    traced = _traced(network, data, bool(lengths))
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent) as folder:
        written = Path(folder) / path.name
        said = write(traced, written, opset)
        _forget_source(written)
        found = _read(written)
        if found.opset != opset:
            raise ExportError(
                f"opset {opset} was asked for, but the exporter wrote opset {found.opset}; use `opset: "
                f"{found.opset}`, or the default 20."
            )
        parity = check_parity(written, network, data, CHECKED_BATCHES, lengths=lengths, by_name=by_name)
        artifact = placed(written, path, exporter=exporter, parity=parity, notes=(*said, *notes))
    write_sidecar(artifact)
    return artifact


def _forget_source(path: Path) -> None:
    """Remove what exporters note beside each node for debugging: lines of source code and paths of the machine that wrote the file."""
    model = onnx.load(str(path), load_external_data=False)
    for function in model.functions:
        del function.metadata_props[:]
        _forget_nodes(function.node)
    _forget_graph(model.graph)
    onnx.save(model, str(path))


def _forget_graph(graph: onnx.GraphProto) -> None:
    for holder in (graph, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""
    _forget_nodes(graph.node)


def _forget_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *((attribute.g,) if attribute.HasField("g") else ())):
                _forget_graph(graph)


@dataclass(frozen=True)
class DynamoExporter:
    """Implements `secateurs.interfaces.Exporter` with `torch.onnx.export(dynamo=True)`.

    Outputs are called `output`, or `output_0`, `output_1`, ... where there are several; inputs keep the names of the
    example. A bfloat16 network is written as float32, which holds its weights exactly, since onnxruntime has no
    bfloat16 kernels on the CPU; the inputs of a half-precision network become half precision.

    Attributes:
        settings: the recipe's `export.options`.
        single_file_bytes: weights beyond this go to a second file, `model.onnx.data`.
    """

    settings: DynamoSettings = field(default_factory=DynamoSettings)
    single_file_bytes: int = SINGLE_FILE_BYTES

    def __call__(self, model: nn.Module, example: Dataset, path: Path, *, opset: int) -> Artifact:
        """Export `model` to `path`, opset 18 or later without conversion; see `export_checked`.

        Raises:
            ExportError: it cannot be exported, the opset is not the one asked for, or the file disagrees with the
                network.
        """
        return export_checked(
            self._write, model, example, path, exporter="dynamo", opset=opset, sequence=self.settings.sequence
        )

    def _write(self, traced: Traced, path: Path, opset: int) -> tuple[str, ...]:
        try:
            with quiet(), torch.no_grad():
                torch.onnx.export(
                    traced.network,
                    () if traced.keyword else tuple(traced.inputs.values()),
                    str(path),
                    kwargs=dict(traced.inputs) if traced.keyword else None,
                    input_names=list(traced.inputs),
                    output_names=traced.output_names,
                    dynamic_shapes=dict(traced.axes) if traced.keyword else tuple(traced.axes.values()),
                    opset_version=opset,
                    external_data=traced.weight_bytes() > self.single_file_bytes,
                    dynamo=True,
                    verbose=False,
                )
        except Exception as error:
            raise ExportError(explained(error)) from error
        return ()


dynamo = DynamoExporter()


def _traced(network: nn.Module, data: Dataset, free_length: bool) -> Traced:
    rows = data.take(np.arange(TRACED_BATCH) % len(data))
    longer = data.sequences if free_length else ()
    outputs = network_outputs(network, rows)
    names = _output_names(len(outputs))
    for output, name in zip(outputs, names, strict=True):
        refuse_complex(output, name)
    return Traced(
        network=network,
        # Another layout (images read channels last) would be traced into the graph, as gathers that no device needs.
        inputs={name: value.contiguous() for name, value in tensors(rows).items()},
        keyword=data.keyword,
        output_names=names,
        axes={name: {0: "batch", 1: "sequence"} if name in longer else {0: "batch"} for name in data.inputs},
    )


def _free_lengths(network: nn.Module, data: Dataset, sequence: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the lengths at which a free length is to be proved, none where it is fixed, and what to say about that.

    Raises:
        ExportError: a free length is asked for, and the network has none.
    """
    length = data.length
    if sequence == "fixed" or length is None or length < 3:
        return (), ()
    found: list[int] = []
    for other in (length + 3, length // 2 + 1, length - 1, length + 1):
        if other not in (length, *found) and len(found) < len(CHECKED_BATCHES):
            with contextlib.suppress(ExportError):
                network_outputs(network, data.take([0]).at_length(other))
                found.append(other)
    if len(found) == len(CHECKED_BATCHES):
        return tuple(found), ()
    note = f"the sequence length is fixed at {length}: the network does not run at two others"
    if sequence == "free":
        raise ExportError(f"{note}. Leave out `sequence: free`, or give `forward` no fixed length.")
    return (), (note,)


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
            f"the network cannot be copied ({type(error).__name__}: {first_line(error)}); remove what copy.deepcopy "
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


def _read(path: Path) -> Artifact:
    try:
        return read_artifact(path)
    except DataError as error:
        raise ExportError(f"the exporter wrote a file that cannot be read: {error}") from None


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep an exporter's progress and advice off the terminal, and yield the list of its warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(disabled)


def explained(error: Exception, remedy: str = "Change `forward` so that `torch.export.export` accepts it.") -> str:
    """Return cause and remedy of a failed export in one or two sentences; `remedy` where the cause is not known."""
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
    operator = re.search(r"No ONNX function found for <\w+\(op='([^']+)'", text) or re.search(
        r"Exporting the operator '([^']+)' to ONNX", text
    )
    if operator:
        return (
            f"the operator {operator[1]} has no ONNX form. Replace it in `forward` by operators that have one, or try "
            "a later `opset`."
        )
    if "static shape" in text or "specialized" in text or "Constraints violated" in text:
        return (
            f"the network fixes its batch size or length: {_inferred(root)} Look for a size that `forward` "
            "hard-codes, for example in `view(2, ...)`, and take it from `x.shape` instead."
        )
    return f"torch cannot export the network ({type(root).__name__}: {first_line(root)[:300]}). {remedy}"


def _inferred(error: BaseException) -> str:
    """Return the first line that says which size torch found to be fixed."""
    lines = [line.strip(" -") for line in str(error).splitlines() if "inferred" in line]
    return (lines or [type(error).__name__])[0][:300]
