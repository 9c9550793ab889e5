"""The page in a real browser: it shows what the report holds, can be clicked through, and asks nobody for anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reparam.report import Report
from reparam.report.format import duration
from reparam.workflow import Request, run
from tests.cli.test_fuse import network
from tests.report.browser import CHROMIUM, Page, browser
from tests.report.cases import FULL, graph, rewrite, timing
from tests.report.test_facts import FACTS

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian: apt-get install chromium)")

UNFOLD = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browser() as opened:
        yield opened


@pytest.fixture
def shown(page: Page, tmp_path: Path) -> Iterator[Page]:
    """The page of the full report; whatever a test does to it, it asks for nothing and complains of nothing."""
    open_report(page, FULL, tmp_path)
    yield page
    page.run("document.title")  # events that came with the last action are read now
    assert page.requests == []
    assert page.complaints == []


def open_report(page: Page, report: Report, folder: Path, width: int = 1200) -> None:
    file = folder / "report.html"
    file.write_text(report.to_html(), encoding="utf-8")
    page.open(file, width)


def test_it_shows_what_the_report_holds(shown: Page) -> None:
    assert shown.run("document.title") == "Net from net.pt: equivalent · reparam"
    shown.run(UNFOLD)
    text = shown.text().lower().replace("×", "x").replace("→", "->")
    assert [fact for fact, _, _ in FACTS if fact.lower() not in text] == []
    cells = shown.run("[...document.querySelectorAll('#operations tr')].map((row) => row.innerText.split('\\t'))")
    assert [cell.strip() for cell in cells[2]] == ["batch norms", "20", "0"]


def test_the_headline_is_read_without_a_click(shown: Page) -> None:
    text = shown.text("header")
    for fact in (
        "equivalent",
        "61 → 40 operations",
        "batch norms 20 → 0",
        "faster by x2.00 fused [eager] (1.80-2.20) doubtful",
        "float64 error 1.5e-13",
    ):
        assert fact in text
    assert "partial" not in text


def test_a_region_is_unfolded(shown: Page) -> None:
    shown.click("#graph button[data-unfold]")
    region = "#graph .side:first-child details.region[data-region='3']"
    assert "layer3.bn" not in shown.text(region)
    shown.click(f"{region} summary")
    opened = shown.text(region)
    for fact in (
        "Conv2d + BatchNorm2d",
        "layer3.conv",
        "layer3.bn",
        "2×64×8×8",
        "reads 9",
        "kernel_size=(3, 3)",
        "net.py:42",
    ):
        assert fact in opened
    assert "W' = W * g / sqrt(v + eps)" in opened
    colours = shown.run(
        "[...document.querySelectorAll(\"#graph details[data-region='3']\")].map("
        "(one) => getComputedStyle(one).borderColor)"
    )
    assert len(colours) == 2, "one before and one after"
    assert len(set(colours)) == 1
    assert colours[0] != shown.run("getComputedStyle(document.querySelector(\"details[data-region='4']\")).borderColor")


def test_a_rewrite_leads_to_its_region(shown: Page) -> None:
    assert not shown.run("document.getElementById('before-13').checkVisibility()")
    shown.click("#rewrites summary") if not shown.run("document.querySelector('#rewrites details').open") else None
    shown.click("#rewrites a.chip[data-region='4']")
    assert shown.run("document.getElementById('before-13').checkVisibility()")
    assert shown.run("document.querySelector(\"#graph details[data-region='4']\").open")


def test_nodes_lead_to_what_they_read(shown: Page) -> None:
    shown.run(UNFOLD)
    shown.click("#after-2 .reads a")
    assert shown.run("document.getElementById('after-1').classList.contains('found')")


def test_groups_fold_and_unfold(shown: Page) -> None:
    visible = "[...document.querySelectorAll('#graph .nodes > li')].filter((one) => one.checkVisibility()).length"
    assert shown.run(visible) == 0
    shown.click("#graph button[data-unfold]")
    # Before: 20 regions, 20 ReLUs, what was removed, input and output; after: the same without what was removed.
    assert shown.run(visible) == 43 + 42
    shown.click("#graph button[data-fold]")
    assert shown.run(visible) == 0
    for link in shown.run("[...document.querySelectorAll('nav a')].map((one) => one.getAttribute('href'))"):
        assert shown.run(f"document.querySelector('{link}').tagName") == "SECTION"


@pytest.mark.parametrize("width", [390, 320])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_is_wider_than_a_phone(shown: Page, width: int, dark: bool) -> None:
    shown.resize(width)
    shown.dark(dark)
    assert shown.run(OVERFLOW) <= 0
    shown.run(UNFOLD)
    assert shown.run(OVERFLOW) <= 0
    paper = shown.run("getComputedStyle(document.body).backgroundColor")
    shown.dark(False)
    assert (paper == "rgb(255, 255, 255)") is not dark


def test_every_sample_is_a_dot_where_its_value_is(shown: Page) -> None:
    paths = shown.run("[...document.querySelectorAll('#latency path.dots')].map((one) => one.getAttribute('d'))")
    assert [path.count("M") for path in paths] == [40, 40]
    drawn = [sorted(int(x) for x in re.findall(r"M(\d+) ", path)) for path in paths]
    assert FULL.timing is not None
    for found, samples in zip(drawn, map(sorted, FULL.timing.samples.values()), strict=True):
        unit = found[-1] / samples[-1]
        assert found == pytest.approx([unit * value for value in samples], abs=1)
    medians = shown.run(
        "[...document.querySelectorAll('#latency .median')].map((one) => "
        "one.getBoundingClientRect().x - one.ownerSVGElement.getBoundingClientRect().x)"
    )
    assert medians[0] / medians[1] == pytest.approx(2.0, rel=0.02)


def test_errors_stand_beside_the_noise_and_the_bar(shown: Page) -> None:
    def places(mark: str) -> list[float]:
        return shown.run(  # type: ignore[no-any-return]
            f"[...document.querySelectorAll('#equivalence figure:first-of-type .point {mark}')].map((one) => "
            "one.getBoundingClientRect().right)"
        )

    bars, used = places(".bar"), places(".used")
    assert len(bars) == len(used) == 2, "two cases that ran"
    assert all(share < bar for share, bar in zip(used, bars, strict=True))
    assert len(places(".noise")) == len(places(".error")) == 2
    assert places(".error")[1] < places(".error")[0], "an error of half the size stands further left"


def test_an_error_beyond_its_bar_is_seen(page: Page, tmp_path: Path) -> None:
    from tests.report.cases import comparison

    open_report(page, replace(FULL, comparison=comparison(False), onnx_comparison=None), tmp_path)
    assert "NOT equivalent" in page.text("header")
    over = page.run("document.querySelector('.used.failed').getBoundingClientRect().right")
    assert over > page.run("document.querySelector('.point .bar').getBoundingClientRect().right") + 20
    assert page.complaints == []


def test_a_partial_report_says_so_at_the_top(page: Page, tmp_path: Path) -> None:
    open_report(page, replace(FULL, timing=timing(partial=True)), tmp_path)
    assert "interrupted while measuring latency; 40 complete rounds were kept" in page.text("header")


def test_on_paper_there_is_nothing_to_press(shown: Page, tmp_path: Path) -> None:
    shown.print_to(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert shown.run("document.querySelector('details.figures').open"), "figures of the cases are printed"
    shown.media("print")
    hidden = shown.run("['nav', 'button'].map((one) => document.querySelector(one).checkVisibility())")
    shown.media("")
    assert hidden == [False, False]


def test_no_name_is_run_as_a_script(page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror='window.hacked=1'><script>window.hacked=2</script>"
    report = replace(FULL, model=evil, rewrites=(replace(rewrite(0), identity=evil),), graph=graph(0), notes=(evil,))
    open_report(page, report, tmp_path)
    page.run(UNFOLD)
    assert page.run("document.querySelector('h1').innerText") == evil
    assert page.run("window.hacked === undefined && document.images.length === 0")
    assert (page.requests, page.complaints) == ([], [])


def test_the_policy_would_stop_what_slipped_through(page: Page, tmp_path: Path) -> None:
    open_report(page, FULL, tmp_path)
    image = '<img src="http://127.0.0.1:9/x" onerror="window.hacked=1">'
    page.run(f"document.body.insertAdjacentHTML('beforeend', {json.dumps(image)})")
    page.run("new Promise((done) => setTimeout(done, 300))")
    assert page.run("window.hacked === undefined")
    assert any("Content Security Policy" in complaint for complaint in page.complaints)


def test_the_report_of_a_real_run(page: Page, tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "net.pt")
    file = tmp_path / "real.html"
    report = run(Request(str(tmp_path / "net.pt"), inputs=("1x3x8x8",), bench_seconds=0.2, report=str(file)))
    page.open(file, 390)
    page.run(UNFOLD)
    text = page.text()
    assert report.comparison is not None
    assert report.timing is not None
    assert report.graph is not None
    shown = [report.model, report.comparison.summary()[1:], *report.files.values(), *report.timing.verdicts.values()]
    shown += [duration(seconds) for seconds in (*report.timing.medians.values(), *report.timing.p95s.values())]
    shown += [node.detail for node in report.graph.after if node.detail]
    assert [one for one in shown if " ".join(one.split()) not in text] == []
    boxes = page.run(
        "[...document.querySelectorAll('#graph .drawing')].map((one) => one.querySelectorAll('rect').length)"
    )
    assert boxes == [len(report.graph.before), len(report.graph.after)]
    assert page.run(OVERFLOW) <= 0
    assert (page.requests, page.complaints) == ([], [])


def test_a_model_of_thousands_of_operations_can_be_unfolded(page: Page, tmp_path: Path) -> None:
    view = graph(700)
    nodes = {
        side: tuple(
            replace(node, module=f"stage{index // 200}.{node.module}") for index, node in enumerate(getattr(view, side))
        )
        for side in ("before", "after")
    }
    many = replace(FULL, graph=replace(view, **nodes), rewrites=tuple(rewrite(number) for number in range(701)))
    open_report(page, many, tmp_path, 390)
    page.click("#graph details.group[data-path='stage5'] > summary")
    inner = "#graph details.group[data-path='stage5'] details.group > summary"
    page.click(inner)
    assert page.run("document.querySelectorAll('#graph .nodes > li').length") > 2800
    assert page.run(OVERFLOW) <= 0
    assert page.complaints == []
