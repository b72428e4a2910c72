"""The autoencoder experiment's page of figures that are made up here: every number on it is one of them, or follows."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from trainer.config_text import to_yaml
from trainer.errors import UserError
from trainer.experiments.autoencoder_report import _page
from trainer.experiments.autoencoder_results import Results
from trainer.recipes.autoencoder_experiment import BY_NAME, FULL, Photos, config_of

NAMES = ("kl", "vq", "all", "all_again", "no_l1", "no_lpips", "vq_all", "vq_no_commitment")
DONE = {
    "kl": 24.0,
    "vq": 22.0,
    "all": 20.0,
    "all_again": 20.125,
    "no_l1": 18.5,
    "vq_all": 17.0,
    "vq_no_commitment": 16.75,
}
BASELINES = {"kl_8bit": 23.75, "thumbnail_kl": 21.5, "webp_kl": 22.25, "thumbnail_vq": 19.0, "webp_vq": 19.5}
"""PSNR; other figures follow from it."""


def evaluation(psnr_db: float, **more: object) -> dict[str, Any]:
    book = {"usage": 0.5, "perplexity": 12.0, "num_codes": 1024}
    return {
        "psnr_db": psnr_db, "ssim": psnr_db / 100, "lpips": 1 - psnr_db / 100, "frechet": 300 - psnr_db, "codebook": book,
        "latents": {"mean": [0.0] * 4, "std": [1.0, 2.0, 0.5, 1.5], "shift_factor": 0.0, "scaling_factor": 0.9},
        "outliers": {"mid": 0.001, "up0": 0.02, "up3": 0.0005}, "count": 96,
        "images": {"url": "/home/someone/photos"}, "settings": {"lpips_weights": "/home/someone/w.pth"}, **more,
    }  # fmt: skip


def write(path: Path, tree: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    photos = Photos(str(tmp_path / "data"), {"few": 100, "many": 2500}, 96)
    write(tmp_path / "data/split.json", {"heldout": 96, "train": {"few": {"images": 100}}, "twins": 1})
    rows = [{"name": n, "label": BY_NAME[n].label, "group": BY_NAME[n].group, "seed": BY_NAME[n].seed} for n in NAMES]
    write(tmp_path / "experiment.json", {"size": asdict(FULL), "runs": rows})
    write(tmp_path / "failures.json", {"no_lpips": "training ended with code 93"})
    (tmp_path / "configs").mkdir()
    for name in NAMES:
        config = config_of(BY_NAME[name], FULL, photos, lpips_weights="w.pth", exports="exports")
        (tmp_path / "configs" / f"{name}.yaml").write_text(to_yaml(config))
    for name, psnr_db in DONE.items():
        write(tmp_path / "evaluations" / name / "evaluation.json", evaluation(psnr_db))
        phases = [{"losses_first": {"loss": 1.0}, "losses_last": {"loss": 0.5}}]
        summary = {"steps": 700, "wall_s": 600.0, "images_per_s": 10.0, "restarts": 0, "phases": phases}
        write(
            tmp_path / "runs" / name / "summary.json", {**summary, "evaluation": {"dataset": "/home/someone/heldout"}}
        )
    for name, psnr_db in BASELINES.items():
        more = {
            "bits": 7776 if name == "thumbnail_kl" else 2000,
            "budget": 8192,
            "clamped_share": 0.0125,
            "too_large": 0,
        }
        side = {"side": 18} if "thumbnail" in name else {}
        write(tmp_path / "evaluations" / name / "evaluation.json", evaluation(psnr_db, **more, **side))
    return tmp_path


def test_differences_are_to_the_first_of_the_group(folder: Path) -> None:
    results = Results(folder)
    found = results.figures()["differences"]
    assert found["no_l1"] == pytest.approx({"psnr_db": -1.5, "ssim": -0.015, "lpips": 0.015, "frechet": 1.5})
    assert found["vq_no_commitment"]["psnr_db"] == -0.25
    assert set(found) == {"all_again", "no_l1", "vq_no_commitment"}, (
        "nothing is compared with itself, or with a lost run"
    )
    assert results.missing == {"no_lpips": "training ended with code 93", "ceiling": "not run yet"}


def test_the_page_has_these_figures(folder: Path) -> None:
    page = "\n".join(_page(Results(folder), {}))
    for line in (
        "- **KL, in 8 bits**: 23.75 dB after 10.0 minutes; +2.25 dB and LPIPS -0.0225 against an enlarged thumbnail, +1.50 dB "
        "and LPIPS -0.0150 against WebP.",
        "- **VQ**: 22.00 dB after 10.0 minutes; +3.00 dB",
        "| KL, latents as they are | 1024 | floats | 24.00 | 0.2400 | 0.7600 | 276.0 | 10.0 |",
        "| KL, latents in 8 bits | 1024 | 8192 | 23.75 |",
        "| thumbnail of at most these bits, enlarged | 972 (18 px) | 7776 | 21.50 |",
        "| VQ | 256 codes | 2560 | 22.00 |",
        "1.25% of values were clamped",
        "| without L1 | 18.50<br>-1.50 | 0.1850<br>-0.0150 | 0.8150<br>+0.0150 | 281.5<br>+1.5 | 0.50 to 2.00 | up0 2.00% |",
        "| VQ, all terms | 17.00 | 0.1700 | 0.8300 | 283.0 | 50.0% of 1024 | 12.0 | 10.0 |",
        "what a seed alone changes is in the row of another seed",
        "- `no_lpips`: training ended with code 93",
        f"{FULL.steps - int(FULL.steps * FULL.settle_share)} steps of {FULL.batch_size} images at 128 px",
    ):
        assert line in page, line
    assert "without LPIPS |" not in page


def test_figures_name_no_folder_of_the_machine(folder: Path) -> None:
    assert "/home/someone" not in json.dumps(Results(folder).figures())


def test_an_empty_folder_is_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `loupe experiment autoencoder` first"):
        Results(tmp_path)
