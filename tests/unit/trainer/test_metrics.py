"""Exporter and meters: what is defined is exported, counted once, and answers over HTTP."""

import urllib.request

import pytest
import torch

from trainer import metric_names
from trainer.errors import UserError
from trainer.exporter import Exporter


def test_every_metric_is_exported_under_its_name_over_http() -> None:
    exporter = Exporter()
    for metric in metric_names.ALL:
        if metric.kind == "info":
            exporter.of(metric).info({"version": "1"})
        elif metric.kind == "histogram":
            exporter.of(metric, *(["x"] * len(metric.labels))).observe(0.2)
        elif metric.kind == "counter":
            exporter.of(metric, *(["x"] * len(metric.labels))).inc()
        else:
            exporter.of(metric, *(["x"] * len(metric.labels))).set(3)
    port = exporter.serve("127.0.0.1", 0)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as response:
        text = response.read().decode()
    for metric in metric_names.ALL:
        assert f"# HELP {metric.name}" in text
    assert 'loupe_loss{term="x"} 3.0' in text
    assert 'loupe_step_seconds_bucket{le="0.25",stage="x"} 1.0' in text


def test_names_follow_the_conventions() -> None:
    names = [metric.name for metric in metric_names.ALL]
    assert len(set(names)) == len(names)
    for metric in metric_names.ALL:
        assert metric.name.startswith("loupe_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert metric.help.endswith(".")


def test_a_taken_port_is_a_clear_error() -> None:
    port = Exporter().serve("127.0.0.1", 0)
    with pytest.raises(UserError, match=rf"metrics\.port: cannot listen on 127\.0\.0\.1:{port}"):
        Exporter().serve("127.0.0.1", port)


@pytest.mark.usefixtures("alone")
def test_losses_are_means_over_samples_without_the_skipped_steps() -> None:
    from trainer.metrics import LossMeter

    meter = LossMeter(torch.device("cpu"))
    keep, skip = torch.tensor(0.0), torch.tensor(1.0)
    meter.add({"loss": torch.tensor([1.0, 2.0, 3.0])}, keep)
    meter.add({"loss": torch.tensor([float("nan"), 9.0])}, skip)
    meter.add({"loss": torch.tensor([6.0]), "lpl": torch.tensor([0.5])}, keep)
    assert meter.take() == {"loss": 3.0, "lpl": 0.5}
    assert meter.take() == {}


@pytest.mark.usefixtures("alone")
def test_losses_by_noise_level_are_means_of_their_bins() -> None:
    from trainer.metrics import NOISE_BINS, NoiseMeter, reduce_together

    meter = NoiseMeter(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    times, losses = torch.rand(2, 300, generator=generator)
    times[:2] = torch.tensor([0.0, 1.0])
    times[times < 0.25] = 0.0  # nothing is in the second bin
    meter.add(times[:100], losses[:100], torch.tensor(0.0))
    meter.add(times[100:], losses[100:], torch.tensor(0.0))
    meter.add(torch.tensor([0.5]), torch.tensor([float("nan")]), torch.tensor(1.0))
    found = meter.means(*reduce_together(meter.totals()))
    expected: dict[str, float] = {}
    for i in range(NOISE_BINS):
        inside = [float(x) for t, x in zip(times, losses, strict=True) if min(int(t * NOISE_BINS), NOISE_BINS - 1) == i]
        expected |= {str(i): sum(inside) / len(inside)} if inside else {}
    assert found == pytest.approx(expected)
    assert "1" not in found
    assert meter.means(meter.totals()) == {}
