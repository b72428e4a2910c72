"""Image metrics amid training: the figures of `loupe evaluate run`, what is refused before the first step, and what is not
worth a run's end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from launch.cli import cli
from launch.entry import run_command
from tests import feature_networks
from tests.feature_networks import OURS, Blocks
from tests.image_sets import drawn, written
from tests.sampling_runs import CLASSES, SAMPLES, save, weights_of
from tests.tiny import tiny
from trainer.activity import Activity
from trainer.config import RunConfig
from trainer.config.evaluation import MetricName, NetworkName
from trainer.errors import UserError
from trainer.evaluate import image_evaluation
from trainer.evaluate.features.networks import NETWORKS, LoadedNetwork, build_network
from trainer.evaluate.image_action import ImageAction
from trainer.evaluate.image_evaluation import ImageEvaluation, Measured, _batches
from trainer.evaluate.image_measures import METRICS
from trainer.exporter import Exporter
from trainer.goodput import Ledger
from trainer.metric_names import OF_RANK_0
from trainer.parallel.world import World
from trainer.preemption import StopRequest
from trainer.reports import Reports
from trainer.run_folder import RunFolder
from trainer.stopping import Interrupted
from trainer.tasks.latent_diffusion import LatentDiffusionTask
from trainer.watchdog import Watchdog

STEP = 7
SMALL = "resolution: 32, num_steps: 2, resamples: 20, reference_count: 60, allow_few: true, batch_size: 8"
"""With the demo's first dataset as the reference, as far as it trains on it: the command's default too."""


def config(cache: Path, more: str = "num_samples: 10", *overrides: str, network: bool = True) -> RunConfig:
    networks = "networks: [{name: efficientnet_lite0, weights: w}], " if network else ""
    return tiny(SAMPLES, f"image_evaluation={{{networks}{SMALL}, cache: {cache}, {more}}}", *overrides)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> LoadedNetwork:
    """Fast and exact, in the place of any."""
    loaded = build_network(OURS, None)
    monkeypatch.setattr(image_evaluation, "build_network", lambda name, weights, sha256: loaded)
    return loaded


def seen(network: LoadedNetwork) -> int:
    assert isinstance(network.network, Blocks)
    return network.network.images


def task_of(run: RunConfig, seed: int = STEP + 1) -> LatentDiffusionTask:
    task = LatentDiffusionTask(run, torch.device("cpu"))
    task.module.load_state_dict(weights_of(run, seed))
    task.module.eval()
    return task


def ready(run: RunConfig, world: World, task: LatentDiffusionTask | None = None) -> ImageEvaluation:
    evaluation = ImageEvaluation(run, task or task_of(run), world, StopRequest())
    evaluation.prepare(lambda line: None)
    return evaluation


def values(found: Measured) -> dict[str, float]:
    return {name: figure["value"] for name, figure in found.numbers["figures"].items()}


def test_its_figures_are_those_of_loupe_evaluate_run(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    run = config(tmp_path / "cache")
    save(tmp_path / "run", run, step=STEP)
    found = ready(run, alone).measure(STEP)

    words = [
        "run",
        str(tmp_path / "run"),
        "--count",
        "10",
        "--reference-count",
        "60",
        "--size",
        "32",
    ]
    words += ["--steps", "2", "--resamples", "20", "--allow-few", "--batch-size", "8", "--network", OURS]
    words += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert run_command(cli, ["evaluate", *words], prog_name="loupe") == 0
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert values(found) == pytest.approx({name: f["value"] for name, f in told["figures"].items()}, rel=1e-9)
    assert found.numbers["definition"] == told["definition"]
    assert set(found.numbers) == set(told)
    # and recorded beside one another
    [theirs] = [json.loads(path.read_text()) for path in (tmp_path / "run/evaluations").iterdir()]
    file, ours = found.record
    assert set(ours) == set(theirs)
    assert {**ours, **dict.fromkeys(("time", "figures", "checkpoint"))} == {
        **theirs, **dict.fromkeys(("time", "figures", "checkpoint"))
    }  # fmt: skip
    assert file.startswith(f"evaluations/step-{STEP:08d}-")
    # of other weights they are others
    other = ready(run, alone, task_of(run, STEP)).measure(STEP)
    assert values(other)["fd_blocks"] != pytest.approx(values(found)["fd_blocks"], rel=1e-3)


def test_real_images_are_looked_at_once_and_each_picture_once(
    alone: World, tmp_path: Path, network: LoadedNetwork
) -> None:
    run = config(tmp_path / "cache")
    evaluation = ready(run, alone)
    # batches are filled up
    assert seen(network) == 64
    first = evaluation.measure(STEP)
    assert seen(network) == 64 + 16
    again = ready(run, alone)
    assert seen(network) == 64 + 16
    assert values(again.measure(STEP)) == values(first)


@pytest.mark.slow
def test_neither_lots_nor_batches_move_a_figure(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    found = [
        values(ready(config(tmp_path / "cache", f"num_samples: 20, lot: 7, batch_size: {size}"), alone).measure(STEP))
        for size in (9, 32)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_batches_are_those_of_the_command() -> None:
    assert _batches(70, 24) == [range(24), range(24, 48), range(48, 64), range(64, 70)]
    assert [len(batch) for batch in _batches(130, 64)] == [64, 64, 2]


def test_classes_of_a_file(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    (tmp_path / "classes.jsonl").write_text("0\n3\n2\n1\n" * 2)
    found = ready(config(tmp_path / "cache", f"prompts: {tmp_path}/classes.jsonl", CLASSES), alone).measure(STEP)
    assert found.numbers["generated"]["used"] == 8
    (tmp_path / "classes.jsonl").write_text("0\n9\n2\n1\n")
    with pytest.raises(UserError, match=r"image_evaluation\.prompts: 9 is no class of the model's 0 to 3"):
        ready(config(tmp_path / "cache", f"prompts: {tmp_path}/classes.jsonl, metrics: [kid]", CLASSES), alone)


def test_a_stop_ends_it_at_the_next_lot(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    evaluation, asked = ready(config(tmp_path / "cache"), alone), []

    def go_on() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise Interrupted

    before = seen(network)
    with pytest.raises(Interrupted):
        evaluation.measure(STEP, go_on)
    # the second lot was not drawn, nor the first batch's second half judged
    assert seen(network) == before + 8
    assert values(evaluation.measure(STEP))


@pytest.fixture
def action(
    alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[ImageEvaluation], tuple[ImageAction, list[str], RunFolder]]:
    def make(evaluation: ImageEvaluation) -> tuple[ImageAction, list[str], RunFolder]:
        said: list[str] = []
        folder, exporter = RunFolder(str(tmp_path / "run")), Exporter(OF_RANK_0)
        reports = Reports(alone, exporter, None, 10)
        monkeypatch.setattr(reports, "print", said.append)
        activity = Activity(Watchdog(None, None), Ledger(), alone.device)
        return ImageAction(evaluation, alone, folder, reports, activity, StopRequest()), said, folder

    return make


def test_weights_that_draw_nothing_are_said_and_end_no_run(
    alone: World, tmp_path: Path, network: LoadedNetwork, action: Any
) -> None:
    run = config(tmp_path / "cache")
    task = task_of(run)
    act, said, folder = action(ImageEvaluation(run, task, alone, StopRequest()))
    act.begin()
    weight = next(task.module.denoiser.parameters())
    with torch.no_grad():
        kept, _ = weight.clone(), weight.fill_(float("nan"))
    assert act(STEP, "step-00000007", lambda: None) == {}
    assert said[-1].startswith(f"WARNING: no image evaluation at step {STEP}: image_evaluation: ")
    assert "are not finite" in said[-1]
    assert folder.names("evaluations") == folder.names("evaluation") == []
    with torch.no_grad():
        weight.copy_(kept)
    summary = act(STEP, "final", lambda: None)
    assert said[-1].startswith(f"evaluation at step {STEP}:  fd_blocks ")
    assert summary["counts"] == {"generated": 10, "real": 60}
    assert summary["fd_blocks"] > 0
    assert folder.names("evaluation") == ["images-final.json"]
    assert len(folder.names("evaluations")) == 1


def test_at_the_runs_end_a_stop_is_obeyed_too(
    alone: World, tmp_path: Path, network: LoadedNetwork, action: Any
) -> None:
    act, _, folder = action(ready(config(tmp_path / "cache"), alone))
    act._stop.received = "SIGTERM"
    with pytest.raises(Interrupted):
        act(STEP, "final")
    assert folder.names("evaluations") == []


def test_a_stop_amid_real_images_keeps_what_is_done(
    alone: World, tmp_path: Path, network: LoadedNetwork, action: Any
) -> None:
    run, stop = config(tmp_path / "cache"), StopRequest()
    act, said, _ = action(ImageEvaluation(run, task_of(run), alone, stop))
    stop.received = "SIGUSR2"
    act.begin()
    assert not said, "the trainer hears of it, and says so"


def test_names_are_those_of_the_command() -> None:
    assert set(get_args(MetricName)) == set(METRICS)
    assert set(get_args(NetworkName)) == set(NETWORKS)


@pytest.mark.parametrize(
    ("more", "overrides", "message"),
    [
        ("num_samples: 3", (), r"image_evaluation\.num_samples: .*4"),
        ("num_samples: 8, prompts: p.txt", (), r"num_samples: goes without prompts"),
        ("metrics: [beauty]", (), r"image_evaluation\.metrics"),
        ("networks: [{name: 'os:system', weights: x}]", (), r"image_evaluation\.networks"),
        ("networks: [{name: clip, weights: a}, {name: clip, weights: b}]", (), r"networks: each once"),
        ("networks: [{name: clip, weights: 's3://key:secret@b/x'}]", (), r"holds a password or a key"),
        ("sampler: ddim", (), r"image_evaluation\.sampler: ddim does not go with flow"),
        ("resolution: 33", (), r"image_evaluation\.resolution: 33 px is no multiple"),
        ("num_steps: 2000", ("samples=null", "task.paradigm={kind: ddpm_eps, shift_base_px: 32}"), r"num_steps: 2000 is more"),
    ],
)  # fmt: skip
def test_what_the_config_refuses(tmp_path: Path, more: str, overrides: tuple[str, ...], message: str) -> None:
    given = {part.split(":")[0].strip() for part in more.split(",")} | {"networks"}
    rest = ", ".join(part for part in SMALL.split(", ") if part.split(":")[0] not in given)
    with pytest.raises(UserError, match=message):
        tiny(SAMPLES, *overrides, f"image_evaluation={{{rest}, {more}}}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("num_samples: 10, allow_few: false", "image_evaluation.metrics fid: 10 generated and 60 real images for 48 features "
         "of blocks: with no more images than features the distance is too large; take 49 or more, give "
         "image_evaluation.allow_few=true, or image_evaluation.metrics kid,precision,recall,density,coverage,spectrum"),
        ("metrics: [clip_score]", "image_evaluation.metrics: clip_score needs image_evaluation.networks clip=FOLDER"),
        ("reference: nowhere", "image_evaluation: nowhere: no such folder"),
        ("prompts: nothing.txt", "image_evaluation.prompts: nothing.txt cannot be read"),
        ("num_samples: 5, metrics: [density]", "image_evaluation.metrics density: 5 generated and 60 real images, and it looks "
         "at 5 neighbours of each"),
    ],
    ids=["few", "clip", "reference", "prompts", "neighbours"],
)  # fmt: skip
def test_what_is_refused_before_the_first_step(
    alone: World, tmp_path: Path, network: LoadedNetwork, more: str, message: str
) -> None:
    given = {part.split(":")[0].strip() for part in more.split(",")}
    rest = ", ".join(part for part in SMALL.split(", ") if part.split(":")[0] not in given)
    networks = "" if "clip_score" in more else ", networks: [{name: dinov2, weights: w}]"
    run = tiny(SAMPLES, f"image_evaluation={{{rest}{networks}, {more}}}")
    with pytest.raises(UserError) as caught:
        ImageEvaluation(run, LatentDiffusionTask(run, torch.device("cpu")), alone, StopRequest())
    assert str(caught.value).startswith(message)


def test_missing_weights_are_told_at_the_start(alone: World, tmp_path: Path) -> None:
    run = config(tmp_path / "cache")
    with pytest.raises(UserError, match=r"^image_evaluation\.networks: w: no such file"):
        ImageEvaluation(run, LatentDiffusionTask(run, torch.device("cpu")), alone, StopRequest())


def test_a_folder_without_captions_needs_prompts(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    real = written(tmp_path / "real", drawn(12, 1, side=32))
    run = config(tmp_path / "cache", f"num_samples: 8, reference: {real}")
    with pytest.raises(
        UserError, match=r"image_evaluation\.reference: .* has no caption; give image_evaluation\.prompts FILE"
    ):
        ready(run, alone)
    (tmp_path / "prompts.txt").write_text("a dog\na cat\n" * 4)
    found = ready(config(tmp_path / "cache", f"prompts: {tmp_path}/prompts.txt, reference: {real}"), alone).measure(
        STEP
    )
    assert found.numbers["generated"]["used"] == 8


def test_real_images_that_cannot_be_read_do_not_count(alone: World, tmp_path: Path, network: LoadedNetwork) -> None:
    real = written(tmp_path / "real", drawn(6, 1, side=32))
    (real / "0000.png").write_bytes(b"nothing")
    (tmp_path / "prompts.txt").write_text("a dog\n" * 8)
    run = config(tmp_path / "cache", f"prompts: {tmp_path}/prompts.txt, reference: {real}, metrics: [coverage]")
    with pytest.raises(UserError, match="coverage: 8 generated and 5 real images"):
        ready(run, alone)


def test_clip_scores_prompts(alone: World, tmp_path: Path) -> None:
    feature_networks.write_clip(tmp_path / "clip")
    more = f"num_samples: 8, metrics: [clip_score], networks: [{{name: clip, weights: {tmp_path}/clip}}]"
    found = ready(config(tmp_path / "cache", more, network=False), alone).measure(STEP)
    assert set(found.values) == {"clip_score", "clip_s"}
