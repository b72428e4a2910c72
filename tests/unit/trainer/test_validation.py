"""Validation at fixed noise levels: what it measures, computed again by hand; which images; what it says of bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import draws
from data.images import read_image
from data.reader import StorageError, open_dataset
from data.transforms import training_image
from tests.tiny import tiny
from trainer.config import RunConfig, resolve_url
from trainer.config_text import with_overrides
from trainer.errors import UserError
from trainer.evaluate.validation import Validated, Validation
from trainer.parallel.world import World
from trainer.tasks.latent_diffusion import LatentDiffusionTask

EMOJI = "repo://data/assets/emoji_64"
DDPM = ("task.paradigm={kind: ddpm_eps, shift_base_px: 32}",)


def config(*overrides: str, count: int = 5, batch: int = 4, more: str = "") -> RunConfig:
    return tiny(
        f"validation={{every_steps: 2, count: {count}, batch_size: {batch}, levels: 3, resolution: 32, seed: 7{more}}}",
        *overrides,
    )


def task_of(run: RunConfig) -> LatentDiffusionTask:
    task = LatentDiffusionTask(run, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.module.parameters():  # a fresh model predicts zeros
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    task.module.eval()
    return task


def own(run: RunConfig) -> list[Any]:
    return [
        open_dataset(resolve_url(EMOJI), name="emoji", max_samples=next(iter(run.data.datasets.values())).max_samples)
    ]


def measured(run: RunConfig, world: World, phase: int = 0, task: LatentDiffusionTask | None = None) -> Validated:
    return Validation(run, task or task_of(run), world, own(run)).measure(run.phases[phase])


@torch.no_grad()
def by_hand(run: RunConfig, level: int, row: int) -> tuple[float, float]:
    """Denoising loss and, of the perceptual phase, LPL of one image of the run's own; from what the docs say."""
    task, number, levels = task_of(run), row, 3
    sample = own(run)[0].read(row)
    pixels = training_image(read_image(sample.image, min_side=32), 32).astype(np.float32)
    z0 = task.codec.encode(torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1)[None])
    seed = int(draws.raw(7, "validation", 0, count=1)[0])
    generator = torch.Generator().manual_seed(int(draws.raw(seed, "noise", number * levels + level, count=1)[0]))
    noise = torch.randn(z0.shape[1:], generator=generator)[None]
    text = task.text.prepare([sample.texts[0]])
    if run.task.paradigm.kind == "flow":  # type: ignore[union-attr]
        t = (level + 0.5) / levels
        zt, time = (1 - t) * z0 + t * noise, 1000 * t
        prediction = task.module(zt, torch.tensor([time]), text)
        target, z0_hat = noise - z0, zt - t * prediction
    else:
        step = int((level + 0.5) / levels * 1000)
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        abar = np.cumprod(1 - betas)[step]  # at the base resolution nothing is shifted
        zt = abar**0.5 * z0 + (1 - abar) ** 0.5 * noise
        prediction = task.module(zt.float(), torch.tensor([float(step)]), text)
        target, z0_hat = noise, (zt - (1 - abar) ** 0.5 * prediction) / abar**0.5
    assert task.perceptual is not None
    loss: Any = task.perceptual
    lpl = loss.of_features(loss.decoder(z0_hat.float()), loss.decoder(z0))[0]
    return float((prediction - target).square().mean()), float(lpl)


@pytest.mark.parametrize("paradigm", [(), DDPM], ids=["flow", "ddpm"])
@pytest.mark.parametrize("level", [0, 2])
def test_a_levels_loss_by_hand(alone: World, paradigm: tuple[str, ...], level: int) -> None:
    run = config(*paradigm, count=2)
    found = measured(run, alone, phase=2)
    expected = np.array([by_hand(run, level, row) for row in range(2)])
    for term, values in zip(("denoising", "lpl"), expected.T, strict=True):
        losses = found.terms[term]
        assert losses.means[level] == pytest.approx(values.mean(), rel=2e-5), term
        assert losses.errors[level] == pytest.approx(values.std(ddof=1) / 2**0.5, rel=1e-3)
    assert set(measured(run, alone).terms) == {"denoising"}, "where the phase has no perceptual loss there is none"
    assert found.numbers["times"] == pytest.approx([1000 / 6, 500, 5000 / 6], abs=1)


def test_the_same_twice_and_for_any_size_of_a_pass(alone: World) -> None:
    run = config()
    task = task_of(run)
    first, again = measured(run, alone, task=task), measured(run, alone, task=task)
    assert first.terms == again.terms
    for batch in (1, 2, 7):
        other = measured(config(batch=batch), alone, task=task)
        assert other.terms["denoising"].means == pytest.approx(first.terms["denoising"].means, rel=1e-5)
    seeds = measured(with_overrides(run, ["validation.seed=8"]), alone, task=task)
    assert seeds.terms["denoising"].means != pytest.approx(first.terms["denoising"].means, rel=1e-3)


def test_an_estimated_loss_is_measured_whole_and_its_estimates_stay(alone: World) -> None:
    sampled = config("task.perceptual.sampled={samples_per_rank: 1, whole_maps: 1}")
    task, plain = task_of(sampled), task_of(config())
    assert task.perceptual is not None
    before = {name: tensor.clone() for name, tensor in task.state_tensors().items()}
    assert before
    found = measured(sampled, alone, phase=2, task=task)
    assert found.terms["lpl"].means == pytest.approx(measured(config(), alone, phase=2, task=plain).terms["lpl"].means)
    assert all(torch.equal(before[name], tensor) for name, tensor in task.state_tensors().items())


def test_of_held_out_images_they_are_spread_evenly(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    for more, expected in (
        ("", [0, 1, 2, 3, 4]),
        (f", dataset: {{url: {EMOJI}, max_samples: 50}}", [0, 10, 20, 30, 40]),
    ):
        run = config(more=more)
        validation = Validation(run, task_of(run), alone, own(run))
        read = validation._dataset.read
        rows.clear()
        monkeypatch.setattr(validation._dataset, "read", lambda row, read=read: read(rows.append(row) or row))  # type: ignore[func-returns-value]
        validation.measure(run.phases[0])
        assert rows == expected


def test_unreadable_images_are_left_out_and_named(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    task = task_of(run)
    validation = Validation(run, task, alone, own(run))
    whole, read = validation.measure(run.phases[0]), validation._dataset.read

    def damaged(row: int) -> Any:
        sample = read(row)
        return sample if row != 1 else type(sample)(sample.key, b"no image", sample.captions, sample.label)

    monkeypatch.setattr(validation._dataset, "read", damaged)
    found = validation.measure(run.phases[0])
    assert (found.about["images"], whole.about["images"]) == (4, 5)
    [skipped] = found.about["skipped"]
    assert skipped["sample"] == 1
    assert found.terms["denoising"].means != whole.terms["denoising"].means
    assert "1 images left out" in found.in_words()
    monkeypatch.setattr(validation._dataset, "read", lambda row: damaged(1))
    with pytest.raises(UserError, match=r"validation\.dataset: fewer than two of 5 images"):
        validation.measure(run.phases[0])


def test_storage_that_does_not_answer_is_waited_for_once_a_pass(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    tried: list[int] = []
    validation = Validation(run, task_of(run), alone, own(run))
    read = validation._dataset.read

    def slow(row: int) -> Any:
        tried.append(row)
        if row == 1:
            raise StorageError("no answer in 120 s")
        return read(row)

    monkeypatch.setattr(validation._dataset, "read", slow)
    found = validation.measure(run.phases[0])
    assert tried == [0, 1, 4], "passes of four images"
    assert [(s["sample"], s["reason"]) for s in found.about["skipped"]] == [(row, "storage") for row in (1, 2, 3)]


def test_what_is_no_error_is_said(alone: World) -> None:
    def warnings(**given: Any) -> str:
        run = config(**given)
        return "\n".join(Validation(run, task_of(run), alone, own(run)).warnings)

    assert (
        "absent, so its loss is of the first 5 images of repo://data/assets/emoji_64, which the run trains on"
        in warnings()
    )
    shared = warnings(more=f", dataset: {{url: {EMOJI}, max_samples: 100}}")
    assert "shares 96 of its 100 images with what the run trains on, so it is not held out" in shared
    assert "validation.count: 9000, and repo://data/assets/emoji_64 has 30 images: all are used" in warnings(
        count=9000, more=f", dataset: {{url: {EMOJI}, max_samples: 30}}"
    )


def test_shards_that_two_datasets_share(alone: World, tmp_path: Path) -> None:
    from trainer.evaluate.validation import _shared

    emoji = own(config())[0]
    other = open_dataset(resolve_url(EMOJI), name="other")
    other.digest = "another"
    assert _shared(other, [emoji]) == f"{(emoji.shard_sizes > 0).sum()} of its {len(other.shards)} shards"
    other.shards.hashes = other.shards.hashes + np.uint64(1)
    assert _shared(other, [emoji]) == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (", dataset: {url: /nowhere}", r"validation\.dataset: dataset validation: no index\.json in /nowhere"),
        (f", dataset: {{url: {EMOJI}, max_samples: 1}}", r"validation\.dataset: .* has 1 image; give two or more"),
    ],
)
def test_bad_datasets(alone: World, more: str, message: str) -> None:
    run = config(more=more)
    with pytest.raises(UserError, match=message) as e:
        Validation(run, task_of(run), alone, own(run))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("validation.resolution=36", r"validation\.resolution: 36 px is no multiple of 8"),
        ("validation.resolution=256", r"task\.model\.position_grid: 16 is less than the 32 patches"),
        ("validation.count=1", r"validation\.count"),
        ("validation.levels=0", r"validation\.levels"),
    ],
)
def test_bad_fields(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(override)
