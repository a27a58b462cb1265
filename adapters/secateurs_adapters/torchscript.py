"""Export by tracing (torch's TorchScript exporter): opt-in, for networks that `torch.export` refuses.

Tracing records the operators of one run, so that a decision by the values of the data keeps the branch that the example
took, without an error. Such decisions are found here by running the network once with its inputs followed through
every operator: a place where a number is read from a tensor that depends on them, and where the tracer warns as well,
is a decision by data. (Sizes are plain numbers in that run, and tensors that the tracer warns of in a trace, so
neither tells alone.)
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from secateurs.errors import ExportError
from secateurs_adapters.export import Traced, explained, export_checked, quiet
from secateurs_adapters.export_settings import TorchScriptSettings

if TYPE_CHECKING:
    import warnings
    from collections.abc import Iterator, Mapping, Sequence

    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact

__all__ = ["TorchScriptExporter"]

Place = tuple[str, int]
"""File and line."""

_READS = frozenset({torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default})
"""The operators that turn a tensor's values into a number of Python."""
_NOTE = "written by tracing (torchscript): the operators of one run, not the program"


@dataclass(frozen=True)
class TorchScriptExporter:
    """Implements `secateurs.interfaces.Exporter` with `torch.onnx.export(dynamo=False)`.

    Attributes:
        settings: the recipe's `export.options`.
    """

    settings: TorchScriptSettings = field(default_factory=TorchScriptSettings)

    def __call__(self, model: nn.Module, example: Dataset, path: Path, *, opset: int) -> Artifact:
        """Export `model` to `path`; see `export_checked`.

        Raises:
            ExportError: it cannot be exported, decides by the values of its data (unless `traced_branches`), the opset
                is not the one asked for, or the file disagrees with the network.
        """
        return export_checked(
            self._write, model, example, path, exporter="torchscript", opset=opset, sequence=self.settings.sequence
        )

    def _write(self, traced: Traced, path: Path, opset: int) -> tuple[str, ...]:
        flat = _Flat(traced)
        outputs = {name: {0: "batch"} for name in traced.output_names[:1]}
        try:
            with quiet() as said, _no_native_output(), torch.no_grad():
                torch.onnx.export(
                    flat,
                    tuple(traced.inputs.values()),
                    str(path),
                    input_names=list(traced.inputs),
                    output_names=traced.output_names,
                    dynamic_axes={**traced.axes, **outputs},
                    opset_version=opset,
                    dynamo=False,
                    verbose=False,
                )
        except Exception as error:
            raise ExportError(explained(error, "Take `exporter: dynamo`, which traces another way.")) from error
        decisions = _decisions(flat, tuple(traced.inputs.values()), said)
        if decisions and not self.settings.traced_branches:
            raise ExportError(
                f"the network decides by the values of its data ({'; '.join(decisions)}), and tracing keeps only the branch that the "
                "example takes. Use `torch.where` for both branches, or `exporter: dynamo` with `torch.cond`; accept one "
                "branch with `export.options.traced_branches: true`."
            )
        return (_NOTE, *(f"only one branch was traced at {place}" for place in decisions))


class _Flat(nn.Module):
    """A network with its inputs by position, and with all tensors that it returns in one tuple."""

    def __init__(self, traced: Traced) -> None:
        super().__init__()
        self.network = traced.network
        self._names = tuple(traced.inputs)
        self._keyword = traced.keyword

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        outputs = (
            self.network(**dict(zip(self._names, values, strict=True))) if self._keyword else self.network(*values)
        )
        return tuple(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))


@contextlib.contextmanager
def _no_native_output() -> Iterator[None]:
    """Drop what is written to standard output past Python: the tracer prints the graph of an operator that it cannot write."""
    sys.stdout.flush()
    kept = os.dup(1)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def _decisions(network: nn.Module, inputs: Sequence[Tensor], said: Sequence[warnings.WarningMessage]) -> list[str]:
    """Return the places where Python reads a number that depends on the inputs, each with its line of code."""
    warned = {(one.filename, one.lineno) for one in said if issubclass(one.category, TracerWarning)}
    if not warned:
        return []
    reads = _Reads(inputs)
    with torch.no_grad(), reads:
        network(*inputs)
    return [
        f"`{linecache.getline(file, line).strip()}`, {Path(file).name} line {line}"
        for file, line in sorted(warned & reads.places)
    ]


class _Reads(TorchDispatchMode):
    """Follows tensors through every operator, and notes where a number is read from one that depends on them.

    Attributes:
        places: every frame of each read.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        # The tensors are kept, so that none of their ids is used again.
        self._known = {id(value): value for value in inputs}
        self.places: set[Place] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        depends = any(id(leaf) in self._known for leaf in given)
        if depends and func in _READS:
            self.places |= _stack()
        result = func(*args, **(kwargs or {}))
        if depends:
            self._known |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


def _stack() -> set[Place]:
    found: set[Place] = set()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        found.add((frame.f_code.co_filename, frame.f_lineno))
        frame = frame.f_back
    return found
