"""What a stage 1 run reads is asked for before it is submitted: every file that is not there is named."""

import re
from pathlib import Path

import pytest

from launch.job import JobSpec, check, load_config
from trainer.errors import UserError

DATA, LPIPS, TEACHER, INIT = "data.datasets.images.url", "task.lpips.url", "task.teacher.url", "init_from.url"
OF_IMAGE_SPACE, OF_EVALUATION = "task.image_space.lpips.url", "reconstructions.lpips.url"


def _spec(folder: Path) -> JobSpec:
    return JobSpec("a recipe", str(folder), "local", gpus_per_node=8, cpu=True, code_dir=str(folder / "code"))


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        ("autoencoder_kl_f8", [DATA, LPIPS]),
        ("autoencoder_vq_f16", [DATA, LPIPS]),
        ("autoencoder_decoder", [DATA, LPIPS, INIT]),
        ("autoencoder_asymmetric", [DATA, LPIPS, INIT]),
        ("autoencoder_light_decoder", [DATA, LPIPS, TEACHER, INIT]),
        ("autoencoder_encoder", [DATA, LPIPS, TEACHER, OF_IMAGE_SPACE, INIT]),
        ("autoencoder_second_stage", [DATA, TEACHER, OF_IMAGE_SPACE, OF_EVALUATION]),
        ("photos_autoencoder", ["data.datasets.photos.url", LPIPS, "reconstructions.dataset.url"]),
        ("demo_autoencoder", [LPIPS]),
    ],
)
def test_names_all_that_is_missing(
    recipe: str, needs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(recipe, [])
    with pytest.raises(UserError) as refused:
        check(_spec(tmp_path), config)
    assert re.findall(r"(?:^|; also )([a-z0-9_.]+)", str(refused.value)) == needs


def test_weights_and_features_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths become absolute ones, as a job may be started again from elsewhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("heads.pth", "lpips.pth"):
        (tmp_path / name).write_bytes(b"")
    overrides = [
        "task.lpips.url=lpips.pth", "task.lpips.heads_url=heads.pth", "reconstructions.features_url=features.pth"
    ]  # fmt: skip
    config = load_config("demo_autoencoder", overrides)
    assert config.task.kind == "autoencoder"
    assert config.task.lpips is not None
    assert config.task.lpips.heads_url == str(tmp_path / "heads.pth")
    with pytest.raises(UserError, match=rf"^reconstructions\.features_url: no {tmp_path}/features\.pth; [^;]*$"):
        check(_spec(tmp_path), config)
    (tmp_path / "features.pth").write_bytes(b"")
    check(_spec(tmp_path), config)


def test_a_run_in_the_place_of_its_export(tmp_path: Path) -> None:
    """The natural slip on the way to stage 2."""
    (tmp_path / "config.yaml").write_text("name: mine\n")
    config = load_config("demo", [f"task.codec.url={tmp_path}"])
    with pytest.raises(UserError, match=rf"^task\.codec\.url: {tmp_path} is a run; `loupe export {tmp_path} FOLDER`"):
        check(_spec(tmp_path), config)
