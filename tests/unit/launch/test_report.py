"""`loupe runs report`: what it reads, thins, escapes and says to be missing. How it looks: tests/ops/test_report_browser.py."""

import io
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from launch.job import update_job
from launch.report import page as page_module
from launch.report.command import names_of, report
from launch.report.config_diff import differences
from launch.report.history import read_history
from launch.report.html import script_json
from launch.report.pictures import read_frames, small
from launch.report.thin import bucket_means, extremes, smooth
from tests.run_folders import make_run, record
from tests.tiny import tiny
from trainer.errors import UserError
from trainer.run_folder import RunFolder

EVIL = '</script><script>window.evil = 1</script><img src=x onerror="window.evil = 2">'


class Parsed(HTMLParser):
    """What a browser would make elements of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.inside: list[str] = []
        self.data = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = [tag, dict(attrs).get("id") or ""]

    def handle_data(self, data: str) -> None:
        if self.inside[:1] == ["script"]:
            self.data = data if self.inside[1] == "data" else self.data
        elif self.inside[:1] != ["style"]:
            self.words.append(data)

    def handle_endtag(self, tag: str) -> None:
        self.inside = []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def written(*arguments: str) -> Parsed:
    result = CliRunner().invoke(report, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Parsed(Path(result.output.split("  (")[0]).read_text())


def grid(colour: str, side: int = 300) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_extremes_are_kept_and_points_are_few() -> None:
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_000)
    y[54_321], y[12_345] = 50.0, -50.0
    kept = extremes(y)
    assert len(kept) <= 2000
    assert {0, 12_345, 54_321, 99_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert extremes(y[:10]).tolist() == list(range(10))


def test_means_of_buckets_leave_out_what_is_not_known() -> None:
    values = np.arange(1000.0).reshape(-1, 1)
    values[3] = np.nan
    means = bucket_means(values, 100)
    assert means.shape == (100, 1)
    assert means[0, 0] == pytest.approx(np.mean([0, 1, 2, 4, 5, 6, 7, 8, 9]))
    assert means[7, 0] == pytest.approx(74.5)


def test_a_smooth_curve_does_not_reach_over_a_phase() -> None:
    y = np.concatenate([np.ones(50), np.full(50, 9.0)])
    even = smooth(y, np.repeat([0, 1], 50))
    assert even is not None
    assert even.tolist() == y.tolist()
    noisy = np.random.default_rng(0).normal(size=400)
    even = smooth(noisy, np.zeros(400, dtype=np.int64))
    assert even is not None
    assert even[200] == pytest.approx(noisy[190:211].mean())


def test_of_steps_done_again_the_newest_stand(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"), attempts=((1, 2, 3, 4, 5, 6), ()))
    writer = folder.metrics_writer(1)
    for step in (3, 4):
        writer.write(record(step, time.time() - 40 + step, loss={"loss": 77.0 + step}))
    writer.close()
    history = read_history(folder)
    rows = history.standing()
    assert history.column("step")[rows].tolist() == [1, 2, 3, 4]
    assert history.column("loss.loss")[rows].tolist() == [1.0, 0.5, 80.0, 81.0]
    assert np.isnan(history.column("loss.denoising")[rows][2:]).all()


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    with open(tmp_path / "run/metrics/0000.jsonl", "a") as file:
        file.write('no\n[1]\n{"step": "x"}\n{"step": 1e999, "time": 5}\n' + json.dumps({"step": 9, "time": 0}) + "\n")
        file.write(json.dumps({**record(5, time.time()), "loss": {"loss": 10**400}}) + '\n{"step": 7, "ti')
    history = read_history(folder)
    assert history.unreadable == 6
    assert history.column("step").tolist() == [1, 2, 3, 4]
    assert history.missing == ["metrics: 6 line(s) cannot be read"]


def test_tens_of_thousands_of_records_make_a_small_page(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"), attempts=((),))
    with open(tmp_path / "run/metrics/0000.jsonl", "w") as file:
        base, now = record(1, 1.0), time.time() - 60_000
        for step in range(1, 30_001):
            file.write(
                json.dumps(
                    {**base, "step": step, "total_steps": 30_000, "time": now + step, "loss": {"loss": 1 / step}}
                )
                + "\n"
            )
    found = written(folder.url)
    loss = next(chart for chart in json.loads(found.data)["charts"] if chart["id"] == "loss")
    assert len(loss["traces"][0]["x"]) <= 2000
    assert loss["traces"][0]["y"][0] == 1.0
    assert loss["traces"][0]["x"][-1] == 30_000
    assert (tmp_path / "run/report.html").stat().st_size < 3_500_000


def test_nothing_of_a_run_folder_becomes_an_element(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"), attempts=((1, 2), (2, 3)))
    writer = folder.metrics_writer(1)
    writer.write(record(4, time.time(), phase=EVIL, loss={EVIL[:60]: 1.0, "loss": 2.0}, stages={"data": 0.1}))
    writer.write({"time": time.time(), "note": "WARNING: " + EVIL})
    writer.close()
    update_job(folder, recipe=EVIL, ended={"code": 93, "why": EVIL, "time": time.time()})
    folder.write_text("logs/rank-0.log", f"Traceback\n{EVIL}\x1b[31m red\n")
    folder.write_json(
        "attempts/0001.json", {"time": time.time(), "host": EVIL, "world_size": 2, "packages": {EVIL: EVIL}}
    )
    found = written(folder.url)
    assert [attributes.get("id") for tag, attributes in found.tags if tag == "script"] == ["data", "plotly", None]
    assert not [
        tag for tag, attributes in found.tags if tag == "img" or any(name.startswith("on") for name in attributes)
    ]
    assert "window.evil = 1" in found.text
    assert "\x1b" not in found.text
    assert json.loads(found.data)["charts"]
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert "default-src 'none'" in policy
    scripts = re.search(r"script-src ([^;]*)", policy)
    assert scripts
    assert re.fullmatch(r"('sha256-[A-Za-z0-9+/=]{44}' ?){2}", scripts[1])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("job.json", '{"a', "job.json"),
        ("attempts/0000.json", "3", "attempts/0000.json: not a JSON object"),
        ("samples/step-00000004.png", "not a png", "samples/step-00000004.png: no PNG"),
        ("summary.json", "[", "summary.json"),
        ("goodput/0000.json", "{}", "goodput"),
        ("config.yaml", "name: [", "config.yaml"),
    ],
)
def test_what_is_damaged_is_said_to_be_missing(tmp_path: Path, name: str, content: str, said: str) -> None:
    folder = make_run(str(tmp_path / "run"))
    folder.write_text(name, content)
    found = written(folder.url)
    assert "missing or not readable" in found.text
    assert said in found.text


def test_a_run_that_has_not_begun(tmp_path: Path) -> None:
    found = written(make_run(str(tmp_path / "run"), attempts=()).url)
    assert "metrics: none yet" in found.text
    assert json.loads(found.data)["charts"] == []


def test_pictures_are_few_and_fit(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    rng = np.random.default_rng(0)
    for step in range(1, 41):
        noise = Image.fromarray(
            rng.integers(0, 255, (1400, 1400, 3), dtype=np.uint8) if step < 3 else np.zeros((8, 8, 3), np.uint8)
        )
        buffer = io.BytesIO()
        noise.save(buffer, "PNG", compress_level=1)
        folder.write_bytes(f"samples/step-{step:08d}.png", buffer.getvalue())
    found = read_frames(folder, "samples", max_bytes=400_000, final_step=40)
    assert found.frames[-1].order == 40
    assert len(found.frames) <= 24
    assert sum(len(frame.url) for frame in found.frames) <= 400_000
    assert found.missing[0] == "samples: 24 of 40 pictures are shown"


def test_a_picture_with_too_many_pixels_is_not_decoded() -> None:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        small(buffer.getvalue(), 100)
    data, width, height = small(grid("red", 600), 100)
    assert (width, height) == (100, 100)
    assert Image.open(io.BytesIO(data)).format == "WEBP"


def test_differences_name_the_field_and_both_values() -> None:
    found = differences([tiny(), tiny("phases.perceptual.learning_rate=0.25", "seed=7")])
    assert {(d.field, d.values[1]) for d in found} == {("phases.perceptual.learning_rate", "0.25"), ("seed", "7")}
    assert differences([tiny(), tiny()]) == []


def test_runs_side_by_side(tmp_path: Path) -> None:
    a = make_run(str(tmp_path / "a/run"), attempts=((1, 2, 3, 4),))
    b = make_run(str(tmp_path / "b/run"), attempts=((1, 2),))
    for folder, colour in ((a, "red"), (b, "blue")):
        folder.write_bytes("samples/step-00000002.png", grid(colour))
    b.write_text("config.yaml", b.read_text("config.yaml").replace("seed: 0", "seed: 5", 1))
    found = written(a.url, b.url, "--out", str(tmp_path / "both.html"))
    assert "2 runs side by side" in found.text
    assert "a/run" in found.text
    assert "Config differences" in found.text
    loss = next(chart for chart in json.loads(found.data)["charts"] if chart["id"] == "loss-loss")
    assert [(trace["name"], trace["x"]) for trace in loss["traces"]] == [("a/run", [1, 2, 3, 4]), ("b/run", [1, 2])]
    assert [a["alt"] for tag, a in found.tags if tag == "img"] == [
        "Samples of a/run, step 2",
        "Samples of b/run, step 2",
    ]


def test_a_file_that_is_no_report_is_not_written_over(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    with pytest.raises(UserError, match="no report; give another --out"):
        written(folder.url, "--out", str(tmp_path / "run/config.yaml"))
    written(folder.url)
    written(folder.url)
    with pytest.raises(UserError, match="give another --out"):
        written(folder.url, "--out", str(tmp_path / "none/report.html"))
    assert not list(tmp_path.glob("run/.report*"))


def test_names_tell_runs_apart() -> None:
    assert names_of(["/x/a", "/x/b"]) == ["a", "b"]
    assert names_of(["/x/a/run", "/y/a/run", "/z/b/run"]) == ["x/a/run", "y/a/run", "z/b/run"]


def test_a_run_that_no_job_has_is_written_once(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    result = CliRunner().invoke(report, [folder.url, "--live"], catch_exceptions=False)
    assert "no job has it" in result.output
    page = Parsed((tmp_path / "run/report.html").read_text())
    assert json.loads(page.data)["liveS"] is None


def test_json_in_a_script_cannot_end_it() -> None:
    dumped = script_json({"a": EVIL + "<!--&\u2028"})
    assert not set(dumped) & set("<>&\u2028")
    assert json.loads(dumped)["a"] == EVIL + "<!--&\u2028"


def test_the_packed_plotly_is_the_one_that_the_policy_allows() -> None:
    import base64
    import gzip
    import hashlib

    script, packed = page_module._plotly()
    unpacked = gzip.decompress(base64.b64decode(packed))
    assert base64.b64encode(hashlib.sha256(unpacked).digest()).decode() in page_module._policy(script)


def test_a_remote_runs_report_goes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = make_run("memory://runs/far")
    assert isinstance(folder, RunFolder)
    written(folder.url)
    assert (tmp_path / "report-far.html").exists()
