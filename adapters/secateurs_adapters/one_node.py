"""The least model that onnxruntime loads and runs, without the package onnx: the ground from which memory is counted."""

from __future__ import annotations

__all__ = ["ONE_NODE"]

ONE_NODE = (
    b'\x08\x08:H\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x04baseZ\x18\n\x01x\x12\x13\n\x11\x08\x01\x12\r\n\x07\x12\x05batch\n\x02\x08\x01'
    b"b\x18\n\x01y\x12\x13\n\x11\x08\x01\x12\r\n\x07\x12\x05batch\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX file: y = Relu(x) on floats of shape (batch, 1), opset 17."""
