"""Stage 1 whatever the layout: ranks, copies, micro-batches, recomputation. One process group a number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.test_elastic import train, two_copies
from tests.stage1 import (
    ASYMMETRIC,
    GRADIENT,
    RUNNING_MEANS,
    checkpoint,
    in_float64,
    largest_difference,
    losses,
    stage1,
    write_lpips,
)
from trainer.config import RunConfig
from trainer.config.run import config_digest
from trainer.config_text import with_overrides
from trainer.errors import ExitCode
from trainer.parallel.world import World

pytestmark = pytest.mark.slow
"""Of ranks that train: a minute and more."""

EXACT = 1e-10
"""In float64. In float32, 1e-5 until the discriminator begins."""
BY_SAMPLE = "task.discriminator={start_step: 3, width: 8, num_layers: 1, adaptive_weight: false, norm: "
"""A loss that does not know how the batch was split."""
SPLIT = "parallel.micro_batch_size=2"


def configs(lpips: str) -> dict[str, RunConfig]:
    return {
        "kl": stage1(lpips, "task.learned_log_variance=true"),
        "codes": stage1(GRADIENT),
        "means": stage1(RUNNING_MEANS),
        # two passes through the decoder within one forward pass, and roots beside the images
        "regular": stage1(
            ASYMMETRIC, "task.outliers={threshold: 1.0}", "task.equivariance={scales: [0.5, 1.0]}",
            "task.discriminator.norm=spectral",
        ),
        "by sample": stage1(BY_SAMPLE + "spectral}", GRADIENT),
        "by sample too": stage1(BY_SAMPLE + "none}", RUNNING_MEANS),
    }  # fmt: skip


FLOAT32 = (RUNNING_MEANS, "ema.start_step=100")
LAYOUTS = {
    "regular": ("parallel.activation_checkpointing=selective",),
    "by sample": (SPLIT,),
    "by sample too": (SPLIT, "parallel.keep_gathered=true"),
}
"""Of two ranks."""


def on_one(world: World, lpips: str, folder: Path) -> dict[str, Any]:
    seen = {"float32": train(world, stage1(*FLOAT32), str(folder / "one" / "float32"))}
    with in_float64():
        seen |= {name: train(world, config, str(folder / "one" / name)) for name, config in configs(lpips).items()}
        return seen | {"elastic": train(world, stage1(RUNNING_MEANS), str(folder / "elastic"), stop_after=6)}


def on_two(world: World, lpips: str, folder: Path) -> dict[str, Any]:
    def run(name: str, config: RunConfig, where: World = world) -> dict[str, Any]:
        return train(where, with_overrides(config, LAYOUTS.get(name, ())), str(folder / "two" / name))

    seen = {"float32": run("float32", stage1(*FLOAT32))}
    with in_float64():
        seen |= {name: run(name, config) for name, config in configs(lpips).items()}
        copies = stage1(RUNNING_MEANS, "parallel.replicas=2")
        return seen | {
            "elastic": train(world, stage1(RUNNING_MEANS), str(folder / "elastic"), stop_after=2),
            "copies": run("copies", copies, two_copies(world)),
            "recomputed": run("recomputed", stage1(lpips, SPLIT, "parallel.activation_checkpointing=full")),
        }


def on_two_again(world: World, folder: Path) -> dict[str, Any]:
    with in_float64():
        return {"elastic": train(world, stage1(RUNNING_MEANS), str(folder / "elastic"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    lpips = write_lpips(folder)
    two = run_ranks(2, on_two, lpips, folder)
    one = run_ranks(1, on_one, lpips, folder)
    for seen in (*one, *two):
        ends = {name: result.get("error", result.get("code")) for name, result in seen.items()}
        assert ends == dict.fromkeys(seen, ExitCode.DONE) | {"elastic": ExitCode.REQUEUE}
    assert [seen["elastic"]["code"] for seen in run_ranks(2, on_two_again, folder)] == [ExitCode.DONE] * 2
    return folder


NAMES = list(configs("task.lpips=null"))


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one(runs: Path, name: str) -> None:
    """Also where theirs are micro-batches, of a loss that does not depend on them; and with recomputation."""
    one, two = losses(runs / "one" / name), losses(runs / "two" / name)
    assert len(one) == 8
    assert largest_difference(one, two) < EXACT
    assert ["discriminator" in terms for terms in one] == [False] * 3 + [True] * 5
    assert one[-1]["l1"] < one[0]["l1"]


def test_two_ranks_are_one_in_float32(runs: Path) -> None:
    one, two = losses(runs / "one" / "float32"), losses(runs / "two" / "float32")
    assert largest_difference(one[:4], two[:4]) < 1e-5


def test_an_average_that_has_not_begun_is_the_weights_and_the_codes(runs: Path) -> None:
    """Codes move after the optimizer's step: the average takes them with what the optimizer has moved."""
    tensors = checkpoint(runs / "two" / "float32")
    averages = [name for name in tensors if name.startswith("ema.")]
    assert "ema.autoencoder.quantize.embedding.weight" in averages
    for name in averages:
        torch.testing.assert_close(tensors[name], tensors[name.replace("ema.", "model.", 1)], rtol=0, atol=1e-6)


def test_two_copies_of_the_model_are_one_rank(runs: Path) -> None:
    """Weights, average, both optimizers and the codebook."""
    assert largest_difference(losses(runs / "one" / "means"), losses(runs / "two" / "copies")) < EXACT
    one, two, copies = (checkpoint(runs / name) for name in ("one/means", "two/means", "two/copies"))
    assert any(name.startswith("task.discriminator_optim.") for name in one)
    for other in (two, copies):
        assert one.keys() == other.keys()
        different = {n: (one[n] - other[n]).abs().max().item() for n in one if one[n].numel()}
        # the average is kept in float32
        assert {n: d for n, d in different.items() if d > (1e-6 if n.startswith("ema.") else 1e-9)} == {}


def test_two_ranks_to_one_to_two(runs: Path) -> None:
    """Stopped before the discriminator begins, and while it plays."""
    assert len(list((runs / "elastic" / "attempts").iterdir())) == 3
    assert largest_difference(losses(runs / "one" / "means"), losses(runs / "elastic")) < EXACT


def test_terms_are_those_of_the_config(runs: Path) -> None:
    names = {name: set(losses(runs / "one" / name)[-1]) for name in NAMES}
    game = {"generator", "discriminator", "adaptive_weight", "logits_real", "logits_fake"}
    common = {"loss", "l1", "reconstruction"} | game
    book = {"codebook", "commitment", "perplexity", "codebook_usage", "codes_restarted"}
    assert names["kl"] == common | {"kl", "lpips", "log_variance"}
    assert names["codes"] == names["means"] == common | book
    assert names["regular"] == common | {"kl", "outliers", "equivariance"}
    assert losses(runs / "two" / "means")[-1]["codes_restarted"] > 0
    assert losses(runs / "two" / "codes")[-1]["codes_restarted"] == 0


def test_recomputation_and_micro_batches_run(runs: Path) -> None:
    """The adaptive weight and the norm are of a micro-batch: near those of the whole, and not they."""
    whole, split = losses(runs / "one" / "kl"), losses(runs / "two" / "recomputed")
    assert len(split) == 8
    assert [terms["l1"] for terms in split] == pytest.approx([terms["l1"] for terms in whole], rel=0.1)


def test_a_digest_knows_what_the_split_changes() -> None:
    def changes(*overrides: str) -> bool:
        return config_digest(stage1(*overrides)) != config_digest(stage1(*overrides, SPLIT))

    assert changes()
    assert changes("task.discriminator.adaptive_weight=false")
    assert changes("task.discriminator.norm=none")
    assert not changes("task.discriminator.norm=none", "task.discriminator.adaptive_weight=false")
    assert not changes("task.discriminator=null")
