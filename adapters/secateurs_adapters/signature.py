"""What a file takes and gives: element types, shapes, and which axis holds the examples.

Files that others exported name their axes as they like, or not at all, and may keep the examples on the second axis (recurrent state). The
batch axis is the one whose name says so; without such a name it is the first axis, unless that is named as a length. All other free axes are
lengths.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from secateurs.errors import DataError

__all__ = ["DEFAULT_DIMENSION", "Signature", "TensorSpec", "cast", "seeded_arrays"]

Array = npt.NDArray[Any]

DEFAULT_DIMENSION = 16
"""What a free dimension other than the batch is bound to in seeded inputs."""
_BATCH_NAME = re.compile(r"(?i)batch|^(n|b|bs)$")
_LENGTH_NAME = re.compile(r"(?i)seq|len|time|step|frame|token|past|height|width|^num|node|edge|point")


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type and shape of a graph input or output; a symbolic dimension is its name, an unknown one None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs of one file.

    Attributes:
        inputs: in graph order.
        file: its name, for messages.
    """

    inputs: tuple[TensorSpec, ...]
    file: str

    def batch_name(self) -> str | None:
        """Return the name of the axis that holds the examples, or None where no name says so."""
        names = [size for spec in self.inputs for size in spec.shape if isinstance(size, str) and _terms(size) is None]
        for name in names:
            if _BATCH_NAME.search(name):
                return name
        first = self._first()
        return first if isinstance(first, str) and not _LENGTH_NAME.search(first) else None

    def fixed_batch(self) -> int | None:
        """Return the batch size that the file fixes, or None where the axis is free."""
        first = self._first()
        return first if self.batch_name() is None and isinstance(first, int) and first > 0 else None

    def batch_axis(self, shape: Sequence[int | str | None]) -> int | None:
        """Return which axis of an input or output of this shape holds the examples; None where none does."""
        name, fixed = self.batch_name(), self.fixed_batch()
        if fixed is not None:
            return shape.index(fixed) if fixed in shape else None
        if name in shape and name is not None:
            return shape.index(name)
        free = next((axis for axis, size in enumerate(shape) if not _is_size(size)), None)
        if free is None or shape[free] is None:
            return free
        said = str(shape[free])
        return free if free == 0 and _terms(said) is None and not _LENGTH_NAME.search(said) else None

    def has_lengths(self) -> bool:
        """Return whether an input has a free axis that does not hold the examples."""
        return any(
            not _is_size(size) and axis != self.batch_axis(spec.shape)
            for spec in self.inputs
            for axis, size in enumerate(spec.shape)
        )

    def shapes(self, batch_size: int, length: int | None = None) -> dict[str, tuple[int, ...]]:
        """Return a shape for every input.

        Args:
            batch_size: size of the axis that holds the examples, where that is free.
            length: size of every other free axis; None takes 16. An axis named as a sum or product of others, such as `past + 1`, follows them.

        Raises:
            DataError: the file fixes another batch size.
        """
        fixed = self.fixed_batch()
        if fixed not in (None, batch_size):
            raise DataError(
                f"{self.file!r} fixes its batch size at {fixed}, got {batch_size}; ask for {fixed} or export it "
                "with a free axis."
            )
        default = DEFAULT_DIMENSION if length is None else length
        name = self.batch_name()
        bound = {} if name is None else {name: batch_size}

        def bind(size: int | str | None, axis: int, shape: Sequence[int | str | None]) -> int:
            if isinstance(size, int) and size >= 0:
                return size
            wanted = batch_size if axis == self.batch_axis(shape) else default
            if not isinstance(size, str):
                return wanted
            terms = _terms(size)
            if terms is None:
                return bound.setdefault(size, wanted)
            return sum(
                int(np.prod([int(f) if f.isdigit() else bound.setdefault(f, default) for f in term])) for term in terms
            )

        return {
            spec.name: tuple(bind(size, axis, spec.shape) for axis, size in enumerate(spec.shape))
            for spec in self.inputs
        }

    def _first(self) -> int | str | None:
        """Return the first axis of the first input that has axes."""
        return next((spec.shape[0] for spec in self.inputs if spec.shape), None)


def seeded_arrays(signature: Signature, batch_size: int, seed: int = 0, length: int | None = None) -> dict[str, Array]:
    """Make inputs for a signature: normal floats, integers 0 and 1, random booleans, masks of ones.

    Args:
        signature: of the file to feed.
        batch_size: examples.
        seed: of the values.
        length: size of free axes other than the batch; None takes 16.

    Raises:
        DataError: the file fixes another batch size, or its shapes hold more than there is memory for.
    """
    generator = np.random.default_rng(seed)
    shapes = signature.shapes(batch_size, length)
    try:
        return {spec.name: _random(generator, spec, shapes[spec.name]) for spec in signature.inputs}
    except (MemoryError, ValueError):  # numpy's word for a shape beyond the address space
        listed = ", ".join(f"{name!r} {list(shape)}" for name, shape in shapes.items())
        raise DataError(
            f"the inputs of {signature.file!r} do not fit into memory: {listed}; check its shapes."
        ) from None


def cast(spec: TensorSpec, array: Array, file: str, batch_axis: int | None) -> Array:
    """Return an array as an input takes it.

    Args:
        spec: the input.
        array: examples on the first axis.
        file: its name, for messages.
        batch_axis: where the file has the examples; for an input without such an axis, all examples must be the same.

    Raises:
        DataError: the shape is another, or the values cannot be cast without loss of meaning.
    """
    array = _placed(spec, array, file, batch_axis)
    if array.dtype == spec.dtype:
        return np.ascontiguousarray(array) if array.ndim else array
    kinds = {"f": "fiub", "i": "iub", "u": "iub", "b": "b"}[spec.dtype.kind]
    if array.dtype.kind not in kinds:
        raise DataError(
            f"input {spec.name!r} of {file!r} takes {spec.dtype}, but the data is {array.dtype}; convert the data "
            "first."
        )
    converted = np.asarray(array, dtype=spec.dtype, order="C")
    if spec.dtype.kind in "iu" and array.dtype.kind in "iu" and not np.array_equal(converted, array):
        raise DataError(
            f"input {spec.name!r} of {file!r} takes {spec.dtype}, but the data holds values beyond it, up to "
            f"{array.max()}."
        )
    return converted


def _placed(spec: TensorSpec, array: Array, file: str, batch_axis: int | None) -> Array:
    """Move the examples from the first axis to where the file has them."""
    placed = array
    if batch_axis is None and array.ndim == len(spec.shape) + 1 and len(array) and (array == array[:1]).all():
        placed = np.asarray(array[0])
    elif batch_axis and array.ndim == len(spec.shape):
        placed = np.moveaxis(array, 0, batch_axis)
    fits = placed.ndim == len(spec.shape) and all(
        not _is_size(want) or want == got or axis == (batch_axis or 0)
        for axis, (want, got) in enumerate(zip(spec.shape, placed.shape, strict=True))
    )
    if not fits:
        raise DataError(
            f"input {spec.name!r} of {file!r} has shape {list(spec.shape)}, but the data has {list(array.shape)}; the "
            "axes after the first must agree: transpose, resize or tokenise the data as for training."
        )
    return placed


def _is_size(size: object) -> bool:
    return isinstance(size, int) and size >= 0


def _terms(name: str) -> list[list[str]] | None:
    """Read the name of an axis as a sum of products, as exporters write it; None for a plain name."""
    if not re.fullmatch(r"\w+(\s*[+*]\s*\w+)+", name):
        return None
    return [[factor.strip() for factor in term.split("*")] for term in name.split("+")]


def _random(generator: np.random.Generator, spec: TensorSpec, shape: Sequence[int]) -> Array:
    if spec.dtype.kind == "f":
        exact = spec.dtype if spec.dtype.itemsize >= 4 else np.dtype(np.float32)
        return np.asarray(generator.standard_normal(shape, dtype=exact.type)).astype(spec.dtype, copy=False)
    if spec.name.endswith("mask"):
        return np.ones(shape, spec.dtype)
    return np.asarray(generator.integers(0, 2, shape, dtype=np.int8)).astype(spec.dtype)
