"""The pages in headless Chromium: nothing on the console, nothing too wide, every figure with words, light and dark, printed, used."""

from __future__ import annotations

import pytest
from browser import OVERFLOWS, Browser, chromium
from reports import HOSTILE, odd

from secateurs_adapters.report_html import render
from secateurs_adapters.zoo.leaderboard import Row
from secateurs_adapters.zoo.page import leaderboard_page

REPORTS = list(odd())
UNNAMED = """[...document.querySelectorAll("svg")].filter(one =>
  !one.getAttribute("aria-label") || !one.querySelector("desc").textContent.trim() ||
  one.closest("figure").querySelector("table") === null).length"""
CONTRAST = """(() => {
  const lin = c => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
  const parse = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => .2126 * lin(r) + .7152 * lin(g) + .0722 * lin(b);
  const ratio = (a, b) => (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  const paper = parse(getComputedStyle(document.body).backgroundColor);
  let least = 21;
  for (const text of document.querySelectorAll("svg text.number")) {
    const cell = getComputedStyle(text.previousElementSibling), share = Number(cell.fillOpacity);
    const behind = parse(cell.fill).slice(0, 3).map((c, i) => share * c + (1 - share) * paper[i]);
    least = Math.min(least, ratio(light(parse(getComputedStyle(text).fill)), light(behind)));
  }
  for (const one of document.querySelectorAll("p, td, li, figcaption, h1, h1 span, svg .tick, svg .name, summary, a, td.status")) {
    const style = getComputedStyle(one), ink = one.namespaceURI.includes("svg") ? style.fill : style.color;
    if (one.getBoundingClientRect().width) least = Math.min(least, ratio(light(parse(ink)), light(paper)));
  }
  return least;
})()"""


def zoo_rows() -> list[Row]:
    """Return a leaderboard with every status, hostile names and gaps."""
    measured = {"macs_ratio": 0.5, "accuracy": 0.9, "accuracy_drop": 0.01, "latency_ratio": 0.7, "seconds": 30.0}
    rows = [
        Row(name=f"model-{n}", status="pass", target="CPUExecutionProvider batch 1", key=f"{n}", **measured)
        for n in range(12)
    ]
    for n, row in enumerate(rows):
        row.latency_ms, row.folder = float((n * 5) % 12), f"models/model-{n}"
    bad = Row(name=HOSTILE, status="crashed", reason=HOSTILE + "x" * 300, key="e", log="logs/e.log", attempts=2)
    return [*rows, bad, Row(name="late", status="not run", key="l")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Return every page's file, by name."""
    folder = tmp_path_factory.mktemp("pages")
    texts = {name: render(report, "schema: 1\n") for name, report in odd().items()}
    texts["zoo"] = leaderboard_page(zoo_rows())
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in texts}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return one browser for all pages."""
    if (program := chromium()) is None:
        pytest.skip("needs Chromium: Debian's package `chromium`")
    made = Browser(program, tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.mark.parametrize("name", [*REPORTS, "zoo"])
@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_too_wide_and_nothing_complains(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.value("innerWidth") == width
    assert browser.value("document.scrollingElement.scrollWidth") <= width
    assert browser.value(OVERFLOWS) == []
    assert browser.value("document.images.length + document.querySelectorAll('script').length") == (name == "zoo")
    assert browser.complaints() == []


@pytest.mark.parametrize("name", REPORTS)
def test_every_figure_has_a_name_a_description_and_a_table(browser, pages, name):
    browser.open(pages[name])
    assert browser.value(UNNAMED) == 0
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    names = [one["name"]["value"] for one in tree if one.get("role", {}).get("value") in ("image", "img", "list")]
    wanted = browser.value("[...document.querySelectorAll('svg')].map(one => one.getAttribute('aria-label'))")
    assert set(wanted) <= set(names)


@pytest.mark.parametrize("name", ["whole", "failed", "undecided", "zoo"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser, pages, name, dark):
    browser.open(pages[name], dark=dark)
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    assert browser.value(CONTRAST) >= 4.5


@pytest.mark.parametrize("name", ["whole", "large", "zoo"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_prints_on_white(browser, pages, name, dark):
    browser.open(pages[name], 720, dark=dark, media="print")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    printed = browser.pdf()
    assert printed.startswith(b"%PDF-")
    assert printed.count(b"/Type /Page\n") or len(printed) > 10_000


def test_the_reason_of_a_bar_shows_on_hover_and_by_the_keyboard(browser, pages):
    seen = "[...document.querySelectorAll('.bar .why')].map(one => getComputedStyle(one).visibility)"
    browser.open(pages["whole"])
    count = len(browser.value(seen))
    assert browser.value(seen) == ["hidden"] * count
    x, y = browser.value(
        "(() => { const bar = document.querySelectorAll('.bar')[2]; bar.scrollIntoView({block: 'center'});"
        " const box = bar.getBoundingClientRect(); return [box.x + 20, box.y + box.height / 2]; })()"
    )
    browser.move(x, y)
    assert browser.value(seen) == [*["hidden"] * 2, "visible", *["hidden"] * (count - 3)]
    browser.move(1, 1)
    for _ in range(30):
        browser.press("Tab", 9)
        if "visible" in browser.value(seen):
            break
    assert browser.value(seen)[0] == "visible"
    assert "least divergence of stage.0" in browser.value("document.activeElement.getAttribute('aria-label')")
    browser.press("Tab", 9)
    assert browser.value(seen)[:2] == ["hidden", "visible"]


NAMES = (
    "[...document.querySelectorAll('#zoo tbody tr')].filter(row => !row.hidden).map(row => row.cells[0].textContent)"
)


def test_a_click_on_a_heading_sorts_the_leaderboard_both_ways(browser, pages):
    browser.open(pages["zoo"])
    assert browser.value(NAMES)[:2] == ["model-0", "model-1"]
    headings = browser.value("[...document.querySelectorAll('#zoo th')].map(one => one.textContent)")
    assert "agreement" not in headings  # nothing in it
    which = headings.index("latency p50, ms") + 1
    by_latency = [f"model-{n}" for n in sorted(range(12), key=lambda n: (n * 5) % 12)]
    for order, wanted in (("ascending", by_latency), ("descending", by_latency[::-1])):
        browser.click(f"#zoo th:nth-child({which}) button")
        assert browser.value(f"document.querySelector('#zoo th:nth-child({which})').getAttribute('aria-sort')") == order
        assert browser.value(NAMES)[:12] == wanted
        assert set(browser.value(NAMES)[12:]) == {"late", HOSTILE}
    browser.click("#zoo th:nth-child(1) button")
    names = browser.value(NAMES)
    assert names.index("model-2") < names.index("model-10")
    assert len(browser.value("[...document.querySelectorAll('#zoo th[aria-sort]')]")) == 1


def test_words_and_status_filter_the_leaderboard(browser, pages):
    browser.open(pages["zoo"], 360)
    assert browser.value("document.getElementById('told').textContent") == "14 of 14 rows"
    browser.click("#words")
    browser.type("MODEL-1 cpu")
    assert browser.value(NAMES) == ["model-1", "model-10", "model-11"]
    assert browser.value("document.getElementById('told').textContent") == "3 of 14 rows"
    browser.type(" nothing like it")
    assert browser.value(NAMES) == []
    browser.open(pages["zoo"])
    choose = "(() => { const one = document.getElementById('status'); one.value = '%s'; one.dispatchEvent(new Event('change')); })()"
    browser.value(choose % "crashed")
    assert browser.value(NAMES) == [HOSTILE]
    browser.value(choose % "")
    assert len(browser.value(NAMES)) == 14
    assert browser.complaints() == []


def test_the_leaderboard_runs_no_other_script(browser, pages, tmp_path):
    page = tmp_path / "changed.html"
    text = pages["zoo"].read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", "<script>document.title = 'taken over'</script></body>"), encoding="utf-8")
    browser.open(page)
    assert browser.value("document.title") == "Secateurs zoo: 14 models"
    assert any("Content Security Policy" in one for one in browser.complaints())
