"""Arrays from .npz files of unknown origin.

The headers are read first: what is not plain numbers (an object array would be unpickled, which runs code) or takes too
much memory is refused before anything is decompressed.
"""

from __future__ import annotations

import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from secateurs.errors import DataError, unknown_name

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["read_arrays", "refuse_size"]

Array = npt.NDArray[Any]


def read_arrays(path: Path, names: Sequence[str] | None, limit: int) -> dict[str, Array]:
    """Return arrays of an .npz by name.

    Args:
        path: an existing file.
        names: which arrays; the others are not read. None reads all.
        limit: bytes that they may take together.

    Raises:
        DataError: it is not an .npz or damaged, an array is missing or not of plain numbers, or they are too large.
    """
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise DataError(
            f"{str(path)!r} is not an .npz file; write one with `numpy.savez(file, images=..., labels=...)`."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            known = [member.removesuffix(".npy") for member in archive.namelist() if member.endswith(".npy")]
            names = known if names is None else names
            for name in names:
                if name not in known:
                    hint = "In a recipe, `images_key`, `labels_key` and `inputs` name the arrays."
                    raise DataError(f"{str(path)!r}: {unknown_name('array', name, known)} {hint}")
            refuse_size(sum(_bytes(archive, name, path) for name in names), limit, path)
            return {name: _array(archive, name) for name in names}
    except DataError:
        raise
    except Exception as error:  # numpy raises nearly anything on a damaged header
        raise DataError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}); write it again with `numpy.savez`."
        ) from error


def refuse_size(size: int, limit: int, path: Path) -> None:
    """Refuse data that would take more than `limit` bytes.

    Raises:
        DataError: it would.
    """
    if size > limit:
        raise DataError(
            f"{str(path)!r} would take {size} bytes in memory, more than the {limit} of `max_bytes`; use fewer "
            f"examples, or raise `max_bytes` if you trust it."
        )


def _array(archive: zipfile.ZipFile, name: str) -> Array:
    """Return an array from the very member whose header was looked at: `numpy.load` prefers one without the suffix."""
    with archive.open(f"{name}.npy") as member:
        found: Array = np.lib.format.read_array(member, allow_pickle=False)
    return found


def _bytes(archive: zipfile.ZipFile, name: str, path: Path) -> int:
    """Return the bytes that an array takes, from its header."""
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    if dtype.kind not in "biuf":
        raise DataError(
            f"array {name!r} of {str(path)!r} holds {dtype}; only plain numbers are read (objects would be unpickled, "
            f"which runs code): write it as an array of integers or floats."
        )
    if not shape:
        raise DataError(f"array {name!r} of {str(path)!r} is a single value; it needs one row per example.")
    size = dtype.itemsize
    for length in shape:
        size *= max(length, 0)
    return size
