"""Memory of a GPU by the driver's count (NVML): what a file takes there beyond a one-node model.

The driver counts whole devices, so nothing else may use the GPU meanwhile. onnxruntime's arena does not give memory back, so that what is held
after the runs is the peak. The tests of this module are marked `gpu`.

Run as `python -m secateurs_adapters.device_memory REQUEST.json` this module is the measuring process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateurs.errors import SecateursError
from secateurs_adapters.fresh import in_fresh_process, serve
from secateurs_adapters.one_node import ONE_NODE
from secateurs_adapters.session import Session, SessionOptions, seeded_inputs

if TYPE_CHECKING:
    from secateurs.settings import TargetSettings

__all__ = ["NVIDIA", "measure_device"]

NVIDIA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
"""Providers whose device NVML knows."""
RUNS = 3


def measure_device(path: Path, settings: TargetSettings, *, seed: int = 0) -> int:
    """Return what one file takes of the device's memory beyond a one-node model, bytes.

    Args:
        path: the file.
        settings: provider, its `device_id`, batch size.
        seed: of the inputs.

    Raises:
        SecateursError: NVML cannot be asked, or a process failed.
    """
    with tempfile.TemporaryDirectory(prefix="secateurs-") as folder:
        base = Path(folder) / "base.onnx"
        base.write_bytes(ONE_NODE)
        found = [
            in_fresh_process(
                "secateurs_adapters.device_memory",
                {
                    "file": str(file.resolve()),
                    "provider": settings.provider,
                    "options": settings.options,
                    "batch_size": settings.batch_size,
                    "length": settings.sequence_length,
                    "seed": seed,
                },
            )["bytes"]
            for file in (base, path)
        ]
    return max(0, int(found[1]) - int(found[0]))


def _measure_here(request: dict[str, Any]) -> Mapping[str, Any]:
    try:
        import pynvml
    except ImportError:
        raise SecateursError("the driver's count of GPU memory needs nvidia-ml-py: pip install nvidia-ml-py.") from None
    try:
        pynvml.nvmlInit()
        device = pynvml.nvmlDeviceGetHandleByIndex(int(request["options"].get("device_id", 0)))
        before = pynvml.nvmlDeviceGetMemoryInfo(device).used
        options = SessionOptions(provider=request["provider"], provider_options=request["options"])
        session = Session(Path(request["file"]), options)
        feeds = seeded_inputs(session, request["batch_size"], request["seed"], request["length"])
        for _ in range(RUNS):
            session.run(feeds)
        return {"bytes": pynvml.nvmlDeviceGetMemoryInfo(device).used - before}
    except pynvml.NVMLError as error:
        raise SecateursError(f"NVML cannot be asked for the GPU's memory: {error}.") from None


if __name__ == "__main__":
    serve(_measure_here, sys.argv[1:])
