"""`loupe experiment lpl` from its first process to its report, in seconds: real runs, evaluations and pictures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from trainer.config import CODE_ROOT
from trainer.experiments.evaluate import read_arrays
from trainer.experiments.results import METRICS


@pytest.mark.shared
@pytest.mark.long
def test_the_smallest_experiment(tmp_path: Path, shared_dir: Path) -> None:
    """One rival has no network: its run is listed as missing, and stands in no table."""
    (tmp_path / "empty").mkdir()
    out, report = tmp_path / "out", tmp_path / "report"
    command = [
        sys.executable, "-m", "launch.cli", "experiment", "lpl", "--smoke", "--paradigm", "ddpm_eps", "--variant", "lpl",
        "--out", str(out), "--report", str(report),
        "--features-weights", str(shared_dir / "data/efficientnet_lite0/efficientnet-lite0-57934424.pth"),
        "--lpips-weights", str(shared_dir / "data/stlpips/alex_shift_tolerant.pth"),
    ]  # fmt: skip

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=550
        )

    first = run("--variant", "latent_lpips", "--latent-network", str(tmp_path / "empty"))
    assert first.returncode == 1, first.stdout + first.stderr
    assert "no result: eps-latent_lpips-0: training ended with code 93: error:" in first.stderr

    page = (report / "lpl.md").read_text()
    assert "- `eps-latent_lpips-0`: training ended with code 93" in page
    assert "| no perceptual loss | 1 |" in page
    assert "E-LatentLPIPS |" not in page
    figures = json.loads((report / "lpl.json").read_text())
    assert set(figures["runs"]) == {"eps-pretrain", "eps-baseline-0", "eps-lpl-0"}
    base, lpl = figures["runs"]["eps-baseline-0"], figures["runs"]["eps-lpl-0"]
    by_metric = {d["metric"]: d for d in figures["differences"]}
    assert set(by_metric) == {metric.name for metric in METRICS}
    assert by_metric["frechet"]["by_seed"] == [lpl["frechet"] - base["frechet"]]
    assert lpl["summary"]["phases"][0]["losses_last"]["lpl"] > 0
    assert "lpl" not in base["summary"]["phases"][0]["losses_last"]
    for name in ("metrics.png", "spectra.png", "estimates.png", "rivals.png", "samples_ddpm_eps.png"):
        assert f"lpl/{name}" in page
        Image.open(report / "lpl" / name).verify()

    samples = {
        name: read_arrays(out / "evaluations" / f"{name}.npz")["pixels"] for name in ("eps-baseline-0", "eps-lpl-0")
    }
    assert samples["eps-lpl-0"].shape == (12, 64, 64, 3)
    made = {path: path.stat().st_mtime_ns for path in [*out.glob("evaluations/*"), *out.glob("runs/*/summary.json")]}
    second = run()
    assert second.returncode == 0, second.stdout + second.stderr
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what is done is not done again"
    again = json.loads((report / "lpl.json").read_text())
    assert {key: again[key] for key in ("runs", "reference")} == {key: figures[key] for key in ("runs", "reference")}
    assert not again["missing"], "the rival is not of this command"


@pytest.mark.shared
@pytest.mark.long
def test_the_smallest_table_of_the_paper(tmp_path: Path, shared_dir: Path) -> None:
    """Runs, looks at them by `loupe evaluate run`, at a checkpoint and with an EMA chosen afterwards; pages; and not again."""
    out, report = tmp_path / "out", tmp_path / "report"
    weights = shared_dir / "data/efficientnet_lite0/efficientnet-lite0-57934424.pth"
    command = [
        sys.executable, "-m", "launch.cli", "experiment", "paper", "table7", "figure18", "figure10", "--smoke", "--seeds", "1",
        "--network", f"efficientnet_lite0={weights}", "--out", str(out), "--report", str(report),
    ]  # fmt: skip

    def run() -> None:
        done = subprocess.run(command, cwd=CODE_ROOT, capture_output=True, text=True, check=False, timeout=1500)
        assert done.returncode == 0, done.stdout + done.stderr

    run()
    for name in ("table7", "figure18", "figure10"):
        page = (report / f"{name}.md").read_text()
        assert "Not there" not in page
        assert "A smoke test" in page
        Image.open(report / f"{name}.png").verify()
    figures = json.loads((report / "table7.json").read_text())
    looks = [look for point in figures["points"] for look in point["looks"].values()]
    assert len(looks) == 2
    assert all(look["figures"]["fid"] > 0 and len(look["log_power"]["real"]) == 32 for look in looks)
    made = {
        path: path.stat().st_mtime_ns for path in [*out.glob("evaluations/*/*.json"), *out.glob("runs/*/summary.json")]
    }
    assert len(made) == 5 + 2 + 2 + 10
    run()
    assert {path: path.stat().st_mtime_ns for path in made} == made, "what is done is not done again"
