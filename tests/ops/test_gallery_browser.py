"""`loupe gallery` in a real browser: pictures are those of the sampler, two runs at one seed, errors beside their fields."""

import base64
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import websocket
from PIL import Image

from tests.chromium import Browser, Page, chromium
from tests.sampling_runs import CLASSES, run_of, save
from tests.tiny import tiny
from trainer.pictures import png
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings

pytestmark = pytest.mark.ops
ALONE = ("samples={sampler: euler, num_steps: 2, guidance_scale: 2.0}",)
GUIDED = ("samples={sampler: euler, num_steps: 2, guidance_scale: 2.0, guidance_interval: [0.1, 0.7]}",)
DRAWN = "document.images.length === {} && [...document.images].every((i) => i.complete && i.naturalWidth)"
WIDE = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).length"
SLOW = pytest.mark.slow_ops


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return run_of(folder / "with-lpl", *ALONE), run_of(folder / "without", *ALONE, step=20)


@pytest.fixture(scope="module")
def served(runs: tuple[Path, Path]) -> Iterator[str]:
    """URL of a gallery of both runs, in this process, which has imported torch already."""
    from trainer.gallery.gallery import Gallery
    from trainer.gallery.live_run import LiveRun
    from trainer.gallery.server import listening, server_of

    found, ready = listening("127.0.0.1", 0), threading.Event()
    gallery = Gallery([LiveRun(str(run), torch.device("cpu")) for run in runs], poll_s=0.2)
    server = server_of(gallery, only_loopback=True, on_ready=ready.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[found]))
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{found.getsockname()[1]}/"
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def opened(browser: Browser, url: str, field: str = "Prompt", **look: object) -> Page:
    page = browser.open(url, **look)  # type: ignore[arg-type]
    page.until(f"document.querySelector('[aria-label^=\"{field}\"]')")
    return page


def put(page: Page, label: str, text: str) -> None:
    page.evaluate(f"document.querySelector('[aria-label^=\"{label}\"]').select()")
    page.call("Input.insertText", text=text)


def press(page: Page, button: str) -> None:
    page.evaluate(f"[...document.querySelectorAll('button')].find((b) => b.textContent.includes('{button}')).click()")


def says(page: Page, text: str) -> None:
    page.until(f"document.body.innerText.includes({text!r})")


def pictures(page: Page) -> list[bytes]:
    """As the browser got them, in the order of the page."""
    found = page.evaluate("""Promise.all([...document.images].map(async (image) => {
      const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
      return btoa(String.fromCharCode(...bytes));
    }))""")
    return [base64.b64decode(data) for data in found]


def expected(run: Path, prompt: str | int, *, seed: int, size: int = 32, steps: int = 2, count: int = 2) -> list[bytes]:
    model = SamplingModel.open(str(run), torch.device("cpu"))
    model.lot = count
    settings = SampleSettings("euler", steps, guidance=2.0, seed=seed, resolution=size)
    images = model.images([prompt] * count, range(count), settings)
    return [png(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]


def assert_quiet(page: Page, url: str) -> None:
    assert page.errors == []
    assert all(request.startswith(url) for request in page.requests), page.requests
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(WIDE) == 0


def test_two_runs_side_by_side(browser: Browser, served: str, runs: tuple[Path, Path]) -> None:
    page = opened(browser, served, width=390, height=844, mobile=True)
    for label, text in (("Size", "32"), ("Pictures", "2"), ("Seed", "5"), ("Guidance", "-1"), ("Prompt", "a red dog")):
        put(page, label, text)
    page.press("Enter")
    says(page, "-1 is no scale; take 0 or more, 1 for none")
    assert page.evaluate("document.querySelector('.q-field--error [aria-label]').ariaLabel") == "Guidance"
    assert page.evaluate("document.images.length") == 0
    put(page, "Guidance", "2")
    press(page, "Draw")
    page.until(DRAWN.format(4))
    assert page.evaluate("document.querySelector('.q-field--error')") is None
    captions = page.evaluate("[...document.querySelectorAll('figcaption .title')].map((e) => e.textContent)")
    assert captions == ["with-lpl, step 7, ema", "without, step 20, ema"]
    boxes = page.evaluate("[...document.images].map((e) => [e.getBoundingClientRect().x, e.getBoundingClientRect().y])")
    assert boxes[0][1] == boxes[2][1], "of both runs, the first pictures stand beside each other"
    assert boxes[0][0] < boxes[2][0]
    shown = pictures(page)
    assert shown == expected(runs[0], "a red dog", seed=5) + expected(runs[1], "a red dog", seed=5)
    assert len(set(shown)) == 4
    assert_quiet(page, served)


def test_a_foreign_site_opens_neither_page_nor_socket(served: str) -> None:
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(served, headers={"Host": "elsewhere.example"}), timeout=30)
    assert refused.value.code == 400
    socket = served.replace("http", "ws") + "_nicegui_ws/socket.io/?EIO=4&transport=websocket"
    websocket.create_connection(socket, timeout=30, origin=served.rstrip("/")).close()
    with pytest.raises(websocket.WebSocketBadStatusException):
        websocket.create_connection(socket, timeout=30, origin="http://elsewhere.example")
    for path in (
        "picture/../../etc/passwd.png",
        "picture/x.png",
        "_nicegui/..%2f..%2fpyproject.toml",
        "docs",
        "openapi.json",
    ):
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(served + path, timeout=30)
        assert missing.value.code == 404, path


# --------------------------------------------------------------------------------------------- the command, in a process


class Command:
    def __init__(self, folder: Path, *arguments: str) -> None:
        # NiceGUI behaves otherwise where it believes to be tested
        env = {k: v for k, v in os.environ.items() if "PYTEST" not in k}
        command = [sys.executable, "-u", "-m", "launch.cli", "gallery", "--port", "0", "--poll", "0.2", *arguments]
        self.log = folder / "gallery.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=Path(__file__).parents[2])
        end = time.monotonic() + 120
        while not (found := re.search(r"^http://\S+/$", self.said, re.MULTILINE)):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.1)
        self.url = found[0]

    @property
    def said(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@SLOW
def test_a_newer_checkpoint_is_taken_up(browser: Browser, tmp_path: Path) -> None:
    run = run_of(tmp_path / "live", *ALONE)
    with Command(tmp_path, str(run)) as command:
        page = opened(browser, command.url, dark=True)
        for label, text in (("Size", "32"), ("Pictures", "2"), ("Prompt", "a very long prompt " * 5)):
            put(page, label, text)
        page.press("Enter")
        page.until(DRAWN.format(2))
        says(page, "The prompt is longer than the text encoder takes, and was cut.")
        before = pictures(page)
        save(run, tiny(*ALONE), step=30)
        says(page, "newer checkpoint: step 30")
        assert pictures(page) == before
        press(page, "Next seed")
        page.until("document.querySelector('figcaption .title')?.textContent === 'live, step 30, ema'")
        page.until(DRAWN.format(2))
        assert pictures(page) == expected(run, ("a very long prompt " * 5).strip(), seed=1)
        assert "newer checkpoint" not in page.evaluate("document.body.innerText")
        assert_quiet(page, command.url)
        assert "Traceback" not in command.said


@SLOW
def test_a_model_of_classes_takes_a_class(browser: Browser, tmp_path: Path) -> None:
    run = run_of(tmp_path / "classes", *GUIDED, CLASSES)
    with Command(tmp_path, str(run), "--weights", "raw") as command:
        page = opened(browser, command.url, "Class")
        for label, text in (("Size", "32"), ("Pictures", "1"), ("Class", "9")):
            put(page, label, text)
        page.press("Enter")
        says(page, "guided at times 0.1 to 0.7")
        says(page, "9 is no class of the model's 0 to 3")
        put(page, "Class", "3")
        page.press("Enter")
        page.until(DRAWN.format(1))
        assert page.evaluate("document.querySelector('[aria-label=Prompt]')") is None
        assert page.evaluate("document.querySelector('figcaption .title').textContent") == "classes, step 7, raw"
        assert_quiet(page, command.url)
