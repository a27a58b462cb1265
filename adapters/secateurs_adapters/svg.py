"""Drawing figures as inline SVG: marks, axes and text, every text escaped, every colour a CSS variable of the page.

A figure is 380 units wide, so that its text can be read on a phone. Marks differ by shape or dash, not by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["WIDTH", "Axis", "Figure", "frame", "shortened", "svg", "tag", "ticks"]

WIDTH = 380.0


@dataclass(frozen=True)
class Figure:
    """A drawing with its text alternative.

    Attributes:
        title: above the drawing.
        caption: what it shows, and how to read it.
        drawing: the `svg` element.
        headings: of the table that says the same.
        rows: of this table.
    """

    title: str
    caption: str
    drawing: Markup
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def tag(name: str, *content: str, **attributes: str | float) -> Markup:
    """Return an element; content that is not `Markup` and all attributes are escaped.

    An underscore in an attribute's name is a hyphen, except at the end, where it sets a Python keyword apart.

    >>> tag("text", "a < b", x=1.5, class_="name", text_anchor="end")
    Markup('<text x="1.5" class="name" text-anchor="end">a &lt; b</text>')
    """
    told = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value) if isinstance(value, (int, float)) else value)}"'
        for key, value in attributes.items()
    )
    return Markup(f"<{name}{told}>{''.join(escape(part) for part in content)}</{name}>")  # noqa: S704


def _number(value: float) -> str:
    """Return a coordinate to a hundredth, without idle zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def svg(label: str, description: str, height: float, *content: str, role: str = "img") -> Markup:
    """Return the whole drawing with the name and the description that are read aloud."""
    return tag(
        "svg",
        tag("desc", description),
        *content,
        viewBox=f"0 0 {_number(WIDTH)} {_number(height)}",
        role=role,
        aria_label=label,
    )


def shortened(text: str, letters: int) -> str:
    """Return the end of a name, which tells layers apart.

    >>> shortened("model.stages.1.conv1", 10)
    '…s.1.conv1'
    """
    return text if len(text) <= letters else "…" + text[len(text) - letters + 1 :]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round values from `low` to `high`.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(3.0, 3.0)
    [3.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda one: abs(one - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """Maps values to coordinates.

    Attributes:
        low: the value at `start`.
        high: the value at `end`.
        start: coordinate.
        end: coordinate.
        label: with the unit.
    """

    low: float
    high: float
    start: float
    end: float
    label: str

    def at(self, value: float) -> float:
        """Return the coordinate of a value; values outside lie on the edge."""
        span = self.high - self.low
        share = 0.5 if span <= 0 else min(max((value - self.low) / span, 0.0), 1.0)
        return self.start + share * (self.end - self.start)


def frame(x: Axis, y: Axis) -> Iterable[Markup]:
    """Yield the two axes with ticks, grid lines and labels."""
    for value in ticks(x.low, x.high):
        yield tag("line", class_="grid", x1=x.at(value), x2=x.at(value), y1=y.start, y2=y.end)
        yield tag("text", f"{value:g}", class_="tick", x=x.at(value), y=y.start + 13, text_anchor="middle")
    for value in ticks(y.low, y.high):
        yield tag("line", class_="grid", x1=x.start, x2=x.end, y1=y.at(value), y2=y.at(value))
        yield tag("text", f"{value:g}", class_="tick", x=x.start - 4, y=y.at(value) + 3, text_anchor="end")
    yield tag("text", x.label, class_="axis", x=(x.start + x.end) / 2, y=y.start + 28, text_anchor="middle")
    yield tag("text", y.label, class_="axis", x=2, y=y.end - 8)
