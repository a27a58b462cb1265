"""Faults of the machine in words: a full disk, a folder that may not be written, no memory left, a device that is gone.

Free of torch: its errors are known by their names.
"""

from __future__ import annotations

import errno
import re

__all__ = ["told"]

_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would become larger than is allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written or read",
    errno.EPERM: "it may not be written or read",
    errno.EIO: "the disk failed",
    errno.EMFILE: "too many files are open",
}
_RESUME = "Mend the cause; what `run` and `zoo` had finished is kept, and `--resume` goes on from there."
_OS_ERROR = re.compile(r"os error (\d+)")
"""How libraries written in Rust, such as safetensors, name the error of the system."""
_LOST = re.compile(
    r"CUDA error|cudaError|device-side|HIP error|GPU is lost|fallen off the bus|CUDA driver|NVML|no CUDA-capable device",
    re.IGNORECASE,
)
_DEVICE_MEMORY = re.compile(
    r"(CUDA|HIP|MPS|XPU)\b.*out of memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE | re.DOTALL
)
_MEMORY = re.compile(r"can't allocate memory|not enough memory|bad_alloc|Cannot allocate memory", re.IGNORECASE)


def told(error: BaseException) -> str | None:
    """Return what happened and what to do next; None for an error that is no fault of the machine.

    Args:
        error: anything that a run raised.

    >>> told(OSError(28, "No space left on device", "out/model.onnx")).split(".")[0]
    "the run stopped at 'out/model"
    >>> told(ValueError("a bug")) is None
    True
    """
    said = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _OS_ERROR.search(said)):
        number = int(found[1])
    if number in _DISK:
        name = getattr(error, "filename", None)
        where = "" if name is None else f" at {str(name)!r}"
        return f"the run stopped{where}: {_DISK[number]}. {_RESUME}"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    first = said.strip().split("\n", 1)[0][:200]
    if "OutOfMemoryError" in kinds or _DEVICE_MEMORY.search(said):
        return f"the device's memory does not suffice: {first}. Use fewer samples or a smaller batch. {_RESUME}"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _MEMORY.search(said)):
        more = f": {first}" if first else ""
        return f"the memory does not suffice{more}. Use fewer calibration samples, or a machine with more. {_RESUME}"
    if kinds & {"AcceleratorError", "RuntimeError"} and _LOST.search(said):
        look = "Check it with its own tools (`nvidia-smi`), or hide it (`CUDA_VISIBLE_DEVICES=`)."
        return f"the device failed or is gone: {first}. {look} {_RESUME}"
    return None
