"""The run report in a real browser: desktop and phone, light and dark, by keyboard, live, and with hostile text."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from launch.job import update_job
from launch.report.command import write_report
from launch.report.gather import gather
from launch.report.page import page as whole_page
from tests.chromium import Browser, Page, chromium
from tests.run_folders import make_run, record
from trainer.run_folder import RunFolder

pytestmark = pytest.mark.ops
EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2"><b>bold</b>'
DRAWN = "document.documentElement?.dataset.drawn === 'yes'"
OVERFLOWING = """[...document.querySelectorAll('body *')].filter((e) => {
  const box = e.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !e.closest('.scroll, nav, pre, svg, .skip');
}).map((e) => e.outerHTML.slice(0, 120))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


def a_run(path: Path) -> RunFolder:
    """40 steps in two starts and two phases, with stages, levels of noise, evaluations and samples."""
    folder = make_run(str(path), attempts=((1,), ()))
    for start, steps in ((0, range(1, 25)), (1, range(20, 41))):
        writer = folder.metrics_writer(start)
        for step in steps:
            more = {
                "loss_by_noise": {str(i): 1 / step + 0.1 * i for i in range(8)}, "mfu": 0.4,
                "stages": {"data": 0.01, "forward": 0.1, "backward": 0.2, "checkpoint": 0.05 * (step % 5 == 0)},
                "ranks": {"step_s": {"min": 0.3, "mean": 0.35, "max": 0.4}}, "total_steps": 40,
            }  # fmt: skip
            when = time.time() - 100 + 50 * start + step
            writer.write(record(step, when, phase="low_resolution" if step < 30 else "perceptual", **more))
        writer.write(
            {"time": time.time(), "note": "evaluation", "evaluation": {"step": steps[-1], "psnr_db": 20.0 + start}}
        )
        writer.close()
    for step, colour in ((10, "red"), (20, "green"), (40, "blue")):
        buffer = io.BytesIO()
        Image.new("RGB", (680, 680), colour).save(buffer, "PNG")
        folder.write_bytes(f"samples/step-{step:08d}.png", buffer.getvalue())
    restart = {"reason": "preempted", "code": 75, "rank": 1, "step": 24, "time": time.time() - 60}
    update_job(folder, restarts=[restart], ended={"code": 0, "why": "done", "time": time.time()})
    return folder


def shown(browser: Browser, file: Path, **look: object) -> Page:
    page = browser.open(file.as_uri(), **look)  # type: ignore[arg-type]
    page.until(DRAWN)
    return page


def assert_whole(page: Page, file: Path) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(OVERFLOWING) == []
    assert page.errors == []
    assert page.requests == [file.as_uri()]
    assert page.evaluate("document.getElementById('status').textContent") == ""


SLOW = pytest.mark.slow_ops


@pytest.mark.parametrize(
    ("width", "dark"),
    [(1440, False), pytest.param(1440, True, marks=SLOW), pytest.param(390, False, marks=SLOW), (390, True)],
)
def test_it_fits_and_says_no_error(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    file = tmp_path / "report.html"
    write_report([a_run(tmp_path / "run")], file, live_s=None)
    page = shown(browser, file, width=width, height=900, dark=dark, mobile=width < 500)
    assert_whole(page, file)
    charts = page.evaluate("document.querySelectorAll('.plot').length")
    assert charts >= 10
    assert page.evaluate(
        "document.querySelectorAll('.plot .main-svg').length >= document.querySelectorAll('.plot').length"
    )
    ink = page.evaluate("getComputedStyle(document.querySelector('#chart-loss .xtick text')).fill")
    assert (sum(map(int, ink.removeprefix("rgb(").rstrip(")").split(","))) > 380) == dark


@SLOW
def test_by_keyboard(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    write_report([a_run(tmp_path / "run")], file, live_s=None)
    page = shown(browser, file)
    now = "[...document.querySelectorAll('.frames img')].filter((i) => !i.hidden).map((i) => i.dataset.order).join()"
    assert page.evaluate(now) == "40"
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.press("ArrowLeft")
    assert page.evaluate(now) == "20"
    page.press("Home")
    assert page.evaluate(now) == "10"
    assert page.evaluate("document.querySelector('output').textContent") == "step 10"
    axis = "document.getElementById('chart-loss').layout.yaxis.type"
    assert page.evaluate(axis) == "log"
    page.evaluate("document.querySelector('input[value=log]').focus()")
    page.press("ArrowRight")
    page.until(f"{axis} === 'linear'")
    # the first Tab on the page finds the link past the head, and it is seen
    page.evaluate("document.activeElement.blur()")
    page.evaluate("scrollTo(0, 0)")
    assert page.evaluate(
        "[...document.querySelectorAll('input,button,summary,a,.scroll,pre')].every((e) => e.tabIndex >= 0)"
    )
    page.evaluate("document.querySelector('nav a').focus()")
    page.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_hostile_text_does_nothing(browser: Browser, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    writer = folder.metrics_writer(1)
    writer.write(
        record(41, time.time(), phase=EVIL, loss={EVIL[:70]: 1.0, "loss": 2.0, "denoising": 1.0}, stages={"data": 0.1})
    )
    writer.write({"time": time.time(), "note": "WARNING: " + EVIL})
    writer.close()
    update_job(folder, restarts=[], ended={"code": 93, "why": EVIL, "time": time.time()})
    folder.write_text("logs/rank-0.log", f"Traceback\n{EVIL}\n")
    file = tmp_path / "report.html"
    write_report([folder], file, live_s=None)
    page = shown(browser, file)
    assert_whole(page, file)
    assert page.evaluate("window.evil") is None
    assert page.evaluate("document.querySelectorAll('main b').length > 0")
    assert page.evaluate("[...document.querySelectorAll('b, tspan')].some((e) => e.textContent === 'bold')") is False


@SLOW
def test_a_live_page_keeps_its_place(browser: Browser, tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    file = tmp_path / "report.html"
    found = gather(folder, time.time(), name="run", picture_bytes=1 << 20)
    file.write_text(whole_page([found], live_s=3))
    page = shown(browser, file)
    page.evaluate("window.first = true")
    page.evaluate("document.querySelector('input[type=range]').focus()")
    page.press("ArrowLeft")
    page.evaluate("document.querySelector('input[value=linear]').click()")
    page.evaluate("scrollTo({top: 700, behavior: 'instant'})")
    page.until(f"window.first === undefined && {DRAWN}")
    page.until("Math.abs(scrollY - 700) < 30")
    assert page.evaluate("document.querySelector('output').textContent") == "step 20"
    assert page.evaluate("document.getElementById('chart-loss').layout.yaxis.type") == "linear"
    assert page.evaluate("document.activeElement.type") == "range"
    assert page.errors == []


@SLOW
@pytest.mark.parametrize("width", [1440, 390])
def test_several_runs_fit(browser: Browser, tmp_path: Path, width: int) -> None:
    file = tmp_path / "report.html"
    folders = [a_run(tmp_path / name) for name in ("a", "a-run-with-a-much-longer-name-than-fits-anywhere", "c")]
    write_report(folders, file, live_s=None)
    page = shown(browser, file, width=width, height=900, mobile=width < 500)
    assert_whole(page, file)
    assert (
        page.evaluate("document.getElementById('chart-loss-loss').data.filter((t) => t.showlegend !== false).length")
        == 3
    )


def test_it_prints_whole_and_light(browser: Browser, tmp_path: Path) -> None:
    file = tmp_path / "r.html"
    write_report([a_run(tmp_path / "r")], file, live_s=None)
    page = shown(browser, file, dark=True)
    ink = "getComputedStyle(document.querySelector('#chart-loss .xtick text')).fill"
    dark = page.evaluate(ink)
    page.resize(718, 1000, dark=True, media="print")
    page.until("document.querySelector('.js-plotly-plot')._fullLayout.width === 720")
    sizes = page.evaluate("""[...document.querySelectorAll('.js-plotly-plot')].map(
      (box) => [box, ...box.querySelectorAll('.main-svg')].map((e) => e.getBoundingClientRect().width))""")
    assert len(sizes) > 5
    for box, *drawings in sizes:
        assert 500 < box < 718
        assert drawings == pytest.approx([box] * len(drawings), abs=1.0), "nothing is cut off"
    assert page.evaluate(ink) != dark
    assert page.errors == []
