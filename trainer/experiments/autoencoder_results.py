"""The figures of the autoencoder experiment, gathered from its folder."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import RunConfig
from trainer.config_text import from_yaml
from trainer.errors import UserError
from trainer.experiments.results import read_json
from trainer.recipes.autoencoder_experiment import ABLATION, KL, LPL, VQ, VQ_ABLATION

ROWS = {
    "kl": "KL, latents as they are",
    "kl_8bit": "KL, latents in 8 bits",
    "thumbnail_kl": "thumbnail of at most these bits, enlarged",
    "webp_kl": "WebP of at most these bits",
    "vq": "VQ",
    "thumbnail_vq": "thumbnail of at most these bits, enlarged",
    "webp_vq": "WebP of at most these bits",
    "ceiling": "pre-trained autoencoder (ceiling)",
}
"""Of the first table, in its order."""
MODELS = {"kl": "KL", "kl_8bit": "KL, 8 bits", "thumbnail_kl": "thumbnail, KL's bits", "webp_kl": "WebP, KL's bits",
          "vq": "VQ", "thumbnail_vq": "thumbnail, VQ's bits", "webp_vq": "WebP, VQ's bits",
          "ceiling": "pre-trained"}  # fmt: skip
"""What the picture calls them."""
METRICS = {"psnr_db": ("PSNR, dB", 2), "ssim": ("SSIM", 4), "lpips": ("LPIPS", 4), "frechet": ("Fréchet", 1)}
"""Of an evaluation: what tables call it, and its digits."""
FIRST_OF = {"ablation": ABLATION, "codebook": VQ_ABLATION}
"""The run that the others of a group are compared with."""


@dataclass(frozen=True)
class Run:
    """One that is done."""

    name: str
    label: str
    group: str
    seed: int
    summary: dict[str, Any]
    evaluation: dict[str, Any] | None
    """None of latent diffusion."""
    records: list[dict[str, Any]] = field(repr=False)
    """Of its metrics, by step."""
    evaluations: list[dict[str, Any]] = field(repr=False)
    """While it trained, by step."""

    @property
    def minutes(self) -> float:
        return float(self.summary["wall_s"]) / 60

    @property
    def last_losses(self) -> dict[str, float]:
        losses: dict[str, float] = self.summary["phases"][-1]["losses_last"]
        return losses

    def worst_map(self) -> tuple[str, float]:
        """The decoder map with the largest share of masked pixels."""
        assert self.evaluation is not None
        name, share = max(self.evaluation["outliers"].items(), key=lambda item: item[1])
        return str(name), float(share)


class Results:
    def __init__(self, folder: Path) -> None:
        """Raises:
        UserError: the folder holds no experiment, or one without a single result.
        """
        if not (folder / "experiment.json").exists() or not (folder / "data/split.json").exists():
            raise UserError(f"{folder}: no experiment with results; run `loupe experiment autoencoder` first")
        plan = read_json(folder / "experiment.json")
        self.folder, self.size = folder, plan["size"]
        self.split = read_json(folder / "data/split.json")
        failures: dict[str, str] = _read_if(folder / "failures.json") or {}
        self.configs: dict[str, RunConfig] = {}
        """Of all runs that there should be."""
        self.runs: dict[str, Run] = {}
        self.missing: dict[str, str] = {}
        """Why a run or a baseline is not there, by its name."""
        for row in plan["runs"]:
            file = folder / "configs" / f"{row['name']}.yaml"
            self.configs[row["name"]] = from_yaml(file.read_text(encoding="utf-8"), source=str(file))
            run = _run(folder, row)
            if run is None:
                self.missing[row["name"]] = failures.get(row["name"], "not run yet")
            else:
                self.runs[run.name] = run
        self.baselines: dict[str, dict[str, Any]] = {}
        for name in ROWS:
            found = _read_if(folder / "evaluations" / name / "evaluation.json") if name not in self.runs else None
            if found is not None and name not in (KL, VQ):
                self.baselines[name] = found
            elif name not in self.runs and name not in self.missing:
                self.missing[name] = _why(name, failures)
        self.maps: dict[str, Any] | None = _read_if(folder / "analysis" / KL / "analysis.json")
        if not self.runs and not self.baselines:
            raise UserError(f"{folder}: nothing is done yet; run `loupe experiment autoencoder` first")

    def evaluation(self, name: str) -> dict[str, Any] | None:
        """Of a run or a baseline."""
        run = self.runs.get(name)
        return run.evaluation if run else self.baselines.get(name)

    def of(self, group: str) -> list[Run]:
        return [run for run in self.runs.values() if run.group == group]

    def lpl(self) -> Run | None:
        return self.runs.get(LPL)

    def difference(self, run: Run, metric: str) -> float | None:
        """To the first run of its group."""
        first = self.runs.get(FIRST_OF[run.group])
        if first is None or first is run or not (run.evaluation and first.evaluation):
            return None
        return float(run.evaluation[metric] - first.evaluation[metric])

    def figures(self) -> dict[str, Any]:
        """All, fit for JSON, without the paths of the machine."""
        return {
            "size": self.size,
            "photos": self.split,
            "runs": {
                run.name: {
                    "label": run.label, "group": run.group, "seed": run.seed, "summary": _without_paths(run.summary),
                    "evaluation": _without_paths(run.evaluation),
                    "while_training": [_without_paths(found) for found in run.evaluations],
                }
                for run in self.runs.values()
            },
            "baselines": {name: _without_paths(found) for name, found in self.baselines.items()},
            "differences": {
                run.name: {metric: self.difference(run, metric) for metric in METRICS}
                for group, first in FIRST_OF.items() for run in self.of(group) if first in self.runs and run.name != first
            },
            "decoder_maps": self.maps and self.maps["outliers"]["maps"],
            "missing": self.missing,
        }  # fmt: skip


def _why(name: str, failures: dict[str, str]) -> str:
    job = "kl_measures" if name == "kl_8bit" else "baselines"
    return failures.get(job) or failures.get(f"*-{name}") or "not run yet"


def _run(folder: Path, row: dict[str, Any]) -> Run | None:
    run_dir, name = folder / "runs" / row["name"], row["name"]
    summary = _read_if(run_dir / "summary.json")
    evaluation = _read_if(folder / "evaluations" / name / "evaluation.json")
    if summary is None or (evaluation is None and row["group"] != "lpl"):
        return None
    records: dict[int, dict[str, Any]] = {}
    for path in sorted((run_dir / "metrics").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if (
                "step" in record and "loss" in record
            ):  # a later attempt repeats steps; its records are the ones that count
                records[record["step"]] = record
    # the last one is in two files where it was due anyway
    evaluations = {e["step"]: e for e in map(read_json, (run_dir / "evaluation").glob("*.json"))}
    return Run(
        name, row["label"], row["group"], row["seed"], summary, evaluation, [records[step] for step in sorted(records)],
        [evaluations[step] for step in sorted(evaluations)],
    )  # fmt: skip


def _read_if(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None


def _without_paths(tree: dict[str, Any] | None) -> dict[str, Any] | None:
    """Images, settings and codec name files of the machine; a summary's evaluation is among those while training; meanings
    are the same in all."""
    return tree and {key: value for key, value in tree.items() if key not in _LEFT_OUT}


_LEFT_OUT = ("images", "dataset", "settings", "codec", "evaluation", "meaning")
