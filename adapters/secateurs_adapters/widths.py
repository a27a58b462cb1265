"""Which multiples of channels the kernels of a provider like, and how that is known."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateurs.interfaces import WidthMultiple
from secateurs_adapters.runtime_graph import optimised_model, runtime_graph
from secateurs_adapters.session import CPU, SessionOptions

if TYPE_CHECKING:
    from secateurs.settings import TargetSettings

__all__ = ["preferred_multiple"]

_TENSOR_CORES = (
    "tensor cores take channels in multiples of 8 in half precision (NVIDIA, Deep Learning Performance Guide)"
)
_DOCUMENTED = {
    "CUDAExecutionProvider": WidthMultiple(8, _TENSOR_CORES),
    "TensorrtExecutionProvider": WidthMultiple(8, _TENSOR_CORES),
}


def preferred_multiple(settings: TargetSettings) -> WidthMultiple:
    """Return the number of channels whose multiples a target's kernels like: measured on the CPU, documented elsewhere, else 1.

    Raises:
        ProviderError: the provider is not available here.
    """
    if settings.provider != CPU:
        return _DOCUMENTED.get(
            settings.provider, WidthMultiple(1, f"nothing is known of the widths that {settings.provider} likes")
        )
    block = _block()
    if block == 1:
        return WidthMultiple(1, "the convolutions of this CPU take any number of channels")
    return WidthMultiple(block, f"the convolutions of this CPU work on blocks of {block} channels, measured")


def _block() -> int:
    """Return how many channels onnxruntime makes of one: a convolution with a single output is run and its blocks are counted."""
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1, 8, 8]),
    ]
    weights = [
        numpy_helper.from_array(np.ones((1, 3, 3, 3), np.float32), "w"),
        numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "v"),
    ]
    nodes = [
        helper.make_node("Conv", [source, weight], [result], pads=[1, 1, 1, 1])
        for source, weight, result in (("x", "w", "h"), ("h", "v", "y"))
    ]
    graph = helper.make_graph(nodes, "block", ends[:1], ends[1:], weights)
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        path = Path(folder) / "block.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
        running = optimised_model(path, SessionOptions())
    shapes = runtime_graph(running, {"x": (1, 3, 8, 8)}).shapes
    return max(shapes[name][1] for node in running.graph.node for name in node.output)
