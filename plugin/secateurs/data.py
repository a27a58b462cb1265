"""Data sets in memory, and the four disjoint roles they play.

A `Dataset` is named arrays with the examples on the first axis. `calibration`, `training`, `validation` and `evaluation` never share an
example: a role that is not given is cut from calibration's source by a seeded, stratified split, never from evaluation, and exact
duplicates (by content hash) leave the side that is not evaluation.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from secateurs.errors import DataError

__all__ = ["IGNORED", "ROLES", "Dataset", "Roles", "order_notes", "resolve_roles", "stratified_split"]

ROLES = ("calibration", "training", "validation", "evaluation")
IGNORED = -100
"""The label of what counts for nothing, as PyTorch and Hugging Face have it."""
DUPLICATES_ALLOWED = 0.01
"""Share of a role's examples that may be exact duplicates of another role's before the two count as overlapping."""

SMALLEST_CUT = 40
"""Fewer examples than this are not cut for validation: what is left of them could decide nothing."""

POOL = 32
"""Batches whose examples are sorted by length together, in a random order of examples of like lengths."""

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Dataset:
    """Examples of a network's inputs, with or without labels.

    Attributes:
        inputs: one array per network input, by the name that the exported file will use; the first axis counts the examples.
        labels: one label per example, or None.
        origin: what identifies the source and its split, for example `"digits:train"`; two roles with one origin share a source.
        keyword: call the network with the inputs by name instead of by position.
        trims: leave out of every batch the last positions that are padding in all of its examples; for networks that this does not change
            (`secateurs.forward.ignores_padding`).
        classes: what the labels 0, 1, ... stand for, where the source tells; None compares with anything.
    """

    inputs: Mapping[str, Array]
    labels: Array | None = None
    origin: str = ""
    keyword: bool = False
    trims: bool = False
    classes: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        where = f"data set {self.origin!r}"
        if not self.inputs:
            raise DataError(f"{where} has no input arrays; give at least one.")
        sizes = {name: len(array) for name, array in self.inputs.items()}
        if len(set(sizes.values())) != 1:
            raise DataError(f"{where} has inputs of different lengths {sizes}; every array needs one row per example.")
        if len(self) == 0:
            raise DataError(f"{where} is empty; at least one example is needed.")
        if self.labels is not None and len(self.labels) != len(self):
            raise DataError(
                f"{where} has {len(self)} examples but {len(self.labels)} labels; give one label per example."
            )
        for name, array in self.inputs.items():
            if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                bad = int((~np.isfinite(array)).any(axis=tuple(range(1, array.ndim))).sum())
                raise DataError(
                    f"{where}: input {name!r} holds NaN or infinite values in {bad} of {len(self)} examples; clean the data first."
                )

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, indices: npt.ArrayLike) -> Dataset:
        """Return the examples at `indices`, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        inputs = {name: array[index] for name, array in self.inputs.items()}
        return replace(self, inputs=inputs, labels=None if self.labels is None else self.labels[index])

    def sampled(self, samples: int | None, seed: int) -> Dataset:
        """Return so many of the examples, drawn with the label shares of the whole; all of them where `samples` is None.

        Raises:
            DataError: there are fewer.
        """
        return self if samples is None else self.take(stratified_split(self.labels, [samples], len(self), seed)[0])

    def batches(self, size: int, *, drop_last: bool = False) -> Iterator[Dataset]:
        """Yield consecutive batches of `size` examples, trimmed; the last one may be smaller unless `drop_last`."""
        stop = len(self) - size + 1 if drop_last else len(self)
        for start in range(0, stop, size):
            yield self.take(np.arange(start, min(start + size, len(self)))).trimmed()

    def trimmed(self) -> Dataset:
        """Return the examples without the last positions that are padding in all of them, where the data set `trims`."""
        tokens = self.tokens
        if not self.trims or tokens is None:
            return self
        longest = max(1, int(_lengths(tokens).max()))
        if longest == tokens.shape[1]:
            return self
        cut = {name: array[:, :longest] for name, array in self.inputs.items() if array.shape[:2] == tokens.shape}
        return replace(self, inputs={**self.inputs, **cut})

    def by_length(self) -> npt.NDArray[np.int64]:
        """Return the order in which batches have least padding: the longest first; as they are where nothing is trimmed."""
        tokens = self.tokens
        if not self.trims or tokens is None:
            return np.arange(len(self))
        return np.argsort(-_lengths(tokens), kind="stable")

    def longest_first(self) -> Dataset:
        """Return the examples in the order of `by_length`, for statistics that do not depend on their order."""
        return self.take(self.by_length()) if self.trims else self

    def like_lengths(self, order: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
        """Return a random order of the examples in which each `size` in a row are about equally long; the given order where nothing is trimmed.

        Args:
            order: a random order of all examples. It alone decides, so that the same order gives the same batches.
            size: examples per batch.
        """
        tokens = self.tokens
        if not self.trims or tokens is None:
            return order
        lengths, place = _lengths(tokens), np.argsort(order)
        pools = np.split(order, range(POOL * size, len(order), POOL * size))
        ordered = np.concatenate([pool[np.argsort(-lengths[pool], kind="stable")] for pool in pools])
        batches = np.split(ordered, range(size, len(ordered), size))
        # The place of a batch's first example in the random order is as good as a draw; an incomplete batch stays last.
        batches.sort(key=lambda batch: (len(batch) < size, place[batch[0]]))
        return np.concatenate(batches)

    @property
    def tokens(self) -> npt.NDArray[np.bool_] | None:
        """Which positions of each example are tokens and not padding, shape `(n, length)`: the input `attention_mask`, if there is one."""
        mask = self.inputs.get("attention_mask")
        return mask.astype(bool) if mask is not None and mask.ndim == 2 else None

    @property
    def sequences(self) -> tuple[str, ...]:
        """The inputs whose second axis counts positions; none where there are no tokens.

        These are the attention mask and all inputs of its length; without a mask all matrices of integers, if they are of one length.
        """
        tokens = self.tokens
        if tokens is not None:
            return tuple(name for name, array in self.inputs.items() if array.shape[:2] == tokens.shape)
        found = {
            name: array.shape[1] for name, array in self.inputs.items() if array.ndim == 2 and array.dtype.kind in "iu"
        }
        return tuple(found) if len(set(found.values())) == 1 else ()

    @property
    def length(self) -> int | None:
        """Positions of its sequences; None where there are none."""
        return self.inputs[self.sequences[0]].shape[1] if self.sequences else None

    def at_length(self, length: int) -> Dataset:
        """Return the examples with sequences of `length` positions: cut, or repeated from the start; no mask is left empty."""
        cut = {name: self.inputs[name][:, np.arange(length) % self.inputs[name].shape[1]] for name in self.sequences}
        mask = cut.get("attention_mask")
        if mask is not None:
            mask[~mask.astype(bool).any(axis=1)] = 1
        return replace(self, inputs={**self.inputs, **cut})

    def fingerprints(self) -> list[bytes]:
        """Return one 16-byte content hash per example, over all inputs; labels do not count."""
        digests = [hashlib.blake2b(digest_size=16) for _ in range(len(self))]
        for name in sorted(self.inputs):
            array = np.ascontiguousarray(self.inputs[name])
            for digest, row in zip(digests, array, strict=True):
                digest.update(row.tobytes())
        return [digest.digest() for digest in digests]

    @cached_property
    def repeats(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Where each distinct example stands first, in order, and how often it is there; labels do not count."""
        prints = np.array(self.fingerprints(), "S16")
        _, first, counts = np.unique(prints, return_index=True, return_counts=True)
        order = np.argsort(first)
        return first[order], counts[order]

    @property
    def effective_share(self) -> float:
        r"""Examples that tell as much as these when repeated ones do not count as independent, as a share of them; 1 where none repeats.

        With multiplicities $m_i$ of the distinct examples, the mean over all $n = \sum_i m_i$ has the variance of one over
        $n^2 / \sum_i m_i^2$ independent examples.

        References:
            L. Kish, Survey Sampling, Wiley, 1965.

        >>> Dataset({"x": np.array([[0.0], [1.0], [0.0], [1.0]])}).effective_share
        0.5
        """
        counts = self.repeats[1]
        return float(len(self) / np.square(counts).sum())


def _lengths(tokens: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the position behind the last token of each example, shape `(n,)`; 0 where all is padding."""
    return np.where(tokens.any(1), tokens.shape[1] - tokens[:, ::-1].argmax(1), 0)


@dataclass(frozen=True)
class Roles:
    """The four roles of a run, disjoint, and what was dropped to make them so."""

    calibration: Dataset
    training: Dataset | None = None
    validation: Dataset | None = None
    evaluation: Dataset | None = None
    notes: tuple[str, ...] = field(default=())


def order_notes(forward: Callable[..., object], data: Dataset) -> list[str]:
    """Say where inputs are given by position, though by their names they belong to other parameters.

    Args:
        forward: of the network.
        data: its inputs, in order.

    >>> order_notes(lambda a, b: a, Dataset({"a": np.zeros(1), "b": np.ones(1)}))
    []
    """
    taken, given = list(inspect.signature(forward).parameters), list(data.inputs)
    if data.keyword or not set(given) <= set(taken) or taken[: len(given)] == given:
        return []
    return [
        f"the inputs {given} are given by position, in this order, to `forward({', '.join(taken)})`, whose parameters have the same names in "
        "another; list `inputs` in the order of the parameters if the names are meant"
    ]


def stratified_split(labels: Array | None, sizes: list[int], total: int, seed: int) -> list[npt.NDArray[np.int64]]:
    """Split `range(total)` into parts of the given sizes, each with the label shares of the whole as nearly as rounding allows.

    Args:
        labels: one label per example; None splits at random.
        sizes: how many examples each part takes; their sum is at most `total`.
        total: how many examples there are.
        seed: of the shuffle.

    Returns:
        One sorted index array per size.

    Raises:
        DataError: the sizes ask for more examples than there are.
    """
    if sum(sizes) > total:
        raise DataError(
            f"a split of sizes {sizes} needs {sum(sizes)} examples, but there are {total}; ask for fewer `samples`."
        )
    generator = np.random.default_rng(seed)
    order = generator.permutation(total)
    if labels is not None and np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1:
        # Each example gets its quantile within its class; sorting by it interleaves the classes in proportion.
        quantile = np.empty(total)
        for value in np.unique(labels):
            members = order[labels[order] == value]
            quantile[members] = (np.arange(len(members)) + generator.random()) / len(members)
        order = np.argsort(quantile, kind="stable")
    parts, start = [], 0
    for size in sizes:
        parts.append(np.sort(order[start : start + size]).astype(np.int64))
        start += size
    return parts


def resolve_roles(
    given: Mapping[str, Dataset],
    samples: Mapping[str, int | None],
    seed: int,
    *,
    cut: Sequence[str] = ("training", "validation"),
) -> Roles:
    """Make the four roles disjoint and cut the ones that are not given from calibration's source.

    Args:
        given: data sets by role; `calibration` must be there.
        samples: how many examples a role keeps; None or absent keeps all.
        seed: of the splits.
        cut: the roles to cut if they are not given.

    Returns:
        The roles, with a note for every duplicate that was dropped.

    Raises:
        DataError: no calibration data, two roles overlap by source or by content, or their labels stand for other classes.
    """
    if "calibration" not in given:
        raise DataError(f"the data has no `calibration` role (got: {', '.join(sorted(given)) or 'none'}); give one.")
    _refuse_shared_origins(given)
    _refuse_other_classes(given)
    notes: list[str] = []
    pools = _drop_duplicates(dict(given), notes)
    parts: dict[str, Dataset] = {}
    for role, pool in pools.items():
        if role != "calibration":
            parts[role] = pool.sampled(samples.get(role), seed)
    missing = [role for role in ("training", "validation") if role in cut and role not in given]
    parts |= _drop_duplicates(_cut(pools["calibration"], samples, missing, seed), notes, refuse=False)
    return Roles(notes=tuple(notes), **parts)


def _cut(source: Dataset, samples: Mapping[str, int | None], missing: list[str], seed: int) -> dict[str, Dataset]:
    """Cut calibration and the missing roles out of calibration's source: a fifth for validation, half of the rest for training."""
    total = len(source)
    fifth = total // 5 if total >= SMALLEST_CUT else 0
    validation = (samples.get("validation") or fifth) if "validation" in missing else 0
    left = total - validation
    calibration = samples.get("calibration") or (left // 2 if "training" in missing else left)
    validation = min(validation, max(total - calibration, 0))
    rest = max(total - calibration - validation, 0)
    training = min(samples.get("training") or rest, rest) if "training" in missing else 0
    sizes = {"calibration": calibration, "validation": validation, "training": training}
    if calibration < 1:
        raise DataError(f"{total} examples are too few to cut {', '.join(missing)} from them; give more.")
    chosen = {role: size for role, size in sizes.items() if size > 0}
    indices = stratified_split(source.labels, list(chosen.values()), total, seed)
    return {role: source.take(index) for role, index in zip(chosen, indices, strict=True)}


def _refuse_shared_origins(given: Mapping[str, Dataset]) -> None:
    owners: dict[str, str] = {}
    for role in ROLES:
        if role not in given or not given[role].origin:
            continue
        origin = given[role].origin
        if origin in owners:
            raise DataError(
                f"the roles {owners[origin]!r} and {role!r} overlap: both read {origin!r}. Roles must be disjoint; give {role!r} a split "
                f"or file of its own"
                + ("." if role == "evaluation" else ", or leave it out to have it cut from calibration's source.")
            )
        owners[origin] = role


def _refuse_other_classes(given: Mapping[str, Dataset]) -> None:
    """Refuse roles in which one label stands for two classes."""
    named = [(role, classes) for role in ROLES if role in given and (classes := given[role].classes) is not None]
    for role, classes in named[1:]:
        first, expected = named[0]
        if classes == expected:
            continue
        odd = next(
            label
            for label in range(max(len(classes), len(expected)))
            if classes[label : label + 1] != expected[label : label + 1]
        )
        names = " and ".join(
            f"{found[odd]!r} in {where!r}" if odd < len(found) else f"nothing in {where!r}"
            for where, found in ((first, expected), (role, classes))
        )
        raise DataError(
            f"the roles {first!r} ({len(expected)} classes) and {role!r} ({len(classes)} classes) number their classes differently: the "
            f"label {odd} is {names}. Give both the same list, `classes: [...]`, in the order in which the network was trained."
        )


def _drop_duplicates(pools: dict[str, Dataset], notes: list[str], *, refuse: bool = True) -> dict[str, Dataset]:
    """Drop exact duplicates from the side that is not evaluation (then not validation, then not training); refuse many, if asked."""
    seen: dict[bytes, str] = {}
    for role in reversed(ROLES):
        if role not in pools:
            continue
        prints = pools[role].fingerprints()
        clashes = [index for index, key in enumerate(prints) if key in seen]
        if clashes:
            other = seen[prints[clashes[0]]]
            if refuse and len(clashes) > max(1, DUPLICATES_ALLOWED * min(len(pools[role]), len(pools[other]))):
                raise DataError(
                    f"the roles {role!r} and {other!r} overlap: {len(clashes)} of {len(pools[role])} examples are the same by content. "
                    f"Roles must be disjoint; choose data that {other!r} does not use."
                )
            notes.append(
                f"{len(clashes)} of {len(pools[role])} {role} examples are exact duplicates of {other} examples and were dropped"
            )
            pools[role] = pools[role].take(np.setdiff1d(np.arange(len(prints)), clashes))
        seen |= {key: role for key in prints if key not in seen}
    return pools
