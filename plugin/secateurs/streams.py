"""Groups of residual streams whose channels move, found by watching: zero-padded shortcuts, slices, permutations.

The dependency graph takes a padding for an element-wise operation and couples the wrong channels behind it. Here the coupling is observed:
every layer that writes to the stream is disturbed channel by channel (in binary code, so that a few passes tell all channels apart), and the
channels that change at the inputs of other layers are its readers. Channels of two writers that one reader reads in one place belong to one
unit. Where a stage widens the stream, its units split into those that come from before and those that it adds.

A unit may need more than slices: with a channel that a padding put in front of the others, the padding has to shrink. Which attribute counts
it is found by trial: the first one with which the removal of a single unit is certified. Nothing is taken on trust: what is found here is
checked like any other group, and the certificate has the last word on the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from secateurs.certificate import certify
from secateurs.data import Dataset
from secateurs.errors import CertificateError, PlanError
from secateurs.forward import DOES_NOT_RUN, call, inference
from secateurs.groups import Group, Member, WidthAttribute, plan_removal
from secateurs.layers import Kind, widths_of
from secateurs.plan import Plan
from secateurs.readers import observe_readers
from secateurs.report import Skipped
from secateurs.surgery import applied

__all__ = ["observed_groups"]

STRENGTHS = (1.0,)
"""Sizes of the disturbances, relative to the range of a writer's output."""
EXAMPLES = 2
"""Examples that the stream is watched on."""
MAX_WRITERS = 128
"""A stream with more writers is not watched: it would take minutes."""
_ORDER: tuple[Kind, ...] = ("out", "pass", "in")

Channel = tuple[str, Kind, int]
"""A layer, its part in the stream, and one of its channels."""


def observed_groups(model: nn.Module, example: Dataset, stream: Group) -> tuple[list[Group], list[Skipped]]:
    """Return the groups that make up a stream, and the parts of it that are left alone.

    Args:
        model: the network; it is not changed.
        example: inputs for the forward passes.
        stream: the dependency graph's group: its members are believed, its indices are not.

    Returns:
        The groups in the order of their first writers, and what was skipped; nothing at all where the stream cannot be told apart into units.
    """
    writers = [member.module for member in stream.of("out")]
    if len(writers) > MAX_WRITERS:
        return [], []
    passing = [member.module for member in stream.of("pass")]
    units = _units(model, example.take(range(min(EXAMPLES, len(example)))), writers, passing)
    if units is None:
        return [], []
    alike: dict[tuple[tuple[str, Kind, int], ...], list[dict[tuple[str, Kind], list[int]]]] = {}
    for unit in units:
        form = tuple((module, kind, len(channels)) for (module, kind), channels in unit.items())
        alike.setdefault(form, []).append(unit)
    groups: dict[str, Group] = {}
    skipped: list[Skipped] = []
    for same in alike.values():
        part = _as_group(same)
        group = _settled(model, example, part) if part.of("in") and part.units > 1 else None
        if group is None or part.root in groups:
            why = "no attribute was found that counts its units, and without one their removal is not certified"
            skipped.append(Skipped(where=part.root, reason=f"{part.units} channels that the stream gains here: {why}"))
        else:
            groups[part.root] = group
    order = {name: position for position, name in enumerate(writers)}
    return sorted(groups.values(), key=lambda group: order[group.root]), skipped


def _units(
    model: nn.Module, example: Dataset, writers: Sequence[str], passing: Sequence[str]
) -> list[dict[tuple[str, Kind], list[int]]] | None:
    """Return the channels of each unit, by layer and part; None where a reader mixes channels or the output depends on them."""
    parent: dict[Channel, Channel] = {}

    def find(item: Channel) -> Channel:
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    for writer in writers:
        sources = _sources(model, example, writer, passing)
        if sources is None:
            return None
        for (module, channel), source in sources.items():
            kind: Kind = "pass" if module in passing else "in"
            parent[find((module, kind, channel))] = find((writer, "out", source))
    whole: dict[Channel, list[Channel]] = {}
    for item in list(parent):
        whole.setdefault(find(item), []).append(item)
    found = []
    rank = {name: number for number, (name, _) in enumerate(model.named_modules())}
    for channels in whole.values():
        unit: dict[tuple[str, Kind], list[int]] = {}
        for module, kind, channel in sorted(channels, key=lambda c: (_ORDER.index(c[1]), rank[c[0]], c[2])):
            unit.setdefault((module, kind), []).append(channel)
        found.append(unit)
    return sorted(found, key=lambda unit: next(iter(unit.values())))


def _sources(
    model: nn.Module, example: Dataset, writer: str, passing: Sequence[str]
) -> dict[tuple[str, int], int] | None:
    """Return, for each channel of a layer's input that one writer reaches, which of the writer's channels it is; None if it is several.

    None too where the network does not run with other values in them.
    """
    width = widths_of(model.get_submodule(writer))[1]
    ones: dict[tuple[str, int], int] = {}
    zeros: dict[tuple[str, int], int] = {}
    bits = max(1, (width - 1).bit_length())
    for bit in range(bits):
        for codes, value in ((ones, 1), (zeros, 0)):
            disturbed = tuple(channel for channel in range(width) if channel >> bit & 1 == value)
            if not disturbed:
                continue
            try:
                reading = observe_readers(model, example, {writer: disturbed}, strengths=STRENGTHS, watched=passing)
            except DOES_NOT_RUN:
                return None
            if reading.reaches_output:
                return None
            for module, channels in reading.readers.items():
                for channel in channels:
                    codes[module, channel] = codes.get((module, channel), 0) | 1 << bit
    everything = (1 << bits) - 1
    found = {key: ones.get(key, 0) for key in {*ones, *zeros}}
    if any(zeros.get(key, 0) != everything & ~code for key, code in found.items()):
        return None
    return found


def _as_group(units: Sequence[Mapping[tuple[str, Kind], Sequence[int]]]) -> Group:
    members = tuple(
        Member(module, kind, np.array([unit[module, kind] for unit in units], dtype=np.int64))
        for module, kind in units[0]
    )
    return Group(members[0].module, len(units), members, observed=True)


def _settled(model: nn.Module, example: Dataset, group: Group) -> Group | None:
    """Return a group whose units can be removed one by one, with the attributes that count them; None where no attributes fit.

    Where a padding grows on both sides at once, a unit is one channel in front together with one behind.
    """
    runs = _runs(group)
    attributes = [_attribute(model, example, group, run) for run in runs]
    if None not in attributes:
        needed = [
            replace(attribute, units=tuple(run))
            for attribute, run in zip(attributes, runs, strict=True)
            if attribute is not None and attribute.name
        ]
        return replace(group, attributes=tuple(needed))
    if len(runs) != 2 or len(runs[0]) != len(runs[1]):
        return None
    members = tuple(
        replace(member, index=np.concatenate([member.index[run] for run in runs], axis=1)) for member in group.members
    )
    pairs = replace(group, units=len(runs[0]), members=members)
    attribute = _attribute(model, example, pairs, range(pairs.units))
    if attribute is None:
        return None
    return replace(pairs, attributes=(attribute,) if attribute.name else ())


def _runs(group: Group) -> list[list[int]]:
    """Return the units in runs of neighbouring channels of the first writer."""
    first = group.members[0].index[:, 0]
    breaks = [number + 1 for number in range(group.units - 1) if first[number + 1] != first[number] + 1]
    return [part.tolist() for part in np.split(np.arange(group.units), breaks)]


def _attribute(model: nn.Module, example: Dataset, group: Group, run: Sequence[int]) -> WidthAttribute | None:
    """Return the attribute that counts the units of a run, one without a name if there is none to change; None if no removal is certified."""
    for attribute in _candidates(model, group.members[0].index.shape[1]):
        trial = replace(group, attributes=(attribute,) if attribute.name else ())
        plan = plan_removal(model, trial, [int(run[-1])], "to see which attribute counts it")
        if _runs_at_all(model, plan, example) and _holds(model, plan, example):
            return attribute
    return None


def _runs_at_all(model: nn.Module, plan: Plan, example: Dataset) -> bool:
    """Tell whether a pruned network runs: most wrong attributes show in its shapes, which is quicker than a certificate."""
    try:
        pruned = applied(model, plan)
        with inference(pruned):
            call(pruned, example.take([0]))
    except (PlanError, *DOES_NOT_RUN):
        return False
    return True


def _holds(model: nn.Module, plan: Plan, example: Dataset) -> bool:
    try:
        return certify(model, plan, example).holds
    except CertificateError:
        return False


def _candidates(model: nn.Module, channels: int) -> Iterator[WidthAttribute]:
    """Yield no attribute, then what a padding may count: every positive integer of a module that has no parameters of its own.

    Args:
        model: the network.
        channels: of a unit; an attribute may count units or channels.
    """
    yield WidthAttribute("", "", 0)
    for path, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            for name, value in vars(module).items():
                if not name.startswith("_") and type(value) is int:
                    yield from (WidthAttribute(path, name, per) for per in {1, channels} if value >= per)
