"""What is known about an ONNX file without running it, and the sidecar that carries it.

Weights are counted from the initialisers and size from every file that ships: tensors that live outside the main file
(external data) belong to it, must lie in its folder or below, and must be there in full.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from secateurs.errors import DataError
from secateurs.files import write_text
from secateurs.interfaces import Artifact

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["graph_signature", "placed", "read_artifact", "sidecar_path", "write_sidecar"]

_NEXT = "give an .onnx file, for example one written by `secateurs run`."
_PACKAGES = ("secateurs", "onnx", "onnxruntime", "onnxscript", "optimum", "optimum-onnx", "torch", "transformers")


def read_artifact(path: Path) -> Artifact:
    """Describe an ONNX file and the external data that ships with it.

    Args:
        path: the main file.

    Returns:
        The description, with sizes in bytes and one sha256 per file, named relative to the main file's folder.

    Raises:
        DataError: the file is missing or not ONNX, or its external data is missing, too short, or outside its folder.
    """
    model = _load(path)
    tensors = list(_tensors(model.graph))
    files = (path, *_external_files(path, tensors))
    initialised = {tensor.name for tensor in model.graph.initializer}
    return Artifact(
        path=path,
        files=files,
        opset=_opset(model),
        inputs=tuple(value.name for value in model.graph.input if value.name not in initialised),
        outputs=tuple(value.name for value in model.graph.output),
        weight_bytes=sum(_tensor_bytes(tensor) for tensor in _initialisers(model.graph)),
        artifact_bytes=sum(file.stat().st_size for file in files),
        sha256={file.relative_to(path.parent).as_posix(): _sha256(file) for file in files},
        ir_version=int(model.ir_version),
    )


def placed(written: Path, path: Path, **about: Any) -> Artifact:
    """Move a finished file, with its external data, to where it belongs, and describe it.

    Args:
        written: the main file, in a temporary folder of the same file system.
        path: where it goes.
        about: further attributes of the description.

    Raises:
        DataError: it cannot be read.
    """
    # The data goes first: a main file never names weights that are not there.
    for file in reversed(read_artifact(written).files):
        file.replace(path.parent / file.relative_to(written.parent))
    return replace(read_artifact(path), **about)


def graph_signature(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Return name, element type and shape of every graph input and output.

    A symbolic dimension is its name, an unknown one None.
    """
    graph = _load(path).graph
    initialised = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in initialised]
    return {"inputs": [_describe(value) for value in inputs], "outputs": [_describe(value) for value in graph.output]}


def sidecar_path(path: Path) -> Path:
    """Return where the sidecar of an ONNX file lies: `model.onnx` has `model.onnx.json`."""
    return path.with_name(path.name + ".json")


def write_sidecar(artifact: Artifact, made: Mapping[str, Any] | None = None) -> Path:
    """Write opset, signature, hashes, sizes (bytes), parity and versions beside the file, whole or not at all.

    Args:
        artifact: the file.
        made: how it was made of another file, for one that is not an export: its name, its hash and the settings.
    """
    content = {
        "schema_version": 1,
        "file": artifact.path.name,
        "exporter": artifact.exporter,
        "opset": artifact.opset,
        "ir_version": artifact.ir_version,
        "signature": graph_signature(artifact.path),
        "weight_bytes": artifact.weight_bytes,
        "artifact_bytes": artifact.artifact_bytes,
        "bytes": {name: (artifact.path.parent / name).stat().st_size for name in artifact.sha256},
        "sha256": dict(artifact.sha256),
        "parity": None if artifact.parity is None else artifact.parity.model_dump(),
        "made": None if made is None else dict(made),
        "notes": list(artifact.notes),
        "versions": _versions(),
    }
    path = sidecar_path(artifact.path)
    write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def _load(path: Path) -> Any:
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "missing"
        raise DataError(f"the ONNX file {str(path)!r} is {kind}; {_NEXT}")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's exception classes differ between its implementations
        raise DataError(
            f"{str(path)!r} is not an ONNX file ({path.stat().st_size} bytes, {type(error).__name__}); {_NEXT}"
        ) from None
    if not model.graph.output or not model.opset_import:
        raise DataError(f"{str(path)!r} is not an ONNX file: it has no graph outputs or no opset; {_NEXT}")
    return model


def _opset(model: Any) -> int:
    """Return the version of the default operator domain; 0 where a file uses none of its operators."""
    return max((int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _initialisers(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    for subgraph in _subgraphs(graph):
        yield from _initialisers(subgraph)


def _subgraphs(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
            yield from attribute.graphs


def _tensors(graph: Any) -> Iterator[Any]:
    """Yield every tensor of a graph and its subgraphs: initialisers and attributes."""
    yield from _initialisers(graph)
    pending = [graph]
    while pending:
        current = pending.pop()
        pending.extend(_subgraphs(current))
        for node in current.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _tensor_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor's elements, with 4- and 2-bit elements packed."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return sum(len(text) for text in tensor.string_data)
    known = {int(code) for code in onnx.TensorProto.DataType.values()} - {onnx.TensorProto.UNDEFINED}
    if tensor.data_type not in known or any(size < 0 for size in tensor.dims):
        raise DataError(
            f"the tensor {tensor.name!r} has element type {tensor.data_type} and shape {list(tensor.dims)}, which no ONNX file may have; "
            "the file is damaged: copy or export it again."
        )
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    if name.endswith(("INT4", "4E2M1")):
        bits = 4
    elif name.endswith("INT2"):
        bits = 2
    else:
        bits = 8 * int(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize)
    return (int(math.prod(tensor.dims)) * bits + 7) // 8


def _external_files(path: Path, tensors: list[Any]) -> list[Path]:
    """Return the external data files in order of first use, once they are known to be complete and in the folder."""
    folder = path.parent.resolve()
    ends: dict[Path, int] = {}
    for tensor in tensors:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        if not _is_below(location, folder):
            raise DataError(
                f"{str(path)!r} keeps tensor {tensor.name!r} in {location!r}, outside its own folder. External data "
                "must lie beside the file or below it; save the model again with its data there."
            )
        file = path.parent / location
        if not file.is_file():
            raise DataError(
                f"{str(path)!r} keeps its weights in {location!r}, which is missing; copy that file beside it."
            )
        try:
            length = int(entry["length"]) if "length" in entry else _tensor_bytes(tensor)
            ends[file] = max(ends.get(file, 0), int(entry.get("offset", 0)) + length)
        except ValueError:
            raise DataError(
                f"{str(path)!r} says that tensor {tensor.name!r} lies at {entry}, which are no numbers; {_NEXT}"
            ) from None
    for file, end in ends.items():
        if file.stat().st_size < end:
            raise DataError(
                f"{str(file)!r} has {file.stat().st_size} bytes but {path.name!r} needs {end}; copy the whole file "
                "again."
            )
    return list(ends)


def _is_below(location: str, folder: Path) -> bool:
    """Tell whether a relative path leads below a folder, on any system, and through no link or `..` out of it."""
    if not location or "\0" in location or PureWindowsPath(location).anchor or Path(location).is_absolute():
        return False
    return ".." not in PureWindowsPath(location).parts and (folder / location).resolve().is_relative_to(folder)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _describe(value: Any) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    return {
        "name": value.name,
        "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        "shape": shape if tensor.HasField("shape") else None,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
