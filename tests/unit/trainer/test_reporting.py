"""Prompt accuracy, the summary and the pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.evaluate.prompt_accuracy import prompt_accuracy
from trainer.pictures import loss_curves, sample_grid
from trainer.recipes import load
from trainer.run_folder import RunFolder
from trainer.summary import summarise


def test_prompt_accuracy_finds_the_prompted_image_and_knows_chance() -> None:
    training = torch.arange(20.0)[:, None, None, None].expand(-1, 2, 1, 1)
    captions = [[f"image {i}", f"number {i}"] for i in range(20)]
    near = training[[3, 7, 11]] + 0.1
    assert prompt_accuracy(near, ["image 3", "number 7", "image 11"], training, captions, 5) == (
        1.0,
        pytest.approx(0.25),
    )
    assert prompt_accuracy(near, ["image 3", "number 17", "image 0"], training, captions, 5)[0] == pytest.approx(1 / 3)
    assert prompt_accuracy(near[:1], ["image 4"], training, captions, 1)[0] == 0.0
    twins = [["same"], ["same"], *captions[2:]]
    chance = prompt_accuracy(near[:1], ["same"], training, twins, 5)[1]
    assert chance == pytest.approx(1 - (15 * 14) / (20 * 19))  # 1 - C(18,5)/C(20,5)


def records() -> list[dict]:
    demo, out, step = load("demo"), [], 0
    for phase in demo.phases:
        for i in range(8):
            step += 10
            loss = {"loss": 1.0 + i, "denoising": 1.0 + i} | ({"lpl": 2.0 + i} if phase.perceptual else {})
            out.append({"step": step, "phase": phase.name, "loss": loss, "images_per_s": 50.0})
    return out


def test_summary_has_the_first_and_last_losses_of_each_phase(tmp_path) -> None:
    folder = RunFolder(str(tmp_path))
    folder.start_attempt({"time": 0.0})
    folder.start_attempt({"time": 5.0})
    writer = folder.metrics_writer(0)
    for record in records():
        writer.write(record)
    summary = summarise(folder, load("demo"), images=1000, train_seconds=20.0, extra={"prompt_accuracy": 0.9})
    assert summary["restarts"] == 1
    assert summary["images_per_s"] == 50.0
    assert summary["wall_s"] > 5
    assert [p["name"] for p in summary["phases"]] == ["low_resolution", "full_resolution", "perceptual"]
    assert summary["phases"][0]["losses_first"]["loss"] == 2.0  # the mean of the first three records
    assert summary["phases"][2]["losses_last"] == {"loss": 7.0, "denoising": 7.0, "lpl": 8.0}
    assert "lpl" not in summary["phases"][1]["losses_last"]


def test_pictures_are_pngs_with_the_pictures_in_them() -> None:
    images = np.zeros((5, 16, 16, 3), np.uint8)
    images[4] = (255, 0, 0)
    grid = Image.open(
        io.BytesIO(sample_grid(images, [f"prompt {i} of a long kind that must be wrapped" for i in range(5)]))
    )
    assert grid.width == 3 * 168 + 8
    assert grid.getpixel((8 + 168 + 80, 8 + 202 + 80)) == (255, 0, 0)
    curves = Image.open(io.BytesIO(loss_curves(records())))
    assert min(curves.size) > 300
