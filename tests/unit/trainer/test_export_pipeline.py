"""Exported pipelines: what diffusers, without this package, draws from the folder, and what is refused."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from launch.commands.export import export
from tests.export_runs import SMALL_MMDIT, module_of, run_of, small
from tests.text_models import write_sd3
from trainer.config import RunConfig, replace
from trainer.errors import UserError
from trainer.export import parity
from trainer.export.latent_diffusion import Exported, export_latent_diffusion
from trainer.export.run import push_export
from trainer.export.weights_file import export_weights
from trainer.sampling import model as sampling_model
from trainer.sampling.model import SamplingModel
from trainer.sampling.settings import SampleSettings

PROMPTS = ("a red fox", "a lighthouse")
CPU = torch.device("cpu")
SIDE_PX = small().phases[-1].resolution


def exported(run: Path, out: Path | str, **options: Any) -> Exported:
    given = {"dtype": torch.float32, "prompts": PROMPTS, "pictures": 2, "device": CPU, **options}
    return export_latent_diffusion(str(run), str(out), **given)


def json_of(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_of(tmp_path_factory.mktemp("export") / "run", small())
    figures = {"fid": {"value": 12.5, "interval": {"low": 12.0, "high": 13.0}}, "kid": {"value": None}}
    record = {"step": 7, "weights": "ema", "figures": figures, "counts": {"generated": 500, "real": 400}, "size": 64,
              "definition": "0a1b"}  # fmt: skip
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "step-00000007-0a1b2c3d4e5f.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(scope="module")
def demo(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float16, as the command writes it."""
    out = tmp_path_factory.mktemp("exported") / "demo"
    arguments = [str(run), str(out), "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--licence", "mit"]
    result = click.testing.CliRunner().invoke(export, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "a pipeline with its own code (task.text.kind is bytes, not frozen), step 7" in result.output
    assert "largest difference" in result.output
    return out


# ---------------------------------------------------------------------------------------------------- a pipeline's folder

DRAW = """
import sys, numpy as np, torch
class Unknown:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("trainer", "data", "launch", "ops", "einops", "pydantic"):
            raise ImportError(name)
sys.meta_path.insert(0, Unknown())
from diffusers import DiffusionPipeline
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
asked = dict(num_inference_steps=4, guidance_scale=3.0)
together = pipe(["a red fox", "a lighthouse"], seed=5, height=64, width=64, **asked).images
alone = pipe("a lighthouse", seed=5, first_position=1, height=64, width=64, **asked).images
noise = torch.randn(1, 4, 4, 6, generator=torch.Generator().manual_seed(3))
wide = pipe("a red fox", latents=noise, height=32, width=48, output_type="np", **asked).images
generator = torch.Generator().manual_seed(3)
by_generator = pipe("a red fox", generator=generator, height=32, width=48, output_type="np", **asked).images
assert np.array_equal(wide, by_generator) and wide.shape == (1, 32, 48, 3)
try:
    pipe("a red fox", height=36)
    raise SystemExit("36 px were not refused")
except ValueError as e:
    assert "no multiples of 8" in str(e), e
for name, bad in dict(num_inference_steps=0, guidance_scale=-1.0, guidance_interval=(0.8, 0.2), guidance_rescale=7.0,
                      seed=-1).items():
    try:
        pipe("a red fox", height=32, width=32, **{name: bad})
        raise SystemExit(name + " was not refused")
    except ValueError as e:
        assert str(e).startswith(name + ": "), e
both = dict(seed=1, generator=generator)
for prompt, more, words in (([], {}, "prompt: there is none"), ("a fox", both, "seed: goes without")):
    try:
        pipe(prompt, height=32, width=32, **more)
        raise SystemExit(words + " was not refused")
    except ValueError as e:
        assert words in str(e), e
try:
    pipe.save_pretrained("copy")
    raise SystemExit("a folder without its code was written")
except NotImplementedError as e:
    assert "copy the folder" in str(e), e
np.save(out, np.stack([np.asarray(image) for image in [*together, *alone]]))
"""


def test_a_process_without_this_package_draws_what_we_draw(demo: Path, run: Path, tmp_path: Path) -> None:
    """Steps, guidance, seed and size are others than the export's own check has; neither einops nor pydantic is there."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", DRAW, str(demo), str(tmp_path / "out.npy")], env=environment, cwd=tmp_path,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, alone = np.load(tmp_path / "out.npy").astype(int)
    assert np.abs(second - alone).max() <= 1
    model = SamplingModel.open(str(run), CPU)
    for parameter in [*model.module.parameters(), *model.codec.vae.parameters()]:
        parameter.data.copy_(parameter.half())
    ours = model.images(list(PROMPTS), [0, 1], SampleSettings("euler", 4, 3.0, seed=5, resolution=64))
    ours_BHWC = ours.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(np.stack([first, second]) - ours_BHWC).max() <= 1
    assert np.abs(ours_BHWC[0] - ours_BHWC[1]).mean() > 1, "prompts tell"


def test_what_lies_in_the_folder(demo: Path, run: Path) -> None:
    names = {path.relative_to(demo).as_posix() for path in demo.rglob("*") if path.is_file()}
    [source] = [name for name in names if name.startswith("transformer/loupe_model_")]
    assert names == {
        "README.md", "config.yaml", "export.json", "model_index.json", "pipeline.py", "samples.png", source,
        "scheduler/scheduler_config.json", "transformer/config.json", "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    index = json_of(demo / "model_index.json")
    assert index["_class_name"] == ["pipeline", "TextToImagePipeline"]
    assert index["transformer"] == [source.removeprefix("transformer/").removesuffix(".py"), "TextToImageModel"]
    weights = safetensors.torch.load_file(demo / "transformer" / "diffusion_pytorch_model.safetensors")
    average = dict(module_of(small(), 2).named_parameters())
    assert weights.keys() == average.keys()
    assert all(torch.equal(weights[name], parameter.detach().half()) for name, parameter in average.items())

    record = json_of(demo / "export.json")
    assert (record["format"], record["step"], record["weights"], record["dtype"]) == (
        "loupe-export",
        7,
        "ema",
        "float16",
    )
    assert record["compared"]["largest"] <= 1
    assert record["files"].keys() == names - {"export.json"}
    for name, about in record["files"].items():
        data = (demo / name).read_bytes()
        assert about == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    card = (demo / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head == {"library_name": "diffusers", "pipeline_tag": "text-to-image", "license": "mit"}
    for text in (
        f"| low_resolution | 7 of 8 | {small().phases[0].resolution} px | 8 |",
        "emoji",
        "Fluent Emoji",
        "step 7",
        "1. a red fox",
        "500 pictures against 400 at 64 px, definition 0a1b | 12.5 (12 to 13) |",
    ):
        assert text in card
    for path in (demo / "README.md", demo / "config.yaml", demo / "export.json"):
        assert str(run.parent) not in path.read_text()


def test_a_second_export_replaces_the_first_and_nothing_else(demo: Path, run: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.makedirs("/models", exist_ok=True)
    push_export(str(demo), "memory://models/demo")
    assert {p.removeprefix("/models/demo/") for p in fs.find("/models/demo")} == {
        p.relative_to(demo).as_posix() for p in demo.rglob("*") if p.is_file()
    }
    assert fs.cat_file("/models/demo/model_index.json") == (demo / "model_index.json").read_bytes()
    fs.rm_file("/models/demo/model_index.json")  # as an interrupted upload leaves it
    fs.pipe_file("/models/demo/vae/config.json", b"{}")
    push_export(str(demo), "memory://models/demo")
    assert fs.cat_file("/models/demo/vae/config.json") == (demo / "vae" / "config.json").read_bytes()
    fs.pipe_file("/models/demo/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"notes\.txt, which no export writes"):
        push_export(str(demo), "memory://models/demo")
    with pytest.raises(UserError, match=r"notes\.txt, which no export writes"):
        exported(run, "memory://models/demo")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file; an export is a folder"):
        exported(run, tmp_path / "file")


def test_the_file_that_makes_it_whole_is_sent_last(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.filesystem("memory")
    sent: list[str] = []
    put = type(fs).put_file

    def watched(self: Any, local: str, remote: str, **options: Any) -> None:
        sent.append(remote)
        if remote.endswith("diffusion_pytorch_model.safetensors"):
            assert not self.exists("/watched/model_index.json")
        put(self, local, remote, **options)

    monkeypatch.setattr(type(fs), "put_file", watched)
    for _ in range(2):  # also where an earlier one is there
        push_export(str(demo), "memory://watched")
        assert sent[-1].endswith("model_index.json")
        assert sent[0].endswith("export.json")
        sent.clear()


def test_pictures_that_differ_are_never_put_in_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: SamplingModel, *_: Any) -> np.ndarray:
        return np.zeros((2, 3, SIDE_PX, SIDE_PX), np.uint8)

    monkeypatch.setattr(parity, "_drawn", other)
    with pytest.raises(UserError, match=r"pictures differ by up to \d+ of 255 .* so nothing was written"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_diffusers_cannot_open_is_never_put_in_place(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.export import pipeline_folder

    monkeypatch.setattr(pipeline_folder, "STEM", "another_name")
    with pytest.raises(UserError, match=r"diffusers cannot draw from the exported folder, so nothing was written: .*"):
        exported(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ Stable Diffusion 3's


def sd3_config(folder: Path, *overrides: str, **encoders: Any) -> RunConfig:
    config = small(f"task.model={SMALL_MMDIT % ''}", *overrides)
    text = write_sd3(folder)
    changed = tuple(replace(e, **{"padding": "seen", "null_text": "empty", **encoders}) for e in text.encoders)
    assert config.task.kind == "latent_diffusion"
    return replace(config, task=replace(config.task, text=replace(text, encoders=changed)))


def test_sd3s_layout_is_stable_diffusion_3s_own_pipeline(tmp_path: Path) -> None:
    config = sd3_config(tmp_path / "encoders", f"task.paradigm.shift_base_px={SIDE_PX // 2}")
    run, out = run_of(tmp_path / "run", config), tmp_path / "out"
    done = exported(run, out, without_text_encoders=True)
    assert done.pipeline == "StableDiffusion3Pipeline"
    assert done.parity.largest <= 1
    assert done.parity.settings.guidance == 2.0
    index = json_of(out / "model_index.json")
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["text_encoder_3"] == [None, None]
    assert json_of(out / "scheduler" / "scheduler_config.json")["shift"] == 2.0
    assert not list(out.glob("*.py"))
    assert not list(out.glob("text_encoder*"))
    card = (out / "README.md").read_text()
    assert "text_encoder_3=..." in card
    assert "max_sequence_length=24" in card
    other = run_of(tmp_path / "masked", sd3_config(tmp_path / "encoders2", padding="masked"))
    with pytest.raises(UserError, match=r"--layout sd3: task\.text\.encoders\.0\.padding is masked"):
        exported(other, tmp_path / "out2", layout="sd3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "pipeline"),
    [
        (("task.paradigm={kind: ddpm_eps}", "task.model={kind: unet, block_out_channels: [16, 32], "
          "attention_levels: [true, false], layers_per_block: 1, head_dim: 8, norm_num_groups: 8}"), ""),
        (("task.paradigm={kind: ddpm_v, shift_base_px: 32}",
          "task.model={kind: dit, num_blocks: 2, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}",
          "task.text={kind: classes, num_classes: 3, width: 8}"), ""),
        (("task.model={kind: pixart, num_blocks: 2, num_heads: 2, head_dim: 8, patch_size: 1, base_grid: 4}",), ""),
        ((f"task.model={SMALL_MMDIT % ', layout: shared, positions: rotary, position_growth: stretch'}",
          "samples.guidance_interval=[0.2, 0.9]", "samples.guidance_rescale=0.5"), ""),
    ],
    ids=["unet-eps", "dit-v-classes", "pixart", "shared-rotary"],
)  # fmt: skip
def test_every_kind_of_run_draws_the_same(overrides: tuple[str, ...], pipeline: str, tmp_path: Path) -> None:
    prompts = ("0", "2") if any("classes" in o for o in overrides) else PROMPTS
    # not wilder than a trained network: rounding must not grow over the steps
    run = run_of(tmp_path / "run", small(*overrides), scale=0.02)
    done = exported(run, tmp_path / "out", prompts=prompts)
    assert (done.pipeline, done.parity.pictures) == (pipeline, 2)


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"padding": "masked", "null_text": "zeros"}, {"null_text": "zeros"}], ids=str)
def test_frozen_encoders_in_the_folder(given: dict[str, Any], tmp_path: Path) -> None:
    run, out = run_of(tmp_path / "run", sd3_config(tmp_path / "encoders", **given)), tmp_path / "out"
    done = exported(run, out)
    assert done.pipeline == ("" if "padding" in given else "StableDiffusion3Pipeline")
    assert (out / "text_encoder_3" / "model.safetensors").exists()
    assert (out / "tokenizer_3" / "tokenizer.json").exists()
    if not done.pipeline:
        assert done.parity.settings.guidance == 2.0
        return
    assert done.parity.settings.guidance == 1.0  # it guides away from the empty caption, which this run has not learned
    assert "export with `--layout custom`" in (out / "README.md").read_text()
    assert exported(run, tmp_path / "custom", layout="custom").parity.settings.guidance == 2.0


# ---------------------------------------------------------------------------------------------------------- safetensors


def test_plain_safetensors(run: Path, tmp_path: Path) -> None:
    for weights, seed in (("ema", 2), ("raw", 1)):
        done = export_weights(str(run), str(tmp_path / weights), weights=weights)
        state = safetensors.torch.load_file(tmp_path / weights / "model.safetensors")
        expected = module_of(small(), seed).state_dict()
        assert state.keys() == expected.keys()
        assert done.tensors == len(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    half = export_weights(str(run), str(tmp_path / "half"), dtype=torch.bfloat16)
    assert half.bytes * 2 == done.bytes
    assert sorted(p.name for p in (tmp_path / "half").iterdir()) == ["config.yaml", "export.json", "model.safetensors"]
    with pytest.raises(UserError, match="--weights: 'best' is none of"):
        export_weights(str(run), str(tmp_path / "other"), weights="best")


@pytest.mark.slow
def test_the_comparison_is_never_in_bfloat16(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As training is on a GPU, where a picture is levels away from that in float32."""

    def lower(device: torch.device) -> None:
        raise AssertionError(f"lower precision on {device}")

    monkeypatch.setattr(sampling_model, "autocast", lower)
    with pytest.raises(AssertionError, match="lower precision"):
        SamplingModel.open(str(run), CPU).images(["dog"], [0], SampleSettings("euler", 2, 3.0, resolution=64))
    assert exported(run, tmp_path / "out").parity.largest <= 1
