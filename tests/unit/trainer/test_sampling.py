"""A model that draws: pictures that follow from prompt, seed and position alone, its weights, and bad input."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.sampling_runs import CLASSES, PROMPTS, run_of, weights_of
from tests.tiny import tiny
from trainer.errors import UserError
from trainer.rng import normal
from trainer.sampling.model import SamplingModel
from trainer.sampling.prompts import gathered, parse_classes, read_prompts
from trainer.sampling.settings import SampleSettings

CPU = torch.device("cpu")
SMALL = SampleSettings("euler", 3, guidance=2.0, seed=1, resolution=32)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("captions") / "run", "task.text.max_bytes=12")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    eps = ("task.paradigm.kind=ddpm_eps", "samples={sampler: ddim, num_steps: 2}")
    return run_of(tmp_path_factory.mktemp("classes") / "run", CLASSES, *eps)


@pytest.fixture(scope="module")
def model(captions: Path) -> SamplingModel:
    found = SamplingModel.open(str(captions), CPU)
    found.lot = 4
    return found


# ------------------------------------------------------------------------------------------------------------- the model


@torch.no_grad()
def test_a_picture_is_what_the_parts_of_the_model_make_of_its_noise(model: SamplingModel, captions: Path) -> None:
    """Euler steps of the guided velocity, here by hand, one picture at a time."""
    [found] = model.images(["cat"], [5], SMALL)
    z = normal(1, [5], "sample", (4, 4, 4), device=CPU)
    weights = weights_of(model.config, 8)
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, weights[name]), "the average"
    assert model.module.text is not None
    with_prompt, without = (model.module.text(model.text.prepare([p])) for p in ("cat", None))
    for i in range(3):
        t = torch.tensor([1000 * (1 - i / 3)])
        cond, uncond = (model.module(z, t, condition) for condition in (with_prompt, without))
        z = z - (uncond + 2.0 * (cond - uncond)) / 3
    expected = ((model.codec.decode(z)[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert found.float().std() > 5, "not a grey square"
    assert (model.step, model.weights) == (7, "ema")
    assert Path(model.source).parent == captions / "checkpoints"


def test_pictures_do_not_depend_on_what_is_drawn_with_them(model: SamplingModel) -> None:
    together = model.images(PROMPTS, range(6), SMALL)
    assert torch.equal(together, torch.cat([model.images([p], [i], SMALL) for i, p in enumerate(PROMPTS)]))
    shuffled = [4, 1, 5]
    assert torch.equal(together[shuffled], model.images([PROMPTS[i] for i in shuffled], shuffled, SMALL))
    assert not torch.equal(together[0], together[5]), "the same prompt at another position has other noise"
    moved = model.images(["dog"], [5], SMALL)[0]
    assert torch.equal(moved, together[5])


@pytest.mark.parametrize("positions", [[6], [0, 3], [2, 1], [3, 4, 5, 6, 7, 8]])
def test_the_network_computes_whole_lots_with_each_picture_at_its_place(
    model: SamplingModel, positions: list[int]
) -> None:
    """By which its rounding is always the same, even where 8 bits would not show it."""
    settings = SampleSettings("euler", 1, seed=1, resolution=32)
    seen: list[torch.Tensor] = []
    hook = model.module.denoiser.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    model.images(["dog"] * len(positions), positions, settings)
    hook.remove()
    lots = sorted({position // model.lot for position in positions})
    assert [len(zt) for zt in seen] == [model.lot] * len(lots)
    for position in positions:
        [noise] = normal(1, [position], "sample", (4, 4, 4), device=CPU)
        assert torch.equal(seen[lots.index(position // model.lot)][position % model.lot], noise)


def test_lots_of_another_size_round_otherwise_at_most(model: SamplingModel, captions: Path) -> None:
    together = model.images(PROMPTS, range(6), SMALL)
    other = SamplingModel.open(str(captions), CPU)
    other.lot = 1
    assert (other.images(PROMPTS, range(6), SMALL).int() - together.int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("sampler", "nfe"), [("euler", 4), ("heun", 7), ("rk4", 16), ("rk4-38", 16), ("dpm-solver", 4)]
)
def test_every_sampler_draws_and_its_cost_is_told(model: SamplingModel, sampler: str, nfe: int) -> None:
    settings = SampleSettings(sampler, 4, guidance=1.0, resolution=32)
    calls: list[int] = []
    hook = model.module.denoiser.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    images = model.images(["dog"], [0], settings)
    hook.remove()
    assert images.shape == (1, 3, 32, 32)
    assert calls == [model.lot] * nfe, "without guidance no sample is computed twice"
    assert (model.cost(settings).calls, model.cost(settings).passes) == (nfe, nfe)


def test_pictures_of_another_shape(model: SamplingModel) -> None:
    wide = SampleSettings("euler", 2, resolution=32, width=64)
    assert model.images(["dog"], [0], wide).shape == (1, 3, 32, 64)
    assert wide.side == 45


def test_weights(captions: Path, tmp_path: Path) -> None:
    config = tiny("task.text.max_bytes=12")
    raw = SamplingModel.open(str(captions), CPU, weights="raw")
    assert all(torch.equal(tensor, weights_of(config, 7)[name]) for name, tensor in raw.module.state_dict().items())
    safetensors.torch.save_file(weights_of(config, 3), tmp_path / "mine.safetensors")
    mine = SamplingModel.open(str(captions), CPU, weights=str(tmp_path / "mine.safetensors"))
    assert mine.step == 0, "the file does not say it"
    for words, step in (({"step": "660"}, 660), ({"step": "many"}, 0)):
        safetensors.torch.save_file(weights_of(config, 3), tmp_path / "said.safetensors", metadata=words)
        assert SamplingModel.open(str(captions), CPU, weights=str(tmp_path / "said.safetensors")).step == step
    assert all(torch.equal(tensor, weights_of(config, 3)[name]) for name, tensor in mine.module.state_dict().items())
    safetensors.torch.save_file({"denoiser.final.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    for bad, message in {
        str(tmp_path / "other.safetensors"): r"--weights: .*other.safetensors: \S+ (is not there|has shape)",
        "average": "--weights: 'average' is none of ema, raw",
        "ema:wide": "--weights: 'ema:wide'; give a relative width",
    }.items():
        with pytest.raises(UserError, match=message):
            SamplingModel.open(str(captions), CPU, weights=bad)


def test_without_an_average_the_last_weights_are_named(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", average=False)
    with pytest.raises(UserError, match=r"step-00000007-\S+: holds no averaged weights; take --weights raw"):
        SamplingModel.open(str(folder), CPU)
    assert SamplingModel.open(str(folder), CPU, weights="raw").step == 7


def test_a_checkpoint_can_be_named(captions: Path) -> None:
    [checkpoint] = (captions / "checkpoints").glob("step-*")
    assert SamplingModel.open(f"{checkpoint}/", CPU).source == str(checkpoint)
    with pytest.raises(UserError, match="no committed checkpoint"):
        SamplingModel.open(f"{captions}/checkpoints/step-00000008-00000000", CPU)


# -------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "magic"}, "--sampler: 'magic' is none; this model's paradigm, flow, takes euler, heun, rk4"),
        ({"sampler": "ddim"}, "--sampler: ddim does not go with flow"),
        ({"steps": 0}, "--steps: 0 is not positive"),
        ({"guidance": -1.0}, "--guidance: -1 is no scale"),
        ({"guidance": float("nan")}, "--guidance: nan is no scale"),
        ({"guidance_interval": (0.8, 0.2)}, "--guidance-interval: 0.8 to 0.2"),
        ({"guidance_rescale": 1.5}, "--guidance-rescale: 1.5 is not within 0 to 1"),
        ({"resolution": 36}, "--size: 36 px is no multiple of 8, .*; take 32 or 40"),
        ({"resolution": 0}, "--size: 0 px is no multiple of 8"),
        ({"width": 136}, "--size: 136 px are 17 patches a side, and the model has positions for 16; take 128 px"),
    ],
)
def test_what_a_model_cannot_do(model: SamplingModel, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        model.images(["dog"], [0], SampleSettings(**{"sampler": "euler", "steps": 3, "resolution": 32, **changes}))
    assert "\n" not in str(e.value)


def test_ddpm_has_steps_of_a_schedule(classes: Path) -> None:
    model = SamplingModel.open(str(classes), CPU)
    with pytest.raises(UserError, match="--steps: 1001 is more than the 1000 of the schedule"):
        SampleSettings("ddim", 1001).check(model.task)
    with pytest.raises(UserError, match=r"--sampler: rk4 does not go with ddpm_eps, .*; take ddim, dpm-solver"):
        SampleSettings("rk4", 10).check(model.task)


def test_a_picture_that_is_not_finite_is_refused(captions: Path) -> None:
    model = SamplingModel.open(str(captions), CPU)
    model.lot = 1
    next(model.module.denoiser.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="pictures at positions 3 to 3 are not finite; take less --guidance"):
        model.images(["dog"], [3], SMALL)


# --------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_and_classes_go_with_their_models(model: SamplingModel, classes: Path) -> None:
    of_classes = SamplingModel.open(str(classes), CPU)
    of_classes.lot = 2
    settings = SampleSettings("ddim", 2, resolution=32)
    pictures = of_classes.images([1, "3", None], range(3), settings)
    assert torch.equal(pictures[1], of_classes.images([3], [1], settings)[0]), "a number in words is a class too"
    with pytest.raises(UserError, match="--prompt: 'dog' for a model of 4 classes; give --classes 0-3"):
        of_classes.images(["dog"], [0], settings)
    with pytest.raises(UserError, match="--classes: 4 is no class of the model's 0 to 3"):
        of_classes.images([4], [0], settings)
    with pytest.raises(UserError, match="--classes: class 2 for a model that takes captions"):
        model.images([2], [0], SMALL)


def test_prompts_that_are_cut_are_told(model: SamplingModel) -> None:
    assert model.check_prompts(["short", "twelve bytes", "thirteen bytes", None]) == [False, False, True, False]


def test_files_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a.txt": "dog\n\n  red heart \r\ncafé\n", "b.jsonl": '"dog"\n{"prompt": "x", "id": 7}\n{"class": 3}\nnull\n5\n',
             "c.json": '[{"caption": "a"}, "b"]'}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(str(tmp_path / "a.txt")) == ["dog", "red heart", "café"]
    assert read_prompts(str(tmp_path / "b.jsonl")) == ["dog", "x", 3, None, 5]
    assert read_prompts(str(tmp_path / "c.json")) == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert gathered(["zero"], ["-"], [], per_prompt=2) == ["zero", "one", "two"] * 2
    assert parse_classes("0,5-7") == [0, 5, 6, 7]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\n \n", "has no prompts"),
        ("x.txt", b"\xff\xfe\x00", "is not UTF-8"),
        ("x.jsonl", b'"a"\n{"text": 1}\n', 'line 2: an object needs one of "prompt"'),
        ("x.jsonl", b"dog\n", "line 1: not JSON"),
        ("x.jsonl", b"[1]\n", "line 1: .* is neither a string nor"),
        ("x.jsonl", b"true\n", "line 1: True is neither"),
        ("x.json", b'{"a": 1}', "is no JSON list"),
        ("x.json", b"[" * 100_000, "not JSON"),
    ],
)
def test_bad_files_of_prompts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"--prompts: .*{name}.*{message}"):
        gathered([], [str(tmp_path / name)], [])


def test_bad_words_for_prompts(tmp_path: Path) -> None:
    for words, message in {
        ((), (), ()): "--prompt: nothing to draw",
        (("a",), (), ("1",)): "--classes: goes without --prompt",
        ((), (), ("1-",)): "--classes: '1-' is no class",
        ((), (), ("7-5",)): "--classes: 7-5 is empty",
        ((), (str(tmp_path / "none.txt"),), ()): "--prompts: .*none.txt is not there",
        (("x" * 200_000,), (), ()): "prompt 0 has 200000 characters",
    }.items():
        with pytest.raises(UserError, match=message):
            gathered(*words)
