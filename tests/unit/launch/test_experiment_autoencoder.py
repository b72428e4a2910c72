"""The plan of the autoencoder experiment, and what its command refuses."""

from pathlib import Path

import pytest

from launch.cli import cli
from launch.entry import run_command
from launch.experiments.autoencoder import _jobs
from trainer.config import AutoencoderConfig, RunConfig, VQModelConfig
from trainer.recipes.autoencoder_experiment import FULL, VARIANTS, Photos, chosen, config_of

PHOTOS = Photos("/out/data", {"few": 100, "many": 2500}, 96)


def configs() -> dict[str, RunConfig]:
    return {v.name: config_of(v, FULL, PHOTOS, lpips_weights="lpips.pth", exports="/out/exports") for v in VARIANTS}


def task_of(config: RunConfig) -> AutoencoderConfig:
    assert isinstance(config.task, AutoencoderConfig)
    return config.task


def test_a_short_run_differs_from_all_terms_by_its_term_alone() -> None:
    runs = configs()
    for group, first in (("ablation", "all"), ("codebook", "vq_all")):
        base = runs[first].model_dump()
        found = {}
        for variant in VARIANTS:
            if variant.group == group and variant.name != first:
                tree = runs[variant.name].model_dump()
                found[variant.name] = _differences(base, tree)
                assert tree.pop("name") != base["name"]
        if group == "ablation":
            assert found == {
                "all_again": {"seed"}, "no_l1": {"task.pixel_weight"}, "no_lpips": {"task.lpips"},
                "no_discriminator": {"task.discriminator"}, "no_kl": {"task.kl_weight"},
                "outliers": {"task.outliers"}, "equivariance": {"task.equivariance"},
            }  # fmt: skip
        else:
            book = "task.model.codebook."
            assert found == {
                "vq_no_commitment": {f"{book}commitment_weight"}, "vq_no_restart": {f"{book}restart_below"},
                "vq_gradient": {f"{book}restart_below", f"{book}update"},
            }  # fmt: skip
    assert task_of(runs["no_l1"]).pixel_weight == task_of(runs["no_kl"]).kl_weight == 0.0
    assert task_of(runs["no_lpips"]).lpips is None
    assert task_of(runs["no_discriminator"]).discriminator is None


def _differences(a: object, b: object, path: str = "") -> set[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        inner = {key: _differences(a.get(key), b.get(key), f"{path}.{key}" if path else key) for key in a | b}
        return set().union(*inner.values()) - {"name"}
    return set() if a == b else {path}


def test_the_long_runs_are_what_the_report_says() -> None:
    runs = configs()
    kl, vq = task_of(runs["kl"]), task_of(runs["vq"])
    assert kl.model.kind == "kl"
    assert isinstance(vq.model, VQModelConfig)
    assert vq.model.codebook.size == 1024
    for config, task in ((runs["kl"], kl), (runs["vq"], vq)):
        assert (task.model.downsampling, task.model.latent_channels) == (8, 4)
        steps = sum(phase.steps for phase in config.phases)
        assert task.discriminator
        assert 0 < task.discriminator.start_step < steps
        assert config.phases[-1].resolution == 128
        assert config.phases[0].data_mix == {"few": 10.0, "many": 50.0}
        assert config.reconstructions
        assert config.reconstructions.dataset
        assert config.reconstructions.dataset.url == "/out/data/heldout"
        assert "/out/data/heldout" not in {d.url for d in config.data.datasets.values()}
    short = task_of(runs["all"]).discriminator
    assert short
    assert 0 < short.start_step < sum(phase.steps for phase in runs["all"].phases)
    lpl = runs["lpl"]
    assert lpl.task.kind == "latent_diffusion"
    assert lpl.task.codec.url == "/out/exports/kl"
    assert lpl.phases[0].perceptual


def test_lpl_waits_for_the_model_it_runs_on(tmp_path: Path) -> None:
    weights = {"lpips_weights": "lpips.pth", "features_weights": "features.pth"}
    jobs = {job.name: job for job in _jobs(tmp_path, chosen(()), configs(), FULL, PHOTOS, weights, with_ceiling=True)}
    assert set(jobs) == {*(v.name for v in VARIANTS), "kl_measures", "baselines"}
    assert jobs["lpl"].after == jobs["kl_measures"].after == ("kl",)
    assert [stage.name for stage in jobs["lpl"].stages] == ["training"]
    assert [stage.name for stage in jobs["kl"].stages] == ["training", "export", "evaluation"]
    command = jobs["baselines"].stages[0].command
    assert not callable(command)
    assert command[-1] == "ceiling"
    assert (jobs["kl"].cores, jobs["vq"].cores, jobs["no_l1"].cores) == (FULL.threads, FULL.threads, 1)
    assert [variant.name for variant in chosen(("lpl",))] == ["kl", "lpl"], "it brings what it needs"


def command(*arguments: str) -> int:
    return run_command(cli, ["experiment", "autoencoder", *arguments], prog_name="loupe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "error: --features-weights: give a file with EfficientNet-Lite0's weights"),
        (("--features-weights", "WEIGHTS"), "error: --lpips-weights: give a file with shift-tolerant LPIPS's weights"),
        (("--features-weights", "WEIGHTS", "--lpips-weights", "WEIGHTS"), "error: --photos: give a folder of photos"),
        (("--features-weights", "WEIGHTS", "--lpips-weights", "WEIGHTS", "--photos", "none"),
         "error: --photos none: no such folder"),
        (("--only", "no_li"), "error: --only no_li: no such run; did you mean 'no_l1'?"),
        (("--report-only",), "experiment: no experiment with results; run `loupe experiment autoencoder` first"),
    ],
)  # fmt: skip
def test_what_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    weights = tmp_path / "weights.pth"
    weights.touch()
    given = [str(weights) if argument == "WEIGHTS" else argument for argument in arguments]
    assert command("--out", str(tmp_path / "experiment"), *given) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "experiment").exists(), "nothing is made for a command that is refused"


def test_the_plan_is_told_and_nothing_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", str(tmp_path / "experiment"), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "to start them, give --features-weights and --lpips-weights and --photos" in out
    assert "ceiling            left out: it needs --ceiling-codec" in out
    assert f"{len(VARIANTS)} runs, about" in out
    assert not (tmp_path / "experiment").exists()
