"""`report.html`: what it says, that its figures lie where their values are, and that nothing in a report becomes markup."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reports import HOSTILE, LIVE, matrix, odd, whole

from secateurs_adapters.figures import Group, Point, heat_map, memory_curve, scatter, unit_bars
from secateurs_adapters.report_html import render, verdict_in_words, write_report_page
from secateurs_adapters.svg import ticks

CROSS = "\N{MULTIPLICATION SIGN}"
VOID = {"meta", "img", "br", "link", "input", "hr"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class _Page(HTMLParser):
    """Tags, attributes and text of a page; refuses what is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def drawn(figure) -> ET.Element:
    return ET.fromstring(str(figure.drawing))


def of(root: ET.Element, tag: str, *classes: str) -> list[ET.Element]:
    return [one for one in root.iter(tag) if set(classes) <= set(one.get("class", "").split())]


def number(element: ET.Element, *names: str) -> tuple[float, ...]:
    return tuple(float(element.get(name)) for name in names)


def scale(root: ET.Element, which: str):
    """Return coordinate -> value, as a reader gets it: from two ticks and their grid lines."""
    along, across = ("x1", "y1") if which == "x" else ("y1", "x1")
    lines = [line for line in of(root, "line", "grid") if line.get(f"{along[0]}1") == line.get(f"{along[0]}2")]
    places = sorted(float(line.get(along)) for line in lines)
    values = [
        float(tick.text)
        for tick in of(root, "text", "tick")
        if tick.get("text-anchor") == ("middle" if which == "x" else "end") and re.fullmatch(r"-?[\d.e-]+", tick.text)
    ]
    values = sorted(values[: len(places)], reverse=which == "y")
    assert len(places) == len(values) >= 2, across
    slope = (values[-1] - values[0]) / (places[-1] - places[0])
    return lambda place: values[0] + (place - places[0]) * slope


# --- what it says -------------------------------------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_and_everything_else_is_there():
    page = _Page(render(whole(), "schema: 1\n"))
    shown = page.text
    assert shown.startswith(" Secateurs report: pass ")
    assert page.tags[page.tags.index("main") + 1] == "h1"
    order = [
        "Passes: all 2 limits hold.",
        "Baseline and candidate",
        "Accuracy against latency",
        "Every network that was tried",
        "Memory over a run (CPUExecutionProvider batch 1)",
        "1. cka-cluster",
        "CKA of the blocks' outputs",
        "2. mi-nodes",
        "Units kept, by layer",
        "Refused, and why",
        "a note on stage",
        "How to get this again",
        "secateurs run recipe.yaml --output again",
        "a CPU with 1 thread, seed 7, revision",
    ]
    places = [shown.find(one) for one in order]
    assert -1 not in places
    assert places == sorted(places)
    for one in (
        "524,288",
        "20,971,520",
        "0.600 [0.590, 0.610]",
        "drop ≤ 0.02",
        "✓ pass",
        f"{CROSS} 0.50",
    ):
        assert one in shown, one
    for one in ("stage.kept", "changes the shape of stage", "CKA 0.99 with stage.0", "least divergence of stage.3"):
        assert one in shown, one
    assert "kept whole: with 12 units the output would diverge by 0.25" in shown
    assert "torch" in shown
    assert "2.9" in shown


@pytest.mark.parametrize("name", list(odd()))
def test_every_report_becomes_a_page_that_closes_its_tags(name):
    page = _Page(render(odd()[name]))
    assert page.tags.count("h1") == 1
    assert page.tags.count("figure") == page.tags.count("svg") == page.tags.count("figcaption")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "Fails: no limit was asked for."),
        ("without export", "Undecided: no limit was asked for."),
        ("failed", "Fails: 0 of 1 limits hold, and 1 other check fails."),
        ("undecided", "Undecided: 0 of 1 limits hold."),
    ],
)
def test_a_verdict_that_is_no_pass_says_so_and_why(name, words):
    report = odd()[name]
    assert verdict_in_words(report) == words
    page = _Page(render(report))
    assert words in page.text
    assert all(reason in page.text for reason in report.reasons)
    assert all(row.reason is None or row.reason in page.text for row in report.budget)


def test_figures_without_data_are_left_out_and_bad_ones_never_drawn():
    found = odd()
    assert "svg" not in _Page(render(found["empty"])).tags
    assert "Memory over" not in render(found["without export"])
    broken = render(found["not finite"])
    assert "CKA of the blocks" not in broken
    assert "Blocks bypassed" in broken
    huge = render(whole(blocks=600, networks=0))
    assert "CKA of the blocks" not in huge
    assert "Blocks bypassed" in huge
    assert "CKA of the blocks" in render(found["unknown"])
    for name in found:
        assert not re.search(r'="-?(nan|inf)', render(found[name])), name


def test_hundreds_of_layers_and_trials_stay_a_small_page():
    page = render(odd()["large"])
    assert len(page) < 8_000_000
    assert page.count('class="bar"') == 301
    assert "CKA of the blocks&#39; outputs as a table" in page
    assert "All 200 networks" in page


# --- nothing in a report is markup ---------------------------------------------------------------------------------------------------------


def test_the_page_can_neither_load_nor_run_anything():
    text = render(whole(HOSTILE), HOSTILE)
    page = _Page(text)
    assert ("meta", "content", POLICY) in page.attributes
    assert text.index(POLICY) < text.index("<title>") < text.index("<style>")
    assert not {"script", "img", "link", "iframe", "object", "form", "a"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in text
    assert "@import" not in text


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8") | st.sampled_from("<>&\"'`{}%#/!-="), max_size=40))
def test_any_name_is_shown_as_it_is(name):
    name = f"<{name}"
    report = whole(name, blocks=2, networks=1)
    page = _Page(render(report, name))
    assert page.tags == _Page(render(whole("plain", blocks=2, networks=1), "plain")).tags
    written = name.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" not in name:
        assert f"{written}.kept" in "".join(page.words).replace("\r\n", "\n").replace("\r", "\n")


def test_a_recipe_is_shown_only_if_it_is_a_plain_file_of_bounded_size(tmp_path):
    recipe, page = tmp_path / "recipe.yaml", tmp_path / "report.html"
    secret = tmp_path / "secret"
    secret.write_text("the secret")
    write_report_page(whole(), tmp_path)
    assert "secateurs run" not in page.read_text()
    recipe.symlink_to(secret)
    write_report_page(whole(), tmp_path)
    assert "the secret" not in page.read_text()
    recipe.unlink()
    recipe.write_text("#" * 100_000)
    write_report_page(whole(), tmp_path)
    assert "####" not in page.read_text()
    recipe.write_text("seed: 3\n")
    write_report_page(whole(), tmp_path)
    assert "seed: 3" in page.read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "report.html", "secret"}


# --- figures, read as a reader reads them --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6, 10, 30])
def test_the_heat_map_has_a_cell_for_each_pair_and_frames_its_clusters(count):
    names, values = [f"b{n}" for n in range(count)], matrix(count)
    half = count // 2
    figure = heat_map(names, values, [list(range(half)), list(range(half, count))], "clusters", {"b1": "alike"})
    root = drawn(figure)
    cells = [one for one in of(root, "rect", "cell") if one.find("title") is not None]
    assert len(cells) == count * count
    size = (float(cells[-1].get("x")) - float(cells[0].get("x"))) / (count - 1)
    left, top = number(cells[0], "x", "y")
    low = min(min(row) for row in values)
    for cell in cells:
        x, y = number(cell, "x", "y")
        row, column = round((y - top) / size), round((x - left) / size)
        value = values[row][column]
        assert cell.find("title").text == f"b{row} and b{column}: {value:.3f}"
        assert float(cell.get("fill-opacity")) == pytest.approx(0.04 + 0.96 * (value - low) / (1 - low), abs=0.03)
    boxes = of(root, "rect", "box")
    for box, (first, length) in zip(boxes, [(0, half), (half, count - half)], strict=True):
        assert number(box, "x", "y", "width", "height") == pytest.approx(
            (left + first * size, top + first * size, length * size, length * size), abs=0.05
        )
    assert len(of(root, "text", "number")) == (count * count if count <= 10 else 0)
    edges = of(root, "rect", "gone")
    assert [number(edge, "y", "height") for edge in edges] == [pytest.approx((top + size, size), abs=0.05)]
    gone = [one.text for one in of(root, "text", "name", "gone")]
    assert gone == ([f"{CROSS} b1"] if count < 27 else [])  # of so many blocks, every second one is named
    assert figure.rows[1][-1] == "alike"
    assert float(figure.rows[0][3]) == pytest.approx(values[0][1], abs=5e-4)
    assert "clusters" in root.find("desc").text


def test_neighbours_of_a_large_heat_map_are_joined_and_cover_everything():
    count = 300
    figure = heat_map([f"b{n}" for n in range(count)], matrix(count), [], "clusters", {})
    cells = of(drawn(figure), "rect", "cell")[:-24]
    covered: dict[float, float] = {}
    for cell in cells:
        y, wide = number(cell, "y", "width")
        covered[y] = covered.get(y, 0) + wide - 0.2
    assert len(covered) == count
    assert max(covered.values()) == pytest.approx(min(covered.values()), abs=1.5)
    assert len(figure.rows) == count
    assert figure.headings == ("", "block", "with the next")


def test_bars_of_layers_of_one_kind_share_a_scale():
    groups = [Group(f"layers.{n}.{name}", units, 2, "") for n in (0, 1) for name, units in (("heads", 4), ("mlp", 64))]
    widths = [number(one, "width")[0] for one in of(drawn(unit_bars(groups)), "rect", "track")]
    assert widths == pytest.approx([widths[0]] * 4)
    half = unit_bars([Group("layers.0.mlp", 64, 2, ""), Group("layers.1.mlp", 32, 2, "")])
    widths = [number(one, "width")[0] for one in of(drawn(half), "rect", "track")]
    assert widths[0] == pytest.approx(2 * widths[1], abs=0.02)


def test_bars_are_as_long_as_their_units_and_say_why_to_mouse_and_keyboard():
    groups = [Group("conv.1", 64, 16, "little information"), Group("conv.2", 32, 32, "kept whole")]
    root = drawn(unit_bars(groups))
    bars = of(root, "g", "bar")
    tracks, kept = of(root, "rect", "track"), of(root, "rect", "kept")
    unit = float(tracks[0].get("width")) / 64
    for bar, group, track, full in zip(bars, groups, tracks, kept, strict=True):
        assert number(track, "width") == pytest.approx((unit * group.before,), abs=0.02)
        assert number(full, "width") == pytest.approx((unit * group.kept,), abs=0.02)
        assert bar.find("title").text == bar.get("aria-label")
        assert bar.get("aria-label") == f"{group.root}: {group.kept} of {group.before} units kept. {group.reason}"
        assert bar.get("tabindex") == "0"
        assert [one.text for one in of(bar, "text", "why")] == [group.reason]
    assert root.find("desc").text == "48 of 96 units kept in 2 groups"


finite = st.floats(0.001, 1000, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(finite, finite, st.sampled_from(["accepted", "rejected"])), min_size=2, max_size=12))
def test_marks_lie_where_the_axes_say(values):
    points = [Point(f"n{n}", x, y, kind) for n, (x, y, kind) in enumerate(values)]
    root = drawn(scatter("t", "c", "cost", "metric", points))
    marks = [one for one in of(root, "g", "point") if one.find("title") is not None]
    x_of, y_of = scale(root, "x"), scale(root, "y")
    xs, ys = [x for x, _, _ in values], [y for _, y, _ in values]
    for (x, y, kind), mark in zip(values, marks, strict=True):
        assert mark.get("class") == f"point {kind}"
        if kind == "rejected":
            start = re.match(r"M([\d.]+) ([\d.]+)l8", mark.find("path").get("d"))
            place = [float(start[1]) + 4, float(start[2]) + 4]
        else:
            place = list(
                number(mark.find("circle") if mark.find("circle") is not None else mark.find("g/circle"), "cx", "cy")
            )
        assert x_of(place[0]) == pytest.approx(x, abs=0.002 * max(xs) + 1e-9)
        assert y_of(place[1]) == pytest.approx(
            y, abs=0.004 * (max(ys) - min(ys)) + 0.002 * max(ys) * (max(ys) == min(ys)) + 1e-9
        )


def test_labels_of_a_plot_neither_cover_each_other_nor_leave_it():
    points = [Point(f"n{n}", 0.5 + 0.001 * n, 0.9, "accepted") for n in range(30)] + [
        Point("dense", 1, 0.95, "baseline")
    ]
    root = drawn(scatter("t", "c", "cost", "metric", points))
    marks = [one for one in of(root, "g", "point") if one.find("title") is not None]
    labels = [label for one in marks for label in of(one, "text", "tick")]
    assert "dense" in [label.text for label in labels]
    assert 1 < len(labels) < len(points)
    spots = sorted(number(label, "x", "y") for label in labels)
    for (x, y), (other, below) in itertools.pairwise(spots):
        assert other - x > 10 or abs(y - below) > 9
    assert all(46 <= x <= 380 for x, _ in spots)
    assert len(drawn(scatter("t", "c", "cost", "metric", points)).find("desc").text) > 100


def test_a_plot_speaks_of_intervals_only_where_there_are_some():
    plain, known = Point("a", 1, 0.9, "accepted"), Point("b", 2, 0.8, "chosen", "", 0.7, 0.9)
    assert scatter("t", "c", "cost", "metric", [plain]).caption == "c."
    assert scatter("t", "c", "cost", "metric", [plain, known]).caption == "c; a line is the exact 95 % interval."


def test_the_memory_curve_steps_through_the_bytes_of_each_node():
    figure = memory_curve("CPU", *LIVE, ["Conv /n1", None])
    root = drawn(figure)
    x_of, y_of = scale(root, "x"), scale(root, "y")
    for name, values in zip(("baseline", "candidate"), LIVE, strict=True):
        path = of(root, "path", "curve", name)[0].get("d")
        steps = [(float(v), float(h)) for v, h in re.findall(r"V([\d.]+)H([\d.]+)", path)]
        assert [round(y_of(v) * 1024) for v, _ in steps] == pytest.approx(values, abs=60)
        assert [x_of(h) for _, h in steps] == pytest.approx(list(range(1, len(values) + 1)), abs=0.01)
        peak = of(root, "circle", "peak", name)[0]
        at, up = number(peak, "cx", "cy")
        assert x_of(at) == pytest.approx(values.index(max(values)) + 0.5, abs=0.01)
        assert y_of(up) * 1024 == pytest.approx(max(values), abs=60)
    assert root.find("desc").text == "baseline: at most 8 KiB at Conv /n1; candidate: at most 6 KiB"
    assert [row[1:] for row in figure.rows] == [("4", "4"), ("8", "6"), ("8", "1"), ("2", "")]


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_inside(low, span):
    found = ticks(low, low + span)
    assert 2 <= len(found) <= 9
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in found)
    steps = {round((b - a) / span, 6) for a, b in itertools.pairwise(found)}
    assert len(steps) <= 2
