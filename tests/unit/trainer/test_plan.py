"""`loupe plan`: what it counts beside what real modules compute and keep, what it chooses, and what it refuses."""

import io
import json
from dataclasses import replace as changed
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import Tensor, nn

from launch.commands.plan import plan as command
from ops.bench import scaling_table
from tests.tiny import tiny
from trainer.config import CODE_ROOT, LatentDiffusionConfig, RunConfig, replace
from trainer.config_text import to_yaml, with_overrides
from trainer.errors import UserError
from trainer.flops import Flops
from trainer.live_tensors import LiveTensors
from trainer.parallel.apply import apply_activation_checkpointing
from trainer.plan import choose
from trainer.plan import recipe as counted_recipe
from trainer.plan.choose import layouts, make_plan
from trainer.plan.counting import Recompute, count_trained
from trainer.plan.hardware import GIB, GPUS, Cluster, find_gpu, network_gbit
from trainer.plan.memory import Layout, checkpoint_bytes, numel, phase_bytes, shard_numel
from trainer.plan.recipe import RecipeCount, count_recipe
from trainer.plan.step_time import across_s, ring_s
from trainer.plan.text import BYTES, FLOP, LENGTHS, LETTERS, in_unit, number, show, to_json
from trainer.recipes import load
from trainer.tasks.latent_diffusion import TextToImage

IMAGES = 6
"""Neither of the batch sizes that are counted."""


def demo_task() -> LatentDiffusionConfig:
    task = load("demo").task
    assert task.kind == "latent_diffusion"
    return task


@cache
def tiny_count() -> tuple[RunConfig, RecipeCount]:
    run = tiny()
    run = replace(run, phases=run.phases[1:])  # of one resolution, without and with LPL
    return run, count_recipe(run, bf16=False)


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that differ in `parallel` alone, of which nothing is counted, are counted once."""
    counts: dict[str, RecipeCount] = {}

    def count(run: RunConfig) -> RecipeCount:
        what = to_yaml(replace(run, parallel=tiny().parallel))
        if what not in counts:
            counts[what] = count_recipe(run)
        return counts[what]

    monkeypatch.setattr(counted_recipe, "count_recipe", count)


def forward(module: nn.Module, task: LatentDiffusionConfig, images: int, side: int) -> Tensor:
    latents = torch.randn(images, task.codec.latent_channels, side // 8, side // 8)
    out: Tensor = module(latents, torch.rand(images), counted_recipe.text_input(task, images))
    return (out - torch.zeros_like(latents)).square().mean()


@pytest.fixture(scope="module")
def of_demo() -> counted_recipe.ModuleCount:
    task = demo_task()
    return counted_recipe._count_model(task, 64, TextToImage(task).units(), bf16=False)


def test_saved_tensors_of_the_demo_are_as_many_bytes(of_demo: counted_recipe.ModuleCount) -> None:
    task = demo_task()
    module = TextToImage(task)
    module.init_weights()
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(module, task, IMAGES, 64)
    assert of_demo.kept("none").at(IMAGES) == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_keeps_as_many_bytes(of_demo: counted_recipe.ModuleCount, recompute: Recompute) -> None:
    task = demo_task()
    module = TextToImage(task)
    module.init_weights()
    apply_activation_checkpointing(module.units(), recompute)
    with LiveTensors() as live:
        loss = forward(module, task, IMAGES, 64)
        kept = live.bytes
        assert loss.requires_grad
    assert of_demo.kept(recompute).at(IMAGES) == pytest.approx(kept, rel=0.1)
    assert of_demo.kept(recompute).at(IMAGES) < of_demo.kept("none").at(IMAGES)


def test_flops_are_those_that_run(of_demo: counted_recipe.ModuleCount) -> None:
    task = demo_task()
    module = TextToImage(task)
    module.init_weights()
    with Flops() as flops:
        forward(module, task, IMAGES, 64).backward()
    assert of_demo.flops().at(IMAGES) == flops.total


def test_fewer_blocks_stand_for_all(of_demo: counted_recipe.ModuleCount) -> None:
    task = demo_task()
    assert task.model.kind == "mmdit"
    fewer = counted_recipe.fewer_blocks(task)
    assert fewer.model != task.model

    def build() -> tuple[nn.Module, list[nn.Module]]:
        module = TextToImage(task)
        return module, module.units()

    def call(module: nn.Module, images: int) -> Tensor:
        return forward(module, task, images, 64)

    whole = count_trained(build, call, TextToImage(task).units(), bf16=False)
    assert whole.flops() == of_demo.flops()
    for recompute in ("none", "selective", "full"):
        assert whole.kept(recompute) == of_demo.kept(recompute)


def test_nothing_of_the_count_is_left_behind() -> None:
    tiny_count()
    task = demo_task()
    module = TextToImage(task)
    module.init_weights()
    # positions that were cached without values would raise here; a fresh denoiser predicts zeros
    assert forward(module, task, 2, 64).item() == 0.0


# ------------------------------------------------------------------------------------------------------------ arithmetic


def test_shards_are_chunks_of_the_first_dimension() -> None:
    assert shard_numel([(10, 3), (3,), (1, 7)], 4) == 3 * 3 + 1 + 7
    assert shard_numel([(10, 3)], 1) == 30


def test_rings_take_what_passes_through_a_rank() -> None:
    cluster = Cluster(GPUS["h100"], 16, 8, 400)
    assert ring_s(cluster, 1e9, 1, 5) == 0 == across_s(cluster, 1e9, 1, 5)
    within, beyond = ring_s(cluster, 8e9, 8, 1), ring_s(cluster, 8e9, 16, 1)
    assert within == pytest.approx(7e9 / (450e9 * 0.8), rel=0.01)
    assert beyond == pytest.approx(7.5e9 / (8 * 50e9 * 0.85), rel=0.01)


def test_accumulation_holds_whole_gradients() -> None:
    run, count = tiny_count()
    per_step = [phase_bytes(run, count, count.phases[0], Layout(1, "none", True, n), 2) for n in (4, 2)]
    units = [numel(unit) * 4 for unit in count.parameters.units]
    assert per_step[1]["gathered"] - per_step[0]["gathered"] == sum(units) - sum(sorted(units)[-2:])
    assert per_step[1]["activations"] == per_step[0]["activations"] / 2


def test_one_gpu_gathers_nothing_and_has_one_layout_of_each_kind() -> None:
    run, count = tiny_count()
    layout = Layout(1, "none", True, 2)
    assert phase_bytes(run, count, count.phases[0], layout, 1)["gathered"] == 0
    assert phase_bytes(run, count, count.phases[0], changed(layout, replicas=2), 2)["gathered"] > 0
    alone = Cluster(GPUS["h100"], 1, 8, 400)
    weighed = list(layouts(run, alone))
    assert len(set(weighed)) == len(weighed) == 3 * len({one.micro_batch for one in weighed})
    assert "not sharded" in make_plan(run, count, alone, 2.0).layout.in_words(1)


def test_averages_and_offload_count() -> None:
    run, count = tiny_count()
    layout = Layout(1, "none", True, 4)
    more = with_overrides(run, ["ema.profiles=[0.05, 0.1]"])
    away = with_overrides(run, ["ema.offload=true"])
    ema = [phase_bytes(r, count, count.phases[0], layout, 2)["ema"] for r in (run, more, away)]
    assert ema[1] == 3 * ema[0] > 0 == ema[2]
    sizes = [checkpoint_bytes(r, count.parameters) for r in (run, more, away)]
    assert sizes[1] - sizes[0] == 2 * 4 * numel(count.parameters.all)
    assert sizes[2] == sizes[0]


# ------------------------------------------------------------------------------------------------------------ the choice


def test_the_fastest_that_fits_is_taken_and_what_does_not_fit_is_said() -> None:
    run, count = tiny_count()
    roomy = Cluster(GPUS["h100"], 2, 8, 400)
    plan = make_plan(run, count, roomy, 2.0)
    assert plan.fits
    assert plan.layout.recompute == "none"  # costs time and buys what is not needed
    assert plan.layout in set(layouts(run, roomy))
    small = changed(roomy, gpu=changed(roomy.gpu, memory_bytes=1.0 * GIB))  # less than a context takes
    none = make_plan(run, count, small)
    assert not none.fits
    assert not none.written_fits
    assert all(phase.mend for phase in none.phases)
    out = io.StringIO()
    show(none, Console(file=out, width=120))
    assert "DOES NOT FIT" in out.getvalue()
    assert "lacks" in out.getvalue()
    assert "of a layout that cannot run" in out.getvalue()
    out = io.StringIO()
    show(plan, Console(file=out, width=120))
    assert "cannot run" not in out.getvalue()


def test_text_and_json_say_the_same() -> None:
    run, count = tiny_count()
    plan = make_plan(run, count, Cluster(GPUS["h200"], 2, 8, 400), 2.0)
    out = io.StringIO()
    show(plan, Console(file=out, width=120))
    tree = json.loads(json.dumps(to_json(plan)))
    for phase in tree["phases"]:
        assert set(phase["memory"]) == set(LETTERS)
        assert number(phase["step_s"] * 1e3, 1) in out.getvalue()
        assert phase["cost"] == pytest.approx(2.0 * phase["gpu_hours"])
        assert 0 < phase["mfu"] < 1
    assert tree["phases"][1]["flops"]["perceptual_loss"] > 0 == tree["phases"][0]["flops"]["perceptual_loss"]


def test_a_small_model_is_told_in_small_units() -> None:
    run, count = tiny_count()
    plan = make_plan(run, count, Cluster(GPUS["h100"], 2, 8, 400))
    out = io.StringIO()
    show(plan, Console(file=out, width=120))
    told = out.getvalue()
    assert "P parameters, MiB" in told or "P parameters, KiB" in told
    assert "FLOP" in told
    assert "a GPU: model, TFLOP" not in told
    assert "length, days" not in told
    rows = [
        line.replace("│", " ").split()
        for line in told.splitlines()
        if line.lstrip().startswith(("P parameters", "a GPU: model", "GPU-hours"))
    ]
    assert len(rows) == 3
    for row in rows:
        assert all(float(cell) > 0 for cell in row[-len(plan.phases) :]), row


def test_units_and_digits() -> None:
    assert in_unit(3 * GIB, BYTES) == "3.00 GiB"
    assert in_unit(0.05 * GIB, BYTES) == "51.20 MiB"
    assert in_unit(2e9, FLOP) == "2.00 GFLOP"
    assert in_unit(1800.0, LENGTHS) == "0.50 hours"
    assert in_unit(5.0, LENGTHS) == "5.00 s"
    assert number(12345.6, 0) == "12,346"
    assert number(0.0004) == "0.0004"


def test_what_is_held_stays_and_the_rest_is_chosen() -> None:
    run, count = tiny_count()
    cluster = Cluster(GPUS["h100"], 4, 2, 400)
    free = make_plan(run, count, cluster)
    wanted = with_overrides(run, ["parallel.activation_checkpointing=full", "parallel.replicas=4"])
    held = make_plan(wanted, count, cluster, held=("activation_checkpointing", "replicas"))
    assert (held.layout.recompute, held.layout.replicas) == ("full", 4)
    assert (held.layout.recompute, held.layout.replicas) != (free.layout.recompute, free.layout.replicas)
    assert sum(p.days for p in held.phases) > sum(p.days for p in free.phases)
    assert make_plan(wanted, count, cluster).layout == free.layout, "not held"
    kept = with_overrides(run, ["parallel.reshard_after_forward=false", "parallel.micro_batch_size=1"])
    weighed = list(layouts(kept, cluster, ("reshard_after_forward", "micro_batch_size")))
    assert {(one.reshard, one.micro_batch) for one in weighed} == {(False, 1)}
    assert len({(one.recompute, one.replicas) for one in weighed}) > 3


@pytest.mark.usefixtures("counted_once")
def test_the_command_holds_what_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_count()[0]))
    arguments = [str(tmp_path), "--gpus", "2", "--gpu", "h100", "--json"]
    found = CliRunner().invoke(command, [*arguments, "--set", "parallel.activation_checkpointing=full"])
    assert json.loads(found.output)["layout"]["recompute"] == "full"
    assert json.loads(CliRunner().invoke(command, arguments).output)["layout"]["recompute"] == "none"


def test_offload_is_offered_where_it_is_enough() -> None:
    run, count = tiny_count()
    roomy = Cluster(GPUS["h100"], 1, 8, 400)
    (first, *_) = make_plan(run, count, roomy).phases
    state = {"parameters": 0.0, "gradients": 0.0, "optimizer": 9.0, "ema": 4.0, "activations": 1.0, "margin": 99.0}
    assert set(state) <= set(first.memory)
    assert "ema.offload=true" in choose._mend(run, state, missing=4.0)
    assert "ema.offload" not in choose._mend(run, state, missing=5.0)
    assert "more GPUs" in choose._mend(run, state, missing=5.0)


# -------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--gpus", "2", "--gpu", "v100"], "--gpu: no figures of 'v100'"),
        (["demo", "--gpus", "2", "--gpu", "h100", "--network", "fast"], "--network: 'fast'"),
        (["demo", "--gpus", "3", "--gpu", "h100"], "low_resolution.batch_size: 64"),
        (["autoencoder_kl_f8", "--gpus", "8", "--gpu", "h100"], "task.kind: autoencoder"),
        (["nonesuch", "--gpus", "8", "--gpu", "h100"], "no recipe 'nonesuch'"),
        (["runs/nonesuch", "--gpus", "8", "--gpu", "h100"], "runs/nonesuch: no such folder"),
        (
            ["demo", "--gpus", "2", "--gpu", "h100", "--set", "parallel.replicas=3"],
            "parallel.replicas: 3 copies do not divide",
        ),
        (
            ["demo", "--gpus", "2", "--gpu", "h100", "--set", "parallel.micro_batch_size=5"],
            "parallel.micro_batch_size: 16 and 32 images of a GPU do not divide by 5",
        ),
        (["tests", "--gpus", "8", "--gpu", "h100"], "tests/config.yaml: the config cannot be read"),
        (
            ["demo", "--gpus", "8", "--gpu", "h100", "--gpus-per-node", "3"],
            "--gpus 8: no whole nodes of --gpus-per-node 3; take 6 or 9",
        ),
    ],
)
def test_bad_input_is_refused(arguments: list[str], message: str) -> None:
    error = CliRunner().invoke(command, arguments).exception
    assert isinstance(error, UserError)
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.usefixtures("counted_once")
def test_a_runs_folder_is_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(tiny_count()[0]))
    arguments = ["--gpus", "2", "--gpu", "h100", "--json"]
    found = [CliRunner().invoke(command, [name, *arguments]) for name in (str(tmp_path), f"{tmp_path}/config.yaml")]
    assert [one.exit_code for one in found] == [0, 0], found[0].output
    assert found[0].output == found[1].output


def test_names_and_speeds_are_read() -> None:
    assert find_gpu("H200").name == "h200"
    assert network_gbit("400") == network_gbit("400g") == 400.0
    for gpu in GPUS.values():
        assert gpu.peak_flops > 1e14


def test_scaling_tables_hold_what_the_plans_say(monkeypatch: pytest.MonkeyPatch) -> None:
    run, count = tiny_count()  # 8 images a step
    monkeypatch.setattr(scaling_table, "GPUS", (1, 8, 16))
    monkeypatch.setattr(scaling_table, "GROWN_FROM", 8)
    fixed = list(scaling_table.rows_of(run, count, "h100", grows=False))
    assert [row[0] for row in fixed] == ["1", "8", "16"]
    assert fixed[2][1].startswith("phases.full_resolution.batch_size: 8 images do not divide over --gpus 16")
    plan = make_plan(run, count, Cluster(GPUS["h100"], 8, 8, 400))
    assert fixed[1] == scaling_table.row(plan, 8)
    assert fixed[1][6] == " / ".join(f"{phase.images_per_s:,.0f}" for phase in plan.phases)
    grown = list(scaling_table.rows_of(run, count, "h100", grows=True))
    assert grown[1] == fixed[1]
    assert grown[2][1] != fixed[2][1]
    assert grown[2][6] != ""
    # 849 photos of 79 KB fill a shard of 64 MiB, as 1 billion fill 1,177,192
    million, *_, billion = scaling_table.data_rows({8: plan})
    assert (million[:3], billion[2]) == (["1,000,000", "0.079", "1,178"], "1,177,192")
    assert float(billion[5].replace(",", "")) == pytest.approx(1e9 / plan.phases[0].images_per_s / 3600, rel=0.06)


@pytest.mark.slow
def test_the_documents_table_is_what_is_planned_today() -> None:
    run = load("sd3_medium_512")
    row = scaling_table.row(scaling_table.planned(run, count_recipe(run), "h100", 64), 64)
    told = (CODE_ROOT / "docs/scaling.md").read_text()
    assert f"| {' | '.join(row)} |" in told, "python -m ops.bench.scaling_table, into docs/scaling.md"
