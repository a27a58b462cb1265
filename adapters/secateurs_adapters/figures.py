"""The figures of a report: similarity of blocks, units kept, plans tried, memory over a run. Each comes with a table that says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from secateurs.plan import unnumbered
from secateurs_adapters.svg import WIDTH, Axis, Figure, frame, shortened, svg, tag

__all__ = ["Group", "Point", "heat_map", "memory_curve", "scatter", "unit_bars"]

_NUMBERED = 10
"""Up to as many blocks, the cells of a heat map hold numbers."""
_CELLS = 48
"""Up to as many blocks, each cell says its figure to the mouse and the table holds them all."""
_LEVELS = 24
_DARK = 15.5 / _LEVELS
"""Shades above this one carry the other ink: in both schemes of the page its contrast is 4.5 or more."""
_LETTER = 6.4
"""Width of a letter of a label, on the average; for keeping labels apart."""
_CROSS = "\N{MULTIPLICATION SIGN}"
_LARGEST = 400
"""Rows of a table and bars of a figure, at the most; the rest is in `report.json`."""


def heat_map(
    names: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    boxes: Sequence[Sequence[int]],
    kind: str,
    dropped: Mapping[str, str],
) -> Figure:
    """Draw the similarity of blocks, with contiguous runs of them framed.

    Args:
        names: of the blocks, in order of execution.
        matrix: CKA, shape `(L, L)`; None where it is not known.
        boxes: indices of the blocks of each cluster or segment; none where there are none.
        kind: what the boxes are, in the plural: `clusters`.
        dropped: why a block was bypassed, by its name.
    """
    count = len(names)
    low = min((value for row in matrix for value in row if value is not None), default=0.0)
    left, top = 110.0, 20.0
    cell = (WIDTH - left - 4) / max(count, 1)
    shown: list[str] = []
    for row, values in enumerate(matrix):
        shown += _cells(names, row, values, low, (left, top + row * cell), cell)
    step = max(1, math.ceil(10 / cell))
    shown += [
        tag("rect", class_="gone", x=left - 3, y=top + number * cell, width=2.5, height=cell)
        for number, name in enumerate(names)
        if name in dropped
    ]
    for number in range(0, count, step):
        middle = number * cell + cell / 2
        gone = " gone" if names[number] in dropped else ""
        mark = f"{_CROSS} " if gone else ""
        shown.append(
            tag(
                "text",
                mark + shortened(names[number], 14 if gone else 16),
                class_=f"name{gone}",
                x=left - 4,
                y=top + middle + 3,
                text_anchor="end",
            )
        )
        shown.append(tag("text", str(number), class_="tick", x=left + middle, y=top - 5, text_anchor="middle"))
    for box in boxes:
        start, size = left + box[0] * cell, len(box) * cell
        shown.append(tag("rect", class_="box", x=start, y=top + box[0] * cell, width=size, height=size))
    bottom = top + count * cell
    shown += _scale(low, left, bottom + 10)
    told = [", ".join(names[index] for index in box) for box in boxes]
    description = f"{count} blocks; CKA from {low:.2f} to 1" + (
        f"; {len(boxes)} {kind}: {'; '.join(told)}" if boxes else ""
    )
    description += f"; bypassed: {', '.join(dropped)}" if dropped else ""
    caption = "The stronger the colour, the more alike two blocks' outputs are." + (
        f" Frames: {kind}." if boxes else ""
    )
    caption += f" {_CROSS}, and red at the left, mark blocks that were bypassed." if dropped else ""
    return Figure(
        "CKA of the blocks' outputs",
        caption,
        svg("CKA of the blocks' outputs", description, bottom + 40, *shown),
        *_map_table(names, matrix, boxes, kind, dropped),
    )


def _cells(
    names: Sequence[str], row: int, values: Sequence[float | None], low: float, corner: tuple[float, float], cell: float
) -> list[Markup]:
    """Return one row of cells; where there are many, neighbours of one shade are one mark."""
    x, y = corner
    shades = [None if value is None else _shade(value, low) for value in values]
    found: list[Markup] = []
    start = 0
    for end in range(1, len(values) + 1):
        joins = end < len(values) and len(values) > _CELLS and shades[end] == shades[start]
        if joins:
            continue
        value, shade = values[start], shades[start]
        if value is not None and shade is not None:
            told = f"{names[row]} and {names[start]}: {value:.3f}"
            inside = () if len(values) > _CELLS else (tag("title", told),)
            place = {"x": x + start * cell, "y": y, "width": (end - start) * cell + 0.2, "height": cell + 0.2}
            found.append(tag("rect", *inside, class_="cell", fill_opacity=0.04 + 0.96 * shade, **place))
            if len(values) <= _NUMBERED:
                middle = {"x": x + (start + 0.5) * cell, "y": y + cell / 2 + 3.5}
                ink = "dark" if shade > _DARK else "light"
                found.append(tag("text", f"{value:.2f}", class_=f"number {ink}", text_anchor="middle", **middle))
        start = end
    return found


def _shade(value: float, low: float) -> float:
    share = 1.0 if low >= 1.0 else (value - low) / (1.0 - low)
    return round(min(max(share, 0.0), 1.0) * _LEVELS) / _LEVELS


def _scale(low: float, x: float, y: float) -> list[Markup]:
    """Return the strip that says which shade is which similarity."""
    width = (WIDTH - x - 4) / _LEVELS
    strip = [
        tag(
            "rect",
            class_="cell",
            fill_opacity=0.04 + 0.96 * n / (_LEVELS - 1),
            x=x + n * width,
            y=y,
            width=width + 0.2,
            height=8,
        )
        for n in range(_LEVELS)
    ]
    return [
        *strip,
        tag("text", f"{low:.2f}", class_="tick", x=x, y=y + 20),
        tag("text", "1", class_="tick", x=WIDTH - 4, y=y + 20, text_anchor="end"),
        tag("text", "CKA", class_="name", x=x - 4, y=y + 8, text_anchor="end"),
    ]


def _map_table(
    names: Sequence[str],
    matrix: Sequence[Sequence[float | None]],
    boxes: Sequence[Sequence[int]],
    kind: str,
    dropped: Mapping[str, str],
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return the heat map as a table: every figure, or, of many blocks, the similarity to the next one."""
    member = {index: str(number) for number, box in enumerate(boxes, 1) for index in box}
    columns = [str(number) for number in range(len(names))] if len(names) <= _CELLS else ["with the next"]
    headings = ("", "block", *columns, *((kind,) if boxes else ()), *(("bypassed because",) if dropped else ()))
    rows = []
    for number, (name, values) in enumerate(zip(names, matrix, strict=True)):
        told = values if len(names) <= _CELLS else values[number + 1 : number + 2] or [None]
        figures = ["" if value is None else f"{value:.3f}" for value in told]
        rows.append(
            (
                str(number),
                name,
                *figures,
                *((member.get(number, ""),) if boxes else ()),
                *((dropped.get(name, ""),) if dropped else ()),
            )
        )
    return headings, rows


@dataclass(frozen=True)
class Group:
    """Units of one group.

    Attributes:
        root: the layer that it is named after.
        before: units of the network that the pass found.
        kept: of these.
        reason: why.
    """

    root: str
    before: int
    kept: int
    reason: str


def unit_bars(groups: Sequence[Group]) -> Figure:
    """Draw a bar for each group: units kept of those that were there; the reason shows on hover and on focus.

    Layers whose paths differ by numbers alone share a scale: the few heads of an attention would be no bars on that of its neurons.
    """
    high: dict[str, int] = {}
    for group in groups:
        kind = unnumbered(group.root)
        high[kind] = max(high.get(kind, 1), group.before)
    shown: list[str] = []
    for number, group in enumerate(groups[:_LARGEST]):
        y = 4 + 28.0 * number
        told = f"{group.kept} of {group.before}"
        scale = (WIDTH - 2) / high[unnumbered(group.root)]
        full, kept = scale * group.before, scale * group.kept
        shown.append(
            tag(
                "g",
                tag("title", f"{group.root}: {told} units kept. {group.reason}"),
                tag("rect", class_="catch", x=0, y=y - 2, width=WIDTH, height=27),
                tag("text", shortened(group.root, 48), class_="name", x=1, y=y + 9),
                tag("text", _cut(group.reason, 60), class_="why", x=1, y=y + 9),
                tag("text", told, class_="tick", x=WIDTH - 1, y=y + 9, text_anchor="end"),
                tag("rect", class_="track", x=1, y=y + 13, width=full, height=8),
                tag("rect", class_="kept", x=1, y=y + 13, width=kept, height=8),
                class_="bar",
                role="listitem",
                tabindex=0,
                aria_label=f"{group.root}: {told} units kept. {group.reason}",
            )
        )
    before, kept_ = sum(group.before for group in groups), sum(group.kept for group in groups)
    description = f"{kept_} of {before} units kept in {len(groups)} groups"
    return Figure(
        "Units kept, by layer",
        "The whole bar is what was there, the filled part what stays; layers whose names differ by numbers alone share a scale. Point at a bar "
        "or step to it with the Tab key for the reason.",
        svg("Units kept, by layer", description, 8 + 28.0 * min(len(groups), _LARGEST), *shown, role="list"),
        ("layer", "units before", "kept", "share", "reason"),
        [(g.root, str(g.before), str(g.kept), f"{g.kept / max(g.before, 1):.3f}", g.reason) for g in groups[:_LARGEST]],
    )


def _cut(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


@dataclass(frozen=True)
class Point:
    """One network in a plot of what it gives against what it takes.

    Attributes:
        name: in the table.
        x: what it takes.
        y: the metric.
        kind: `baseline`, `chosen`, `accepted` or `rejected`.
        note: for the mouse and the table.
        low: lower end of the interval of `y`, where it is known.
        high: upper end.
    """

    name: str
    x: float
    y: float
    kind: str
    note: str = ""
    low: float | None = None
    high: float | None = None


def scatter(title: str, caption: str, x_label: str, y_label: str, points: Sequence[Point]) -> Figure:
    """Draw points with their intervals; the shape of a mark says what became of it."""
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    room = 0.08 * (max(ys) - min(ys)) or abs(ys[0]) * 0.01 or 0.01
    x = Axis(0.0, 1.05 * max((point.x for point in points), default=1.0), 44, WIDTH - 14, x_label)
    y = Axis(min(ys) - room, max(ys) + room, 226, 26, y_label)
    places = _places([(x.at(point.x), y.at(point.y)) for point in points], points)
    marks = [_mark(point, x, y, place) for point, place in zip(points, places, strict=True)]
    kinds = [kind for kind in _SHAPES if any(point.kind == kind for point in points)]
    described = "; ".join(f"{point.name} {point.kind}: {point.x:.4g}, {point.y:.4g}" for point in points[:40])
    described = f"{y_label} against {x_label}: {described}"
    return Figure(
        title,
        f"{caption}{'' if all(point.low is None for point in points) else '; a line is the exact 95 % interval'}.",
        svg(title, described, 278, *frame(x, y), *marks, *_legend(kinds, 270)),
        ("", "", x_label, y_label, "interval", "why"),
        [
            (
                point.name,
                point.kind,
                f"{point.x:.4g}",
                f"{point.y:.4f}",
                "" if point.low is None or point.high is None else f"[{point.low:.4f}, {point.high:.4f}]",
                point.note,
            )
            for point in points
        ],
    )


_SHAPES = ("baseline", "chosen", "accepted", "rejected")
_NAME = 16
"""Letters of a name in a plot."""


def _places(marks: Sequence[tuple[float, float]], points: Sequence[Point]) -> list[tuple[float, float] | None]:
    """Return where each label starts so that it covers no other label and no other mark; None where there is no such place.

    Baseline and chosen networks come first; a point without a label tells its name to the mouse and in the table.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    found: list[tuple[float, float] | None] = [None] * len(points)
    for number in sorted(range(len(points)), key=lambda one: _SHAPES.index(points[one].kind)):
        (x, y), wide = marks[number], _LETTER * min(len(points[number].name), _NAME)
        for left, base in (
            (x + 9, y - 5),
            (x - 9 - wide, y - 5),
            (x + 9, y + 12),
            (x - 9 - wide, y + 12),
            (x - wide / 2, y - 10),
        ):
            box = (left, base - 9, left + wide, base + 2)
            if left < 46 or left + wide > WIDTH or any(_meet(box, other) for other in taken):
                continue
            found[number] = left, base
            taken.append(box)
            break
    return found


def _meet(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _mark(point: Point, x: Axis, y: Axis, place: tuple[float, float] | None) -> Markup:
    at, up = x.at(point.x), y.at(point.y)
    told = f"{point.name}, {point.kind}: {x.label} {point.x:.4g}, {y.label} {point.y:.4f}. {point.note}".strip()
    inside = [tag("title", told)]
    if point.low is not None and point.high is not None:
        inside.append(tag("line", class_="interval", x1=at, x2=at, y1=y.at(point.low), y2=y.at(point.high)))
    inside.append(_shape(point.kind, at, up))
    if place is not None:
        left, base = place
        inside.append(tag("text", shortened(point.name, _NAME), class_="tick", x=left, y=base))
    return tag("g", *inside, class_=f"point {point.kind}")


def _shape(kind: str, x: float, y: float) -> Markup:
    """Return a diamond, a ringed dot, a dot or a cross."""
    if kind == "rejected":
        return tag("path", class_="cross", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8")
    if kind == "baseline":
        return tag("path", class_="diamond", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z")
    ring = [tag("circle", class_="ring", cx=x, cy=y, r=7)] if kind == "chosen" else []
    return tag("g", *ring, tag("circle", class_="dot", cx=x, cy=y, r=4))


def _legend(kinds: Sequence[str], y: float) -> list[Markup]:
    width = 84.0
    return [
        tag(
            "g",
            _shape(kind, 52 + number * width, y - 4),
            tag("text", kind, class_="tick", x=62 + number * width, y=y),
            class_=f"point {kind}",
        )
        for number, kind in enumerate(kinds)
    ]


def memory_curve(where: str, baseline: Sequence[int], candidate: Sequence[int], peaks: Sequence[str | None]) -> Figure:
    """Draw what tensors take while each node runs, before and after.

    Args:
        where: the target.
        baseline: bytes at each node, in order of execution.
        candidate: the same of the candidate.
        peaks: the nodes at which they take the most, baseline and candidate.
    """
    high = max(*baseline, *candidate)
    unit, scale = next(
        (name, size) for name, size in (("MiB", 2**20), ("KiB", 2**10), ("bytes", 1)) if high >= size or size == 1
    )
    length = max(len(baseline), len(candidate))
    x = Axis(0.0, float(length), 44, WIDTH - 14, "node, in order of execution")
    y = Axis(0.0, 1.1 * high / scale, 206, 26, f"{unit} of tensors")
    marks: list[Markup] = []
    told = []
    for number, (name, values, peak) in enumerate(
        zip(("baseline", "candidate"), (baseline, candidate), peaks, strict=True)
    ):
        most = max(values)
        at = values.index(most)
        steps = f"M{x.at(0):.1f} {y.at(values[0] / scale):.1f}" + "".join(
            f"V{y.at(value / scale):.1f}H{x.at(index + 1):.1f}" for index, value in enumerate(values)
        )
        marks.append(tag("path", class_=f"curve {name}", d=steps))
        said = f"{name}: at most {most / scale:.4g} {unit}" + (f" at {peak}" if peak else "")
        marks.append(
            tag("circle", tag("title", said), class_=f"peak {name}", cx=x.at(at + 0.5), cy=y.at(most / scale), r=4)
        )
        marks.append(tag("line", class_=f"curve {name}", x1=52 + 160 * number, x2=72 + 160 * number, y1=246, y2=246))
        marks.append(tag("text", f"{name}, peak {most / scale:.4g}", class_="tick", x=77 + 160 * number, y=250))
        told.append(said)
    nodes = range(min(length, _LARGEST))
    return Figure(
        f"Memory over a run ({where})",
        "What tensors take while each node of the graph runs, as onnxruntime plans it; weights and scratch are not in it. "
        + "; ".join(told)
        + ".",
        svg(f"Memory over a run on {where}", "; ".join(told), 256, *frame(x, y), *marks),
        ("node", f"baseline, {unit}", f"candidate, {unit}"),
        [(str(n + 1), *(f"{v[n] / scale:.4g}" if n < len(v) else "" for v in (baseline, candidate))) for n in nodes],
    )
