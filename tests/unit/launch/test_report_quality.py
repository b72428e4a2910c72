"""What the report tells of evaluations of a run's pictures: values with intervals by definition, and what is damaged."""

from pathlib import Path
from typing import Any

from launch.report.quality import read_evaluations
from tests.run_folders import make_run
from tests.unit.launch.test_report import EVIL, written
from trainer.run_folder import RunFolder


def evaluation(step: int, fid: float, definition: str = "a" * 16, **changes: Any) -> dict[str, Any]:
    return {
        "step": step, "weights": "ema", "time": 1.7e9, "counts": {"generated": 5000, "real": 1854}, "reference": "s3://b/held",
        "size": 256, "definition": definition, "sampling": {"sampler": "euler", "steps": 25, "guidance": 2.0},
        "networks": [{"name": "inception", "sha256": "6726825d" + "0" * 56}],
        "figures": {
            "fid": {"value": fid, "interval": {"low": fid - 1, "high": fid + 1}}, "recall": {"value": 0.5, "interval": None},
        }, **changes,
    }  # fmt: skip


def kept(folder: RunFolder, record: dict[str, Any], number: int = 0) -> None:
    folder.write_json(f"evaluations/step-{record['step']:08d}-{number:012x}.json", record)


def test_figures_by_step_and_definition(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    kept(folder, evaluation(400, 12.345, truncated=3))
    kept(folder, evaluation(200, 20.25))
    kept(folder, evaluation(400, 14.33, "b" * 16, weights="raw"), 1)
    missing: list[str] = []
    found = read_evaluations(folder, missing)
    assert missing == []
    assert [(one.step, one.values["fid"]) for one in found] == [(200, 20.25), (400, 12.345), (400, 14.33)]
    assert found[0].intervals == {"fid": (19.25, 21.25)}

    page = written(folder.url)
    assert (
        page.text.count(
            "5000 pictures against 1854 real images of s3://b/held at 256 px; features of inception 6726825d"
        )
        == 2
    )
    assert page.text.count("figures of another one do not compare") == 2
    assert page.text.count("; 3 prompts longer than the text encoder takes, and cut") == 1
    for shown in ("20.25", "19.25 to 21.25", "12.35", "14.33", "euler, 25 steps, guidance 2.0", "raw"):
        assert shown in page.text
    assert page.text.index("20.25") < page.text.index("12.35") < page.text.index("14.33")
    assert "missing or not readable" not in page.text or "evaluations" not in page.text

    other = make_run(str(tmp_path / "other"))
    kept(other, evaluation(300, 11.5))
    both = written(folder.url, other.url, "--out", str(tmp_path / "both.html"))
    assert "11.5" in both.text
    # in one table, by their common definition
    assert both.text.count("Definition " + "a" * 16) == 1


def test_what_is_damaged_is_left_out_and_said(tmp_path: Path) -> None:
    folder = make_run(str(tmp_path / "run"))
    kept(folder, evaluation(100, float("3.5")))
    kept(folder, evaluation(200, 1.0, reference=EVIL, definition=EVIL, weights=EVIL, counts={"generated": EVIL}))
    kept(folder, {**evaluation(300, 1.0), "figures": [EVIL]})
    kept(folder, {**evaluation(400, 1.0), "figures": {EVIL: {"value": 2.0, "interval": EVIL}, "no": {"value": "x"}}})
    kept(folder, {**evaluation(500, 1.0), "networks": EVIL, "sampling": [EVIL], "counts": None, "time": "never"})
    folder.write_text("evaluations/step-00000600-" + "0" * 12 + ".json", "{")
    folder.write_text("evaluations/notes.txt", "mine")
    missing: list[str] = []
    assert [one.step for one in read_evaluations(folder, missing)] == [100, 200, 400, 500]
    assert len(missing) == 2
    assert missing[0].startswith("evaluations/step-00000300-000000000000.json: no evaluation")
    assert "step-00000600" in missing[1]
    page = written(folder.url)
    assert [attributes.get("id") for tag, attributes in page.tags if tag == "script"] == ["data", "plotly", None]
    assert not [tag for tag, _ in page.tags if tag == "img"]
