"""The paper's tables and figures as experiments: which trainings they share, and the pages that come of results."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import RunConfig
from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.experiments.paper_report import write_pages
from trainer.experiments.paper_results import PaperResults, baseline_of
from trainer.recipes.paper_exhibits import EXHIBITS, Look, table3
from trainer.recipes.paper_trainings import FULL, SMALL, SMOKE, Scale, Training, planned


@pytest.mark.parametrize("scale", [SMALL, SMOKE, FULL], ids=lambda scale: scale.label)
def test_trainings_of_one_name_are_one_training(scale: Scale) -> None:
    """Or a run would stand for another in a table."""
    configs: dict[str, RunConfig] = {}
    looks: dict[str, Look] = {}
    for make in EXHIBITS.values():
        for look in make(scale).looks():
            assert looks.setdefault(look.name, look) == look
            *before, own = planned(scale, look.training, look.seed, "runs")
            assert own.name == look.run
            assert own.after == (before[0].name if before else None)
            assert (own.config.init_from is None) == look.training.scratch
            for run in (*before, own):
                assert configs.setdefault(run.name, run.config) == run.config, run.name
    texts = {to_yaml(config).replace(name, "") for name, config in configs.items()}
    assert len(texts) == len(configs), "two names for one training"


@pytest.mark.parametrize("scale", [SMALL, FULL], ids=lambda scale: scale.label)
def test_a_training_differs_by_what_it_names(scale: Scale) -> None:
    def config(training: Training) -> list[str]:
        return to_yaml(planned(scale, training, 0, "runs")[-1].config).splitlines()

    def differing(a: Training, b: Training) -> set[str]:
        return {line.strip() for line in set(config(a)) ^ set(config(b)) if not line.startswith("name:")}

    assert {"tau: 3.0", "tau: 6.0"} <= differing(Training("lpl"), Training("lpl", tau=6.0))
    assert len(differing(Training("lpl"), Training("lpl", tau=6.0))) == 2
    assert any(line.startswith("num_maps: 2") for line in differing(Training("lpl"), Training("lpl", num_maps=2)))
    assert "weighting: min_snr" in differing(Training(), Training("min_snr"))


def test_every_loss_has_its_baseline() -> None:
    for name, make in EXHIBITS.items():
        exhibit = make(SMALL)
        for point in exhibit.points:
            if point.looks and point.looks[0].training.loss != "plain":
                base = baseline_of(exhibit, point)
                assert base is not None, f"{name}: {point.label}"
                assert base.looks[0].training.loss == "plain"


def write_results(folder: Path, names: list[str], fid: dict[str, list[float]]) -> None:
    """As runs and evaluations leave them: of each training its Fréchet distances by seed; NaN: not there."""
    folder.mkdir(exist_ok=True)
    (folder / "experiment.json").write_text(json.dumps({"scale": asdict(SMALL), "networks": ["efficientnet_lite0=/x"]}))
    for name in names:
        for look in EXHIBITS[name](SMALL).looks():
            value = fid.get(look.training.name, [90.0, 91.0, 92.0])[look.seed]
            if math.isnan(value):
                continue
            figures = {
                f"{metric}_efficientnet_lite0": {"metric": metric, "network": "efficientnet_lite0", "value": number}
                for metric, number in (
                    ("fid", value),
                    ("coverage", 0.5),
                    ("density", 1.0),
                    ("precision", 0.6),
                    ("recall", 0.4),
                )
            }
            for band in ("spectrum", "spectrum_low", "spectrum_mid", "spectrum_high"):
                figures[band] = {"metric": "spectrum", "value": value / 100}
            real = np.linspace(5.0, 1.0, 32)
            tree = {"figures": figures, "generated": {"used": 256},
                    "log_power": {"generated": (real + value / 100).tolist(), "real": real.tolist()}}  # fmt: skip
            of_look, of_run = folder / "evaluations" / look.name, folder / "runs" / look.run
            of_look.mkdir(parents=True, exist_ok=True)
            of_run.mkdir(parents=True, exist_ok=True)
            (of_look / "evaluation.json").write_text(json.dumps(tree))
            loss = {"denoising": 0.8, "loss": 0.8 if look.training.loss == "plain" else 1.0}
            if look.training.loss == "min_snr":
                loss |= {"denoising_weighted": 0.5, "loss": 0.5}
            (of_run / "summary.json").write_text(json.dumps({"phases": [{"losses_last": loss}]}))


def test_the_page_of_a_table(tmp_path: Path) -> None:
    """Pairs of equal seed, the paper's figures beside ours, and what is missing is named and counted nowhere."""
    lower = [88.0, 89.1, 90.2]
    write_results(tmp_path, ["table3"], {"eps-lpl": lower, "v-lpl": [95.0, math.nan, 97.0], "flow-lpl": [math.nan] * 3})
    page = write_pages(tmp_path, tmp_path / "report", ["table3"])[0].read_text()
    rows = {
        tuple(cells[1:3]): cells for line in page.splitlines() if (cells := [c.strip() for c in line.split("|")])[2:]
    }
    assert rows["DDPM-eps", "no"][3:5] == ["91.0 ± 1.0", "4.88"]
    assert rows["DDPM-eps", "yes"][3:5] == ["89.1 ± 1.1<br>**-1.9 ± 0.1**", "3.79"]
    assert rows["DDPM-eps", "yes"][-2] == "20%"
    assert rows["DDPM-eps", "no"][-2] == "-"
    assert rows["DDPM-v", "yes"][3] == "96.0 ± 1.4<br>**+5.0 ± 0.0**"
    assert rows["Flow-OT", "yes"][3:5] == ["-", "3.61"]
    assert "better: DDPM-eps; worse: DDPM-v; not told apart: none" in page
    assert "- `v-lpl-1-ddim15-guidance2`: not run yet" in page
    assert page.count("`flow-lpl-") == 3
    assert "**not FID**" in page
    Image.open(tmp_path / "report" / "table3.png").verify()
    figures = json.loads((tmp_path / "report" / "table3.json").read_text())
    assert figures["points"][1]["looks"]["eps-lpl-0-ddim15-guidance2"]["figures"]["fid"] == 88.0


def test_the_losss_share_is_said_to_be_what_it_is(tmp_path: Path) -> None:
    """Of min-SNR, whose loss is the denoising term in other weights, there is none."""
    write_results(tmp_path, ["table6"], {})
    page = write_pages(tmp_path, tmp_path / "report", ["table6"])[0].read_text()
    rows = {cells[1]: cells for line in page.splitlines() if (cells := [c.strip() for c in line.split("|")])[2:]}
    assert [rows[label][-2] for label in ("baseline", "min-SNR", "LPL")] == ["-", "-", "20%"]
    assert "*Loss's share*: of the whole loss, what is not the denoising term" in page


def test_more_is_better_where_it_is(tmp_path: Path) -> None:
    write_results(tmp_path, ["table3"], {})
    for seed in range(3):
        path = tmp_path / f"evaluations/eps-lpl-{seed}-ddim15-guidance2/evaluation.json"
        tree = json.loads(path.read_text())
        tree["figures"]["coverage_efficientnet_lite0"]["value"] = 0.6 + 0.001 * seed
        path.write_text(json.dumps(tree))
    exhibit = table3(SMALL)
    compared = PaperResults(tmp_path).compared(exhibit, exhibit.points[1], "coverage")
    assert compared is not None
    assert compared.verdict == "better"


@pytest.mark.parametrize("name", ["table2", "table9", "figure4", "figure5", "figure7", "figure9", "figure18"])
def test_every_page_can_be_written(tmp_path: Path, name: str) -> None:
    write_results(tmp_path, [name], {"eps-lpl": [80.0, 80.5, 81.0]})
    page = write_pages(tmp_path, tmp_path / "report", [name])[0].read_text()
    assert "Not there" not in page
    Image.open(tmp_path / "report" / f"{name}.png").verify()


def test_no_experiment_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experiment of the paper"):
        PaperResults(tmp_path)
    (tmp_path / "experiment.json").write_text(json.dumps({"size": {}, "features_weights": "x"}))
    with pytest.raises(UserError, match="another experiment"):
        PaperResults(tmp_path)
