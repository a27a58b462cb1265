"""Export of Hugging Face networks through Optimum, in memory: nothing is saved and loaded again on the way.

Saving would lose what no configuration describes, such as layers of different widths.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateurs.errors import ExportError, PluginError
from secateurs_adapters.export import SINGLE_FILE_BYTES, Traced, explained, export_checked, quiet
from secateurs_adapters.export_settings import OptimumSettings

if TYPE_CHECKING:
    from torch import nn

    from secateurs.data import Dataset
    from secateurs.interfaces import Artifact

__all__ = ["OptimumExporter"]


@dataclass(frozen=True)
class OptimumExporter:
    """Implements `secateurs.interfaces.Exporter` with `optimum.exporters.onnx.onnx_export_from_model`.

    Inputs and outputs are called as Optimum calls them; the network has to return its outputs by these names.

    Attributes:
        settings: the recipe's `export.options`.

    Raises:
        PluginError: Optimum's exporter is not installed, or cannot be imported beside the transformers that is.
    """

    settings: OptimumSettings = field(default_factory=OptimumSettings)

    def __post_init__(self) -> None:
        try:
            missing = importlib.util.find_spec("optimum.exporters.onnx") is None
        except ModuleNotFoundError:
            missing = True
        if missing:
            raise PluginError(
                "the exporter 'optimum' needs the package optimum-onnx, which is not installed; pip install "
                "'secateurs[optimum]' (transformers below 4.58), or use `exporter: dynamo`."
            )
        try:
            importlib.import_module("optimum.exporters.onnx.convert")
        except ImportError as error:
            raise PluginError(
                f"the exporter 'optimum' cannot be imported ({error}); it takes transformers below 4.58: pip install 'secateurs[optimum]', "
                f"or use `exporter: dynamo`."
            ) from error

    def __call__(self, model: nn.Module, example: Dataset, path: Path, *, opset: int) -> Artifact:
        """Export `model` to `path`; see `export_checked`.

        Raises:
            ExportError: it is no Hugging Face network, Optimum cannot export it, the opset is not the one asked for, or
                the file disagrees with the network.
        """
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel):
            raise ExportError(
                f"the exporter 'optimum' takes Hugging Face networks (transformers.PreTrainedModel), got "
                f"{type(model).__name__}; use `exporter: dynamo`."
            )
        return export_checked(
            self._write, model, example, path, exporter="optimum", opset=opset, sequence="free", by_name=True
        )

    def _write(self, traced: Traced, path: Path, opset: int) -> tuple[str, ...]:
        from optimum.exporters.onnx import onnx_export_from_model

        folder = path.parent / "optimum"
        try:
            with quiet(), torch.no_grad():
                onnx_export_from_model(
                    traced.network,
                    output=folder,
                    opset=opset,
                    do_validation=False,
                    device="cpu",
                    **({} if self.settings.task is None else {"task": self.settings.task}),
                )
        except Exception as error:
            raise ExportError(f"{explained(error)} Or use `exporter: dynamo`.") from error
        parts = sorted(folder.glob("*.onnx"))
        if len(parts) != 1:
            raise ExportError(
                f"Optimum writes this network in {len(parts)} files ({', '.join(part.name for part in parts)}), of which none does all that "
                "the network does; use `exporter: dynamo`."
            )
        _save(parts[0], path, traced)
        return ()


def _save(source: Path, path: Path, traced: Traced) -> None:
    """Write Optimum's file under our name, with its data beside it if it is too large for one file."""
    import onnx

    model = onnx.load(str(source))
    lacking = [value.name for value in model.graph.input if value.name not in traced.inputs]
    if lacking:
        raise ExportError(
            f"Optimum's file takes the inputs {lacking}, which the data lacks (it has {list(traced.inputs)}); add them to the data, or use "
            "`exporter: dynamo`."
        )
    size = sum(file.stat().st_size for file in source.parent.glob(f"{source.name}*"))
    if size > SINGLE_FILE_BYTES:
        onnx.save(model, str(path), save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(model, str(path))
